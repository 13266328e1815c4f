"""LoRA's matrices, ours and PEFT's: between parts that are apart here and weights that are one there.

Three adapters of one input and of rank r are one of rank 3r: their A's under each other, their B's in blocks, all else
zero. Where the A's are the same the B's go under each other, and the rank is r.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxllm.interop.hf.tensors import Piece
from jaxllm.interop.peft.lengths import Lengths
from jaxllm.interop.peft.places import Part, Place
from jaxllm.layout.scope import map_leaves
from jaxllm.model.adapters import STACKED, Sides, gained
from jaxllm.model.spec import ModelSpec
from jaxllm.train.state import Params

A_RANK, B_RANK = -2, 1  # the axis of the rank in the factors of a file


class Factors(NamedTuple):
    """What stands beside a weight of transformers, float32."""

    a: np.ndarray  # [rank, inputs]; of stacked experts [experts, rank, inputs]
    b: np.ndarray  # [outputs, rank]; of stacked experts [outputs, rank, experts]
    magnitude: np.ndarray | None = None  # [outputs]

    @property
    def rank(self) -> int:
        return self.b.shape[B_RANK]

    def of_rank(self, rank: int) -> "Factors":
        """The same with zeros in the further rows and columns."""
        missing = rank - self.rank
        return self._replace(a=_padded(self.a, self.a.ndim + A_RANK, missing), b=_padded(self.b, B_RANK, missing))


class Matrices(NamedTuple):
    """What stands beside one of our matrices in all layers, in our axes, float32."""

    a: np.ndarray  # [*stack, *inputs, rank]
    b: np.ndarray  # [*stack, rank, *outputs]
    magnitude: np.ndarray | None  # [*stack, *outputs]
    num_stacked: int

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def of_rank(self, rank: int) -> "Matrices":
        """The same with zeros in the further rows and columns."""
        missing = rank - self.rank
        padded_b = _padded(self.b, self.num_stacked, missing)
        return self._replace(a=_padded(self.a, self.a.ndim - 1, missing), b=padded_b)

    def block(self, number: int, size: int) -> "Matrices":
        """Rows and columns of one block of the rank."""
        wanted = np.arange(number * size, (number + 1) * size)
        return self._replace(a=self.a[..., wanted], b=self.b.take(wanted, self.num_stacked))

    def used(self) -> np.ndarray:
        """Which of the rank's columns of B are not zero, anywhere."""
        return self.b.any(tuple(axis for axis in range(self.b.ndim) if axis != self.num_stacked))


def _padded(values: np.ndarray, axis: int, missing: int) -> np.ndarray:
    if not missing:
        return values
    return np.pad(values, [(0, missing if i == axis else 0) for i in range(values.ndim)])


def plain_matrices(spec: ModelSpec, own: Params) -> dict[str, Matrices]:
    """A LoRA's own parameters as plain LoRA or DoRA on the base as it is, by the path of the matrix.

    What PiSSA starts from is subtracted: twice the rank.
    """
    leaves = map_leaves(lambda leaf, _: np.asarray(leaf), own, spec.own(spec.axes))
    found = {}
    for path in [name.removesuffix(".lora.a") for name in leaves if name.endswith(".lora.a")]:
        lora = {name.rpartition(".")[2]: leaf for name, leaf in leaves.items() if name.startswith(f"{path}.lora.")}
        a, b = lora["a"], lora["b"]
        stacked = sum(axis in STACKED for axis in spec.parameters[f"{path}.lora.a"].axes)
        if "start_a" in lora:
            a, b = map(np.asarray, gained(a, b, lora["start_a"], lora["start_b"], Sides(stacked, 0)))
        found[path] = Matrices(a, b, lora.get("magnitude"), stacked)
    return found


def fused(place: Place, ours: Mapping[str, Matrices], lengths: Lengths) -> dict[str, Factors]:
    """The factors of a place, by its name in each layer.

    Args:
      ours: by path; parts that are not there have no adapter.
      lengths: of the columns of the frozen matrix with a path: the magnitudes of a part without an adapter.
    """
    adapted = [part for part in place.parts if part.path in ours]
    first = ours[adapted[0].path]
    names = place.names()
    alone = {name: [_factors(part, ours[part.path], index) for part in adapted] for name, index in names.items()}
    is_shared = all(np.array_equal(factors.a, parts[0].a) for parts in alone.values() for factors in parts)
    found = {}
    for name, index in names.items():
        parts = alone[name]
        if is_shared:
            a, b = parts[0].a, np.zeros_like(parts[0].b)
            for part in adapted:
                _put(part.b(first.rank), b, ours[part.path].b[index])
        else:
            a = np.concatenate([factors.a for factors in parts], A_RANK)
            b = np.concatenate([factors.b for factors in parts], B_RANK)
        magnitude = None
        if first.magnitude is not None:
            magnitude = np.zeros(b.shape[0], np.float32)
            for part in place.parts:
                whole = ours[part.path].magnitude if part.path in ours else lengths(part.path)
                _put(part.magnitude(), magnitude, whole[index])
        found[name] = Factors(a, b, magnitude)
    return found


def _factors(part: Part, ours: Matrices, index: tuple[int, ...]) -> Factors:
    """Of one part alone: its outputs, and zeros in the place of the others'."""
    made = []
    for piece, values in ((part.a(ours.rank), ours.a), (part.b(ours.rank), ours.b)):
        made.append(np.zeros(piece.file_shape, np.float32))
        _put(piece, made[-1], values[index])
    return Factors(*made)


def _put(piece: Piece, into: np.ndarray, values: np.ndarray) -> None:
    piece.write(into, (slice(None),) * len(piece.inner), values)


def apart(place: Place, found: Mapping[str, Factors], lengths: Lengths) -> dict[str, Matrices]:
    """What stands beside our matrices in a place, by path.

    Args:
      found: by name; layers that are not there have no adapter.
      lengths: of the columns of the frozen matrix with a path: the magnitudes of a layer without an adapter.
    """
    rank = max(factors.rank for factors in found.values())
    found = {name: factors.of_rank(rank) for name, factors in found.items()}
    is_dora = any(factors.magnitude is not None for factors in found.values())
    parts = {part.path: _matrices(part, found, rank) for part in place.parts}
    parts = _without_blocks(parts, keep_all=is_dora)
    if not is_dora:
        return parts
    for part in place.parts:
        magnitude = _read(part.magnitude(), {name: factors.magnitude for name, factors in found.items()})
        for name, index in place.names().items():
            if name not in found:
                magnitude[index] = lengths(part.path)[index]
        parts[part.path] = parts[part.path]._replace(magnitude=magnitude)
    return parts


def _matrices(part: Part, found: Mapping[str, Factors], rank: int) -> Matrices:
    a = _read(part.a(rank), {name: factors.a for name, factors in found.items()})
    b = _read(part.b(rank), {name: factors.b for name, factors in found.items()})
    return Matrices(a, b, None, sum(axis in STACKED for axis in part.lora["a"].axes))


def _read(piece: Piece, found: Mapping[str, np.ndarray]) -> np.ndarray:
    """Our array; zeros where nothing is found."""

    def read(name: str, slices: tuple[slice, ...]) -> np.ndarray:
        return found[name][slices] if name in found else np.zeros(piece.file_shape, np.float32)[slices]

    return piece.read((slice(None),) * len(piece.axes), read, np.dtype(np.float32))


def _without_blocks(parts: Mapping[str, Matrices], keep_all: bool) -> dict[str, Matrices]:
    """Each part with its block of the rank alone, where the parts are blocks of equal size, one after the other.

    Parts that have no block have no adapter: they are left out, or kept with zeros.
    """
    rank = next(iter(parts.values())).rank
    used = {path: matrices.used() for path, matrices in parts.items()}
    blocks = [path for path in parts if used[path].any()]
    if len(parts) == 1 or not blocks or rank % len(blocks):
        return dict(parts)
    size = rank // len(blocks)
    of_block = {path: np.arange(rank) // size == number for number, path in enumerate(blocks)}
    if any((used[path] & ~of_block[path]).any() for path in blocks):
        return dict(parts)
    kept = parts if keep_all else blocks
    return {path: parts[path].block(blocks.index(path) if path in blocks else 0, size) for path in kept}
