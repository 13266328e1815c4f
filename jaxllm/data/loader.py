"""Batches for the devices. The global batch is a function of the data, the seed and the position alone.

Which rows come at which position never hangs on processes, devices or the mesh: each process works out the same global
order and reads only the rows its own devices hold. So a position is one number, and a checkpoint's data state restores
on any number of processes, under any layout.
"""

import functools
import hashlib
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int

from jaxllm.data.batch import Batch, PairBatch, row_random
from jaxllm.data.packing import Packing, Span, empty_row, fill_row
from jaxllm.data.shards import TokenStream
from jaxllm.errors import UserError
from jaxllm.layout.mesh import in_order

READ_THREADS = 2  # of the host, that read and pack rows
HOST_BATCHES = 4  # read ahead
DEVICE_BATCHES = 2  # copied to the devices ahead


class Rows(grain.MapDataset[Batch]):
    """The rows of one stream, epoch after epoch without end: index // num_rows is the epoch.

    With `shuffle` each epoch has its own order and its own rotation (see `Concat`), both functions of (seed, epoch).
    """

    def __init__(
        self,
        stream: TokenStream,
        packing: Packing,
        *,
        length: int,
        pad_id: int,
        seed: int,
        shuffle: bool,
        places: int = 0,
        first_pair: int | None = None,
    ):
        """`first_pair`: of a stream of pairs, the number of the first; then the rows are `PairBatch`es."""
        super().__init__()
        self._stream, self._packing, self._length, self._pad_id = stream, packing, length, pad_id
        self._seed, self._shuffle, self._places, self._first_pair = seed, shuffle, places, first_pair

    def __len__(self) -> int:
        return self._packing.num_rows

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        row, rotation = self.order(index)
        spans, stream = self._packing.spans(row, rotation), self._stream
        filled = fill_row(stream.read, spans, self._length, self._pad_id, stream.is_supervised, self._places)
        return filled if self._first_pair is None else with_pairs(filled, spans, stream, self._first_pair)

    def order(self, index: int) -> tuple[int, int]:
        """(row of the packing, rotation of its epoch) at position `index`."""
        epoch, row = divmod(index, len(self))
        if not self._shuffle:
            return row, 0
        drawn = hashlib.sha256(f"{self._seed}/{epoch}/{self._stream.index.digest}".encode()).digest()
        if len(self) > 1:
            seed = int.from_bytes(drawn[:4])
            row = grain.experimental.index_shuffle(row, max_index=len(self) - 1, seed=seed, rounds=4)
        return row, int.from_bytes(drawn[4:12]) % self._stream.index.tokens


class EvaluationRows(grain.MapDataset[Batch]):
    """The evaluation rows of several streams, one after the other, then padding rows up to a multiple of `multiple`."""

    def __init__(
        self,
        parts: Sequence[tuple[TokenStream, Packing]],
        *,
        length: int,
        pad_id: int,
        multiple: int,
        places: int = 0,
        first_pairs: Sequence[int] | None = None,
    ):
        """`first_pairs`: of streams of pairs, as of `Rows`."""
        super().__init__()
        self._parts, self._length, self._pad_id, self._places = parts, length, pad_id, places
        self._first_pairs = first_pairs
        self._ends = np.cumsum([packing.num_rows for _, packing in parts])
        self._padded = -(-int(self._ends[-1]) // multiple) * multiple

    def __len__(self) -> int:
        return self._padded

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        part = int(np.searchsorted(self._ends, index, side="right"))
        if part == len(self._parts):
            return empty_row(self._length, self._pad_id)
        stream, packing = self._parts[part]
        row = index - (int(self._ends[part - 1]) if part else 0)
        spans = packing.spans(row, 0)
        filled = fill_row(stream.read, spans, self._length, self._pad_id, stream.is_supervised, self._places)
        return filled if self._first_pairs is None else with_pairs(filled, spans, stream, self._first_pairs[part])


def with_pairs(row: Batch, spans: Sequence[Span], stream: TokenStream, first_pair: int) -> PairBatch:
    """A row of pairs with their numbers, from `first_pair` + 1 in this stream, and their margins."""
    documents = np.searchsorted(stream.document_starts, [span.start for span in spans], side="right") - 1
    numbers = np.concatenate([[0], first_pair + 1 + documents // 2])
    margins = np.zeros(row.tokens.shape, np.float32)
    if stream.margins is not None:
        begins = (row.positions == 0) & (row.segment_ids % 2 == 1)
        margins[begins] = stream.margins[documents[::2]]
    return PairBatch(*row, margins, numbers[row.segment_ids].astype(np.int32))


class StepRows(grain.MapDataset[Any]):
    """Rows as a train step takes them: row i is `make(rows[i], its random numbers)`, a function of (seed, i) alone.

    Beyond the first epoch i goes on, so that a row is made otherwise each time.
    """

    def __init__(
        self, rows: grain.MapDataset[Batch], make: Callable[[Batch, np.random.RandomState], Any], *, seed: int
    ):
        super().__init__()
        self._rows, self._make, self._seed = rows, make, seed

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        return self._make(self._rows[index], row_random(self._seed, index))


class LocalBatches(grain.MapDataset[Any]):
    """Of each global batch the rows in `local` (increasing row numbers in the batch), NumPy, stacked in that order.

    Batch i is rows first + i * batch_size and on of `rows`; a row is any tree of arrays [length].
    """

    def __init__(
        self, rows: grain.MapDataset[Any], batch_size: int, local: Sequence[int], *, first: int = 0, batches: int
    ):
        super().__init__()
        self._rows, self._batch_size, self._local = rows, batch_size, local
        self._first, self._batches = first, batches

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        start = self._first + index * self._batch_size
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(self._rows[start + row] for row in self._local))


def read_sharding(
    sharding: NamedSharding,
    shape: tuple[int, int],
    process_of: Callable[[jax.Device], int] = operator.attrgetter("process_index"),
) -> NamedSharding:
    """How processes share out the reading of a [batch, length] array that is to lie as `sharding` says.

    Where several processes need the same rows (of a pipeline's stages each does), each reads a part of them, and the
    devices hand them on: so no row is read by two processes, as far as the devices divide the batch.

    Args:
      process_of: the number of the process that a device belongs to.
    """
    local_rows(sharding, shape)  # says what does not divide
    processes = {process_of(device) for device in sharding.mesh.devices.flat}
    of_batch = sharding.spec[0] or ()
    of_batch = (of_batch,) if isinstance(of_batch, str) else tuple(of_batch)
    every_axis = (*of_batch, *(axis for axis in sharding.mesh.axis_names if axis not in of_batch))
    everywhere = NamedSharding(sharding.mesh, PartitionSpec(every_axis))
    if len(processes) == 1 or shape[0] % sharding.mesh.size or _reads_once(sharding, shape, process_of):
        return sharding
    return everywhere


def _reads_once(sharding: NamedSharding, shape: tuple[int, int], process_of: Callable[[jax.Device], int]) -> bool:
    """Whether no two processes hold the same row."""
    holders: dict[tuple[int, int, int], int] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        if holders.setdefault(index[0].indices(shape[0]), process_of(device)) != process_of(device):
            return False
    return True


def local_rows(sharding: NamedSharding, shape: tuple[int, int]) -> Int[np.ndarray, " rows"]:
    """The rows of a [batch, length] array that devices of this process hold any part of, increasing.

    Raises:
      UserError: a batch size or length that the mesh does not divide.
    """
    try:
        indices = sharding.addressable_devices_indices_map(shape).values()
    except ValueError as error:
        raise _does_not_divide(sharding, shape) from error
    slices = {index[0].indices(shape[0]) for index in indices if index is not None}
    return np.unique(np.concatenate([np.arange(*bounds) for bounds in slices]))


def _does_not_divide(sharding: NamedSharding, shape: tuple[int, int]) -> Exception:
    for name, size, axes in zip(("batch_size", "length"), shape, (*sharding.spec, None, None), strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        shards = int(np.prod([sharding.mesh.shape[axis] for axis in axes]))
        if size % shards:
            fits = sorted({max(size // shards, 1) * shards, -(-size // shards) * shards})
            mesh = " x ".join(f"{axis}={sharding.mesh.shape[axis]}" for axis in axes)
            return UserError(
                f"config.data.{name}={size} is not a multiple of the {shards} shards of the mesh ({mesh}). "
                f"Nearest that are: {', '.join(map(str, fits))}."
            )
    return ValueError(f"{shape} does not fit {sharding}")


class DeviceBatches(Iterator[Any]):
    """Global batches of `rows` from row `first` on, read by threads and copied to the devices ahead of their use."""

    def __init__(
        self,
        rows: grain.MapDataset[Any],
        sharding: NamedSharding,
        *,
        batch_size: int,
        length: int,
        first: int = 0,
        batches: int = sys.maxsize,
    ):
        shape = (batch_size, length)
        read = read_sharding(sharding, shape)
        local = local_rows(read, shape)
        host = LocalBatches(rows, batch_size, local.tolist(), first=first, batches=batches)
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=HOST_BATCHES)
        placed = host.to_iter_dataset(options).map(functools.partial(_to_devices, read, shape, local))
        self._spread = None if read == sharding else jax.jit(lambda batch: batch, out_shardings=sharding)
        ahead = grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=DEVICE_BATCHES)
        self._reading = [iter(ahead)]
        # Also at exit, and the reference goes with it: grain's own destructor fails once modules are torn down.
        self.close = weakref.finalize(self, _stop, self._reading)

    def __next__(self) -> Any:
        if not self._reading:
            raise StopIteration
        batch = next(self._reading[0])
        # Here, not in the thread that reads: all processes must give their devices the same programs in one order.
        return batch if self._spread is None else in_order(self._spread(batch))


def _stop(reading: list[grain.DatasetIterator[Any]]) -> None:
    reading.pop().close()


def _to_devices(sharding: NamedSharding, shape: tuple[int, int], local: Int[np.ndarray, " rows"], host: Any) -> Any:
    """Global arrays of `shape` out of the rows `local` of them, which are the rows of `host`."""

    def part(leaf: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        first = int(np.searchsorted(local, start))
        return leaf[first : first + stop - start, index[1]]

    place = lambda leaf: jax.make_array_from_callback(shape, sharding, functools.partial(part, leaf))  # noqa: E731
    return jax.tree.map(place, host)


class TrainLoader:
    """Batches of global `jax.Array`s without end.

    `state()` is the position after the last batch that was *yielded*, whatever was read ahead.
    """

    def __init__(
        self,
        rows: grain.MapDataset[Any],
        sharding: NamedSharding,
        *,
        batch_size: int,
        length: int,
        identity: Mapping[str, Any],
    ):
        """`identity` (JSON-able): all that the order of rows hangs on; a state of another identity is refused."""
        self._rows, self._sharding, self._batch_size, self._length = rows, sharding, batch_size, length
        self._identity = dict(identity)
        self._position = 0
        self._batches: DeviceBatches | None = None
        local_rows(sharding, (batch_size, length))  # say now what does not divide

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = DeviceBatches(
                self._rows, self._sharding, batch_size=self._batch_size, length=self._length, first=self._position
            )
        batch = next(self._batches)
        self._position += self._batch_size
        return batch

    def state(self) -> dict[str, Any]:
        """{"rows": rows yielded so far, over all devices, ...what they were drawn from}; JSON-able."""
        return {"rows": self._position, **self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on after the rows of `state`, under this loader's own batch size and sharding.

        Raises:
          UserError: the state is of other data, or of rows cut or shuffled otherwise.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise UserError(
                    f"The checkpoint was at row {state.get('rows')} of other data: {name} was {state.get(name)!r}, "
                    f"now it is {value!r}. Set it back, or start a new run."
                )
        self.close()
        self._position = int(state["rows"])

    def close(self) -> None:
        """Stops reading ahead. The next batch starts it again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
