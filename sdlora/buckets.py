"""Training sizes of about one area, which of them suits a picture, and which part of the picture is then seen.

A base is trained at an area, not at a square: a table holds the shapes whose area is nearest to side², above it as well as below, and
there is no cap on a side that would make long shapes smaller. A shape is chosen by log aspect ratio, which is the same as by least
crop, and the same for portraits and landscapes to the last bit. All is arithmetic on whole pixels; opening pictures is for `images`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

Size = tuple[int, int]  # width and height in px

_NEAR = 0.05  # a width whose best height misses the area by more than this gets the next below and the next above ...
_FAR = 0.10  # ... but none that misses it by more than this: 10 % more area is 10 % more memory
_ABOVE_THE_HEAD = Fraction(1, 10)  # of what a "top" crop cuts off: pictures often have some room above the head


@dataclass(frozen=True)
class Fit:
    """How a picture becomes its training size: resized to `resized_px`, then cut to `size_px` from `left`, `top` of that."""

    resized_px: Size
    left: int
    top: int
    size_px: Size


def table(*, side_px: int, step_px: int = 64, most_aspect: float = 2.0, most: int | None = None) -> tuple[Size, ...]:
    """The training sizes of about side² pixels, portrait and landscape alike, the square always among them.

    For every width the height whose area is nearest to side²; where the step allows none within 5 %, both neighbours up to 10 %.
    With steps of 64 and aspects up to 2 the area is off by 3.5 % at most at 1024, 6.3 % at 768 and 9.4 % at 512; with steps of 32
    by 3.5 % at most at all three.

    Args:
        side_px: side of the square whose area is meant.
        step_px: width and height are multiples of this: 64, 32 (fewer pixels cut off, more shapes), or 8 for tiny bases.
        most_aspect: the longer side is at most this many times the shorter, at least 1.
        most: at most this many shapes, spread evenly by log aspect; as the table is symmetric around its square, an even number
            gives one fewer. Compiled shapes and small last batches stay few with it.

    Returns:
        (width, height) each, from the tallest to the widest.
    """
    square = max(1, math.floor(side_px / step_px + 0.5)) * step_px
    widths = range(step_px, int(side_px * most_aspect) + 1, step_px)
    pairs = {(width, height) for width in widths for height in _heights(width, side_px, step_px)}
    lying = {(max(pair), min(pair)) for pair in pairs}
    wide = sorted((one for one in lying if 1 < one[0] / one[1] <= most_aspect), key=_elongation)
    if most is not None:
        wide = _spread(wide, count=(most - 1) // 2, most_aspect=most_aspect)
    return (*(_turned(one) for one in reversed(wide)), (square, square), *wide)


def choose(size_px: Size, table: Sequence[Size]) -> Size:
    """The shape with the nearest log aspect ratio, |log(w/h) - log(W/H)|, which is the one that cuts off least.

    A picture exactly between two shapes gets the less elongated one; a picture turned by 90° gets the shape turned by 90°.

    Args:
        size_px: width and height of the picture.
    """
    return min(table, key=lambda shape: (_mismatch(size_px, shape), _elongation(shape)))


def fit(
    size_px: Size,
    bucket_px: Size,
    *,
    crop: str = "centre",
    place: tuple[float, float] = (0.5, 0.5),
    upscale: bool = True,
    step_px: int = 64,
) -> Fit:
    """How a picture fills a training size: resized with its aspect kept until it covers it, then cut.

    Args:
        size_px: width and height of the upright picture.
        bucket_px: the training size.
        crop: "centre"; "random", by `place`; or "top", which is safe for faces: centred from left to right, and nine tenths of
            what must go from top to bottom is cut from the bottom.
        place: 0 to 1 from left to right and from top to bottom, for "random"; uniform values make every offset equally likely.
        upscale: if False, a picture that does not cover the training size gets the largest size that it does cover: each side that
            of the bucket or, where the picture is smaller, its own side down to a multiple of `step_px`. That size need not be in
            the table. Only a picture narrower than one step is then still enlarged, to one step.
        step_px: as for the table.
    """
    size = bucket_px if upscale else _covered(size_px, bucket_px, step_px)
    resized = _covering(size_px, size)
    left, top = _CROPS[crop](resized[0] - size[0], resized[1] - size[1], place)
    return Fit(resized, left, top, size)


def cropped_share(size_px: Size, fit: Fit) -> float:
    """The share of the picture's area that is cut off, 0 to 1, the rounding to whole pixels left aside."""
    return 1 - 1 / _mismatch(size_px, fit.size_px)


def enlargement(size_px: Size, fit: Fit) -> float:
    """By how much the picture is enlarged: 2 if each of its pixels becomes four, below 1 if it is reduced."""
    return max(resized / own for resized, own in zip(fit.resized_px, size_px, strict=True))


def time_ids(original_px: Size, fit: Fit, *, flipped: bool = False) -> tuple[int, int, int, int, int, int]:
    """What SDXL is told about a picture's size and crop, true to the crop that was taken.

    In the order of SDXL (Podell et al. 2023, arXiv 2307.01952, section 2.2): original height and width, crop from the top and from
    the left in resized pixels, target height and width.

    Args:
        original_px: width and height of the upright picture as it lies on disk.
        flipped: whether the picture is seen mirrored: what was cut from its right is then cut from the left.
    """
    (width, height), (resized, _) = fit.size_px, fit.resized_px
    left = resized - width - fit.left if flipped else fit.left
    return original_px[1], original_px[0], fit.top, left, height, width


def _heights(width: int, side_px: int, step_px: int) -> list[int]:
    """The heights that bring a width nearest to the area, see `table`."""
    below = side_px**2 // width // step_px * step_px
    misses = sorted((abs(width * height / side_px**2 - 1), height) for height in (below, below + step_px))
    if misses[0][0] <= _NEAR:
        return [misses[0][1]]
    return [height for miss, height in misses if miss <= _FAR]


def _spread(wide: list[Size], *, count: int, most_aspect: float) -> list[Size]:
    """The shapes in the middles of `count` equal bands of log aspect; the square has the first half band."""
    left, chosen = list(wide), []
    for number in range(1, min(count, len(wide)) + 1):
        middle = math.log(most_aspect) * number / (count + 0.5)
        chosen.append(min(left, key=lambda shape: abs(math.log(_elongation(shape)) - middle)))
        left.remove(chosen[-1])
    return sorted(chosen, key=_elongation)


def _elongation(shape: Size) -> float:
    return max(shape) / min(shape)


def _turned(shape: Size) -> Size:
    return shape[1], shape[0]


def _mismatch(size_px: Size, shape: Size) -> float:
    """The quotient of two aspect ratios, the greater by the smaller: from whole numbers, so that turning both changes no bit."""
    one, other = size_px[0] * shape[1], size_px[1] * shape[0]
    return max(one, other) / min(one, other)


def _covered(size_px: Size, bucket_px: Size, step_px: int) -> Size:
    width, height = (max(step_px, min(own, side) // step_px * step_px) for own, side in zip(size_px, bucket_px, strict=True))
    return width, height


def _covering(size_px: Size, goal: Size) -> Size:
    """The picture's aspect at the least size that covers the goal: one side exact, the other rounded and never short."""
    (width, height), (goal_width, goal_height) = size_px, goal
    if goal_width * height >= goal_height * width:
        return goal_width, max(goal_height, _rounded(height * goal_width, width))
    return max(goal_width, _rounded(width * goal_height, height)), goal_height


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _random(across: int, down: int, place: tuple[float, float]) -> tuple[int, int]:
    left, top = (min(int(part * (excess + 1)), excess) for part, excess in zip(place, (across, down), strict=True))
    return left, top


_CROPS: dict[str, Callable[[int, int, tuple[float, float]], tuple[int, int]]] = {
    "centre": lambda across, down, place: (across // 2, down // 2),
    "top": lambda across, down, place: (across // 2, int(down * _ABOVE_THE_HEAD)),
    "random": _random,
}
