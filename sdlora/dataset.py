"""Folders of pictures with captions, and the order in which a run sees them.

The order is a function of (seed, epoch): no state to save, so a run that goes on sees what it would have seen. Each epoch holds
each picture exactly `repeats` times; batches run across the end of an epoch, so nothing is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdlora.captions import read_caption, with_trigger
from sdlora.errors import UserError
from sdlora.images import SUFFIXES


@dataclass(frozen=True)
class Sample:
    """One picture with its caption, seen `repeats` times per epoch."""

    picture: Path
    caption: str
    repeats: int = 1


def scan(folder: Path, *, trigger: str, repeats: int = 1) -> list[Sample]:
    """All pictures below a folder with their captions, sorted by name.

    Raises:
        UserError: if the folder is missing or holds no picture, or a picture has no caption.
    """
    if not folder.is_dir():
        raise UserError(f"Data folder {folder} does not exist; it should hold pictures, each with a .txt caption beside it.")
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not pictures:
        raise UserError(f"Data folder {folder} holds no pictures; {', '.join(sorted(SUFFIXES))} are read.")
    return [Sample(path, with_trigger(read_caption(path), trigger), repeats) for path in pictures]


def epoch_order(samples: list[Sample], *, seed: int, epoch: int) -> list[int]:
    """Indices into `samples` for one epoch, each `repeats` times, shuffled by (seed, epoch)."""
    every = np.repeat(np.arange(len(samples)), [sample.repeats for sample in samples])
    return [int(i) for i in np.random.default_rng([seed, epoch, 13]).permutation(every)]


def batch_at(samples: list[Sample], *, seed: int, batch_index: int, batch: int) -> list[int]:
    """Indices of the samples of one batch, counted from the run's first."""
    length = sum(sample.repeats for sample in samples)
    positions = range(batch_index * batch, (batch_index + 1) * batch)
    orders = {epoch: epoch_order(samples, seed=seed, epoch=epoch) for epoch in {p // length for p in positions}}
    return [orders[p // length][p % length] for p in positions]
