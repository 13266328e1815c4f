"""What the planner expects of a run, beside what the devices then really do (the planner is a floor above this one)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxllm.layout.compile_check import bytes_of_step
from jaxllm.layout.layout import Layout
from jaxllm.train.config import Config


class Expectation(NamedTuple):
    """For one run on the devices it has."""

    counted_bytes: float  # of a device
    seconds: float | None  # of a step; None where the kind of device is not in the planner's table
    on: str  # the device, in the planner's words


Expects = Callable[[Config, Layout], Expectation]  # of a config whose model is resolved


def planned_line(expected: Expectation) -> str:
    """Before anything is compiled."""
    seconds = "" if expected.seconds is None else f", {expected.seconds:.3g} s a step"
    return f"planned: {expected.counted_bytes / 1e9:,.2f} GB a device{seconds} ({expected.on})"


def compiled_line(expected: Expectation, compiled: jax.stages.Compiled) -> str:
    """What XLA made of it."""
    stats, total = compiled.memory_analysis(), bytes_of_step(compiled)
    at_rest, for_step = stats.argument_size_in_bytes / 1e9, stats.temp_size_in_bytes / 1e9
    return (
        f"compiled: {total / 1e9:,.2f} GB a device ({at_rest:,.2f} at rest, {for_step:,.2f} for a step); "
        f"planned {expected.counted_bytes / 1e9:,.2f}"
    )


def measured(expected: Expectation, record: Mapping[str, float], tokens_a_step: int) -> dict[str, Any]:
    """After the first logged steps, of the first device here: {"message", "bytes", "seconds"}, as far as known."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    parts, found = [], {}
    if peak is not None:
        parts.append(f"{peak / 1e9:,.2f} GB at most (planned {expected.counted_bytes / 1e9:,.2f})")
        found["bytes"] = peak
    rate = record.get("tokens_per_second")
    if rate and expected.seconds is not None:
        parts.append(f"{tokens_a_step / rate:.3g} s a step (planned {expected.seconds:.3g})")
        found["seconds"] = tokens_a_step / rate
    return found | {"message": f"measured: {', '.join(parts)}"} if parts else {}
