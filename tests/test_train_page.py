"""The page of trainings: pictures and captions, settings both ways, starts, the live view, and one story in a browser."""

import json
import os
import shutil
import signal
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from sdlora import config, job_line, jobs, run_folder, run_lock
from sdlora.errors import UserError
from sdlora.jobs import Jobs
from sdlora.ui import (
    captions_actions,
    gallery,
    lora_shelf,
    train_actions,
    train_page,
    uploads,
    watch_actions,
    watch_buttons,
    watch_reading,
    words,
)
from sdlora.ui import train_settings as settings
from sdlora.ui.roots import Roots, key_of
from sdlora.ui.train_settings import Form
from tests import hostile, shelf
from tests.test_jobs import end, wait_for
from tests.test_page import CHROMIUM_OPTIONS, free_port

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE_MS = 240_000  # a machine with two busy cores needs it
QUICK = """
steps = 4
batch = 2
cache = "memory"
report = false
save_every = 2
sample_every = 4
validation = {every = 2, draws = 4}
lora = {rank = 2}
"""
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")  # gradio counts its calls with pandas


@pytest.fixture
def roots(tiny_base: Path, pictures: Path, tmp_path: Path) -> Roots:
    """Roots with the tiny base and a folder of five pictures with captions."""
    roots = Roots(**{name: tmp_path / name for name in ("runs", "loras", "data", "bases", "outputs", "trash")})
    shelf.copy_base(tiny_base, roots.bases / "tiny")
    for path in pictures.iterdir():
        (roots.data / "cups").mkdir(parents=True, exist_ok=True)
        (roots.data / "cups" / path.name).write_bytes(path.read_bytes())
    return roots


@pytest.fixture
def line(roots: Roots) -> Iterator[Jobs]:
    yield Jobs(roots.runs)
    end(Jobs(roots.runs))


@pytest.fixture
def key(roots: Roots) -> str:
    """A set of the five pictures."""
    return uploads.copy_in(roots, roots.data / "cups")[0]


def base_of(roots: Roots) -> str:
    return next(key for shown, key in lora_shelf.bases_of(roots) if shown == "tiny")


def form(roots: Roots, **changed: str) -> Form:
    return Form(**({"name": "cups", "trigger": "zup", "kind": "style", "base": base_of(roots)} | changed))


def cards(roots: Roots, key: str) -> dict[str, Any]:
    *_, (_, _, report) = captions_actions.looked(roots, key, form(roots), {})
    return captions_actions.cards(roots, key, report.findings, 1, "en")


# --- pictures and captions -----------------------------------------------------------------------------------------------------


def test_what_the_doctor_finds_stands_with_the_picture_that_it_is_about(roots: Roots, key: str) -> None:
    folder = uploads.set_folder(roots, key)
    torn = folder / "2.png"
    torn.write_bytes(torn.read_bytes()[:80])
    Image.new("RGB", (20, 20), "red").save(folder / "small.png")
    told = cards(roots, key)
    first = told["pictures"][0]
    assert (first["name"], first["findings"][0]["severity"]) == ("2.png", "stops")
    assert "cannot be read" in first["findings"][0]["what"]
    assert str(folder) not in json.dumps(told)
    by_name = {one["name"]: one for one in told["pictures"]}
    assert any("enlarged" in one["what"] for one in by_name["small.png"]["findings"])
    assert by_name["0.png"]["caption"]
    assert by_name["0.png"]["picture"].startswith("data:image/jpeg;base64,")
    assert not any(one["severity"] == "stops" for one in by_name["0.png"]["findings"])


def test_a_caption_is_written_and_all_are_changed_at_once_and_the_originals_stay(roots: Roots, key: str) -> None:
    before = {path: path.read_bytes() for path in (roots.data / "cups").iterdir()}
    folder = uploads.set_folder(roots, key)
    for number, path in enumerate(uploads.pictures(folder)):
        captions_actions.write(roots, key, key_of(roots.data, path), "red, star" if number else "a cup")

    def said() -> list[str]:
        return [uploads.caption_of(path) for path in uploads.pictures(folder)]

    assert captions_actions.edit(roots, key, "add", "Red") == (1, 5)
    assert said()[:2] == ["a cup, Red", "red, star"]
    captions_actions.edit(roots, key, "remove", "red")
    assert said()[:2] == ["a cup", "star"]
    captions_actions.edit(roots, key, "replace", "star", "moon")
    captions_actions.edit(roots, key, "first", "zup")
    assert said()[:2] == ["zup, a cup", "zup, moon"]
    assert captions_actions.edit(roots, key, "prefix", "photo of") == (5, 5)
    assert captions_actions.edit(roots, key, "prefix", "photo of") == (0, 5)
    assert said()[:2] == ["photo of zup, a cup", "photo of zup, moon"]
    assert {path: path.read_bytes() for path in (roots.data / "cups").iterdir()} == before
    for action, tag, sentence in (
        ("eval", "x", "cannot be done"),
        ("add", " ", "are empty"),
        ("add", "a, b", "no comma"),
        ("add", "x" * 201, "longer"),
    ):
        with pytest.raises(UserError, match=sentence):
            captions_actions.edit(roots, key, action, tag)
    with pytest.raises(UserError, match="not there"):
        captions_actions.write(roots, key, "../0.png", "x")


def test_a_picture_is_taken_out_of_the_set_alone(roots: Roots, key: str) -> None:
    path = uploads.pictures(uploads.set_folder(roots, key))[0]
    train_actions.remove(roots, key, key_of(roots.data, path))
    assert len(uploads.pictures(uploads.set_folder(roots, key))) == 4
    assert not path.with_suffix(".txt").exists()
    assert len(list((roots.data / "cups").glob("*.png"))) == 5


# --- settings ------------------------------------------------------------------------------------------------------------------


def test_settings_follow_the_form_and_what_was_changed_by_hand_stays(roots: Roots, key: str) -> None:
    folder, style = uploads.set_folder(roots, key), form(roots)
    text = settings.text_of(roots, style, {}, folder)
    assert tomllib.loads(text)["lora"]["text_encoder"] is False
    assert "folder" not in text
    told, changes = settings.absorbed(text.replace("rank = ", "rank = 3 # "), text, style, {})
    assert (told, changes) == (style, {"lora.rank": 3})
    character = settings.text_of(roots, form(roots, kind="character"), changes, folder)
    assert tomllib.loads(character)["lora"]["text_encoder"] is True
    assert tomllib.loads(character)["lora"]["rank"] == 3
    edited = character.replace('name = "cups"', 'name = "mugs"').replace('kind = "character"', 'kind = "style"').replace("rank = 3\n", "")
    told, changes = settings.absorbed(edited, character, form(roots, kind="character"), changes)
    assert (told.name, told.kind, changes) == ("mugs", "style", {})
    assert settings.changes_of(settings.changes_text({"lora.rank": 3, "steps": 7})) == {"lora.rank": 3, "steps": 7}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("steps = ", "not valid TOML"), ("steps = 1\nrank = 2\nsteps = 3\nbatch = 1", "line 3 sets what another line sets"),
        ("[" * 5000, "not valid TOML"),
        ('vae = "/etc/passwd"', "names a file"), ('[lora]\nstart_from = "x"', "names a file"),
        ('[[data]]\nfolder = "/"', "names a file"), ('[validation]\nfolder = "/"', "names a file"), ("x" * 50_000, "no text of up to"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_read_are_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        settings.read(text)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ("stepz = 3", "nearest valid key is 'steps'"), ("steps = 0", "'steps' is 0"), ("lora = 3", "'lora' is 3"),
        ('name = "x"', "has a field of its own"), ("steps = 'x'", "'steps' is 'x'")],
)  # fmt: skip
def test_settings_that_are_not_allowed_start_nothing(roots: Roots, line: Jobs, key: str, changes: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        train_actions.start(roots, line, key, form(roots), settings.changes_of(changes), "me")
    assert not roots.runs.exists()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"name": ""}, "name is empty"), ({"trigger": ""}, "trigger word is empty"), ({"kind": "mood"}, "kind"),
        ({"base": "/etc"}, "not offered"),
        ({"trigger": "a,b"}, "without commas")],
)  # fmt: skip
def test_a_form_that_says_too_little_starts_nothing(roots: Roots, line: Jobs, key: str, changed: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        train_actions.start(roots, line, key, form(roots, **changed), {}, "me")
    with pytest.raises(UserError, match="no pictures yet"):
        train_actions.start(roots, line, "", form(roots), {}, "me")
    assert not roots.runs.exists()


def test_pictures_that_another_tab_has_added_are_shown_before_they_are_trained_on(roots: Roots, key: str) -> None:
    train_actions.check_seen(roots, key, {"set": key, "count": 5})
    for nothing in (None, "x", {}, {"set": "other", "count": 3}):
        train_actions.check_seen(roots, key, nothing)
    with pytest.raises(UserError, match="has 5 pictures, and 3 were shown here"):
        train_actions.check_seen(roots, key, {"set": key, "count": 3})


def test_a_start_freezes_the_pictures_and_writes_settings_that_follow_from_them(roots: Roots, line: Jobs, key: str) -> None:
    picture = uploads.pictures(uploads.set_folder(roots, key))[0]
    uploads.write_caption(picture, "")
    folder = train_actions.start(roots, line, key, form(roots), {"lora.rank": 3}, "me")
    uploads.write_caption(picture, "changed later")
    run = config.load(folder / "config.toml")
    assert run.data[0].folder == (folder / "pictures").resolve()
    assert run.data[0].caption == "zup"  # of the picture that has none of its own
    assert (run.lora.rank, run.base) == (3, str((roots.bases / "tiny").resolve()))
    assert run.save_every == run.steps // 10  # it followed, and was not taken as set by hand
    assert not (folder / "pictures" / picture.with_suffix(".txt").name).exists()
    assert jobs.look(line, folder).state == "waiting"
    uploads.write_caption(picture, "")
    with pytest.raises(UserError, match=r"'?cups'? has these pictures and settings and has not come to its end"):
        train_actions.start(roots, line, key, form(roots), {"lora.rank": 3}, "me")
    again = train_actions.start(roots, line, key, form(roots), {}, "me")
    assert again.name == "cups-2"


def test_the_same_press_again_is_refused_also_where_pictures_are_held_out(roots: Roots, line: Jobs, key: str) -> None:
    folder = uploads.set_folder(roots, key)
    for i in range(20):
        Image.new("RGB", (40, 40), (i, 2 * i, 3 * i)).save(folder / f"more-{i}.png")
    first = train_actions.start(roots, line, key, form(roots), {}, "me")
    assert config.load(first / "config.toml").validation.share > 0
    with pytest.raises(UserError, match="has these pictures and settings"):
        train_actions.start(roots, line, key, form(roots), {}, "me")


def test_a_forecast_is_counted_at_once(roots: Roots, key: str) -> None:
    told = train_actions.counted(roots, key, form(roots), {"steps": 40}, "en")
    assert "40 steps of 4 pictures" in told
    assert "GiB of memory" in told


def test_a_forecast_is_measured_as_long_as_somebody_waits_for_it(roots: Roots, key: str) -> None:
    quick = settings.changes_of(QUICK)
    *tried, told = train_actions.measured(roots, key, form(roots), quick, "en", lambda: True)
    assert tried
    assert "About" in str(told)
    asked = iter([True, False, False])
    assert list(train_actions.measured(roots, key, form(roots), quick, "en", lambda: next(asked, False))) == []


def test_pictures_that_cannot_be_used_leave_no_set_and_are_told_once(roots: Roots, tmp_path: Path) -> None:
    (tmp_path / "letter.png").write_text("Dear all")
    with pytest.raises(UserError, match=r"'letter\.png' is no picture") as told:
        train_actions.drop(roots, "", [tmp_path / "letter.png"], "en")
    assert "uploads" not in str(told.value)
    assert list((roots.data / uploads.FOLDER).iterdir()) == []


def test_a_refusal_does_not_say_where_a_set_lies(roots: Roots, key: str) -> None:
    for path in uploads.pictures(uploads.set_folder(roots, key)):
        train_actions.remove(roots, key, key_of(roots.data, path))
    for work in (
        partial(train_actions.counted, roots, key, form(roots), {}, "en"),
        partial(train_actions.start, roots, Jobs(roots.runs), key, form(roots), {}, "me"),
    ):
        with pytest.raises(UserError) as told:
            work()
        assert key not in str(told.value)


# --- watching ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(roots: Roots, line: Jobs, key: str) -> Path:
    """A run folder that tells of a run with hostile words, killed after step 20 of 40."""
    folder = train_actions.start(roots, line, key, form(roots, trigger="zup <b>"), {"steps": 40}, gallery.owner_of("x" * 40, ""))
    (path,) = (roots.runs / ".queue/waiting").glob("*.json")
    (roots.runs / ".queue/started").mkdir()
    path.rename(roots.runs / ".queue/started" / path.name)
    rows: list[dict[str, Any]] = [{"event": "started", "steps": 40, "time_s": 1.0}]
    rows += [{"event": "step", "step": step, "loss": 1 / step, "step_s": 0.5, "time_s": 1 + 0.5 * step} for step in range(1, 21)]
    rows += [{"event": "validated", "step": step, "loss": 0.5, "seen_loss": 0.4, "bands": [], "drift": 0.0} for step in (0, 20)]
    rows += [{"event": "saved", "step": 20, "peak_bytes": 5_000_000, "time_s": 20.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (0, 10, 20):
        path = run_folder.sample_path(folder, step, 0)
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (step, 0, 0)).save(path)
    return folder


def test_a_run_is_shown_with_its_numbers_curves_and_the_newest_pictures_beside_the_bases(roots: Roots, line: Jobs, told: Path) -> None:
    key = key_of(roots.runs, told)
    view = watch_actions.view(roots, line, key, "en")
    assert "zup &lt;b&gt;" in view.head
    assert "<b>" not in view.head
    assert "ended from outside after step 20" in view.head
    assert "20 / 40" in view.head
    assert "5 MB" in view.head.replace("5.0", "5")
    assert view.curves.count("<svg") == 2
    assert "held-out pictures" in view.curves
    assert view.pictures.count("<img") == 2
    assert [label in view.pictures for label in ("Without", "Step 20", "Step 10")] == [True, True, False]
    assert view.buttons == ("go_on", "put_away")  # no LoRA is saved yet, so there is nothing to draw with
    with run_lock.held(told):
        (told / "metrics.jsonl").open("a").write(json.dumps({"event": "step", "step": 21, "loss": 0.1, "time_s": 2e9}) + "\n")
        assert watch_actions.view(roots, line, key, "ko").buttons == ("pause", "stop", "save", "sample")
        assert watch_actions.row(roots, line, key)["step"] == 21
    with pytest.raises(UserError, match="not there"):
        watch_actions.view(roots, line, "../cups", "en")


def test_metrics_are_read_on_from_where_they_were_and_anew_when_they_were_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "st')
    assert [row["step"] for row in watch_reading.rows(tmp_path)] == [1]
    with path.open("a") as file:
        file.write('ep", "step": 2}\n')
    assert [row["step"] for row in watch_reading.rows(tmp_path)] == [1, 2]
    path.with_suffix(".new").write_text('{"event": "step", "step": 9}\n')
    path.with_suffix(".new").replace(path)
    assert [row["step"] for row in watch_reading.rows(tmp_path)] == [9]


def test_what_a_run_took_counts_all_of_its_starts() -> None:
    first = [("started", 0.0), ("step", 5.0), ("stopped", 60.0)]
    events = [*first, ("started", 1000.0), ("continued", 1001.0), ("step", 1010.0), ("done", 1030.0)]
    told: list[dict[str, Any]] = [{"event": event, "time_s": time_s} for event, time_s in events]
    told[-1]["elapsed_s"] = 30.0  # of the last start
    assert watch_reading.course(told, pictures_per_step=1).total_s == 90.0


def test_of_a_run_that_has_ended_the_pictures_are_those_of_the_checkpoint_that_it_recommends(told: Path) -> None:
    (told / "cups-000010.safetensors").write_bytes(b"")
    (told / "verdict.json").write_text(json.dumps({"step": 10, "strength": 1.0, "path": "cups-000010.safetensors", "reason": "Best."}))
    assert ["With, step 10" in watch_actions.pictures(told, "en", ended=ended) for ended in (True, False)] == [True, False]
    assert "Step 20" in watch_actions.pictures(told, "en", ended=False)


def test_a_run_of_a_shell_is_shown_where_nothing_was_started_here_and_runs_of_a_queue_by_their_place(
    roots: Roots, line: Jobs, told: Path
) -> None:
    shutil.rmtree(roots.runs / ".queue")
    (roots.runs / "queue").mkdir()
    goal = told.rename(roots.runs / "queue/cups")
    watch_actions._folders.cache_clear()
    key = key_of(roots.runs, goal)
    assert watch_actions.current(roots, line) == key
    assert watch_actions.choices(roots, line, "en") == [("queue/cups", key)]
    assert ("queue/cups", key) in lora_shelf.runs_of(roots)


def test_what_somebody_else_started_is_stopped_only_when_asked_twice(roots: Roots, line: Jobs, told: Path, key: str) -> None:
    folder = train_actions.start(roots, line, key, form(roots), {}, gallery.owner_of("x" * 40, ""))
    job = key_of(roots.runs, folder)
    said, question = watch_buttons.press(roots, line, job, "stop", "somebody else", "", "en")
    assert "started elsewhere" in said
    assert folder.exists()
    _, other = watch_buttons.press(roots, line, key_of(roots.runs, told), "stop", "somebody else", question, "en")
    assert other != question  # the question was about another training
    said, _ = watch_buttons.press(roots, line, job, "stop", "somebody else", question, "en")
    assert "taken out of the line" in said
    assert not folder.exists()
    with pytest.raises(UserError, match="cannot stop"):
        watch_buttons.press(roots, line, key_of(roots.runs, told), "stop", gallery.owner_of("x" * 40, ""), "", "en")


def test_what_has_ended_can_be_trained_longer(roots: Roots, line: Jobs, told: Path) -> None:
    job = key_of(roots.runs, told)
    with pytest.raises(UserError, match="has not come to its end"):
        watch_buttons.press(roots, line, job, "longer", "me", "", "en")
    with (told / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "saved", "step": 40, "path": "cups.safetensors"}) + "\n" + json.dumps({"event": "done"}) + "\n")
    (told / "cups.safetensors").write_bytes(b"")
    assert watch_actions.view(roots, line, job, "en").buttons == ("use", "longer", "put_away")
    said, _ = watch_buttons.press(roots, line, job, "longer", "me", "", "en")
    assert "in line again, for 80 steps in all" in said
    assert [(ticket.folder, ticket.steps) for _, ticket in job_line.tickets(roots.runs, "waiting")] == [(told.name, 80)]
    assert watch_actions.view(roots, line, job, "ko").buttons == ("stop",)


def test_what_has_ended_is_put_away_and_its_files_stay(roots: Roots, line: Jobs, told: Path, key: str) -> None:
    waiting = train_actions.start(roots, line, key, form(roots), {}, "me")
    with pytest.raises(UserError, match="stop it first"):
        watch_buttons.put_away(roots, line, key_of(roots.runs, waiting), "en")
    job = key_of(roots.runs, told)
    assert "put_away" in watch_actions.view(roots, line, job, "en").buttons
    assert "off this list" in watch_buttons.put_away(roots, line, job, "en")
    assert [one["name"] for one in watch_actions.rows(roots, line)] == [waiting.name]
    assert (told / "metrics.jsonl").exists()
    assert "put_away" not in watch_actions.view(roots, line, job, "en").buttons


def test_a_report_is_shown_where_nothing_of_it_can_run(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text('<p onclick="x">"quoted" & <script>alert(1)</script></p>')
    shown = watch_buttons.paper(tmp_path / "report.html", '"Report"')
    assert shown.count("<") == 2  # the frame's own tags
    assert " sandbox " in shown
    assert 'title="&quot;Report&quot;"' in shown


def test_generate_is_given_what_draws_with_the_lora(roots: Roots, line: Jobs, told: Path) -> None:
    job = key_of(roots.runs, told)
    with pytest.raises(UserError, match="has saved no LoRA yet"):
        watch_buttons.setting_of(roots, line, job)
    path = run_folder.checkpoint_path(told, "cups", 20)
    path.parent.mkdir()
    path.write_bytes(b"x")
    setting = watch_buttons.setting_of(roots, line, job)
    assert (setting["lora"], setting["base"], setting["strength"]) == (key_of(roots.runs, path), base_of(roots), 1.0)
    with pytest.raises(UserError, match="no report"):
        watch_buttons.report_of(roots, line, job)


def test_hostile_words_are_refused_everywhere_and_leave_nothing(roots: Roots, line: Jobs, key: str, tmp_path: Path) -> None:
    before = sorted(roots.data.rglob("*"))
    for word in hostile.strings(tmp_path):
        for work in (
            partial(settings.run_of, roots, form(roots, kind=word), {}, tmp_path), partial(watch_actions.view, roots, line, word, "en"),
            partial(train_actions.choose, roots, word, "en"), partial(train_actions.remove, roots, key, word),
            partial(captions_actions.write, roots, key, word, "x"), partial(train_actions.start, roots, line, word, form(roots), {}, "me"),
        ):  # fmt: skip
            with pytest.raises(UserError):
                work()
    assert sorted(roots.data.rglob("*")) == before
    assert not roots.runs.exists()


# --- whole -------------------------------------------------------------------------------------------------------------------------


@contextmanager
def served(roots: Roots, line: Jobs) -> Iterator[gr.Blocks]:
    """The page at work with its line; ending it leaves trainings alone."""
    stop = jobs.keep_going(line)
    with gr.Blocks(analytics_enabled=False) as demo:
        parts = train_page.layout(roots, line, base=base_of(roots))
        train_page.wire(roots, line, parts, demo)
    options: dict[str, Any] = {"server_name": "127.0.0.1", "prevent_thread_lock": True, "quiet": True, "ssr_mode": False}
    demo.launch(server_port=free_port(), i18n=words.i18n(), css=train_page.CSS, **options)
    try:
        yield demo
    finally:
        stop.set()
        demo.close(verbose=False)


def test_a_training_outlives_its_browser_and_its_page_and_one_that_is_killed_says_so(roots: Roots, line: Jobs, pictures: Path) -> None:
    files = [handle_file(str(path)) for path in sorted(pictures.glob("*.png"))]
    with served(roots, line) as demo:
        client = Client(str(demo.local_url), verbose=False)
        key, said = client.predict(files, "", api_name="/train_pictures")
        assert "5 pictures were added" in said
        changes = QUICK.replace("steps = 4\n", "steps = 100_000\n")
        said, job = client.predict(key, "cups", "zup", "style", base_of(roots), changes, api_name="/train_start")
        assert "starts now" in said
        folder = roots.runs / "cups"
        client.close()
    with served(roots, Jobs(roots.runs)) as demo:  # the browser is closed, the page was started anew
        client = Client(str(demo.local_url), verbose=False)
        wait_for(lambda: list(folder.glob("state/[0-9]*/state.json")) or jobs.look(line, folder).state == "failed")
        shown = client.predict("", api_name="/watch_job")
        assert (shown["id"], shown["state"], shown["steps"]) == (job, "running", 100_000)
        owner = run_lock.owner(folder)
        assert owner
        os.kill(owner.pid, signal.SIGKILL)
        killed_s = time.monotonic()
        wait_for(lambda: client.predict(job, api_name="/watch_job")["state"] == "interrupted")
        assert time.monotonic() - killed_s < 5
        assert "in line again" in client.predict(job, api_name="/watch_go_on")
        wait_for(lambda: any(row["event"] == "continued" for row in run_folder.rows(folder)))
        wait_for(lambda: client.predict(job, api_name="/watch_job")["state"] == "running")
        assert "started elsewhere" not in client.predict(job, api_name="/watch_stop")  # whoever goes on with it has it
        wait_for(lambda: client.predict(job, api_name="/watch_job")["state"] == "stopped")
        client.close()


def test_from_pictures_to_a_trained_lora_in_a_browser(roots: Roots, line: Jobs, pictures: Path) -> None:
    if not CHROMIUM.is_file():
        pytest.fail(f"{CHROMIUM} is missing: this test needs it (apt-get install chromium)")
    options: dict[str, Any] = {"executable_path": CHROMIUM, "args": CHROMIUM_OPTIONS}
    with served(roots, line) as place, sync_playwright() as playwright, playwright.chromium.launch(**options) as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-US")
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        page.goto(str(place.local_url))
        expect(page.locator("#train-token :is(input, textarea)")).not_to_have_value("")
        page.set_input_files("#train-drop input[type=file]", [str(path) for path in sorted(pictures.glob("*.png"))])
        expect(page.locator("#train-cards .card")).to_have_count(5)
        page.fill("#train-name input, #train-name textarea", "cups")
        page.fill("#train-trigger input, #train-trigger textarea", "zup")
        page.get_by_label("Caption of 0.png").fill("<b>a cup</b>")
        page.locator("#train-expert button").first.click()
        expect(page.locator("#train-text .cm-content")).to_contain_text("zup")
        page.locator("#train-text .cm-content").click()
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(QUICK)
        page.wait_for_timeout(3000)  # an answer that comes late does not take the place of what was written
        expect(page.locator("#train-text .cm-content")).to_contain_text("steps = 4")
        page.locator("#train-go").click()
        expect(page.locator("#watch-head")).to_contain_text("cups")
        expect(page.locator("#watch-head .badge")).to_have_text("done")
        expect(page.locator("#watch-pictures img")).to_have_count(4)
        expect(page.locator("#watch-pictures")).to_contain_text("Without and with your LoRA")
        expect(page.locator("#watch-use")).to_be_visible()
        page.reload()  # all of it is found again
        expect(page.locator("#watch-head .badge")).to_have_text("done")
        expect(page.locator("#train-cards .card")).to_have_count(5)
        expect(page.get_by_label("Caption of 0.png")).to_have_value("<b>a cup</b>")
        expect(page.locator("#train-trigger input, #train-trigger textarea").first).to_have_value("zup")
        expect(page.locator("#train-forecast")).to_contain_text("About")  # the time, which nobody has asked for
        page.locator("#watch-put_away").click()
        expect(page.locator("#watch-status")).to_contain_text("off this list")
        expect(page.locator("#watch-put_away")).to_be_hidden()
    (run,) = roots.runs.glob("cups")
    saved = config.load(run / "config.toml")
    assert (saved.steps, saved.lora.rank, saved.trigger) == (4, 2, "zup")
    assert "<b>a cup</b>" in [path.read_text() for path in (run / "pictures").glob("*.txt")]
