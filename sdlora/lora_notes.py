"""What a person, or another tool, has put beside a LoRA file: pictures, A1111's settings, and notes of our own.

Notes live in `NAME.sdlora.json` and never in the LoRA file, whose bytes and hash stay what they are. `NAME.json` belongs to A1111 and
Forge: it is read and never written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora import files
from sdlora.errors import UserError

LONGEST_NOTES = 20_000  # characters
PICTURES = (".png", ".preview.png", ".jpg", ".jpeg", ".webp")
ENDINGS = (*PICTURES, ".json", ".sdlora.json")
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Beside:
    """What the files beside a LoRA file tell; strength is None if they do not."""

    trigger: str = ""
    strength: float | None = None
    notes: str = ""


def sidecars(path: Path) -> list[Path]:
    """The files that go with a LoRA file wherever it goes."""
    return [one for ending in ENDINGS if (one := path.with_name(path.stem + ending)).is_file()]


def picture(path: Path) -> Path | None:
    """The picture that stands for a LoRA file, if somebody has put one beside it."""
    return next((one for ending in PICTURES if (one := path.with_name(path.stem + ending)).is_file()), None)


def read(path: Path) -> Beside:
    """What stands beside a LoRA file; what cannot be read tells nothing.

    Args:
        path: the LoRA file's.
    """
    told, ours = (_fields(path.with_name(path.stem + ending)) for ending in (".json", ".sdlora.json"))
    strength = told.get("preferred weight")
    known = isinstance(strength, int | float) and not isinstance(strength, bool) and 0 < abs(strength) <= 2  # 0 is A1111's "not set"
    return Beside(_text(told, "activation text"), float(strength) if known and strength is not None else None, _text(ours, "notes"))


def write(path: Path, notes: str) -> None:
    """Keeps notes on a LoRA file; without any, no file is left.

    Args:
        path: the LoRA file's.
        notes: plain text.

    Raises:
        UserError: if they are too long, hold half characters, or cannot be written.
    """
    if len(notes) > LONGEST_NOTES:
        raise UserError(f"The notes have {len(notes):,} characters, and {LONGEST_NOTES:,} are kept; shorten them.")
    beside = path.with_name(f"{path.stem}.sdlora.json")
    told = {key: value for key, value in _fields(beside).items() if key != "notes"} | ({"notes": notes} if notes.strip() else {})
    try:
        content = json.dumps(told, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:
        raise UserError("The notes hold half of a character pair, which no file can keep; type them anew.") from problem
    if told:
        files.write(beside, content)
    else:
        beside.unlink(missing_ok=True)


def _fields(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            return {}
        told = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _text(told: dict[str, Any], key: str) -> str:
    value = told.get(key)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""
