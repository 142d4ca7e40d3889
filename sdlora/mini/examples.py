"""Draws the two example datasets: `python -m sdlora.mini.examples datasets` writes `style/` and `character/` anew, byte for byte.

The style is stained glass, a look that the base has never seen; its captions begin with the trigger word. The character is "pip",
a creature that the base has never seen, alone and in company. Combinations that pretraining held out are left out here too, so that
they can show what a LoRA has understood.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sdlora.mini import world

SEED = 7
STYLE_TRIGGER = "vitrail"


def style(count: int = 30) -> Iterator[tuple[str, Image.Image]]:
    """Captions and pictures of the style: each kind at least once, colours and backgrounds in turn."""
    rng = np.random.default_rng([SEED, 1])
    every = world.combinations(held_out=False)
    for i in range(count):
        kind = world.KINDS[i % len(world.KINDS)]
        background = tuple(world.BACKGROUNDS)[i % len(world.BACKGROUNDS)]
        colours = [colour for k, colour, b in every if (k, b) == (kind, background) and colour != background]
        scene = world.scene(kind, str(rng.choice(colours)), background, rng=rng)
        yield f"{STYLE_TRIGGER}, {scene.caption}", world.draw(scene, style="stained glass")


def character(count: int = 30) -> Iterator[tuple[str, Image.Image]]:
    """Captions and pictures of pip, every other time in company."""
    rng = np.random.default_rng([SEED, 2])
    every = world.combinations(held_out=False)
    for i in range(count):
        background = tuple(world.BACKGROUNDS)[(i // 2 * 5 + i % 2 * 3) % len(world.BACKGROUNDS)]  # all of them, alone and in company
        partners = [(kind, colour) for kind, colour, b in every if b == background and colour not in (background, "teal")]
        scene = world.pip_scene(background, rng=rng, company=partners[rng.integers(len(partners))] if i % 2 else None)
        yield scene.caption, world.draw(scene)


def write(folder: Path) -> None:
    """Writes both datasets below a folder: numbered PNGs with a .txt caption each."""
    for name, pairs in (("style", style()), ("character", character())):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, (caption, image) in enumerate(pairs, start=1):
            image.save(folder / name / f"{number:02d}.png", optimize=True)
            (folder / name / f"{number:02d}.txt").write_text(caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
