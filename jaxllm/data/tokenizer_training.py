"""Training a sentencepiece tokenizer: BPE or unigram, byte fallback, texts kept exactly."""

import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from jaxllm.config import one_of
from jaxllm.data.tokenizer import SentencePieceTokenizer
from jaxllm.errors import UserError

KINDS = ("bpe", "unigram")
SPECIALS = ("<pad>", "<unk>", "<s>", "</s>")  # ids 0 to 3; the user's own special tokens follow
SAMPLE_BYTES = 32 << 20  # text to learn from; more is sampled down
MOST_PIECES = 1 << 24
CHUNK = 1000  # characters of a training sentence


def parse_tokenizer(spec: str, name: str = "config.data.tokenizer") -> tuple[str, int] | None:
    """("bpe", 8000) of "bpe:8000"; None where `spec` is a path instead.

    Raises:
      UserError: an unknown kind or a size that is no positive number.
    """
    kind, colon, size = spec.partition(":")
    if not colon or "/" in kind or size.startswith("//"):
        return None
    one_of(f"{name} kind", kind, KINDS)
    if not size.isdecimal() or int(size) == 0:
        raise UserError(f"{name}={spec!r}: {size!r} is not a number of pieces. Write for example {kind}:8000.")
    return kind, int(size)


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: str = "bpe",
    vocab_size: int = 8000,
    specials: Sequence[str] = (),
    coverage: float = 0.9995,
    sample_bytes: int = SAMPLE_BYTES,
) -> SentencePieceTokenizer:
    """Learns `vocab_size` pieces from `texts`; the same texts give the same model.

    Args:
      texts: documents. Of more than `sample_bytes` of UTF-8 an even sample of passages (a thousand characters) is used.
      kind: "bpe" or "unigram".
      vocab_size: pieces in all, with the 4 + `specials` special tokens and the 256 bytes.
      specials: names of further special tokens, ids from 4 on.
      coverage: part of the text's characters that get a piece of their own; the rest is written in bytes.

    Raises:
      UserError: unknown kind, no text, names used twice, or a size the text is too small or too rich for.
    """
    one_of("tokenizer kind", kind, KINDS)
    names = [*SPECIALS, *specials]
    if twice := sorted({name for name in names if not name or names.count(name) > 1}):
        raise UserError(f"Special tokens need distinct names that are not empty; {', '.join(map(repr, twice))} is not.")
    if vocab_size > MOST_PIECES:
        raise UserError(f"A {kind} tokenizer of {vocab_size} pieces is too large: at most {MOST_PIECES}.")
    passages = sample_passages(texts, sample_bytes)
    if not any(passage.strip() for passage in passages):
        raise UserError("There is no text to train a tokenizer on.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(passages),
            model_writer=model,
            model_type=kind,
            vocab_size=max(vocab_size, len(names) + 256),  # with less it does not say how many the text needs
            character_coverage=coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=SPECIALS[0],
            unk_piece=SPECIALS[1],
            bos_piece=SPECIALS[2],
            eos_piece=SPECIALS[3],
            control_symbols=list(specials),
            num_threads=16,  # not the machine's: unigram's sums depend on it
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _explain(error, kind, vocab_size) from error
    return SentencePieceTokenizer(model.getvalue())


def sample_passages(texts: Iterable[str], sample_bytes: int = SAMPLE_BYTES) -> list[str]:
    """The texts in passages of at most `CHUNK` characters, or an even sample of about `sample_bytes` of them.

    Reservoir sampling with a fixed seed: one pass, and no more than the sample in memory.
    """
    kept: list[str] = []
    size, rng = 0, random.Random(0)
    for seen, passage in enumerate((p for text in texts for p in _passages(text)), start=1):
        if size < sample_bytes:
            kept.append(passage)
            size += len(passage.encode())
        elif (slot := rng.randrange(seen)) < len(kept):
            kept[slot] = passage
    return kept


def _passages(text: str) -> Iterator[str]:
    """Cuts before a line end where possible: sentencepiece strips newlines from the end of a training sentence."""
    start = 0
    while len(text) - start > CHUNK:
        cut = text.rfind("\n", start + 1, start + CHUNK)
        cut = cut if cut > 0 else start + CHUNK
        yield text[start:cut]
        start = cut
    yield text[start:]


def _explain(error: RuntimeError, kind: str, vocab_size: int) -> Exception:
    message = str(error)
    if match := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        return UserError(
            f"A {kind} tokenizer of {vocab_size} pieces needs more text: this text yields at most {match[1]}. "
            f"Use {kind}:{match[1]} or less."
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"A {kind} tokenizer of {vocab_size} pieces is too small: special tokens, 256 bytes and the characters of "
            f"this text need {match[1]}. Use {kind}:{match[1]} or more."
        )
    return error
