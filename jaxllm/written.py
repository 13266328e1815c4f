"""Numbers and times as a person reads them."""

import math
from datetime import datetime
from typing import Any

MINUTE, HOUR, DAY = 60, 3_600, 86_400


def lasted(seconds: float) -> str:
    """A time in its two largest units: "40 s", "12 min", "3 h 5 min", "2 d 3 h"."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 1.5 * HOUR:
        return f"{seconds / MINUTE:.0f} min"
    large, small, names = (HOUR, MINUTE, ("h", "min")) if seconds < 2 * DAY else (DAY, HOUR, ("d", "h"))
    whole, rest = divmod(int(seconds), large)
    return f"{whole} {names[0]} {rest // small} {names[1]}"


def clock(moment: float | None) -> str:
    """A time of unix seconds as a clock here shows it."""
    return "-" if moment is None else datetime.fromtimestamp(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def number(value: Any) -> str:
    """With four digits, thousands apart; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def gigabytes(count: float) -> str:
    """Written; a small count in megabytes."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
