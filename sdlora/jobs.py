"""Trainings that wait for each other: a queue on the disk, and the child process that each of them is.

Everything stands in files below `runs/.queue` (see `job_line`), so that whoever starts the page again finds all of it, and two pages over
one folder do not start a job twice: whoever starts one takes the slot first, a file under the system's lock. The child inherits the open
file, so the slot is free again when the child has ended, whatever ended it, and never before; no process number has to be trusted. What
has become of a job its run folder tells (see `job_states`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sdlora import config, files, job_line, job_states, lora_moves, run_folder, run_lock, runs
from sdlora.config import Config
from sdlora.errors import UserError

LOOK_S = 1.0  # between looks whether the next may start
LONGEST_NAME = 64
_CHILDREN: list[subprocess.Popen[bytes]] = []  # that this process has started, until they end


@dataclass(frozen=True)
class Jobs:
    """A queue over a folder of runs."""

    runs: Path


@dataclass(frozen=True)
class Job:
    """A training as it is now.

    Args:
        state: "waiting", "starting", "running", "paused", "done", "stopped" (somebody asked it to end), "failed" (it says why) or
            "interrupted" (it ended without a word and can go on).
        words: why it failed, in a sentence; else "".
        owner: who asked for it; "" for one that was started elsewhere.
    """

    folder: Path
    state: str
    words: str = ""
    owner: str = ""
    added_s: float = 0.0


# --- coming and going ----------------------------------------------------------------------------------------------------------


def checked_name(name: object) -> str:
    """A name that may become a folder's and a file's, on every system.

    Raises:
        UserError: if it may not.
    """
    if not isinstance(name, str) or not name.strip():
        raise UserError("The name is empty; give the LoRA a name, such as my-dragon.")
    name = lora_moves.checked_name(name)
    if len(name) > LONGEST_NAME or not re.fullmatch(r"\w[\w .-]*", name) or name[-1] in ". ":
        raise UserError(
            f"That name cannot be a LoRA's; give up to {LONGEST_NAME} letters, digits, spaces, dots, dashes and underscores, a letter or "
            "digit first, no dot last."
        )
    return name


def reserve(jobs: Jobs, name: str) -> Path:
    """A run folder that nobody else has, called after the name; with a number behind it if that is taken.

    Raises:
        UserError: if the name cannot be a folder's, or no folder can be made.
    """
    name = checked_name(name)
    files.make_folder(jobs.runs)
    for number in range(1, 10_000):
        folder = jobs.runs / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as problem:
            raise UserError(f"Folder {folder} cannot be made ({problem.strerror}); choose another name.") from problem
        return folder
    raise UserError(f"There are 9,999 runs called {name}; choose another name.")


def submit(jobs: Jobs, folder: Path, run: Config, *, owner: str = "") -> None:
    """Puts a run in line: its config is written into its folder, and it starts when no other is at work.

    Args:
        folder: from `reserve`.
        run: resolved (see `prepare.linked_run`), as a written default counts as set.
        owner: whoever asks, as a word that only they know the secret of.

    Raises:
        UserError: if too many wait, or the disk is full.
    """
    files.write(folder / "config.toml", config.to_toml(run).encode())
    job_line.add(jobs.runs, folder, owner)


def go_on(jobs: Jobs, folder: Path, *, owner: str = "") -> None:
    """Puts a run in line again that was stopped, killed or has failed; it goes on from what it has saved.

    Raises:
        UserError: if it is at work, in line, or done.
    """
    job = look(jobs, folder)
    if job.state in (*job_states.AT_WORK, "waiting"):
        raise UserError(f"Run {folder.name} is {job.state} already; there is nothing to go on with.")
    if job_states.has_ended(folder):
        raise UserError(f"Run {folder.name} has come to its end; train it longer, or again under another name.")
    _queue_again(jobs, folder, owner)


def lengthen(jobs: Jobs, folder: Path, *, owner: str = "") -> int:
    """Puts a run that has come to its end in line for more steps, see `run_folder.longer`.

    Returns:
        How many it shall have in all.

    Raises:
        UserError: if it has not come to its end.
    """
    steps = run_folder.ended_at(folder)
    if look(jobs, folder).state not in ("done", "failed") or not steps:
        raise UserError(f"Run {folder.name} has not come to its end, so it cannot be lengthened yet; look what it does now.")
    _queue_again(jobs, folder, owner, steps=run_folder.longer(steps))
    return run_folder.longer(steps)


def _queue_again(jobs: Jobs, folder: Path, owner: str, *, steps: int = 0) -> None:
    if folder.parent != jobs.runs:
        raise UserError(f"Run {folder.name} is one of several in a folder of their own; go on with them where they were started.")
    for path, ticket in job_line.tickets(jobs.runs, "started"):
        if ticket.folder == folder.name:
            path.unlink(missing_ok=True)
    job_line.add(jobs.runs, folder, owner, steps=steps)


def take_back(jobs: Jobs, folder: Path) -> None:
    """Takes a job out of the line before it has started; a folder in which nothing was trained goes with it.

    Raises:
        UserError: if it does not wait (any more).
    """
    for path, ticket in job_line.tickets(jobs.runs, "waiting"):
        if ticket.folder == folder.name:
            gone = path.with_suffix(".gone")
            with suppress(FileNotFoundError):  # it has just started
                path.rename(gone)  # of this and a start only one gets the file
                gone.unlink()
                if folder.parent == jobs.runs and not folder.is_symlink() and not (folder / "metrics.jsonl").exists():
                    shutil.rmtree(folder, ignore_errors=True)
                return
    raise UserError(f"Run {folder.name} does not wait (any more); look what it does now.")


def put_away(jobs: Jobs, folder: Path) -> None:
    """Takes a job that has ended, however it did, off the list; its run folder stays as it is.

    Raises:
        UserError: if it is at work or in line.
    """
    job = look(jobs, folder)
    if job.state in (*job_states.AT_WORK, "waiting"):
        raise UserError(f"Run {folder.name} is {job.state}; stop it first, then put it away.")
    for path, ticket in job_line.tickets(jobs.runs, "started"):
        if ticket.folder == folder.name and folder.parent == jobs.runs:
            path.unlink(missing_ok=True)


def ask(jobs: Jobs, folder: Path, request: str) -> None:
    """Asks a job for one of `run_folder.REQUESTS`, or to "resume"; one that waits is taken out of the line by "stop".

    Raises:
        UserError: if it is not in a state in which it could.
    """
    state = look(jobs, folder).state
    if request == "stop" and state == "waiting":
        take_back(jobs, folder)
    elif request == "stop" and state == "starting":
        _end_early(jobs, folder)
    elif request == "resume" and state == "paused":
        run_folder.forget(folder, "pause")
    elif (request in ("stop", "save", "sample") and state in ("running", "paused")) or (request == "pause" and state == "running"):
        if state == "paused" and request != "stop":
            raise UserError(f"Run {folder.name} is paused and saved; resume it first.")
        run_folder.ask(folder, request)
    else:
        raise UserError(f"Run {folder.name} is {state} now, so it cannot {request}; look what it does now.")


# --- looking -------------------------------------------------------------------------------------------------------------------


def listed(jobs: Jobs) -> list[Job]:
    """All jobs that are known: those that were started, the oldest first, then those in line."""
    found = {ticket.folder: ticket for _, ticket in (*job_line.tickets(jobs.runs, "started"), *job_line.tickets(jobs.runs, "waiting"))}
    return [look(jobs, jobs.runs / name) for name in found if (jobs.runs / name).is_dir()]


def look(jobs: Jobs, folder: Path) -> Job:
    """What has become of the job of a run folder, or of a run that was started elsewhere; the folder itself is the witness."""
    tickets = {
        kind: next((one for _, one in job_line.tickets(jobs.runs, kind) if one.folder == folder.name and folder.parent == jobs.runs), None)
        for kind in ("waiting", "started")
    }
    ticket = tickets["waiting"] or tickets["started"]
    owner, added_s = (ticket.owner, ticket.added_s) if ticket else ("", 0.0)
    state, words = ("waiting", "") if tickets["waiting"] else job_states.state_of(folder, has_child=_child(jobs) == folder)
    return Job(folder, state, words, owner, added_s)


def at_work(jobs: Jobs) -> Path | None:
    """The run folder that is at work now, started here or elsewhere; None if there is none."""
    return _child(jobs) or _working(jobs)


def _working(jobs: Jobs) -> Path | None:
    """The first run folder that a run holds, at the depths at which runs lie."""
    patterns = ("/".join(["*"] * depth) for depth in range(1, runs.DEPTH + 1))
    folders = (path.parent for pattern in patterns for path in sorted(jobs.runs.glob(f"{pattern}/{run_lock.NAME}")))
    return next((folder for folder in folders if run_lock.owner(folder)), None)


# --- starting ------------------------------------------------------------------------------------------------------------------


def start_next(jobs: Jobs, *, ready: Callable[[], bool] = lambda: True) -> Path | None:
    """Starts the job that has waited longest, if none is at work; its run folder if it did.

    Args:
        ready: asked just before, when one waits; makes room for it, or says that it has to wait longer.
    """
    _reap()
    if not job_line.tickets(jobs.runs, "waiting"):
        return None
    handle = job_line.open_slot(jobs.runs)
    try:
        if not job_line.taken(handle) or _working(jobs) or not ready():
            return None
        os.ftruncate(handle, 0)  # so that nobody is taken for the last holder
        for path, ticket in job_line.tickets(jobs.runs, "waiting"):
            goal = jobs.runs / job_line.NAME / "started" / path.name
            with suppress(FileNotFoundError):  # taken back meanwhile
                path.rename(goal)
                folder = jobs.runs / ticket.folder
                if (folder / "config.toml").is_file() and _start(jobs, folder, handle, steps=ticket.steps):
                    return folder
        return None
    finally:
        os.close(handle)  # the child has its own


def keep_going(jobs: Jobs, *, ready: Callable[[], bool] = lambda: True) -> threading.Event:
    """Starts a thread that starts jobs one after the other, until the event that it returns is set; children live on without it.

    Args:
        ready: as for `start_next`.
    """
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(LOOK_S):
            with suppress(OSError, UserError):  # a disk that is full or gone may come back
                start_next(jobs, ready=ready)

    threading.Thread(target=follow, name="job queue", daemon=True).start()
    return stop


def _start(jobs: Jobs, folder: Path, handle: int, *, steps: int) -> bool:
    """Starts the child of a job in a session of its own, so that what ends the page does not end it."""
    for request in run_folder.REQUESTS:
        run_folder.forget(folder, request)
    place = folder.resolve()
    own, longer = [str(place / "config.toml"), "--out", str(place)], ["--resume", str(place), "--set", f"steps={steps}", "--allow-changes"]
    command = [sys.executable, "-m", "sdlora", "train", *(longer if steps else own)]
    given = (handle,) if os.name != "nt" else ()
    with (folder / job_states.LOG).open("wb") as log:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=given
            )  # fmt: skip
        except OSError as problem:
            log.write(f"sdlora: The training could not be started ({problem.strerror}); look whether memory is short.\n".encode())
            return False
    os.pwrite(handle, json.dumps({"pid": child.pid, "folder": folder.name}).encode(), 0)
    _CHILDREN.append(child)
    return True


def _reap() -> None:
    """Children that have ended are let go, so that they do not stay as zombies."""
    _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]


def _end_early(jobs: Jobs, folder: Path) -> None:
    """Ends a child that has not begun to train; there is nothing to save yet."""
    told = job_line.slot(jobs.runs)
    if told.get("folder") == folder.name and _child(jobs) == folder:
        with suppress(ProcessLookupError):
            os.kill(told["pid"], signal.SIGTERM)  # it holds the slot, so the number is still its own
        return
    raise UserError(f"Run {folder.name} was started elsewhere and has not begun yet; wait until it trains, then stop it.")


def _child(jobs: Jobs) -> Path | None:
    """The run folder whose child holds the slot."""
    told = job_line.slot(jobs.runs)
    return jobs.runs / told["folder"] if told and job_line.is_held(jobs.runs, told["pid"]) else None
