"""Whether a picture is plain or stained glass: the stated statistic of the example style.

Stained glass is held together by lead, thin dark lines from the thing to the border. A closing by 7 px
shows what a picture would be without thin dark lines; a pixel is lead if it lies on the way from there to INK, at least 35 % of it
(blur leaves so much of a 2 px line) and at most 30 of 255 beside it (another dark colour, or noise, is no lead), with three more such
pixels in its 3 × 3 surroundings. A dark area or a grey smear is not thin, so it is no lead. Two numbers describe a picture, its outermost
4 px left out because a dark frame is the easiest part of the style: the share of lead pixels, and the share of the 4 × 4 px cells
along the border that lead runs through, which an outline around the thing does not reach. A picture counts as style if they are nearer
to the mean of true stained-glass drawings of its combination than to that of plain ones, in units of the deviation pooled over both.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from sdlora.mini import world

Combination = tuple[str, str, str]  # kind, colour, background
Numbers = NDArray[np.float64]

STYLE = "stained glass"
WIDTH_PX = 64  # the side on which lead is looked for
CLOSING_PX = 7  # lead is at most 4 px wide there
DEPTH = 0.35  # of the way to INK
BESIDE = 30.0
CONTRAST = 60.0  # a pane must be this far from INK for lead to be seen before it
NEIGHBOURS = 4  # of 9
RIM_PX = 4
CELL_PX = 4
CELL_SHARE = 0.1  # a cell with more lead than this has a line through it
DRAWINGS = 12  # true drawings of a combination in each look
LEAST_DEVIATION = np.array([0.02, 0.03])  # of the two numbers; twelve drawings can be alike by chance


def lead_mask(image: Image.Image) -> NDArray[np.bool_]:
    """Which pixels are lead [64, 64]; see the module's docstring."""
    small = image.convert("RGB").resize((WIDTH_PX, WIDTH_PX), Image.Resampling.BOX)
    closed = np.asarray(small.filter(ImageFilter.MaxFilter(CLOSING_PX)).filter(ImageFilter.MinFilter(CLOSING_PX)), dtype=np.float64)
    found, way = np.asarray(small, dtype=np.float64) - closed, world.INK - closed
    length = np.linalg.norm(way, axis=-1)
    depth = (found * way).sum(axis=-1) / np.maximum(length, 1) ** 2
    beside = np.linalg.norm(found - depth[..., None] * way, axis=-1)
    mask = (depth > DEPTH) & (beside < BESIDE) & (length > CONTRAST)
    company = Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.RankFilter(3, 9 - NEIGHBOURS))
    return np.asarray(mask & np.asarray(company, dtype=bool))


def lead(image: Image.Image) -> Numbers:
    """The share of lead pixels, and the share of cells along the border that lead runs through [2], each 0 to 1."""
    inside = lead_mask(image)[RIM_PX:-RIM_PX, RIM_PX:-RIM_PX]
    count = len(inside) // CELL_PX
    cells = inside.reshape(count, CELL_PX, count, CELL_PX).mean(axis=(1, 3))
    along = np.ones_like(cells, dtype=bool)
    along[1:-1, 1:-1] = False
    return np.array([cells.mean(), (cells[along] > CELL_SHARE).mean()])


@cache
def looks(combination: Combination) -> tuple[Numbers, Numbers, Numbers]:
    """Of true drawings of a combination in random places: mean in the plain look, mean in the style, and pooled deviation [2 each]."""
    rng = np.random.default_rng([*"/".join(combination).encode()])
    scenes = [world.scene(*combination, rng=rng, size_word="") for _ in range(DRAWINGS)]
    plain, style = (np.stack([lead(world.draw(one, style=look)) for one in scenes]) for look in ("plain", STYLE))
    deviation = np.sqrt((plain.var(axis=0) + style.var(axis=0)) / 2)
    return plain.mean(axis=0), style.mean(axis=0), np.maximum(deviation, LEAST_DEVIATION)


def is_style(image: Image.Image, combination: Combination) -> bool:
    """Whether a picture of this combination is nearer to true drawings in the style than to plain ones."""
    plain, style, deviation = looks(combination)
    to_plain, to_style = (float(np.linalg.norm((lead(image) - mean) / deviation)) for mean in (plain, style))
    return to_style < to_plain
