"""What a step sends along each mesh axis: as the compiled program does, and as the papers' formulas have it.

Bytes are those that a device sends: of a ring over n devices an all-reduce sends 2 (n - 1) / n of its operand, a gather
(n - 1) / n of its result, a reduce-scatter n - 1 times its result, an all-to-all (n - 1) / n, a permute all.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxllm.layout.mesh import AXES
from jaxllm.plan.explain import CollectiveRow
from jaxllm.plan.job import Job
from jaxllm.plan.work import Message, data_messages, layer_work, stage_message


class AxisTraffic(NamedTuple):
    """Of one mesh axis, or of several at once, on one device and step."""

    axis: str
    crosses_nodes: bool
    sent: float | None  # bytes, of the compiled program; None where nothing was compiled
    theory: float  # by the formulas of Shoeybi et al. 2019, Korthikanti et al. 2022, Rajbhandari et al. 2020


def sent_bytes(kind: str, size: int, group: int) -> float:
    """Bytes a device sends of a collective whose result has `size` bytes, of `group` devices."""
    part = (group - 1) / group
    factors = {"all-reduce": 2 * part, "reduce-scatter": group - 1, "collective-permute": 1, "permute": 1}
    return factors.get(kind, part) * size


def row_bytes(row: CollectiveRow, mesh: Mapping[str, int]) -> float:
    """Of all runs of a collective."""
    return row.runs * sent_bytes(row.kind, row.bytes, math.prod(mesh[axis] for axis in row.mesh_axes) or 1)


def crosses_nodes(row: CollectiveRow, job: Job) -> bool:
    """Whether the groups of a collective span nodes."""
    return any(job.crosses_nodes(axis) for axis in row.mesh_axes)


def axis_traffic(job: Job, rows: Sequence[CollectiveRow] | None) -> list[AxisTraffic]:
    """Of every mesh axis that is split, outermost first."""
    by_theory = theory(job)
    found: dict[str, float] = {}
    for row in rows or ():
        if row.mesh_axes:
            # What goes along several axes at once leaves by the outermost.
            outermost = min(row.mesh_axes, key=AXES.index)
            found[outermost] = found.get(outermost, 0.0) + row_bytes(row, job.mesh)
    split = [axis for axis in AXES if job.mesh[axis] > 1]
    return [
        AxisTraffic(axis, job.crosses_nodes(axis), None if rows is None else found.get(axis, 0.0), by_theory[axis])
        for axis in split
    ]


def theory(job: Job) -> dict[str, float]:
    """Bytes that a device sends along each axis a step, by the formulas."""
    sent = dict.fromkeys(AXES, 0.0)

    def add(message: Message, times: float) -> None:
        group = job.mesh[message.axis]
        scattered = message.kind == "reduce-scatter"  # messages give the whole, rows the result
        size = message.bytes / group if scattered else message.bytes
        sent[message.axis] += times * sent_bytes(message.kind, size, group)

    products, attention, _ = job.recomputes
    runs = max(job.stage_layers) * job.num_microbatches * job.models
    for message in layer_work(job).messages:
        repeats = attention if message.axis == "context" else products
        add(message, runs * (2 + repeats + job.stage_recomputes))
    for message in data_messages(job):
        add(message, 1)
    if job.stages > 1:
        add(stage_message(job), 2 * job.num_microbatches * job.layout.virtual_stages)
    return sent
