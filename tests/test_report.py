"""The report says what to do, proves it, survives whatever a run has been through, and needs nothing but itself to be read."""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdlora import config, report, report_facts, report_page
from sdlora.amounts import counted, duration, size
from sdlora.errors import UserError

STARTED = {"event": "started", "pictures": 27, "held_out": 3, "modules": 8, "parameters": 800, "steps": 4, "base": "Stable Diffusion 1.x"}
VOID = {"meta", "img", "circle", "path", "br"}


@dataclass(frozen=True)
class Verdict:
    step: int = 2
    strength: float = 0.9
    reason: str = "held-out pictures are drawn best there"
    warning: str = ""


class Reader(HTMLParser):
    """Checks that every tag is closed, and collects what the page refers to and says."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self._see(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self._see(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title", "desc"):
            self.words.append(data)

    def _see(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    @property
    def text(self) -> str:
        return "".join(self.words)


def step(number: int, *, loss: float | None = 0.5, **more: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": loss, "rate": 1e-4, "step_s": 0.25, **more}


def look(number: int, *, loss: float | None = 0.2, drift: float = 0.01) -> dict[str, Any]:
    return {"event": "validated", "step": number, "loss": loss, "seen_loss": 0.1, "bands": [0.4, 0.2, 0.1, 0.05], "drift": drift}


def sampled(number: int) -> dict[str, Any]:
    return {"event": "sampled", "step": number, "paths": [f"samples/{number:06d}-0.png"]}


def png(*, side: int = 8, prompt: str = "pip, a dragon") -> bytes:
    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt("parameters", f"{prompt}\nSteps: 20, Sampler: Euler, Seed: 0")
    Image.effect_noise((side, side), 90).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def run_folder(
    folder: Path,
    rows: Iterable[dict[str, Any]],
    *,
    result: bool = True,
    checkpoints: tuple[int, ...] = (2,),
    samples: tuple[int, ...] = (),
    prompt: str = "pip, a dragon",
    **settings: Any,
) -> Path:
    """A run's folder as it is left behind, with made-up numbers."""
    values = {"base": "someone/some-base", "data": "pictures/of/pip", "kind": "character", "trigger": "pip", "name": "pip-v1", "steps": 4}
    for name in ("checkpoints", "samples"):
        (folder / name).mkdir(parents=True)
    (folder / "config.toml").write_text(config.to_toml(config.parse(values | settings, where="test")))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in checkpoints:
        (folder / "checkpoints" / f"pip-v1-{number:06d}.safetensors").write_bytes(b"lora %d" % number)
    for number in samples:
        (folder / "samples" / f"{number:06d}-0.png").write_bytes(png(prompt=prompt))
    if result:
        (folder / "pip-v1.safetensors").write_bytes(b"the result")
    return folder


def page_of(folder: Path, verdict: Verdict | None = None, sheet: Path | None = None) -> Reader:
    """The report, read as a browser would; it also has to be well-formed."""
    written = report.write(folder, verdict=verdict, sheet=sheet)
    assert written == folder / "report.html"
    reader = Reader()
    reader.feed(written.read_text())
    reader.close()
    assert reader.open == []
    ElementTree.fromstring(written.read_text())  # stricter than HTML asks for
    return reader


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A run with all that a run can have."""
    rows: list[dict[str, Any]] = [
        {"event": "forecast", "step_s": 0.2, "course_s": 2.0, "peak_bytes": 1e9},
        STARTED,
        look(0, drift=0),
        sampled(0),
    ]
    rows += [step(1), step(2), {"event": "saved", "step": 2, "path": "x", "peak_bytes": 1.1e9}, look(2), sampled(2)]
    rows += [
        {"event": "paused", "step": 2},
        step(3),
        {"event": "alarm", "step": 3, "words": "steps are slow."},
        step(4),
        look(4),
        sampled(4),
    ]
    rows = [row | {"time_s": 1_764_000_000.0 + number} for number, row in enumerate(rows)]
    Image.new("RGB", (40, 20)).save(tmp_path / "compare.png")
    return run_folder(tmp_path / "run", rows, samples=(0, 2, 4))


def test_the_verdict_comes_first_and_says_what_to_write_where(whole: Path) -> None:
    text = page_of(whole, Verdict()).text
    advice = "Use pip-v1-000002.safetensors at strength 0.9, because held-out pictures are drawn best there."
    assert advice in text
    assert text.index(advice) < text.index("models/Lora") < text.rindex("How it learned") < text.index("Training loss")
    assert "pip, a dragon <lora:pip-v1-000002:0.9>" in text


def test_of_the_last_step_the_result_is_recommended(whole: Path) -> None:
    text = page_of(whole, Verdict(step=4, strength=1.0, reason="")).text
    assert "Use pip-v1.safetensors at strength 1." in text
    assert "sdlora train --resume run --set steps=8 --allow-changes" in text


@pytest.mark.parametrize("verdict", [{}, {"step": 4, "warning": "Later ones learn by heart."}], ids=["an earlier one", "a warning"])
def test_more_steps_are_proposed_only_where_the_last_is_the_best(whole: Path, verdict: dict[str, Any]) -> None:
    assert "--resume" not in page_of(whole, Verdict(**verdict)).text


def test_a_reason_that_is_a_sentence_stays_one(whole: Path) -> None:
    text = page_of(whole, Verdict(reason="Later ones learn by heart.")).text
    assert "at strength 0.9. Later ones learn by heart." in text


def test_a_recommended_file_that_is_gone_is_said(whole: Path) -> None:
    text = page_of(whole, Verdict(step=3)).text
    assert "its file is no longer in the folder. Held-out pictures are drawn best there." in text


def test_a_warning_stands_beside_the_verdict(whole: Path) -> None:
    text = page_of(whole, Verdict(warning="From step 2 on it learns by heart")).text
    assert text.index("at strength 0.9") < text.index("From step 2 on it learns by heart.") < text.index("How to use it")


def test_without_a_verdict_nothing_is_recommended(whole: Path) -> None:
    text = page_of(whole).text
    assert "Nothing is recommended" in text
    assert "recommended" not in text.replace("Nothing is recommended", "")


def test_the_page_needs_nothing_but_itself(whole: Path) -> None:
    (whole / "compare.png").write_bytes(png(side=900))
    reader = page_of(whole, Verdict(), whole / "compare.png")
    assert [one for one in reader.references if not one.startswith(("data:image/", "#"))] == []
    assert sum(one.startswith("data:") for one in reader.references) == 4
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert "url(" not in (whole / "report.html").read_text()


def test_every_chart_is_sound_xml(whole: Path) -> None:
    report.write(whole, verdict=Verdict(), sheet=None)
    charts = [part.split("</svg>")[0] for part in (whole / "report.html").read_text().split("<svg")[1:]]
    assert len(charts) == 6
    for chart in charts:
        ElementTree.fromstring(f"<svg{chart}</svg>")


def test_what_users_write_is_text_and_never_markup(tmp_path: Path) -> None:
    nasty = '<script>alert("1")</script> & `x` | *y*'
    rows = [STARTED | {"limits": [nasty], "base": nasty}, step(1), {"event": "alarm", "step": 1, "words": nasty}, sampled(1)]
    folder = run_folder(tmp_path / "run", rows, samples=(1,), prompt=nasty, trigger=nasty.replace(",", ""), output={"author": nasty})
    reader = page_of(folder)
    assert "script" not in reader.tags
    assert reader.text.count(nasty) >= 6
    marked = (folder / "report.md").read_text()
    assert not re.search(r"(?<!\\)<", re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", marked)), "outside of code"
    assert "\\<script\\>" in marked
    for line in marked.splitlines():
        if line.startswith("| `output.author`"):
            assert line.replace("\\|", "").count("|") == 4


def test_the_text_has_the_same_facts_and_links_to_the_pictures(whole: Path) -> None:
    (whole / "compare.png").write_bytes(png())
    report.write(whole, verdict=Verdict(warning="Beware of this."), sheet=whole / "compare.png")
    text = (whole / "report.md").read_text()
    for wanted in ("Use `pip-v1-000002.safetensors` at strength **0.9**", "Beware of this.", "](compare.png)", "](samples/000002-0.png)"):
        assert wanted in text
    assert "| 2 | 0.1 | 0.2 |" in text, "the held-out curve has its numbers"
    assert hashlib.sha256(b"the result").hexdigest() in text


def test_a_torn_line_is_left_out_and_counted(whole: Path) -> None:
    with (whole / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 5, "lo')
    assert report_facts.read(whole).last_step == 4
    assert "1 line of metrics.jsonl could not be read" in page_of(whole, Verdict()).text


def test_rows_that_make_no_sense_are_counted_not_believed(tmp_path: Path) -> None:
    rows: list[Any] = [
        STARTED,
        {"event": "step"},
        step(1) | {"loss": "much"},
        {"event": "validated", "step": 1},
        7,
        step(2),
        {"event": "later"},
    ]
    facts = report_facts.read(run_folder(tmp_path / "run", rows))
    assert [one.step for one in facts.steps] == [2]
    assert facts.unreadable == 4


def test_of_a_step_taken_twice_the_later_counts(tmp_path: Path) -> None:
    rows = [STARTED, step(1), step(2, loss=9.0), look(2, loss=9.0), step(1), step(2, loss=0.5), look(2, loss=0.25)]
    facts = report_facts.read(run_folder(tmp_path / "run", rows))
    assert [(one.step, one.loss) for one in facts.steps] == [(1, 0.5), (2, 0.5)]
    assert [one.loss for one in facts.looks] == [0.25]


def test_what_came_after_the_step_a_run_went_back_to_is_forgotten(tmp_path: Path) -> None:
    rows = [STARTED, step(1), step(2), step(3), sampled(3), STARTED, {"event": "continued", "step": 1, "notes": ["State 2 is damaged."]}]
    rows += [step(2)]
    folder = run_folder(tmp_path / "run", rows, samples=(3,), result=False)
    facts = report_facts.read(folder)
    assert [one.step for one in facts.steps] == [1, 2]
    assert not facts.samples
    told = [one.words for one in facts.happenings]
    assert told == ["Started, with 4 steps to take.", "Went on after step 1. State 2 is damaged."]  # the second start goes on, and says so
    assert told[1] in page_of(folder).text


def test_pauses_and_the_time_until_a_run_was_continued_do_not_count(tmp_path: Path) -> None:
    events = [(0, STARTED), (10, step(1)), (11, {"event": "paused", "step": 1}), (1000, step(2)), (1010, step(3))]
    events += [(9000, {"event": "continued", "step": 3, "notes": []}), (9005, step(4))]
    facts = report_facts.read(run_folder(tmp_path / "run", [row | {"time_s": 1e9 + time_s} for time_s, row in events]))
    assert facts.measured["course_s"] == 10 + 1 + 10 + 5
    assert "Paused after step 1 for 16 min 29 s." in [one.words for one in facts.happenings]


def test_without_times_the_steps_are_added_up(tmp_path: Path) -> None:
    assert report_facts.read(run_folder(tmp_path / "run", [STARTED, step(1), step(2)])).measured["course_s"] == 0.5


def test_a_stopped_run_has_a_report_of_what_there_is(tmp_path: Path) -> None:
    rows = [STARTED, step(1), step(2), {"event": "stopped", "step": 2}]
    text = page_of(run_folder(tmp_path / "run", rows, result=False)).text
    assert "2 of 4 steps were taken. Stopped by request after step 2." in text
    assert "Begin with pip-v1-000002.safetensors" in text


def test_a_run_that_ended_on_a_loss_that_is_not_finite_says_so(tmp_path: Path) -> None:
    words = "The loss of step 3 is not finite."
    rows = [STARTED, step(1), step(2, loss=None), step(3, loss=math.nan), {"event": "failed", "step": 3, "words": words}]
    assert words in page_of(run_folder(tmp_path / "run", rows, result=False)).text


@pytest.mark.parametrize("rows", [[], [STARTED], [STARTED, step(1)]])
def test_a_run_that_hardly_began_has_a_report(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    text = page_of(run_folder(tmp_path / "run", rows, result=False, checkpoints=())).text
    assert "has not saved a LoRA file yet" in text
    assert "How to use it" not in text


def test_without_held_out_pictures_the_curve_says_what_it_cannot_show(tmp_path: Path) -> None:
    rows = [STARTED, look(0, loss=None), step(1), look(1, loss=None)]
    text = page_of(run_folder(tmp_path / "run", rows)).text
    assert "No pictures were held out" in text
    assert "dashed orange" not in text


def test_without_looks_and_samples_their_places_are_empty(tmp_path: Path) -> None:
    text = page_of(run_folder(tmp_path / "run", [STARTED, step(1)])).text
    assert "How it learned" not in text
    assert "by heart" not in text
    assert "Training loss" in text


@pytest.mark.parametrize(("sample_every", "told"), [(0, True), (2, False)])
def test_a_run_that_was_to_draw_nothing_says_how_to_draw(tmp_path: Path, sample_every: int, told: bool) -> None:
    text = page_of(run_folder(tmp_path / "run", [STARTED, step(4)], sample_every=sample_every)).text
    command = "sdlora compare --base someone/some-base --lora pip-v1.safetensors --prompt pip --out sheet.png"
    assert (command in text) == told


def test_a_damaged_picture_is_named_in_its_place(whole: Path) -> None:
    (whole / "samples" / "000002-0.png").write_bytes(png()[:60])
    assert "000002-0.png cannot be read" in page_of(whole, Verdict()).text


def test_of_many_samples_some_are_shown_the_recommended_among_them(tmp_path: Path) -> None:
    count = 41
    rows = [STARTED, *(row for number in range(count) for row in (step(number + 1), sampled(number)))]
    folder = run_folder(tmp_path / "run", rows, samples=tuple(range(count)), checkpoints=(7,))
    reader = page_of(folder, Verdict(step=7))
    assert sum(one.startswith("data:") for one in reader.references) == 9
    assert "step 7 recommended" in reader.text
    assert "9 of 41 steps are shown" in reader.text


def test_the_forecast_stands_beside_what_happened(whole: Path) -> None:
    report.write(whole, verdict=None, sheet=None)
    text = (whole / "report.md").read_text()
    assert "| One step | 0.2 s | 0.25 s | +25 % |" in text
    assert "| Memory at most | 1.0 GB | 1.1 GB | +10 % |" in text
    assert "| On the disk" not in text, "no disk was forecast"


def test_settings_that_are_not_defaults_come_first_and_paths_lose_their_folders(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [STARTED, step(1)], base="/home/jo/models/some.safetensors", lora={"rank": 7})
    report.write(folder, verdict=None, sheet=None)
    chosen, every = (folder / "report.md").read_text().split("## Settings")[1].split("### All settings")
    assert "| `lora.rank` | 7 |" in chosen
    assert "`optimizer.warmup`" not in chosen
    assert "`optimizer.warmup`" in every
    assert "some.safetensors" in chosen
    for name in ("report.md", "report.html"):
        assert "/home/jo" not in (folder / name).read_text()
        assert str(tmp_path) not in (folder / name).read_text()


def test_the_embedded_base_is_used_here(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [STARTED, sampled(0), step(1)], samples=(0,), base="mini")
    text = page_of(folder, Verdict()).text
    assert "sdlora generate --lora checkpoints/pip-v1-000002.safetensors:0.9 --prompt 'pip, a dragon'" in text
    assert "models/Lora" not in text


def test_large_pictures_are_made_smaller_and_small_ones_kept(tmp_path: Path) -> None:
    large, small = tmp_path / "large.png", tmp_path / "small.png"
    large.write_bytes(png(side=900))
    small.write_bytes(png(side=20))
    found, kept = report_page.data_uri(large, wide_px=300), report_page.data_uri(small, wide_px=300)
    assert found is not None
    assert kept is not None
    assert found[1] == (300, 300)
    assert found[0].startswith("data:image/jpeg;base64,")
    assert base64.b64decode(kept[0].partition(",")[2]) == small.read_bytes()


def test_a_folder_without_a_run_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        report.write(tmp_path, verdict=None, sheet=None)


def test_an_existing_report_is_brought_up_to_date_and_nothing_else_is_touched(whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    report.write(whole, verdict=None, sheet=None)
    report.write(whole, verdict=Verdict(), sheet=None)
    after = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert {path.name for path in set(after) - set(before)} == {"report.html", "report.md"}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2437, "0.24 s"),
        (9.96, "10 s"),
        (59.7, "1 min"),
        (200, "3 min 20 s"),
        (3599.7, "1 h"),
        (84_960, "23 h 36 min"),
        (100 * 3600, "4 d 4 h"),
    ],
)
def test_times_are_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (2_200_000, "2.2 MB"), (999_960, "1.0 MB"), (123.9e6, "124 MB"), (6.94e9, "6.9 GB")],
)
def test_sizes_are_in_words(count: float, words: str) -> None:
    assert size(count) == words


def test_one_is_not_many() -> None:
    assert (counted(1, "step"), counted(0, "step"), counted(1000, "step")) == ("1 step", "0 steps", "1,000 steps")
