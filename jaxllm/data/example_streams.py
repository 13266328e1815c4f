"""Examples on disk: read from their records, tokenised once, and which of them a run of a given length takes."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxllm.data.batch import EXAMPLES, BatchKind
from jaxllm.data.examples import Example, parse_fields, read_example
from jaxllm.data.held_out import HeldOut, split_records
from jaxllm.data.preferences import read_pair
from jaxllm.data.shards import SplitWriters, TokenStream, in_batches
from jaxllm.data.sources import Source
from jaxllm.data.supervision import ExampleEncoder
from jaxllm.errors import UserError

BATCH = 1 << 20  # characters tokenised at once


class ExamplePiece(NamedTuple):
    """An example on its way into a stream."""

    example: Example
    origin: str
    held_out: bool
    progress: float
    margin: float = 0.0

    @property
    def size(self) -> int:
        """Characters, about."""
        return 1 + sum(map(len, self.example.texts))


def read_pieces(
    source: Source, held_out: HeldOut, fields: str, kind: BatchKind = EXAMPLES, *, dialogues: bool = False
) -> Iterator[ExamplePiece]:
    """The examples of `source` in their order, of a pair the chosen and then the rejected.

    Args:
      fields: `config.data.fields`.
      kind: of the batches that they are for.
      dialogues: of pairs, texts that are dialogues become conversations.
    """
    named = parse_fields(fields, text=source.field)
    for record, is_held_out in split_records(source, held_out):
        if kind.examples == 1:
            yield ExamplePiece(read_example(record, named), record.origin, is_held_out, record.progress)
            continue
        pair = read_pair(record, named, dialogues=dialogues)
        yield ExamplePiece(pair.chosen, record.origin, is_held_out, record.progress, pair.margin)
        yield ExamplePiece(pair.rejected, record.origin, is_held_out, record.progress)


def write_example_streams(
    folder: Path,
    pieces: Iterable[ExamplePiece],
    encoder: ExampleEncoder,
    *,
    num_threads: int,
    report: Callable[[float], None],
) -> None:
    """Tokenises examples into the streams `folder`/train and `folder`/held_out, with what of each is learned."""
    writers = SplitWriters(folder, encoder.tokenizer)
    for batch in in_batches(pieces, BATCH):
        examples, origins = [piece.example for piece in batch], [piece.origin for piece in batch]
        for piece, encoded in zip(batch, encoder.encode(examples, origins, num_threads), strict=True):
            writers[piece.held_out].add_example(encoded._replace(margin=piece.margin))
        report(batch[-1].progress)
    writers.close()


class Taken(NamedTuple):
    """Which records of a stream are taken for rows of some length."""

    numbers: Int[np.ndarray, " taken"]
    cut: int  # so many of them lose their end
    dropped: int  # not taken: too long, or nothing to learn is left of them


def taken_examples(stream: TokenStream, length: int, truncation: str, per_record: int = 1) -> Taken:
    """Those that fit; with `truncation` "cut" also those too long of which something to learn is in the first part.

    Of a record with several examples that part is an even share of the row, and what the others leave of theirs.
    """
    starts = np.asarray(stream.document_starts)
    fits = record_sizes(stream, per_record) <= length
    first = np.searchsorted(stream.supervised[:, 0], starts[:-1])  # each example has a range that is learned
    learns = stream.supervised[first, 0] < starts[:-1] + length // per_record
    take = fits | (learns.reshape(-1, per_record).all(1) & (truncation == "cut"))
    return Taken(np.flatnonzero(take), int((take & ~fits).sum()), int((~take).sum()))


def record_sizes(stream: TokenStream, per_record: int) -> Int[np.ndarray, " records"]:
    """The tokens of each record, of all its examples."""
    return np.diff(np.asarray(stream.document_starts)).reshape(-1, per_record).sum(1)


def mean_responses(streams: Sequence[TokenStream]) -> tuple[float, float]:
    """The tokens that are learned of a chosen and of a rejected response, on average."""
    learned = [[0, 0] for _ in streams]
    for counts, stream in zip(learned, streams, strict=True):
        documents = np.searchsorted(stream.document_starts, stream.supervised[:, 0], side="right") - 1
        counts[:] = np.bincount(documents % 2, np.diff(stream.supervised)[:, 0], minlength=2)
    chosen, rejected = np.sum(learned, 0) / (sum(stream.index.documents for stream in streams) // 2)
    return float(chosen), float(rejected)


def check_lengths(
    stream: TokenStream,
    length: int,
    truncation: str,
    pieces: Callable[[], Iterator[ExamplePiece]],
    held_out: bool,
    places: int = 0,
    per_record: int = 1,
) -> None:
    """Refuses examples longer than a row where `truncation` says so, and a stream of which none is taken.

    Args:
      length: of a row, without the places of virtual tokens before each example of a record.
      pieces: what the stream was made of, to say where an example is from; read only then.
      places: so many tokens more has a row.
      per_record: examples of a record, which share a row.

    Raises:
      UserError: with the first such example and the number of all.
    """
    sizes = record_sizes(stream, per_record)
    long = np.flatnonzero(sizes > length)
    if not len(long) or (
        truncation != "refuse" and len(taken_examples(stream, length, truncation, per_record).numbers)
    ):
        return
    of_split = (piece.origin for piece in pieces() if piece.held_out == held_out)
    origin = next(itertools.islice(of_split, per_record * int(long[0]), None))
    beside = f" ({length + places:,} without the {places} virtual ones)" if places else ""
    this = "this example has" if per_record == 1 else "this pair, its prompt with each response, has"
    what = f"{origin}: {this} {sizes[long[0]]:,} tokens, and a row {length:,}{beside}"
    if truncation == "refuse":
        raise UserError(
            f"{what}; {len(long):,} of {len(sizes):,} are too long (the longest {sizes.max():,}). Raise "
            "config.data.length, or set config.data.truncation to cut (their ends) or drop (them)."
        )
    raise UserError(f"{what}; none is short enough. Raise config.data.length.")
