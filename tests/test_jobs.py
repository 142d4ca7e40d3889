"""Jobs: one after the other, each a child of its own, found again by whoever looks; ended, refused and killed ones say so."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdlora import config, job_line, job_states, jobs, run_folder, run_lock
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.jobs import Jobs

PATIENCE_S = 300


def wait_for(what: Callable[[], Any]) -> Any:
    """What a function says, once it is true."""
    end = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)
    return found


def make(base: Path, pictures: Path, **changes: Any) -> Config:
    plain: dict[str, Any] = {
        "base": str(base), "data": str(pictures), "kind": "style", "trigger": "zup", "name": "cups", "steps": 4, "batch": 2,
        "save_every": 0, "sample_every": 0, "report": False, "cache": "memory", "validation": {"every": 0},
        "lora": {"rank": 2, "alpha": 2.0},
    }  # fmt: skip
    return config.parse(plain | changes, where="test")


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Jobs]:
    line = Jobs(tmp_path / "runs")
    yield line
    end(line)


def end(line: Jobs) -> None:
    """Ends a child that a failed test has left at work."""
    told = job_line.slot(line.runs)
    if told and job_line.is_held(line.runs, told["pid"]):
        os.kill(told["pid"], signal.SIGKILL)


def put(line: Jobs, run: Config, *, name: str = "cups", owner: str = "me") -> Path:
    folder = jobs.reserve(line, name)
    jobs.submit(line, folder, run, owner=owner)
    return folder


def state(line: Jobs, folder: Path) -> str:
    return jobs.look(line, folder).state


def test_jobs_run_one_after_the_other_and_one_that_fails_blocks_nobody(line: Jobs, tiny_base: Path, pictures: Path) -> None:
    wrong = put(line, make(tiny_base / "nowhere", pictures), owner="a")
    right = put(line, make(tiny_base, pictures), owner="b")
    assert [folder.name for folder in (wrong, right)] == ["cups", "cups-2"]
    assert [(job.state, job.owner) for job in jobs.listed(line)] == [("waiting", "a"), ("waiting", "b")]
    assert jobs.start_next(line) == wrong
    assert state(line, wrong) == "starting"
    assert jobs.at_work(line) == wrong
    assert jobs.start_next(line) is None
    assert state(line, right) == "waiting"
    wait_for(lambda: state(line, wrong) == "failed")
    assert "nowhere" in jobs.look(line, wrong).words
    assert "\n" not in jobs.look(line, wrong).words
    assert wait_for(lambda: jobs.start_next(line)) == right
    wait_for(lambda: state(line, right) == "done")
    assert (right / "cups.safetensors").is_file()
    assert wait_for(lambda: jobs.at_work(line) is None) is True
    with pytest.raises(UserError, match="come to its end"):
        jobs.go_on(line, right)
    with pytest.raises(UserError, match="has not come to its end"):
        jobs.lengthen(line, wrong)
    assert_is_lengthened(line, right)


def assert_is_lengthened(line: Jobs, folder: Path) -> None:
    """A run of 4 steps that has ended trains on to 8, its end a checkpoint; without a state of its end it says why it cannot."""
    first = (folder / "cups.safetensors").read_bytes()
    states = (folder / "state").rename(folder / "elsewhere")
    assert jobs.lengthen(line, folder, owner="c") == 8
    assert wait_for(lambda: jobs.start_next(line)) == folder
    wait_for(lambda: state(line, folder) == "failed")
    assert "no whole state is left" in jobs.look(line, folder).words
    assert (folder / "cups.safetensors").read_bytes() == first
    wait_for(lambda: jobs.at_work(line) is None)
    states.rename(folder / "state")

    assert jobs.lengthen(line, folder, owner="c") == 8
    assert state(line, folder) == "waiting"
    assert wait_for(lambda: jobs.start_next(line)) == folder
    wait_for(lambda: state(line, folder) == "done" and run_folder.ended_at(folder) == 8)
    assert run_folder.checkpoint_path(folder, "cups", 4).read_bytes() == first
    assert (folder / "cups.safetensors").read_bytes() != first


def test_a_killed_run_says_so_and_goes_on_where_it_was_saved(line: Jobs, tiny_base: Path, pictures: Path) -> None:
    folder = put(line, make(tiny_base, pictures, steps=4000, save_every=5))
    jobs.start_next(line)
    wait_for(lambda: list(folder.glob("state/[0-9]*/state.json")))
    assert state(line, folder) == "running"
    again = Jobs(line.runs)  # the page was started anew meanwhile
    assert state(again, folder) == "running"
    assert jobs.at_work(again) == folder
    owner = run_lock.owner(folder)
    assert owner
    assert os.getsid(owner.pid) == owner.pid != os.getsid(0)  # of its own: what ends the page's session does not reach it
    os.kill(owner.pid, signal.SIGKILL)
    wait_for(lambda: state(again, folder) == "interrupted")
    with pytest.raises(UserError, match="is interrupted now"):
        jobs.ask(again, folder, "save")
    jobs.go_on(again, folder, owner="other")
    assert jobs.look(again, folder).owner == "other"
    assert wait_for(lambda: jobs.start_next(again)) == folder
    wait_for(lambda: any(row["event"] == "continued" and row["step"] >= 5 for row in run_folder.rows(folder)))
    jobs.ask(again, folder, "pause")
    wait_for(lambda: state(again, folder) == "paused")
    with pytest.raises(UserError, match="resume it first"):
        jobs.ask(again, folder, "sample")
    jobs.ask(again, folder, "resume")
    wait_for(lambda: state(again, folder) == "running")
    with pytest.raises(UserError, match="is running already"):
        jobs.go_on(again, folder)
    jobs.ask(again, folder, "stop")
    wait_for(lambda: state(again, folder) == "stopped")
    assert len(jobs.listed(again)) == 1


def test_two_pages_start_each_job_once_and_never_two_together(line: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    honest = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        begun.append(Path(command[-1]).name)
        return honest([sys.executable, "-c", "import time; time.sleep(0.4)"], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    for number in range(4):
        folder = jobs.reserve(line, f"r{number}")
        (folder / "config.toml").write_text("")
        job_line.add(line.runs, folder, "")
    together: list[int] = []

    def page() -> None:
        mine = Jobs(line.runs)
        end = time.monotonic() + PATIENCE_S
        while len(begun) < 4 and time.monotonic() < end:
            if jobs.start_next(mine):
                together.append(sum(1 for job in jobs.listed(mine) if job.state == "starting"))

    pages = [threading.Thread(target=page) for _ in range(4)]
    for one in pages:
        one.start()
    for one in pages:
        one.join()
    assert begun == ["r0", "r1", "r2", "r3"]
    assert max(together) == 1


def test_a_job_waits_until_there_is_room_for_it(line: Jobs, tiny_base: Path, pictures: Path) -> None:
    asked: list[bool] = []
    assert jobs.start_next(line, ready=lambda: not asked.append(True)) is None
    assert asked == []  # nobody has to make room for nothing
    put(line, make(tiny_base, pictures))
    assert jobs.start_next(line, ready=lambda: bool(asked.append(False))) is None
    assert asked == [False]


def test_a_training_from_a_shell_is_waited_for(line: Jobs, tiny_base: Path, pictures: Path) -> None:
    put(line, make(tiny_base, pictures))
    with run_lock.held(line.runs / "sweep/one"):
        assert jobs.at_work(line) == line.runs / "sweep/one"
        assert jobs.start_next(line) is None
    assert [ticket.folder for _, ticket in job_line.tickets(line.runs, "waiting")] == ["cups"]


def test_one_in_line_is_taken_back_with_its_folder_and_one_that_begins_is_ended(line: Jobs, tiny_base: Path, pictures: Path) -> None:
    first, second = put(line, make(tiny_base, pictures)), put(line, make(tiny_base, pictures))
    jobs.ask(line, second, "stop")
    assert not second.exists()
    with pytest.raises(UserError, match="does not wait"):
        jobs.take_back(line, second)
    jobs.start_next(line)
    jobs.ask(line, first, "stop")  # before its first step
    wait_for(lambda: state(line, first) == "interrupted")
    assert run_folder.rows(first) == []
    assert (first / "config.toml").is_file()


def test_what_ended_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()

    def told(log: str, *rows: dict[str, Any]) -> tuple[str, str]:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / job_states.LOG).write_text(log)
        return job_states.state_of(folder, has_child=False)

    step = {"event": "step", "step": 3, "time_s": 1.0}
    assert told("Run folder x\nStep 3\n", step) == ("interrupted", "")
    assert told("", step, {"event": "stopped", "step": 3}) == ("stopped", "")
    assert told("sdlora: old\n", step, {"event": "done"}) == ("done", "")
    os.utime(folder / "metrics.jsonl", (1, 1))  # it was to be lengthened later
    assert job_states.state_of(folder, has_child=False) == ("failed", "old")
    assert told("Step 3\nsdlora: The disk is\nfull.\n", step) == ("failed", "The disk is full.")
    assert told("", step, {"event": "failed", "words": "Not finite."}) == ("failed", "Not finite.")
    assert told("Traceback (most recent call last):\n  File\nKeyError: 3\n", step)[1].endswith("KeyError: 3")
    told("sdlora: Of an earlier start.\n", step)
    os.utime(folder / job_states.LOG, (1, 1))
    assert job_states.state_of(folder, has_child=False) == ("interrupted", "")


@pytest.mark.parametrize(
    "name",
    ["", "  ", None, 3, "../x", "/etc", "a/b", "a\\b", ".hidden", "-x", "--out", "nul", "COM1.txt", "x.", "x" * 65,
     "a\nb", "a\0", "<b>", "$(x)", "a:b"],
)  # fmt: skip
def test_a_name_that_cannot_be_a_folders_is_refused(line: Jobs, name: Any) -> None:
    with pytest.raises(UserError, match=r"name"):
        jobs.reserve(line, name)
    assert not line.runs.exists()


def test_a_torn_or_foreign_ticket_is_none(line: Jobs, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    for number, text in enumerate(["{", "[]", '{"folder": "../outside", "owner": "", "added_s": 1}', '{"folder": ".x", "owner": ""}']):
        path = line.runs / ".queue/waiting" / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert jobs.listed(line) == []
    assert jobs.start_next(line) is None
