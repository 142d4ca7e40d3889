"""The run folder: what a run leaves behind, and the only thing between training and whoever watches it.

config.toml      the resolved config; it repeats the run
metrics.jsonl    one line per step and per event
checkpoints/     <name>-<step>.safetensors, each a whole LoRA file
samples/         <step>-<number>.png, drawn while training; step 0 is the base
stop             made by whoever wants the run to end: it saves a checkpoint and ends after the step
<name>.safetensors
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdlora import config, files
from sdlora.config import Config
from sdlora.errors import UserError


def check_free(folder: Path) -> None:
    """Refuses a folder that another run has written to: nothing of a user's is ever written over.

    Raises:
        UserError: if it holds a run already.
    """
    if (folder / "metrics.jsonl").exists():
        raise UserError(f"Run folder {folder} holds a run already; choose another with --out, or move it away.")
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    files.make_folder(folder)  # what cannot be written is said before hours of work
    for one in made:
        one.rmdir()


def create(folder: Path, run: Config) -> None:
    """Makes the folder and writes the resolved config.

    Raises:
        UserError: if it holds a run already, or cannot be written.
    """
    check_free(folder)
    try:
        for name in ("checkpoints", "samples"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        forget_stop(folder)
    except OSError as problem:
        raise UserError(f"Run folder {folder} cannot be made ({problem.strerror}); choose another with --out.") from problem
    files.write(folder / "config.toml", config.to_toml(run).encode())
    files.write(folder / "metrics.jsonl", b"")


def log(folder: Path, **row: Any) -> None:
    """Adds one line to `metrics.jsonl`.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as problem:
        raise UserError(f"{folder / 'metrics.jsonl'} could not be written ({problem.strerror}); free space and start again.") from problem


def ask_to_stop(folder: Path) -> None:
    """Asks the run in a folder to save and end after its current step."""
    (folder / "stop").touch()


def is_asked_to_stop(folder: Path) -> bool:
    """Whether somebody has asked the run to end."""
    return (folder / "stop").exists()


def forget_stop(folder: Path) -> None:
    """Takes the request to end away, once it has been followed."""
    (folder / "stop").unlink(missing_ok=True)


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


def result_path(folder: Path, name: str) -> Path:
    """Where the finished LoRA lies."""
    return folder / f"{name}.safetensors"
