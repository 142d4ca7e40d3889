"""Which checkpoint of a run a person likes best: their word stands beside the run's own recommendation, and neither changes the other.

`chosen.json` in the run folder holds the step and the strength. It is written by whoever looks at pictures, and read by whoever offers
a file of the run.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from sdlora import files, run_folder, runs
from sdlora.errors import UserError
from sdlora.runs import Best, Run


@dataclass(frozen=True)
class Chosen:
    """A checkpoint's step and the strength at which it is to be used."""

    step: int
    strength: float


def mark_best(folder: Path, step: int, strength: float) -> None:
    """Keeps a choice; an earlier one is forgotten.

    Args:
        folder: the run's.
        step: of a checkpoint, 1 or more.
        strength: -2 to 2, not 0.

    Raises:
        UserError: if the folder is no run's, a number is out of range, or it cannot be written.
    """
    if not runs.is_run(folder):
        raise UserError(f"{folder} is no run folder, so no checkpoint of it can be marked; choose a LoRA that a run has made.")
    if step < 1 or not math.isfinite(strength) or not 0 < abs(strength) <= 2:
        raise UserError(f"Step {step} at strength {strength:g} cannot be marked; give a step from 1 and a strength from -2 to 2, not 0.")
    files.write(folder / "chosen.json", json.dumps({"step": step, "strength": strength}).encode() + b"\n")


def read(folder: Path) -> Chosen | None:
    """The choice, None if there is none or it cannot be read."""
    try:
        told = json.loads((folder / "chosen.json").read_text(encoding="utf-8"))
        found = Chosen(int(told["step"]), float(told["strength"]))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return found if found.step >= 1 and 0 < abs(found.strength) <= 2 else None


def marked(run: Run) -> Best | None:
    """The checkpoint that a person has marked, or the result if they marked the last step; None if its file is gone."""
    told = read(run.folder)
    if told is None:
        return None
    result = run_folder.result_path(run.folder, run.name)
    ended = {run.steps: result} if result.parent == run.folder and result.is_file() else {}  # a name is a stranger's word
    path = (ended | run_folder.checkpoints(run.folder, run.name)).get(told.step)
    return Best(told.step, told.strength, "marked by a person", path=path) if path else None


def best(run: Run) -> Best | None:
    """What is offered of a run: what a person has marked goes before what the run recommends of itself."""
    return marked(run) or run.best
