"""The mini world: draws pictures with captions, from seeds, in a plain look and in styles.

The embedded base model is trained on these pictures, the example datasets are made of them, and because the world knows what it
drew, every claim about a LoRA can be checked against ground truth. A fixed share of all (kind, colour, background) combinations
is held out: the base never sees them, so a right picture of one shows understanding and not memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from sdlora.mini import shapes

RGB = tuple[int, int, int]

KINDS = tuple(shapes.THINGS)
COLOURS: dict[str, RGB] = {
    "red": (208, 32, 44), "orange": (245, 124, 20), "yellow": (250, 200, 20), "lime": (150, 205, 30),
    "green": (24, 130, 60), "teal": (0, 140, 150), "blue": (30, 80, 215), "purple": (118, 44, 180),
    "pink": (236, 64, 150), "brown": (120, 68, 32), "grey": (112, 116, 128), "white": (255, 255, 255),
}  # fmt: skip
BACKGROUNDS: dict[str, RGB] = {
    "red": (240, 130, 120), "orange": (255, 192, 132), "yellow": (254, 240, 155), "olive": (160, 165, 95),
    "green": (150, 226, 165), "teal": (120, 222, 212), "blue": (142, 196, 252), "purple": (196, 168, 240),
    "pink": (252, 176, 205), "brown": (206, 172, 130), "grey": (178, 182, 192), "white": (240, 240, 244),
}  # fmt: skip
INK: RGB = (38, 32, 46)
CREAM: RGB = (255, 246, 222)
SIZES = {"small": 0.5, "": 0.66, "big": 0.84}
HELD_OUT_SHARE = 0.15
WIDTH_PX = 64  # what the base model draws
OVERSAMPLING = 4
LEAD_SHARE = 0.03  # the width of a lead line, as a share of the picture's


@dataclass(frozen=True)
class Thing:
    """One thing in a picture: centre (x, y) and size as shares of the picture's width, tilt in degrees, mirrored or not."""

    kind: str
    colour: str
    x: float = 0.5
    y: float = 0.5
    size: float = 0.66
    tilt: float = 0.0
    mirrored: bool = False
    arms: float = 0.0
    gaze: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Things on a background; `caption` says in words what `draw` shows."""

    things: tuple[Thing, ...]
    background: str
    caption: str


def is_held_out(kind: str, colour: str, background: str) -> bool:
    """Whether the base model's training leaves this combination out (a stable 15 % of all, by hash)."""
    digest = hashlib.sha256(f"{kind}/{colour}/{background}".encode()).digest()
    return digest[0] < HELD_OUT_SHARE * 256


def combinations(*, held_out: bool) -> list[tuple[str, str, str]]:
    """All (kind, colour, background) of one side of the split; white on white cannot be seen and is in neither."""
    return [
        (kind, colour, background)
        for kind in KINDS
        for colour in COLOURS
        for background in BACKGROUNDS
        if (colour, background) != ("white", "white") and is_held_out(kind, colour, background) == held_out
    ]


def held_out_prompts(count: int, *, seed: int) -> list[tuple[str, str, str]]:
    """`count` different held-out combinations in an order drawn from `seed`."""
    every = combinations(held_out=True)
    order = np.random.default_rng([seed, 7]).permutation(len(every))
    return [every[i] for i in order[:count]]


def phrase(kind: str, colour: str, size_word: str = "") -> str:
    """ "a small red star", with the article that the next word asks for."""
    words = f"{size_word} {colour} {kind}".split()
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def scene(kind: str, colour: str, background: str, *, rng: np.random.Generator, size_word: str | None = None) -> Scene:
    """One thing in a random place, with the caption "a [small|big] COLOUR KIND on a BACKGROUND background".

    Args:
        size_word: "small", "" or "big"; None draws one.
    """
    word = str(rng.choice(["small", "", "", "big"])) if size_word is None else size_word
    size = SIZES[word] * rng.uniform(0.94, 1.06)
    room = 0.5 * (1 - size) * 0.6
    thing = Thing(
        kind, colour, x=0.5 + rng.uniform(-room, room), y=0.5 + rng.uniform(-room, room),
        size=size, tilt=rng.uniform(-9, 9), mirrored=bool(rng.random() < 0.5),
    )  # fmt: skip
    return Scene((thing,), background, f"{phrase(kind, colour, word)} on {phrase('background', background)}")


def pair(first: tuple[str, str], second: tuple[str, str], background: str, *, rng: np.random.Generator) -> Scene:
    """Two (kind, colour) things side by side: "a red star and a blue cup on a green background"."""
    things = tuple(
        Thing(
            kind, colour, x=x + rng.uniform(-0.02, 0.02), y=0.5 + rng.uniform(-0.14, 0.14),
            size=0.44 * rng.uniform(0.94, 1.04), tilt=rng.uniform(-9, 9), mirrored=bool(rng.random() < 0.5),
        )
        for (kind, colour), x in ((first, 0.26), (second, 0.74))
    )  # fmt: skip
    return Scene(things, background, f"{phrase(*first)} and {phrase(*second)} on {phrase('background', background)}")


def pip_scene(background: str, *, rng: np.random.Generator, company: tuple[str, str] | None = None) -> Scene:
    """The example character in a random pose, alone or beside a (kind, colour) thing; its name in the caption is "pip"."""
    size = 0.5 if company else rng.uniform(0.62, 0.84)
    room = 0.5 * (1 - size) * 0.6
    place = (0.28, 0.5 + rng.uniform(-0.1, 0.1)) if company else (0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room))
    creature = Thing(
        "pip", "teal", x=place[0], y=place[1], size=size, tilt=rng.uniform(-10, 10),
        arms=rng.uniform(-1, 1), gaze=rng.uniform(-1, 1),
    )  # fmt: skip
    if company is None:
        return Scene((creature,), background, f"pip on {phrase('background', background)}")
    other = Thing(*company, x=0.76, y=0.5 + rng.uniform(-0.14, 0.14), size=0.4, tilt=rng.uniform(-9, 9))
    return Scene((creature, other), background, f"pip and {phrase(*company)} on {phrase('background', background)}")


def training_scene(seed: int, index: int) -> Scene:
    """Picture `index` of the base model's training set: four of five show one thing, the others a pair; none is held out."""
    rng = np.random.default_rng([seed, index])
    allowed = combinations_cache()
    kind, colour, background = allowed[rng.integers(len(allowed))]
    if rng.random() < 0.8:
        return scene(kind, colour, background, rng=rng)
    partners = [(k, c) for k, c, b in allowed if b == background]
    return pair((kind, colour), partners[rng.integers(len(partners))], background, rng=rng)


_allowed: list[tuple[str, str, str]] = []


def combinations_cache() -> list[tuple[str, str, str]]:
    """The combinations that training may use, listed once."""
    if not _allowed:
        _allowed.extend(combinations(held_out=False))
    return _allowed


def _shade(colour: RGB, amount: float) -> RGB:
    """Towards white for a positive amount, towards black for a negative one (both up to 1)."""
    goal = 255 if amount > 0 else 0
    red, green, blue = (round(c + (goal - c) * abs(amount)) for c in colour)
    return red, green, blue


def _tone(tone: str, colour: RGB) -> RGB:
    """The colour of a part: relative to the thing's colour, or fixed."""
    table = {"main": colour, "light": _shade(colour, 0.4), "dark": _shade(colour, -0.3), "ink": INK, "cream": CREAM}
    return table[tone] if tone in table else COLOURS[tone]


def _placed(thing: Thing, width_px: int) -> list[shapes.Part]:
    """The thing's parts in pixels of a picture `width_px` wide."""
    parts = shapes.pip(arms=thing.arms, gaze=thing.gaze) if thing.kind == "pip" else shapes.THINGS[thing.kind]()
    angle = np.deg2rad(thing.tilt)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    mirror = np.array([-1 if thing.mirrored else 1, 1])
    centre = np.array([thing.x, thing.y]) * width_px
    return [(tone, (points * mirror) @ turn * (thing.size * width_px / 2) + centre) for tone, points in parts]


def _fill(pen: ImageDraw.ImageDraw, points: shapes.Points, colour: RGB) -> None:
    pen.polygon([(float(x), float(y)) for x, y in points], fill=colour)


def _stroke(pen: ImageDraw.ImageDraw, points: shapes.Points, width: int) -> None:
    """The closed outline of a part, as a lead came."""
    corners = [(float(x), float(y)) for x, y in [*points, points[0], points[1]]]
    pen.line(corners, fill=INK, width=width, joint="curve")


def _plain(picture: Scene, width_px: int) -> Image.Image:
    """The look that the base model knows: flat shapes on an evenly lit wall."""
    shade = np.linspace(0.06, -0.04, width_px)[:, None, None]
    wall = np.array(BACKGROUNDS[picture.background], dtype=np.float64)
    lit = np.where(shade > 0, wall + (255 - wall) * shade, wall * (1 + shade))
    image = Image.fromarray(np.broadcast_to(lit.round(), (width_px, width_px, 3)).astype(np.uint8).copy())
    pen = ImageDraw.Draw(image)
    for thing in picture.things:
        for tone, points in _placed(thing, width_px):
            _fill(pen, points, _tone(tone, COLOURS[thing.colour]))
    return image


def _leaded(pen: ImageDraw.ImageDraw, thing: Thing, width_px: int, lead: float) -> None:
    """A thing's parts, all between leads `lead` pixels wide; the outline is stronger than the lines inside."""
    parts = _placed(thing, width_px)
    for _, points in parts:
        _stroke(pen, points, max(1, round(2 * lead)))
    for tone, points in parts:
        _fill(pen, points, _tone(tone, COLOURS[thing.colour]))
        if tone != "ink":
            _stroke(pen, points, max(1, round(0.7 * lead)))


def _stained_glass(picture: Scene, width_px: int) -> Image.Image:
    """The look of the example style: panes in shades of the background, rays of lead from the thing, and lead around each part."""
    wall = BACKGROUNDS[picture.background]
    image = Image.new("RGB", (width_px, width_px), wall)
    pen = ImageDraw.Draw(image)
    lead = LEAD_SHARE * width_px
    hub = np.array([picture.things[0].x, picture.things[0].y]) * width_px
    rays, far = 8, 2.0 * width_px
    angle = np.deg2rad(np.arange(rays + 1) * 360 / rays + 15)
    ends = hub + far * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for i in range(rays):
        _fill(pen, np.stack([hub, ends[i], ends[i + 1]]), _shade(wall, 0.3 if i % 2 else -0.14))
    for end in ends[:-1]:
        pen.line([*map(float, hub), *map(float, end)], fill=INK, width=round(lead))
    for thing in picture.things:
        _leaded(pen, thing, width_px, lead)
    pen.rectangle((0, 0, width_px - 1, width_px - 1), outline=INK, width=round(lead))
    return image


STYLES: dict[str, Callable[[Scene, int], Image.Image]] = {"plain": _plain, "stained glass": _stained_glass}


def draw(picture: Scene, *, width_px: int = WIDTH_PX, style: str = "plain") -> Image.Image:
    """The picture of a scene, drawn larger and reduced so that edges are smooth.

    Args:
        width_px: width and height in pixels.
        style: a name in `STYLES`.

    Returns:
        An RGB image of `width_px` × `width_px`.
    """
    large = STYLES[style](picture, width_px * OVERSAMPLING)
    return large.resize((width_px, width_px), Image.Resampling.BOX)


def _any_colour(rng: np.random.Generator) -> RGB:
    red, green, blue = (int(c) for c in rng.integers(0, 256, 3))
    return red, green, blue


def abstract(seed: int, index: int, *, width_px: int = WIDTH_PX) -> Image.Image:
    """Random patches, bars and dots in any colour: teaches the autoencoder to show more than the world's own look.

    Stable Diffusion's autoencoder has seen all kinds of pictures too; a style that its autoencoder cannot show could never be learned.
    """
    rng = np.random.default_rng([seed, index, 3])
    width = width_px * OVERSAMPLING
    image = Image.new("RGB", (width, width), _any_colour(rng))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 14))):
        colour = INK if rng.random() < 0.3 else _any_colour(rng)
        x, y, radius = (*rng.uniform(0, width, 2), rng.uniform(0.03, 0.3) * width)
        form = rng.integers(4)
        if form == 0:
            _fill(pen, rng.uniform(-1, 1, (int(rng.integers(3, 7)), 2)) * radius + [x, y], colour)
        elif form == 1:
            pen.ellipse((x - radius, y - radius * 0.8, x + radius, y + radius * 0.8), fill=colour)
        else:
            bar = [float(v) for v in rng.uniform(0, width, 4)]
            pen.line(bar, fill=colour, width=int(rng.uniform(0.01, 0.06) * width) + 1)
    return image.resize((width_px, width_px), Image.Resampling.BOX)


def web(seed: int, index: int, *, width_px: int = WIDTH_PX) -> Image.Image:
    """Random panes between dark lines, with outlined patches before them: fine lines are what a small autoencoder learns last."""
    rng = np.random.default_rng([seed, index, 5])
    width = width_px * OVERSAMPLING
    first = _any_colour(rng)
    image = Image.new("RGB", (width, width), first)
    pen = ImageDraw.Draw(image)
    thick = max(1, round(width * rng.uniform(0.015, 0.04)))
    for _ in range(int(rng.integers(2, 9))):
        ends = rng.uniform(-0.3, 1.3, (3, 2)) * width
        _fill(pen, ends, _shade(first, rng.uniform(-0.4, 0.5)) if rng.random() < 0.6 else _any_colour(rng))
        _stroke(pen, ends, thick)
    for _ in range(int(rng.integers(1, 5))):
        corners = int(rng.choice([3, 4, 5, 24]))
        angle = np.sort(rng.uniform(0, 2 * np.pi, corners)) if corners < 24 else np.linspace(0, 2 * np.pi, corners)
        patch = np.stack([np.cos(angle), np.sin(angle)], axis=1) * rng.uniform(0.04, 0.3) * width + rng.uniform(0, width, 2)
        _fill(pen, patch, _any_colour(rng))
        _stroke(pen, patch, thick)
    return image.resize((width_px, width_px), Image.Resampling.BOX)
