"""The contact sheet: every picture as the trainer will see it, on one page, because a look finds what no measure does.

Whole pictures are shown, with what is cut off veiled, so that a wrong crop is seen as what it loses. What cannot be read has a cell
with the reason. Where nothing is wrong nothing is coloured: a frame has the colour of the worst finding of its picture.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from sdlora import dataset_report, fonts, images, picture_findings
from sdlora.buckets import cropped_share
from sdlora.dataset import Finding, Sample
from sdlora.errors import UserError
from sdlora.fonts import Font
from sdlora.views import Item, View

Colour = tuple[int, int, int]
Line = tuple[str, Colour, Font]

PICTURE_PX = 220  # longer side of a picture, and width of its cell
GAP_PX, MARGIN_PX, LINE_PX, HEAD_PX = 20, 28, 17, 76
PAPER, INK, FAINT, SHADE = (250, 249, 246), (40, 38, 44), (120, 116, 126), (234, 231, 224)
COLOURS: dict[str, Colour] = {"stops": (190, 44, 44), "warns": (196, 118, 8), "notes": (70, 112, 168)}

_VEIL = 0.78  # share of paper over what is cut off
_MASKED, _MASKED_SHARE = (150, 60, 170), 0.6  # colour and its share over what the mask leaves out
_CAPTION_LINES, _FINDING_LINES = 3, 3
_LETTER_PX, _TITLE_PX = 13, 22

FONTS = ("NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial.ttf", "arial.ttf", "Helvetica.ttc")  # with accents; Pillow's own has few


@dataclass(frozen=True)
class _Cell:
    """One picture on the page: itself, then lines of text with their colours and fonts."""

    image: Image.Image
    lines: tuple[Line, ...]
    severity: str | None


def draw(
    items: Sequence[Item],
    samples: Sequence[Sample],
    captions: Sequence[str],
    findings: Sequence[Finding],
    *,
    across: int = 5,
    most: int = 200,
) -> Image.Image:
    """The page.

    Args:
        items: as `dataset_report.Report` has them; a sample at several resolutions is drawn once, at the largest.
        samples: what they count in. Pictures that only findings name are drawn behind them.
        captions: of each sample, as it is trained.
        across: pictures in a row.
        most: how many pictures are drawn, those with the worst findings before others; the page says how many it leaves out.
    """
    of_sample: dict[int, list[Item]] = {}
    for item in sorted(items, key=lambda one: one.shape_px[0] * one.shape_px[1]):
        of_sample.setdefault(item.sample, []).append(item)
    of_path: dict[Path, list[Finding]] = {}
    for finding in findings:
        if finding.path and finding.path.suffix.lower() in images.SUFFIXES and finding.path.is_file():
            of_path.setdefault(finding.path, []).append(finding)
    root = dataset_report.root([*(one.picture for one in samples), *of_path])
    shown = {path for one in samples for path in (one.picture, one.mask)}
    entries = [
        *((one.picture, of_sample.get(i, []), captions[i], _about(one, of_path)) for i, one in enumerate(samples)),
        *((path, list[Item](), "", found) for path, found in of_path.items() if path not in shown),
    ]
    chosen = sorted(sorted(range(len(entries)), key=lambda i: _rank(_worst(entries[i][3])))[:most])
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        cells = list(pool.map(lambda i: _cell(*entries[i], root), chosen))
    return _page(cells, title=_title(entries, len(chosen)), across=across)


def _about(sample: Sample, of_path: Mapping[Path, list[Finding]]) -> list[Finding]:
    """What was found about a sample's picture and its mask."""
    return [*of_path.get(sample.picture, []), *(of_path.get(sample.mask, []) if sample.mask else [])]


def _title(entries: Sequence[tuple[Path, list[Item], str, list[Finding]]], drawn: int) -> list[tuple[str, Colour]]:
    """What stands above: how many pictures, then how many of them have what kind of finding at worst."""
    worst = [_worst(found) for _, _, _, found in entries]
    counts = [(f"{worst.count(severity)} {word}", COLOURS[severity]) for severity, word in _WORDS.items() if severity in worst]
    more = f", of which {drawn} are drawn" if drawn < len(entries) else ""
    pictures = "1 picture" if len(entries) == 1 else f"{len(entries)} pictures"
    items = [item for _, of_sample, _, _ in entries for item in of_sample]
    hints = [
        ("paler: cut off", any(cropped_share(one.views[0].original_px, one.views[0].fit) > 0 for one in items)),
        ("violet: not learned, by its mask", any(one.views[0].mask for one in items)),
    ]
    return [(pictures + more, INK), *counts, *((words, FAINT) for words, is_there in hints if is_there)]


_WORDS = {"stops": "must be mended", "warns": "with a warning", "notes": "with a note"}


def _cell(path: Path, items: list[Item], caption: str, findings: list[Finding], root: Path) -> _Cell:
    """One picture with its name, its training sizes and repeats, its caption and what was found."""
    severity = _worst(findings)
    lines = _lines(dataset_report.shown(path, root), INK)
    if items:
        sizes = ", ".join(f"{one.shape_px[0]} by {one.shape_px[1]}" for one in items)
        repeats = f" · {items[0].repeats} times per epoch" if items[0].repeats > 1 else ""
        lines += _lines(sizes + repeats, FAINT)
    lines += _lines(caption, INK, most=_CAPTION_LINES)
    worst_first = sorted(findings, key=lambda one: _rank(one.severity))
    for finding in worst_first[:2]:
        lines += _lines(finding.what, COLOURS[finding.severity], most=_FINDING_LINES)
    if len(findings) > 2:
        lines += _lines(f"and {len(findings) - 2} more", FAINT)
    try:
        image = _seen(path, items[-1].views if items else ())
    except UserError:
        image = _placeholder()
    return _Cell(image, tuple(lines), severity)


def _lines(words: str, colour: Colour, *, most: int = 0) -> list[Line]:
    """Words in a font that has their letters, in at most so many lines, or cut to one."""
    written, font = fonts.written(words, _font(_LETTER_PX))
    return [(line, colour, font) for line in (_wrapped(written, font, most=most) if most else [_fitting(written, font)])]


def _seen(path: Path, views: Sequence[View]) -> Image.Image:
    """The whole picture, with what no view shows veiled and what the mask leaves out tinted."""
    with picture_findings.opened(path, side_px=2 * PICTURE_PX) as (_, opened):
        small = ImageOps.contain(opened.image, (PICTURE_PX, PICTURE_PX), Image.Resampling.BICUBIC)
        mask = _mask(views[0], opened, small.size) if views else None
    if not views:
        return small
    if mask:
        tinted = Image.blend(small, Image.new("RGB", small.size, _MASKED), _MASKED_SHARE)
        small = Image.composite(small, tinted, mask)
    boxes = [_box(view, small.size) for view in views]
    kept = Image.new("L", small.size, 0)
    for box in boxes:
        kept.paste(255, box)
    seen = Image.composite(small, Image.blend(small, Image.new("RGB", small.size, PAPER), _VEIL), kept)
    if kept.getextrema() != (255, 255):
        for left, top, right, bottom in boxes:
            ImageDraw.Draw(seen).rectangle((left, top, right - 1, bottom - 1), outline=INK)
    return seen


def _mask(view: View, opened: images.Opened, size_px: tuple[int, int]) -> Image.Image | None:
    """Where the loss counts, at the size of the drawn picture; None if it counts everywhere."""
    if view.mask is None:
        return None
    try:
        mask = opened.alpha if view.mask == "alpha" else images.open_picture(Path(view.mask)).image
    except UserError:  # a finding says so, in words below the picture
        return None
    return mask and mask.convert("L").resize(size_px, Image.Resampling.BILINEAR)


def _box(view: View, size_px: tuple[int, int]) -> tuple[int, int, int, int]:
    """What a view shows, in the picture drawn at `size_px`: left, top, right, bottom."""
    across, down = size_px[0] / view.fit.resized_px[0], size_px[1] / view.fit.resized_px[1]
    left, top, (width, height) = view.fit.left, view.fit.top, view.fit.size_px
    return round(left * across), round(top * down), round((left + width) * across), round((top + height) * down)


def _placeholder() -> Image.Image:
    """Where a picture would be: a shaded square, crossed out."""
    image = Image.new("RGB", (PICTURE_PX, PICTURE_PX), SHADE)
    pen, last = ImageDraw.Draw(image), PICTURE_PX - 1
    pen.line((0, 0, last, last), PAPER, 3)
    pen.line((0, last, last, 0), PAPER, 3)
    return image


def _page(cells: Sequence[_Cell], *, title: Sequence[tuple[str, Colour]], across: int) -> Image.Image:
    rows = [cells[start : start + across] for start in range(0, len(cells), across)]
    heights = [PICTURE_PX + 12 + LINE_PX * max(len(one.lines) for one in row) + GAP_PX for row in rows]
    width = 2 * MARGIN_PX + across * (PICTURE_PX + GAP_PX) - GAP_PX
    page = Image.new("RGB", (width, HEAD_PX + sum(heights) + MARGIN_PX - GAP_PX), PAPER)
    pen, left = ImageDraw.Draw(page), float(MARGIN_PX)
    for number, (words, colour) in enumerate(title):
        font = _font(_TITLE_PX if number == 0 else _LETTER_PX + 2)
        pen.text((left, HEAD_PX / 2 + 7), words, colour, font, "ls")
        left += font.getlength(words) + GAP_PX
    for row, top in zip(rows, (HEAD_PX + sum(heights[:i]) for i in range(len(rows))), strict=True):
        for column, cell in enumerate(row):
            _put(page, cell, MARGIN_PX + column * (PICTURE_PX + GAP_PX), top)
    return page


def _put(page: Image.Image, cell: _Cell, left: int, top: int) -> None:
    """A picture at the foot of its square, so that the text below stands close; frame and badge in the colour of what is wrong."""
    pen, font = ImageDraw.Draw(page), _font(_LETTER_PX)
    x, y = left, top + PICTURE_PX - cell.image.height
    page.paste(cell.image, (x, y))
    if cell.severity:
        colour = COLOURS[cell.severity]
        pen.rectangle((x - 3, y - 3, x + cell.image.width + 2, y + cell.image.height + 2), outline=colour, width=3)
        badge = font.getlength(cell.severity) + 14
        pen.rounded_rectangle((x + 6, y + 6, x + 6 + badge, y + 26), 10, fill=colour)
        pen.text((x + 6 + badge / 2, y + 16), cell.severity, PAPER, font, "mm")
    for number, (line, colour, letters) in enumerate(cell.lines):
        pen.text((left, top + PICTURE_PX + 12 + number * LINE_PX), line, colour, letters)


@lru_cache
def _font(size_px: int) -> Font:
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size_px)
    return fonts.plain(size_px)


def _worst(findings: Iterable[Finding]) -> str | None:
    return min((one.severity for one in findings), key=_rank, default=None)


def _rank(severity: str | None) -> int:
    return dataset_report.SEVERITIES.index(severity) if severity else len(dataset_report.SEVERITIES)


def _fitting(words: str, font: Font) -> str:
    """The words, cut to the width of a cell."""
    if font.getlength(words) <= PICTURE_PX:
        return words
    while words and font.getlength(words + "…") > PICTURE_PX:
        words = words[:-1]
    return words + "…"


def _wrapped(words: str, font: Font, *, most: int) -> list[str]:
    """The words in lines of the width of a cell; the last says by "…" that there are more."""
    lines: list[str] = []
    for word in words[: 60 * most].split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= PICTURE_PX:
            lines[-1] = joined
        else:
            lines.append(word)
    kept = [_fitting(line, font) for line in lines[:most]]
    if len(lines) > most:
        kept[-1] = _fitting(f"{kept[-1].rstrip('…')} …", font)
    return kept
