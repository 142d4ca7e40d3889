"""What training sizes cost a picture: `python -m benchmarks.buckets [--pictures 10000] [--seed 0]`.

The same random pictures through our table and through sd-scripts' algorithm, written anew from its description: widths in steps, the
height cut down to a step, sides capped, shapes chosen by the difference of w/h. Three figures: the share of a picture that is cut off,
by how much the training size misses the area that was asked for, and both together as detail lost, 1 - (1 - crop) · min(1, area).
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sdlora import buckets
from sdlora.buckets import Size


@dataclass(frozen=True)
class Cost:
    """Figures of one way of choosing sizes, as shares: 0.05 is 5 %."""

    shapes: int
    mean_crop: float
    median_crop: float
    mean_area: float  # of the training size over side² - 1
    worst_area: float  # the one farthest from 0
    lost: float


def sd_scripts_table(*, side_px: int, least_px: int = 256, most_px: int = 1024, step_px: int = 64) -> tuple[Size, ...]:
    """sd-scripts' sizes: for widths from `least_px` to `most_px` the height down to a step, `most_px` at most; both orientations."""
    square = side_px // step_px * step_px
    found = {(square, square)}
    for width in range(least_px, most_px + 1, step_px):
        height = min(most_px, side_px**2 // width // step_px * step_px)
        if height >= least_px:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def sd_scripts_choose(size_px: Size, table: Sequence[Size]) -> Size:
    """Its choice: the least difference of w/h, which is not the same for portraits and landscapes."""
    return min(table, key=lambda shape: abs(shape[0] / shape[1] - size_px[0] / size_px[1]))


def pictures(count: int, *, most_aspect: float, seed: int) -> list[Size]:
    """Random sizes: log aspect uniform from 1 : most to most : 1, area log uniform from 1 to 24 megapixels."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        root, stretch = math.sqrt(1e6 * 24 ** chance.random()), most_aspect ** chance.uniform(-0.5, 0.5)
        found.append((round(root * stretch), round(root / stretch)))
    return found


def cost(sizes: Sequence[Size], table: Sequence[Size], choose: Callable[[Size, Sequence[Size]], Size], *, side_px: int) -> Cost:
    """What a table and a way of choosing cost a set of pictures."""
    chosen = [choose(size, table) for size in sizes]
    crops = [buckets.cropped_share(size, buckets.fit(size, shape)) for size, shape in zip(sizes, chosen, strict=True)]
    areas = [width * height / side_px**2 - 1 for width, height in chosen]
    lost = [1 - (1 - crop) * min(1, 1 + area) for crop, area in zip(crops, areas, strict=True)]
    mean = statistics.fmean
    return Cost(len(table), mean(crops), statistics.median(crops), mean(areas), max(areas, key=abs), mean(lost))


def contenders(side_px: int, most_aspect: float) -> dict[str, tuple[Sequence[Size], Callable[[Size, Sequence[Size]], Size]]]:
    """Each table with its way of choosing."""
    ours = {
        f"ours, steps of {step}": (buckets.table(side_px=side_px, step_px=step, most_aspect=most_aspect), buckets.choose)
        for step in (64, 32)
    }
    capped = {"ours, 7 shapes": (buckets.table(side_px=side_px, most_aspect=most_aspect, most=7), buckets.choose)}
    theirs = {f"sd-scripts, cap {cap}": (sd_scripts_table(side_px=side_px, most_px=cap), sd_scripts_choose) for cap in (1024, 2048)}
    return {**ours, **capped, **theirs}


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.buckets", description="What training sizes cost a picture.")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| aspects | side | sizes | shapes | mean crop | median crop | mean area | worst area | detail lost |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for most_aspect in (2.0, 4.0):
        sizes = pictures(options.pictures, most_aspect=most_aspect, seed=options.seed)
        for side_px in (512, 768, 1024):
            for name, (table, choose) in contenders(side_px, most_aspect).items():
                one = cost(sizes, table, choose, side_px=side_px)
                crops, areas = f"{one.mean_crop:.1%} | {one.median_crop:.1%}", f"{one.mean_area:+.1%} | {one.worst_area:+.1%}"
                print(f"| up to {most_aspect:.0f}:1 | {side_px} | {name} | {one.shapes} | {crops} | {areas} | {one.lost:.1%} |")


if __name__ == "__main__":
    main()
