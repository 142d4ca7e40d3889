"""A run that goes on is the run that never stopped, to the bit, and says what keeps it from being so."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import interrupted, smallest
from sdlora import checkpoint, course, events, files, run_folder, runs, train
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.events import Event
from tests.test_cli import run as command

SHORT = {"steps": 8, "save_every": 2, "validation": {"every": 4, "draws": 4}}
Heard = list[tuple[int, tuple[str, ...]]]


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    """Flushes are not waited for: what a killed process has written is there all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@dataclass(frozen=True)
class Whole:
    """A run that was never stopped, and which pictures each of its batches held."""

    run: Config
    folder: Path
    heard: Heard


@contextmanager
def recorded() -> Iterator[Heard]:
    """Which pictures are trained on, batch by batch."""
    heard: Heard = []
    honest = train.gather

    def gather(*args: Any, batch_index: int, **more: Any) -> Any:
        batch = honest(*args, batch_index=batch_index, **more)
        heard.append((batch_index, batch.pictures if batch else ()))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "gather", gather)
        yield heard


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smallest.make_base(tmp_path_factory.mktemp("smallest"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smallest.make_pictures(tmp_path_factory.mktemp("data") / "shapes")


def unbroken(run: Config, folder: Path) -> Whole:
    with recorded() as heard:
        list(train.train(run, folder))
    return Whole(run, folder, heard)


@pytest.fixture(scope="module")
def long(base: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Fifty steps, each with a state."""
    run = smallest.exacting(base, shapes, steps=50, save_every=1, keep_last=50, validation={"every": 0})
    return unbroken(run, tmp_path_factory.mktemp("long") / "run")


@pytest.fixture(scope="module")
def short(base: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return unbroken(smallest.exacting(base, shapes, **SHORT), tmp_path_factory.mktemp("short") / "run")


@pytest.fixture(scope="module")
def stopped(short: Whole, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped after step 5, with states of steps 4 and 5."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    going(train.train(short.run, folder), folder, stop_at=5)
    return folder


@pytest.fixture
def left(stopped: Path, tmp_path: Path) -> Path:
    """A copy of what the stopped run has left."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def going(run: Iterator[Event], folder: Path, *, stop_at: int = -1) -> list[Event]:
    """All events; after the step of that number the run is asked to stop."""
    seen = []
    for event in run:
        seen.append(event)
        if isinstance(event, events.Step) and event.step == stop_at:
            run_folder.ask(folder, "stop")
    return seen


def result(folder: Path) -> bytes:
    return run_folder.result_path(folder, "tiny").read_bytes()


def steps_told(folder: Path) -> list[int]:
    """The steps in the metrics, all of whose lines must be whole."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["event"] == "step"]


def continued(told: list[Event]) -> events.Continued:
    (found,) = [event for event in told if isinstance(event, events.Continued)]
    return found


def assert_goes_on_as(whole: Whole, run: Config, folder: Path, **more: Any) -> list[Event]:
    """The run goes on to its end, which is that of the one that was never stopped."""
    told = list(train.train(run, folder, resume=True, **more))
    assert result(folder) == result(whole.folder)
    assert interrupted.story(folder) == interrupted.story(whole.folder)
    assert steps_told(folder) == list(range(1, whole.run.steps + 1))
    return told


# --- exactly ------------------------------------------------------------------------------------------------------------------


def test_from_every_step_of_fifty_the_next_state_is_that_of_the_run_that_never_stopped(long: Whole, tmp_path: Path) -> None:
    sizes = [len(pictures) for _, pictures in long.heard]
    assert set(sizes) == {1, 2}  # two shapes with odd numbers of pictures
    assert [sum(sizes[:5]), sum(sizes[5:10])] == [8, 8]  # five batches an epoch, two a step
    for step in range(50):
        folder = interrupted.begun(long.folder, tmp_path / "run", step)
        with recorded() as heard:
            for event in train.train(long.run, folder, resume=True):
                if isinstance(event, events.Started):
                    run_folder.ask(folder, "stop")
        state, other = (interrupted.contents(checkpoint.path_of(run / "state", step + 1)) for run in (folder, long.folder))
        assert sorted(state) == ["average.safetensors", "optimizer.safetensors", "state.json", "weights.safetensors"]
        assert state == other, f"step {step + 1}"
        assert heard == long.heard[2 * step : 2 * step + 2]
        assert steps_told(folder) == list(range(1, step + 2))
        assert run_folder.result_path(folder, "tiny").exists() == (step == 49)
        shutil.rmtree(folder)


@pytest.mark.parametrize("step", [33, 48, 50])
def test_a_run_that_goes_on_to_its_end_gives_the_same_file_from_the_same_pictures(long: Whole, step: int, tmp_path: Path) -> None:
    folder = interrupted.begun(long.folder, tmp_path / "run", step)
    with recorded() as heard:
        assert_goes_on_as(long, long.run, folder)
    assert heard == long.heard[2 * step :]


def test_a_run_that_is_stopped_twice_is_the_run_that_never_was(short: Whole, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = going(train.train(short.run, folder), folder, stop_at=3)
    second = going(train.train(short.run, folder, resume=True), folder, stop_at=5)
    assert [(one.step, one.path.name) for one in (first[-1], second[-1]) if isinstance(one, events.Stopped)] == [
        (3, "tiny-000003.safetensors"),
        (5, "tiny-000005.safetensors"),
    ]
    list(train.train(short.run, folder, resume=True))
    assert result(folder) == result(short.folder)
    assert steps_told(folder) == [*range(1, 9)]
    here, there = (interrupted.contents(one / "state") for one in (folder, short.folder))
    assert here == there


def test_runs_that_are_killed_anywhere_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.interrupted", "--out", str(tmp_path / "out"), "--kills", "4", "--steps", "8"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1].endswith("the same bytes: 4 of 4 runs")


# --- what is asked of a run ---------------------------------------------------------------------------------------------------


def test_a_run_saves_and_draws_when_asked_and_learns_the_same(short: Whole, tmp_path: Path) -> None:
    folder, told = tmp_path / "run", []
    for event in train.train(short.run, folder):
        told.append(event)
        if isinstance(event, events.Step) and event.step == 3:
            run_folder.ask(folder, "save")
            run_folder.ask(folder, "sample")
    assert [one.step for one in told if isinstance(one, events.Sampled)] == [3]
    assert (folder / "samples/000003-0.png").is_file()
    assert [one.step for one in told if isinstance(one, events.Saved)] == [2, 3, 4, 6, 8]
    assert not any(run_folder.is_asked(folder, name) for name in run_folder.REQUESTS)
    assert result(folder) == result(short.folder)


def test_a_run_pauses_with_everything_saved_until_the_file_is_gone(short: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, looks = tmp_path / "run", []

    def wait(seconds: float) -> None:
        looks.append(checkpoint.steps(folder / "state"))
        assert not run_folder.is_asked(folder, "save"), "all was saved before it waited"
        run_folder.ask(folder, "save")
        if len(looks) == 3:
            run_folder.forget(folder, "pause")

    monkeypatch.setattr(course, "time", SimpleNamespace(sleep=wait, monotonic=course.time.monotonic))
    told = []
    for event in train.train(short.run, folder):
        told.append(event)
        if isinstance(event, events.Step) and event.step == 3:
            run_folder.ask(folder, "pause")
    at = told.index(events.Paused(3))
    assert told[at + 1] == events.Continued(3)
    assert isinstance(told[at - 1], events.Saved)
    assert looks == [[2, 3]] * 3
    assert result(folder) == result(short.folder)


def test_a_run_that_is_stopped_while_it_pauses_ends_without_another_step(short: Whole, tmp_path: Path) -> None:
    folder, told = tmp_path / "run", []
    for event in train.train(short.run, folder):
        told.append(event)
        if isinstance(event, events.Step) and event.step == 3:
            run_folder.ask(folder, "pause")
        if isinstance(event, events.Paused):
            run_folder.ask(folder, "stop")
    assert [type(event).__name__ for event in told[-2:]] == ["Paused", "Stopped"]
    assert told[-1] == events.Stopped(3, run_folder.checkpoint_path(folder, "tiny", 3))
    assert not run_folder.is_asked(folder, "stop")
    list(train.train(short.run, folder, resume=True))
    assert result(folder) == result(short.folder)


# --- what has changed ---------------------------------------------------------------------------------------------------------


def changed(base: Path, shapes: Path, tmp_path: Path, what: str) -> Config:
    """The run with one thing other than it was."""
    data = Path(shutil.copytree(shapes, tmp_path / "changed" / shapes.name))
    other = Path(shutil.copytree(base, tmp_path / "changed" / base.name))
    changes: dict[str, dict[str, Any]] = {
        "rate": {"optimizer": smallest.OPTIMIZER | {"learning_rate": 0.5}},
        "seed": {"seed": 7},
        "nothing": {"save_every": 3, "sample_every": 8, "keep_last": 1, "sample_prompts": ["a cat"], "cache": "memory"},
    }
    if what == "caption":
        (data / "3.txt").write_text("vitrail, something else")
    if what == "picture":
        shutil.copyfile(data / "0.png", data / "new.png")
        (data / "new.txt").write_text("vitrail, new")
    if what == "base":
        (weights,) = other.glob("unet/*.safetensors")
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    return smallest.exacting(other, data, **SHORT | changes.get(what, {}))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("rate", r"optimizer\.learning_rate was 0\.001 and is 0\.5"),
        ("seed", "seed was 0 and is 7"),
        ("caption", r"1 pictures are not as they were \(3\.png\)"),
        ("picture", r"1 pictures are not as they were \(new\.png\)"),
        ("base", "the base has other weights"),
    ],
)
def test_what_has_changed_is_named_and_only_allowed_when_asked_for(
    short: Whole, base: Path, shapes: Path, left: Path, what: str, words: str, tmp_path: Path
) -> None:
    run, before = changed(base, shapes, tmp_path, what), interrupted.contents(left)
    with pytest.raises(UserError, match=rf"after step 5 with other settings or pictures: {words}\. Give --allow-changes"):
        list(train.train(run, left, resume=True))
    assert interrupted.contents(left) == before
    state = next(path for path in (left / "state" / "000005").iterdir() if path.suffix == ".safetensors")
    whole = state.read_bytes()
    state.write_bytes(b"")
    with pytest.raises(UserError, match=rf"State of step 5 is damaged .* after step \d with other settings or pictures: {words}\."):
        list(train.train(run, left, resume=True))
    state.write_bytes(whole)
    told = list(train.train(run, left, resume=True, allow_changes=True))
    assert continued(told).step == 5
    assert [note.partition(":")[0] for note in continued(told).notes] == ["Changed"]
    assert steps_told(left) == [*range(1, 9)]
    assert result(left) != result(short.folder)


def test_what_makes_no_other_lora_may_change_and_files_may_move(short: Whole, base: Path, shapes: Path, left: Path, tmp_path: Path) -> None:
    run = changed(base, shapes, tmp_path, "nothing")
    told = list(train.train(run, left, resume=True))
    assert continued(told) == events.Continued(5)
    assert [one.step for one in told if isinstance(one, events.Saved)] == [6, 8]
    assert result(left) == result(short.folder)


def test_a_run_that_has_taken_more_steps_than_it_shall_says_so(short: Whole, base: Path, shapes: Path, left: Path) -> None:
    run = smallest.exacting(base, shapes, **SHORT | {"steps": 4})
    with pytest.raises(UserError, match="has taken 5 steps, more than 4; raise steps"):
        list(train.train(run, left, resume=True, allow_changes=True))


# --- what has been damaged ----------------------------------------------------------------------------------------------------


def test_a_damaged_newest_state_is_said_and_the_run_goes_on_from_the_one_before(short: Whole, left: Path) -> None:
    (left / "state/000005/optimizer.safetensors").write_bytes(b"")
    told = list(train.train(short.run, left, resume=True))
    assert continued(told).step == 4
    (note,) = continued(told).notes
    assert note.startswith("State of step 5 is damaged (optimizer.safetensors has 0 bytes instead of")
    assert note.endswith("going on from step 4.")
    assert steps_told(left) == [*range(1, 9)]
    assert result(left) == result(short.folder)


def test_a_run_without_a_whole_state_begins_anew_and_says_so(short: Whole, left: Path) -> None:
    for state in (left / "state").iterdir():
        (state / "state.json").unlink()
    told = assert_goes_on_as(short, short.run, left)
    assert continued(told).step == 0
    assert [note.partition(" is damaged")[0] for note in continued(told).notes] == ["State of step 5", "State of step 4"]
    assert all(note.endswith("no state before it is whole.") for note in continued(told).notes)


def test_what_a_killed_run_has_half_written_is_gone_when_it_goes_on(short: Whole, left: Path) -> None:
    for name in (".config.toml.4194300.part", "checkpoints/.tiny-000006.safetensors.4194300.part", "samples/.000008-0.png.7.part"):
        (left / name).write_bytes(b"half")
    (left / ".mine.part").write_bytes(b"somebody's own")
    (left / "stop").touch()
    with (left / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 6, "lo')
    list(train.train(short.run, left, resume=True))
    assert steps_told(left) == [*range(1, 9)]
    assert [path.name for path in left.rglob(".*")] == [".mine.part"]
    assert result(left) == result(short.folder)


def test_states_that_a_killed_run_had_no_time_to_delete_go_when_it_goes_on(short: Whole, tmp_path: Path) -> None:
    left = Path(shutil.copytree(short.folder, tmp_path / "run"))
    shutil.copytree(left / "state/000006", left / "state/.000006.4194300.part")
    checkpoint.write(left / "state", replace(checkpoint.read(left / "state/000006"), step=4))
    lines = (left / "metrics.jsonl").read_text().splitlines()
    (left / "metrics.jsonl").write_text("\n".join(lines[:-2]) + "\n")  # the file saved, and done
    assert_goes_on_as(short, short.run, left)
    assert sorted(path.name for path in (left / "state").iterdir()) == ["000006", "000008"]


@pytest.mark.parametrize("number", [1, 2, 4, 5], ids=["the LoRA file", "weights", "optimizer", "state.json"])
def test_a_disk_that_is_full_ends_the_run_in_a_sentence_and_it_goes_on_when_there_is_room(
    short: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder, honest, calls = tmp_path / "run", files.write_through, []
    going = train.train(short.run, folder)
    while not ((event := next(going)) and isinstance(event, events.Step) and event.step == 4):
        pass

    def full(path: Path, content: bytes) -> None:
        calls.append(path)
        honest(path, content[:7] if len(calls) == number else content)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "write_through", full)
    with pytest.raises(UserError, match=r"^[^\n]*No space left on device[^\n]*$"):
        list(going)
    assert len(calls) == number
    monkeypatch.undo()
    assert checkpoint.steps(folder / "state") == [2]
    assert list(folder.rglob(".*")) == []
    assert_goes_on_as(short, short.run, folder)


def test_a_run_folder_that_is_lost_ends_the_run_in_a_sentence(short: Whole, tmp_path: Path) -> None:
    run = train.train(short.run, tmp_path / "run")
    while not isinstance(next(run), events.Step):
        pass
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written \(No such file or directory\)"):
        list(run)


# --- whose run it is ----------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(short: Whole, left: Path) -> None:
    first = train.train(short.run, left, resume=True)
    while not isinstance(next(first), events.Started):
        pass
    with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} "):
        list(train.train(short.run, left, resume=True))
    list(first)
    assert result(left) == result(short.folder)


def test_the_same_command_goes_on_and_a_finished_run_is_left_alone(short: Whole, left: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(left / "config.toml", tmp_path / "run.toml"))
    code, said, problem = command("train", str(path), "--out", str(left))
    assert (code, problem) == (0, "")
    assert "Going on after step 5" in said
    assert result(left) == result(short.folder)
    before = interrupted.contents(left)
    code, _, problem = command("train", "--resume", str(left))
    assert code == 2
    assert "the run has come to its end after 8 steps; for more of them give --set steps=N --allow-changes with N above 8" in problem
    code, _, problem = command("train", "--resume", str(left), "--set", "steps=5", "--allow-changes")
    assert code == 2
    assert "the run has come to its end after 8 steps, not 5; for more" in problem
    code, _, problem = command("train", str(path), "--out", str(left))
    assert code == 2
    assert "holds a run already" in problem
    assert f"to train it longer, --resume {left} --set steps=N --allow-changes with N above 8." in problem
    code, _, problem = command("train", "--resume", str(tmp_path / "nowhere"))
    assert code == 2
    assert "nowhere: there is no run; name the folder" in problem
    assert interrupted.contents(left) == before


def test_changes_are_allowed_from_the_command_line(short: Whole, left: Path) -> None:
    code, _, problem = command("train", "--resume", str(left), "--set", "seed=7")
    assert code == 2
    assert "seed was 0 and is 7" in problem
    code, said, _ = command("train", "--resume", str(left), "--set", "seed=7", "--allow-changes")
    assert code == 0
    assert "Changed: seed was 0 and is 7." in said


# --- more steps ---------------------------------------------------------------------------------------------------------------


def steady(base: Path, shapes: Path, **changes: Any) -> Config:
    """A run whose steps are the same however many follow."""
    return smallest.exacting(base, shapes, **SHORT | {"optimizer": smallest.OPTIMIZER | {"schedule": "constant", "warmup": 0.0}} | changes)


def test_a_finished_run_is_lengthened_and_keeps_its_first_end(base: Path, shapes: Path, tmp_path: Path) -> None:
    whole = unbroken(steady(base, shapes, steps=12), tmp_path / "whole")
    folder = tmp_path / "run"
    list(train.train(steady(base, shapes), folder))
    first = result(folder)
    (folder / "verdict.json").write_text(json.dumps({"step": 8, "path": "tiny.safetensors"}))
    code, _, problem = command("train", "--resume", str(folder), "--set", "steps=12")
    assert code == 2
    assert "steps was 8 and is 12. Give --allow-changes" in problem
    assert result(folder) == first
    code, said, _ = command("train", "--resume", str(folder), "--set", "steps=12", "--dry-run")
    assert code == 0
    assert f"# goes on with the run in {folder}, whose config.toml holds every value" in said

    told = going(train.train(whole.run, folder, resume=True, allow_changes=True), folder, stop_at=10)
    assert continued(told).step == 8
    assert "tiny.safetensors, its end after 8 steps, is checkpoints/tiny-000008.safetensors from now on" in continued(told).notes[-1]
    assert runs.look(folder).steps == 12
    kept = run_folder.checkpoint_path(folder, "tiny", 8)
    assert kept.read_bytes() == first
    assert not run_folder.result_path(folder, "tiny").exists()
    assert json.loads((folder / "verdict.json").read_text())["path"] == "checkpoints/tiny-000008.safetensors"
    assert run_folder.is_unfinished(folder)

    code, _, problem = command("train", "--resume", str(folder))
    assert (code, problem) == (0, "")
    assert result(folder) == result(whole.folder)
    told, wanted = interrupted.story(folder), interrupted.story(whole.folder)
    (end,) = [row for row in wanted if row["event"] == "saved" and row["step"] == 8]  # of the first end, written after it was looked at
    told.remove(end)
    wanted.remove(end)
    assert told == wanted
    assert [*run_folder.checkpoints(folder, "tiny")] == [2, 4, 6, 8, 10]
    assert kept.read_bytes() == first


@pytest.mark.parametrize("killed_at", ["config.toml", "metrics.jsonl", "tiny-000008.safetensors"])
def test_a_run_that_is_killed_while_it_is_lengthened_can_be_lengthened_again(
    base: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    folder, honest = tmp_path / "run", files.write
    list(train.train(steady(base, shapes), folder))
    first = result(folder)

    def write(path: Path, content: bytes) -> None:
        if path.name == killed_at:
            raise KeyboardInterrupt
        honest(path, content)

    longer = train.train(steady(base, shapes, steps=10), folder, resume=True, allow_changes=True)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", write)
        with pytest.raises(KeyboardInterrupt):
            list(longer)
    code, _, problem = command("train", "--resume", str(folder), "--set", "steps=10", "--allow-changes")
    assert (code, problem) == (0, "")
    assert run_folder.checkpoint_path(folder, "tiny", 8).read_bytes() == first
    assert run_folder.ended_at(folder) == 10


def test_a_run_whose_end_cannot_be_gone_on_from_is_not_lengthened_and_stays(base: Path, shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    list(train.train(steady(base, shapes), folder))
    weights = next((folder / "state" / "000008").glob("*.safetensors"))
    weights.write_bytes(b"")  # that of step 6 is whole
    before = interrupted.contents(folder)
    with pytest.raises(UserError, match=r"has ended after 8 steps, and of that end no whole state is left .* lora\.start_from="):
        list(train.train(steady(base, shapes, steps=10), folder, resume=True, allow_changes=True))
    assert interrupted.contents(folder) == before


# --- what it costs ------------------------------------------------------------------------------------------------------------


def test_steps_without_a_look_do_not_read_the_metrics(base: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, reads = run_folder.each_row, []
    monkeypatch.setattr(run_folder, "each_row", lambda folder: reads.append(folder) or honest(folder))
    run = smallest.exacting(base, shapes, steps=6, save_every=6, validation={"every": 0})
    list(train.train(run, tmp_path / "run"))
    assert len(reads) <= 2


def test_an_old_state_that_cannot_be_deleted_is_told(short: Whole, left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "tidy", lambda folder, **_: ["Old state x could not be deleted."])
    told = list(train.train(short.run, left, resume=True))
    assert [(one.step, one.words) for one in told if isinstance(one, events.Alarm)] == [
        (6, "Old state x could not be deleted."),
        (8, "Old state x could not be deleted."),
    ]
