"""A run folder read back: what happened in it, as plain records in the order of steps.

A run may have been torn apart and sewn together. A line that a crash has cut is left out and counted, a step that was taken twice counts
as it was taken last, and what was noted after the step that a run was continued from is forgotten, because the files forget it too. The
time that counts is the time at work: neither pauses nor the hours between a crash and its continuation.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sdlora import config, run_folder
from sdlora.amounts import duration
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.events import Started, Step, Validated

FORECAST = ("step_s", "course_s", "peak_bytes", "disk_bytes")


@dataclass(frozen=True)
class Happening:
    """Something worth telling.

    Args:
        time_s: when, in seconds since 1970; None if the row does not say.
    """

    time_s: float | None
    words: str


@dataclass(frozen=True)
class LoRAPath:
    """A LoRA file of the run and the step that it is of."""

    step: int
    path: Path


@dataclass(frozen=True)
class Facts:
    """What a report is written from.

    Args:
        started: None if the run has not come so far.
        steps, looks: one for each step, ascending; looks are those at held-out pictures.
        samples: pictures by step and then by prompt; only those that are there.
        loras: the files that are there, ascending; the result is the last.
        forecast: values of `FORECAST`, and `measured` what became of them; only those that are known.
        is_done: whether the result was written.
        unreadable: how many lines of the log could not be read.
    """

    run: Config
    folder: Path
    started: Started | None
    steps: tuple[Step, ...]
    looks: tuple[Validated, ...]
    samples: Mapping[int, Mapping[int, Path]]
    loras: tuple[LoRAPath, ...]
    happenings: tuple[Happening, ...]
    forecast: Mapping[str, float]
    measured: Mapping[str, float]
    is_done: bool
    unreadable: int

    @property
    def last_step(self) -> int:
        """The last step that was taken, 0 for none."""
        return self.steps[-1].step if self.steps else 0


@dataclass
class _Log:
    """What the rows read so far come to."""

    started: Started | None = None
    steps: dict[int, Step] = field(default_factory=dict)
    looks: dict[int, Validated] = field(default_factory=dict)
    samples: dict[int, list[str]] = field(default_factory=dict)
    happenings: list[Happening] = field(default_factory=list)
    forecast: dict[str, float] = field(default_factory=dict)
    peak_bytes: float = 0.0
    unreadable: int = 0


def read(folder: Path) -> Facts:
    """Reads the run in a folder, finished or not.

    Raises:
        UserError: if the folder holds no run, or its config cannot be read.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} holds no run (there is no metrics.jsonl); name the folder that a run was written to.")
    run = config.load(folder / "config.toml")
    rows, torn = _rows(path)
    log = _Log(unreadable=torn)
    for number, row in enumerate(rows):
        try:
            _take(log, row, rows[number + 1] if number + 1 < len(rows) else None)
        except (KeyError, TypeError, ValueError):
            log.unreadable += 1
    result = run_folder.result_path(folder, run.name)
    steps = tuple(log.steps[step] for step in sorted(log.steps))
    last = steps[-1].step if steps else 0
    return Facts(
        run=run, folder=folder, started=log.started, steps=steps, looks=tuple(log.looks[step] for step in sorted(log.looks)),
        samples={step: _pictures(folder, names) for step, names in sorted(log.samples.items())},
        loras=tuple(_loras(folder, run.name, result, last)), happenings=tuple(log.happenings), forecast=log.forecast,
        measured=_measured(folder, steps, rows, log.peak_bytes), is_done=result.is_file(), unreadable=log.unreadable,
    )  # fmt: skip


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are whole, and how many are not."""
    rows, torn = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if row := run_folder.parsed(line):
            rows.append(row)
        else:
            torn += bool(line.strip())
    return rows, torn


def _take(log: _Log, row: dict[str, Any], following: dict[str, Any] | None) -> None:
    """Takes one row into account; an event that a report has no use for is passed over."""
    match row["event"]:
        case "started":
            log.started = _started(row)
        case "continued":
            _forget_after(int(row["step"]), log)
        case "step":
            taken = Step(int(row["step"]), _number(row["loss"]), _number(row["rate"]), _number(row["step_s"]))
            log.steps[taken.step] = taken
        case "validated":
            look = look_of(row)
            log.looks[look.step] = look
        case "sampled":
            log.samples[int(row["step"])] = [Path(name).name for name in row["paths"]]
        case "forecast":
            log.forecast = {key: float(row[key]) for key in FORECAST if row.get(key) is not None}
    if row["event"] != "forecast":
        log.peak_bytes = max(log.peak_bytes, float(row.get("peak_bytes") or 0))
    if words := _told(row, following or {}):
        log.happenings.append(Happening(_time(row), words))


def _forget_after(step: int, log: _Log) -> None:
    """What was noted after a step that the run went back to."""
    for kept in (log.steps, log.looks, log.samples):
        for later in [one for one in kept if one > step]:
            del kept[later]


def _told(row: Mapping[str, Any], following: Mapping[str, Any]) -> str:
    """A row in words, if it is one that is told."""
    step = f"{int(row.get('step', 0)):,}"
    match row["event"]:
        case "started":
            if following.get("event") == "continued" and following.get("step"):
                return ""  # the next row tells it
            return f"Started, with {int(row['steps']):,} steps to take."
        case "continued":
            return " ".join([f"Went on after step {step}.", *(str(note) for note in row.get("notes", ()))])
        case "paused":
            began, ended = _time(row), _time(following)
            lasted = f" for {duration(ended - began)}" if began is not None and ended is not None else ""
            return f"Paused after step {step}{lasted}."
        case "alarm":
            return f"Step {step}: {row['words']}"
        case "stopped":
            return f"Stopped by request after step {step}."
        case "failed":
            return f"Ended by a mistake after step {step}: {row['words']}"
        case "done":
            return "Finished."
    return ""


def look_of(row: Mapping[str, Any]) -> Validated:
    """A look at held-out pictures, from its line in the metrics."""
    held_out = None if row["loss"] is None else _number(row["loss"])
    bands = tuple(_number(one) for one in row["bands"])
    return Validated(int(row["step"]), held_out, _number(row["seen_loss"]), bands, _number(row["drift"]))


def _started(row: Mapping[str, Any]) -> Started:
    return Started(
        int(row["pictures"]), int(row["modules"]), int(row["parameters"]), int(row["steps"]), str(row.get("base", "")),
        tuple(str(one) for one in row.get("limits", ())), int(row.get("held_out", 0)),
    )  # fmt: skip


def _number(value: Any) -> float:
    """A number; what was not finite may stand as null."""
    return math.nan if value is None else float(value)


def _time(row: Mapping[str, Any]) -> float | None:
    value = row.get("time_s")
    return float(value) if isinstance(value, int | float) else None


def _pictures(folder: Path, names: Sequence[str]) -> dict[int, Path]:
    """The sample pictures that are there, by the number of their prompt, which their name ends in."""
    paths = [folder / "samples" / name for name in names]
    numbers = [re.search(r"-(\d+)\.png$", path.name) for path in paths]
    return {int(number[1]): path for number, path in zip(numbers, paths, strict=True) if number and path.is_file()}


def _loras(folder: Path, name: str, result: Path, last_step: int) -> list[LoRAPath]:
    saved = [LoRAPath(step, path) for step, path in run_folder.checkpoints(folder, name).items()]
    return [*saved, *([LoRAPath(last_step, result)] if result.is_file() else [])]


def _measured(folder: Path, steps: Sequence[Step], rows: Sequence[Mapping[str, Any]], peak_bytes: float) -> dict[str, float]:
    """What became of what was forecast."""
    seconds = [one.step_s for one in steps if math.isfinite(one.step_s)]
    found = {
        "step_s": statistics.median(seconds) if seconds else 0.0,
        "course_s": _worked_s(rows) or sum(seconds),
        "peak_bytes": peak_bytes,
        "disk_bytes": float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())),
    }
    return {key: value for key, value in found.items() if value}


def _worked_s(rows: Sequence[Mapping[str, Any]]) -> float:
    """The time between rows, without pauses and without what passed until a run was continued; 0 if rows have no times."""
    total = 0.0
    for before, after in itertools.pairwise(rows):
        began, ended = _time(before), _time(after)
        at_work = before["event"] != "paused" and after["event"] not in ("continued", "started")
        total += max(0.0, ended - began) if at_work and began is not None and ended is not None else 0.0
    return total


def clock(time_s: float) -> str:
    """A moment as the reader's clock shows it."""
    return datetime.fromtimestamp(time_s).astimezone().strftime("%d %b %Y, %H:%M")
