"""Tiny models of transformers with random weights, written where a test wants them."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded


@pytest.fixture(scope="session")
def tokenizer():
    """A sentencepiece tokenizer of 320 pieces: what the vocabularies of the models here are."""
    from jaxllm.data.tokenizer_training import train_tokenizer

    text = ["却说曹操引兵追赶，玄德大惊。the quick brown fox jumps over the lazy dog\n"] * 20
    return train_tokenizer(text, vocab_size=320)
