from pathlib import Path

import pytest
from hypothesis import settings

from jaxllm.data.tokenizer import SentencePieceTokenizer
from jaxllm.data.tokenizer_training import train_tokenizer

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

SHARED = Path(__file__).parents[3] / "shared" / "data"

TEXT = (
    "def encode(text):\n    for line in text:\n\t\tprint(line)\n\n\n"
    "却说曹操引兵追袭玄德。玄德曰：“曹操势大，如之奈何？”\n　　孔明曰：“主公勿忧。”\n"
    "the quick brown fox jumps over the lazy dog,  and the dog sleeps on 1234 times\r\n"
)


@pytest.fixture(scope="session")
def tokenizer() -> SentencePieceTokenizer:
    """A small byte-fallback BPE tokenizer with two special tokens of the user's."""
    return train_tokenizer([TEXT * 5], vocab_size=400, specials=["<|user|>", "<|end|>"])


@pytest.fixture
def shared_file():
    """Path of a file of ../shared/data; the test is skipped where that folder is absent."""

    def path(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"{SHARED / name} is not there")
        return SHARED / name

    return path
