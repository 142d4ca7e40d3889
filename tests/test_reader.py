"""The reader is right about pictures whose content the world knows: plain, in stained glass, spoilt, and with the character."""

import numpy as np
import pytest
from PIL import Image

from sdlora.mini import reader, world


def scenes(count: int, *, seed: int) -> list[tuple[reader.Reading, world.Scene]]:
    """Single things with any visible combination, in any size and place."""
    rng = np.random.default_rng(seed)
    every = world.combinations(held_out=False) + world.combinations(held_out=True)
    chosen = [every[i] for i in rng.integers(len(every), size=count)]
    return [(reader.Reading(*names), world.scene(*names, rng=rng)) for names in chosen]


def spoilt(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture as a small generative model would show it: soft, noisy, its colours a little off."""
    width = round(image.width * 40 / 64)
    small = image.resize((width, width), Image.Resampling.BOX).resize(image.size, Image.Resampling.BILINEAR)
    off = np.asarray(small, dtype=np.float64) + rng.uniform(-8, 8, 3) + rng.normal(0, 10, (*image.size, 3))
    return Image.fromarray(off.round().clip(0, 255).astype(np.uint8))


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def test_plain_pictures_are_read_right() -> None:
    assert share([reader.read(world.draw(scene)) == truth for truth, scene in scenes(400, seed=1)]) >= 0.99


def test_stained_glass_is_read_right() -> None:
    pairs = [(truth, reader.read(world.draw(scene, style="stained glass"))) for truth, scene in scenes(40, seed=2)]
    assert share([truth == found for truth, found in pairs]) >= 0.95
    for part in ("kind", "colour", "background"):
        assert share([getattr(truth, part) == getattr(found, part) for truth, found in pairs]) >= 0.97, part


def test_spoilt_pictures_are_read_right() -> None:
    rng = np.random.default_rng(3)
    assert share([reader.read(spoilt(world.draw(scene), rng)) == truth for truth, scene in scenes(200, seed=3)]) >= 0.95


def test_spoilt_stained_glass_is_read_right() -> None:
    rng = np.random.default_rng(7)
    pairs = [(truth, reader.read(spoilt(world.draw(scene, style="stained glass"), rng))) for truth, scene in scenes(40, seed=7)]
    assert share([truth == found for truth, found in pairs]) >= 0.92
    assert share([truth.kind == found.kind for truth, found in pairs]) >= 0.94


@pytest.mark.parametrize("style", ["plain", "stained glass"])
def test_pictures_of_twice_the_width_are_read_right(style: str) -> None:
    some = scenes(20 if style == "plain" else 12, seed=8)
    assert share([reader.read(world.draw(scene, style=style, width_px=2 * world.WIDTH_PX)) == truth for truth, scene in some]) >= 0.95


def test_ink_around_the_thing_tells_the_styles_apart() -> None:
    some = [scene for _, scene in scenes(14, seed=4)]
    plain = [reader.ink_share(world.draw(scene)) for scene in some]
    glass = [reader.ink_share(world.draw(scene, style="stained glass")) for scene in some]
    assert np.quantile(plain, 0.99) < 0.01
    assert np.quantile(glass, 0.01) > 0.08


@pytest.mark.parametrize("in_company", [False, True])
def test_pip_is_seen(in_company: bool) -> None:
    rng = np.random.default_rng([5, in_company])
    hits = []
    for _ in range(300):
        company = (str(rng.choice(world.KINDS)), str(rng.choice(list(world.COLOURS)))) if in_company else None
        background = str(rng.choice(list(world.BACKGROUNDS)))
        hits.append(reader.shows_pip(world.draw(world.pip_scene(background, rng=rng, company=company))))
    assert share(hits) >= 0.99


def test_pip_is_not_seen_where_it_is_not() -> None:
    assert share([reader.shows_pip(world.draw(world.training_scene(6, i))) for i in range(300)]) <= 0.01


def test_a_picture_without_a_thing_gets_a_reading_too() -> None:
    assert reader.read(Image.new("RGB", (128, 128), world.BACKGROUNDS["blue"])).background == "blue"
