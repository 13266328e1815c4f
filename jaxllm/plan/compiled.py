"""What XLA says of the compiled step: bytes on a device by purpose, the largest buffers and what made them, traffic."""

import math
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from jaxllm.layout import zero
from jaxllm.layout.at_rest import tensor_at_rest
from jaxllm.layout.collectives import metadata_of
from jaxllm.layout.compile_check import bytes_of_step
from jaxllm.layout.hlo_source import Source, local_shape
from jaxllm.layout.layout import as_dtype
from jaxllm.layout.scope import Tensor, scopes
from jaxllm.plan.explain import CollectiveRow, collective_rows
from jaxllm.plan.program import Program
from jaxllm.train.state import bytes_per_device

LARGEST = 12  # buffers that a plan names
_VALUE = re.compile(
    r"value: <\d+ (?P<name>\S+?)(?:\{[\d,]*\})? @0> "
    r"\(size=(?P<size>\d+),offset=(?P<offset>\d+)\): (?P<type>\S+)"
)


class CompiledMemory(NamedTuple):
    """Bytes on one device; XLA's own figures but for how temporaries divide."""

    parameters: int  # float32 master weights, and what is held frozen
    optimizer: int
    batch: int  # and counters
    weights: int  # in the dtype of compute, gathered for a step; counted from their shardings
    gradients: int  # the sums; counted from their shardings
    activations: int  # and all else that XLA needs for a while
    total: int  # the most at once


class Buffer(NamedTuple):
    """One of the largest temporaries."""

    shape: str
    bytes: int
    what: str  # the parameter, or the activation, that it has the name or the shape of; "" where none has
    made_by: str  # the operation
    line: str  # of the source


class Compiled(NamedTuple):
    """A compiled step."""

    seconds: float  # to trace and compile
    on: str  # what it was compiled for
    memory: CompiledMemory
    buffers: list[Buffer]
    collectives: list[CollectiveRow]


def compile_step(program: Program, on: str) -> Compiled:
    """Compiles the step and reads what XLA planned. Args: on: what to call the devices."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = program.lowered.compile(compiler_options=options)
        seconds = time.perf_counter() - started
        hlo = compiled.as_text()
        buffers = _buffers(Path(folder), hlo, _shapes(program))
    return Compiled(seconds, on, compiled_memory(program, compiled), buffers, collective_rows(program, compiled))


def compiled_memory(program: Program, compiled: jax.stages.Compiled) -> CompiledMemory:
    """`memory_analysis` of the step, by purpose."""
    stats, state = compiled.memory_analysis(), program.state
    parameters = bytes_per_device((state.params, state.held, state.reference))
    optimizer = bytes_per_device(state.optimizer)
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    weights, gradients = _for_step(program)
    rest = max(temporaries - weights - gradients, 0)
    if not rest:  # XLA found a way to need less than both at once
        weights, gradients = min(weights, temporaries), max(temporaries - weights, 0)
    batch = max(arguments - parameters - optimizer, 0)
    return CompiledMemory(parameters, optimizer, batch, weights, gradients, rest, bytes_of_step(compiled))


def _for_step(program: Program) -> tuple[int, int]:
    """Bytes of the gathered weights, and of the sums of gradients, by their shardings."""
    layout, compute = program.layout.of_stage, as_dtype(program.config.precision.compute).itemsize
    summed = as_dtype(layout.reduce_dtype).itemsize
    weights = gradients = 0
    for name, tensor in _of_stage(program):
        if program.is_trained(name):
            weights += compute * math.prod(local_shape(layout, tensor, zero.step_spec(layout, *tensor)))
            gradients += summed * math.prod(local_shape(layout, tensor, zero.gradient_spec(layout, *tensor)))
    return weights, gradients


def _of_stage(program: Program) -> Iterator[tuple[str, Tensor]]:
    """Each parameter, of the layers those that one stage has."""
    for name, tensor in program.spec.parameters.items():
        axes, shape = tensor_at_rest(program.layout, tensor)
        if axes[:1] == ("layers",):
            shape = (shape[0] // program.layout.num_stages, *shape[1:])
        yield name, Tensor(axes, shape)


def _buffers(folder: Path, hlo: str, shapes: Mapping[tuple[int, ...], str]) -> list[Buffer]:
    """The largest temporaries, of those that share an address the largest, from XLA's dump of its assignment."""
    dumps = sorted(folder.glob("*buffer-assignment.txt"), key=lambda path: path.stat().st_size)
    if not dumps:
        return []
    temporary, found = False, []
    for line in dumps[-1].read_text().splitlines():
        if line.startswith("allocation"):
            temporary = "preallocated-temp" in line
        elif temporary and (match := _VALUE.search(line)):
            found.append((int(match["size"]), int(match["offset"]), match["name"], match["type"]))
    chosen: list[tuple[int, int, str, str]] = []
    for value in sorted(found, key=lambda v: -v[0]):
        size, offset = value[:2]
        if all(offset + size <= o or o + s <= offset for s, o, *_ in chosen):
            chosen.append(value)
        if len(chosen) == LARGEST:
            break
    return _named(chosen, hlo, shapes)


def _shapes(program: Program) -> dict[tuple[int, ...], str]:
    """What has such a shape on one device, sizes sorted and ones left out: a weight, or an activation of a microbatch,
    alone or kept by every layer."""
    layout = program.layout.of_stage
    found: dict[tuple[int, ...], list[str]] = {}
    layers = math.ceil(program.config.model.num_layers / layout.num_stages / layout.virtual_stages)
    for name, tensor in program.activations.items():
        shape = local_shape(layout, tensor, layout.spec(tensor.axes, tensor.shape))
        found.setdefault(_sorted(shape), []).append(name)
        found.setdefault(_sorted((layers, *shape)), []).append(f"{name}, of {layers} layers")
    for name, tensor in _of_stage(program):
        for spec in (zero.step_spec(layout, *tensor), zero.state_spec(layout, *tensor)):
            names = found.setdefault(_sorted(local_shape(layout, tensor, spec)), [])
            names += [name] * (name not in names)
    return {shape: " or ".join(names[:2]) for shape, names in found.items() if shape}


def _sorted(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def _named(
    chosen: Sequence[tuple[int, int, str, str]], hlo: str, shapes: Mapping[tuple[int, ...], str]
) -> list[Buffer]:
    source, lines = Source(hlo), _definitions(hlo)
    buffers = []
    for size, _, name, written in chosen:
        operation, frame = metadata_of(lines.get(name, ""))
        kept = "dynamic_update_slice" in operation  # what a loop keeps of each turn
        dims = re.search(r"\[([\d,]*)\]", written)
        what = shapes.get(_sorted([int(n) for n in dims[1].split(",") if n]), "") if dims else ""
        if scope := next(iter(scopes(operation)), None):
            what = scope.tensor or what
        made = "kept for the backward pass" if kept else operation.split("/")[-1] or re.sub(r"[._]\d+$", "", name)
        line = (source.line(frame, ("model",)) or source.line(frame)) if frame else ""
        buffers.append(Buffer(written.partition("{")[0], size, what, made, line))
    return buffers


def _definitions(hlo: str) -> dict[str, str]:
    """The line of each instruction outside fused computations."""
    found = {}
    for line in hlo.splitlines():
        name, equals, _ = line.strip().removeprefix("ROOT ").partition(" = ")
        if equals:
            found[name.lstrip("%")] = line
    return found
