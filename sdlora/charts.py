"""Line charts as SVG text: numbers go in, a picture that needs no script, no font file and no library comes out.

A plotting library would weigh more than the rest of the report. Each line has its colour (Okabe and Ito's, told apart by colour-blind
people) and its own dashes, so that a print in grey is read as well. The colours are CSS variables with a fallback, the text takes the
colour of the page around it: one chart serves a light and a dark page. What hover would show stands in titles and in the description.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from sdlora.amounts import number

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8609a")  # Okabe and Ito 2008; in a page --line-0 to --line-3 go before them
DASHES = ("", "7 4", "2 4", "10 4 2 4")
MOST_POINTS = 600  # a line on paper has no more to show: 1.6 points per unit of width

_WIDTH, _HEIGHT = 440, 270  # units; on a phone of 360 px a letter is still 10 px high
_LETTER, _LINE = 12, 17  # height of a letter and of a line of text
_RIGHT, _BOTTOM = 22, 38
_DOTS = 40  # lines of fewer points show each of them, with its numbers as a tooltip


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        label: in the legend; an empty one leaves the line out of it.
        x, y: as many of each, x ascending; a y that is not finite leaves a gap.
        colour: which of the four colours and dashes.
        faint: thin and pale and without dashes, for what lies behind another line.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """A place on the x axis, with a word."""

    x: float
    label: str


@dataclass(frozen=True)
class _Frame:
    """Where the lines are drawn: the box in units, and the values at its edges (logarithms if `log_y`)."""

    left: float
    top: float
    x: tuple[float, float]
    y: tuple[float, float]
    log_y: bool

    def across(self, x: float) -> float:
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (_WIDTH - _RIGHT - self.left)

    def down(self, y: float) -> float:
        share = ((math.log10(y) if self.log_y else y) - self.y[0]) / (self.y[1] - self.y[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - self.top)


def line_chart(series: Sequence[Series], *, title: str, x_label: str, y_label: str, marks: Sequence[Mark] = (), log_y: bool = False) -> str:
    """A chart as an SVG element that fills the width it is given.

    Args:
        title: read out by screen readers, with a description of each line's course; not drawn.
        marks: vertical lines with a word at their head.
        log_y: a logarithmic scale; values of 0 and below are left out.
    """
    drawn = [_cleaned(one, log_y) for one in series]
    named = [one for one in drawn if one.label]
    rows = _legend_rows(named) if len(named) > 1 else []
    words = [f"<title>{_escaped(title)}</title>", f"<desc>{_escaped(_description(drawn, x_label, y_label))}</desc>"]
    if not any(math.isfinite(y) for one in drawn for y in one.y):
        parts = [_text(_WIDTH / 2, _HEIGHT / 2, "no values", anchor="middle")]
    else:
        top = 14 + _LINE * (len(rows) + 1)
        frame, y_ticks = _frame(drawn, [mark.x for mark in marks], top=top, log_y=log_y)
        parts = [
            *_legend(rows),
            *_axes(frame, y_ticks, x_label=x_label, y_label=y_label),
            *(_mark(mark, frame, row) for row, mark in enumerate(marks)),
            *(_line(one, frame) for one in sorted(drawn, key=lambda one: not one.faint)),
            *(dot for one in drawn for dot in _dots(one, frame, x_label)),
        ]
    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg"'
    return f'{head} width="100%" font-family="inherit" font-size="{_LETTER}">{"".join([*words, *parts])}</svg>'


def thin(x: Sequence[float], y: Sequence[float], *, most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points that look like all of them: the smallest and the largest of each stretch, the ends, and a gap where one is.

    Args:
        most: at least 5.
    """
    if len(x) <= most:
        return list(x), list(y)
    stretches = (most - 2) // 3
    kept = {0, len(x) - 1}
    for which in range(stretches):
        stretch = range(which * len(x) // stretches, (which + 1) * len(x) // stretches)
        finite = [i for i in stretch if math.isfinite(y[i])]
        kept |= {min(finite, key=lambda i: y[i]), max(finite, key=lambda i: y[i])} if finite else set()
        kept |= set([i for i in stretch if not math.isfinite(y[i])][:1])
    return [x[i] for i in sorted(kept)], [y[i] for i in sorted(kept)]


def smoothed(values: Sequence[float], *, window: int) -> list[float]:
    """The mean of the values around each, fewer at the ends; those that are not finite are left out of it.

    Args:
        window: how many values a mean is of.
    """
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    half, found = window // 2, []
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        count = counts[high] - counts[low]
        found.append((sums[high] - sums[low]) / count if count else math.nan)
    return found


def ticks(low: float, high: float, *, most: int = 5, least_step: float = 0.0) -> list[float]:
    """Round numbers within two bounds, in steps of 1, 2 or 5 times a power of ten.

    Args:
        most: about how many are wanted.
        least_step: 1 for what is counted in whole numbers.
    """
    rough = max((high - low) / most, least_step, 1e-300)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [count * step for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _cleaned(one: Series, log_y: bool) -> Series:
    """Few enough points, and no value that has no place on the scale."""
    x, y = thin(one.x, [value if not log_y or value > 0 else math.nan for value in one.y])
    return Series(one.label, x, y, one.colour % len(COLOURS), one.faint)


def _frame(series: Sequence[Series], also_x: Sequence[float], *, top: float, log_y: bool) -> tuple[_Frame, list[float]]:
    """The box of all that is drawn, and the ticks of its y axis, whose width it leaves free."""
    x = _span([*also_x, *(value for one in series for value in one.x)], pad=0)
    values = [value for one in series for value in one.y if math.isfinite(value)]
    if log_y:
        y = _span([math.log10(value) for value in values], pad=0.05)
        y_ticks = _log_ticks(*y)
    else:
        y = _span(values, pad=0.05)
        y = (0.0, y[1]) if 0 <= min(values) < 0.5 * max(values) else y
        y_ticks = ticks(*y)
    left = 12 + 0.6 * _LETTER * max((len(number(value)) for value in y_ticks), default=1)
    return _Frame(left, top, x, y, log_y), y_ticks


def _span(values: Sequence[float], *, pad: float) -> tuple[float, float]:
    """The bounds of the values and something more; never empty."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 0.1 * abs(low) if pad and low else 1.0
        return low - room, high + room
    return low - pad * (high - low), high + pad * (high - low)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two logarithms, or only the powers where these are many."""
    factors = (1,) if high - low > 3 else (1, 2, 5)
    every = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
    within = [value for value in every if low <= math.log10(value) <= high]
    return within or [10 ** ((low + high) / 2)]


def _axes(frame: _Frame, y_ticks: Sequence[float], *, x_label: str, y_label: str) -> Iterable[str]:
    """Pale lines across at the ticks with their numbers, and what the axes count."""
    foot = _HEIGHT - _BOTTOM
    yield _text(2, frame.top - 13, y_label, faint=True)
    yield _text(_WIDTH - 4, _HEIGHT - 4, x_label, anchor="end", faint=True)
    for value in y_ticks:
        y = frame.down(value)
        yield f'<path d="M{frame.left:.1f} {y:.1f}H{_WIDTH - _RIGHT}" stroke="currentColor" stroke-opacity=".14"/>'
        yield _text(frame.left - 6, y + 4, number(value), anchor="end", faint=True)
    yield f'<path d="M{frame.left:.1f} {foot}H{_WIDTH - _RIGHT}" stroke="currentColor" stroke-opacity=".5"/>'
    for value in ticks(*frame.x, most=6, least_step=1.0):
        yield f'<path d="M{frame.across(value):.1f} {foot}v4" stroke="currentColor" stroke-opacity=".5"/>'
        half = 0.3 * _LETTER * len(number(value))  # of its width, so that the last number is not cut off
        yield _text(min(frame.across(value), _WIDTH - 2 - half), foot + 17, number(value), anchor="middle", faint=True)


def _mark(mark: Mark, frame: _Frame, row: int) -> str:
    """A vertical line whose word stands on the side that has room; words of several marks stand below each other."""
    x, is_left = frame.across(mark.x), frame.across(mark.x) > _WIDTH * 0.6
    line = f'<path d="M{x:.1f} {frame.top}V{_HEIGHT - _BOTTOM}" stroke="currentColor" stroke-opacity=".75" stroke-dasharray="3 3"/>'
    return line + _text(x + (-5 if is_left else 5), frame.top + 10 + row * 14, mark.label, anchor="end" if is_left else "start")


def _line(one: Series, frame: _Frame) -> str:
    """A line with its gaps; a point alone between two gaps is a dot."""
    path = []
    for is_there, run in groupby(zip(one.x, one.y, strict=True), key=lambda point: math.isfinite(point[1])):
        points = [f"{frame.across(x):.1f} {frame.down(y):.1f}" for x, y in run] if is_there else []
        path += [f"M{points[0]}", *(f"L{point}" for point in points[1:] or points)] if points else []
    return f'<path d="{"".join(path)}" fill="none" stroke-linecap="round" stroke-linejoin="round" {_stroke(one)}/>'


def _stroke(one: Series) -> str:
    dashes = DASHES[one.colour]
    look = 'stroke-width="1" stroke-opacity=".35"' if one.faint else 'stroke-width="2.2"'
    dashed = f' stroke-dasharray="{dashes}"' if dashes and not one.faint else ""
    return f'{look}{dashed} style="stroke:{_colour(one.colour)}"'


def _colour(which: int) -> str:
    return f"var(--line-{which},{COLOURS[which]})"


def _dots(one: Series, frame: _Frame, x_label: str) -> Iterable[str]:
    """The points of a line that has few, each with its numbers as a tooltip."""
    if one.faint or len(one.x) > _DOTS:
        return
    for x, y in zip(one.x, one.y, strict=True):
        if math.isfinite(y):
            words = _escaped(f"{one.label}, {x_label} {number(x)}: {number(y, digits=4)}".removeprefix(", "))
            place = f'cx="{frame.across(x):.1f}" cy="{frame.down(y):.1f}"'
            yield f'<circle {place} r="3" style="fill:{_colour(one.colour)}"><title>{words}</title></circle>'


def _legend_rows(series: Sequence[Series]) -> list[list[tuple[float, Series]]]:
    """The entries of the legend in lines, each with its place; a letter is taken to be 0.6 of its height wide."""
    rows: list[list[tuple[float, Series]]] = [[]]
    left = 2.0
    for one in series:
        width = 30 + 0.6 * _LETTER * len(one.label) + 20
        if rows[-1] and left + width > _WIDTH:
            rows.append([])
            left = 2.0
        rows[-1].append((left, one))
        left += width
    return rows


def _legend(rows: Sequence[Sequence[tuple[float, Series]]]) -> Iterable[str]:
    for which, row in enumerate(rows):
        y = 14 + which * _LINE
        for left, one in row:
            yield f'<path d="M{left:.1f} {y - 4}h24" stroke-linecap="round" {_stroke(one)}/>'
            yield _text(left + 30, y, one.label)


def _description(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """The course of each line in a sentence."""
    sentences = []
    for one in series:
        points = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]
        if points and not one.faint:
            (x, y), (end_x, end_y), (low_x, low_y) = points[0], points[-1], min(points, key=lambda point: point[1])
            course = f"from {number(y, digits=4)} at {x_label} {number(x)} to {number(end_y, digits=4)} at {number(end_x)}"
            sentences.append(f"{one.label or y_label}: {course}, lowest {number(low_y, digits=4)} at {number(low_x)}.")
    return " ".join(sentences) or "There are no values."


def _text(x: float, y: float, words: str, *, anchor: str = "start", faint: bool = False) -> str:
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    look = ' fill-opacity=".72"' if faint else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="currentColor"{side}{look}>{_escaped(words)}</text>'


def _escaped(words: str) -> str:
    """Text for XML, which has no place for control characters."""
    return html.escape("".join(letter for letter in words if letter.isprintable()))
