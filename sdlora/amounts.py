"""Amounts in words: nobody should have to divide by 3,600 or count zeros to read what a run took."""

from __future__ import annotations

import math

_TIMES = (("min", "s", 1, 60, 60), ("h", "min", 60, 60, 24), ("d", "h", 3600, 24, 100))  # units, seconds of the smaller, how many, limit
_SIZES = ("bytes", "kB", "MB", "GB", "TB")


def number(value: float, *, digits: int = 6) -> str:
    """A number for people: thousands apart, no trailing zeros, and very small ones as 2e-5.

    Args:
        digits: at most so many count; of 1,000 and more all that stand before the point are shown.
    """
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or abs(value) >= 1e-4:
        return f"{value:,.0f}" if abs(value) >= 10 ** min(digits, 4) else f"{value:,.{digits}g}"
    head, _, power = f"{value:.{min(digits, 3)}g}".partition("e")
    return f"{head}e{int(power)}" if power else head


def duration(seconds: float) -> str:
    """A time in its two largest units: 0.24 s, 48 s, 3 min 20 s, 2 h 5 min, 1 d 4 h."""
    if seconds < 9.95:
        return f"{number(seconds, digits=2)} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    for unit, smaller, part, parts, limit in _TIMES:
        whole, rest = divmod(round(seconds / part), parts)
        if whole < limit:
            return f"{whole} {unit} {rest} {smaller}" if rest else f"{whole} {unit}"
    return f"{seconds / 86400:,.0f} d"


def size(count: float) -> str:
    """A number of bytes in powers of 1,000, as file managers and shops count: 512 bytes, 2.2 MB, 124 MB."""
    value, unit = float(count), 0
    while value >= (999.5 if unit else 1000) and unit < len(_SIZES) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f} {_SIZES[unit]}" if unit and value < 99.95 else f"{value:.0f} {_SIZES[unit]}"


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 picture, 30 pictures, 1,000 steps."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
