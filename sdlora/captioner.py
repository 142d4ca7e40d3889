"""First drafts of captions, by BLIP (Li et al. 2022, arXiv 2201.12086), if its weights lie on this machine; nothing is ever fetched.

It is optional: a person who knows the pictures writes better captions, and a draft saves the typing. The weights are looked for in the
folder that SDLORA_CAPTIONER names, else in the cache of the Hugging Face hub under `NAME`. Only `.safetensors` is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from safetensors import SafetensorError

from sdlora import devices, images
from sdlora.errors import UserError

NAME = "Salesforce/blip-image-captioning-base"
VARIABLE = "SDLORA_CAPTIONER"
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, as BLIP was trained
MOST_TOKENS = 40


def folder() -> Path | None:
    """Where the captioner's weights lie; None if there are none here."""
    if named := os.environ.get(VARIABLE):
        found = Path(named)
    else:
        cached = try_to_load_from_cache(NAME, "config.json")
        found = Path(cached).parent if isinstance(cached, str) else Path()
    return found if (found / "config.json").is_file() and (found / "model.safetensors").is_file() else None


def captions(pictures: Sequence[Path]) -> Iterator[str]:
    """What each picture shows, in a few words, one after the other.

    Raises:
        UserError: if there is no captioner here, its weights cannot be used, or a picture cannot be read.
    """
    place = folder()
    if place is None:
        raise UserError(
            f"There is no captioner on this machine; fetch one with `hf download {NAME}`, or name a folder that holds one in {VARIABLE}."
        )
    try:
        model, tokenizer = _opened(place)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
        raise UserError(f"The captioner in {place} cannot be opened ({str(problem).splitlines()[0][:120]}); fetch it anew.") from problem
    for path in pictures:
        pixels = pixels_of(images.open_upright(path), side_px=model.config.vision_config.image_size).to(model.device)
        with torch.inference_mode():
            ids = model.generate(pixel_values=pixels, max_new_tokens=MOST_TOKENS)
        yield str(tokenizer.decode(ids[0], skip_special_tokens=True)).strip()


def pixels_of(picture: Image.Image, *, side_px: int) -> torch.Tensor:
    """A picture as BLIP sees it: squeezed into a square, [1, 3, side, side]."""
    squeezed = np.asarray(picture.convert("RGB").resize((side_px, side_px), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    scaled = (squeezed - np.array(MEAN, dtype=np.float32)) / np.array(DEVIATION, dtype=np.float32)
    return torch.from_numpy(scaled).permute(2, 0, 1)[None]


@lru_cache(maxsize=1)
def _opened(place: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, BlipForConditionalGeneration

    model = BlipForConditionalGeneration.from_pretrained(place, use_safetensors=True, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    return model.eval().to(devices.best_device()), tokenizer
