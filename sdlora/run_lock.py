"""Two runs in one folder would write over each other: the first holds `run.lock`, the second is refused in a sentence.

The lock is the system's own (flock): it ends with the process, whatever ends it, and of two that come at once one gets it; a process
number that was given out again cannot be mistaken. What stands in the file, who and where and since when, is for people and for what the
system's lock does not reach: other machines on a shared disk, which count as gone after ten minutes without a sign of life, and disks
that know no locks, where the owner is looked for by number and start.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sdlora import files
from sdlora.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: as on disks that know no locks
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"
BEAT_S = 10.0  # a sign of life touches the disk no more often
LOST_S = 600.0  # without one, a run on another machine counts as gone
_TRIES, _WAIT_S = 25, 0.02  # a look at the lock holds it for an instant, and a run may just be ending


@dataclass(frozen=True)
class Owner:
    """Who holds a run folder.

    Args:
        pid: its process.
        host: the machine's name.
        boot: the running kernel's identity, the same in all containers of a machine.
        pids: the space in which `pid` counts; containers have their own.
        born: when the process started, as the kernel says it.
        started_s: when it took the folder, in seconds since 1970.
        seen_s: its last sign of life, likewise.
    """

    pid: int
    host: str
    boot: str
    pids: str
    born: str
    started_s: float
    seen_s: float = 0.0


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """While it lasts the run folder is this process's; what a killed run left is taken over.

    Args:
        folder: the run folder; made if there is none, and taken away again if nothing was put into it.

    Raises:
        UserError: if another run holds it, or nothing can be written there.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    files.make_folder(folder)
    handle = _acquired(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # the lock itself ends with the handle
            if _is_mine(_owner_in(folder / NAME)):
                (folder / NAME).unlink()
        if handle is not None:
            os.close(handle)
        with suppress(OSError):  # not empty
            for one in made:
                one.rmdir()


def beat(folder: Path) -> None:
    """A sign of life of the run that holds a folder; writes nothing if the last one is less than 10 s old.

    Raises:
        UserError: if another run has taken the folder over meanwhile.
    """
    path = folder / NAME
    with suppress(OSError):  # whatever is wrong with the disk, the run's own files will say
        if 0 <= time.time() - path.stat().st_mtime < BEAT_S:
            return
        owner = _owner_in(path)
        if owner is not None and not _is_mine(owner):
            raise UserError(
                f"Run folder {folder} was taken over by process {owner.pid} on {owner.host} after this run had shown no sign of life for "
                f"{LOST_S / 60:.0f} minutes; this run ends here, go on with that one."
            )
        os.utime(path)


def owner(folder: Path) -> Owner | None:
    """Who holds a run folder now; None if nobody does, or what is left there is of a run that is gone."""
    found = _owner_in(folder / NAME)
    if found is None:
        return None
    with suppress(OSError):
        handle = os.open(folder / NAME, os.O_RDONLY)
        try:
            got = _locked(handle, shared=True)
        finally:
            os.close(handle)
        return found if _is_alive(found, got=got) else None
    return None


def refuse_held(folder: Path) -> None:
    """Says at once what `held` would say later.

    Raises:
        UserError: if another run holds the folder.
    """
    if other := owner(folder):
        raise _refusal(folder, other)


def is_running(pid: int) -> bool:
    """Whether there is a process of this number on this machine; one that has ended and waits for its parent does not count."""
    return _born(pid) is not None


# --- taking it ----------------------------------------------------------------------------------------------------------------


def _acquired(folder: Path) -> int | None:
    """Takes the lock; returns the handle that holds it, None on disks without locks."""
    path = folder / NAME
    try:
        for _ in range(_TRIES):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            got, other = _locked(handle), _owner_in(path)
            if got is not False and other is not None and _is_alive(other, got=got):
                os.close(handle)
                raise _refusal(folder, other)
            if got and _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, _me(), 0)
                return handle
            os.close(handle)  # somebody has it, or it was let go between open and lock
            if got is None:
                _claim_without_lock(folder)
                return None
            time.sleep(_WAIT_S)
    except OSError as problem:
        raise UserError(f"{path} cannot be written ({problem.strerror}); choose another folder with --out.") from problem
    raise _refusal(folder, _owner_in(path))


def _claim_without_lock(folder: Path) -> None:
    """Of two that come at once the later writer wins, and the other sees it; a third of a second is long for a write."""
    files.write(folder / NAME, _me())
    time.sleep(0.3)
    other = _owner_in(folder / NAME)
    if not _is_mine(other):
        raise _refusal(folder, other)


def _locked(handle: int, *, shared: bool = False) -> bool | None:
    """Whether the system gave its lock on an open file; None if the disk knows no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as problem:
        return False if problem.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of that name: its last owner may have deleted it meanwhile."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _is_alive(other: Owner, *, got: bool | None) -> bool:
    """Whether the owner that the file names must be taken for alive.

    Args:
        got: what the system says of its lock: True if it was free, False if somebody has it, None if the disk knows none.
    """
    if got is False:
        return True
    if other.boot == _boot() and (got or other.pids == _pids()):  # a living one would have the lock, or its number
        return not got and _born(other.pid) == other.born
    if other.host == socket.gethostname() and other.boot != _boot():  # the machine has started anew since
        return False
    return time.time() - other.seen_s < LOST_S


def _refusal(folder: Path, other: Owner | None) -> UserError:
    if other is None:
        return UserError(f"Run folder {folder} is in use by another process; stop that run, or choose another folder with --out.")
    today = time.strftime("%F", time.localtime(other.started_s)) == time.strftime("%F")
    since = time.strftime("%H:%M" if today else "%F %H:%M", time.localtime(other.started_s))
    age_s = max(0, round(time.time() - other.seen_s))
    wait = "" if other.host == socket.gethostname() else f" (if it is gone: wait until {LOST_S / 60:.0f} minutes have passed)"
    return UserError(
        f"Run folder {folder} is in use by process {other.pid} on {other.host} since {since} (last sign of life {age_s} s ago); "
        f"stop that run{wait}, or choose another folder with --out."
    )


# --- who is who ---------------------------------------------------------------------------------------------------------------


def _me() -> bytes:
    mine = Owner(os.getpid(), socket.gethostname(), _boot(), _pids(), _born(os.getpid()) or "", time.time())
    told = asdict(mine)
    del told["seen_s"]  # the file's own time tells
    return json.dumps(told).encode() + b"\n"


def _is_mine(one: Owner | None) -> bool:
    return one is not None and (one.pid, one.boot, one.pids, one.born) == (os.getpid(), _boot(), _pids(), _born(os.getpid()))


def _owner_in(path: Path) -> Owner | None:
    """Whom the file names; None if there is none, or it is half written."""
    try:
        seen_s = path.stat().st_mtime
        return replace(Owner(**json.loads(path.read_bytes())), seen_s=seen_s)
    except (OSError, ValueError, TypeError):
        return None


def _born(pid: int) -> str | None:
    """When a process started, in the kernel's ticks since it booted; "" where only its being there can be told, None if it is gone."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]  # fields 3 and 22 of proc(5): zombies are gone
    if os.name == "nt":  # where asking with signal 0 would send one
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _pids() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
