"""Pictures that are drawn while training: the same prompts and seeds at every step, the base's own first, so that steps can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdlora import base_model, files, generate, run_folder
from sdlora import material as materials
from sdlora.base_model import Base
from sdlora.config import Config
from sdlora.events import Sampled
from sdlora.material import Material


def prompts(run: Config, data: Material) -> list[str]:
    """The config's, or two of the user's own captions."""
    chosen = (data.samples[0], data.samples[len(data.samples) // 2])
    return run.sample_prompts or [materials.plain_caption(data.rules, sample) for sample in chosen]


def draw(base: Base, words: Sequence[str], folder: Path, *, seed: int, step: int, keep_text: bool) -> Sampled:
    """Draws the prompts with the adapters as they are.

    Args:
        seed: of the first; the next have the next.
        keep_text: whether the text encoders stay on the device afterwards.

    Raises:
        UserError: if a picture cannot be written.
    """
    base_model.set_training(base, False)
    paths = []
    for number, prompt in enumerate(words):
        request = generate.Request(prompt, seed=seed + number)
        ((_, image),) = generate.pictures(base, request)
        paths.append(run_folder.sample_path(folder, step, number))
        files.write(paths[-1], generate.png_bytes(image, generate.settings_text(base, request, [])))
    base_model.set_training(base, True)
    base_model.send_away(base, text=not keep_text)
    return Sampled(step, tuple(paths))
