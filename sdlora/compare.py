"""The comparison sheet: prompts as rows, no LoRA and LoRAs at their strengths as columns, the same seed in every cell of a row.

The base is loaded once; from one column to the next only the folded weights change. The first column is always the base alone:
whether a LoRA did anything can only be judged beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdlora import generate
from sdlora.base_model import Base
from sdlora.generate import LoRA, Request

CELL_PX = 160  # smaller pictures are enlarged to at least this
GAP_PX = 6
LABEL_PX = 150
PAPER, INK, FAINT = (250, 249, 246), (40, 38, 44), (120, 116, 126)


@dataclass(frozen=True)
class Column:
    """The LoRAs of one column; none for the base alone."""

    label: str
    loras: tuple[LoRA, ...] = ()


def columns(paths: list[Path], strengths: list[float]) -> list[Column]:
    """No LoRA, then each file at each strength; a strength of 0 is the first column already."""
    each = [Column(f"{path.stem}\nstrength {value:g}", (LoRA(path, value),)) for path in paths for value in strengths if value != 0]
    return [Column("no LoRA"), *each]


def draw(base: Base, requests: list[Request], across: list[Column]) -> Iterator[tuple[int, int] | Image.Image]:
    """Draws every cell: yields (done, total) after each picture, and at the end the sheet.

    Raises:
        UserError: if a LoRA does not fit the base, or a request cannot be drawn.
    """
    total = len(requests) * len(across)
    cells: list[list[Image.Image]] = [[] for _ in requests]
    for column in across:
        generate.set_loras(base, list(column.loras))
        for row, request in zip(cells, requests, strict=True):
            ((_, image),) = generate.pictures(base, request)
            row.append(image)
            yield sum(len(one) for one in cells), total
    yield arrange(cells, [request.prompt for request in requests], [column.label for column in across])


def arrange(cells: list[list[Image.Image]], rows: list[str], across: list[str]) -> Image.Image:
    """The pictures as a table with labels above and to the left."""
    width, height = _enlarged(cells[0][0]).size
    font = ImageFont.load_default(15)
    sheet = Image.new("RGB", (LABEL_PX + len(across) * (width + GAP_PX) + GAP_PX, 48 + len(rows) * (height + GAP_PX)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(across):
        first, _, second = _fitting(label, width, font).partition("\n")
        centre = LABEL_PX + GAP_PX + column * (width + GAP_PX) + width / 2
        pen.text((centre, 15 if second else 24), first, INK, font, "mm")
        pen.text((centre, 33), second, FAINT, font, "mm")
    for row, (label, images) in enumerate(zip(rows, cells, strict=True)):
        top = 48 + row * (height + GAP_PX)
        pen.multiline_text((LABEL_PX - 8, top + height / 2), _wrapped(label, LABEL_PX - 16, font), INK, font, "rm", align="right")
        for column, image in enumerate(images):
            sheet.paste(_enlarged(image), (LABEL_PX + GAP_PX + column * (width + GAP_PX), top))
    return sheet


def _enlarged(image: Image.Image) -> Image.Image:
    factor = -(-CELL_PX // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC) if factor > 1 else image


def _fitting(label: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The label, each line cut to a width."""
    lines = []
    for line in label.split("\n"):
        kept = line
        while font.getlength(kept) > width and len(kept) > 4:
            kept = kept.rstrip("…")[:-1] + "…"
        lines.append(kept)
    return "\n".join(lines)


def _wrapped(words: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, *, most_lines: int = 7) -> str:
    """The words in lines of at most a width."""
    lines = [""]
    for word in words.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    kept = lines[:most_lines]
    if len(lines) > most_lines:
        kept[-1] += " …"
    return _fitting("\n".join(kept), width, font)
