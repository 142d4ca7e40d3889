"""How each picture is seen: at which training size, which part of it, mirrored or not.

A picture's views are few and decided before anything is encoded, so that all of them can be encoded once and kept. Random crops are
drawn a few times per picture from (seed, picture), and a visit chooses among the views by (seed, epoch, visit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdlora import buckets
from sdlora.buckets import Fit
from sdlora.dataset import Sample, Visit


@dataclass(frozen=True)
class View:
    """One way in which a picture is seen.

    Args:
        original_px: the upright picture's own width and height.
        mask: a greyscale picture of the same size that says where the loss counts, or "alpha" for the picture's own alpha channel.
    """

    picture: Path
    original_px: tuple[int, int]
    fit: Fit
    flipped: bool = False
    mask: Path | str | None = None


@dataclass(frozen=True)
class Item:
    """A sample at one resolution, with all the views that it can be seen in; they are of one size."""

    sample: int
    repeats: int
    views: tuple[View, ...]

    @property
    def shape_px(self) -> tuple[int, int]:
        """Width and height at which it is trained."""
        return self.views[0].fit.size_px


def items(
    samples: Sequence[Sample],
    sizes_px: Sequence[tuple[int, int]],
    *,
    resolutions_px: Sequence[int],
    step_px: int,
    most_aspect: float = 2.0,
    most_shapes: int | None = None,
    upscale: bool = True,
    crop: str = "centre",
    crops: int = 1,
    flip: bool = False,
    seed: int = 0,
) -> tuple[Item, ...]:
    """What is trained on: every sample at every resolution.

    Args:
        sizes_px: upright width and height of each sample's picture.
        resolutions_px: sides of the squares whose area the training sizes have.
        step_px: sides of training sizes are multiples of this.
        most_aspect: the longest training size is this many times as long as wide.
        most_shapes: cap on the number of training sizes per resolution.
        upscale: whether pictures smaller than their training size are enlarged.
        crop: "centre", "top" or "random".
        crops: how many random crops each picture gets.
        flip: whether pictures are also seen mirrored.
    """
    found = []
    for side_px in resolutions_px:
        table = buckets.table(side_px=side_px, step_px=step_px, most_aspect=most_aspect, most=most_shapes)
        for i, (sample, size_px) in enumerate(zip(samples, sizes_px, strict=True)):
            bucket = buckets.choose(size_px, table)
            places = [_place(seed, i, k) for k in range(crops)] if crop == "random" else [(0.5, 0.5)]
            fits = [buckets.fit(size_px, bucket, crop=crop, place=place, upscale=upscale, step_px=step_px) for place in places]
            mask = sample.mask or ("alpha" if sample.alpha_mask else None)
            mirrors = (False, True) if flip else (False,)
            views = [View(sample.picture, size_px, fit, mirrored, mask) for fit in fits for mirrored in mirrors]
            found.append(Item(i, sample.repeats, tuple(views)))
    return tuple(found)


def chosen(item: Item, visit: Visit, *, seed: int, epoch: int) -> int:
    """Which of its views an item shows at a visit."""
    if len(item.views) == 1:
        return 0
    return int(np.random.default_rng([seed, epoch, *visit, 19]).integers(len(item.views)))


def _place(seed: int, sample: int, number: int) -> tuple[float, float]:
    u, v = np.random.default_rng([seed, sample, number, 23]).random(2)
    return float(u), float(v)
