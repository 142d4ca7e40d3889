"""The list of runs: what has become of each, read from its folder alone, and a damaged folder is a row that says so."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdlora import chosen, cli_runs, generate, run_folder, run_lock, runs

CONFIG = 'base = "mini"\nkind = "style"\ntrigger = "vitrail"\nname = "{name}"\nsteps = 6\n'
STARTED = {"event": "started", "steps": 6, "modules": 3, "time_s": 100.0}


def made(folder: Path, *rows: dict[str, Any], name: str = "tiny") -> Path:
    """A run folder that holds these rows."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG.format(name=name))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def steps(last: int) -> list[dict[str, Any]]:
    return [{"event": "step", "step": step, "loss": 0.1, "time_s": 100.0 + step} for step in range(1, last + 1)]


def test_a_finished_run_tells_its_settings_size_and_recommendation(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", STARTED, *steps(6), {"event": "done", "path": "tiny.safetensors", "time_s": 120.0})
    (folder / "checkpoints/tiny-000003.safetensors").write_bytes(b"x" * 1000)
    verdict = {"step": 3, "strength": 0.8, "reason": "lowest held-out loss", "warning": "", "path": "checkpoints/tiny-000003.safetensors"}
    (folder / "verdict.json").write_text(json.dumps(verdict))
    (run,) = runs.find(tmp_path)
    assert (run.name, run.state, run.step, run.steps, run.when_s) == ("tiny", "done", 6, 6, 120.0)
    assert (run.base, run.kind, run.trigger, run.trouble) == ("mini", "style", "vitrail", "")
    assert run.best == runs.Best(3, 0.8, "lowest held-out loss", "", folder / "checkpoints/tiny-000003.safetensors")
    assert run.size_bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) > 1000


@pytest.mark.parametrize(
    ("rows", "state"),
    [
        ([], "interrupted"),
        ([STARTED, *steps(2)], "interrupted"),
        ([STARTED, *steps(2), {"event": "stopped", "step": 2}], "stopped"),
        ([STARTED, *steps(2), {"event": "failed", "words": "The loss is not finite."}], "failed"),
        ([STARTED, *steps(2), {"event": "stopped", "step": 2}, {"event": "continued", "step": 2}], "interrupted"),
        ([STARTED, {"event": "stopped", "step": 2}, {"event": "continued", "step": 2}, {"event": "done"}, {"event": "alarm"}], "done"),
    ],
)
def test_the_last_turn_of_its_life_is_its_state(tmp_path: Path, rows: list[dict[str, Any]], state: str) -> None:
    assert runs.look(made(tmp_path / "a", *rows)).state == state


def test_a_run_at_work_is_running_or_paused_and_then_neither(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", STARTED, *steps(2))
    with run_lock.held(folder):
        assert runs.look(folder).state == "running"
        (folder / "pause").touch()
        assert runs.look(folder).state == "paused"
    assert runs.look(folder).state == "interrupted"


def test_runs_are_found_below_a_sweeps_folder_newest_first_and_nothing_else_is(tmp_path: Path) -> None:
    made(tmp_path / "old", STARTED)
    made(tmp_path / "sweep/rank-8", STARTED, *steps(3))
    made(tmp_path / "sweep/rank-16", STARTED, *steps(5))
    made(tmp_path / "old/checkpoints/inside", STARTED, *steps(6))  # what lies in a run belongs to it
    made(tmp_path / ".trash/gone", STARTED, *steps(6))
    (tmp_path / "project").mkdir()
    (tmp_path / "project/config.toml").write_text("x = 1")
    (tmp_path / "again").symlink_to(tmp_path)
    assert [run.folder.name for run in runs.find(tmp_path)] == ["rank-16", "rank-8", "old"]
    assert runs.find(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("name", "content", "state", "trouble"),
    [
        ("config.toml", b"base = ", "broken", "config.toml is not valid TOML"),
        ("config.toml", b"\xff\xfe", "broken", "config.toml is not valid TOML"),
        ("config.toml", b'name = 7\nbase = [1]\nsteps = "many"', "done", ""),
        ("config.toml", None, "broken", "config.toml cannot be read"),
        ("metrics.jsonl", b'{"event": "sta', "interrupted", ""),
        ("metrics.jsonl", b"\x00\xff" * 50, "interrupted", ""),
        ("metrics.jsonl", b'[1]\n{"event": ["odd"], "step": "x", "time_s": "y"}\n{"event": "done", "step": true}', "done", ""),
        ("verdict.json", b'{"step": 3', "done", "verdict.json cannot be read"),
        ("verdict.json", b"[]", "done", "verdict.json cannot be read"),
        ("verdict.json", b'{"step": null, "strength": 1}', "done", "verdict.json cannot be read"),
    ],
)
def test_a_damaged_folder_is_a_row_of_its_own(tmp_path: Path, name: str, content: bytes | None, state: str, trouble: str) -> None:
    made(tmp_path / "whole", STARTED, {"event": "done", "time_s": 1.0})
    folder = made(tmp_path / "damaged", {"event": "done"})
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    found = {run.folder.name: run for run in runs.find(tmp_path)}
    assert set(found) == {"whole", "damaged"}
    assert found["damaged"].state == state
    assert found["damaged"].trouble.startswith(trouble)
    assert bool(found["damaged"].trouble) == bool(trouble)


@pytest.mark.parametrize("path", ["checkpoints/gone.safetensors", "../other.safetensors", "/etc/hostname"])
def test_a_recommended_file_that_is_gone_or_not_the_runs_own_is_not_named(tmp_path: Path, path: str) -> None:
    folder = made(tmp_path / "a", STARTED)
    (tmp_path / "other.safetensors").write_bytes(b"x")
    (folder / "verdict.json").write_text(json.dumps({"step": 3, "strength": 0.8, "path": path}))
    best = runs.look(folder).best
    assert best is not None
    assert (best.step, best.path) == (3, None)


def test_what_a_person_has_marked_goes_before_the_recommendation_as_long_as_its_file_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(tmp_path / "a", STARTED, *steps(6), {"event": "done"})
    files = {
        2: folder / "checkpoints/tiny-000002.safetensors",
        3: folder / "checkpoints/tiny-000003.safetensors",
        6: folder / "tiny.safetensors",
    }
    for path in files.values():
        path.write_bytes(b"x")
    (folder / "verdict.json").write_text(json.dumps({"step": 3, "strength": 0.8, "path": "checkpoints/tiny-000003.safetensors"}))
    own = runs.look(folder).best
    assert chosen.best(runs.look(folder)) == own
    for step in (2, 6):
        chosen.mark_best(folder, step, 0.5)
        best = chosen.best(runs.look(folder))
        assert best is not None
        assert (best.step, best.strength, best.path) == (step, 0.5, files[step])
    cli_runs.runs(tmp_path, as_json=True)
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["best"]["step"], told["best"]["reason"], told["recommended"]["step"]) == (6, "marked by a person", 3)
    cli_runs.runs(tmp_path)
    assert "6 at 0.5 (marked)" in capsys.readouterr().out
    files[6].unlink()
    assert chosen.best(runs.look(folder)) == own


@pytest.mark.parametrize("prompt", ["a red star", "vitrail, ünïcode: \n Steps: many", "a star\nwith a second line"])
def test_the_prompts_of_the_samples_are_read_from_the_pictures(tmp_path: Path, prompt: str) -> None:
    folder = made(tmp_path / "a", STARTED)
    (folder / "samples").mkdir()
    settings = prompt + "\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M, Seed: 1"
    for step, number in ((3, 0), (0, 1), (0, 0)):
        path = run_folder.sample_path(folder, step, number)
        path.write_bytes(generate.png_bytes(Image.new("RGB", (8, 8)), settings))
    (folder / "samples/000006-0.png").write_bytes(b"torn")
    (folder / "samples/note.png").write_bytes(b"no sample")
    found = runs.pictures(folder)
    assert [(one.step, one.number) for one in found] == [(0, 0), (0, 1), (3, 0)]
    assert {one.prompt for one in found} == {prompt}


def test_reading_changes_nothing(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", STARTED, *steps(2))
    before = {path: (path.stat().st_mtime_ns, os.fspath(path)) for path in tmp_path.rglob("*")}
    runs.find(tmp_path)
    runs.pictures(folder)
    assert {path: (path.stat().st_mtime_ns, os.fspath(path)) for path in tmp_path.rglob("*")} == before
