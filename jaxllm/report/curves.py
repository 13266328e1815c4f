"""Curves as SVG: numbers against steps, and a run's hours as a strip."""

import html
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

from jaxllm.written import clock, number

WIDTH, HEIGHT = 460, 220  # in the units of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 8, 26  # margins, in which the axes are written
DRAWN = 1_000  # points of a curve at most
DOTTED = 30  # points up to which each is a dot that tells its value
STRIP_WIDTH, STRIP_HEIGHT = 960, 66
STYLE = """
svg { width: 100%; height: auto; display: block; } svg text { font: 12px system-ui, sans-serif; fill: var(--faint); }
.grid { stroke: var(--line); } .curve { fill: none; stroke-width: 1.6; stroke-linecap: round; stroke-linejoin: round; }
.held-out { stroke-dasharray: 1 4; stroke-width: 2.4; } .restart { stroke: #54a24b; } .fault { stroke: #e45756; }
.save { stroke: var(--faint); stroke-opacity: 0.6; } .mark { stroke-opacity: 0.55; } .work { fill: var(--line); }
"""

Point = tuple[int, float | None]  # step, and a value, or None where it was not finite


class Curve(NamedTuple):
    """One metric of one run."""

    name: str
    colour: str
    points: Sequence[Point]
    held_out: bool = False  # drawn dotted, beside the same metric of training


class Mark(NamedTuple):
    """Something that happened, at a step of a figure or a time of a strip."""

    at: float
    kind: str  # restart | fault | save, a class of STYLE
    text: str


class Axis(NamedTuple):
    """Places values between two ends of a drawing."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def figure(
    title: str,
    curves: Sequence[Curve],
    marks: Iterable[Mark] = (),
    may_be_logarithmic: bool = False,
    from_zero: bool = False,
) -> str:
    """The curves over each other against the step."""
    values = [value for curve in curves for _, value in curve.points if value is not None]
    steps = [step for curve in curves for step, _ in curve.points]
    logarithmic = may_be_logarithmic and min(values) > 0 and max(values) > 30 * min(values)
    across = Axis(*_widened(min(0, *steps), max(steps)), LEFT, WIDTH - RIGHT)
    low = min(0.0, *values) if from_zero else min(values)
    upright = Axis(*_room(low, max(values), logarithmic), HEIGHT - BOTTOM, TOP, logarithmic)
    pieces = [*_grid(across, upright)]
    for mark in marks:
        pieces.append(_line("mark " + mark.kind, across.place(mark.at), TOP, HEIGHT - BOTTOM, mark.text))
    for curve in curves:
        pieces.extend(_drawn(curve, across, upright))
    scale = " (logarithmic)" if logarithmic else ""
    return (
        f"<figure><figcaption>{html.escape(title)}{scale}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(pieces)}</svg>'
        "</figure>"
    )


def _drawn(curve: Curve, across: Axis, upright: Axis) -> Iterator[str]:
    """A path, broken where a value was not finite; of few points, each a dot too."""
    path, pen = [], "M"
    for step, value in thinned(curve.points):
        if value is None:
            pen = "M"
            continue
        # A lone point is a line of no length, which round ends make a dot of.
        path.append(f"{pen}{across.place(step):.2f} {upright.place(value):.2f}" + ("h0" if pen == "M" else ""))
        pen = "L"
    kind = "curve held-out" if curve.held_out else "curve"
    label = f"<title>{html.escape(curve.name)}</title>"
    yield f'<path class="{kind}" stroke="{curve.colour}" d="{"".join(path)}">{label}</path>'
    if len(curve.points) > DOTTED:
        return
    for step, value in curve.points:
        if value is not None:
            text = html.escape(f"{curve.name}, step {step}: {number(value)}")
            place = f'cx="{across.place(step):.2f}" cy="{upright.place(value):.2f}"'
            yield f'<circle {place} r="2.5" fill="{curve.colour}"><title>{text}</title></circle>'


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most DRAWN points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= DRAWN:
        return points
    length = math.ceil(len(points) / (DRAWN // 2))
    kept: list[Point] = []
    for start in range(0, len(points), length):
        stretch = [(value, step) for step, value in points[start : start + length] if value is not None]
        ends = {min(stretch), max(stretch)} if stretch else set()
        kept += sorted((step, value) for value, step in ends) or [(points[start][0], None)]
    return kept


def _grid(across: Axis, upright: Axis) -> Iterator[str]:
    for value in ticks(upright.low, upright.high, upright.logarithmic):
        y = upright.place(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.2f}" y2="{y:.2f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.2f}" text-anchor="end">{_short(value)}</text>'
    for value in ticks(across.low, across.high):
        x = across.place(value)
        anchor = "end" if x > WIDTH - RIGHT - 20 else "middle"
        yield f'<text x="{x:.2f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{_short(value)}</text>'


def ticks(low: float, high: float, logarithmic: bool = False) -> list[float]:
    """A few round numbers from `low` to `high`."""
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        far = len(powers) > 4
        found = [digit * 10.0**power for power in powers for digit in ((1,) if far else (1, 3))]
        found = [value for value in found if low <= value <= high]
        return found[:: math.ceil(len(found) / 6)] if found else [low, high]
    apart = 10.0 ** math.floor(math.log10((high - low) / 4))
    apart *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (apart * factor) <= 5)
    first, last = math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9)
    return [count * apart for count in range(first, last + 1)]


def _short(value: float) -> str:
    """For the margin of a drawing: "25k", "1.5M", "0.003"."""
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _widened(low: float, high: float) -> tuple[float, float]:
    """Two ends that differ."""
    return (low, high) if high - low > 1e-9 * abs(high) else (low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10)


def _room(low: float, high: float, logarithmic: bool) -> tuple[float, float]:
    """Ends of an axis with a little room beyond the values."""
    low, high = _widened(low, high)
    if logarithmic:
        return low / 1.1, high * 1.1
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def _line(kind: str, x: float, top: float, bottom: float, text: str) -> str:
    place = f'x1="{x:.2f}" x2="{x:.2f}" y1="{top:.2f}" y2="{bottom:.2f}"'
    return f'<line class="{kind}" {place}><title>{html.escape(text)}</title></line>'


def strip(spells: Sequence[tuple[float, float]], marks: Sequence[Mark], colour: str) -> str:
    """The hours of a run: when it was at work, and what happened when. All times in unix seconds."""
    times = [moment for spell in spells for moment in spell] + [mark.at for mark in marks]
    axis = Axis(*_hours(min(times), max(times)), 6, STRIP_WIDTH - 6)
    pieces = []
    for start, end in spells:
        place = f'x="{axis.place(start):.2f}" width="{max(1.5, axis.place(end) - axis.place(start)):.2f}"'
        text = f"{clock(start)} to {clock(end)}"
        pieces.append(
            f'<rect {place} y="16" height="20" fill="{colour}" fill-opacity="0.45"><title>{text}</title></rect>'
        )
    for mark in sorted(marks, key=lambda mark: ("save", "restart", "fault").index(mark.kind)):
        top, bottom = {"save": (26, 36), "restart": (8, 40), "fault": (4, 44)}[mark.kind]
        pieces.append(_line(mark.kind, axis.place(mark.at), top, bottom, mark.text))
    for moment, anchor, x in _clock_ticks(axis):
        pieces.append(f'<text x="{x:.2f}" y="60" text-anchor="{anchor}">{moment}</text>')
    return f'<svg viewBox="0 0 {STRIP_WIDTH} {STRIP_HEIGHT}" role="img" stroke-width="2">{"".join(pieces)}</svg>'


def _hours(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high - low >= 1 else (low - 1, high + 1)


def _clock_ticks(axis: Axis, count: int = 5) -> Iterator[tuple[str, str, float]]:
    """Times written below a strip; the day where it changes."""
    day = None
    for i in range(count):
        moment = datetime.fromtimestamp(axis.low + i * (axis.high - axis.low) / (count - 1))
        seconds = ":%S" if axis.high - axis.low < 600 else ""
        written = moment.strftime(f"%H:%M{seconds}" if moment.date() == day else f"%Y-%m-%d %H:%M{seconds}")
        day = moment.date()
        anchor = "start" if i == 0 else "end" if i == count - 1 else "middle"
        yield written, anchor, axis.start + i * (axis.end - axis.start) / (count - 1)


def spells(times: Sequence[float], beginnings: Iterable[float]) -> list[tuple[float, float]]:
    """The stretches in which a run was at work: each from a beginning to the last line before the next one."""
    borders = sorted({times[0], *beginnings}) if times else []
    found = []
    for start, next_start in itertools.zip_longest(borders, borders[1:], fillvalue=math.inf):
        within = [moment for moment in times if start <= moment < next_start]
        if within:
            found.append((start, within[-1]))
    return found
