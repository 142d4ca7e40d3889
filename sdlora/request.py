"""What a picture is made from, as one record; with the same request, base, LoRAs and source it is the same picture."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from PIL import Image, ImageOps

from sdlora.base_model import Base
from sdlora.errors import UserError


@dataclass(frozen=True)
class Request:
    """What one picture is made from.

    Args:
        schedule: where the steps lie, a key of `samplers.SCHEDULES`.
        clip_skip: which layer of the text encoder is listened to, counted from the last; the base's own if not given.
        weighted: whether prompts are read with the syntax of `prompts`, or as they stand like captions.
        denoise: how much of a source picture is drawn anew, above 0 to 1.
        hires_scale: the picture is drawn, enlarged so many times and drawn again; 1 for one pass.
        hires_denoise: how much of it the second pass draws anew.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 4.0
    sampler: str = "DPM++ 2M"
    width_px: int | None = None
    height_px: int | None = None
    schedule: str = "Automatic"
    clip_skip: int | None = None
    weighted: bool = False
    denoise: float = 0.75
    hires_scale: float = 1.0
    hires_denoise: float = 0.5


@dataclass(frozen=True)
class Source:
    """A picture to begin with.

    Args:
        image: RGB.
        mask: "L" of the same size, white where it is to be drawn anew; without one it is everywhere.
    """

    image: Image.Image
    mask: Image.Image | None = None

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that say which picture and mask it is."""
        told = hashlib.sha256(f"{self.image.size}".encode())
        told.update(self.image.tobytes())
        told.update(self.mask.tobytes() if self.mask else b"")
        return told.hexdigest()[:16]


def size_px(base: Base, request: Request, source: Source | None = None) -> tuple[int, int]:
    """Width and height of the first pass: as asked for, else with a source its shape at the base's area, else the base's own.

    Raises:
        UserError: if a side is not a multiple of the base's reduction, or too small.
    """
    grain, side = base.reduction, base.resolution_px
    own = (side, side)
    if source:
        ratio = math.sqrt(source.image.width / source.image.height)
        own = (_nearest(side * ratio, base.grain_px), _nearest(side / ratio, base.grain_px))
    width, height = request.width_px or own[0], request.height_px or own[1]
    if width % grain or height % grain or min(width, height) < base.grain_px:
        raise UserError(
            f"Size {width}x{height} cannot be drawn with base '{base.name}'; both sides must be multiples of {grain} px, "
            f"at least {base.grain_px}."
        )
    return width, height


def final_size_px(base: Base, request: Request, source: Source | None = None) -> tuple[int, int]:
    """Width and height of the finished picture.

    Raises:
        UserError: as `size_px`, and if it cannot be enlarged.
    """
    width, height = size_px(base, request, source)
    if request.hires_scale == 1:
        return width, height
    if not 1 < request.hires_scale <= 4:
        raise UserError(f"The second pass cannot enlarge {request.hires_scale:g} times; choose from 1 to 4.")
    if source:
        raise UserError("The second pass enlarges what was drawn from words alone; take the picture away, or set the scale to 1.")
    return _nearest(width * request.hires_scale, base.grain_px), _nearest(height * request.hires_scale, base.grain_px)


def _nearest(side: float, grain: int) -> int:
    return max(1, round(side / grain)) * grain


def fitted(source: Source, size: tuple[int, int]) -> Source:
    """A source that fills a size: scaled, and cut at the middle where its shape is another."""
    mask = source.mask and ImageOps.fit(source.mask.convert("L"), size, Image.Resampling.BILINEAR)
    return Source(ImageOps.fit(source.image.convert("RGB"), size, Image.Resampling.LANCZOS), mask)
