"""What may be done to a LoRA file as a file: a sound one is taken in, one that was made is added, renamed, moved to the trash.

Nothing is ever written over: a name that is taken is refused, and what is deleted moves to another folder that says where it was.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from sdlora import files, lora_file, lora_notes
from sdlora.errors import UserError

LARGEST_BYTES = 4 << 30  # an SDXL LoRA of rank 256 in fp32 has 3.3 GB
_NAME = re.compile(r"\w[\w .()+=@&-]{0,98}[\w)+=@&-]|\w")  # no sign that a path, a prompt's <lora:name:1> or a shell reads
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)(?:\..*)?", re.IGNORECASE)


def checked_name(name: str) -> str:
    """A new file's name without its ending.

    Raises:
        UserError: if it is empty, too long, a device's, or holds a sign that means something in a path or a prompt.
    """
    found = name.strip().removesuffix(".safetensors")
    if not _NAME.fullmatch(found) or ".." in found or _DEVICES.fullmatch(found) or len(found.encode()) > 200:
        raise UserError(
            "That name cannot be a file's here; give 1 to 100 letters, digits, spaces or any of . ( ) + = @ & _ - beginning with a letter "
            "or digit, and none that systems keep for devices, such as con or nul."
        )
    return found


def take_in(source: Path, folder: Path, name: str) -> Path:
    """Copies a LoRA file into a folder, after it was read whole and found sound.

    Args:
        source: the file as it came.
        name: what it is to be called, without ending.

    Raises:
        UserError: if it is too large, no sound LoRA file, its name cannot be one, or is taken.
    """
    target = free(folder, checked_name(name))
    if (size := source.stat().st_size) > LARGEST_BYTES:
        raise UserError(f"{target.stem} has {size / 2**30:.1f} GiB, and a LoRA file may have {LARGEST_BYTES >> 30}; it is something else.")
    lora_file.read(source)
    part = folder / f".{target.name}.{os.getpid()}.part"
    try:
        shutil.copyfile(source, part)
        _rename(part, target)
    except OSError as problem:
        raise UserError(f"{target} could not be written ({problem.strerror}); free space or choose another folder.") from problem
    finally:
        part.unlink(missing_ok=True)
    return target


def add(folder: Path, name: str, content: bytes) -> Path:
    """Writes a LoRA file that was made, under a name that is free.

    Raises:
        UserError: if the name cannot be one or is taken, or the file cannot be written.
    """
    target = free(folder, checked_name(name))
    files.write(target, content)
    return target


def free(folder: Path, name: str) -> Path:
    """Where a file of that name would lie.

    Raises:
        UserError: if something, or a sidecar of something, stands there, or the folder cannot be made.
    """
    files.make_folder(folder)
    target = folder / f"{name}.safetensors"
    for one in (target, *(target.with_name(name + ending) for ending in lora_notes.ENDINGS)):
        if one.exists() or one.is_symlink():
            raise UserError(f"{one.name} is there already, and nothing is written over; choose another name.")
    return target


def rename(path: Path, name: str) -> Path:
    """Gives a LoRA file, and all that stands beside it, another name in its folder; its bytes stay the same.

    Raises:
        UserError: if the name cannot be one or is taken.
    """
    target = free(path.parent, checked_name(name))
    beside = lora_notes.sidecars(path)
    try:
        _rename(path, target)
        for one in beside:
            _rename(one, target.with_name(target.stem + one.name[len(path.stem) :]))
    except OSError as problem:
        raise UserError(f"{path} could not be renamed ({problem.strerror}); look again at what is there.") from problem
    return target


def _rename(path: Path, target: Path) -> None:
    """Never over a file: a hard link fails where a rename would replace; file systems without links get a look before it."""
    try:
        os.link(path, target)
    except FileExistsError:
        raise
    except OSError:
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        path.rename(target)
        return
    path.unlink()


def discard(paths: Iterable[Path], trash: Path, name: str) -> Path:
    """Moves files or folders into a new folder of the trash.

    Args:
        name: what the new folder's name ends with, after the date and time.

    Returns:
        The new folder, with a note in `from.json` of where all of it was.

    Raises:
        UserError: if something cannot be moved; what was not moved stays.
    """
    moved = list(paths)
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    try:
        trash.mkdir(parents=True, exist_ok=True)
        goal = _new_folder(trash, stamp)
        files.write(goal / "from.json", json.dumps({one.name: str(one.absolute()) for one in moved}, indent=2).encode())
        for one in moved:
            _move(one, goal / one.name)
    except OSError as problem:
        raise UserError(
            f"{problem.filename} could not be moved to {trash} ({problem.strerror}); what was not moved is untouched."
        ) from problem
    return goal


def _new_folder(trash: Path, stamp: str) -> Path:
    for number in range(1, 1000):
        with suppress(FileExistsError):
            goal = trash / (stamp if number == 1 else f"{stamp}-{number}")
            goal.mkdir()
            return goal
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(trash / stamp))


def _move(path: Path, goal: Path) -> None:
    """A rename, or on another file system a copy that is whole before the first is deleted."""
    try:
        path.rename(goal)
    except OSError as problem:
        if problem.errno != errno.EXDEV:
            raise
        if path.is_dir():
            shutil.copytree(path, goal, symlinks=True)
            shutil.rmtree(path)
        else:
            shutil.copy2(path, goal)
            path.unlink()
