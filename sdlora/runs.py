"""The runs below a folder, as a person asks for them: how far each is, what it ended with, which checkpoint it recommends.

A run folder is the only witness of its run, and is read as such: nothing is written, and no config object is made of it, so that a folder
of an older version, or one that a crash or a person has damaged, is a row that says so instead of the end of the list.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora import run_folder, run_lock

DEPTH = 3  # folders below the one that is asked for: a sweep's runs lie two below `runs`
_SAMPLE = re.compile(r"(\d+)-(\d+)\.png")
_LIFE = ("started", "continued", "stopped", "failed", "done")  # the last of these says what has become of a run that is not at work


@dataclass(frozen=True)
class Best:
    """What a run recommends of itself.

    Args:
        step: of the checkpoint.
        strength: at which it is to be used.
        reason, warning: a sentence each; "" for no warning.
        path: the LoRA file; None if it is no longer there.
    """

    step: int
    strength: float = 1.0
    reason: str = ""
    warning: str = ""
    path: Path | None = None


@dataclass(frozen=True)
class Run:
    """One run folder.

    Args:
        state: "running", "paused", "done", "stopped" (somebody asked it to end), "failed" (by a mistake that it names), "interrupted" (it
            ended without a word and can go on), or "broken" (its config cannot be read).
        step, steps: how far it is, of how many.
        when_s: unix time of its last sign of life; None if it gave none.
        best: what it recommends, if it came to that.
        size_bytes: of all files in the folder.
        trouble: what is wrong with the folder, in a sentence; "" if nothing is.
    """

    folder: Path
    name: str
    state: str
    step: int = 0
    steps: int = 0
    when_s: float | None = None
    best: Best | None = None
    size_bytes: int = 0
    base: str = ""
    kind: str = ""
    trigger: str = ""
    trouble: str = ""


@dataclass(frozen=True)
class Drawn:
    """A sample picture of a run, with the prompt that stands in its PNG text ("" if there is none)."""

    step: int
    number: int
    path: Path
    prompt: str


def find(folder: Path = Path("runs")) -> list[Run]:
    """All runs in a folder and up to `DEPTH` below it, the one that gave the latest sign of life first."""
    return sorted((look(one) for one in _folders(folder, DEPTH)), key=lambda run: (-(run.when_s or 0.0), str(run.folder)))


def is_run(folder: Path) -> bool:
    """Whether a folder is, or was, a run's."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError:
        return False
    return "metrics.jsonl" in names or {"config.toml", "checkpoints"} <= names


def look(folder: Path) -> Run:
    """What one run folder tells, however damaged it is."""
    rows = run_folder.rows(folder)
    settings, trouble = settings_of(folder)
    started: dict[str, Any] = next((row for row in reversed(rows) if row["event"] == "started"), {})  # it may have been made longer
    best, verdict_trouble = _best(folder)
    return Run(
        folder=folder,
        name=_words(settings, "name") or folder.name,
        state="broken" if trouble else _state(folder, rows),
        step=max((_whole(row.get("step")) for row in rows), default=0),
        steps=_whole(started.get("steps") or settings.get("steps")),
        when_s=max((row["time_s"] for row in rows if isinstance(row.get("time_s"), int | float)), default=None),
        best=best,
        size_bytes=_size(folder),
        base=_words(settings, "base"),
        kind=_words(settings, "kind"),
        trigger=_words(settings, "trigger"),
        trouble=trouble or verdict_trouble,
    )


def pictures(folder: Path) -> list[Drawn]:
    """The sample pictures of a run by step and number, with their prompts; what cannot be read as a picture is left out."""
    found = []
    for path in (folder / "samples").glob("*.png"):
        if (named := _SAMPLE.fullmatch(path.name)) and (prompt := prompt_in(path)) is not None:
            found.append(Drawn(int(named[1]), int(named[2]), path, prompt))
    return sorted(found, key=lambda one: (one.step, one.number))


def sample_prompts(folder: Path) -> list[str]:
    """The prompts of a run's samples: those of its config, else what its newest pictures say."""
    told = settings_of(folder)[0].get("sample_prompts")
    if isinstance(told, list) and (own := [words for words in told if isinstance(words, str) and words.strip()]):
        return own
    newest = run_folder.newest_sample(folder)
    step = newest.name.partition("-")[0] if newest else ""
    paths = [path for path in (folder / "samples").glob(f"{step}-*.png") if _SAMPLE.fullmatch(path.name)] if step.isdigit() else []
    said = (prompt_in(path) for path in sorted(paths, key=lambda path: int(path.stem.partition("-")[2])))
    return [words for words in said if words]


def prompt_in(path: Path) -> str | None:
    """The prompt that a picture was drawn from, "" if it does not say; None if it cannot be read as a picture."""
    try:
        with Image.open(path) as image:
            return prompt_of(str(image.info.get("parameters", "")))
    except (OSError, SyntaxError):
        return None


def prompt_of(settings: str) -> str:
    """The prompt in what A1111 calls a picture's `parameters`: all before the negative prompt and the line that begins with the steps."""
    before, found, _ = settings.rpartition("\nSteps: ")
    return (before if found else settings).partition("\nNegative prompt: ")[0].strip()


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """The run folders; links are not followed, so that there is no circle and nothing is listed twice."""
    if is_run(folder):
        yield folder
        return
    try:
        inside = sorted(one for one in folder.iterdir() if one.is_dir() and not one.is_symlink() and not one.name.startswith("."))
    except OSError:
        return
    for one in inside if depth else ():
        yield from _folders(one, depth - 1)


def settings_of(folder: Path) -> tuple[dict[str, Any], str]:
    """A run's resolved config as it lies in its folder, and what is wrong with it; without values if there is none."""
    path = folder / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), ""
    except OSError as problem:
        return {}, f"{path.name} cannot be read ({problem.strerror})."
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        return {}, f"{path.name} is not valid TOML ({problem})."


def _state(folder: Path, rows: list[dict[str, Any]]) -> str:
    if run_lock.owner(folder):
        return "paused" if (folder / "pause").exists() else "running"
    last = next((row["event"] for row in reversed(rows) if row["event"] in _LIFE), "")
    return last if last in ("done", "stopped", "failed") else "interrupted"


def _best(folder: Path) -> tuple[Best | None, str]:
    """The run's own recommendation, and what is wrong with it; a file outside of the folder is not taken for the run's."""
    path = folder / "verdict.json"
    if not path.exists():
        return None, ""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        file = _inside(folder, str(told["path"])) if told.get("path") else None
        reason, warning = (str(told.get(key) or "") for key in ("reason", "warning"))
        return Best(int(told["step"]), float(told["strength"]), reason, warning, file), ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None, f"{path.name} cannot be read, so nothing is recommended."


def _inside(folder: Path, name: str) -> Path | None:
    path = folder / name
    return path if path.is_file() and path.resolve().is_relative_to(folder.resolve()) else None


def _size(folder: Path) -> int:
    """Bytes of all files; one that vanishes meanwhile counts as nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _words(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key, "")
    return value if isinstance(value, str) else ""


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
