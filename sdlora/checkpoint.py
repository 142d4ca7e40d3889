"""States that a run can go on from: `<run>/state/<step>/`, safetensors and JSON, never pickle.

A state is made in a hidden folder beside its place, every file flushed to the disk, and renamed when it is whole. `state.json` comes last;
it holds the SHA-256 of every other file and of itself, and nothing is believed that does not have it, so a crash, a bad disk and a careless
copy all end the same way: the state is refused in a sentence and the run goes on from the one before. Damaged states are left where they
are; they cost a look each time, keep nobody from writing the same step again, and a disk that only failed to read loses nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sdlora import files, run_lock
from sdlora.errors import UserError

FORMAT = 1  # of a state; another number is refused
_STATE = "state.json"
_PARTS = ("weights", "average", "optimizer")  # each with a .safetensors file of its own, if it holds tensors
_HEAD, _DIGITS = b'{"sha256": "', 64  # how state.json begins: the hash of all its other bytes
_NAME = re.compile(r"(\d{6,})(\.old)?")  # .old: the earlier save of a step that is being saved again
_LEFTOVER = re.compile(r"\..+\.(\d+)\.(part|gone)")


@dataclass(frozen=True)
class State:
    """Everything that the next step depends on.

    Args:
        step: optimizer steps taken.
        weights: all trained tensors by name.
        average: their running average, in the order of the weights; empty if none is kept.
        optimizer: its `state_dict()`.
        facts: what JSON can hold: versions, fingerprints, the gradient scaler's numbers.
    """

    step: int
    weights: dict[str, Tensor]
    average: list[Tensor]
    optimizer: dict[str, Any]
    facts: dict[str, Any]


class _DamageError(Exception):
    """What is wrong with a state, in words that fit into parentheses."""


def path_of(folder: Path, step: int) -> Path:
    """Where the state of a step lies in the folder of states."""
    return folder / f"{step:06d}"


def steps(folder: Path) -> list[int]:
    """The steps that there are states of, good or damaged, the oldest first.

    Raises:
        UserError: if the folder cannot be read; none at all is no error.
    """
    return sorted({step for step, _ in _states(folder)})


def _states(folder: Path) -> list[tuple[int, Path]]:
    """States by step, the newest first; of two of one step the later save first."""
    try:
        found = [(name, path) for path in (folder.iterdir() if folder.is_dir() else ()) if (name := _NAME.fullmatch(path.name))]
    except OSError as problem:
        raise UserError(f"Folder {folder} cannot be read ({problem.strerror}); look after the disk.") from problem
    ranked = sorted(found, key=lambda one: (-int(one[0][1]), bool(one[0][2])))
    return [(int(name[1]), path) for name, path in ranked]


# --- writing ------------------------------------------------------------------------------------------------------------------


def write(folder: Path, state: State) -> Path:
    """Writes a state whole or not at all; one of the same step is replaced, and at every instant one of the two is whole.

    Args:
        folder: of all states, `<run>/state`.

    Returns:
        The state's own folder.

    Raises:
        UserError: if the disk is full or fails; what was there before is there still.
        TypeError: if the state holds something that can be neither in JSON nor in safetensors.
    """
    plain, tensors = _described(state)
    final = path_of(folder, state.step)
    part = folder / f".{final.name}.{os.getpid()}.part"
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            files.sync_folder(folder.parent)
        shutil.rmtree(part, ignore_errors=True)  # of a process that had the same number
        part.mkdir()
        seals = {name: _write_tensors(part / name, held) for name, held in tensors.items()}
        files.write_through(part / _STATE, _sealed({"format": FORMAT, "files": seals, **plain}))
        files.sync_folder(part)
        _put_in_place(part, final)
    except OSError as problem:
        raise UserError(
            f"The state of step {state.step} could not be saved: {problem.filename or final} ({problem.strerror}); the states saved before "
            f"are intact. Free space or look after the disk, then go on with --resume {folder.parent}."
        ) from problem
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes one file; returns its size and hash. Copies, because safetensors refuses tensors that share memory."""
    held = {name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    content = save(held)
    files.write_through(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _put_in_place(part: Path, final: Path) -> None:
    """Gives a whole state its name; if that fails, all names are as they were."""
    old = final.with_name(f"{final.name}.old")
    try:
        if final.exists():
            _remove(old)
            final.rename(old)
        part.rename(final)
        files.sync_folder(final.parent)
    except BaseException:
        if not part.exists():
            final.rename(part)
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    with suppress(OSError):  # the state is saved; `tidy` tries again
        _remove(old)


def _remove(path: Path) -> None:
    """Deletes a state under a name that nobody believes."""
    if not path.exists():
        return
    gone = path.with_name(f".{path.name}.{os.getpid()}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


# --- reading ------------------------------------------------------------------------------------------------------------------


def read(folder: Path, *, device: torch.device | str = "cpu") -> State:
    """A state, verified from the very bytes that are parsed.

    Args:
        folder: of this one state, `<run>/state/<step>`.
        device: where its tensors are put.

    Raises:
        UserError: if anything is missing, too much, or not what was written.
    """
    try:
        return _read(folder, device)
    except _DamageError as damage:
        raise UserError(f"State {folder} is damaged ({damage}); go on from an earlier one or copy it anew.") from damage


def newest(folder: Path, *, device: torch.device | str = "cpu") -> tuple[State | None, list[str]]:
    """The newest good state, if there is one, and a sentence for each newer one that is damaged.

    Args:
        folder: of all states, `<run>/state`.
        device: where its tensors are put.
    """
    damaged: list[tuple[int, _DamageError]] = []
    found = None
    for step, path in _states(folder):
        try:
            found = _read(path, device)
            break
        except _DamageError as damage:
            damaged.append((step, damage))
    rest = f"going on from step {found.step}" if found else "no state before it is whole"
    return found, [f"State of step {step} is damaged ({damage}); {rest}." for step, damage in damaged]


def newest_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of the newest state whose description is whole, without a look at its tensors; None if there is none.

    Args:
        folder: of all states, `<run>/state`.
    """
    for _, path in _states(folder):
        with suppress(_DamageError, KeyError, TypeError, ValueError, AttributeError):
            facts: dict[str, Any] = _from_plain(_told(path)["facts"], {}, "cpu")
            return facts
    return None


def _read(folder: Path, device: torch.device | str) -> State:
    try:
        told = _told(folder)
        tensors = {name: load(_content(folder, name, seal)) for name, seal in told["files"].items()}
        parts = {part: _from_plain(told[part], tensors.get(f"{part}.safetensors", {}), device) for part in (*_PARTS, "facts")}
        return State(told["step"], **parts)
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as problem:  # sealed, but not by this program
        raise _DamageError(f"{_STATE} and the tensors do not fit together") from problem


def _told(folder: Path) -> dict[str, Any]:
    """What `state.json` says, once it is certain that it is whole and that its files are there."""
    content = _bytes(folder / _STATE)
    stated, rest = content[len(_HEAD) : len(_HEAD) + _DIGITS], content[: len(_HEAD)] + content[len(_HEAD) + _DIGITS :]
    if hashlib.sha256(rest).hexdigest().encode() != stated:
        raise _DamageError(f"{_STATE} is not what was written")
    told: dict[str, Any] = json.loads(content)
    if told["format"] != FORMAT:
        raise _DamageError(f"{_STATE} has format {told['format']}, and this version reads {FORMAT}")
    if folder.name.split(".")[0] != path_of(folder, told["step"]).name:
        raise _DamageError(f"{_STATE} is that of step {told['step']}")
    here = {path.name for path in folder.iterdir() if not path.name.startswith(".")}  # file managers leave hidden files anywhere
    if differing := sorted(here ^ {_STATE, *told["files"]}):
        raise _DamageError(f"{differing[0]} is {'not part of it' if differing[0] in here else 'missing'}")
    return told


def _content(folder: Path, name: str, seal: Mapping[str, Any]) -> bytes:
    content = _bytes(folder / name)
    if len(content) != seal["bytes"]:
        raise _DamageError(f"{name} has {len(content):,} bytes instead of {seal['bytes']:,}")
    if hashlib.sha256(content).hexdigest() != seal["sha256"]:
        raise _DamageError(f"{name} is not what was written")
    return content


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as problem:
        raise _DamageError(f"{path.name} is missing") from problem
    except OSError as problem:
        raise _DamageError(f"{path.name} cannot be read, {problem.strerror}") from problem


# --- what JSON cannot say -----------------------------------------------------------------------------------------------------


def _described(state: State) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """A state as JSON can hold it, and its tensors by file and name."""
    held: dict[str, dict[str, Tensor]] = {part: {} for part in (*_PARTS, "facts")}
    plain = {part: _to_plain(getattr(state, part), tensors) for part, tensors in held.items()}
    if held.pop("facts"):
        raise TypeError("facts of a state are plain values, not tensors")
    return {"step": state.step, **plain}, {f"{part}.safetensors": tensors for part, tensors in held.items() if tensors}


def _to_plain(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A value as JSON can hold it, so that `_from_plain` gives back the same types and bits; tensors are put aside by name."""
    kind = type(value)
    if isinstance(value, Tensor):
        if name in tensors:
            raise TypeError(f"two tensors of a state are both called {name}")
        tensors[name] = value
        return {"$tensor": name}
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value  # JSON writes floats as repr does: the shortest digits that give the same bits
    if kind is float:
        return {"$float": repr(value)}
    if kind in (list, tuple):
        items = [_to_plain(item, tensors, _below(name, number)) for number, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if kind is dict and all(type(key) in (int, str) for key in value):
        pairs = {key: _to_plain(item, tensors, _below(name, key)) for key, item in value.items()}
        simple = all(type(key) is str and not key.startswith("$") for key in value)
        return pairs if simple else {"$items": [[key, item] for key, item in pairs.items()]}
    raise TypeError(f"a state cannot hold {name or 'this'}, a {kind.__name__}")


def _below(name: str, key: object) -> str:
    return f"{name}/{key}" if name else str(key)


def _from_plain(value: Any, tensors: Mapping[str, Tensor], device: torch.device | str) -> Any:
    if isinstance(value, list):
        return [_from_plain(item, tensors, device) for item in value]
    match value:
        case {"$tensor": name}:
            return tensors[name].to(device)
        case {"$float": digits}:
            return float(digits)
        case {"$tuple": items}:
            return tuple(_from_plain(item, tensors, device) for item in items)
        case {"$items": pairs}:
            return {key: _from_plain(item, tensors, device) for key, item in pairs}
        case dict():
            return {key: _from_plain(item, tensors, device) for key, item in value.items()}
    return value


def _sealed(told: Mapping[str, Any]) -> bytes:
    """JSON that begins with the SHA-256 of all its bytes but these 64 digits, so that any flipped bit is found."""
    rest = json.dumps({"sha256": "", **told}, allow_nan=False).encode()
    return _HEAD + hashlib.sha256(rest).hexdigest().encode() + rest[len(_HEAD) :]


# --- old ones -----------------------------------------------------------------------------------------------------------------


def tidy(folder: Path, *, keep_last: int, keep_every: int) -> list[str]:
    """Deletes older states and what dead writers left; called by the run that holds the folder, after a successful `write`.

    Only whole states count as kept: a damaged newer one never pushes out the one that the run will need.

    Args:
        folder: of all states, `<run>/state`.
        keep_last: how many of the newest whole states stay, at least 1.
        keep_every: states whose step is a multiple stay for ever; 0 for none.

    Returns:
        A sentence for each state that could not be deleted; the next call tries again.
    """
    whole = (step for step, path in _states(folder) if _is_whole(path))
    kept = list(islice(dict.fromkeys(whole), max(1, keep_last)))
    oldest = kept[-1] if len(kept) >= keep_last else 0
    superseded = [path for step, path in _states(folder) if path.suffix == ".old" and step in kept and _is_whole(path_of(folder, step))]
    aged = [path for step, path in _states(folder) if step < oldest and not (keep_every and step % keep_every == 0)]
    problems = []
    for path in [*superseded, *aged]:
        try:
            _remove(path)
        except OSError as problem:
            problems.append(f"Old state {path} could not be deleted ({problem.strerror}); delete it by hand, or free the disk otherwise.")
    for path in folder.glob(".*"):
        if (name := _LEFTOVER.fullmatch(path.name)) and (int(name[1]) == os.getpid() or not run_lock.is_running(int(name[1]))):
            shutil.rmtree(path, ignore_errors=True)
    return problems


def _is_whole(folder: Path) -> bool:
    """Whether a state can be believed; each is looked through once per process."""
    with suppress(OSError):
        stat = (folder / _STATE).stat()
        return _was_whole(folder, stat.st_mtime_ns, stat.st_ino)
    return False


@lru_cache(maxsize=64)
def _was_whole(folder: Path, written_ns: int, inode: int) -> bool:
    try:
        for name, seal in _told(folder)["files"].items():
            _content(folder, name, seal)
    except _DamageError:
        return False
    return True
