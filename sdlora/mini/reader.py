"""Says what a picture of the mini world shows, by geometry and colour only.

A claim about a LoRA ("the right thing in the right colour, in the new style") needs a judge that was not trained and cannot be
flattered: here it is a comparison with the world's own drawings. The wall is found at the picture's border, the thing is what differs
from it, and the (kind, colour) whose drawing explains the thing's pixels best is the reading. Where lead lines are seen, the drawings
that are compared have them too. All steps forgive what a generative model does to a picture: blur, noise and slightly wrong colours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from sdlora.mini import world

Pixels = NDArray[np.float32]
Mask = NDArray[np.bool_]
Box = tuple[float, float, float, float]
Place = tuple[float, float, float]  # a scale, and how far right and down, in lengths of a box

WIDTH = 64  # the side to which every picture is brought
WINDOW = 32  # the side of a template
THING_SHARE = 0.7  # how much of a template's side the thing takes; the rest is room for ink parts that a leaded thing's box lacks
RING, LEADED_RING = 4, 7  # the border, in pixels, at which the wall is looked for; a leaded picture has a frame of 2
INK_RADIUS = 45.0  # how far from INK a colour may be; brown's dark tone is at 54
LEADED_SHARE = 0.06  # more ink than this at the border means lead lines
LINE_COST = 0.4  # what ink costs, from 0 to 1, where a leaded template has wall: rays of lead cross a wall
FAR = 90.0  # colour distances above this count the same: a wrong tone is wrong
TONES = ("main", "light", "dark", "ink", "cream")
NOTHING: world.RGB = (1, 1, 1)  # a colour that no tone has
TILTS = (-8, 0, 8)
STEPS = ((1.0, 0.05, 0.0), (1.0, -0.05, 0.0), (1.0, 0.0, 0.05), (1.0, 0.0, -0.05), (0.93, 0.0, 0.0), (1.07, 0.0, 0.0))
LENGTHS = (0.36, 0.43, 0.5, 0.58, 0.66, 0.75, 0.84)  # how long a leaded thing may be, in widths of the picture; its ink does not count
STRIDE = 3  # pixels between the places where it is looked for
ROUNDS = 4  # how many STEPS (a scale, and a way in lengths of the box) a match may take away from the box that was found
PIP_PARTS = (world.COLOURS["teal"], world.COLOURS["orange"], world.CREAM)  # body, belly and eyes
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
    ink = _distance(_pixels(image), world.INK) < INK_RADIUS
    outside = np.ones_like(ink)
    outside[max(0, int(top) - 2) : max(0, int(bottom) + 3), max(0, int(left) - 2) : max(0, int(right) + 3)] = False
    return float(ink[outside].mean()) if outside.any() else 0.0


def shows_pip(image: Image.Image) -> bool:
    """Whether the teal creature is in a picture, alone or in company: body, belly and eyes must be where they belong."""
    pixels = _pixels(image)
    seen = np.stack([_distance(pixels, colour) < 75 for colour in PIP_PARTS])
    spectrum = np.fft.rfft2(seen.astype(np.float32))
    # every place at once: for each part, the share of its pixels that have its colour
    agreements = (np.fft.irfft2(spectrum * pattern, s=(WIDTH, WIDTH)) for pattern in _pip_patterns())
    return any(bool((agreement.min(axis=0) > PIP_AGREEMENT).any()) for agreement in agreements)


def _find(image: Image.Image) -> Finding:
    pixels = _pixels(image)
    ink = _distance(pixels, world.INK) < 2 * INK_RADIUS
    leaded = bool(ink[_ring(RING)].mean() > LEADED_SHARE)
    clear = _ring(LEADED_RING) & ~_filtered(ink, ImageFilter.MaxFilter(3))
    border = pixels[clear if leaded and clear.any() else _ring(RING)]
    wall = _nearest_wall(border)
    pixels = pixels - _drift(border, wall)
    return _best_anywhere(pixels, wall) if leaded else _best_match(_image(pixels), _thing_box(pixels, wall), wall)


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB").resize((WIDTH, WIDTH), Image.Resampling.BOX), dtype=np.float32)


def _distance(pixels: Pixels, colour: Pixels | world.RGB) -> Pixels:
    """How far colours lie apart, over the last axis."""
    difference = pixels - np.asarray(colour, dtype=np.float32)
    return np.asarray(np.sqrt(np.einsum("...c,...c->...", difference, difference)), dtype=np.float32)


@cache
def _ring(width: int) -> Mask:
    ring = np.ones((WIDTH, WIDTH), dtype=bool)
    ring[width:-width, width:-width] = False
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


def _thing_box(pixels: Pixels, wall: _Wall) -> Box:
    """The box of the largest thing in a plain picture."""
    distance = _wall_distance(pixels, wall)
    mask = distance > np.clip(2.2 * np.median(distance[_ring(RING)]), 12, 40)
    mask &= _filtered(mask, ImageFilter.RankFilter(3, 5))  # specks of noise have fewer than three neighbours
    return _box(mask & _largest(_filtered(mask, ImageFilter.MaxFilter(3))))


def _box(mask: Mask) -> Box:
    """Left, top, right and bottom of what is set; the whole picture if nothing is."""
    if not mask.any():
        return (0.0, 0.0, float(WIDTH), float(WIDTH))
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


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


def _shares(thing: world.Thing, colours: list[world.RGB], width: int, *, lead: float = 0.0) -> Pixels:
    """The share of each pixel of a small drawing of a thing that has each colour, with leads if their width (in pixels) is not 0."""
    over = 4
    canvas = Image.new("RGB", (width * over, width * over), NOTHING)
    pen = ImageDraw.Draw(canvas)
    if lead:
        world._leaded(pen, thing, width * over, lead * over)
    else:
        for tone, points in world._placed(thing, width * over):
            world._fill(pen, points, world._tone(tone, world.COLOURS[thing.colour]))
    drawn = np.asarray(canvas).reshape(width, over, width, over, 3)
    return np.stack([(drawn == np.array(colour)).all(axis=-1).mean(axis=(1, 3)) for colour in colours]).astype(np.float32)


def _template(kind: str, tilt: float, *, mirrored: bool, size: float | None) -> _Template:
    """A kind with its box in the middle of the window, with the leads of a thing of a size, or plain for None.

    A leaded thing's box leaves out its ink, which looks like the lines on the wall.
    """
    colours = [NOTHING, *(world._tone(tone, world.COLOURS["red"]) for tone in TONES)]
    thing, lead = world.Thing(kind, "red", size=0.6, tilt=tilt, mirrored=mirrored), 0.0
    for _ in range(2):  # the second time corrects what rounding to pixels did to the first
        lead = world.LEAD_SHARE * thing.size / size if size else 0.0
        shares = _shares(thing, colours, WINDOW, lead=lead * WINDOW)
        left, top, right, bottom = (side / WINDOW for side in _box(shares[0] + (shares[TONES.index("ink") + 1] if size else 0) < 0.5))
        scale = THING_SHARE / max(right - left, bottom - top)
        x, y = (0.5 + (thing.x - (left + right) / 2) * scale, 0.5 + (thing.y - (top + bottom) / 2) * scale)
        thing, lead = replace(thing, size=thing.size * scale, x=x, y=y), lead * scale
    every = np.concatenate([points for _, points in world._placed(thing, 1)])
    (left, top), (right, bottom) = (every.min(axis=0) - lead).tolist(), (every.max(axis=0) + lead).tolist()
    return _Template(kind, _shares(thing, colours, WINDOW, lead=lead * WINDOW), (left, top, right, bottom))


@cache
def _templates(size: float | None) -> tuple[tuple[_Template, ...], Pixels]:
    """All templates of a look, and their shares as the rows of one matrix."""
    every = tuple(_template(k, tilt, mirrored=m, size=size) for k in world.KINDS for tilt in TILTS for m in (False, True))
    return every, np.stack([template.shares.ravel() for template in every])


def _window(picture: Image.Image, square: Box, wall: _Wall) -> Pixels:
    """A square of the picture, `WINDOW` wide; beyond the picture there is wall."""
    red, green, blue = wall.ends[0].astype(int).tolist()  # a shade of the wall, so that what lies beyond costs nothing
    large = ImageOps.expand(picture, 2 * WIDTH, (red, green, blue))
    left, top, right, bottom = (side + 2 * WIDTH for side in square)
    return np.asarray(large.resize((WINDOW, WINDOW), Image.Resampling.BOX, box=(left, top, right, bottom)), dtype=np.float32)


def _nothing_costs(pixels: Pixels, wall: _Wall, *, leaded: bool) -> Pixels:
    """What it costs to call each pixel wall, 0 to 1."""
    costs = _wall_distance(pixels, wall)
    if leaded:
        costs = np.minimum(costs, _distance(pixels, world.INK) + LINE_COST * FAR)
    return np.asarray(np.minimum(costs, FAR) / FAR, dtype=np.float32)


def _label_costs(window: Pixels, wall: _Wall, *, leaded: bool) -> Pixels:
    """What it costs to call each pixel wall or a tone of each colour: (colour, label x pixel), 0 to 1."""
    flat, count = window.reshape(-1, 3), len(world.COLOURS)
    tones, lengths = _tones()
    squares = lengths[:, None] - 2 * tones @ flat.T + np.einsum("pc,pc->p", flat, flat)  # of distances; one product instead of 40 x 1024
    distances = np.sqrt(np.clip(squares, 0, FAR**2)).reshape(count, len(TONES), len(flat)) / FAR
    walls = np.broadcast_to(_nothing_costs(flat, wall, leaded=leaded), (count, 1, len(flat)))
    return np.asarray(np.concatenate([walls, distances], axis=1).reshape(count, -1), dtype=np.float32)


@cache
def _tones() -> tuple[Pixels, Pixels]:
    """Each tone of each colour, colour by colour [colours x tones, 3], and the square of its length."""
    tones = np.array([world._tone(tone, colour) for colour in world.COLOURS.values() for tone in TONES], dtype=np.float32)
    return tones, np.asarray(np.einsum("tc,tc->t", tones, tones), dtype=np.float32)


def _match(picture: Image.Image, square: Box, wall: _Wall, size: float | None) -> Finding:
    """The template and colour that explain a square of the picture at the least cost."""
    every, matrix = _templates(size)
    costs = matrix @ _label_costs(_window(picture, square, wall), wall, leaded=size is not None).T
    row, column = divmod(int(costs.argmin()), len(world.COLOURS))
    (left, top, right, _), (a, b, c, d) = square, every[row].box
    side = right - left
    reading = Reading(every[row].kind, tuple(world.COLOURS)[column], wall.name)
    return (float(costs[row, column]), reading, (left + a * side, top + b * side, left + c * side, top + d * side))


def _best_match(picture: Image.Image, box: Box, wall: _Wall) -> Finding:
    """The cheapest match near a box in a plain picture: from there, the best of all STEPS as long as it helps."""
    left, top, right, bottom = box
    length = max(right - left, bottom - top)

    def match(place: Place) -> tuple[Finding, Place]:
        scale, x, y = place
        half = min(length * scale / THING_SHARE / 2, WIDTH)
        x, y = (left + right) / 2 + x * length, (top + bottom) / 2 + y * length
        return _match(picture, (x - half, y - half, x + half, y + half), wall, None), place

    return _refined(match((1.0, 0.0, 0.0)), match, lambda zoom, right, down, at: (at[0] * zoom, at[1] + right, at[2] + down))


def _best_anywhere(pixels: Pixels, wall: _Wall) -> Finding:
    """Of a leaded picture: the match that, in any place and size, explains the whole picture at the least cost.

    Lead parts a thing into pieces and ties it to the lines on the wall, so there is no outline to begin at.
    """
    picture, walls = _image(pixels), _nothing_costs(pixels, wall, leaded=True)

    def match(place: Place) -> tuple[Finding, Place]:
        length, x, y = place
        size = min(world.SIZES.values(), key=lambda size: abs(size - length))  # the smaller a thing, the thicker its leads are to it
        half = length * WIDTH / THING_SHARE / 2
        square = (x - half, y - half, x + half, y + half)
        cost, reading, box = _match(picture, square, wall, size)
        left, top, right, bottom = (max(0, round(side)) for side in square)
        elsewhere = walls.sum() - walls[top:bottom, left:right].sum()
        return (cost * (2 * half / WINDOW) ** 2 + float(elsewhere), reading, box), place

    def near(length: float) -> Finding:
        reach = int((1 - length) * WIDTH * 0.375) + 1
        places = [float(WIDTH // 2 + shift) for shift in range(-reach, reach + 1, STRIDE)]
        start = min((match((length, x, y)) for x in places for y in places), key=lambda each: each[0][0])
        return _refined(
            start, match, lambda zoom, right, down, at: (at[0] * zoom, at[1] + right * at[0] * WIDTH, at[2] + down * at[0] * WIDTH)
        )

    return min((near(length) for length in LENGTHS), key=lambda finding: finding[0])


def _refined(best: tuple[Finding, Place], match: Callable[[Place], tuple[Finding, Place]], moved: Callable[..., Place]) -> Finding:
    """From a match, the best of all STEPS as long as it helps."""
    for _ in range(ROUNDS):
        found = min((match(moved(*step, best[1])) for step in STEPS), key=lambda each: each[0][0])
        if found[0][0] >= best[0][0]:
            break
        best = found
    return best[0]


@cache
def _pip_patterns() -> tuple[NDArray[np.complex64], ...]:
    """For each size, the spectra that find pip's body, belly and eyes anywhere in a picture."""
    patterns = []
    for size in PIP_SIZES:
        for tilt in (-7, 7):
            shares = _shares(world.Thing("pip", "teal", size=size, tilt=tilt), list(PIP_PARTS), WIDTH)
            patterns.append(np.conj(np.fft.rfft2(shares / shares.sum(axis=(1, 2), keepdims=True))))
    return tuple(patterns)
