"""Opening a .safetensors file that a stranger made: its header is checked before any byte of it is believed.

A file is an 8-byte length, a JSON header and the tensors' bytes. Before the safetensors library sees it, the length must fit the file and
a limit (16 MiB for LoRAs, 64 MiB for checkpoints), no key may stand twice, and the tensors must fill the rest of the file without
overlaps or gaps. So memory is bounded whatever the file claims, and damage gets one sentence. Pickles (.ckpt, .pt, .bin) are refused
under any name: opening one can run its author's code.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sdlora.errors import UserError

LORA_HEADER_BYTES = 16 << 20
CHECKPOINT_HEADER_BYTES = 64 << 20
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_MOST_BRACKETS = 1 << 18  # "{}," is 3 bytes there and 72 in memory; an SDXL checkpoint has 2,515 tensors of 3 brackets each
_LONGEST_NAME = 500  # the longest in Stable Diffusion files has 150 characters
_MOST_AXES = 8
_MOST_ITEMS = 1 << 40
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it: dtype in the format's own word, shape, and its span in bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself: its tensors by name, its metadata, and the byte at which the first tensor begins."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


@dataclass(frozen=True)
class Weights:
    """A file's tensors by name, on the CPU in the dtypes they are stored in, and its metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def header(path: Path, *, limit_bytes: int = CHECKPOINT_HEADER_BYTES) -> Header:
    """The checked header of a file; not one tensor is read, so a checkpoint of many GB costs milliseconds.

    Args:
        limit_bytes: the longest header that is accepted.

    Raises:
        UserError: if there is no such file, it is a pickle or something else, or it is damaged.
    """
    _check_kind(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
            length = _length(path, start, size=size, limit_bytes=limit_bytes)
            text = start[8:] + file.read(length - 1)
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}); check that the disk is there and that you may read it.") from problem
    fields = _fields(path, text)
    metadata = _metadata(path, fields.pop("__metadata__", {}))
    tensors = {name: _entry(path, name, value) for name, value in fields.items()}
    _check_spans(path, tensors, data_bytes=size - 8 - length)
    return Header(tensors, metadata, 8 + length)


def digest(path: Path, *, only: Container[str] | None = None) -> str:
    """SHA-256 of all tensors of a file, or of some by name, with their names, dtypes and shapes; the rest of a checkpoint is not read.

    Raises:
        UserError: as `header` does.
    """
    checked, told = header(path), hashlib.sha256()
    with path.open("rb") as file:
        for name, entry in sorted(checked.tensors.items()):
            if only is not None and name not in only:
                continue
            told.update(f"{name} {entry.dtype} {entry.shape} ".encode())
            file.seek(checked.data_start + entry.start)
            left = entry.end - entry.start
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                told.update(block)
                left -= len(block)
    return told.hexdigest()


def read(path: Path, *, limit_bytes: int = LORA_HEADER_BYTES, finite: bool = True) -> Weights:
    """A whole file, checked.

    Args:
        limit_bytes: the longest header that is accepted.
        finite: whether a tensor with NaN or infinity is an error, as in a LoRA it is.

    Raises:
        UserError: as `header` does, or if a tensor is not finite.
    """
    checked = header(path, limit_bytes=limit_bytes)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as problem:
        raise _damaged(path, f"the safetensors library refuses it, {_shown(str(problem))}") from problem
    if finite:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not _is_finite(tensor):
                raise UserError(
                    f"{path} holds NaN or infinity in {_shown(name)}, which would turn pictures black; use another version or step of it."
                )
    return Weights(tensors, checked.metadata)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all is finite; the two ends tell, NaN being either, and 8-bit floats can only be asked through fp32."""
    if tensor.numel() == 0:
        return True
    ends = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()
    return bool(torch.isfinite(ends.min)) and bool(torch.isfinite(ends.max))


def _check_kind(path: Path) -> None:
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as problem:
        raise UserError(f"{_shown(str(path))} cannot be opened ({problem.strerror}); give the path of a .safetensors file.") from problem
    if is_folder:
        raise UserError(f"{path} is a folder; give the path of a .safetensors file.")
    if not is_file:
        raise UserError(f"{path} does not exist or is no ordinary file; give the path of a .safetensors file.")
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise _pickle(path)
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file, and only those are read.")


def _pickle(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which can run code when it is opened, and only .safetensors is read; "
        "save it as .safetensors with the tool that made it, or fetch it in that form."
    )


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged or not a safetensors file: {reason}; fetch or make it again.")


def _shown(text: str) -> str:
    """A stranger's text as part of a sentence: short, on one line, without control characters."""
    return repr(text if len(text) <= 120 else f"{text[:60]}…{text[-59:]}")


def _length(path: Path, start: bytes, *, size: int, limit_bytes: int) -> int:
    """The header's length in bytes, from the first nine bytes of the file; a brace must follow it."""
    length = int.from_bytes(start[:8], "little")
    if len(start) == 9 and 2 <= length <= size - 8 and start[8:] == b"{":
        if length > limit_bytes:
            raise _damaged(path, f"its header of {length:,} bytes is longer than the {limit_bytes:,} that are allowed")
        return length
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise _pickle(path)
    if len(start) < 9:
        raise _damaged(path, f"it ends after {size} bytes")
    if length > size - 8:
        raise _damaged(path, f"its header would be {length:,} bytes long, but the whole file has {size:,}")
    raise _damaged(path, "no header follows its first 8 bytes")


def _fields(path: Path, text: bytes) -> dict[str, Any]:
    """The header's JSON object, every key once."""
    if text.count(b"{") + text.count(b"[") > _MOST_BRACKETS:
        raise _damaged(path, f"its header has more than {_MOST_BRACKETS:,} brackets")
    try:
        fields = json.loads(text.decode(), object_pairs_hook=_unique)
    except RecursionError as problem:
        raise _damaged(path, "its header is nested too deeply") from problem
    except ValueError as problem:  # not UTF-8, not JSON, a key twice, a number of more than 4,300 digits
        raise _damaged(path, f"its header cannot be read, {_shown(str(problem))}") from problem
    assert isinstance(fields, dict)  # it begins with a brace
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((name, times),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name} stands there {times} times")
    return fields


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(_is_text(part) for pair in value.items() for part in pair):
        raise _damaged(path, "its metadata is not a list of names and texts")
    return value


def _is_text(value: Any) -> bool:
    """Whether it is a string that can be written again; JSON can spell half of a surrogate pair."""
    return isinstance(value, str) and not _HALF_PAIR.search(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is an int too


def _entry(path: Path, name: str, value: Any) -> Entry:
    """One tensor's description, its shape and span agreeing."""
    if not _is_text(name) or not 0 < len(name) <= _LONGEST_NAME:
        raise _damaged(path, f"a tensor is named {_shown(name)}, which is not 1 to {_LONGEST_NAME} characters of text")

    def wrong(what: str) -> UserError:  # words are made for the one tensor that needs them, not for the thousands of a file
        return _damaged(path, f"tensor {_shown(name)} has {what}")

    parts = value if isinstance(value, dict) else {}
    dtype, shape, span = (parts.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        found = _shown(dtype) if isinstance(dtype, str) else "that is not text"
        raise wrong(f"a dtype {found}, and {', '.join(_ITEM_BYTES)} are known")
    if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(_is_count(count) for count in shape):
        raise wrong(f"a shape that is not a list of up to {_MOST_AXES} counts")
    if not isinstance(span, list) or len(span) != 2 or not all(_is_count(offset) for offset in span):
        raise wrong("data_offsets that are not two counts of bytes")
    if math.prod([max(count, 1) for count in shape]) > _MOST_ITEMS:
        raise wrong(f"a shape of more than {_MOST_ITEMS:,} numbers")
    if math.prod(shape) * _ITEM_BYTES[dtype] != span[1] - span[0]:
        raise wrong("a shape that does not fit the bytes that it is given")
    return Entry(dtype, tuple(shape), span[0], span[1])


def _check_spans(path: Path, tensors: dict[str, Entry], *, data_bytes: int) -> None:
    """The tensors stand one after the other and fill the file to its end."""
    here = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != here:
            how = "overlaps the one before it" if entry.start < here else "leaves a gap before it"
            raise _damaged(path, f"tensor {_shown(name)} {how}")
        here = entry.end
    if here > data_bytes:
        raise _damaged(path, f"its end is missing, {data_bytes:,} of {here:,} bytes of tensors are there")
    if here < data_bytes:
        raise _damaged(path, f"{data_bytes - here:,} bytes at its end belong to no tensor")
