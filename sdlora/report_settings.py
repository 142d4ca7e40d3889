"""The settings of a run as tables: those that are not at their defaults first, then all, each with what it is.

Of paths only the last part is shown: the folders before it are nobody's business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pydantic import BaseModel

from sdlora.config import Config
from sdlora.report_blocks import Block, Code, Details, Paragraph, Table

PATHS = ("base", "vae", "tokenizer", "folder", "metadata", "masks")


def blocks(run: Config) -> tuple[Block, ...]:
    """A table of what was chosen, and all settings folded away."""
    every = list(_rows(run))
    chosen = [row for row, is_default in every if not is_default]
    about = "Those that are not at their defaults: set in the config, or chosen for this base and these pictures."
    return (Paragraph((about,), faint=True), _table(chosen), Details("All settings", (_table([row for row, _ in every]),)))


def _table(rows: Sequence[tuple[str, str, str]]) -> Table:
    return Table(("setting", "value", "what it is"), tuple((Code(key), value, about) for key, value, about in rows), wordy=True)


def last_part(path: str) -> str:
    """What a path ends in, whichever system it is from; names of the hub stay whole."""
    if PurePosixPath(path).is_absolute():
        return f"…/{PurePosixPath(path).name}"
    return f"…/{PureWindowsPath(path).name}" if PureWindowsPath(path).is_absolute() else path


def _rows(table: BaseModel, *, inside: str = "") -> Iterator[tuple[tuple[str, str, str], bool]]:
    """Key, value, description and whether it is the default, for each setting of a table and of those within it."""
    for key, field in type(table).model_fields.items():
        value, name = getattr(table, key), f"{inside}{key}"
        if field.exclude:
            continue
        if isinstance(value, BaseModel):
            yield from _rows(value, inside=f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for number, one in enumerate(value, 1):
                yield from _rows(one, inside=f"{name}.{number}." if len(value) > 1 else f"{name}.")
        else:
            is_default = not field.is_required() and value == field.get_default(call_default_factory=True)
            yield (name, _shown(key, value), field.description or ""), is_default


def _shown(key: str, value: Any) -> str:
    """A value as TOML would have it, near enough to be read."""
    if value is None:
        return "not set"
    if key in PATHS or isinstance(value, Path):
        return last_part(str(value))
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(key, one) for one in value) or "none"
    return value if isinstance(value, str) and value else json.dumps(value)
