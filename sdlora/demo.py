"""The main job in one command: train on the bundled style, then show the same prompts without and with it.

Nothing is downloaded: base and pictures are in the project. The prompts ask for things on backgrounds that neither the base nor
the style's pictures have shown together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sdlora import base_files, compare, config, devices, files, images
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.generate import Request

ROOT = Path(__file__).parent.parent
PROMPTS = (
    "an orange fish on a blue background",
    "a red mushroom on a green background",
    "a purple umbrella on a yellow background",
    "a teal balloon on an orange background",
)


def style_config() -> Config:
    """The run that `configs/mini-style.toml` describes.

    Raises:
        UserError: if the example folders are not beside the package.
    """
    path = ROOT / "configs" / "mini-style.toml"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: the demo needs the project's folders configs/ and datasets/; run it from a clone of the project."
        )
    return config.load(path)


def sheet(run: Config, lora: Path, out: Path) -> Iterator[tuple[int, int] | Path]:
    """Draws the comparison sheet of the finished run: yields (done, total), and at the end where it lies."""
    device = devices.best_device()
    base = base_files.load(run.base, device=device, dtype=devices.base_dtype(device))
    requests = [Request(f"{run.trigger}, {words}", seed=7 + i) for i, words in enumerate(PROMPTS)]
    for item in compare.draw(base, requests, compare.columns([lora], [0.5, 1.0])):
        if isinstance(item, tuple):
            yield item
        else:
            files.write(out, images.png_bytes(item))
            yield out
