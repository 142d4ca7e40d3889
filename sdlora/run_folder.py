"""The run folder: what a run leaves behind, and the only thing between training and whoever watches it.

config.toml      the resolved config; it repeats the run
metrics.jsonl    one line per step and per event
checkpoints/     <name>-<step>.safetensors, each a whole LoRA file
samples/         pictures drawn while training
<name>.safetensors
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdlora import config, lora_file
from sdlora.config import Config
from sdlora.errors import UserError


def create(folder: Path, run: Config) -> None:
    """Makes the folder and writes the resolved config.

    Raises:
        UserError: if it holds another run's files already, or cannot be written.
    """
    if (folder / "metrics.jsonl").exists():
        raise UserError(f"Run folder {folder} holds a run already; choose another with --out, or move it away.")
    try:
        for name in ("checkpoints", "samples"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"Run folder {folder} cannot be made ({problem.strerror}); choose another with --out.") from problem
    lora_file.write(folder / "config.toml", config.to_toml(run).encode())
    lora_file.write(folder / "metrics.jsonl", b"")


def log(folder: Path, row: dict[str, Any]) -> None:
    """Adds one line to `metrics.jsonl`."""
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def checkpoint_path(folder: Path, name: str, step: int) -> Path:
    """Where the LoRA of a step lies."""
    return folder / "checkpoints" / f"{name}-{step:06d}.safetensors"


def result_path(folder: Path, name: str) -> Path:
    """Where the finished LoRA lies."""
    return folder / f"{name}.safetensors"
