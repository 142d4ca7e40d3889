"""The curves of a run: for each what is drawn, how somebody reads it who has never seen one, and the same numbers for text alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from sdlora import charts
from sdlora.amounts import duration, number
from sdlora.charts import Mark, Series
from sdlora.events import Validated
from sdlora.report_blocks import Chart, Table
from sdlora.report_facts import Facts

BANDS = ("least noise", "less noise", "more noise", "most noise")  # the quarters of the timesteps

_ROWS = 12  # of a table that stands for a curve
_SPREAD = 20  # times the median: beyond it a scale of equal steps would show one spike and a flat line


def curves(facts: Facts, *, recommended: int | None) -> Iterator[Chart]:
    """The charts of what the run has noted; what it has not, has none.

    Args:
        recommended: the step that is marked.
    """
    marks = [Mark(recommended, "recommended")] if recommended is not None else []
    if facts.looks:
        yield _look_chart(facts.looks, marks)
    if facts.steps:
        yield _loss_chart(facts, marks)
    if any(look.bands for look in facts.looks):
        yield _bands_chart([look for look in facts.looks if look.bands], marks)
    if facts.looks:
        yield _drift_chart(facts.looks, marks)
    if facts.steps:
        yield _speed_chart(facts)
        yield _rate_chart(facts)


def _look_chart(looks: Sequence[Validated], marks: Sequence[Mark]) -> Chart:
    """Held-out against seen pictures: the one curve that knows learning from learning by heart."""
    x = [look.step for look in looks]
    held_out = [math.nan if look.loss is None else look.loss for look in looks]
    seen = Series("pictures it was trained on", x, [look.seen_loss for look in looks])
    if not any(math.isfinite(value) for value in held_out):
        title, lines = "Error on pictures it was trained on", [seen]
        how = (
            "Lower is closer to your pictures. No pictures were held out, so this cannot show whether it learns what they have in common "
            "or learns them by heart; set validation.share = 0.1 to see that."
        )
    else:
        title, lines = "Learning, or learning by heart", [seen, Series("held-out pictures", x, held_out, colour=1)]
        how = (
            "Lower is better. While both fall it learns what your pictures have in common; when the dashed orange line rises and the "
            "blue one still falls, it learns them by heart. Step 0 is the base without the LoRA."
        )
    return _chart(title, lines, how, y_label="error", marks=marks)


def _loss_chart(facts: Facts, marks: Sequence[Mark]) -> Chart:
    """The training loss: each step pale, the mean around it strong."""
    x, y = [one.step for one in facts.steps], [one.loss for one in facts.steps]
    window = max(5, len(y) // 20)
    mean = Series("mean of the steps around", x, charts.smoothed(y, window=window))
    how = (
        f"Lower is closer to your pictures. Single steps (pale) jump, because each adds another amount of noise; only the mean of {window} "
        "counts, and it says less about quality than the pictures do."
    )
    return _chart("Training loss", [mean, Series("each step", x, y, faint=True)], how, y_label="loss", marks=marks)


def _bands_chart(looks: Sequence[Validated], marks: Sequence[Mark]) -> Chart:
    """The error by amount of noise, as a share of the base's if that is known: the bands differ a hundredfold among themselves."""
    base = looks[0].bands if looks[0].step == 0 and all(value > 0 for value in looks[0].bands) else None
    x, lines = [look.step for look in looks], []
    for band, label in enumerate(BANDS[: min(len(look.bands) for look in looks)]):
        y = [100 * look.bands[band] / base[band] if base else look.bands[band] for look in looks]
        lines.append(Series(label, x, y, colour=band))
    how = "At little noise a picture's fine detail is learned, at much noise its composition and colours."
    how += " Below 100 % it does better than the base." if base else " Lower is better."
    return _chart("By amount of noise", lines, how, y_label="% of the base's error" if base else "error", marks=marks)


def _drift_chart(looks: Sequence[Validated], marks: Sequence[Mark]) -> Chart:
    how = (
        "How far the LoRA changes what the base would do for prompts without its trigger word. Lower is better: a steep rise means that "
        "it leaks into pictures that have nothing to do with it."
    )
    lines = [Series("", [look.step for look in looks], [100 * look.drift for look in looks])]
    return _chart("Effect where it was not called", lines, how, y_label="% of the base's prediction", marks=marks)


def _speed_chart(facts: Facts) -> Chart:
    """Seconds per step, and what was forecast."""
    x, y = [one.step for one in facts.steps], [one.step_s for one in facts.steps]
    finite = [value for value in y if math.isfinite(value)]
    median = statistics.median(finite) if finite else math.nan
    lines = [Series("mean of the steps around", x, charts.smoothed(y, window=max(5, len(y) // 20))), Series("each step", x, y, faint=True)]
    if "step_s" in facts.forecast:
        lines.append(Series("forecast", x, [facts.forecast["step_s"]] * len(x), colour=1))
    pictures = facts.run.batch * facts.run.optimizer.accumulation
    rate = f": {duration(median)} each, {number(pictures / median, digits=2)} pictures per second" if median > 0 else ""
    how = f"Time per step{rate}. Flat is good; where it climbs, memory was short or something else used the machine."
    log_y = bool(finite) and max(finite) > _SPREAD * median > 0
    return _chart("Speed", lines, how, y_label="seconds per step", log_y=log_y)


def _rate_chart(facts: Facts) -> Chart:
    how = "How large the steps were that it learned in, by the schedule that the settings name; it helps to explain the other curves."
    lines = [Series("", [one.step for one in facts.steps], [one.rate for one in facts.steps])]
    return _chart("Learning rate", lines, how, y_label="learning rate")


def _chart(title: str, lines: Sequence[Series], how: str, *, y_label: str, marks: Sequence[Mark] = (), log_y: bool = False) -> Chart:
    svg = charts.line_chart(lines, title=title, x_label="step", y_label=y_label, marks=marks, log_y=log_y)
    return Chart(title, svg, how, _numbers([one for one in lines if not one.faint], y_label))


def _numbers(lines: Sequence[Series], y_label: str) -> Table:
    """A few places of the lines, evenly apart and with both ends."""
    longest = max(lines, key=lambda one: len(one.x))
    places = evenly(len(longest.x), most=_ROWS)
    at = [dict(zip(one.x, one.y, strict=True)) for one in lines]
    rows = [[number(x), *(number(one[x], digits=3) if x in one else "" for one in at)] for x in (longest.x[place] for place in places)]
    return Table(("step", *(one.label or y_label for one in lines)), tuple(tuple(row) for row in rows))


def evenly(count: int, *, most: int) -> list[int]:
    """At most `most` of the indexes below `count`, evenly apart, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]
