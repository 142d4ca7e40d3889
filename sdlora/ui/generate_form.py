"""The values of the page's controls as an order: everything that a press, or a direct post, can send is checked here, once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sdlora import prompts
from sdlora.errors import UserError
from sdlora.generate import Request, Source
from sdlora.ui import gallery, generate_cards
from sdlora.ui import roots as places
from sdlora.ui import studio as studios
from sdlora.ui.studio import Order, Studio

OWN_SIZE = ""
MOST_STEPS, MOST_PICTURES, HIGHEST_GUIDANCE, MOST_SKIPPED = 150, 8, 30.0, 12
LONGEST_PROMPT = 20_000


@dataclass(frozen=True)
class Form:
    """The values of the controls, in the order in which the handler takes them; a direct post may set them to anything.

    Args:
        loras: as `generate_cards.chosen` takes them.
        random: whether each press takes a new seed.
        size: such as "512x768"; empty for the base's own.
        clip_skip: 0 for the base's own.
        picture: what `gr.ImageEditor` gives: a picture to begin with, and what was painted over it.
        token: of the browser, see `gallery`.
    """

    prompt: Any = ""
    negative: Any = ""
    loras: Any = None
    beside: Any = True
    seed: Any = 0
    random: Any = False
    count: Any = 1
    steps: Any = 20
    guidance: Any = 4.0
    sampler: Any = "DPM++ 2M"
    schedule: Any = "Automatic"
    size: Any = OWN_SIZE
    clip_skip: Any = 0
    base: Any = "mini"
    picture: Any = None
    denoise: Any = 0.75
    hires_scale: Any = 1.0
    hires_denoise: Any = 0.5
    token: Any = ""


def size_of(text: str | None) -> tuple[int | None, int | None]:
    """Width and height in px of a size such as "512x768"; (None, None) for the base's own.

    Raises:
        UserError: if the text is no size.
    """
    if not text or not str(text).strip():
        return None, None
    found = re.fullmatch(r"\s*(\d{1,5})\s*[xX×]\s*(\d{1,5})\s*", str(text))  # noqa: RUF001
    if not found:
        raise UserError(f"Size {places.shown(str(text))} is not understood; write width x height in pixels, such as 512x768.")
    return int(found[1]), int(found[2])


def order_of(studio: Studio, form: Form, session: str) -> Order:
    """What the controls ask for.

    Raises:
        UserError: if a field is empty or says nothing that can be drawn.
    """
    read, negative = (prompts.read(_words(text, what)) for text, what in ((form.prompt, "prompt"), (form.negative, "negative prompt")))
    for unread in (*read.unread, *negative.unread):
        raise UserError(f"The tag {places.shown(unread)} in the prompt is not understood; write <lora:NAME:1>, or take it out.")
    width, height = size_of(form.size)
    skip = int(_number(form.clip_skip, "Clip skip", 0, MOST_SKIPPED, whole=True))
    request = Request(
        read.words, negative.words, int(_number(form.seed, "The seed", 0, 2**32 - 1, whole=True)),
        int(_number(form.steps, "The number of steps", 1, MOST_STEPS, whole=True)), _number(form.guidance, "Guidance", 1, HIGHEST_GUIDANCE),
        str(form.sampler), width, height, str(form.schedule), skip or None, True, _number(form.denoise, "Denoising strength", 0, 1),
        _number(form.hires_scale, "The second pass's scale", 1, 4), _number(form.hires_denoise, "The second pass's strength", 0, 1),
    )  # fmt: skip
    loras = (*generate_cards.chosen(studio, form.loras), *generate_cards.tagged(studio, read.tags))
    count = int(_number(form.count, "The number of pictures", 1, MOST_PICTURES, whole=True))
    owner = gallery.owner_of(form.token, session)
    base = studios.base_of(studio, str(form.base or "").strip())
    return Order(base, request, count, loras, bool(form.beside) and bool(loras), owner, source_of(form.picture))


def _words(text: Any, what: str) -> str:
    text = text or ""
    if not isinstance(text, str) or len(text) > LONGEST_PROMPT:
        raise UserError(f"The {what} is no text of up to {LONGEST_PROMPT:,} characters; shorten it.")
    return text.encode("utf-8", "replace").decode()


def _number(value: Any, what: str, low: float, high: float, *, whole: bool = False) -> float:
    """A number of a control."""
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
    if not right or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{what} is {places.shown(str(value))}; give {kind} from {low:g} to {int(high) if whole else high}.")
    return float(value)


def source_of(picture: Any) -> Source | None:
    """The picture of an editor's value, with what was painted over it as mask; None if there is no picture.

    Raises:
        UserError: if it is too large, or nothing but white.
    """
    background = picture.get("background") if isinstance(picture, dict) else picture
    if not isinstance(background, Image.Image):
        return None
    if max(background.size) > 4 * studios.LARGEST_SIDE_PX:
        raise UserError(f"The picture has {background.width}x{background.height} px; a side may have {4 * studios.LARGEST_SIDE_PX}.")
    over_white = Image.new("RGBA", background.size, "white")
    over_white.alpha_composite(background.convert("RGBA"))
    if np.asarray(over_white.convert("RGB")).min() == 255:  # an editor without WebGL shows the picture and sends white
        raise UserError(
            "The picture to begin with came as nothing but white; choose one if there is none, or turn on hardware acceleration (WebGL) in "
            "the browser, without which it cannot be sent."
        )
    painted = np.zeros((background.height, background.width), dtype=bool)
    for layer in (picture.get("layers") or []) if isinstance(picture, dict) else []:
        if isinstance(layer, Image.Image):
            painted |= np.asarray(layer.convert("RGBA").resize(background.size, Image.Resampling.NEAREST))[..., 3] > 0
    mask = Image.fromarray(painted.astype(np.uint8) * 255) if painted.any() else None
    return Source(over_white.convert("RGB"), mask)
