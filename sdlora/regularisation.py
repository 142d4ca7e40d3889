"""Prior preservation: what the base knows of a class stays what it is while a LoRA learns one subject of it.

DreamBooth (Ruiz et al. 2022, arXiv 2208.12242, section 3.3) trains on pictures that the base itself draws of the class. Two ways
need no collecting: the base draws them from the user's own captions with the class word in the trigger word's place, once and kept;
or no pictures at all, the LoRA's answer to such a caption is held to the base's own answer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdlora import base_model, files, generate
from sdlora.base_model import Base
from sdlora.generate import Request

SAMPLER, STEPS, GUIDANCE = "DPM++ 2M", 20, 6.0  # of drawn pictures; changing one draws them anew


def class_caption(caption: str, *, trigger: str, class_word: str) -> str:
    """The caption with the class word where the trigger word stands; an empty class word just takes the trigger out."""
    words = re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", class_word, caption, flags=re.IGNORECASE) if trigger else caption
    return re.sub(r"^[\s,]+|[\s,]+$", "", words)


def request(caption: str, *, seed: int, size_px: tuple[int, int]) -> Request:
    """What the base is asked to draw for one caption."""
    width, height = size_px
    return Request(caption, seed=seed, steps=STEPS, guidance=GUIDANCE, sampler=SAMPLER, width_px=width, height_px=height)


def drawn(base: Base, wanted: Sequence[Request], folder: Path) -> Iterator[Path]:
    """The pictures, each drawn by the base without any LoRA unless this base has drawn it before; they lie in the folder.

    Raises:
        UserError: if a picture cannot be written.
    """
    base_hash = base_model.weights_hash(base)
    for request in wanted:
        told = json.dumps([base_hash, request.__dict__], sort_keys=True)
        path = folder / f"{hashlib.sha256(told.encode()).hexdigest()}.png"
        if not path.is_file():
            ((_, image),) = generate.pictures(base, request)
            files.write(path, generate.png_bytes(image, generate.settings_text(base, request, [])))
        yield path
