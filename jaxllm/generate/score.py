"""What texts cost a model: loss, perplexity, bits per character and per byte."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import jax
import numpy as np

from jaxllm.data.batch import Batch
from jaxllm.data.packing import EvaluationWindows, Span, empty_row, fill_row
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import UserError
from jaxllm.generate.decode import bucket, round_up
from jaxllm.generate.run import Run, refuse_bidirectional
from jaxllm.layout.layout import use_layout
from jaxllm.steps import pretrain

LONGEST_WINDOW = 2048  # tokens, where the run does not say how long its rows were
SHORTEST_ROW = 16


@dataclass(frozen=True)
class Score:
    """Sums over all documents. Each token is predicted once, but not the first of a document (bos, if there is one)."""

    nats: float
    tokens: int  # predicted, eos included
    characters: int
    bytes: int  # UTF-8
    documents: int

    def __add__(self, other: "Score") -> "Score":
        """The score of both together."""
        mine, others = asdict(self), asdict(other)
        return Score(**{name: mine[name] + others[name] for name in mine})

    def __str__(self) -> str:
        documents = f"{self.documents:,} document{'s' * (self.documents != 1)}"
        return f"{documents}, {self.tokens:,} tokens predicted"

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_character(self) -> float:
        return self.nats / math.log(2) / self.characters

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, float]:
        """All of it, ready for JSON."""
        derived = ("loss", "perplexity", "bits_per_character", "bits_per_byte")
        return {name: getattr(self, name) for name in derived} | asdict(self)


def score(run: Run, texts: Iterable[str], *, length: int = 0, overlap: int = 0, batch_size: int = 16) -> Score:
    """Scores `texts`, a document each, in windows. Arguments and errors are those of `score_each`."""
    return score_each(run, [list(texts)], length=length, overlap=overlap, batch_size=batch_size)[0]


def score_each(
    run: Run, groups: Sequence[Sequence[str]], *, length: int = 0, overlap: int = 0, batch_size: int = 16
) -> list[Score]:
    """Scores groups of documents, say those of a file each, in windows, by one compiled program.

    Args:
      length: tokens a window; 0: the run's `config.data.length`, or the model's context up to LONGEST_WINDOW.
      overlap: tokens of a window that the one before has predicted already, and that are only context here;
        0: half the window. More makes the loss lower and the work longer.
      batch_size: windows at once, over all devices; rounded up to what the mesh divides.

    Raises:
      UserError: no text in one of the groups, a window or overlap out of range, or a model that sees what comes next.
    """
    refuse_bidirectional(run, "gives texts no probability. Its masked loss is eval_loss in metrics.jsonl")
    context, places = run.spec.context, run.spec.adapter.places
    length = length or min(run.config.data.length or LONGEST_WINDOW, run.spec.config.max_length) - places
    if not 2 <= length <= context:
        raise UserError(f"length={length} must be from 2 to the model's context, {context}.")
    overlap = overlap or length // 2
    if not 1 <= overlap < length:
        raise UserError(f"overlap={overlap} must be from 1 to {length - 1}, below the {length} tokens of a window.")
    tokens = [_tokens(documents, run.tokenizer) for documents in groups]
    if not groups or any(starts[-1] == len(documents) for (_, starts), documents in zip(tokens, groups, strict=True)):
        raise UserError("there is no text to evaluate.")
    longest = max(int(np.diff(starts).max()) for _, starts in tokens)
    if longest < length:  # no row is longer than what it may hold
        length = min(length, bucket(longest, SHORTEST_ROW))
        overlap = min(overlap, length // 2)
    length += places
    windows = [EvaluationWindows(starts, length, overlap, places) for _, starts in tokens]
    batch_size = min(batch_size, max(one.num_rows for one in windows))
    batch_size = round_up(batch_size, run.layout.size("batch"))

    @jax.jit
    def loss(weights, batch):
        with use_layout(run.layout):
            return pretrain.loss(run.spec.merge(weights), batch, dropout=None)

    scores = []
    for documents, (ids, _), one in zip(groups, tokens, windows, strict=True):
        rows = (one.spans(row, 0) for row in range(one.num_rows))
        nats = weight = 0.0
        for batch in _batches(rows, ids, length, batch_size, places):
            placed = Batch(*(jax.device_put(leaf, run.layout.sharding("batch", None)) for leaf in batch))
            result = loss(run.weights, placed)
            nats, weight = nats + float(result.total), weight + float(result.weight)
        characters, size = sum(map(len, documents)), sum(len(text.encode()) for text in documents)
        scores.append(Score(nats, round(weight), characters, size, len(documents)))
    return scores


def _tokens(documents: Sequence[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The documents end to end, each bos, text, eos as in training; and where each begins, and the end of all."""
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    end = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    ids = [[*start, *row, *end] for row in tokenizer.encode_batch(documents)]
    starts = np.cumsum([0, *map(len, ids)])
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, count=int(starts[-1])), starts


def _batches(
    rows: Iterator[list[Span]], tokens: np.ndarray, length: int, batch_size: int, places: int
) -> Iterator[Batch]:
    while spans := list(itertools.islice(rows, batch_size)):
        read = lambda start, n: tokens[start : start + n]  # noqa: E731
        filled = [fill_row(read, row, length, 0, places=places) for row in spans]
        filled += [empty_row(length, 0)] * (batch_size - len(filled))
        yield Batch(*map(np.stack, zip(*filled, strict=True)))
