"""From an image file, whatever its kind, to upright RGB pixels in sRGB. The file itself is never changed.

Three decisions. The file's first bytes say what it is, not its name, and only the kinds below are tried. Its size is checked before
a pixel is decoded, by our own limit: Pillow's is a warning, and its switch belongs to the whole process. And whatever a decoder
raises over a damaged file ends in one sentence that names the file; half a picture is never used. What was done to a picture on
the way (a colour profile applied, a frame chosen) is said in `Opened.notes`.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, features
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from sdlora.errors import UserError

_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
} | ({"AVIF": (".avif",)} if features.check("avif") else {})
SUFFIXES = frozenset(ending for endings in _ENDINGS.values() for ending in endings)
BACKGROUND = (255, 255, 255)  # what transparent pictures are laid on, so that hidden pixels cannot leak into training
LIMIT_PX = 64_000_000

_COST = {"WEBP": 18, "AVIF": 10, "transparent": 10, "progressive": 10, "F": 10, "I": 10, "bmp_rle": 32}  # bytes a pixel
_USUAL_COST = 8  # two pictures in memory at the peak: 64 MP take 0.5 GB; what costs more may have fewer pixels (RLE costs time)
_LIMIT_SIDE_PX = 65_535  # JPEG's own; one skipped row of a run-length BMP 64 million pixels wide would take 16 GB
_LIMIT_SCAN_PX = 2_000_000_000  # pixels times passes of a progressive JPEG: 31 passes at 64 MP, where encoders write about 10
_LIMIT_BYTES_PER_PX = 4  # of the file, against the limit in pixels: some decoders hold the whole file
_NO_PILLOW_WARNING = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF 2.32, tag 274


@dataclass(frozen=True)
class Opened:
    """A picture as it goes into training, what it had of transparency, and what was done to it, in words that follow its name."""

    image: Image.Image
    alpha: Image.Image | None = None  # "L", 0 where it was invisible; None if all of it was visible
    notes: tuple[str, ...] = ()


def open_picture(
    path: Path, *, background: tuple[int, int, int] = BACKGROUND, limit_px: int = LIMIT_PX, enough_px: tuple[int, int] | None = None
) -> Opened:
    """The picture as RGB in sRGB, turned as its EXIF says, transparency laid on the background.

    Args:
        background: red, green, blue, 0 to 255.
        limit_px: width times height that is still decoded.
        enough_px: width and height, before any turn, below which a JPEG need not be decoded: it comes at a half, a quarter or an
            eighth of its size where that is enough, in a third of the time.

    Raises:
        UserError: if it cannot be read to its last byte, is none of the kinds above, or is larger than the limit.
    """
    with _picture_file(path, limit_px=limit_px) as file:
        _check_size(file, path, limit_px=limit_px)
        if enough_px is not None:
            file.draft(None, enough_px)  # changes JPEG alone
        file.load()
        notes = [*_notes_on_file(file, path)]
        turn = _turn(file, notes)
        alpha = _alpha(file)
        image = _to_srgb(_eight_bits(file, notes), file.info.get("icc_profile"), notes)
        if image is not file:
            file.close()  # frees its pixels: at no time are there more than two pictures in memory
        if alpha is not None:
            share = 1 - float(np.dot(alpha.histogram(), np.arange(256))) / 255 / (alpha.width * alpha.height)
            notes.append(f"is {share:.0%} transparent, which is laid on {background}")
            image.paste(background, mask=ImageOps.invert(alpha))
        upright, upright_alpha = (part and (part.copy() if turn is None else part.transpose(turn)) for part in (image, alpha))
        assert upright is not None
        upright.info = {}  # profile, turn and transparent colour were applied; saved with the pixels they would be again
        return Opened(upright, upright_alpha, tuple(notes))


def open_upright(path: Path) -> Image.Image:
    """The picture of `open_picture`, with its defaults, without what there is to say about it."""
    return open_picture(path).image


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of the upright picture in pixels, from the file's header: no pixel is decoded.

    Raises:
        UserError: if its header cannot be read.
    """
    with _picture_file(path, limit_px=LIMIT_PX) as file:
        if file.format == "PNG" and _speaks_behind_its_pixels(file):
            _check_size(file, path, limit_px=LIMIT_PX)
            file.load()
        lying = file.format != "TIFF" and _turn(file, []) in [_TURNS[tag] for tag in (5, 6, 7, 8)]  # Pillow turns TIFF itself
        return (file.height, file.width) if lying else file.size


def place(image: Image.Image, *, resized_px: tuple[int, int], left: int, top: int, size_px: tuple[int, int]) -> Image.Image:
    """The picture resized, then the box of `size_px` cut out of it.

    Lanczos; a picture six times too large or more is first averaged by a whole factor: 12 MP to 512 pixels in 0.04 s, not 0.11.

    Args:
        resized_px: width and height of the whole resized picture.
        left, top: the corner of the box in it.
        size_px: width and height of the box.

    Raises:
        ValueError: if the box reaches out of the picture: Pillow would fill it with black.
    """
    right, bottom = left + size_px[0], top + size_px[1]
    if min(left, top) < 0 or right > resized_px[0] or bottom > resized_px[1]:
        raise ValueError(f"the box {(left, top, right, bottom)} reaches out of {resized_px}")
    resized = image.resize(resized_px, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return resized.crop((left, top, right, bottom))


def square(image: Image.Image, side_px: int) -> Image.Image:
    """The middle square of a picture, resized to `side_px`."""
    return ImageOps.fit(image, (side_px, side_px), Image.Resampling.LANCZOS)


def mask_tensor(mask: Image.Image, *, height: int, width: int) -> Tensor:
    """A mask → [height, width] floats from 0 to 1, each the mean of the pixels it stands for.

    Args:
        mask: greyscale, white where the loss counts, already cut like its picture.
        height, width: of the latents.
    """
    shares = mask.convert("L").convert("F").resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.array(shares)) / 255


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture → [3, H, W] floats from -1 to 1, as the autoencoder takes them."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def png_bytes(image: Image.Image) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] floats from -1 to 1 → RGB picture, rounded as diffusers rounds."""
    array = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


@contextmanager
def _picture_file(path: Path, *, limit_px: int) -> Iterator[ImageFile.ImageFile]:
    """The file with its header read. Whatever goes wrong while it is open is the file's fault, and becomes one sentence."""
    if _NO_PILLOW_WARNING not in warnings.filters:  # not at import: a caller may have reset the filters since
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        if path.stat().st_size > limit_px * _LIMIT_BYTES_PER_PX:
            raise ValueError(f"the file has {path.stat().st_size:,} bytes, {limit_px * _LIMIT_BYTES_PER_PX:,} are allowed")
        with path.open("rb") as handle, _identified(handle) as file:
            yield file
    except UserError:
        raise
    except Exception as problem:  # Pillow's decoders raise struct.error, IndexError, KeyError, MemoryError, zlib.error and more
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise UserError(
            f"Picture {path} cannot be read ({reason}); save it anew as PNG or JPEG, or take it out of the folder."
        ) from problem


def _identified(handle: IO[bytes]) -> ImageFile.ImageFile:
    """What `Image.open` does, for our kinds alone and without its limit on pixels."""
    prefix = handle.read(16)
    Image.init()
    for kind in _ENDINGS:
        factory, accepts = Image.OPEN[kind]
        if accepts and accepts(prefix) is True:
            handle.seek(0)
            return JpegImageFile(handle, "") if kind == "JPEG" else factory(handle, "")  # the factory might read on to a second one
    if prefix[4:8] == b"ftyp":
        raise ValueError("it is a HEIC picture or a video")
    raise ValueError(f"it is not one of {', '.join(_ENDINGS)}" if prefix else "it is empty")


def _check_size(file: ImageFile.ImageFile, path: Path, *, limit_px: int) -> None:
    size_px = file.width * file.height
    traits = [file.format, file.mode, *file.info, *(tile[0] for tile in file.tile), *["transparent"] * file.has_transparency_data]
    allowed_px = limit_px * _USUAL_COST // max(_COST.get(str(trait), _USUAL_COST) for trait in traits)
    if size_px > allowed_px or max(file.size) > _LIMIT_SIDE_PX:
        raise UserError(
            f"Picture {path} has {file.width} by {file.height} pixels, {size_px / 1e6:.1f} megapixels; its kind of {file.format} "
            f"may have {allowed_px / 1e6:.1f} and no side above {_LIMIT_SIDE_PX}; save it smaller."
        )
    if file.format == "JPEG" and file.fp is not None:
        passes = 1 + file.fp.read().partition(b"\xff\xd9")[0].count(b"\xff\xda")  # Pillow stopped behind the first
        if passes * size_px > _LIMIT_SCAN_PX:
            raise ValueError(f"it is drawn in {passes} passes")


def _notes_on_file(file: ImageFile.ImageFile, path: Path) -> Iterator[str]:
    kind = str(file.format)
    if path.suffix.lower() not in _ENDINGS[kind]:
        yield f"is a {kind}, its name says {path.suffix or 'nothing'}"
    if getattr(file, "is_animated", False):
        yield "holds several frames, the first is used"


def _speaks_behind_its_pixels(file: ImageFile.ImageFile) -> bool:
    """Whether a PNG has EXIF or text behind its pixels, where it may say how to turn it (PNG 3, section 11.3.4.6)."""
    assert file.fp is not None
    start = file.fp.tell()
    file.fp.seek(start - 8)
    kinds = set()
    while len(head := file.fp.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        kinds.add(kind)
        file.fp.seek(length + 4, io.SEEK_CUR)
    file.fp.seek(start)
    return not kinds.isdisjoint({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})


def _turn(file: ImageFile.ImageFile, notes: list[str]) -> Image.Transpose | None:
    try:
        return _TURNS.get(Image.Image.getexif(file).get(ExifTags.Base.Orientation, 1))  # PNG's own getexif decodes all pixels
    except Exception:  # as many kinds as above; the pixels are whole
        notes.append("has damaged EXIF data and is taken as upright")
        return None


def _alpha(file: Image.Image) -> Image.Image | None:
    """How visible each pixel is, "L"; None if all of them are."""
    key = file.info.get("transparency")
    if file.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        file.info["transparency"] = tuple(value >> 8 for value in key)  # of 16 bits, where Pillow gives the upper 8
    if not file.has_transparency_data:
        return None
    if file.mode.startswith("I"):
        alpha = Image.fromarray((np.asarray(file) != key).astype(np.uint8) * 255)
    else:
        alpha = (file if file.mode == "RGBA" else file.convert("RGBA")).getchannel("A")
    return alpha if alpha.getextrema() != (255, 255) else None


def _eight_bits(file: Image.Image, notes: list[str]) -> Image.Image:
    """The colours in a mode that a profile can be for: "L", "RGB", "CMYK" or "LAB". The file itself where it is in one."""
    if file.mode.startswith("I;16"):
        return _scaled(file, white=65535)
    if file.mode in ("I", "F"):
        return _stretched(file, notes)
    if file.mode in ("L", "RGB", "CMYK", "LAB"):
        return file
    return file.convert("L" if file.mode in ("1", "LA") else "RGB")


def _stretched(file: Image.Image, notes: list[str]) -> Image.Image:
    """Floats and 32-bit integers, which have no agreed white: 1 and 65535, or the brightest value above that."""
    low, high = file.getextrema()
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    white = max(high, 1 if file.mode == "F" else 65535)
    notes.append(f"holds values from {low:g} to {high:g}; 0 is taken as black, {white:g} as white")
    return _scaled(file, white=white)


def _scaled(file: Image.Image, *, white: float) -> Image.Image:
    """Values from 0 to `white` → 0 to 255, rounded; in strips, because floats of the whole would take 8 bytes a pixel."""
    grey = Image.new("L", file.size)
    rows = max(1, 1_000_000 // file.width)
    for top in range(0, file.height, rows):
        strip = np.asarray(file.crop((0, top, file.width, min(top + rows, file.height)))).astype(np.float64)
        if not np.isfinite(strip).all():
            raise ValueError("some of its pixels are not numbers")
        grey.paste(Image.fromarray((strip.clip(0, white) * (255 / white) + 0.5).astype(np.uint8)), (0, top))
    return grey


def _to_srgb(colours: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """Colours as an sRGB screen shows them: through the profile that came with them, else by Pillow's rule for their mode."""
    if profile:
        try:
            return _through_profile(colours, profile, notes)
        except Exception as problem:  # ImageCms.PyCMSError, OSError, ValueError
            notes.append(f"has a colour profile that cannot be used ({problem}) and is ignored")
    if colours.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _applied(ImageCms.buildTransform(lab, srgb, "LAB", "RGB"), colours)
    if colours.mode == "CMYK":
        notes.append("is CMYK without a colour profile, its colours are a guess")
    return colours if colours.mode == "RGB" else colours.convert("RGB")


def _through_profile(colours: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """Relative colorimetric with black point compensation, as browsers and Photoshop do it (ICC.1:2022)."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip())
    if mode is None or (mode != colours.mode and (mode, colours.mode) != ("RGB", "L")):
        raise ValueError(f"it is for {source.profile.xcolor_space.strip()}, the picture is {colours.mode}")
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", renderingIntent=intent, flags=flags)
    colours = colours if colours.mode == mode else colours.convert(mode)
    if mode != "CMYK" and _changes_nothing(transform, mode):
        return colours if mode == "RGB" else colours.convert("RGB")
    name = "".join(filter(str.isprintable, source.profile.profile_description or "")) or "without a name"
    notes.append(f"has the colour profile {name}, converted to sRGB")
    return _applied(transform, colours)


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether no colour moves by more than one level of 255: sRGB by another maker, whose rounding is not worth applying."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    lattice = Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3))
    probe = ramp if mode == "L" else lattice
    before, after = (np.asarray(image.convert("RGB"), dtype=int) for image in (probe, _applied(transform, probe.copy())))
    return bool(np.abs(before - after).max() <= 1)


def _applied(transform: ImageCms.ImageCmsTransform, colours: Image.Image) -> Image.Image:
    """The colours in sRGB: where they lie if they are RGB, because a second picture costs as much memory as the first."""
    return ImageCms.applyTransform(colours, transform, inPlace=colours.mode == "RGB") or colours
