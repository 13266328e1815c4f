"""The bytes that the tokens of a tokenizer.json stand for, by the decoder that the file names."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError

DECODERS = ("ByteLevel", "ByteFallback", "Metaspace", "Replace", "Strip", "Fuse", "WordPiece", "BPEDecoder")
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
# What the WordPiece decoder does to a word (`cleanup` in tokenizers/src/decoders/wordpiece.rs); within one piece no
# other of its replacements can happen.
CLEANUP = (*((f" {mark}", mark) for mark in ".?!,"), *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")))


def bytes_of_tokens(
    decoder: dict[str, Any] | None,
    vocabulary: Mapping[str, int],
    texts: Mapping[int, str],
    file: Path,
) -> tuple[list[bytes], bool]:
    """The bytes of every token, and whether decoding takes a space away in front of a text.

    Exact for byte-level BPE and for sentencepiece's kinds. What WordPiece took away on encoding does not come back.

    Args:
      decoder: the file's.
      vocabulary: pieces and their ids.
      texts: of the tokens that are no pieces of the model's; a special one has none.
      file: for messages.

    Raises:
      UserError: a decoder that does not work token by token.
    """
    decoder = decoder or {"type": "WordPiece", "prefix": "", "cleanup": False}  # words with spaces between
    decoders = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    for step in decoders:
        kind = step.get("type")
        if kind not in DECODERS or (kind == "Replace" and "String" not in step["pattern"]):
            raise UserError(
                f"{file}: its decoder {kind} is not supported, only those of byte-level BPE, sentencepiece and "
                "WordPiece are."
            )
    as_bytes = _byte_level if any(step["type"] == "ByteLevel" for step in decoders) else _by_steps(decoders)
    table = [b""] * (max(vocabulary.values()) + 1)
    for piece, i in vocabulary.items():
        table[i] = as_bytes(piece)
    for i, text in texts.items():
        table[i] = text.encode()
    return table, any(map(_takes_space, decoders))


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes: GPT-2's `bytes_to_unicode`, the other way round."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[character] for character in piece])
    except KeyError:  # a piece put in by hand
        return piece.encode()


def _by_steps(decoders: Iterable[dict[str, Any]]) -> Callable[[str], bytes]:
    """What the steps of a decoder make of a token that is not the first."""
    steps = [step for step in decoders if step["type"] not in ("Strip", "Fuse")]
    falls_back = any(step["type"] == "ByteFallback" for step in steps)

    def as_bytes(piece: str) -> bytes:
        if falls_back and (byte := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        for step in steps:
            match step:
                case {"type": "Metaspace", "replacement": mark}:
                    piece = piece.replace(mark, " ")
                case {"type": "Replace", "pattern": {"String": mark}, "content": text}:
                    piece = piece.replace(mark, text)
                case {"type": "BPEDecoder", "suffix": suffix}:
                    piece = piece.replace(suffix, " ")
                case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup}:
                    goes_on = prefix and piece.startswith(prefix)
                    piece = piece.removeprefix(prefix) if goes_on else f" {piece}"
                    for found, better in CLEANUP if cleanup else ():
                        piece = piece.replace(found, better)
        return piece.encode()

    return as_bytes


def _takes_space(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "Metaspace"}:  # `add_prefix_space` before version 0.15
            return step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
        case {"type": "Strip", "content": " ", "start": start}:
            return start > 0
        case {"type": kind}:
            return kind == "WordPiece"
    return False
