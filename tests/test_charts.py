"""A chart shows what its numbers are: extremes survive thinning, gaps stay gaps, and any viewer can read the file."""

import math
import random
import re
from xml.etree import ElementTree

import pytest

from sdlora import amounts, charts
from sdlora.charts import Mark, Series

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*series: Series, marks: tuple[Mark, ...] = (), log_y: bool = False) -> ElementTree.Element:
    return ElementTree.fromstring(charts.line_chart(series, title="Loss", x_label="step", y_label="loss", marks=marks, log_y=log_y))


def words(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}text")]


def lines(svg: ElementTree.Element) -> list[str]:
    return [element.get("d", "") for element in svg.iter(f"{SVG}path") if element.get("fill") == "none"]


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+?) ([\d.]+)", path)]


def test_thinning_keeps_the_ends_and_every_extreme() -> None:
    values = [random.Random(0).random() for _ in range(10_000)]
    values[4321], values[8765] = 9.0, -9.0
    x, y = charts.thin(range(10_000), values)
    assert len(x) <= charts.MOST_POINTS
    assert (x[0], x[-1]) == (0, 9999)
    assert (4321, 9.0) in list(zip(x, y, strict=True))
    assert (8765, -9.0) in list(zip(x, y, strict=True))
    assert x == sorted(x)


def test_thinning_keeps_gaps() -> None:
    values = [1.0] * 5000
    values[2500] = math.nan
    _, y = charts.thin(range(5000), values)
    assert sum(math.isnan(value) for value in y) == 1


def test_few_points_are_left_as_they_are() -> None:
    assert charts.thin([1, 2, 3], [5.0, math.nan, 4.0])[0] == [1, 2, 3]


def test_a_long_run_is_a_small_chart() -> None:
    text = charts.line_chart([Series("", range(10_000), [math.sin(i) for i in range(10_000)])], title="t", x_label="step", y_label="loss")
    assert len(text) < 15_000


def test_a_line_falls_on_the_page_where_its_numbers_rise() -> None:
    (path,) = lines(drawn(Series("loss", [1, 2, 3], [1.0, 2.0, 3.0])))
    (x1, y1), (x2, y2), (x3, y3) = points(path)
    assert x1 < x2 < x3
    assert y1 > y2 > y3
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.11)


def test_a_gap_is_not_bridged() -> None:
    (path,) = lines(drawn(Series("loss", [1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 2.0, 1.0])))
    assert path.count("M") == 2


def test_a_point_alone_is_seen() -> None:
    svg = drawn(Series("loss", [7], [0.5]))
    assert len(points(lines(svg)[0])) == 2, "a path of one point draws nothing"
    assert "7" in words(svg)


@pytest.mark.parametrize("log_y", [False, True])
def test_a_constant_line_lies_within_the_box(log_y: bool) -> None:
    svg = drawn(Series("loss", [1, 2, 3], [0.25, 0.25, 0.25]), log_y=log_y)
    assert all(40 < y < 235 for _, y in points(lines(svg)[0]))
    assert any(word.startswith("0.2") for word in words(svg))


def test_without_a_finite_value_the_chart_says_so() -> None:
    assert words(drawn(Series("loss", [1, 2], [math.nan, math.inf]))) == ["no values"]
    assert words(drawn()) == ["no values"]


def test_a_logarithmic_scale_has_equal_steps_for_equal_factors() -> None:
    (path,) = lines(drawn(Series("", [1, 2, 3, 4], [0.01, 0.1, 1.0, 0.0]), log_y=True))
    (_, y1), (_, y2), (_, y3) = points(path)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.11)


def test_text_is_escaped_and_control_characters_are_left_out() -> None:
    svg = drawn(Series("a<b> & \x00c", [1, 2], [1.0, 2.0]), Series("d", [1, 2], [1.0, 2.0]), marks=(Mark(1, '"><script>'),))
    assert "a<b> & c" in words(svg)
    assert '"><script>' in words(svg)


def test_several_lines_have_a_legend_and_are_told_apart_without_colour() -> None:
    svg = drawn(*(Series(f"line {i}", [1, 2], [1.0, 2.0], colour=i) for i in range(4)))
    assert {f"line {i}" for i in range(4)} <= set(words(svg))
    looks = {element.get("stroke-dasharray") for element in svg.iter(f"{SVG}path") if element.get("fill") == "none"}
    assert len(looks) == 4


def test_a_long_legend_stays_within_the_width() -> None:
    svg = drawn(*(Series("a rather long name of a line", [1, 2], [1.0, 2.0], colour=i) for i in range(4)))
    places = [float(element.get("x", "0")) for element in svg.iter(f"{SVG}text") if (element.text or "").startswith("a rather")]
    assert max(places) < 260


def test_screen_readers_are_told_the_course() -> None:
    svg = drawn(Series("held out", [0, 100, 200], [0.5, 0.2, 0.3]))
    assert svg.findtext(f"{SVG}title") == "Loss"
    assert svg.findtext(f"{SVG}desc") == "held out: from 0.5 at step 0 to 0.3 at 200, lowest 0.2 at 100."


def test_each_of_few_points_tells_its_numbers() -> None:
    tips = [circle.findtext(f"{SVG}title") for circle in drawn(Series("held out", [0, 1000], [0.5, 0.25])).iter(f"{SVG}circle")]
    assert tips == ["held out, step 0: 0.5", "held out, step 1,000: 0.25"]


def test_a_mark_beyond_the_lines_widens_the_chart() -> None:
    svg = drawn(Series("", [1, 2], [1.0, 2.0]), marks=(Mark(10, "recommended"),))
    assert "recommended" in words(svg)
    assert "10" in words(svg)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 1000, [0, 200, 400, 600, 800, 1000]), (3e-5, 1e-4, [4e-5, 6e-5, 8e-5, 1e-4])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_whole_numbers_have_whole_ticks() -> None:
    assert charts.ticks(1, 3, least_step=1) == [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.30000000000000004, "0.3"), (1234, "1,234"), (1e6, "1,000,000"), (2e-5, "2e-5"), (0.0001, "0.0001"), (-0.5, "-0.5")],
)
def test_numbers_are_for_people(value: float, text: str) -> None:
    assert amounts.number(value) == text


def test_smoothing_is_the_mean_around_and_forgets_what_is_not_finite() -> None:
    assert charts.smoothed([0, 3, 6, 9], window=3) == [1.5, 3, 6, 7.5]
    assert charts.smoothed([1, math.nan, 3], window=3) == [1, 2, 3]
    assert math.isnan(charts.smoothed([math.nan], window=3)[0])
