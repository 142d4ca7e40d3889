"""What a picture's pixels say about it: how blurred it is, whether it has bars or is empty, and which others look the same.

Measured on drawings as well as photographs, because most people train on one or the other. Blur is the width of the sharpest edges
and not the amount of detail, so that a flat drawing with crisp lines is sharp. Likeness is the correlation of two small pictures and
not a hash of signs, which says nothing where neighbours are equal: among 30 drawings on flat backgrounds, different ones came as near
as 4 of 64 bits by dHash and 8 by pHash, and copies (JPEG of quality 30, a third of the size, brighter by a fourth, turned by 2°) as far
as 14 and 16. By correlation, different ones reach 0.84 and those copies keep 0.92.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]

THUMB_PX = 16
ALIKE = 0.92  # correlation of 16 × 16 thumbnails; see above, and `tests/test_dataset_report.py` for the edits that stay above it

_SHARPEST = 99.9  # percentile of the edges' strength: one pixel in a thousand lies on an edge even in a flat drawing
_BLANK = 8  # grey levels from the darkest to the brightest
_NEAR = 0.16  # of the picture's range: what JPEG of quality 50 leaves of a hard edge in the bar beside it stays below
_FAR = 0.06  # from this difference on something is not the bar, where many pixels have it
_STRAIGHT = 0.6  # of the line where a bar ends; a subject that touches a plain background does it at a point
_BLOCK = 1024  # rows compared at once, 4 MB for 1,000 pictures


@dataclass(frozen=True)
class Edges:
    """What lies along the sides of a picture.

    Args:
        bars: share of the area that bars of one colour take, on two opposite sides or all four; 0 to 1.
        empty: share of the area outside the box around everything that is not background, 0 to 1; 1 if nothing is.
    """

    bars: float
    empty: float


def grey(image: Image.Image) -> Array:
    """The picture as grey levels [H, W], 0 to 255."""
    return np.asarray(image.convert("L"), dtype=np.float32)


def blur_px(levels: Array) -> float:
    """By about how many pixels (standard deviation of a Gaussian) the sharpest edges are blurred.

    A step of height C blurred by σ has a greatest second derivative of C / (√(2πe) σ²), so σ = √(0.242 / s) with s the 99.9th percentile
    of |Laplacian| by the picture's range. It is exact for edges of the whole range, up to 0.8 for what is sharp, and too low beyond 3,
    where the rounding to 255 levels is sharper than the edges. A picture that shows nothing gets 0.

    Args:
        levels: at the size at which sharpness matters, that of training.
    """
    span = float(np.ptp(levels)) if levels.size else 0.0
    if span < _BLANK or min(levels.shape) < 3:
        return 0.0
    around = levels[:-2, 1:-1] + levels[2:, 1:-1] + levels[1:-1, :-2] + levels[1:-1, 2:]
    strength = float(np.percentile(np.abs(4 * levels[1:-1, 1:-1] - around), _SHARPEST))
    return math.sqrt(span / (math.sqrt(2 * math.pi * math.e) * max(strength, 0.5)))


def is_blank(image: Image.Image) -> bool:
    """Whether all of the picture is one colour, give or take 8 levels of 255."""
    return all(high - low < _BLANK for low, high in image.getextrema())  # type: ignore[misc]


def edges(image: Image.Image) -> Edges:
    """Bars and empty margins of an RGB picture; a thumbnail of 128 px and more is enough.

    A margin is what has the colour of the outermost line. It is a bar only if it ends in a straight line and its opposite does too:
    a plain background ends where something touches it, and a clear sky has no counterpart below.
    """
    pixels = np.asarray(image, dtype=np.int16)
    height, width = pixels.shape[:2]
    turned = pixels.swapaxes(0, 1)
    near, far = (max(_BLANK, share * int(np.ptp(pixels))) for share in (_NEAR, _FAR))
    top, bottom, left, right = (_margin(lines, near) for lines in (pixels, pixels[::-1], turned, turned[::-1]))
    if top + bottom >= height or left + right >= width:
        return Edges(bars=0.0, empty=1.0)
    across, down = slice(left, width - right), slice(top, height - bottom)
    level = _is_bar(pixels[:, across], top, far) and _is_bar(pixels[::-1, across], bottom, far)
    upright = _is_bar(turned[:, down], left, far) and _is_bar(turned[::-1, down], right, far)
    seen = (1 - level * (top + bottom) / height) * (1 - upright * (left + right) / width)
    return Edges(bars=1 - seen, empty=1 - (height - top - bottom) * (width - left - right) / (height * width))


def fingerprint(image: Image.Image) -> Array:
    """The picture as 16 × 16 RGB levels [768] of mean 0 and length 1, so that a product of two is their correlation.

    Brightness and contrast leave it as it is; re-encoding, resizing and a crop of 3 % nearly so. A picture that shows nothing is like no
    other: zeros.
    """
    levels = np.asarray(image.convert("RGB").resize((THUMB_PX, THUMB_PX), Image.Resampling.BOX), dtype=np.float32).ravel()
    if is_blank(image):
        return np.zeros_like(levels)
    levels -= levels.mean()
    return levels / np.float32(max(float(np.linalg.norm(levels)), 1.0))


def mirrored(fingerprints: Array) -> Array:
    """The fingerprints [..., 768] of the mirrored pictures."""
    return fingerprints.reshape(*fingerprints.shape[:-1], THUMB_PX, THUMB_PX, 3)[..., ::-1, :].reshape(fingerprints.shape)


def alike(fingerprints: Array, *, least: float = ALIKE) -> list[tuple[int, int, bool]]:
    """Pairs of pictures that look the same: (first, second, whether mirrored), first < second.

    Args:
        fingerprints: [N, 768]; N = 5,000 takes half a second.
        least: correlation from which on two are the same, 0 to 1.
    """
    found: dict[tuple[int, int], bool] = {}
    for flip, others in ((True, mirrored(fingerprints)), (False, fingerprints)):  # what is alike either way is not called mirrored
        for start in range(0, len(fingerprints), _BLOCK):
            rows, columns = np.nonzero(fingerprints[start : start + _BLOCK] @ others.T >= least)
            found |= {(start + int(i), int(j)): flip for i, j in zip(rows, columns, strict=True) if start + i < j}
    return [(i, j, flip) for (i, j), flip in sorted(found.items())]


def groups(count: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Sets of at least two that are connected by pairs, each ascending, in the order of their first.

    Args:
        count: numbers go from 0 to count - 1.
    """
    root = list(range(count))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for one, other in pairs:
        low, high = sorted((find(one), find(other)))
        root[high] = low
    sets: dict[int, list[int]] = {}
    for i in range(count):
        sets.setdefault(find(i), []).append(i)
    return [one for one in sets.values() if len(one) > 1]


def _margin(lines: NDArray[Any], near: float) -> int:
    """How many of the lines, counted from the first, have the first one's colour; one pixel in 50 may differ."""
    same = np.abs(lines - np.median(lines[0], axis=0)).max(axis=-1) < near
    differing = np.flatnonzero((~same).mean(axis=1) > 0.02)
    return int(differing[0]) if len(differing) else len(lines)


def _is_bar(lines: NDArray[Any], depth: int, far: float) -> bool:
    """Whether a margin of this depth ends in a straight line: two lines on (the next may be blurred) most pixels have another colour."""
    if depth == 0:
        return False
    beyond = lines[min(depth + 1, len(lines) - 1)]
    return bool((np.abs(beyond - np.median(lines[0], axis=0)).max(axis=-1) >= far).mean() >= _STRAIGHT)
