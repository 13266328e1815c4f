"""What caused a collective of a compiled program: a tensor, its logical axes, and a line of the source.

Three things in the HLO text tell. The name of an operation holds the scopes it was traced in (layout/scope.py): the
parameter or the activation with its logical axes, in the backward pass too. A stack frame leads to the lines of Python
it came from. And where the partitioner put a collective beside another operation than the one that asked for it, the
shape of what is sent is that of one of the activations, or of a weight, with one axis no longer split.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from jax.sharding import PartitionSpec as P

from jaxllm.layout import zero
from jaxllm.layout.at_rest import tensor_at_rest
from jaxllm.layout.collectives import Collective, collectives, metadata
from jaxllm.layout.layout import Layout, axis_names
from jaxllm.layout.rules import LOGICAL_AXES, describe
from jaxllm.layout.scope import Scope, Tensor, scopes

PACKAGE = Path(__file__).parents[1]
ROOMS = ("model", "steps", "layout", "train")  # the nearest line in the first of these is the one a reader wants
# Parts that are used in many places: of these, the line that uses them says more than their own.
BUILDING_BLOCKS = ("model/linear.py", "model/norms.py", "model/dropout.py", "layout/layout.py", "layout/scope.py")
REDUCTIONS = ("all-reduce", "reduce-scatter")
TOKENS = ("batch", "length", "residual_length")  # a weight's gradient is a sum over these


class Cause(NamedTuple):
    """Why a collective runs."""

    collective: Collective
    tensor: str  # paths of parameters joined by "+", or the name or axes of an activation; "" where unknown
    logical_axes: tuple[str, ...]  # those that the rules split over its mesh axes, or "state"; several where all are
    line: str  # "model/attention.py:67", relative to the package; "" where unknown


class Source:
    """The lines of source in the text of a compiled program: `compiled.as_text()` of `jax.stages.Compiled`."""

    def __init__(self, hlo: str):
        self._hlo = hlo
        self._files = {int(n): name for n, name in re.findall(r'^(\d+) "(.*)"$', _table(hlo, "FileNames"), re.M)}
        self._places = dict(_rows(_table(hlo, "FileLocations"), "file_name_id", "line"))
        self._frames = dict(_rows(_table(hlo, "StackFrames"), "file_location_id", "parent_frame_id"))

    def frames(self, frame: int) -> Iterator[tuple[str, int]]:
        """(file, line) from the innermost call outwards; files of this package relative to it."""
        while frame in self._frames:
            place, parent = self._frames[frame]
            file, line = self._places[place]
            path = Path(self._files[file])
            yield (path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else str(path)), line
            frame = parent - 1  # XLA writes the parent's number plus one, so that 0 is none

    def line(self, frame: int, rooms: Iterable[str] = ROOMS) -> str:
        """The nearest line in the first of `rooms` that the call went through; "" where it went through none."""
        calls = list(self.frames(frame))
        for room in rooms:
            inside = [(file, line) for file, line in calls if file.startswith(f"{room}/")]
            told = [call for call in inside if call[0] not in BUILDING_BLOCKS] or inside
            if told:
                return "{}:{}".format(*told[0])
        return ""

    def line_of(self, tensor: str) -> str:
        """The line of the model that uses a parameter; "" for a parameter that nothing names."""
        return self._lines.get(tensor, "")

    def line_of_operation(self, op_name: str) -> str:
        """The line of an operation, by its name alone."""
        frame = self._operations.get(op_name)
        return self.line(frame) if frame else ""

    @cached_property
    def _operations(self) -> dict[str, int]:
        return {name: frame for name, frame in metadata(self._hlo) if frame}

    @cached_property
    def _lines(self) -> dict[str, str]:
        """Parameter -> the line of the model that most of its operations come from, the forward pass's if there are."""
        seen: dict[str, Counter] = {}
        for name, frame in metadata(self._hlo):
            line = self.line(frame, ("model",)) if frame and "[" in name else ""
            for tensor in scopes(name)[0].tensor.split("+") if line and scopes(name) else ():
                if tensor:
                    seen.setdefault(tensor, Counter())[("transpose(" not in name, line)] += 1
        return {tensor: max(lines, key=lambda key: (key[0], lines[key], key[1]))[1] for tensor, lines in seen.items()}


def causes(
    hlo: str,
    layout: Layout,
    parameters: Mapping[str, Tensor],
    activations: Mapping[str, Tensor],
    branch_runs: int = 0,
) -> list[Cause]:
    """Each collective of a compiled program with what caused it.

    Args:
      hlo: `compiled.as_text()`.
      layout: the one it was compiled for.
      parameters, activations: by path and by name; activations are those of one microbatch, whole.
      branch_runs: as `collectives` takes it.
    """
    source = Source(hlo)
    return [_cause(c, source, layout, parameters, activations) for c in collectives(hlo, layout.mesh, branch_runs)]


def _cause(c: Collective, source: Source, layout: Layout, parameters, activations) -> Cause:
    named = scopes(c.source)
    activation = describe(named[0].axes) if named else ""
    tensor = next((scope.tensor for scope in named if scope.tensor), "")
    axes: list[str] = []
    for mesh_axis in c.mesh_axes:
        found = _by_scope(mesh_axis, c, named, layout)
        if not found:
            shaped, found = _by_shape(mesh_axis, c, layout, parameters, activations)
            tensor = tensor or shaped
        axes += found or _by_rules(mesh_axis, layout)
    line = source.line(c.frame, ("model",)) if c.frame else ""
    line = line or next(filter(None, map(source.line_of, tensor.split("+"))), "")
    line = line or source.line(c.frame) or source.line_of_operation(c.source)
    return Cause(c, tensor or activation, tuple(dict.fromkeys(axes)), line)


def _by_scope(mesh_axis: str, c: Collective, named: list[Scope], layout: Layout) -> list[str]:
    """The axes of the innermost scope that has any which the rules split over this mesh axis.

    Where a weight has none, what is gathered of it is state that ZeRO has spread, and what is summed, its gradient over
    tokens.
    """
    split = [[axis for axis in scope.axes if mesh_axis in layout.mesh_axes(axis)] for scope in named]
    of_weight = any(scope.tensor for scope in named)
    if of_weight and not split[0] and c.kind not in REDUCTIONS and mesh_axis in layout.mesh_axes("state"):
        return ["state"]
    for axes in split:
        if axes:
            return axes
    over_tokens = [axis for axis in TOKENS if mesh_axis in layout.mesh_axes(axis)]
    return over_tokens[:1] if of_weight and c.kind in REDUCTIONS else []


def _by_shape(mesh_axis: str, c: Collective, layout: Layout, parameters, activations) -> tuple[str, list[str]]:
    """The activation, or the weight of one layer, of which this is the shape with one axis no longer split."""
    for name, tensor in activations.items():
        for axis in tensor.axes:
            if mesh_axis in layout.mesh_axes(axis) and c.shape == _local(layout, tensor, axis, c.mesh_axes):
                return name, [axis]
    if c.kind not in REDUCTIONS and mesh_axis in layout.mesh_axes("state"):
        shape = c.shape[1:] if c.shape[:1] == (1,) else c.shape
        fitting = [name for name, w in parameters.items() if shape in _gathered(layout, w, c.mesh_axes)]
        return "+".join(fitting), ["state"] if fitting else []
    return "", []


def _local(layout: Layout, tensor: Tensor, joined: str, mesh_axes: tuple[str, ...]) -> tuple[int, ...]:
    """The part of `tensor` on one device where the axis `joined` is not split over `mesh_axes`."""
    sizes = []
    for axis, size in zip(tensor.axes, tensor.shape, strict=True):
        over = [a for a in layout.mesh_axes(axis) if axis != joined or a not in mesh_axes]
        sizes.append(size // math.prod(layout.mesh.shape[a] for a in over))
    return tuple(sizes)


def _gathered(layout: Layout, weight: Tensor, mesh_axes: tuple[str, ...]) -> list[tuple[int, ...]]:
    """The part of a weight on one device once what `mesh_axes` spread at rest is joined: stacked, and of one layer."""
    shapes = []
    weight = tensor_at_rest(layout, weight)
    for spec in (zero.compute_spec(layout, *weight), zero.state_spec(layout, *weight)):
        shapes.append(local_shape(layout, weight, spec, mesh_axes))
    return [*shapes, *(shape[1:] for shape in shapes)] if weight.axes[:1] == ("layers",) else shapes


def local_shape(layout: Layout, tensor: Tensor, spec: P, joined: Sequence[str] = ()) -> tuple[int, ...]:
    """The part of a tensor with this sharding on one device, once it is no longer split over the mesh axes `joined`."""
    over = [[axis for axis in axis_names(part) if axis not in joined] for part in spec]
    parts = (math.prod(layout.mesh.shape[axis] for axis in axes) for axes in over)
    return tuple(size // count for size, count in zip(tensor.shape, parts, strict=True))


def _by_rules(mesh_axis: str, layout: Layout) -> list[str]:
    """The one logical axis that the rules put on this mesh axis, where there is but one."""
    rows = [name for name in LOGICAL_AXES if mesh_axis in layout.mesh_axes(name)]
    return rows if len(rows) == 1 else []


def _table(hlo: str, name: str) -> str:
    """One of the tables at the head of the text, up to the empty line after it."""
    match = re.search(rf"^{name}\n((?:\d+ .*\n)*)", hlo, re.M)
    return match[1] if match else ""


def _rows(table: str, first: str, second: str) -> Iterator[tuple[int, tuple[int, int]]]:
    for row in table.splitlines():
        fields = dict(re.findall(r"(\w+)=(\d+)", row))
        yield int(row.split(" ")[0]), (int(fields[first]), int(fields[second]))
