"""Runs of imported models that the tests make adapters for."""

import os
from collections.abc import Callable

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded


@pytest.fixture(scope="session")
def base_of(tmp_path_factory) -> Callable:
    """name of a model -> it in both forms; not to be written to."""
    from jaxllm.data.tokenizer_training import train_tokenizer
    from tests.interop.peft.adapters import make_base

    folder = tmp_path_factory.mktemp("bases")
    text = ["却说曹操引兵追赶，玄德大惊。the quick brown fox jumps over the lazy dog\n"] * 20
    train_tokenizer(text, vocab_size=320).save(folder / "tokenizer")
    return lambda name: make_base(name, folder)
