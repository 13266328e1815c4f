"""How a tensor of a Hugging Face file lies beside ours: names, transposes, fused and stacked parts.

A row of a family's table is read like einops: in

    Row("layers.attention.query.kernel", "model.layers.{layer}.self_attn.q_proj.weight", "(heads head_dim) embed")

the file's matrix has rows that are heads times head_dim, and columns that are embed. Our array has the same axes in its
own order (the model's logical axes), and those of {layer} and {expert} in front.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jaxllm.layout.scope import Tensor
from jaxllm.model.spec import ModelSpec

PART = "part"  # an axis that only the file has: query, key and value in one tensor
STACKED = {"layer": "layers", "expert": "experts"}  # fields of a name: the axis of ours that they count
Ranges = Mapping[str, tuple[int, int]]  # axis: first and last + 1
ReadSlices = Callable[[str, tuple[slice, ...]], np.ndarray]  # (name, slices): a piece of a tensor in a file


class Row(NamedTuple):
    """A parameter of ours, and what it is called in a file."""

    path: str  # "layers.attention.query.kernel"
    name: str  # with fields {layer} and {expert}
    pattern: str  # the axes of the file's tensor
    part: int = 0  # which part of a fused tensor
    parts: int = 1  # how many it has


class Piece:
    """One row, with the sizes of a model: moves a block between the file's tensors and our array."""

    def __init__(self, row: Row, tensor: Tensor):
        self.row, self.shape = row, tensor.shape
        self.groups = [re.findall(r"\w+", group) for group in re.findall(r"\([^)]*\)|\w+", row.pattern)]
        named = [axis for group in self.groups for axis in group if axis != PART]
        # An axis that the rules do not know has no name there; the pattern gives it the one that is left over.
        left = [axis for axis in named if axis not in tensor.axes]
        self.axes = [left.pop(0) if axis is None else axis for axis in tensor.axes]
        self.sizes = dict(zip(self.axes, tensor.shape, strict=True)) | {PART: row.parts}
        self.counted = [field for field in STACKED if f"{{{field}}}" in row.name]
        self.inner = self.axes[len(self.counted) :]  # the axes of one tensor, in our order
        file_order = [axis for axis in named if axis != PART]
        self.to_ours = [file_order.index(axis) for axis in self.inner]

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of each tensor in the file."""
        return tuple(int(np.prod([self.sizes[axis] for axis in group])) for group in self.groups)

    def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """((layer, expert), name) of each tensor; the numbers are those that the name counts."""
        whole = {axis: (0, self.sizes[axis]) for axis in self.axes}
        yield from self._names(whole)

    def _names(self, ranges: Ranges) -> Iterator[tuple[tuple[int, ...], str]]:
        counts = [range(*ranges[STACKED[field]]) for field in self.counted]
        for numbers in np.ndindex(*map(len, counts)):
            index = tuple(count[i] for count, i in zip(counts, numbers, strict=True))
            yield index, self.row.name.format(**dict(zip(self.counted, index, strict=True)))

    def read(self, slices: tuple[slice, ...], read: ReadSlices, dtype: np.dtype) -> np.ndarray:
        """The block `slices` of our array, made of slices of the files."""
        ranges = {axis: s.indices(self.sizes[axis])[:2] for axis, s in zip(self.axes, slices, strict=True)}
        block = np.empty([stop - start for start, stop in ranges.values()], dtype)
        first = [ranges[STACKED[field]][0] for field in self.counted]
        for index, name in self._names(ranges):
            place = tuple(i - start for i, start in zip(index, first, strict=True))
            block[place] = self._block(ranges, lambda wanted, name=name: read(name, wanted))
        return block

    def _block(self, ranges: Ranges, read: Callable[[tuple[slice, ...]], np.ndarray]) -> np.ndarray:
        """Our axes of one tensor of the file: the smallest slices that hold the ranges are read, and cut."""
        ranges = dict(ranges) | {PART: (self.row.part, self.row.part + 1)}
        slices, shape, cut = [], [], []
        for group in self.groups:
            start, stop, sizes, inside = _hull([self.sizes[axis] for axis in group], [ranges[axis] for axis in group])
            slices.append(slice(start, stop))
            shape += sizes
            cut += [within.start if axis == PART else within for axis, within in zip(group, inside, strict=True)]
        return read(tuple(slices)).reshape(shape)[tuple(cut)].transpose(self.to_ours)

    def write(self, into: np.ndarray, slices: tuple[slice, ...], block: np.ndarray) -> None:
        """Puts a block of our array, `slices` of its inner axes, to its place in the file's tensor `into`."""
        apart = into.reshape([self.sizes[axis] for group in self.groups for axis in group])
        places = dict(zip(self.inner, slices, strict=True)) | {PART: self.row.part}
        cut = tuple(places[axis] for group in self.groups for axis in group)
        apart[cut] = block.transpose(np.argsort(self.to_ours))


def _hull(sizes: list[int], ranges: list[tuple[int, int]]) -> tuple[int, int, list[int], list[slice]]:
    """Of a dimension made of axes, outermost first: (start, stop) of the rows to read, their shape, and where in it
    the ranges lie. Axes inside the outermost one with several values are read whole."""
    start, stop = 0, 1
    shape, inside, whole = [], [], False
    for size, (low, high) in zip(sizes, ranges, strict=True):
        first, last = (0, size) if whole else (low, high)
        start, stop = start * size + first, (stop - 1) * size + last
        shape.append(last - first)
        inside.append(slice(low - first, high - first))
        whole = whole or last - first > 1
    return start, stop, shape, inside


class FileTensor(NamedTuple):
    """A tensor of a file, made of one piece, or of several where it is fused."""

    shape: tuple[int, ...]
    pieces: list[tuple[Piece, tuple[int, ...]]]  # with the layer and expert


def pieces_of(rows: tuple[Row, ...], spec: ModelSpec) -> dict[str, Piece]:
    """The piece of each parameter of a model. Rows of parameters that it does not have are left out."""
    return {row.path: Piece(row, spec.parameters[row.path]) for row in rows if row.path in spec.parameters}


def file_tensors(pieces: Mapping[str, Piece]) -> dict[str, FileTensor]:
    """Every tensor of the model's files by name, a layer after another."""
    tensors: dict[str, FileTensor] = {}
    for piece in pieces.values():
        for index, name in piece.names():
            tensors.setdefault(name, FileTensor(piece.file_shape, [])).pieces.append((piece, index))
    in_order = sorted(tensors.items(), key=lambda item: item[1].pieces[0][1][:1])
    before = [item for item in in_order if not item[1].pieces[0][1]]
    return dict(before + [item for item in in_order if item[1].pieces[0][1]])
