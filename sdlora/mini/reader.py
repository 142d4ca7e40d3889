"""Says what a picture of the mini world shows, by geometry and colour only.

A claim about a LoRA ("the right thing in the right colour, in the new style") needs a judge that was not trained and cannot be
flattered: here it is a comparison with the world's own drawings. The wall is found at the picture's border, the thing is what differs
from it, and the (kind, colour) whose drawing explains the thing's pixels best is the reading. All steps forgive what a generative
model does to a picture: blur, noise and slightly wrong colours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from sdlora.mini import shapes, world

Pixels = NDArray[np.float32]
Mask = NDArray[np.bool_]
Box = tuple[float, float, float, float]

WIDTH = 128  # the side to which every picture is brought
COARSE = 64  # the side on which the thing is looked for: halving averages the noise away
WINDOW = 32  # the side of a template
THING_SHARE = 0.7  # how much of a template's side the thing takes; the rest is room for ink parts that a leaded thing's box lacks
RING = 4  # the border, in coarse pixels, at which the wall is looked for
INK_RADIUS = 45.0  # how far from INK a colour may be; brown's dark tone is at 54
LEADED_SHARE = 0.06  # more ink than this at the border means lead lines
LEAD_FILLS = ((0.0, 7), (0.8, 9))  # blur and closing width against lead lines: the first is best for clean pictures, the second for soft
FAR = 90.0  # colour distances above this count the same: a wrong tone is wrong
TONES = ("main", "light", "dark", "ink", "cream")
TILTS = (-8, 0, 8)
SCALES = (0.93, 1.0, 1.07)
PIP_PARTS = {"main": world.COLOURS["teal"], "orange": world.COLOURS["orange"], "cream": world.CREAM}
PIP_SIZES = (0.5, 0.62, 0.69, 0.76, 0.84)
PIP_AGREEMENT = 0.3  # pip scores 0.35 and more even when spoilt, other pictures below 0.05


@dataclass(frozen=True)
class Reading:
    """What a picture shows, in the world's words."""

    kind: str
    colour: str
    background: str


@dataclass(frozen=True)
class _Wall:
    """A background as it may look: all between two shades when plain, either of two shades in panes."""

    name: str
    panes: bool
    ends: Pixels


@dataclass(frozen=True)
class _Template:
    """A kind drawn in a window: the share of each pixel that is wall and each tone, and the box of all its parts (0 to 1)."""

    kind: str
    shares: Pixels
    box: Box


Finding = tuple[float, Reading, Box]  # the cost of the reading, and the box of the thing in pixels of a picture `WIDTH` wide


def read(image: Image.Image) -> Reading:
    """The kind, colour and background of the largest thing in a picture, plain or stained glass."""
    return _find(image)[1]


def ink_share(image: Image.Image) -> float:
    """How much ink lies around the thing: about 0 in the plain look, much more where lead lines cross the wall.

    Returns:
        The share of the pixels outside the thing's bounding box that are near INK.
    """
    left, top, right, bottom = _find(image)[2]
    ink = _distance(_pixels(image, WIDTH), world.INK) < INK_RADIUS
    outside = np.ones_like(ink)
    outside[max(0, int(top) - 2) : max(0, int(bottom) + 3), max(0, int(left) - 2) : max(0, int(right) + 3)] = False
    return float(ink[outside].mean()) if outside.any() else 0.0


def shows_pip(image: Image.Image) -> bool:
    """Whether the teal creature is in a picture, alone or in company: body, belly and eyes must be where they belong."""
    pixels = _pixels(image, COARSE)
    seen = np.stack([_distance(pixels, colour) < 75 for colour in PIP_PARTS.values()])
    spectrum = np.fft.rfft2(seen.astype(np.float32))
    # every place at once: for each part, the share of its pixels that have its colour
    agreements = (np.fft.irfft2(spectrum * pattern, s=(COARSE, COARSE)) for pattern in _pip_patterns())
    return any(bool((agreement.min(axis=0) > PIP_AGREEMENT).any()) for agreement in agreements)


def _find(image: Image.Image) -> Finding:
    picture = _picture(image, WIDTH)
    border = _pixels(image, COARSE)[_ring()]
    leaded = bool((_distance(border, world.INK) < 2 * INK_RADIUS).mean() > LEADED_SHARE)
    versions = [_without_lead(picture, *fill) for fill in LEAD_FILLS] if leaded else [picture]
    return _cheapest([_find_in(version, leaded=leaded) for version in versions])


def _cheapest(findings: list[Finding]) -> Finding:
    return findings[int(np.argmin([cost for cost, _, _ in findings]))]


def _without_lead(picture: Image.Image, softening: float, closing: int) -> Image.Image:
    """The picture with its thin dark lines filled by the colours beside them."""
    soft = picture.filter(ImageFilter.GaussianBlur(softening))
    return soft.filter(ImageFilter.MaxFilter(closing)).filter(ImageFilter.MinFilter(closing))


def _find_in(picture: Image.Image, *, leaded: bool) -> Finding:
    coarse = _pixels(picture, COARSE)
    wall = _nearest_wall(coarse[_ring()])
    drift = _drift(coarse[_ring()], wall)
    box = _thing_box(coarse - drift, wall, leaded=leaded)
    return _best_match(picture, drift, box, wall, leaded=leaded)


def _picture(image: Image.Image, width: int) -> Image.Image:
    return image.convert("RGB").resize((width, width), Image.Resampling.BOX)


def _pixels(image: Image.Image, width: int) -> Pixels:
    return np.asarray(_picture(image, width), dtype=np.float32)


def _distance(pixels: Pixels, colour: Pixels | world.RGB) -> Pixels:
    """How far colours lie apart, over the last axis."""
    difference = pixels - np.asarray(colour, dtype=np.float32)
    return np.asarray(np.sqrt(np.einsum("...c,...c->...", difference, difference)), dtype=np.float32)


@cache
def _ring() -> Mask:
    ring = np.ones((COARSE, COARSE), dtype=bool)
    ring[RING:-RING, RING:-RING] = False
    return ring


@cache
def _walls() -> tuple[_Wall, ...]:
    return tuple(
        _Wall(name, panes, np.array([world._shade(colour, amount) for amount in amounts], dtype=np.float32))
        for name, colour in world.BACKGROUNDS.items()
        for panes, amounts in ((False, (-0.04, 0.06)), (True, (-0.14, 0.3)))
    )


def _nearest_on_line(pixels: Pixels, start: Pixels, end: Pixels) -> Pixels:
    """The colour between two colours that is nearest to each pixel."""
    way = end - start
    share = np.clip((pixels - start) @ way / max(float(way @ way), 1e-6), 0, 1)
    return np.asarray(start + share[..., None] * way, dtype=np.float32)


def _nearest_shade(pixels: Pixels, wall: _Wall) -> Pixels:
    """The shade of a wall that is nearest to each pixel."""
    first, second = wall.ends
    if not wall.panes:
        return _nearest_on_line(pixels, first, second)
    nearer = _distance(pixels, first) < _distance(pixels, second)
    return np.asarray(np.where(nearer[..., None], first, second), dtype=np.float32)


def _wall_distance(pixels: Pixels, wall: _Wall) -> Pixels:
    return _distance(pixels, _nearest_shade(pixels, wall))


def _nearest_wall(border: Pixels) -> _Wall:
    """The wall that explains the border best; a thing that reaches into the border counts no more than FAR."""
    costs = [float(np.minimum(_wall_distance(border, wall), FAR).mean()) for wall in _walls()]
    return _walls()[int(np.argmin(costs))]


def _drift(border: Pixels, wall: _Wall) -> Pixels:
    """By how much the whole picture's colours are off, as far as the wall tells; at most 12 a channel."""
    return np.asarray(np.clip(np.median(border - _nearest_shade(border, wall), axis=0), -12, 12), dtype=np.float32)


def _thing_box(coarse: Pixels, wall: _Wall, *, leaded: bool) -> Box:
    """Left, top, right and bottom of the largest thing, in pixels of a picture `WIDTH` wide; the whole picture if there is none."""
    distance = _wall_distance(coarse, wall)
    mask = distance > np.clip(2.2 * np.median(distance[_ring()]), 12, 40)
    if leaded:  # what the closing left of the lines, and their soft edges, is not the thing
        ink = _distance(coarse, world.INK) < 1.5 * INK_RADIUS
        lines = [_distance(coarse, _nearest_on_line(coarse, end, np.array(world.INK, np.float32))) < 25 for end in wall.ends]
        mask &= ~ink & ~((lines[0] | lines[1]) & _filtered(ink, ImageFilter.MaxFilter(3)))
    mask &= _filtered(mask, ImageFilter.RankFilter(3, 5))  # specks of noise have fewer than three neighbours
    bridged = _filtered(mask, ImageFilter.MaxFilter(7 if leaded else 3))
    thing = mask & _largest(bridged)
    if not thing.any():
        return (0.0, 0.0, float(WIDTH), float(WIDTH))
    rows, columns = np.flatnonzero(thing.any(axis=1)), np.flatnonzero(thing.any(axis=0))
    step = WIDTH / COARSE
    return (columns[0] * step, rows[0] * step, (columns[-1] + 1) * step, (rows[-1] + 1) * step)


def _filtered(mask: Mask, by: ImageFilter.Filter) -> Mask:
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(by), dtype=bool)


def _largest(mask: Mask) -> Mask:
    """The connected region with the most pixels: each pixel takes the largest number in its region."""
    picture = np.where(mask, np.arange(1, mask.size + 1, dtype=np.int32).reshape(mask.shape), 0)
    before = np.zeros_like(picture)
    while (before != picture).any():
        before, wide = picture, np.pad(picture, 1)
        rows = np.maximum(np.maximum(wide[:-2], wide[2:]), wide[1:-1])
        picture = np.where(mask, np.maximum(np.maximum(rows[:, :-2], rows[:, 2:]), rows[:, 1:-1]), 0)
    counts = np.bincount(picture.ravel())
    counts[0] = 0
    return np.asarray((picture == counts.argmax()) & mask)


def _label_shares(parts: list[shapes.Part], tones: tuple[str, ...], width: int, over: int = 4) -> Pixels:
    """The share of each pixel of a small picture of parts that is nothing (0) and each tone (1 and up)."""
    canvas = Image.new("L", (width * over, width * over), 0)
    pen = ImageDraw.Draw(canvas)
    for tone, points in parts:
        pen.polygon([(float(x), float(y)) for x, y in points * over], fill=tones.index(tone) + 1 if tone in tones else 0)
    labels = np.asarray(canvas).reshape(width, over, width, over)
    return np.stack([(labels == i).mean(axis=(1, 3)) for i in range(len(tones) + 1)]).astype(np.float32)


def _template(kind: str, tilt: float, *, mirrored: bool, leaded: bool) -> _Template:
    """A kind with its box in the middle of the window; a leaded thing's box leaves out its ink parts, which look like lead."""
    parts = world._placed(world.Thing(kind, "red", x=0, y=0, size=2, tilt=tilt, mirrored=mirrored), 1)
    boxed = np.concatenate([points for tone, points in parts if not (leaded and tone == "ink")])
    low, high = boxed.min(axis=0), boxed.max(axis=0)
    scale = THING_SHARE * WINDOW / float((high - low).max())
    moved = [(tone, (points - (low + high) / 2) * scale + WINDOW / 2) for tone, points in parts]
    every = np.concatenate([points for _, points in moved]) / WINDOW
    (left, top), (right, bottom) = every.min(axis=0).tolist(), every.max(axis=0).tolist()
    return _Template(kind, _label_shares(moved, TONES, WINDOW), (left, top, right, bottom))


@cache
def _templates(leaded: bool) -> tuple[tuple[_Template, ...], Pixels]:
    """All templates of a look, and their shares as the rows of one matrix."""
    every = tuple(_template(k, tilt, mirrored=m, leaded=leaded) for k in world.KINDS for tilt in TILTS for m in (False, True))
    return every, np.stack([template.shares.ravel() for template in every])


def _windows(picture: Image.Image, box: Box, wall: _Wall) -> Iterator[tuple[Box, Pixels]]:
    """The surroundings of a box at a few scales, `WINDOW` wide; beyond the picture there is wall."""
    left, top, right, bottom = box
    red, green, blue = wall.ends.mean(axis=0).astype(int).tolist()
    large = ImageOps.expand(picture, WIDTH, (red, green, blue))
    for scale in SCALES:
        half = min(max(right - left, bottom - top) * scale / THING_SHARE / 2, WIDTH)
        x, y = (left + right) / 2, (top + bottom) / 2
        inside = (x - half + WIDTH, y - half + WIDTH, x + half + WIDTH, y + half + WIDTH)
        yield (
            (x - half, y - half, x + half, y + half),
            np.asarray(large.resize((WINDOW, WINDOW), Image.Resampling.BOX, box=inside), dtype=np.float32),
        )


def _label_costs(window: Pixels, wall: _Wall, *, leaded: bool) -> Pixels:
    """What it costs to call each pixel wall or a tone of each colour: (colour, label x pixel), 0 to 1."""
    colours = [[world._tone(tone, colour) for tone in TONES] for colour in world.COLOURS.values()]
    flat = window.reshape(-1, 3)
    tones = _distance(flat, np.array(colours, dtype=np.float32)[:, :, None])
    if leaded:  # the closing has removed thin ink
        ink = TONES.index("ink")
        tones[:, ink] = np.minimum(tones[:, ink], 0.4 * FAR)
    walls = np.broadcast_to(_wall_distance(flat, wall), (len(colours), 1, len(flat)))
    costs = np.minimum(np.concatenate([walls, tones], axis=1), FAR) / FAR
    return np.asarray(costs.reshape(len(colours), -1), dtype=np.float32)


def _best_match(picture: Image.Image, drift: Pixels, box: Box, wall: _Wall, *, leaded: bool) -> Finding:
    """The template, colour and scale that explain the thing's surroundings at the least cost."""
    every, matrix = _templates(leaded)
    findings: list[Finding] = []
    for (left, top, right, _), window in _windows(picture, box, wall):
        costs = matrix @ _label_costs(window - drift, wall, leaded=leaded).T
        row, column = divmod(int(costs.argmin()), len(world.COLOURS))
        (a, b, c, d), side = every[row].box, right - left
        reading = Reading(every[row].kind, tuple(world.COLOURS)[column], wall.name)
        findings.append((float(costs[row, column]), reading, (left + a * side, top + b * side, left + c * side, top + d * side)))
    return _cheapest(findings)


@cache
def _pip_patterns() -> tuple[NDArray[np.complex64], ...]:
    """For each size, the spectra that find pip's body, belly and eyes anywhere in a picture."""
    patterns = []
    for size in PIP_SIZES:
        for tilt in (-7, 7):
            creature = world._placed(world.Thing("pip", "teal", size=size, tilt=tilt), COARSE)
            shares = _label_shares(creature, tuple(PIP_PARTS), COARSE)[1:]
            patterns.append(np.conj(np.fft.rfft2(shares / shares.sum(axis=(1, 2), keepdims=True))))
    return tuple(patterns)
