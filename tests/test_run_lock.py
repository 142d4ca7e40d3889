"""One run per folder: the second is refused in a sentence, what a killed one left is taken over, of many at once one gets it."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdlora import run_lock
from sdlora.errors import UserError

HOLD = """
import errno, os, sys, time
from pathlib import Path
from sdlora import run_lock
from sdlora.errors import UserError

def no_locks(handle, what):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

folder, begin_s, knows_locks = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "locks"
if not knows_locks:
    run_lock.fcntl.flock = no_locks
time.sleep(max(0, begin_s - time.time()))
try:
    with run_lock.held(folder):
        print("held", flush=True)
        sys.stdin.read()
except UserError as refused:
    print(refused, flush=True)
"""


@contextmanager
def holding(folder: Path, *, count: int = 1, begin_s: float = 0.0, locks: bool = True) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that hold a run folder, or are refused, until their input ends; all begin at once."""
    command = [sys.executable, "-c", HOLD, str(folder), str(begin_s), "locks" if locks else "none"]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        yield started
    finally:
        for one in started:
            one.communicate()


def first_line(one: subprocess.Popen[str]) -> str:
    assert one.stdout is not None
    return one.stdout.readline().strip()


def killed(folder: Path, *, locks: bool = True) -> str:
    """What a run that was killed with -9 leaves."""
    with holding(folder, locks=locks) as (one,):
        assert first_line(one) == "held"
        one.send_signal(signal.SIGKILL)
        one.wait()
    return (folder / run_lock.NAME).read_text()


def left(folder: Path, *, age_s: float = 0.0, **changes: object) -> Path:
    """A lock as another process would have left it."""
    with run_lock.held(folder / "other"):
        told = json.loads((folder / "other" / run_lock.NAME).read_text())
    path = folder / run_lock.NAME
    path.write_text(json.dumps(told | changes))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


@pytest.fixture(params=["locks", "no locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Disks that know locks, and disks that do not."""
    if request.param == "no locks":

        def refuse(handle: int, what: int) -> None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

        monkeypatch.setattr(fcntl, "flock", refuse)
    return bool(request.param == "locks")


def test_the_second_run_is_refused_and_told_who_holds_the_folder_and_since_when(locks: bool, tmp_path: Path) -> None:
    with holding(tmp_path, locks=locks) as (one,):
        assert first_line(one) == "held"
        with pytest.raises(UserError) as caught, run_lock.held(tmp_path):
            pass
        owner = run_lock.owner(tmp_path)
        assert owner is not None
        assert owner.pid == one.pid
        with pytest.raises(UserError, match=f"in use by process {one.pid} "):
            run_lock.refuse_held(tmp_path)
        with holding(tmp_path, locks=locks) as (other,):
            assert f"process {one.pid} on " in first_line(other)
        assert run_lock.owner(tmp_path) == owner
    since = time.strftime("%H:%M", time.localtime(owner.started_s))
    begin = f"Run folder {tmp_path} is in use by process {one.pid} on {owner.host} since {since} (last sign of life "
    assert str(caught.value).startswith(begin)
    assert str(caught.value).endswith(" s ago); stop that run, or choose another folder with --out.")
    assert run_lock.owner(tmp_path) is None
    run_lock.refuse_held(tmp_path)
    with run_lock.held(tmp_path):
        pass


def test_what_a_killed_run_leaves_is_taken_over_at_once(locks: bool, tmp_path: Path) -> None:
    told = killed(tmp_path, locks=locks)
    assert run_lock.owner(tmp_path) is None
    with run_lock.held(tmp_path):
        assert (tmp_path / run_lock.NAME).read_text() != told
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_that_was_given_out_again_is_not_taken_for_the_owner(locks: bool, tmp_path: Path) -> None:
    left(tmp_path, pid=os.getppid(), born="12")
    assert run_lock.is_running(os.getppid())
    with run_lock.held(tmp_path):
        pass


@pytest.mark.parametrize("knows", [True, False], ids=["locks", "no locks"])
def test_of_many_that_take_over_at_once_one_gets_it(knows: bool, tmp_path: Path) -> None:
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        left(folder, pid=os.getpid(), born="12")
        with holding(folder, count=6, begin_s=time.time() + 1.5, locks=knows) as started:
            told = [first_line(one) for one in started]
        assert told.count("held") == 1
        assert sum(line.startswith(f"Run folder {folder} is in use by ") for line in told) == 5


def test_a_lock_on_a_file_that_its_last_owner_has_just_deleted_is_worth_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, asked = tmp_path / run_lock.NAME, fcntl.flock, []

    def late(handle: int, what: int) -> None:
        if not asked:
            path.unlink(missing_ok=True)
        asked.append(what)
        real(handle, what)

    monkeypatch.setattr(fcntl, "flock", late)
    with run_lock.held(tmp_path):
        monkeypatch.undo()
        assert len(asked) == 2
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} "), run_lock.held(tmp_path):
            pass


def test_on_a_disk_without_locks_who_writes_last_gets_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = left(tmp_path, pid=7, host="elsewhere", boot="another")
    theirs = path.read_text()
    path.unlink()
    monkeypatch.setattr(run_lock, "fcntl", None)
    monkeypatch.setattr(time, "sleep", lambda _: path.write_text(theirs))
    with pytest.raises(UserError, match="in use by process 7 on elsewhere"), run_lock.held(tmp_path):
        pass
    assert path.read_text() == theirs


def test_the_folder_is_free_again_after_a_mistake_and_what_was_made_for_it_is_gone(locks: bool, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock.held(tmp_path / "runs" / "mine"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with run_lock.held(tmp_path / "mine"):
        (tmp_path / "mine" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["metrics.jsonl"]


def test_one_process_cannot_hold_a_folder_twice(locks: bool, tmp_path: Path) -> None:
    with run_lock.held(tmp_path):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} "), run_lock.held(tmp_path):
            pass
        assert run_lock.owner(tmp_path) is not None


def test_a_run_on_another_machine_counts_as_gone_after_ten_minutes_without_a_sign_of_life(locks: bool, tmp_path: Path) -> None:
    left(tmp_path, age_s=540, host="elsewhere", boot="another", started_s=1.5 * 86400)
    told = r"on elsewhere since 1970-01-02 .*sign of life 54\d s ago\).*wait until 10 minutes"
    with pytest.raises(UserError, match=told), run_lock.held(tmp_path):
        pass
    assert run_lock.owner(tmp_path) is not None
    left(tmp_path, age_s=601, host="elsewhere", boot="another")
    assert run_lock.owner(tmp_path) is None
    with run_lock.held(tmp_path):
        pass


def test_after_a_power_cut_the_folder_is_free_at_once(locks: bool, tmp_path: Path) -> None:
    left(tmp_path, pid=1, boot="before the cut")
    with run_lock.held(tmp_path):
        pass


@pytest.mark.parametrize("rest", ["", "{", '{"pid": 1}', "[]"])
def test_a_lock_that_was_half_written_is_nobodys(rest: str, locks: bool, tmp_path: Path) -> None:
    (tmp_path / run_lock.NAME).write_text(rest)
    assert run_lock.owner(tmp_path) is None
    with run_lock.held(tmp_path):
        assert run_lock.owner(tmp_path) is not None


def test_a_sign_of_life_touches_the_disk_every_ten_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_lock.held(tmp_path):
        touched: list[Path] = []
        real = os.utime
        monkeypatch.setattr(os, "utime", lambda path: touched.append(path) or real(path))
        for _ in range(100):
            run_lock.beat(tmp_path)
        assert touched == []
        real(tmp_path / run_lock.NAME, (time.time() - 11,) * 2)
        for _ in range(100):
            run_lock.beat(tmp_path)
        assert touched == [tmp_path / run_lock.NAME]
        owner = run_lock.owner(tmp_path)
        assert owner is not None
        assert time.time() - owner.seen_s < 5


def test_a_run_that_was_given_up_for_gone_notices_that_another_has_its_folder(tmp_path: Path) -> None:
    with run_lock.held(tmp_path):
        theirs = left(tmp_path, age_s=11, pid=7, host="elsewhere", boot="another").read_text()
        with pytest.raises(UserError, match="was taken over by process 7 on elsewhere"):
            run_lock.beat(tmp_path)
    assert (tmp_path / run_lock.NAME).read_text() == theirs


def test_a_lost_lock_file_does_not_end_a_run(tmp_path: Path) -> None:
    with run_lock.held(tmp_path):
        (tmp_path / run_lock.NAME).unlink()
        run_lock.beat(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_mistake_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"), run_lock.held(tmp_path / "file" / "run"):
        pass
    (tmp_path / run_lock.NAME).mkdir()
    with pytest.raises(UserError, match=r"run\.lock cannot be written .*choose another folder with --out"), run_lock.held(tmp_path):
        pass


def test_a_process_that_ended_does_not_run_though_its_parent_has_not_looked_yet() -> None:
    child = os.posix_spawnp("true", ["true"], os.environ)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not run_lock.is_running(child)
    os.waitpid(child, 0)
    assert not run_lock.is_running(child)
    assert run_lock.is_running(os.getpid())
