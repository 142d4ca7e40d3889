"""The files of the line in which trainings wait.

waiting/<when>.json    jobs in line: the run folder's name, whose it is, when it came
started/<when>.json    the same, once a child was started for it; a file is renamed from there to here, so of two who want it one gets it
slot                   held by the child that trains, under the system's lock; its process number and run folder
"""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdlora import files, run_lock
from sdlora.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: there the child's number stands for the lock
    fcntl = None  # type: ignore[assignment]

NAME = ".queue"
MOST_WAITING = 100


@dataclass(frozen=True)
class Ticket:
    """A job in line: the run folder's name, who asked for it, when, and how many steps a run that has ended shall have; 0 for its own."""

    folder: str
    owner: str
    added_s: float
    steps: int = 0


def add(runs: Path, folder: Path, owner: str, *, steps: int = 0) -> None:
    """Puts a run folder at the end of the line.

    Args:
        steps: as in `Ticket`.

    Raises:
        UserError: if too many wait, or it cannot be written.
    """
    if len(tickets(runs, "waiting")) >= MOST_WAITING:
        raise UserError(f"{MOST_WAITING} trainings are in line already; take some out of it first.")
    ticket = Ticket(folder.name, owner, time.time(), steps)
    path = runs / NAME / "waiting" / f"{time.time_ns():020d}-{secrets.token_hex(4)}.json"
    files.write(path, json.dumps(asdict(ticket)).encode() + b"\n")


def tickets(runs: Path, kind: str) -> list[tuple[Path, Ticket]]:
    """The tickets that are "waiting" or "started", in order of coming; what cannot be read, or names no folder of ours, is none."""
    found = []
    for path in sorted((runs / NAME / kind).glob("[0-9]*.json")):
        with suppress(OSError, ValueError, TypeError, KeyError):
            told = json.loads(path.read_bytes())
            found.append((path, Ticket(_plain(told["folder"]), str(told["owner"]), float(told["added_s"]), int(told.get("steps", 0)))))
    return found


def slot(runs: Path) -> dict[str, Any]:
    """Who has taken the slot, as "pid" and "folder", whether or not they still hold it; nothing if it was never taken."""
    try:
        told = json.loads((runs / NAME / "slot").read_bytes())
        return {"pid": int(told["pid"]), "folder": _plain(told["folder"])}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def taken(handle: int, *, shared: bool = False) -> bool:
    """Whether the system gave its lock on an open file."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_held(runs: Path, pid: int) -> bool:
    """Whether the child that took the slot is still there.

    Args:
        pid: its number, for systems without such locks.
    """
    try:
        handle = os.open(runs / NAME / "slot", os.O_RDONLY)
    except OSError:
        return False
    try:
        return run_lock.is_running(pid) if fcntl is None else not taken(handle, shared=True)
    finally:
        os.close(handle)


def open_slot(runs: Path) -> int:
    """The slot as an open file; made if there is none.

    Raises:
        OSError: if it cannot be opened.
    """
    (runs / NAME / "started").mkdir(parents=True, exist_ok=True)
    return os.open(runs / NAME / "slot", os.O_RDWR | os.O_CREAT, 0o644)


def _plain(name: object) -> str:
    """The name of a folder that lies in the folder of runs itself.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(name, str) or not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is no name of a run folder")
    return name
