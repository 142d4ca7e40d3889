"""The run folder: what a run leaves behind, and the only thing between training and whoever watches it.

config.toml      the resolved config; it repeats the run
metrics.jsonl    one line per step and per event, each with its time
checkpoints/     <name>-<step>.safetensors, each a whole LoRA file
state/           <step>/, what the run can go on from
samples/         <step>-<number>.png, drawn while training; step 0 is the base
stop, pause, save, sample    made by whoever asks for it: saves and ends after the step; waits until the file is gone; saves; draws
run.lock         whose run it is while it runs
<name>.safetensors, verdict.json, report.html, report.md, compare.png    what it ends with
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdlora import config, files, run_lock
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.events import Event, Sampled

REQUESTS = ("stop", "pause", "save", "sample")
HALF_WRITTEN = re.compile(r"\..+\.\d+\.part")  # as `files.write` names it


@contextmanager
def opened(folder: Path, *, resume: bool) -> Iterator[None]:
    """The folder as this run's own for as long as the block lasts; one that nothing was written to vanishes again.

    Args:
        resume: whether a run that is there already is gone on with.

    Raises:
        UserError: if it holds a run and is not to be resumed, another run is at work in it, or it cannot be written.
    """
    if not resume:
        check_free(folder)
    with run_lock.held(folder):
        yield


def check_free(folder: Path) -> None:
    """Refuses a folder that another run has written to: nothing of a user's is ever written over.

    Raises:
        UserError: if it holds a run already.
    """
    if (folder / "metrics.jsonl").exists():
        ended = ended_at(folder)
        longer = f"; to train it longer, --resume {folder} {longer_by(ended)}" if ended else ""
        raise UserError(f"Run folder {folder} holds a run already; choose another with --out, or move it away{longer}.")


def is_unfinished(folder: Path) -> bool:
    """Whether it holds a run that has not come to its end."""
    return (folder / "metrics.jsonl").exists() and not _is_done(rows(folder))


def ended_at(folder: Path) -> int:
    """After how many steps the run in it has come to its end; 0 if it has not."""
    return _end(rows(folder))


def longer(ended: int) -> int:
    """The steps to lengthen a run to: twice as many, since with a rate that falls to nothing half as many more teach it next to nothing."""
    return 2 * ended


def longer_by(ended: int) -> str:
    """The words of a command that lengthens a run that has come to its end."""
    return f"--set steps=N --allow-changes with N above {ended}"


def _end(noted: list[dict[str, Any]]) -> int:
    ends = [row.get("step") for row in noted if _is_result(row)]
    return int(ends[-1] or 0) if ends and _is_done(noted) else 0


def _is_done(noted: list[dict[str, Any]]) -> bool:
    return any(row["event"] == "done" for row in noted)


def _is_result(row: dict[str, Any]) -> bool:
    """Whether it tells of the result being written; checkpoints lie deeper."""
    path = str(row.get("path", ""))
    return row["event"] == "saved" and path == Path(path).name != ""


def begin(folder: Path, run: Config, *, step: int) -> list[str]:
    """Makes ready for the steps after `step`: the resolved config is written, and what was noted of later steps is taken away.

    What an earlier end has left, after fewer steps than the run shall take now, stays as the checkpoint of its step.

    Returns:
        A sentence where such an end now is, if there is one.

    Raises:
        UserError: if it cannot be written.
    """
    for name in ("checkpoints", "samples"):
        files.make_folder(folder / name)
    for name in REQUESTS:
        forget(folder, name)
    _sweep(folder)
    noted, told = _with_end_kept(folder, run) if step else ([], [])
    files.write(folder / "config.toml", config.to_toml(run).encode())
    kept = [row for row in noted if row.get("step", 0) <= step and not _is_of_the_end(row, run)]
    files.write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept).encode())
    return told


def _with_end_kept(folder: Path, run: Config) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of the metrics; if a run that had ended is lengthened, its result has become a checkpoint, also in its verdict.

    And a sentence about that, if so.
    """
    found = rows(folder)
    ended = _end(found)
    if not 0 < ended < run.steps:
        return found, []
    path, place, verdict_path = result_path(folder, run.name), checkpoint_path(folder, run.name, ended), folder / "verdict.json"
    moved = {"path": place.relative_to(folder).as_posix()}
    if path.is_file():
        files.write(place, path.read_bytes())
        with suppress(OSError, ValueError):
            verdict = json.loads(verdict_path.read_text(encoding="utf-8"))
            if isinstance(verdict, dict) and verdict.get("path") == path.name:
                files.write(verdict_path, json.dumps(verdict | moved, indent=2, ensure_ascii=False).encode())
        path.unlink()
    told = f"{path.name}, its end after {ended} steps, is {moved['path']} from now on, until the new end is written"
    return [row | moved if _is_result(row) else row for row in found], [told]


def _is_of_the_end(row: dict[str, Any], run: Config) -> bool:
    """Whether it was noted after the last step: a run that goes on does all of that anew, however little of it was left."""
    return row["event"] in ("reported", "done") or (row["event"] == "saved" and row["step"] >= run.steps)


def _sweep(folder: Path) -> None:
    """Takes away what a killed run has left half written; this run holds the folder, so nobody else writes there."""
    for place in (folder, folder / "checkpoints", folder / "samples"):
        for path in place.glob(".*.part"):
            if HALF_WRITTEN.fullmatch(path.name):
                with suppress(OSError):  # it costs space, no more
                    path.unlink()


def log(folder: Path, **row: Any) -> None:
    """Adds one line to `metrics.jsonl`.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"time_s": round(time.time(), 3)}) + "\n")
    except OSError as problem:
        raise UserError(
            f"{folder / 'metrics.jsonl'} could not be written ({problem.strerror}); the newest state in {folder / 'state'} stands. "
            "Free space or bring the folder back, and give the same command again."
        ) from problem


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that a crash has torn is left out."""
    return list(each_row(folder))


def each_row(folder: Path) -> Iterator[dict[str, Any]]:
    """The same one by one: a run of 10,000 steps looks for a few of 10,000 lines, which would take 10 MB together."""
    with suppress(OSError), (folder / "metrics.jsonl").open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if row := parsed(line):
                yield row


def parsed(line: str) -> dict[str, Any] | None:
    """One line of `metrics.jsonl`; None if it is torn, or tells of no event."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("event"), str) else None


def ask(folder: Path, request: str) -> None:
    """Asks the run in a folder for one of `REQUESTS`, to be met after its current step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / request).touch()


def is_asked(folder: Path, request: str) -> bool:
    """Whether somebody has asked for it."""
    return (folder / request).exists()


def forget(folder: Path, request: str) -> None:
    """Takes a request away, once it has been met."""
    (folder / request).unlink(missing_ok=True)


def sample_path(folder: Path, step: int, number: int) -> Path:
    """Where a sample picture of a step lies."""
    return folder / "samples" / f"{step:06d}-{number}.png"


def newest_sample(folder: Path) -> Path | None:
    """The first picture of the newest samples, if any were drawn."""
    pictures = sorted((folder / "samples").glob("*-0.png"))
    return pictures[-1] if pictures else None


def checkpoint_path(folder: Path, name: str, step: int) -> Path:
    """Where the LoRA of a step lies."""
    return folder / "checkpoints" / f"{name}-{step:06d}.safetensors"


def lora_path(folder: Path, run: Config, step: int) -> Path:
    """Where the LoRA of a step lies, that of the last being the result."""
    return result_path(folder, run.name) if step == run.steps else checkpoint_path(folder, run.name, step)


def checkpoints(folder: Path, name: str) -> dict[int, Path]:
    """The LoRA files of a run's steps that are there, by step, ascending."""
    named = re.compile(re.escape(name) + r"-(\d{6,})\.safetensors")
    return dict(sorted((int(found[1]), path) for path in (folder / "checkpoints").glob("*") if (found := named.fullmatch(path.name))))


def has_lora(folder: Path) -> bool:
    """Whether a run has saved a LoRA, its result or that of a step."""
    return any(next(place.glob("*.safetensors"), None) for place in (folder, folder / "checkpoints"))


def states_path(folder: Path) -> Path:
    """Where the states lie that the run can go on from."""
    return folder / "state"


def result_path(folder: Path, name: str) -> Path:
    """Where the finished LoRA lies."""
    return folder / f"{name}.safetensors"


def event_row(event: Event, folder: Path) -> dict[str, Any]:
    """An event as a line of `metrics.jsonl`: its name and its fields, paths from the run folder on."""
    row = {"event": type(event).__name__.lower(), **{name: _plain(value, folder) for name, value in asdict(event).items()}}
    return row | {"paths": [path.name for path in event.paths]} if isinstance(event, Sampled) else row


def _plain(value: Any, folder: Path) -> Any:
    if isinstance(value, Path):
        return str(value.relative_to(folder)) if value.is_relative_to(folder) else str(value)
    return [_plain(one, folder) for one in value] if isinstance(value, list | tuple) else value
