"""Pictures of every kind end as the same upright sRGB pixels, and a damaged one ends in one sentence."""

import io
import json
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from sdlora import images
from sdlora.errors import UserError

RAMP = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)  # 6 wide, 4 high, all different: no turn maps it onto itself
COLOURS = np.stack([RAMP, 255 - RAMP, np.full_like(RAMP, 77)], -1)
SIGNED = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "GIF": ".gif"}
SIGNED |= {"AVIF": ".avif"} if features.check("avif") else {}


def saved(folder: Path, name: str, image: Image.Image, **options: object) -> Path:
    image.save(folder / name, **options)  # type: ignore[arg-type]
    return folder / name


def pixels(path: Path, **options: object) -> np.ndarray:
    opened = images.open_picture(path, **options)  # type: ignore[arg-type]
    assert opened.image.mode == "RGB"
    return np.asarray(opened.image).astype(int)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, colour: int, body: bytes, *before: bytes, depth: int = 8, behind: bytes = b"") -> bytes:
    """A PNG of which every byte is known. Colour 0 is grey, 2 RGB, 3 palette, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *before, chunk(b"IDAT", zlib.compress(body)), behind, chunk(b"IEND", b"")])


def bmp_of_runs(width: int, height: int, runs: bytes) -> bytes:
    start = 54 + 1024
    file = b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start)
    return file + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0) + bytes(1024) + runs


def profile(space: bytes, tags: dict[bytes, bytes], *, connection: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2 (ICC.1:2001-04)."""
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"Test\0" + bytes(78)
    tags = {b"desc": name, b"wtpt": xyz(0.9642, 1, 0.8249), b"cprt": b"text" + bytes(4) + b"none\0"} | tags
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        table += tag + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(data), bytes(4), 0x02100000, kind, space, connection) + struct.pack(
        ">6H", 2025, 1, 1, 0, 0, 0
    )
    head += b"acsp" + bytes(28) + struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


ADOBE = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])  # red, green, blue at D50
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])  # IEC 61966-2-1 at D50


def adobe_profile() -> bytes:
    tags = {name + b"XYZ": xyz(*row) for name, row in zip((b"r", b"g", b"b"), ADOBE, strict=True)}
    return profile(b"RGB ", tags | {name + b"TRC": gamma(563 / 256) for name in (b"r", b"g", b"b")})


def inks_profile() -> bytes:
    """CMYK whose cyan is a muddy green: L*a*b* at the 16 corners of the ink cube, darkened by black."""
    corners = []
    for inks in np.ndindex(2, 2, 2, 2):  # the last ink varies fastest
        cyan, _, _, black = inks
        corners += [0, 128, 128] if black else [127, 88, 148] if cyan else [255, 128, 128]
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    return profile(
        b"CMYK", {b"A2B0": lut + bytes(range(256)) * 4 + bytes(corners) + bytes(range(256)) * 3}, connection=b"Lab ", kind=b"prtr"
    )


@pytest.mark.parametrize("kind", SIGNED)
def test_every_kind_of_file_gives_its_pixels_and_has_nothing_to_say(tmp_path: Path, kind: str) -> None:
    image = Image.fromarray(COLOURS).resize((48, 32), Image.Resampling.BILINEAR)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}, "AVIF": {"quality": 95}}.get(kind, {})
    opened = images.open_picture(saved(tmp_path, "a" + SIGNED[kind], image, **options))
    error = np.abs(np.asarray(opened.image).astype(int) - np.asarray(image))
    assert error.max() <= {"JPEG": 8, "AVIF": 12, "GIF": 40}.get(kind, 0)
    assert (opened.alpha, opened.notes) == (None, ())
    assert images.size_of(tmp_path / ("a" + SIGNED[kind])) == (48, 32)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "LAB", "CMYK", "I;16", "I", "F"])
def test_every_mode_of_pixels_becomes_the_same_grey(tmp_path: Path, mode: str) -> None:
    grey = (RAMP > 100) * np.uint8(255) if mode == "1" else RAMP
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(Image.fromarray(grey).convert("RGB"), to_lab)
        assert image is not None
    elif mode in ("I;16", "I", "F"):
        image = Image.fromarray({"I;16": grey.astype(np.uint16) * 257, "I": grey.astype(np.int32) * 257, "F": grey / np.float32(255)}[mode])
    else:
        image = Image.fromarray(grey).convert("RGB" if mode == "CMYK" else mode).convert(mode)
    assert image.mode == mode
    found = pixels(saved(tmp_path, "a.tif", image))
    assert np.abs(found - grey[..., None]).max() <= (2 if mode == "LAB" else 0)


def test_16_bits_are_rounded_not_clipped_or_cut(tmp_path: Path) -> None:
    values = np.array([[0, 127, 129, 257, 32767, 32768, 65279, 65535]], dtype=np.uint16)
    expected = np.rint(values / 257).astype(int)
    assert pixels(saved(tmp_path, "a.png", Image.fromarray(values)))[..., 0].tolist() == expected.tolist()
    assert pixels(saved(tmp_path, "a.tif", Image.fromarray(values)))[..., 0].tolist() == expected.tolist()
    body = b"\0" + values.astype(">u2").repeat(3).tobytes()
    (tmp_path / "rgb.png").write_bytes(png(8, 1, 2, body, depth=16))
    assert np.abs(pixels(tmp_path / "rgb.png")[..., 1] - expected).max() <= 1  # Pillow keeps the upper 8 of 16 bits


def test_numbers_without_an_agreed_white_say_what_was_taken_as_white(tmp_path: Path) -> None:
    bright = Image.fromarray(np.array([[-1, 0, 2, 4]], dtype=np.float32))
    opened = images.open_picture(saved(tmp_path, "a.tif", bright))
    assert np.asarray(opened.image)[0, :, 0].tolist() == [0, 0, 128, 255]
    assert opened.notes == ("holds values from -1 to 4; 0 is taken as black, 4 as white",)
    with pytest.raises(UserError, match=r"b\.tif cannot be read \(some of its pixels are not numbers\)"):
        images.open_picture(saved(tmp_path, "b.tif", Image.fromarray(np.array([[0.5, np.nan]], dtype=np.float32))))


@pytest.mark.parametrize("ending", [".png", ".webp", ".tif", ".avif"])
def test_hidden_pixels_do_not_leak_and_half_hidden_ones_are_mixed(tmp_path: Path, ending: str) -> None:
    if ending not in images.SUFFIXES:
        pytest.skip("this Pillow reads no AVIF")
    hidden, visible = np.full((16, 16, 4), (255, 0, 0, 0), np.uint8), np.full((16, 16, 4), (0, 100, 0, 255), np.uint8)
    half = np.full((16, 16, 4), (0, 100, 0, 128), np.uint8)
    options = {".webp": {"lossless": True, "exact": True}, ".avif": {"quality": 100, "subsampling": "4:4:4"}}.get(ending, {})
    path = saved(tmp_path, "a" + ending, Image.fromarray(np.hstack([hidden, visible, half])), **options)
    opened = images.open_picture(path, background=(10, 20, 250))
    found = np.asarray(opened.image).astype(int)
    slack = 2 if ending == ".avif" else 1
    assert set(map(tuple, found[:, :16].reshape(-1, 3))) == {(10, 20, 250)}
    assert np.abs(found[:, 16:32] - (0, 100, 0)).max() <= slack
    assert np.abs(found[:, 32:] - (5, 60, 125)).max() <= slack
    assert opened.alpha is not None
    assert np.asarray(opened.alpha)[0].tolist() == [0] * 16 + [255] * 16 + [128] * 16
    assert opened.notes == ("is 50% transparent, which is laid on (10, 20, 250)",)


def test_transparency_by_key_or_palette_hides_as_well(tmp_path: Path) -> None:
    grey = b"\0" + bytes([7, 8])
    files = {
        "grey": png(2, 1, 0, grey, chunk(b"tRNS", b"\0\7")),
        "grey16": png(2, 1, 0, b"\0\0\7\0\x09", chunk(b"tRNS", b"\0\7"), depth=16),
        "rgb": png(2, 1, 2, b"\0" + bytes([7] * 3 + [8] * 3), chunk(b"tRNS", b"\0\7" * 3)),
        "rgb16": png(2, 1, 2, b"\0" + b"\x80\7" * 3 + b"\x90\7" * 3, chunk(b"tRNS", b"\x80\7" * 3), depth=16),
        "palette": png(2, 1, 3, b"\0\0\1", chunk(b"PLTE", bytes([255, 0, 0, 8, 8, 8])), chunk(b"tRNS", b"\0")),
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(content)
        opened = images.open_picture(path)
        assert opened.image.getpixel((0, 0)) == (255, 255, 255), name
        assert opened.alpha is not None, name
        assert np.asarray(opened.alpha).tolist() == [[0, 255]], name
        assert opened.image.getpixel((1, 0)) != (255, 255, 255), name
        assert opened.image.info == {}, "a key that was applied must not be saved with the pixels again"
    frames = [Image.new("P", (4, 4), 1), Image.new("P", (4, 4), 2)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 200, 0, 0, 0, 200])
    frames[0].paste(0, (0, 0, 2, 4))
    opened = images.open_picture(saved(tmp_path, "a.gif", frames[0], transparency=0, save_all=True, append_images=frames[1:]))
    assert [opened.image.getpixel((x, 0)) for x in (0, 3)] == [(255, 255, 255), (0, 200, 0)]


def test_an_opaque_alpha_channel_is_no_mask(tmp_path: Path) -> None:
    opened = images.open_picture(saved(tmp_path, "a.png", Image.fromarray(COLOURS).convert("RGBA")))
    assert (opened.alpha, opened.notes) == (None, ())
    assert np.array_equal(np.asarray(opened.image), COLOURS)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif", ".avif"])
def test_all_eight_turns_end_upright_and_the_size_is_known_from_the_header(tmp_path: Path, ending: str) -> None:
    if ending not in images.SUFFIXES:
        pytest.skip("this Pillow reads no AVIF")
    upright = Image.fromarray(COLOURS).resize((48, 32), Image.Resampling.NEAREST)
    lying = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the turn that makes the stored picture from the upright one
    options = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}, ".avif": {"quality": 95}}.get(ending, {})
    for tag, turn in lying.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
        path = saved(tmp_path, f"{tag}{ending}", stored, exif=exif, **options)
        opened = images.open_picture(path)
        assert images.size_of(path) == opened.image.size == (48, 32), tag
        assert np.abs(np.asarray(opened.image).astype(int) - np.asarray(upright)).mean() < 3, tag


def test_transparency_is_turned_with_its_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.dstack([COLOURS, RAMP]))
    opened = images.open_picture(saved(tmp_path, "a.png", stored, exif=exif))
    assert opened.alpha is not None
    assert np.array_equal(np.asarray(opened.alpha), np.rot90(RAMP, -1))


def test_a_turn_behind_the_pixels_of_a_png_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    (tmp_path / "a.png").write_bytes(png(3, 1, 0, bytes(4), behind=chunk(b"eXIf", exif.tobytes()[6:])))
    assert images.size_of(tmp_path / "a.png") == images.open_picture(tmp_path / "a.png").image.size == (1, 3)


def test_a_size_costs_no_pixels(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.png", Image.new("RGB", (30, 20)))
    whole = path.read_bytes()
    start = whole.index(b"IDAT") + 4
    path.write_bytes(whole[:start] + b"\xff" * 8 + whole[start + 8 :])
    assert images.size_of(path) == (30, 20)
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        images.open_picture(path)


def test_a_wide_gamut_profile_is_converted_as_its_matrices_say(tmp_path: Path) -> None:
    colours = np.array([[[200, 50, 50], [120, 160, 90], [128, 128, 128], [10, 20, 60]]], dtype=np.uint8)
    linear = (colours / 255) ** (563 / 256) @ ADOBE @ np.linalg.inv(SRGB)
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clip(0) ** (1 / 2.4) - 0.055)
    for name in ("a.png", "a.tif"):
        opened = images.open_picture(saved(tmp_path, name, Image.fromarray(colours), icc_profile=adobe_profile()))
        assert np.abs(np.asarray(opened.image) - expected).max() < 1.5
        assert np.asarray(opened.image)[0, 0, 0] > 215  # red shifts by more than 15 levels
        assert opened.notes == ("has the colour profile Test, converted to sRGB",)
        assert "icc_profile" not in opened.image.info, "the profile must not travel on with converted pixels"


def test_hidden_pixels_take_no_part_in_a_colour_profile(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[[255, 0, 0, 0], [200, 50, 50, 255]]], dtype=np.uint8))
    found = pixels(saved(tmp_path, "a.png", image, icc_profile=adobe_profile()), background=(200, 50, 50))
    assert found[0, 0].tolist() == [200, 50, 50]
    assert found[0, 1, 0] > 215


def test_an_srgb_profile_changes_no_pixel_and_needs_no_word(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for array in (noise, noise[..., 0]):
        opened = images.open_picture(saved(tmp_path, "a.png", Image.fromarray(array), icc_profile=srgb))
        assert np.array_equal(np.asarray(opened.image), np.broadcast_to(array.reshape(32, 32, -1), (32, 32, 3)))
        assert opened.notes == ()


def test_grey_and_ink_profiles_are_used(tmp_path: Path) -> None:
    linear = profile(b"GRAY", {b"kTRC": gamma(1)})
    assert pixels(saved(tmp_path, "g.png", Image.new("L", (2, 2), 128), icc_profile=linear))[0, 0].tolist() == [188] * 3
    inks = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], dtype=np.uint8), "CMYK")
    assert pixels(saved(tmp_path, "plain.tif", inks)).tolist() == [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]]
    opened = images.open_picture(saved(tmp_path, "inks.tif", inks, icc_profile=inks_profile()))
    white, cyan, black = np.asarray(opened.image).astype(int)[0]
    assert white.min() >= 254
    assert black.max() <= 1
    assert cyan[1] > cyan[2] > cyan[0]
    assert opened.notes == ("has the colour profile Test, converted to sRGB",)
    assert images.open_picture(tmp_path / "plain.tif").notes == ("is CMYK without a colour profile, its colours are a guess",)


@pytest.mark.parametrize(
    ("icc", "reason"),
    [(b"no profile", ""), (adobe_profile()[:300], ""), (inks_profile(), "it is for CMYK, the picture is RGB"), (b"\0" * 200, "")],
    ids=["text", "cut", "inks", "zeros"],
)
def test_a_profile_that_cannot_be_used_is_named_and_ignored(tmp_path: Path, icc: bytes, reason: str) -> None:
    opened = images.open_picture(saved(tmp_path, "a.png", Image.fromarray(COLOURS), icc_profile=icc))
    assert np.array_equal(np.asarray(opened.image), COLOURS)
    (note,) = opened.notes
    assert note.startswith(f"has a colour profile that cannot be used ({reason}")


def test_damaged_exif_is_named_and_the_picture_used(tmp_path: Path) -> None:
    cut_off = b"MM\0*" + struct.pack(">IHHHI", 8, 1, 0x010F, 2, 400)  # one entry of 400 letters, and then nothing: Pillow warns
    (tmp_path / "warns.png").write_bytes(png(2, 1, 0, bytes(3), chunk(b"eXIf", cut_off)))
    for _ in range(2):
        assert images.open_picture(tmp_path / "warns.png").notes == ()
    assert sum("PIL" in str(rule[3]) for rule in warnings.filters) == 1
    (tmp_path / "a.png").write_bytes(png(2, 1, 0, bytes(3), chunk(b"eXIf", b"MM\0")))
    assert images.open_picture(tmp_path / "a.png").notes == ("has damaged EXIF data and is taken as upright",)


def test_of_several_frames_the_first_is_used_and_that_is_said(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    for ending in (".gif", ".png", ".webp", ".tif"):
        opened = images.open_picture(saved(tmp_path, "a" + ending, frames[0], save_all=True, append_images=frames[1:]))
        red, green, blue = np.asarray(opened.image)[8, 8].astype(int)
        assert (red > 240, green < 15, blue < 15) == (True, True, True), ending
        assert opened.notes == ("holds several frames, the first is used",), ending
    phone = saved(tmp_path, "a.jpg", frames[0], format="MPO", save_all=True, append_images=frames[1:])
    assert images.open_picture(phone).notes == ()  # a phone's second picture is a depth map, not a frame


def test_the_content_counts_and_a_wrong_name_is_noted(tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS)
    for name, kind, note in (("a.png", "JPEG", "is a JPEG, its name says .png"), ("b.JPG", "WEBP", "is a WEBP, its name says .JPG")):
        assert images.open_picture(saved(tmp_path, name, image, format=kind)).notes == (note,)
    assert images.open_picture(saved(tmp_path, "c.JPEG", image)).notes == ()


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    eps = io.BytesIO()
    Image.fromarray(COLOURS).save(eps, "EPS")
    contents = {
        b"": "it is empty",
        b"<!DOCTYPE html>": "it is not one of JPEG, PNG",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "it is a HEIC picture",
        eps.getvalue(): "it is not one of JPEG, PNG",  # Pillow would start Ghostscript
    }
    for content, reason in contents.items():
        (tmp_path / "a.png").write_bytes(content)
        for read in (images.open_picture, images.size_of):
            with pytest.raises(UserError, match=rf"a\.png cannot be read \({reason}"):
                read(tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="it is not a file"):
        images.open_picture(tmp_path / "folder.png")
    with pytest.raises(UserError, match=r"none\.png cannot be read \(.*No such file"):
        images.open_picture(tmp_path / "none.png")


@pytest.mark.filterwarnings("error")
def test_the_limit_is_checked_before_a_pixel_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(10_000, 10_000, 2, b""))  # above Pillow's own limit, and without pixels
    with pytest.raises(UserError, match=r"a\.png has 10000 by 10000 pixels, 100\.0 megapixels; its kind of PNG may have 64\.0"):
        images.open_picture(path)
    assert images.size_of(path) == (10_000, 10_000)
    saved(tmp_path, "b.png", Image.fromarray(COLOURS))
    assert images.open_picture(tmp_path / "b.png", limit_px=1000).image.size == (6, 4)
    with pytest.raises(UserError, match=r"b\.png has 6 by 4 pixels"):
        images.open_picture(tmp_path / "b.png", limit_px=23)


def bombs() -> dict[str, bytes]:
    """Files of less than 1 MB that would take 130 MB to gigabytes, or minutes, if they were believed."""
    flood = zlib.compress(bytes(130_000_000))
    row = bytes(31)
    progressive = io.BytesIO()
    Image.new("L", (7000, 7000)).save(progressive, "JPEG", progressive=True, quality=1)
    jpeg = progressive.getvalue()
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return {
        "wide.png": png(60_000, 60_000, 2, b""),
        "thin.png": png(60_000_000, 1, 2, b""),
        "text.png": png(10, 1, 2, row, chunk(b"zTXt", b"a\0\0" + flood)),
        "texts.png": png(10, 1, 2, row, *[chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(1_000_000))) for i in range(90)]),
        "profile.png": png(10, 1, 2, row, chunk(b"iCCP", b"a\0\0" + flood)),
        "canvas.webp": b"RIFF" + struct.pack("<I", 122) + b"WEBPVP8X\x0a\0\0\0\x10\0\0\0" + b"\xfe\x3f\0" * 2 + bytes(100),
        "wide.gif": b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b",\0\0\0\0`\xea`\xea\0\x02\x02D\x01\0;",
        "frame.gif": b"GIF89a\x01\0\x01\0\0\0\0," + struct.pack("<4HB", 60_000, 60_000, 60_000, 60_000, 0) + b"\x02\x02D\x01\0;",
        "skip.bmp": bmp_of_runs(15_000_000, 1, b"\0\2\xff\xff"),  # one skip of 255 rows
        "rows.bmp": bmp_of_runs(8000, 8000, b"\1\1\0\0" * 8000),
        "passes.jpg": jpeg[:-2] + last * 200 + b"\xff\xd9",
    }


def test_bombs_are_refused_in_little_time_and_memory(tmp_path: Path) -> None:
    files = bombs()
    for name, content in files.items():
        assert len(content) < 1_000_000
        (tmp_path / name).write_bytes(content)
    script = (
        "import json, resource, sys, time\n"
        "from pathlib import Path\n"
        "from sdlora import images\n"
        "from sdlora.errors import UserError\n"
        "def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "found = {}\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    started_s, before_mb = time.monotonic(), peak_mb()\n"
        "    try: said = str(images.open_picture(path).image.size)\n"
        "    except UserError as problem: said = str(problem)\n"
        "    found[path.name] = [said, time.monotonic() - started_s, peak_mb() - before_mb]\n"
        "print(json.dumps(found))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    found = json.loads(ran.stdout)
    assert set(found) == set(files)
    for name, (said, took_s, grew_mb) in found.items():
        assert name in said, (name, said)
        assert took_s < 5, (name, took_s)
        assert grew_mb < 100, (name, grew_mb)


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Cut off, overwritten in a few places, or with a piece left out or said twice."""
    at = int(random.integers(len(content)))
    kind = int(random.integers(4))
    if kind == 0:
        return content[:at]
    if kind == 1:
        bytes_ = bytearray(content)
        for place in random.integers(0, len(content), int(random.integers(1, 8))):
            bytes_[place] = random.choice([0, 1, 127, 128, 255, int(random.integers(256))])
        return bytes(bytes_)
    end = at + int(random.integers(1, 40))
    return content[:at] + content[end:] if kind == 2 else content[:end] + content[at:]


def originals() -> list[tuple[str, bytes]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker" * 4
    image = Image.fromarray(COLOURS).resize((24, 16))
    saves: list[tuple[str, Image.Image, dict[str, object]]] = [
        ("PNG", image.convert("RGBA"), {"exif": exif, "icc_profile": adobe_profile()}),
        ("PNG", image.convert("P"), {"transparency": 3}),
        ("JPEG", image, {"exif": exif, "icc_profile": adobe_profile()}),
        ("JPEG", image.convert("CMYK"), {"progressive": True}),
        ("WEBP", image.convert("RGBA"), {"exif": exif}),
        ("WEBP", image, {"save_all": True, "append_images": [image.rotate(90)]}),
        ("BMP", image.convert("P"), {}),
        ("TIFF", image, {"compression": "tiff_lzw", "icc_profile": adobe_profile()}),
        ("TIFF", Image.fromarray(RAMP.astype(np.uint16) * 257), {"compression": "tiff_adobe_deflate"}),
        ("TIFF", image.convert("F"), {"save_all": True, "append_images": [image.convert("F")]}),
        ("GIF", image, {"save_all": True, "append_images": [image.rotate(90)]}),
    ]
    saves += [("AVIF", image.convert("RGBA"), {"exif": exif})] if "AVIF" in SIGNED else []
    found = []
    for kind, original, options in saves:
        buffer = io.BytesIO()
        original.save(buffer, kind, **options)  # type: ignore[arg-type]
        found.append((SIGNED[kind], buffer.getvalue()))
    return [*found, (".bmp", bmp_of_runs(4, 2, b"\4\7\0\0\2\1\0\2\1\0\1\5\0\1"))]


def test_every_damaged_file_ends_in_a_picture_or_in_one_sentence(tmp_path: Path) -> None:
    kinds = originals()
    sentences = []
    reads: list[Callable[[Path], object]] = [images.size_of, images.open_picture]
    for seed in range(520):
        ending, content = kinds[seed % len(kinds)]
        path = tmp_path / f"{seed}{ending}"
        path.write_bytes(damaged(content, np.random.default_rng(seed)))
        for read in reads:
            try:
                read(path)
            except UserError as problem:
                sentences.append((path.name, str(problem)))
    assert all(name in said and "\n" not in said for name, said in sentences)
    assert 300 < len(sentences) < 900


@pytest.mark.parametrize("ending", [".jpg", ".png", ".tif", ".bmp", ".webp", ".gif"])
def test_a_picture_whose_end_is_missing_is_never_used(tmp_path: Path, ending: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = saved(tmp_path, "a" + ending, noise)
    whole = path.read_bytes()
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match=r"a\.\w+ cannot be read"):
            images.open_picture(path)


def test_no_picture_is_changed_by_being_read(tmp_path: Path) -> None:
    for number, (ending, content) in enumerate(originals()):
        path = tmp_path / f"{number}{ending}"
        path.write_bytes(content)
        images.open_picture(path)
        images.size_of(path)
        assert path.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == len(originals())


def test_a_picture_is_placed_where_it_is_said() -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8).repeat(8, 0).repeat(8, 1))
    placed = images.place(image, resized_px=(64, 64), left=16, top=8, size_px=(32, 24))
    assert np.array_equal(np.asarray(placed), np.asarray(image)[8:32, 16:48])
    assert images.place(image, resized_px=(20, 10), left=2, top=0, size_px=(18, 10)).size == (18, 10)
    for left, top in ((-1, 0), (3, 0), (0, 1)):
        with pytest.raises(ValueError, match="reaches out"):
            images.place(image, resized_px=(20, 10), left=left, top=top, size_px=(18, 10))


def test_a_much_larger_picture_is_averaged_not_sampled() -> None:
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    found = np.asarray(images.place(Image.fromarray(stripes), resized_px=(40, 40), left=0, top=0, size_px=(40, 40)))
    assert np.abs(found[:, 2:-2].astype(int) - 127).max() <= 2
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8))
    exact = noise.resize((60, 40), Image.Resampling.LANCZOS)
    quick = images.place(noise, resized_px=(60, 40), left=0, top=0, size_px=(60, 40))
    assert np.abs(np.asarray(exact).astype(int) - np.asarray(quick)).mean() < 2


def test_a_mask_keeps_its_area_when_it_shrinks() -> None:
    mask = np.zeros((24, 40), np.uint8)
    mask[:12, :20] = 255
    mask[3, 33] = 255
    shares = images.mask_tensor(Image.fromarray(mask), height=3, width=5)
    assert (shares.shape, shares.dtype) == (torch.Size([3, 5]), torch.float32)
    assert shares[0].tolist() == pytest.approx([1, 1, 0.5, 0, 1 / 64])
    assert shares[1].tolist() == pytest.approx([0.5, 0.5, 0.25, 0, 0])
    odd = images.mask_tensor(Image.fromarray(mask), height=5, width=7)
    assert odd.mean().item() == pytest.approx(mask.mean() / 255, abs=1e-3)
