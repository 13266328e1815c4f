"""A plan as text: what `jaxllm plan` prints."""

from collections.abc import Iterator, Sequence

from jaxllm.plan.compiled import Buffer
from jaxllm.plan.estimate import Estimate
from jaxllm.plan.explain import CollectiveRow
from jaxllm.plan.plan import Plan
from jaxllm.plan.traffic import AxisTraffic, axis_traffic, crosses_nodes
from jaxllm.steps import STEPS
from jaxllm.written import gigabytes

SHOWN = 14  # rows of traffic

SPENT = {  # parts of a step, in the words of a report
    "products": "matrix products",
    "attention": "attention",
    "memory": "memory-bound work",
    "tensor": "tensor parallelism",
    "experts": "experts",
    "context": "context parallelism",
    "host": "host",
    "stages": "between stages",
    "data": "ZeRO and gradients",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
}


def lines(plan: Plan) -> Iterator[str]:
    """The whole report."""
    compiled, job = plan.compiled, plan.job
    yield from (plan.head, "", *memory_lines(plan))
    if compiled:
        crossing = [crosses_nodes(row, job) for row in compiled.collectives]
        yield from ("", *buffer_lines(compiled.buffers), "", *traffic_lines(compiled.collectives, crossing))
    yield from ("", *axis_lines(axis_traffic(job, compiled and compiled.collectives)))
    yield from ("", *time_lines(plan.estimate, plan.num_gpus))
    if STEPS[plan.config.train_step].draws:
        yield "The rollouts, in which the model writes, are not in it."


def memory_lines(plan: Plan) -> Iterator[str]:
    """Bytes of a GPU: as XLA laid them out, or as counted."""
    found, compiled = plan.estimate, plan.compiled
    usable, card, total = found.usable_bytes, plan.cluster.gpu.memory_bytes, plan.bytes
    parts = compiled.memory._asdict() if compiled else found.memory._asdict()
    parts.pop("total", None)
    by = f"as XLA laid them out for {compiled.on}, compiled in {compiled.seconds:.1f} s" if compiled else "counted"
    yield f"memory a GPU, {by}:"
    for name, size in parts.items():
        if size:
            yield f"  {name:<12} {gigabytes(size):>12}"
    left = usable - total
    fits = f"fits, {gigabytes(left)} left" if left >= 0 else f"does not fit: {gigabytes(-left)} too much"
    yield (
        f"  {'in all':<12} {gigabytes(total):>12}   of {gigabytes(usable)} usable of {gigabytes(card)}: {fits}"
        + (f" (counted: {gigabytes(found.memory.total)})" if compiled else "")
    )


def buffer_lines(buffers: Sequence[Buffer]) -> Iterator[str]:
    """The largest temporaries."""
    if buffers:
        yield "largest temporaries:"
    for buffer in buffers:
        at = f"  {buffer.line}" if buffer.line else ""
        what = buffer.what or "?"
        yield f"  {gigabytes(buffer.bytes):>12}  {buffer.shape:<28} {what}, {buffer.made_by}{at}"


def traffic_lines(rows: Sequence[CollectiveRow], crossing: Sequence[bool]) -> Iterator[str]:
    """Collectives of a step, the largest traffic first."""
    yield "traffic a step and GPU:"
    yield f"  {'GB':>9}  {'times':>7}  {'MB each':>9}  {'kind':<18} {'over':<16} {'link':<8} for"
    for row, crosses in list(zip(rows, crossing, strict=True))[:SHOWN]:
        link = "network" if crosses else "node"
        yield (
            f"  {row.total_bytes / 1e9:>9,.2f}  {row.runs:>7,}  {row.bytes / 1e6:>9,.2f}  {row.kind:<18} "
            f"{'+'.join(row.mesh_axes):<16} {link:<8} {row.tensor or '+'.join(row.logical_axes)}"
        )
    if len(rows) > SHOWN:
        rest = sum(row.total_bytes for row in rows[SHOWN:])
        yield f"  {rest / 1e9:>9,.2f}  in {len(rows) - SHOWN} more"


def axis_lines(rows: Sequence[AxisTraffic]) -> Iterator[str]:
    """Traffic by mesh axis beside what the formulas say."""
    if rows:
        yield "sent a step and GPU, by mesh axis:"
        yield f"  {'axis':<9} {'link':<8} {'compiled':>12} {'by formula':>12}"
    for row in rows:
        link = "network" if row.crosses_nodes else "node"
        sent = "-" if row.sent is None else gigabytes(row.sent)
        yield f"  {row.axis:<9} {link:<8} {sent:>12} {gigabytes(row.theory):>12}"


def time_lines(found: Estimate, num_gpus: int) -> Iterator[str]:
    """Seconds of a step, what they are spent on, and what a run takes."""
    seconds, rate = found.time, found.tokens_per_second
    yield (
        f"step: {seconds.total:.3g} s, {rate:,.0f} tokens/s ({rate / num_gpus:,.0f} a GPU), MFU {found.mfu:.1%}, "
        f"{found.device_flops / 1e12:,.0f} TFLOP a GPU"
    )
    for name, spent in seconds._asdict().items():
        if spent >= 0.001 * seconds.total:
            yield f"  {SPENT[name]:<20} {spent / seconds.total:>6.1%}  {spent:.3g} s"
    each = found.tokens / found.active_parameters
    yield (
        f"to {found.tokens / 1e9:,.1f} billion tokens: {found.days:,.1f} days, {found.gpu_hours:,.0f} GPU-hours "
        f"({each:.0f} tokens a parameter at work)"
    )
