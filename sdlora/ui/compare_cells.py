"""A cell of a drawn sheet as something to go on with: a setting for Generate, or its run's best checkpoint.

A cell is called by its place, and looked up in the sheet that this browser session drew; no other session's can be reached.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora import chosen, sheets, shelf
from sdlora.errors import UserError
from sdlora.sheets import Cell, Sheet, Voice
from sdlora.ui import lora_shelf, words
from sdlora.ui import roots as places
from sdlora.ui.roots import Roots


@dataclass(frozen=True)
class Order:
    """What is to be drawn: on which base (as `base_files.load` calls it, and as the browser does), and where its LoRAs are by id."""

    base: str
    word: str
    sheet: Sheet
    keys: dict[Path, str]


@dataclass(frozen=True)
class Shown:
    """A drawn sheet as its session remembers it: the order and a picture's size in px."""

    order: Order
    size_px: tuple[int, int]


def voice_of(path: Path) -> Voice:
    """A LoRA file as the sheet calls it: a checkpoint, and the file that a run ended with, by run and step."""
    folder = shelf.run_of(path)
    if folder is None:
        return Voice(path, path.stem)
    run = lora_shelf.look(folder)
    step = shelf.step_of(path) or (run.steps if path.stem == run.name else 0)
    return Voice(path, run.name, step, folder) if step else Voice(path, path.stem)


def cell_at(shown: Shown | None, x: float, y: float) -> str | None:
    """The id of the cell at a point of the finished sheet; None beside the cells."""
    found = sheets.frame(shown.order.sheet, shown.size_px).cell_at(x, y) if shown else None
    return f"{found[0]}-{found[1]}" if found else None


def cell_of(shown: Shown | None, key: str | None) -> Cell:
    """The cell of an id.

    Raises:
        UserError: if there is no sheet or no such cell.
    """
    found = re.fullmatch(r"([0-9]{1,3})-([0-9]{1,3})", key) if isinstance(key, str) else None
    if shown is None or found is None:
        raise UserError("No picture is chosen; draw a sheet, then click one of its pictures.")
    row, column, cells = int(found[1]), int(found[2]), shown.order.sheet.cells
    if row >= len(cells) or column >= len(cells[row]):
        raise UserError(f"The sheet has no cell {key}; click one of its pictures.")
    return cells[row][column]


def setting_of(shown: Shown | None, key: str | None) -> dict[str, Any]:
    """All that Generate needs to draw a cell's picture.

    Returns:
        base, lora (an id, "" for none), strength, prompt, negative, seed, steps, guidance, sampler, width_px, height_px.

    Raises:
        UserError: as `cell_of`.
    """
    cell = cell_of(shown, key)
    assert shown is not None
    request = cell.request
    told = {"lora": shown.order.keys[cell.lora.path], "strength": cell.lora.strength} if cell.lora else {"lora": "", "strength": 1.0}
    settings = ("prompt", "negative", "seed", "steps", "guidance", "sampler", "width_px", "height_px")
    return {"base": shown.order.word, **told, **{name: getattr(request, name) for name in settings}}


def mark_best(roots: Roots, shown: Shown | None, key: str | None, language: str) -> str:
    """Best was pressed: keeps a cell's checkpoint and strength as its run's best, and says so.

    Raises:
        UserError: if the cell's LoRA is none of a run, or is gone.
    """
    cell = cell_of(shown, key)
    assert shown is not None
    if cell.lora is None:
        raise UserError("That picture is the base's own, without a LoRA; choose one that a checkpoint drew.")
    path = places.find(shown.order.keys[cell.lora.path], lora_shelf.paths(roots), what="LoRA")
    folder, voice = shelf.run_of(path), voice_of(path)
    if folder is None or voice.step is None:
        raise UserError(f"{path.name} is not a checkpoint of a run here, so no run can have it as its best; use it as it is.")
    chosen.mark_best(folder, voice.step, cell.lora.strength)
    return words.say("compare.marked", language, step=voice.step, strength=f"{cell.lora.strength:g}", run=voice.name)


def checkpoints_of(roots: Roots, key: str) -> tuple[str, list[str]]:
    """A run's name and the ids of its checkpoints by step, the file of its end last.

    Raises:
        UserError: if there is no such run.
    """
    folder = places.find(key, lora_shelf.run_folders(roots), what="run")
    found = [(voice_of(path), one) for one, path in lora_shelf.paths(roots).items() if shelf.run_of(path) == folder]
    return lora_shelf.look(folder).name, [one for voice, one in sorted(found, key=lambda pair: pair[0].step or 0) if voice.step]
