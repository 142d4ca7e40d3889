"""A folder in which everything is wrong that people's folders have wrong, beside pictures that are right.

`make` writes it and says what the doctor should find: file, severity and code of each defect. `damage` writes files that were cut off or
had bytes changed. All of it is a function of seeds.
"""

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageEnhance, ImageFilter, ImageOps, features

TRIGGER, SIDE_PX = "zrk", 64
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "GIF": ".gif"} | (
    {"AVIF": ".avif"} if features.check("avif") else {}
)


@dataclass(frozen=True)
class Nasty:
    """What lies where.

    Args:
        defects: (kind, file or folder relative to the root, severity, code).
        good: pictures that nothing should be said about.
    """

    root: Path
    defects: list[tuple[str, str, str, str]] = field(default_factory=list)
    good: list[str] = field(default_factory=list)

    def put(self, name: str, image: Image.Image | bytes, caption: str | bytes | None = "", **options: object) -> Path:
        """A picture with a caption beside it: one of its own if none is given, none at all for None."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path, **options)  # type: ignore[arg-type]
        said = f"{TRIGGER}, a drawing of some {len(list(path.parent.iterdir()))} shapes" if caption == "" else caption
        if said is not None:
            path.with_suffix(".txt").write_bytes(said.encode() if isinstance(said, str) else said)
        return path

    def bad(
        self,
        kind: str,
        severity: str,
        code: str,
        name: str,
        image: Image.Image | bytes,
        caption: str | bytes | None = "",
        **options: object,
    ) -> Path:
        """A picture that is to be found; its file is `name` in the folder plain."""
        path = self.put(f"plain/{name}", image, caption, **options)
        self.expect(kind, severity, code, f"plain/{name}")
        return path

    def expect(self, kind: str, severity: str, code: str, name: str) -> None:
        self.defects.append((kind, name, severity, code))


def drawing(seed: int, size_px: tuple[int, int] = (SIDE_PX, SIDE_PX)) -> Image.Image:
    """Coloured shapes with crisp edges, drawn at four times the size; each seed another picture."""
    chance = random.Random(seed)
    wide, high = (4 * side for side in size_px)

    def colour() -> tuple[int, int, int]:
        return chance.randrange(256), chance.randrange(256), chance.randrange(256)

    image = Image.new("RGB", (wide, high), colour())
    pen = ImageDraw.Draw(image)
    for _ in range(9):
        left, top = chance.randrange(-wide // 6, wide), chance.randrange(-high // 6, high)
        box = left, top, left + chance.randrange(wide // 6, wide // 2 + 2), top + chance.randrange(high // 6, high // 2 + 2)
        chance.choice((pen.rectangle, pen.ellipse))(box, fill=colour())
    return image.resize(size_px, Image.Resampling.BOX)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def make(root: Path) -> Nasty:
    """Writes the whole folder: plain/, table/, classes/, masked/ with masks/, and apart/ for validation."""
    nasty = Nasty(root)
    for part in (_good, _files, _other_files, _kinds, _looks, _sizes, _copies, _captions, _caption_files, _table, _classes, _masks, _links):
        part(nasty)
    return nasty


def _good(nasty: Nasty) -> None:
    """Odd and right: every format, mode, turn and name that is read as it is."""
    turned = Image.Exif()
    turned[0x0112] = 6
    image = drawing(1)
    names = ["one.png", "sp ace.png", "-dash.png", "ünï ☆.png", "line\nbreak.png", "dots.v1.2.png", "UPPER.PNG", "sub/deep er/two.jpg"]
    for seed, name in enumerate(names):
        nasty.put(f"plain/good/{name}", drawing(10 + seed))
    for seed, (kind, ending) in enumerate(FORMATS.items()):
        nasty.put(f"plain/good/kind-{kind}{ending}", encoded(drawing(30 + seed), kind))
    modes = {"L": drawing(40).convert("L"), "1": drawing(41).convert("1"), "P": drawing(42).convert("P"), "LA": drawing(43).convert("LA")}
    modes["16"] = Image.fromarray(np.asarray(drawing(44).convert("L")).astype(np.uint16) * 257)
    for mode, one in modes.items():
        nasty.put(f"plain/good/mode-{mode}.png", one)
    nasty.put("plain/good/turned.jpg", image, exif=turned, quality=95)
    nasty.put("plain/good/opaque.png", drawing(45).convert("RGBA"))
    nasty.put("plain/good/large.png", drawing(46, (200, 190)))
    nasty.put("plain/good/wide.png", drawing(47, (100, 60)))
    nasty.put("plain/good/bom.png", drawing(48), b"\xef\xbb\xbfzrk, several shapes\r\nin two lines\r\n")
    nasty.put("plain/good/other-ending.png", drawing(49), None)
    (nasty.root / "plain/good/other-ending.caption").write_text("zrk, shapes with another ending")
    found = (nasty.root / "plain/good").rglob("*")
    nasty.good.extend(str(path.relative_to(nasty.root)) for path in found if path.suffix.lower() in FORMATS.values())


def _files(nasty: Nasty) -> None:
    """What cannot be read."""
    bad = nasty.bad
    bad("nothing in it", "stops", "empty-file", "empty.png", b"")
    bad("a text", "stops", "unreadable", "text.png", b"this is no picture")
    bad("a web page", "stops", "unreadable", "page.jpg", b"<!DOCTYPE html><html><body>404</body></html>")
    bad("an archive", "stops", "unreadable", "archive.png", b"PK\x03\x04" + bytes(200))
    bad("a HEIC under another name", "stops", "unreadable", "phone.jpg", b"\0\0\0\x18ftypheic" + bytes(100))
    bad("zeros, as after a crash", "stops", "unreadable", "zeros.jpg", bytes(5000))
    bad("the header alone", "stops", "", "header.png", encoded(drawing(100), "PNG")[:33])
    for seed, (kind, ending) in enumerate(FORMATS.items()):
        content = encoded(drawing(110 + seed), kind)
        path = bad(f"half a {kind}", "stops", "", f"half-{kind}{ending}", content[: len(content) // 2])
        assert path.stat().st_size
    content = bytearray(encoded(drawing(120), "PNG"))
    content[content.index(b"IDAT") + 40] ^= 0xFF
    bad("a PNG with wrong bytes", "stops", "unreadable", "bytes.png", bytes(content))
    content = bytearray(encoded(drawing(121), "TIFF"))
    content[4:8] = struct.pack("<I", 0x7FFFFFFF)
    bad("a TIFF that points nowhere", "stops", "unreadable", "nowhere.tif", bytes(content))
    bad("a bomb", "stops", "too-large", "bomb.png", _png(60_000, 60_000))
    bad("as wide as a town", "stops", "too-large", "town.png", _png(500_000, 2))


def _png(width: int, height: int) -> bytes:
    """A PNG that says a size and holds 100 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def _other_files(nasty: Nasty) -> None:
    """What is no picture for us, or nobody's."""
    for kind in ("heic", "psd", "svg", "mp4", "cr2"):
        (nasty.root / f"plain/raw.{kind}").write_bytes(b"something")
        nasty.expect(f"a .{kind}", "warns", "unsupported", f"plain/raw.{kind}")
    (nasty.root / "plain/.hidden.png").write_bytes(b"hidden")
    (nasty.root / "plain/._one.png").write_bytes(b"left by macOS")
    (nasty.root / "plain/Thumbs.db").write_bytes(b"left by Windows")
    nasty.expect("a system's files", "notes", "hidden", "plain")
    (nasty.root / "plain/notes.docx").write_bytes(b"something")
    (nasty.root / "plain/model.safetensors").write_bytes(b"something")
    nasty.expect("files of other kinds", "notes", "other-files", "plain")
    nasty.put("plain/reg/1.png", drawing(130))
    nasty.expect("regularisation pictures among the others", "warns", "regularisation", "plain/reg")
    nasty.put("plain/" + "d/" * 65 + "x.png", drawing(131))
    nasty.expect("65 folders deep", "warns", "too-deep", "plain/" + "d/" * 64 + "d")


def _kinds(nasty: Nasty) -> None:
    """What is read, and worth a word."""
    bad, frames = nasty.bad, [drawing(140), drawing(141), drawing(142)]
    bad("a JPEG called PNG", "notes", "wrong-extension", "jpeg.png", encoded(drawing(143), "JPEG"))
    bad("a WebP called JPEG", "notes", "wrong-extension", "webp.jpg", encoded(drawing(144), "WEBP"))
    bad("a GIF that moves", "notes", "animated", "moves.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    bad("a WebP that moves", "notes", "animated", "moves-too.webp", encoded(frames[1], "WEBP", save_all=True, append_images=frames[2:]))
    clear = drawing(145).convert("RGBA")
    clear.paste((255, 0, 0, 0), (0, 0, 20, 64))
    bad("a transparent part", "notes", "transparent", "clear.png", clear)
    palette = drawing(146).convert("P")
    bad("a transparent palette", "notes", "transparent", "palette.png", palette, transparency=palette.getpixel((0, 0)))
    bad("colours for print", "warns", "cmyk", "print.jpg", drawing(147).convert("CMYK"))
    bad("damaged EXIF", "warns", "damaged-exif", "exif.png", drawing(148), exif=b"Exif\0\0MM\0")
    bad("a damaged profile", "warns", "damaged-profile", "profile.png", drawing(149), icc_profile=b"no profile at all")
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"----"), (b"gXYZ", b"rXYZ"), (b"----", b"gXYZ")):
        swapped = swapped.replace(old, new, 1)
    bad("a profile of its own", "notes", "colour-profile", "own-profile.png", drawing(150), icc_profile=swapped)
    grey = np.asarray(drawing(151).convert("L")).astype(np.float32)
    bad("numbers with a point", "notes", "value-range", "float.tif", Image.fromarray(grey / 255))
    bad("numbers of 32 bits", "notes", "value-range", "long.tif", Image.fromarray(np.asarray(drawing(152).convert("L")) * np.int32(300)))


def _looks(nasty: Nasty) -> None:
    """What is read and harms."""
    bad = nasty.bad
    bad("white", "warns", "blank", "white.png", Image.new("RGB", (80, 80), "white"))
    bad("black, as a JPEG", "warns", "blank", "black.jpg", Image.new("RGB", (80, 70), "black"))
    bad("all of it transparent", "warns", "blank", "ghost.png", Image.new("RGBA", (64, 64), (200, 10, 10, 0)))
    bad("out of focus", "warns", "blurred", "focus.png", drawing(160, (256, 256)).filter(ImageFilter.GaussianBlur(12)))
    bad("shaken", "warns", "blurred", "shaken.jpg", drawing(161, (120, 120)).filter(ImageFilter.GaussianBlur(7)), quality=80)
    bad("blown up", "warns", "blurred", "blown-up.png", drawing(162, (12, 12)).resize((72, 72), Image.Resampling.BICUBIC))
    bad("bars above and below", "warns", "bars", "letterbox.png", ImageOps.pad(drawing(163, (128, 72)), (128, 128), color="black"))
    bad("bars left and right", "warns", "bars", "pillarbox.jpg", ImageOps.pad(drawing(164, (70, 128)), (128, 128), color="white"))
    bad("a frame", "warns", "bars", "frame.png", ImageOps.expand(drawing(165, (90, 90)), 18, "beige"))
    far = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(far).ellipse((70, 60, 90, 85), fill="teal")
    bad("far away", "warns", "empty-margins", "far.png", far)


def _sizes(nasty: Nasty) -> None:
    bad = nasty.bad
    bad("an icon", "warns", "too-small", "icon.png", drawing(170, (16, 16)))
    bad("one pixel", "warns", "too-small", "pixel.png", Image.new("RGB", (1, 1), "red"))
    nasty.expect("one pixel, of one colour", "warns", "blank", "plain/pixel.png")
    bad("a little small", "notes", "too-small", "little.png", drawing(171, (54, 54)))
    bad("a panorama", "warns", "extreme-aspect", "panorama.png", drawing(172, (600, 80)))
    bad("a strip", "warns", "extreme-aspect", "strip.png", drawing(173, (70, 400)))
    bad("too wide", "warns", "much-cropped", "wide.png", drawing(174, (270, 100)))


def _copies(nasty: Nasty) -> None:
    """The first of each group carries the finding."""
    first = [drawing(180 + i, (96, 96)) for i in range(6)]
    for i, (kind, severity, code) in enumerate(
        (
            ("the same file twice", "warns", "copy-exact"),
            ("saved again as JPEG", "warns", "copy-near"),
            ("saved again smaller", "warns", "copy-near"),
            ("made brighter", "warns", "copy-near"),
            ("mirrored", "notes", "copy-mirrored"),
            ("a copy in another folder", "warns", "copy-exact"),
        )
    ):
        nasty.bad(kind, severity, code, f"copies/{i}-a.png", first[i])
    nasty.put("plain/copies/0-b.png", first[0])
    nasty.put("plain/copies/1-b.jpg", encoded(first[1], "JPEG", quality=50))
    nasty.put("plain/copies/2-b.png", first[2].resize((64, 64), Image.Resampling.BICUBIC))
    nasty.put("plain/copies/3-b.png", ImageEnhance.Brightness(first[3]).enhance(1.1))
    nasty.put("plain/copies/4-b.png", ImageOps.mirror(first[4]))
    nasty.put("plain/copies/z/5-b.png", first[5])
    for kind, name, seed, image in (
        ("held out and learned", "same.png", 190, drawing(190)),
        ("held out and learned in another size", "again.png", 191, drawing(191).resize((90, 90), Image.Resampling.BICUBIC)),
    ):
        nasty.put(f"plain/copies/seen-{seed}.png", drawing(seed))
        nasty.put(f"apart/{name}", image)
        nasty.expect(kind, "warns", "seen-in-validation", f"apart/{name}")
    nasty.put("apart/unseen.png", drawing(192))
    nasty.good.append("apart/unseen.png")


def _captions(nasty: Nasty) -> None:
    """What captions say."""
    for seed, (kind, severity, code, words) in enumerate(
        (
            ("two chunks", "notes", "caption-long", "zrk, " + "shapes of many kinds, " * 18 + "and more"),
            ("a whole page", "warns", "caption-long", "zrk " + "shape upon shape " * 100),
            ("one word", "warns", "caption-short", "zrk shapes"),
            ("the trigger word alone", "warns", "caption-short", "zrk"),
            ("no trigger word", "notes", "caption-without-trigger", "a drawing of shapes"),
            ("the trigger word inside another", "notes", "caption-without-trigger", "a drawing of zrkoms"),
            ("a LoRA's name in it", "warns", "caption-syntax", "zrk, a drawing <lora:style:0.8>"),
            ("a weight in it", "warns", "caption-syntax", "zrk, a (large:1.3) drawing"),
            ("wildcards that are off", "warns", "caption-wildcards", "zrk, a {red|blue} drawing"),
            ("Japanese", "warns", "caption-script", "zrk, 赤い星と青い月の絵, 黒い線"),
            ("said twice", "notes", "caption-repeats", "zrk, a drawing, Shapes, a drawing, shapes"),
        )
    ):
        nasty.bad(kind, severity, code, f"caption-{seed}.png", drawing(200 + seed), words)


def _caption_files(nasty: Nasty) -> None:
    """What is wrong with the files that hold them."""
    bad, root = nasty.bad, nasty.root / "plain"
    bad("no caption", "stops", "caption-missing", "silent.png", drawing(220), None)
    bad("no caption and no picture", "stops", "caption-missing", "lost.jpg", b"\xff\xd8 no more", None)
    nasty.expect("no picture and no caption", "stops", "", "plain/lost.jpg")
    bad("an empty caption", "stops", "caption-empty", "empty-caption.png", drawing(221), b"")
    bad("blanks", "stops", "caption-empty", "blanks.png", drawing(222), b"\xef\xbb\xbf \r\n\t ")
    for seed, (kind, words) in enumerate(
        {
            "Latin-1": "zrk, Bäume".encode("latin-1"),
            "UTF-16": "zrk, trees".encode("utf-16"),
            "Shift-JIS": "zrk, 赤い星と青い月の絵".encode("shift-jis"),
            "zero bytes": b"zrk, \0\0 trees",
            "a book": b"zrk, word " * 20_000,
        }.items()
    ):
        nasty.put(f"plain/coded-{seed}.png", drawing(230 + seed), words)
        nasty.expect(f"a caption in {kind}", "stops", "caption-unreadable", f"plain/coded-{seed}.txt")
    (root / "orphan.txt").write_text("zrk, nobody's")
    nasty.expect("a caption without picture", "warns", "caption-without-picture", "plain/orphan.txt")
    bad("two captions", "warns", "two-captions", "two.png", drawing(240))
    (root / "two.caption").write_text("zrk, something else")
    nasty.put("plain/shared.jpg", drawing(241))
    bad("one caption for two", "warns", "shared-caption", "shared.png", drawing(242))
    nasty.put("plain/Capital.png", drawing(243))
    bad("the same name but for capitals", "warns", "same-name", "capital.png", drawing(244))


def _table(nasty: Nasty) -> None:
    for name in ("a.png", "b.png", "c.png", "unlisted.png"):
        nasty.put(f"table/{name}", drawing(250 + ord(name[0])), None)
    rows = [
        {"file_name": "a.png", "text": "zrk, the first drawing"},
        {"file_name": "a.png", "text": "zrk, another word for it"},
        {"file_name": "b.png", "text": "zrk, the second drawing"},
        {"file_name": "b.png", "text": "zrk, the second drawing"},
        {"file_name": "gone.png", "text": "zrk, not there"},
        {"file_name": "c.png"},
    ]
    lines = [*map(json.dumps, rows), '{"file_name": "c.png", "text": ', json.dumps({"file_name": "c.png", "text": "zrk, the third one"})]
    (nasty.root / "table/metadata.jsonl").write_text("\n".join(lines))
    for kind, severity, code in (
        ("two texts for one picture", "stops", "row-twice"),
        ("one row twice", "warns", "row-twice"),
        ("a row without picture", "warns", "row-without-picture"),
        ("a row without text", "stops", "metadata"),
    ):
        nasty.expect(kind, severity, code, "table/metadata.jsonl")
    nasty.expect("a picture without row", "stops", "not-listed", "table/unlisted.png")


def _classes(nasty: Nasty) -> None:
    for seed, name in enumerate(("40_zrk drawing", "1_zrk sketch", "0_zrk nothing", "20240101_holiday")):
        nasty.put(f"classes/{name}/1.png", drawing(400 + 2 * seed), "zrk, something drawn by hand")
        nasty.put(f"classes/{name}/2.png", drawing(401 + 2 * seed), "zrk, something else by hand")
    nasty.expect("a folder seen 40 times as often", "warns", "unbalanced-repeats", "classes/40_zrk drawing")
    nasty.expect("a folder seen never", "warns", "folder-name", "classes/0_zrk nothing")
    nasty.expect("a folder with a date", "notes", "folder-name", "classes/20240101_holiday")


def _masks(nasty: Nasty) -> None:
    white, half = Image.new("L", (64, 64), 255), Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    for seed, name in enumerate(("half", "none", "black", "shape", "torn", "two")):
        nasty.put(f"masked/{name}.png", drawing(420 + seed))
    nasty.good.append("masked/half.png")
    (nasty.root / "masks").mkdir()
    half.save(nasty.root / "masks/half.png")
    Image.new("L", (64, 64), 0).save(nasty.root / "masks/black.png")
    white.resize((64, 40)).save(nasty.root / "masks/shape.png")
    (nasty.root / "masks/torn.png").write_bytes(encoded(white, "PNG")[:50])
    white.save(nasty.root / "masks/two.png")
    white.save(nasty.root / "masks/two.bmp")
    nasty.expect("no mask", "warns", "mask-missing", "masked/none.png")
    nasty.expect("two masks", "stops", "mask-ambiguous", "masked/two.png")
    nasty.expect("a mask that hides all", "stops", "mask-black", "masks/black.png")
    nasty.expect("a mask of another shape", "warns", "mask-shape", "masks/shape.png")
    nasty.expect("half a mask", "stops", "mask-unreadable", "masks/torn.png")


def _links(nasty: Nasty) -> None:
    root = nasty.root / "plain"
    (root / "broken.png").symlink_to("nowhere.png")
    nasty.expect("a link to nothing", "warns", "unreadable", "plain/broken.png")
    (root / "around").symlink_to(root, target_is_directory=True)
    nasty.expect("a link that goes around", "warns", "link-loop", "plain/around")
    (root / "linked.png").symlink_to("good/one.png")
    nasty.expect("a picture reached twice", "warns", "reached-twice", "plain/linked.png")
    os.mkfifo(root / "pipe.png")
    nasty.expect("a pipe, which never ends", "warns", "not-a-file", "plain/pipe.png")


def damage(folder: Path, *, count: int, seed: int = 0) -> Iterator[tuple[Path, bool]]:
    """Writes damaged pictures with captions, and says of each whether its end is missing.

    One in three is cut off at a random byte of its first two thirds; the others have 1 to 20 bytes changed, or a run of them.
    """
    chance = random.Random(seed)
    originals = [
        (kind, ending, encoded(drawing(500 + i, (40 + 6 * i, 44)), kind, **options))
        for i, (kind, ending) in enumerate(FORMATS.items())
        for options in _VARIANTS.get(kind, ({},))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        _, ending, content = originals[number % len(originals)]
        is_cut = number % 3 == 0
        path = folder / f"{number:04}{ending}"
        path.write_bytes(content[: chance.randrange(1, len(content) * 2 // 3)] if is_cut else _mutated(content, chance))
        path.with_suffix(".txt").write_text(f"{TRIGGER}, drawing number {number}")
        yield path, is_cut


_VARIANTS: dict[str, tuple[dict[str, object], ...]] = {
    "JPEG": ({}, {"progressive": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
    "WEBP": ({}, {"lossless": True}),
    "TIFF": ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}),
}


def _mutated(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    if chance.random() < 0.3:
        start = chance.randrange(len(changed))
        changed[start : start + chance.randrange(1, 60)] = chance.randbytes(chance.randrange(60))
    for _ in range(chance.randrange(1, 20)):
        place = chance.randrange(min(len(changed), 200)) if chance.random() < 0.5 else chance.randrange(len(changed))
        changed[place] = chance.randrange(256)  # headers are short and matter most
    return bytes(changed)
