"""What is said about a picture: read beside it, with the trigger word in it, and left out now and then."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from sdlora.errors import UserError


def read_caption(picture: Path) -> str:
    """The text of the `.txt` file beside a picture, lines joined.

    Raises:
        UserError: if there is none, it is empty, or it is not UTF-8.
    """
    path = picture.with_suffix(".txt")
    if not path.is_file():
        raise UserError(f"Picture {picture} has no caption; write what it shows into {path.name} beside it.")
    try:
        caption = " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as problem:
        raise UserError(f"Caption {path} is not UTF-8; save it anew as UTF-8 text.") from problem
    if not caption:
        raise UserError(f"Caption {path} is empty; write what the picture shows into it.")
    return caption


def with_trigger(caption: str, trigger: str) -> str:
    """The caption, with the trigger word put first unless it is already in it as a word of its own."""
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"


def is_dropped(position: int, *, seed: int, share: float) -> bool:
    """Whether the sample at this position of the run has its caption left out: the base then keeps its unconditional answer.

    Args:
        position: 0 for the run's first sample, counted over all epochs.
        share: 0 to 1.
    """
    return bool(np.random.default_rng([seed, position, 11]).random() < share)
