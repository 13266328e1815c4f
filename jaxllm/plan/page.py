"""A plan as one HTML page that needs nothing else: memory, shardings, the schedule as a timeline, traffic by link."""

import html
from collections.abc import Sequence

from jaxllm.layout.schedules import Action, make_schedule
from jaxllm.markup import COLOURS, document, key, section, table
from jaxllm.plan.compiled import Compiled
from jaxllm.plan.estimate import Estimate
from jaxllm.plan.explain import tensor_rows
from jaxllm.plan.plan import Plan
from jaxllm.plan.program import Program
from jaxllm.plan.report import SPENT
from jaxllm.plan.traffic import axis_traffic
from jaxllm.written import gigabytes

ACTIONS = {
    Action.FORWARD: ("F", "#4c78a8"),
    Action.BACKWARD: ("B", "#54a24b"),
    Action.BACKWARD_INPUT: ("I", "#72b7b2"),
    Action.BACKWARD_WEIGHT: ("W", "#eeca3b"),
}
DRAWN_TICKS = 160  # of a schedule; what follows repeats
WIDTH = 960  # pixels


def page(plan: Plan) -> str:
    """The text of the page. What only a compiled step tells is left out where nothing was compiled."""
    sections = [
        ("Memory of a GPU", _memory(plan)),
        ("Seconds of a step", _time(plan.estimate)),
        ("Traffic of a GPU by link", _traffic(plan)),
    ]
    if plan.job.stages > 1:
        sections.append(("Schedule", _schedule(plan)))
    if plan.program is not None:
        sections.append(("Where each parameter lies", _shardings(plan.program)))
    if plan.compiled is not None:
        sections.append(("Largest temporaries", _buffers(plan.compiled)))
    body = "\n".join(section(title, content) for title, content in sections)
    return document("jaxllm plan", f"<p>{html.escape(plan.head)}</p>\n{body}")


def _bar(parts: Sequence[tuple[str, float]], whole: float, mark: float | None, written) -> str:
    """A stacked bar with its key; `mark` is drawn as a line."""
    shown, x, pieces, keys = [p for p in parts if p[1] > 0], 0.0, [], []
    scale = WIDTH / max(whole, sum(size for _, size in shown))
    for number, (name, size) in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        label = f"{name}: {written(size)}"
        place = f'x="{x:.1f}" width="{size * scale:.1f}" height="44"'
        pieces.append(f'<rect {place} fill="{colour}"><title>{html.escape(label)}</title></rect>')
        keys.append(key(colour, label))
        x += size * scale
    if mark is not None:
        pieces.append(f'<line x1="{mark * scale:.1f}" x2="{mark * scale:.1f}" y1="0" y2="52" stroke="currentColor"/>')
    return f'<svg width="{WIDTH}" height="54" role="img">{"".join(pieces)}</svg>\n<p>{"".join(keys)}</p>'


def _memory(plan: Plan) -> str:
    found, compiled = plan.estimate, plan.compiled
    parts = compiled.memory._asdict() if compiled else found.memory._asdict()
    parts.pop("total", None)
    by = f"by XLA, for {compiled.on}" if compiled else "counted"
    bar = _bar(list(parts.items()), plan.cluster.gpu.memory_bytes, found.usable_bytes, gigabytes)
    return f"{bar}<p>{gigabytes(plan.bytes)} ({html.escape(by)}); the line is what a program may fill.</p>"


def _time(found: Estimate) -> str:
    parts = [(SPENT[name], spent) for name, spent in found.time._asdict().items()]
    days = f"{found.tokens / 1e9:,.1f} billion tokens take {found.days:,.1f} days, {found.gpu_hours:,.0f} GPU-hours"
    return (
        _bar(parts, found.time.total, None, lambda s: f"{s:.3g} s")
        + f"<p>{found.time.total:.3g} s, {found.tokens_per_second:,.0f} tokens/s, MFU {found.mfu:.1%}; {days}.</p>"
    )


def _traffic(plan: Plan) -> str:
    job = plan.job
    rows = axis_traffic(job, plan.compiled and plan.compiled.collectives)
    cells = [
        (
            row.axis,
            job.mesh[row.axis],
            "network" if row.crosses_nodes else "node",
            "-" if row.sent is None else gigabytes(row.sent),
            gigabytes(row.theory),
        )
        for row in rows
    ]
    head = ("mesh axis", "devices", "link", "sent a step", "by the formulas")
    return table(head, cells, numbers=(1, 3, 4)) if cells else "<p>Nothing is sent.</p>"


def _schedule(plan: Plan) -> str:
    job, layout, bubble = plan.job, plan.config.layout, plan.estimate.bubble
    schedule = make_schedule(layout.schedule, job.stages, job.num_microbatches, layout.virtual_stages)
    ticks = min(schedule.num_ticks, DRAWN_TICKS)
    width, height = WIDTH / ticks, 18
    pieces = []
    for tick in range(ticks):
        for stage in range(job.stages):
            action = Action(int(schedule.action[tick][stage]))
            if action == Action.IDLE:
                continue
            letter, colour = ACTIONS[action]
            microbatch = int(schedule.microbatch[tick][stage])
            title = f"tick {tick}, stage {stage}: {letter} of microbatch {microbatch}"
            place = f'x="{tick * width:.2f}" y="{stage * height}" width="{width:.2f}" height="{height - 2}"'
            pieces.append(f'<rect {place} fill="{colour}"><title>{title}</title></rect>')
    note = f"{schedule.num_ticks} ticks" + (f", the first {ticks} drawn" if ticks < schedule.num_ticks else "")
    keys = "".join(key(colour, letter) for letter, colour in ACTIONS.values())
    return (
        f'<svg width="{WIDTH}" height="{job.stages * height}" role="img">{"".join(pieces)}</svg>'
        f'<p>{keys}</p><p class="note">{html.escape(layout.schedule)}: a row a stage, {note}; '
        f"the bubble is {bubble:.1%} of the step.</p>"
    )


def _shardings(program: Program) -> str:
    written = lambda spec: ", ".join(f"{axis}/{over}" for axis, over in spec.items()) or "whole"  # noqa: E731
    rows = [
        (
            row.tensor,
            " ".join(f"{axis}={size}" for axis, size in row.axes.items()),
            written(row.compute),
            written(row.at_rest),
            f"{row.bytes:,}",
            f"{row.optimizer_bytes:,}",
        )
        for row in tensor_rows(program)
        if row.at_rest is not None
    ]
    head = ("parameter", "axes", "computed with", "at rest", "bytes a GPU", "optimizer")
    return table(head, rows, numbers=(4, 5))


def _buffers(compiled: Compiled) -> str:
    rows = [(gigabytes(b.bytes), b.shape, b.what or "?", b.made_by, b.line) for b in compiled.buffers]
    return table(("size", "shape", "of", "made by", "at"), rows, numbers=(0,))
