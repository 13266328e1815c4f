"""What a compiled program sends: its collectives, read from the HLO text that XLA prints."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_OPERATION = re.compile(rf"= (?P<shapes>.*?) (?P<kind>{'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_METADATA = re.compile(r'metadata=\{[^"]*op_name="(?P<name>[^"]*)"(?:[^"}]*?stack_frame_id=(?P<frame>\d+))?')


class Collective(NamedTuple):
    """One array that one collective operation sends each time it runs; a combined operation is several of these."""

    kind: str  # of KINDS
    shape: tuple[int, ...]  # of the result, on one device
    bytes: int
    mesh_axes: tuple[str, ...]  # along which it communicates
    runs: int  # times a step: the trip counts of the loops around it
    source: str  # the JAX operation it comes from
    frame: int = 0  # its stack frame in the tables at the head of the text; 0 where XLA keeps none
    in_branch: bool = False  # of a condition, so that some devices may not take part


def collectives(hlo: str, mesh: Mesh, branch_runs: int = 0) -> list[Collective]:
    """The collectives of a compiled program: `compiled.as_text()` of `jax.stages.Compiled`.

    XLA's CPU backend has no pass that makes a reduce-scatter of an all-reduce whose result is sliced, so on CPU what
    the partitioner reduces and scatters is counted as all-reduce.

    Args:
      branch_runs: how often each branch of a switch in a loop is taken while the loop runs: a pipeline does each action
        once a microbatch and virtual stage. What lies in a condition inside such a branch is counted as if it were
        always taken, as on one of the stages it is. 0: as if the branch were taken once in all.
    """
    found = []
    runs, branches = _runs(hlo, branch_runs), _in_branches(hlo)
    for computation, line in _lines(hlo):
        if match := _OPERATION.search(line):
            axes = _mesh_axes(line, mesh)
            shapes = _results(line, match)
            named = _METADATA.search(line)
            names = _parts(named["name"], len(shapes)) if named else [""] * len(shapes)
            frame = int(named["frame"] or 0) if named else 0
            for i, ((dtype, dims), name) in enumerate(zip(shapes, names, strict=True)):
                shape = tuple(int(size) for size in dims.split(",") if size)
                size = math.prod(shape) * DTYPE_BYTES[dtype]
                # What XLA has combined keeps the name of each part, but the frame of the first only.
                ours = frame if name == names[0] or i == 0 else 0
                times, in_branch = runs.get(computation, 1), computation in branches
                found.append(Collective(match["kind"], shape, size, axes, times, name, ours, in_branch))
    return found


def _results(line: str, match: re.Match) -> list[tuple[str, str]]:
    """(dtype, dimensions) of each result. The start of an asynchronous operation, as GPUs have them, names its operands
    before its results; that of an all-reduce the results alone."""
    shapes = _SHAPE.findall(match["shapes"])
    operands = line[match.end() :].partition(")")[0].count("%")
    return shapes[operands : 2 * operands] if len(shapes) >= 2 * operands > 0 else shapes


def metadata(hlo: str) -> Iterator[tuple[str, int]]:
    """(name, stack frame or 0) of each operation that has a name."""
    for match in _METADATA.finditer(hlo):
        yield match["name"], int(match["frame"] or 0)


def metadata_of(line: str) -> tuple[str, int]:
    """(name, stack frame or 0) of the operation on a line; "" where it has none."""
    match = _METADATA.search(line)
    return (match["name"], int(match["frame"] or 0)) if match else ("", 0)


def _parts(name: str, number: int) -> list[str]:
    """The names of the `number` operations that XLA has combined into one: "step/(a/dot:b/dot)" is two."""
    names = _expand(name)
    return names if len(names) == number else [name] * number


def _expand(name: str) -> list[str]:
    start = next((i for i, char in enumerate(name) if char == "(" and name[i - 1 : i] in ("", "/")), None)
    if start is None:
        return [name]
    depth, pieces, begin = 0, [], start + 1
    for i in range(start, len(name)):
        depth += {"(": 1, ")": -1}.get(name[i], 0)
        if (name[i] == ":" and depth == 1) or depth == 0:
            pieces.append(name[begin:i])
            begin = i + 1
        if depth == 0:
            return [name[:start] + inner + name[i + 1 :] for piece in pieces for inner in _expand(piece)]
    return [name]


def _lines(hlo: str):
    """(name of the computation, line) of each instruction."""
    computation = ""
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            computation = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
        else:
            yield computation, line


def _runs(hlo: str, branch_runs: int) -> dict[str, int]:
    """How often each computation runs a step: the product of the trip counts of the loops it is in."""
    callers, switches = {}, {}
    for computation, line in _lines(hlo):
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        for callee in re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line):
            callers[callee] = (computation, int(trips[1]) if trips and f"body=%{callee}" in line else 1)
        if branches := branch_runs and re.search(r"branch_computations=\{([^}]*)\}", line):
            switches |= dict.fromkeys(re.findall(r"[\w.\-]+", branches[1]), computation)

    def count(name: str) -> int:
        if name in switches:
            caller, trips = callers.get(switches[name], (None, 1))
            if trips > 1:
                return branch_runs * (count(caller) if caller else 1)
            return count(switches[name])
        caller, trips = callers.get(name, (None, 1))
        return trips * (count(caller) if caller else 1)

    return {name: count(name) for name in callers | switches}


def _in_branches(hlo: str) -> set[str]:
    """The computations that are a branch of a condition, or are called from one."""
    callees: dict[str, list[str]] = {}
    found, waiting = set(), []
    for computation, line in _lines(hlo):
        callees.setdefault(computation, []).extend(re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line))
        branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
        if several := re.search(r"branch_computations=\{([^}]*)\}", line):
            branches += re.findall(r"[\w.\-]+", several[1])
        waiting += branches
    while waiting:
        computation = waiting.pop()
        if computation not in found:
            found.add(computation)
            waiting += callees.get(computation, ())
    return found


def _mesh_axes(line: str, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the members of a replica group, or source and target, differ."""
    groups = np.array(_groups(line, mesh.size) or [np.arange(mesh.size)])
    coordinates = np.unravel_index(groups, mesh.devices.shape)
    return tuple(axis for axis, place in zip(mesh.axis_names, coordinates, strict=True) if np.ptp(place, axis=1).any())


def _groups(line: str, num_devices: int) -> list[list[int]]:
    """Replica groups in any of XLA's notations, by index of the device in the mesh."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", line):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, order = _ints(match[1]), _ints(match[2])
        devices = np.arange(num_devices).reshape(order)
        devices = devices.transpose(_ints(match[3])) if match[3] else devices
        return devices.reshape(shape).tolist()
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?\s*\{([^}]*)\}", line
    ):
        devices = np.arange(num_devices)
        devices = devices.reshape(_ints(match[2])).transpose(_ints(match[3])) if match[2] else devices
        return _mesh_groups(match[1], match[4], devices)
    return []


def _mesh_groups(sizes: str, axes: str, devices: np.ndarray) -> list[list[int]]:
    shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    along = [list(shape).index(name) for name in re.findall(r"'(\w+)'", axes)]
    devices = devices.reshape(tuple(shape.values()))
    rest = [i for i in range(devices.ndim) if i not in along]
    return devices.transpose(rest + along).reshape(-1, math.prod(devices.shape[i] for i in along)).tolist()


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def total_bytes(found: list[Collective], kind: str, mesh_axes: tuple[str, ...]) -> int:
    """Bytes of the results of one kind of collective along these mesh axes, a step and device."""
    return sum(c.bytes * c.runs for c in found if c.kind == kind and c.mesh_axes == mesh_axes)
