"""Compiles a program, and refuses what the compiler made of it: tensors whole by accident, a wait without end.

Two things about memory are looked for. XLA's partitioner, where it knows no way from one sharding to another, gathers
the tensor whole on every device and cuts it up again (it logs an "involuntary full rematerialization"); and a parameter
may have no dimension that the mesh axes divide which should spread it at rest, so that each device keeps all of it. And
where the partitioner puts a permute into a stage of a pipeline, CPUs would wait there for ever.

What the partitioner says is read from the stderr of this process. TF_CPP_MIN_LOG_LEVEL=2 or more silences it, and a
program that JAX's persistent cache holds is not partitioned again: so one that was found faulty here is not left there.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from jaxllm.errors import UserError
from jaxllm.layout import zero
from jaxllm.layout.at_rest import tensor_at_rest
from jaxllm.layout.collectives import collectives
from jaxllm.layout.hlo_source import Source, causes, local_shape
from jaxllm.layout.layout import Layout, axis_names
from jaxllm.layout.rules import describe
from jaxllm.layout.scope import Tensor, scopes

ACCEPT = "or accept it: --config.layout.allow_replication"
_REMATERIALISED = re.compile(
    r"Involuntary full rematerialization.*?from sharding (?P<source>\{.*?\}) to (?P<target>\{.*?\}) efficiently "
    r"for HLO operation (?P<operation>%\S+ = \w+\[(?P<shape>[\d,]*)\].*?)\. As the last resort"
)


class Finding(NamedTuple):
    """A tensor that is whole on more devices than the layout says."""

    tensor: str
    message: str


def compile_checked(
    lowered: jax.stages.Lowered,
    layout: Layout,
    parameters: Mapping[str, Tensor],
    *,
    allow_replication: bool = False,
    runs_here: bool = True,
    warn: Callable[[str], object] = print,
) -> jax.stages.Compiled:
    """Compiles, and checks the result.

    Args:
      parameters: shapes and logical axes by path.
      allow_replication: `warn` of each finding instead of refusing it.
      runs_here: the devices of the layout are those that will run it, and do not stand in for others.

    Raises:
      UserError: a tensor that XLA gathers whole on its way from one sharding to another, a parameter that ZeRO could
        not spread, or a program that CPUs would never finish. It names the tensor, the line of the model and the way
        out.
    """
    with _without_caching_refused() as refused:
        with captured_stderr() as said:
            compiled = lowered.compile()
        found = _not_spread(layout, parameters)
        if found or _REMATERIALISED.search(said()):
            source = Source(compiled.as_text())
            found = [*_rematerialised(said(), source, layout, parameters), *_with_lines(found, source)]
            refused()
    for finding in found if allow_replication else ():
        warn(f"warning: {finding.message}")
    if found and not allow_replication:
        more = f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""
        raise UserError(f"{found[0].message}, {ACCEPT}{more}.")
    if runs_here:
        _check_ends(compiled, layout, parameters)
    return compiled


def _check_ends(compiled: jax.stages.Compiled, layout: Layout, parameters: Mapping[str, Tensor]) -> None:
    """Refuses a program that waits for ever on CPUs: there all devices have to meet at a collective-permute.

    In a branch of a pipeline's schedule they do not: other stages are idle, or do something else.
    """
    if layout.num_stages == 1 or layout.mesh.devices.flat[0].platform != "cpu":
        return
    hlo = compiled.as_text()
    waits = lambda c: c.kind == "collective-permute" and c.in_branch  # noqa: E731
    if not any(map(waits, collectives(hlo, layout.mesh))):
        return
    for cause in causes(hlo, layout, parameters, {}):
        if waits(cause.collective):
            axes = [axis for axis in cause.logical_axes if layout.mesh_axes(axis)]
            leave = f"leave '{axes[-1]}' whole (--config.layout.rule_overrides={axes[-1]}=none), " if axes else ""
            over = "+".join(cause.collective.mesh_axes)
            raise UserError(
                f"{cause.tensor or 'a tensor'}{_at(cause.line)}: XLA sends it over {over} by a "
                "collective-permute inside a pipeline stage. On CPUs that waits for all devices, for ever.\n"
                f"Make the dimensions divide the mesh, {leave}use --config.mesh.pipeline=1, or GPUs, which do not wait."
            )


def _rematerialised(said: str, source: Source, layout: Layout, parameters: Mapping[str, Tensor]) -> list[Finding]:
    """What the partitioner complained of, each tensor once."""
    found = {}
    for match in _REMATERIALISED.finditer(said):
        name = re.search(r'op_name="([^"]*)"', match["operation"])
        frame = re.search(r"stack_frame_id=(\d+)", match["operation"])
        named = scopes(name[1]) if name else []
        tensor = next((scope.tensor for scope in named if scope.tensor), "")
        axes = next((scope.axes for scope in named), ())
        if not named:
            tensor = _unnamed(name[1] if name else "", match["shape"], layout, parameters)
            axes = parameters[tensor].axes if tensor in parameters else ()
        line = (source.line(int(frame[1])) if frame else "") or source.line_of(tensor)
        split = [axis for axis in axes if layout.mesh_axes(axis)]
        way_out = (
            f"leave '{split[-1]}' whole (--config.layout.rule_overrides={split[-1]}=none)"
            if split
            else ("split it over fewer mesh axes (--config.layout.rule_overrides)")
        )
        what = f"{tensor or 'a tensor'} {describe(axes)}" if axes else tensor or match["operation"].split(" ")[0]
        found[what, line] = Finding(
            tensor,
            f"{what}{_at(line)} is gathered whole on every device, because XLA knows no way from its sharding "
            f"{match['source']} to {match['target']}.\nMake the dimensions divide the mesh, {way_out}",
        )
    return list(found.values())


def _unnamed(op_name: str, shape: str, layout: Layout, parameters: Mapping[str, Tensor]) -> str:
    """The parameter of an operation outside any scope: an argument of the program, or one that XLA made itself.

    An argument is named like "state.params['embedding']['table']"; of the rest the shape of one device's part is known.
    """
    argument = ".".join(re.findall(r"\[\\?'(\w+)\\?'\]", op_name))
    if argument in parameters:
        return argument
    local = tuple(int(size) for size in shape.split(",") if size)
    return "+".join(path for path, weight in parameters.items() if local in _at_rest(layout, weight))


def _not_spread(layout: Layout, parameters: Mapping[str, Tensor]) -> list[Finding]:
    """Parameters worth spreading that stay whole at rest along an axis of the rules row `state`."""
    if not layout.zero_stage:
        return []
    found = []
    for path, weight in parameters.items():
        used = {axis for part in zero.state_spec(layout, *tensor_at_rest(layout, weight)) for axis in axis_names(part)}
        left = [axis for axis in layout.mesh_axes("state") if axis not in used]
        if left and zero.elements_a_layer(*weight) >= zero.SMALL:
            axes = describe([f"{axis}={size}" for axis, size in zip(*weight, strict=True)])
            sizes = " x ".join(f"config.mesh.{axis}={layout.mesh.shape[axis]}" for axis in left)
            found.append(
                Finding(
                    path,
                    f"{path} {axes}{{line}} is whole at rest on every device of {sizes}, though "
                    f"config.layout.zero_stage={layout.zero_stage} spreads the state: it divides no dimension.\n"
                    f"Make one a multiple of {layout.mesh.shape[left[0]]}, choose another size of the mesh axis",
                )
            )
    return found


def _with_lines(found: list[Finding], source: Source) -> list[Finding]:
    return [f._replace(message=f.message.replace("{line}", _at(source.line_of(f.tensor)))) for f in found]


def _at(line: str) -> str:
    return f" (jaxllm/{line})" if line else ""


def _at_rest(layout: Layout, weight: Tensor) -> list[tuple[int, ...]]:
    """The part of a weight on one device at rest: stacked, and of one layer."""
    weight = tensor_at_rest(layout, weight)
    shape = local_shape(layout, weight, zero.state_spec(layout, *weight))
    return [shape, shape[1:]] if weight.axes[:1] == ("layers",) else [shape]


def bytes_of_step(compiled: jax.stages.Compiled) -> int:
    """The most that a device needs for a compiled step: arguments, temporaries, and results that take no argument's
    place."""
    stats = compiled.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + stats.temp_size_in_bytes + results


@contextlib.contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
    """Lets one read, after the block, what this process wrote to stderr inside it, C++ included; it is shown, too.

    A process of its own copies it: where XLA aborts this one, its last words are not lost.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "stderr"
        text = ""
        sys.stderr.flush()
        shown = os.dup(2)
        try:
            tee = subprocess.Popen(["tee", copy], stdin=subprocess.PIPE, stdout=shown)
        except OSError:  # no such program here
            os.close(shown)
            yield lambda: ""
            return
        try:
            os.dup2(tee.stdin.fileno(), 2)
            tee.stdin.close()
            yield lambda: text
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)  # closes the pipe, so the copy ends
            os.close(shown)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process begun inside may hold the pipe open
                tee.wait(timeout=5)
            text = copy.read_text(errors="replace") if copy.exists() else ""


@contextlib.contextmanager
def _without_caching_refused() -> Iterator[Callable[[], None]]:
    """Inside, a call of what this yields takes the programs compiled inside out of JAX's persistent cache again."""
    folder = jax.config.jax_compilation_cache_dir
    cache = Path(folder) if folder and "://" not in folder else None
    listed = lambda: set(cache.iterdir()) if cache and cache.is_dir() else set()  # noqa: E731
    before = listed()

    def refused() -> None:
        for file in listed() - before:
            file.unlink(missing_ok=True)

    yield refused
