"""What is held out for evaluation, decided before anything is learned, the tokenizer included."""

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from jaxllm.data.sources import Record, Source
from jaxllm.errors import UserError


@dataclass(frozen=True)
class HeldOut:
    """`config.data.held_out`, read. Of kind "none", "fraction", "marker" or "file"; the others' fields are empty."""

    kind: str = "none"
    fraction: float = 0.0
    marker: str = ""  # held out from its first occurrence on
    path: str = ""


def read_held_out(value: str) -> HeldOut:
    """Reads "" or "0" (nothing), a number between 0 and 1, "file:PATH", or else a text to search for.

    Raises:
      UserError: a number outside (0, 1), or "file:" without a path.
    """
    try:
        number = float(value or 0)
    except ValueError:
        number = None
    if number is not None:
        if number == 0:
            return HeldOut()
        if not 0 < number < 1:
            raise UserError(f"config.data.held_out={value!r}: a fraction must be between 0 and 1, for example 0.01.")
        return HeldOut("fraction", fraction=number)
    if value.startswith("file:"):
        if not value.removeprefix("file:").strip():
            raise UserError("config.data.held_out='file:' names no file.")
        return HeldOut("file", path=value.removeprefix("file:"))
    return HeldOut("marker", marker=value)


class Piece(NamedTuple):
    """A document, or a part of one that was cut in two."""

    text: str
    held_out: bool
    ends: bool  # false where the document goes on in the other split
    progress: float

    @property
    def size(self) -> int:
        """Characters."""
        return len(self.text)


def split_documents(source: Source, held_out: HeldOut) -> Iterator[Piece]:
    """The documents of `source`, each said to be held out or not; a text in which the split falls is cut in two.

    A fraction f: one document of every 1/f in a row, chosen by a fixed hash, so that the split hangs on neither seed
    nor processes. With fewer than 1/f documents: the last part f of each, from a line's start where there is one.
    A marker: everything from its first occurrence on. Of kind "none" and "file" nothing of this source is held out.

    Raises:
      UserError: the marker is nowhere.
    """
    if held_out.kind == "fraction":
        needed = math.ceil(1 / held_out.fraction)
        few = sum(1 for _ in itertools.islice(source.documents(), needed)) < needed
        return _tails(source, held_out.fraction) if few else _every(source, held_out.fraction)
    if held_out.kind == "marker":
        return _from_marker(source, held_out.marker)
    return (Piece(d.text, False, True, d.progress) for d in source.documents())


def split_records(source: Source, held_out: HeldOut) -> Iterator[tuple[Record, bool]]:
    """The records of `source`, each said to be held out or not. None is ever cut.

    A fraction f: one of every 1/f in a row as `split_documents` chooses it; with fewer than 1/f records, one of them.
    """
    if held_out.kind != "fraction":
        return ((record, False) for record in source.records())
    needed = math.ceil(1 / held_out.fraction)
    count = sum(1 for _ in itertools.islice(source.records(), needed))
    return zip(source.records(), _chosen(1 / count if count < needed else held_out.fraction), strict=False)


def _every(source: Source, fraction: float) -> Iterator[Piece]:
    for document, chosen in zip(source.documents(), _chosen(fraction), strict=False):
        yield Piece(document.text, chosen, True, document.progress)


def _chosen(fraction: float) -> Iterator[bool]:
    """Without end: in each block of about 1/`fraction` one is true, chosen by a hash of the block's number."""
    end = 0
    for block in itertools.count():
        start, end = end, max(math.ceil((block + 1) / fraction), end + 1)
        chosen = start + int.from_bytes(hashlib.sha256(b"%d" % block).digest()[:8]) % (end - start)
        yield from (i == chosen for i in range(start, end))


def _tails(source: Source, fraction: float) -> Iterator[Piece]:
    for document in source.documents():
        text = document.text
        cut = math.ceil(len(text) * (1 - fraction))
        line = text.find("\n", cut - 1) + 1 if cut else 0
        yield from _cut(text, line if 0 < line < len(text) else cut, document.progress)


def _from_marker(source: Source, marker: str) -> Iterator[Piece]:
    found = False
    for document in source.documents():
        at = 0 if found else document.text.find(marker)
        found = found or at >= 0
        yield from _cut(document.text, at if at >= 0 else len(document.text), document.progress)
    if not found:
        raise UserError(
            f"config.data.held_out={marker!r} is nowhere in the text. "
            "Give a text that occurs in it, a fraction such as 0.01, or file:PATH."
        )


def _cut(text: str, at: int, progress: float) -> Iterator[Piece]:
    if text[:at]:
        yield Piece(text[:at], False, at == len(text), progress)
    if text[at:]:
        yield Piece(text[at:], True, True, progress)
