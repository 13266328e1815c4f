"""From `config.data` to batches: the one entry for a training loop.

data = prepare(config.data, length=1024)
loader = data.train_loader(sharding, batch_size=256, seed=0)
for batch in data.eval_batches(sharding, batch_size=256): ...
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jaxllm.data import shards
from jaxllm.data.batch import MAX_PAIRS, PACKED, Batch, BatchKind, Vocabulary, row_random
from jaxllm.data.check_config import check_data, refuse_held_out_in_training
from jaxllm.data.config import DataConfig
from jaxllm.data.example_streams import (
    ExamplePiece,
    Taken,
    check_lengths,
    mean_responses,
    read_pieces,
    taken_examples,
    write_example_streams,
)
from jaxllm.data.held_out import HeldOut, Piece, read_held_out, split_documents
from jaxllm.data.loader import DeviceBatches, EvaluationRows, Rows, StepRows, TrainLoader
from jaxllm.data.open_tokenizer import nothing_to_train_on, open_tokenizer
from jaxllm.data.packing import PACKINGS, EvaluationWindows, Examples, Packing, empty_row
from jaxllm.data.progress import Bar, no_progress_bar, progress_bar
from jaxllm.data.sources import Source, kind_of, open_components, open_source
from jaxllm.data.supervision import ExampleEncoder
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import UserError

T = TypeVar("T")

HELD_OUT_SEED = 1 << 32  # no config.seed is so large: held-out rows are made with random numbers of their own


@dataclass(frozen=True)
class Dataset:
    """Tokenised text, ready to be read. Counts are of tokens with bos and eos, characters and bytes of text alone."""

    config: DataConfig
    tokenizer: Tokenizer
    length: int  # tokens a row
    train: tuple[shards.TokenStream, ...]  # one stream a component
    weights: tuple[float, ...]  # of the components, in rows
    held_out: tuple[shards.TokenStream, ...]  # empty without a held-out split
    kind: BatchKind = PACKED  # of the batches
    places: int = 0  # of virtual tokens, before each example

    @property
    def train_tokens(self) -> int:
        return sum(stream.index.tokens for stream in self.train)

    @property
    def train_documents(self) -> int:
        return sum(stream.index.documents for stream in self.train)

    @property
    def held_out_documents(self) -> int:
        return sum(stream.index.documents for stream in self.held_out)

    @property
    def held_out_tokens(self) -> int:
        """Tokens that `eval_batches` can predict: every token but the first (bos) of each document."""
        return sum(stream.index.tokens - stream.index.documents for stream in self.held_out)

    @property
    def held_out_characters(self) -> int:
        return sum(stream.index.characters for stream in self.held_out)

    @property
    def held_out_bytes(self) -> int:
        return sum(stream.index.bytes for stream in self.held_out)

    def bits_per_character(self, nats_per_token: float) -> float:
        """From the mean loss of the evaluation batches, eos included. Exact over all of them, else an estimate."""
        return nats_per_token * self.held_out_tokens / self.held_out_characters / math.log(2)

    def train_loader(self, sharding: NamedSharding, *, batch_size: int, seed: int) -> TrainLoader:
        """Batches of [batch_size, length] without end, laid out by `sharding`, the same under any.

        Raises:
          UserError: a batch size or length that the mesh does not divide.
        """
        parts = [self._rows(stream, seed) for stream in self.train]
        rows = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, self.weights)
        digests = "".join(stream.index.digest for stream in self.train)
        identity = {
            "tokens": hashlib.sha256(digests.encode()).hexdigest()[:16],
            "weights": list(self.weights),
            "length": self.length,
            "packing": self.config.packing,
            "shuffle": self.config.shuffle,
            "seed": seed,
        }
        if self.kind.examples:
            identity["truncation"] = self.config.truncation
        if self.places:
            identity["places"] = self.places
        rows = self._step_rows(rows, seed)
        return TrainLoader(rows, sharding, batch_size=batch_size, length=self.length, identity=identity)

    def rows_an_epoch(self, seed: int = 0) -> int:
        """Rows after which every token was read about once (in a mixture: those of all components)."""
        return sum(packing.num_rows for packing in self._packings.values())

    @functools.cached_property
    def _packings(self) -> dict[shards.TokenStream, Packing]:
        """Of the streams that are trained on."""
        if self.kind.examples:
            return {stream: self._example_rows(stream) for stream in self.train}
        pack = PACKINGS[self.config.packing]
        return {stream: pack(stream.document_starts, self.length) for stream in self.train}

    def _example_rows(self, stream: shards.TokenStream, mixed: bool = False) -> Examples:
        how = {"together": self.config.packing != "none", "mixed": mixed, "places": self.places}
        how |= {"per_record": self.kind.examples, "most": MAX_PAIRS if self.kind.examples == 2 else None}
        return Examples(stream.document_starts, self.length, taken=self._taken(stream).numbers, **how)

    def _taken(self, stream: shards.TokenStream) -> Taken:
        per_record = self.kind.examples
        return taken_examples(stream, self.length - per_record * self.places, self.config.truncation, per_record)

    @property
    def num_pairs(self) -> int:
        """Of both splits."""
        return sum(stream.index.documents for stream in (*self.train, *self.held_out)) // 2

    def _first_pair(self, stream: shards.TokenStream) -> int | None:
        """How many pairs the streams before this one have, those that are trained on first; None of other streams."""
        if self.kind.examples != 2:
            return None
        before = itertools.takewhile(lambda other: other is not stream, (*self.train, *self.held_out))
        return sum(other.index.documents for other in before) // 2

    def every_pair(self, sharding: NamedSharding, *, batch_size: int) -> Iterator[Any]:
        """All pairs of both splits once, as batches."""
        streams = (*self.train, *self.held_out)
        rows = self._evaluation_rows([(stream, self._example_rows(stream)) for stream in streams], batch_size)
        rows = self._step_rows(rows, HELD_OUT_SEED)
        batches = len(rows) // batch_size
        return DeviceBatches(rows, sharding, batch_size=batch_size, length=self.length, batches=batches)

    def _rows(self, stream: shards.TokenStream, seed: int) -> Rows:
        how = {"length": self.length, "pad_id": self.tokenizer.pad_id or 0, "places": self.places}
        how["first_pair"] = self._first_pair(stream)
        return Rows(stream, self._packings[stream], seed=seed, shuffle=self.config.shuffle, **how)

    def _step_rows(self, rows: grain.MapDataset[Batch], seed: int) -> StepRows:
        make = functools.partial(self.kind.make_row, vocabulary=Vocabulary.of(self.tokenizer), config=self.config)
        return StepRows(rows, make, seed=seed)

    def eval_batches(self, sharding: NamedSharding, *, batch_size: int) -> Iterator[Any]:
        """The held-out split once, each of its tokens predicted at most once (by a `PACKED` batch: once).

        The last batch is filled up with padding rows. Nothing without a held-out split. Order and rows are mixed and
        fixed for good: the same in every evaluation of every run, and the first batches are a fair sample.
        """
        if not self.held_out:
            return iter(())
        rows = self._step_rows(self._eval_rows(batch_size), HELD_OUT_SEED)
        batches = len(rows) // batch_size
        return DeviceBatches(rows, sharding, batch_size=batch_size, length=self.length, batches=batches)

    def num_eval_batches(self, batch_size: int) -> int:
        """How many `eval_batches` yields."""
        return len(self._eval_rows(batch_size)) // batch_size if self.held_out else 0

    def _eval_rows(self, batch_size: int) -> EvaluationRows:
        overlap = self.config.eval_overlap or self.length // 2
        if self.kind.examples:
            parts = [(s, self._example_rows(s, mixed=True)) for s in self.held_out]
        else:
            parts = [(s, EvaluationWindows(s.document_starts, self.length, overlap)) for s in self.held_out]
        return self._evaluation_rows(parts, batch_size)

    def _evaluation_rows(self, parts: list[tuple[shards.TokenStream, Any]], batch_size: int) -> EvaluationRows:
        how = {"length": self.length, "pad_id": self.tokenizer.pad_id or 0, "places": self.places}
        if self.kind.examples == 2:
            how["first_pairs"] = [self._first_pair(stream) for stream, _ in parts]
        return EvaluationRows(parts, multiple=batch_size, **how)

    def describe(self) -> list[str]:
        """Lines to print at the start of a run."""
        if self.kind.examples:
            return [f"tokenizer: {self.tokenizer.vocab_size:,} pieces", *self._describe_examples()]
        characters = sum(stream.index.characters for stream in self.train)
        lines = [
            f"tokenizer: {self.tokenizer.vocab_size:,} pieces",
            f"train: {self.train_documents:,} documents, {self.train_tokens:,} tokens, {characters:,} characters",
        ]
        if not self.held_out:
            return [*lines, "held out: nothing"]
        share = self.held_out_characters / (characters + self.held_out_characters)
        lines.append(
            f"held out: {self.held_out_documents:,} documents, {self.held_out_tokens:,} tokens, "
            f"{self.held_out_characters:,} characters, {self.held_out_bytes:,} bytes ({share:.1%} of the text)"
        )
        if share > 0.5:
            lines.append(f"warning: config.data.held_out={self.config.held_out!r} holds out more than half of the text")
        return lines

    def _count(self, streams: Sequence[shards.TokenStream]) -> str:
        documents = sum(stream.index.documents for stream in streams)
        return f"{documents:,} examples" if self.kind.examples == 1 else f"{documents // 2:,} pairs"

    def _describe_examples(self) -> list[str]:
        lines = []
        for name, streams in {"train": self.train, "held out": self.held_out}.items():
            taken = [self._taken(stream) for stream in streams]
            packings = [self._packings.get(stream) or self._example_rows(stream) for stream in streams]
            tokens = sum(stream.index.tokens for stream in streams)
            learned = sum(stream.index.supervised or 0 for stream in streams)
            rows = sum(packing.num_rows for packing in packings)
            filled = sum(packing.filled * packing.num_rows for packing in packings) / max(rows, 1)
            lines.append(
                f"{name}: {self._count(streams)}, {tokens:,} tokens, "
                f"{learned:,} of them learned; {rows:,} rows of {self.length:,}, {filled:.1%} of their slots filled"
                if streams
                else f"{name}: nothing"
            )
            if streams and self.kind.examples == 2:
                chosen, rejected = mean_responses(streams)
                lines.append(f"{name}: {chosen:,.1f} tokens in a chosen response, {rejected:,.1f} in a rejected")
            cut, dropped = (sum(counts) for counts in zip(*[t[1:] for t in taken], strict=True)) if taken else (0, 0)
            if cut or dropped:
                lines.append(
                    f"{name}: longer than a row: {cut:,} cut, {dropped:,} left out "
                    f"(config.data.truncation={self.config.truncation})"
                )
        if not ExampleEncoder(self.tokenizer, self.config.supervise).learns_to_stop():
            lines.append(
                "warning: no token that ends an answer is in the {% generation %} blocks of the chat template, so the "
                "model will not learn to stop"
            )
        return lines


def prepare(
    config: DataConfig,
    *,
    length: int,
    kind: BatchKind = PACKED,
    places: int = 0,
    progress: bool = True,
    num_threads: int | None = None,
) -> Dataset:
    """Opens the data of `config`; trains the tokenizer and tokenises the text where the cache does not hold it yet.

    With several processes the first does the work and the others find it in the cache, or do it on their own disk.

    Args:
      config: the group `config.data`.
      length: tokens a row (`config.length`, or the model's where that is 0).
      kind: of the batches; what the train step takes.
      places: of virtual tokens, that a row has before each example.
      progress: whether to draw progress bars on stderr.
      num_threads: for tokenising; default one a core.

    Raises:
      UserError: everything that can be wrong with config, files and text.
    """
    check_data(config, length, kind)
    held_out = read_held_out(config.held_out)
    components = open_components(config)
    if held_out.kind == "file":
        refuse_held_out_in_training(held_out.path, components, config.field)
    if held_out.kind == "marker" and (len(components) > 1 or kind.examples):
        what = "examples" if kind.examples else "a mixture"
        raise UserError(f"config.data.held_out of {what} is a fraction or file:PATH, not a text to search for.")
    cache = shards.cache_folder(config.cache)
    bar = progress_bar if progress else no_progress_bar
    threads = num_threads or -1

    def make() -> Dataset:
        tokenizer = open_tokenizer(config, components, held_out, kind, cache, bar)
        # One row, so that what the tokenizer lacks is told before it is used.
        kind.make_row(empty_row(length, 0), row_random(0, 0), Vocabulary.of(tokenizer), config)
        how = {"length": length, "places": places, "kind": kind}
        write = functools.partial(_example_tokens, **how) if kind.examples else _tokens
        folders = [write(c.source, held_out, tokenizer, config, cache, bar, threads) for c in components]
        train = [folder / "train" for folder in folders if (folder / "train").exists()]
        if len(train) < len(folders):
            raise nothing_to_train_on(config)
        if held_out.kind == "file":
            source = open_source(kind_of(held_out.path), held_out.path, config.field, "config.data.held_out")
            folders = [write(source, held_out, tokenizer, config, cache, bar, threads, all_held_out=True)]
        test = [folder / "held_out" for folder in folders if (folder / "held_out").exists()]
        if held_out.kind != "none" and not test:
            raise UserError(f"config.data.held_out={config.held_out!r} holds out nothing: there is too little text.")
        weights = tuple(component.weight for component in components)
        return Dataset(config, tokenizer, length, _open(train), weights, _open(test), kind, places)

    return _first_process_first(make)


def _open(folders: Sequence[Path]) -> tuple[shards.TokenStream, ...]:
    return tuple(map(shards.TokenStream, folders))


def _tokens(
    source: Source,
    held_out: HeldOut,
    tokenizer: Tokenizer,
    config: DataConfig,
    cache: Path,
    bar: Bar,
    threads: int,
    all_held_out: bool = False,
) -> Path:
    """The cache folder with the streams of `source`."""
    split = "all" if all_held_out else [held_out.kind, held_out.fraction, held_out.marker]
    key = shards.cache_key("tokens", source.identity(), split, tokenizer.fingerprint)

    def write(folder: Path) -> None:
        pieces = (
            (Piece(d.text, True, True, d.progress) for d in source.documents())
            if all_held_out
            else split_documents(source, held_out)
        )
        with bar("tokenising") as report:
            shards.write_streams(folder, pieces, tokenizer, num_threads=threads, report=report)

    return shards.cached(cache, f"tokens-{key}", write)


def _example_tokens(
    source: Source,
    held_out: HeldOut,
    tokenizer: Tokenizer,
    config: DataConfig,
    cache: Path,
    bar: Bar,
    threads: int,
    all_held_out: bool = False,
    *,
    length: int,
    places: int,
    kind: BatchKind,
) -> Path:
    """The same of examples; those that rows of `length` tokens do not hold are refused where the config says so.

    Of those tokens `places` are not an example's.
    """
    per_record = kind.examples
    encoder = ExampleEncoder(tokenizer, config.supervise, allow_silence=per_record == 2)
    split = "all" if all_held_out else [held_out.kind, held_out.fraction]
    what = "examples" if per_record == 1 else "pairs"
    key = shards.cache_key(what, source.identity(), split, config.fields, *encoder.identity)
    has_template = tokenizer.chat_template is not None

    def pieces() -> Iterator[ExamplePiece]:
        read = read_pieces(source, held_out, config.fields, kind, dialogues=has_template)
        return (piece._replace(held_out=True) for piece in read) if all_held_out else read

    def write(folder: Path) -> None:
        with bar("tokenising") as report:
            write_example_streams(folder, pieces(), encoder, num_threads=threads, report=report)

    folder = shards.cached(cache, f"tokens-{key}", write)
    for split in filter(Path.exists, (folder / name for name in shards.SPLITS)):
        stream, is_held_out = shards.TokenStream(split), split.name == "held_out"
        room = length - per_record * places
        check_lengths(stream, room, config.truncation, pieces, is_held_out, per_record * places, per_record)
    return folder


def _first_process_first(make: Callable[[], T]) -> T:
    """`make()`, in the other processes after the first has done it. Where one fails, all do: none waits for it."""
    if jax.process_count() == 1:
        return make()
    made, error = None, None
    for at_work in (jax.process_index() == 0, jax.process_index() > 0):
        try:
            made = make() if at_work else made
        except Exception as caught:
            error = caught
        failed = multihost_utils.process_allgather(np.array(error is not None))
        if error is not None:
            raise error
        if failed.any():
            raise UserError(f"process {int(np.argmax(failed))} could not prepare the data; it says why.")
    return made
