"""The batch a train step takes, and how its rows are made of rows of text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.data.config import DataConfig

if TYPE_CHECKING:  # a step needs no tokenizer
    from jaxllm.data.tokenizer import Tokenizer


class Batch(NamedTuple):
    """Packed sequences. Host side the leaves are NumPy arrays, on the devices global `jax.Array`s."""

    tokens: Int[Array | np.ndarray, "batch length"]  # int32
    positions: Int[Array | np.ndarray, "batch length"]  # int32, from 0 in each document
    segment_ids: Int[Array | np.ndarray, "batch length"]  # int32: 1, 2, … a document of the row; 0 is padding
    loss_mask: Bool[Array | np.ndarray, "batch length"]  # true where this token is to be predicted from those before


class PairBatch(NamedTuple):
    """Packed pairs. A pair is two segments of one row, the chosen response after its prompt in 1, 3, 5, … and the
    rejected in 2, 4, 6, …; `loss_mask` is true on the responses. Leaves as those of a `Batch`."""

    tokens: Int[Array | np.ndarray, "batch length"]
    positions: Int[Array | np.ndarray, "batch length"]
    segment_ids: Int[Array | np.ndarray, "batch length"]
    loss_mask: Bool[Array | np.ndarray, "batch length"]
    margins: Float[Array | np.ndarray, "batch length"]  # a pair's, on the first token of its chosen segment
    pair_ids: Int[Array | np.ndarray, "batch length"]  # number of the pair in the data set, from 1; 0 is padding


class Vocabulary(NamedTuple):
    """What the making of rows needs to know of a tokenizer."""

    size: int
    mask_id: int | None
    special_ids: tuple[int, ...] = ()  # of the tokens that stand for no text

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> "Vocabulary":
        named = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id} - {None}
        return cls(tokenizer.vocab_size, tokenizer.mask_id, tuple(sorted({*tokenizer.specials.values(), *named})))


# (packed row, its random numbers, vocabulary, config.data) -> a row of the batch
MakeRow = Callable[[Batch, np.random.RandomState, Vocabulary, DataConfig], Any]


@dataclass(frozen=True)
class BatchKind:
    """What a train step takes, told as how a packed row of text becomes a row of it.

    `make_row` gets a `Batch` without the batch axis, which it must not change, and returns a tree of NumPy arrays
    [length]; stacked they are the batch. Its shapes and dtypes follow from the length alone. The random numbers belong
    to the row: they are a function of `config.seed` and of the row's number in the run, or in the held-out split.
    """

    make_row: MakeRow
    special_tokens: tuple[str, ...] = ()  # of a tokenizer that is trained for it
    examples: int = 0  # of a record, packed whole and together, learned in part (data/examples.py); 0: it is text


def packed_row(row: Batch, random: np.random.RandomState, vocabulary: Vocabulary, config: DataConfig) -> Batch:
    """The row as it is."""
    return row


def pair_row(
    row: Batch | PairBatch, random: np.random.RandomState, vocabulary: Vocabulary, config: DataConfig
) -> PairBatch:
    """The row as it is; a row of padding has no pairs."""
    if isinstance(row, PairBatch):
        return row
    return PairBatch(*row, np.zeros(row.tokens.shape, np.float32), np.zeros(row.tokens.shape, np.int32))


MAX_PAIRS = 32  # of a row
PACKED = BatchKind(packed_row)
EXAMPLES = BatchKind(packed_row, examples=1)
PAIRS = BatchKind(pair_row, examples=2)


def row_random(seed: int, number: int) -> np.random.RandomState:
    """The random numbers of row `number`; RandomState, because NumPy has promised never to change what it draws."""
    return np.random.RandomState(np.random.Philox(key=np.array([seed, number], np.uint64)))
