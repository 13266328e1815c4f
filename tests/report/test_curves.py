"""Where the curves run: against places that are computed here once more."""

import re

import pytest

from jaxllm.report import curves
from jaxllm.report.curves import Curve, Mark, figure, spells, strip, thinned, ticks


def path(svg: str, number: int = 0) -> list[tuple[str, float, float]]:
    """(pen, x, y) of each point of a path."""
    written = re.findall(r' d="([^"]*)"', svg)[number]
    return [(pen, float(x), float(y)) for pen, x, y in re.findall(r"([ML])([\d.-]+) ([\d.-]+)", written)]


def test_places_are_those_of_the_values():
    """Steps from 0 to 100 lie from x = 62 to 448; the values 2 to 8, with 4 % of room, from y = 194 up to 8."""
    found = path(figure("loss", [Curve("loss", "#000", [(0, 8.0), (25, 5.0), (100, 2.0)])]))
    assert [pen for pen, _, _ in found] == ["M", "L", "L"]
    assert [x for _, x, _ in found] == pytest.approx([62, 62 + 0.25 * 386, 448], abs=0.01)
    room, whole = 0.04 * 6, 6 + 2 * 0.04 * 6
    expected = [194 - 186 * (value - (2 - room)) / whole for value in (8, 5, 2)]
    assert [y for _, _, y in found] == pytest.approx(expected, abs=0.01)


def test_a_logarithmic_axis_has_equal_steps_for_equal_ratios():
    svg = figure("grad_norm", [Curve("grad_norm", "#000", [(1, 0.1), (2, 1.0), (3, 10.0)])], may_be_logarithmic=True)
    (_, _, first), (_, _, second), (_, _, third) = path(svg)
    assert first - second == pytest.approx(second - third, abs=0.02) and "logarithmic" in svg


def test_from_zero():
    svg = figure("mfu", [Curve("mfu", "#000", [(1, 0.2), (2, 0.4)])], from_zero=True)
    (_, _, low), (_, _, high) = path(svg)
    assert (194 - low) / (194 - high) == pytest.approx((0.2 + 0.016) / (0.4 + 0.016), abs=1e-3)


def test_what_is_not_finite_is_a_gap():
    found = path(figure("loss", [Curve("loss", "#000", [(1, 1.0), (2, None), (3, 3.0), (4, 2.0)])]))
    assert [pen for pen, _, _ in found] == ["M", "M", "L"]


@pytest.mark.parametrize(
    "points", [[(0, 0.0)], [(5, 3.0)], [(1, -2.0), (2, -2.0)], [(1, 1e-9), (10**9, 1e12)]], ids=str
)
def test_a_figure_of_few_or_far_values(points):
    for svg in (
        figure("x", [Curve("x", "#000", points)], may_be_logarithmic=True),
        figure("x", [Curve("x", "", points)]),
    ):
        assert all(62 - 0.01 <= x <= 448.01 and 7.99 <= y <= 194.01 for _, x, y in path(svg))


def test_thinned_keeps_ends_and_spikes():
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321] = (54_321, 99.0)
    points[500] = (500, -5.0)
    kept = thinned(points)
    assert len(kept) <= curves.DRAWN and (54_321, 99.0) in kept and (500, -5.0) in kept
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert thinned(points[:1000]) == points[:1000]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1000), (-3, 7), (1.99, 2.01), (1e-8, 3e-8), (0, 7e11)])
def test_ticks_are_few_and_within(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 * abs(low) <= value <= high + 1e-9 * abs(high) for value in found)


@pytest.mark.parametrize(("low", "high"), [(0.1, 90), (2, 80), (1e-6, 1e6)])
def test_logarithmic_ticks(low, high):
    found = ticks(low, high, logarithmic=True)
    assert 2 <= len(found) <= 6 and all(low <= value <= high for value in found)


def test_a_spell_is_from_a_beginning_to_the_last_line_before_the_next():
    assert spells([0, 5, 10, 100, 105], [1, 100]) == [(0, 0), (1, 10), (100, 105)]
    assert spells([3, 4], []) == [(3, 4)]
    assert spells([], []) == []


def test_a_strip_has_its_spells_where_the_hours_are():
    svg = strip([(1000.0, 1100.0), (1300.0, 1400.0)], [Mark(1200.0, "fault", "crashed")], "#123456")
    places = [(float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.]+)" width="([\d.]+)"', svg)]
    assert places == [pytest.approx((6, 237), abs=0.01), pytest.approx((6 + 948 * 0.75, 237), abs=0.01)]
    assert re.search(r'class="fault" x1="480\.00"', svg)
