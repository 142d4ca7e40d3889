"""What there is to say about one picture's file: whether it can be read to its last byte, and what it shows at its training size.

Every file is decoded whole, because a header says nothing about the rest. Measures are taken after the picture was reduced to the area
at which it is trained: blur that is gone then harms nobody.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from sdlora import files, images, picture_checks
from sdlora.dataset import Finding
from sdlora.errors import UserError
from sdlora.picture_checks import Array

_LARGE_PX = 24_000_000  # a picture takes 8 bytes a pixel while it is converted
_ONE_LARGE = threading.Lock()
_THUMB_PX = 256
_BLURRED_PX = 1.6  # σ at training size: photographs have up to 0.8, and 1.4 to 2.0 if they were blown up four times
_BARS, _EMPTY = 0.2, 0.9  # shares of the area: a drawn frame takes 0.12, plain ground around one thing up to 0.8
_STRETCHED = 0.02  # difference of log aspect: a pixel of rounding at 64 px is 0.016
_NOTES: tuple[tuple[str, Literal["warns", "notes"], str, str], ...] = (
    ("its name says", "notes", "wrong-extension", "Rename it, since other tools go by the name."),
    ("several frames", "notes", "animated", "Save another frame as a picture of its own if that is meant."),
    ("transparent", "notes", "transparent", "Lay it on a background of your own if it should be another."),
    ("EXIF", "warns", "damaged-exif", "Look at it on the contact sheet, and save it upright if it lies on its side."),
    ("cannot be used", "warns", "damaged-profile", "Save it as sRGB if its colours look wrong."),
    ("CMYK", "warns", "cmyk", "Save it as sRGB."),
    ("colour profile", "notes", "colour-profile", "There is nothing to do."),
    ("holds values", "notes", "value-range", "Save it with 8 or 16 bits if it looks too dark or too bright."),
    ("", "notes", "picture-note", "There is nothing to do."),
)  # what `images` says of a picture, by the first fragment that it holds


@dataclass(frozen=True)
class Look:
    """What one picture's file says.

    Args:
        size_px: upright width and height; None if it cannot be read.
        digest: SHA-256 of the file.
        fingerprint: see `picture_checks`.
    """

    path: Path
    findings: tuple[Finding, ...]
    size_px: tuple[int, int] | None = None
    digest: str = ""
    fingerprint: Array | None = None


@contextmanager
def opened(path: Path, *, side_px: int) -> Iterator[tuple[tuple[int, int], images.Opened]]:
    """Upright size and picture, for several threads: of pictures beyond 24 megapixels only one is in memory.

    Args:
        side_px: a JPEG comes with at least the area of this square, or with its own.

    Raises:
        UserError: as `images.open_picture` does.
    """
    width, height = images.size_of(path)
    with _ONE_LARGE if width * height > _LARGE_PX else nullcontext():
        least = max(1.0, math.sqrt(width * height) / side_px)
        yield (width, height), images.open_picture(path, enough_px=(round(width / least), round(height / least)))


def look(path: Path, *, side_px: int) -> Look:
    """Opens a picture and measures it; whatever is wrong with it is a finding.

    Args:
        side_px: side of the square of the training sizes' area.
    """
    try:
        with opened(path, side_px=side_px) as (size_px, one):
            notes, reduced = one.notes, _reduced(one.image, side_px)
        digest = files.sha256(path)
    except UserError as problem:
        return Look(path, (_unreadable(path, problem),))
    noted = [_noted(path, note) for note in notes]
    return Look(path, (*noted, *_about_pixels(path, reduced)), size_px, digest, picture_checks.fingerprint(reduced))


def of_mask(mask: Path, *, picture_px: tuple[int, int]) -> Iterator[Finding]:
    """What is wrong with a mask.

    Args:
        picture_px: upright width and height of its picture.
    """
    try:
        image = images.open_picture(mask).image.convert("L")
    except UserError as problem:
        found = _unreadable(mask, problem)
        yield replace(found, code="mask-unreadable", what=found.what.replace("picture", "mask", 1))
        return
    if image.getextrema() == (0, 0):
        yield Finding(
            "stops",
            "mask-black",
            "The mask is all black, so nothing of its picture is learned.",
            "Paint white what should be learned.",
            mask,
        )
    elif abs(math.log(image.width * picture_px[1] / (image.height * picture_px[0]))) > _STRETCHED:
        what = f"The mask has {image.width} by {image.height} px, its picture {picture_px[0]} by {picture_px[1]}."
        yield Finding("warns", "mask-shape", what, "Save it in its picture's shape, or it is stretched.", mask)


def _reduced(image: Image.Image, side_px: int) -> Image.Image:
    """The picture at the area at which it is trained, if it has more."""
    factor = math.sqrt(image.width * image.height) / side_px
    if factor <= 1:
        return image
    size_px = max(1, round(image.width / factor)), max(1, round(image.height / factor))
    return image.resize(size_px, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _unreadable(path: Path, problem: UserError) -> Finding:
    what, _, advice = str(problem).removeprefix(f"Picture {path} ").rpartition("; ")
    code = "too-large" if "megapixels" in what else "truncated" if "truncated" in what.lower() else "unreadable"
    return Finding("stops", code, f"The picture {what}.", advice[:1].upper() + advice[1:], path)


def _noted(path: Path, note: str) -> Finding:
    _, severity, code, advice = next(row for row in _NOTES if row[0] in note)
    return Finding(severity, code, f"The picture {note}.", advice, path)


def _about_pixels(path: Path, image: Image.Image) -> Iterator[Finding]:
    if picture_checks.is_blank(image):
        yield Finding("warns", "blank", "The picture is all of one colour.", "Take it out, since nothing can be learned from it.", path)
        return
    blur_px = picture_checks.blur_px(picture_checks.grey(image))
    if blur_px > _BLURRED_PX:
        what = f"The picture is blurred by about {blur_px:.1f} px at its training size."
        yield Finding("warns", "blurred", what, "Use a sharper one, or take it out: blur is learned as part of the look.", path)
    thumb = image.copy()
    thumb.thumbnail((_THUMB_PX, _THUMB_PX), Image.Resampling.BOX)
    edges = picture_checks.edges(thumb)
    if edges.empty > _EMPTY:
        what = f"The picture is empty around what it shows, which fills {1 - edges.empty:.0%} of its area."
        yield Finding("warns", "empty-margins", what, "Cut it closer.", path)
    elif edges.bars > _BARS:
        what = f"The picture has bars or a frame on {edges.bars:.0%} of its area."
        yield Finding("warns", "bars", what, "Cut them off, or they are learned.", path)
