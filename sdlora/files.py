"""Files, written whole or not at all: nothing that a crash or a full disk interrupts is ever taken for a finished file."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from sdlora.errors import UserError


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: a temporary name beside it, flushed to the disk, then renamed over it.

    Raises:
        UserError: if the disk is full or the folder cannot be written; an earlier file at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_through(temporary, content)
        temporary.replace(path)
    except OSError as problem:
        raise UserError(
            f"{path} could not be written ({problem.strerror}); what stood there before is untouched. Free space or choose another folder."
        ) from problem
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    try:
        sync_folder(path.parent)
    except OSError as problem:
        raise UserError(
            f"{path} was written, but the disk does not confirm it ({problem.strerror}); look after the disk, then write it again."
        ) from problem


def write_through(path: Path, content: bytes) -> None:
    """Writes bytes and waits until the disk has them.

    Raises:
        OSError: naming the file, also where the system's own does not.
    """
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        problem.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names in a folder: before that, a power cut can undo a rename.

    Raises:
        OSError: naming the folder. Systems that cannot do it for folders at all are not an error.
    """
    if os.name == "nt":  # no folder can be opened there
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # as some network file systems answer
            problem.filename = str(folder)
            raise


def make_folder(path: Path) -> None:
    """Makes a folder before work is put into what will go there.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"Folder {path} cannot be made ({problem.strerror}); choose another.") from problem


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, remembered as long as the process lives and the file has the same size and time.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        stat = path.stat()
        return _sha256(path, stat.st_size, stat.st_mtime_ns)
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}); look whether it is still there.") from problem


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, written_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
