"""Where every tensor of a training step lies, and what every collective is for: what `jaxllm explain` prints."""

import difflib
import fnmatch
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from jaxllm.errors import UserError
from jaxllm.layout import zero
from jaxllm.layout.at_rest import tensor_at_rest
from jaxllm.layout.hlo_source import causes, local_shape
from jaxllm.layout.layout import Layout, as_dtype, axis_names
from jaxllm.layout.scope import Tensor, path_name
from jaxllm.plan.program import Program


class TensorRow(NamedTuple):
    """A parameter, or a main activation of one microbatch."""

    tensor: str
    axes: dict[str, int]  # logical axis -> size, whole
    compute: dict[str, str]  # logical axis -> mesh axes, joined by "+", while it is computed with
    at_rest: dict[str, str] | None  # the same of the master weight; None for an activation
    local_shape: tuple[int, ...]  # on one device: at rest, or of the activation
    bytes: int  # on one device: the float32 master weight, a frozen one as held, or the activation as computed
    optimizer_bytes: int  # its moments on one device


class CollectiveRow(NamedTuple):
    """All collectives of a step that have the same cause and shape."""

    kind: str
    mesh_axes: tuple[str, ...]
    logical_axes: tuple[str, ...]
    tensor: str
    line: str
    shape: tuple[int, ...]  # of a result on one device
    bytes: int  # of one result on one device
    runs: int  # a step

    @property
    def total_bytes(self) -> int:
        """Bytes of the results a step and device."""
        return self.bytes * self.runs


def tensor_rows(program: Program) -> list[TensorRow]:
    """Every parameter by its path, then the main activations."""
    layout, state = program.layout, program.state
    held, moments = _bytes_of(program, (state.params, state.held)), _bytes_of(program, state.optimizer)
    rows = [
        _parameter(layout, path, w, held[path], moments.get(path, 0)) for path, w in program.spec.parameters.items()
    ]
    itemsize = as_dtype(program.config.precision.compute).itemsize
    return rows + [_activation(layout, name, a, itemsize) for name, a in program.activations.items()]


def _parameter(layout: Layout, path: str, w: Tensor, held: int, optimizer_bytes: int) -> TensorRow:
    rest = tensor_at_rest(layout, w)
    at_rest = zero.state_spec(layout, *rest)
    shape = local_shape(layout, rest, at_rest)
    compute = _written(w, zero.compute_spec(layout, *w))
    return TensorRow(path, _sizes(w), compute, _written(w, at_rest), shape, held, optimizer_bytes)


def _activation(layout: Layout, name: str, a: Tensor, itemsize: int) -> TensorRow:
    spec = layout.spec(a.axes, a.shape)
    shape = local_shape(layout, a, spec)
    return TensorRow(name, _sizes(a), _written(a, spec), None, shape, itemsize * math.prod(shape), 0)


def _sizes(tensor: Tensor) -> dict[str, int]:
    return {axis or "-": size for axis, size in zip(*tensor, strict=True)}


def _written(tensor: Tensor, spec: P) -> dict[str, str]:
    parts = zip(tensor.axes, spec, strict=True)
    return {axis or "-": "+".join(axis_names(part)) for axis, part in parts if axis_names(part)}


def _bytes_of(program: Program, part: Any) -> dict[str, int]:
    """Bytes on one device of what a part of the state has at each parameter's path: moments, or codes and scales."""
    found: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(part):
        keys = [key for key in path if isinstance(key, jax.tree_util.DictKey)]
        paths = [path_name(keys[start:end]) for start in range(len(keys)) for end in range(len(keys), start, -1)]
        name = next((path for path in paths if path in program.spec.parameters), "")
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        found[name] = found.get(name, 0) + size
    return found


def collective_rows(program: Program, compiled: jax.stages.Compiled) -> list[CollectiveRow]:
    """Every collective of the compiled step, those of one cause and shape together, the largest traffic first."""
    together: dict[CollectiveRow, int] = {}
    parameters, activations = program.spec.parameters, program.activations
    for cause in causes(compiled.as_text(), program.layout, parameters, activations, program.branch_runs):
        c = cause.collective
        row = CollectiveRow(c.kind, c.mesh_axes, cause.logical_axes, cause.tensor, cause.line, c.shape, c.bytes, 0)
        together[row] = together.get(row, 0) + c.runs
    rows = [row._replace(runs=runs) for row, runs in together.items()]
    return sorted(rows, key=lambda row: -row.total_bytes)


def matching(rows: Iterable[TensorRow], pattern: str) -> list[TensorRow]:
    """The rows whose tensor is `pattern`, or that it matches as a glob.

    Raises:
      UserError: there is none; the nearest names.
    """
    rows = list(rows)
    found = [row for row in rows if row.tensor == pattern or fnmatch.fnmatchcase(row.tensor, pattern)]
    if not found:
        names = [row.tensor for row in rows]
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
        raise UserError(f"--tensor {pattern}: no such tensor. Nearest: {', '.join(near)}.")
    return found
