"""The comparison sheet: prompts as rows, no LoRA and LoRAs at their strengths as columns, the same seed in every cell of a row.

The base is loaded once; from one column to the next only the folded weights change. The first column is always the base alone:
whether a LoRA did anything can only be judged beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from sdlora import fonts, generate
from sdlora.base_model import Base
from sdlora.fonts import Font
from sdlora.generate import LoRA, Request

CELL_PX = 160  # smaller pictures are enlarged to at least this
GAP_PX = 6
LABEL_PX = 150
LONGEST = 200  # characters of a line that are looked at
HEAD_PX, GROUP_PX, TITLE_PX = 48, 26, 30
PAPER, INK, FAINT, EMPTY = (250, 249, 246), (40, 38, 44), (120, 116, 126), (236, 234, 229)


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


@dataclass(frozen=True)
class Frame:
    """Where the cells of a sheet lie, in px: the first one's corner, a cell's size without the gap, and how many there are."""

    left: int
    top: int
    width: int
    height: int
    rows: int
    columns: int

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """The upper left corner of a cell."""
        return self.left + column * (self.width + GAP_PX), self.top + row * (self.height + GAP_PX)

    def cell_at(self, x: float, y: float) -> tuple[int, int] | None:
        """The row and column of the cell at a point of the sheet; None beside the cells."""
        column, row = int((x - self.left) // (self.width + GAP_PX)), int((y - self.top) // (self.height + GAP_PX))
        return (row, column) if 0 <= row < self.rows and 0 <= column < self.columns else None


def frame(size_px: tuple[int, int], rows: int, columns: int, *, groups: bool = False, title: bool = False) -> Frame:
    """The frame of a sheet whose pictures have a size."""
    factor = _factor(size_px)
    top = HEAD_PX + (GROUP_PX if groups else 0) + (TITLE_PX if title else 0)
    return Frame(LABEL_PX + GAP_PX, top, size_px[0] * factor, size_px[1] * factor, rows, columns)


def arrange(
    cells: Sequence[Sequence[Image.Image | None]],
    rows: Sequence[str],
    across: Sequence[str],
    *,
    groups: Sequence[str] = (),
    title: str = "",
    size_px: tuple[int, int] | None = None,
) -> Image.Image:
    """The pictures as a table with labels above and to the left.

    Args:
        cells: by row; None where nothing is drawn yet.
        rows: the rows' labels.
        across: the columns' labels, a second line being fainter.
        groups: a word above each column; neighbours with the same one share it.
        title: what all cells have in common, above everything.
        size_px: of a picture; needed while none is drawn.
    """
    size = size_px or next(image.size for row in cells for image in row if image)
    grid = frame(size, len(rows), len(across), groups=any(groups), title=bool(title))
    plain = fonts.plain(15)
    sheet = Image.new("RGB", grid.corner(len(rows), len(across)), PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        words, font = fonts.written(title, plain)
        pen.text((GAP_PX + 2, TITLE_PX / 2 + 2), _fitting(words, sheet.width - 2 * GAP_PX, font), FAINT, font, "lm")
    _draw_heads(pen, grid, across, groups, plain)
    for row, (label, images) in enumerate(zip(rows, cells, strict=True)):
        middle = grid.corner(row, 0)[1] + grid.height / 2
        words, font = fonts.written(label, plain)
        pen.multiline_text((LABEL_PX - 8, middle), _wrapped(words, LABEL_PX - 16, font), INK, font, "rm", align="right")
        for column, image in enumerate(images):
            left, top = grid.corner(row, column)
            if image:
                sheet.paste(_enlarged(image), (left, top))
            else:
                pen.rectangle((left, top, left + grid.width - 1, top + grid.height - 1), EMPTY)
    return sheet


def _draw_heads(pen: ImageDraw.ImageDraw, grid: Frame, across: Sequence[str], groups: Sequence[str], plain: Font) -> None:
    """The columns' labels, and a line under the columns of one group with the group's word above it."""
    for column, label in enumerate(across):
        words, font = fonts.written(label, plain)
        first, _, second = _fitting(words, grid.width, font).partition("\n")
        centre = grid.corner(0, column)[0] + grid.width / 2
        pen.text((centre, grid.top - (33 if second else 24)), first, INK, font, "mm")
        pen.text((centre, grid.top - 15), second, FAINT, font, "mm")
    begin = 0
    for column in range(1, len(groups) + 1):
        if column < len(groups) and groups[column] == groups[begin]:
            continue
        if groups[begin]:
            left, right = grid.corner(0, begin)[0], grid.corner(0, column - 1)[0] + grid.width
            line = grid.top - HEAD_PX + 2
            pen.line((left, line, right - 1, line), FAINT)
            words, font = fonts.written(groups[begin], plain)
            pen.text(((left + right) / 2, line - GROUP_PX / 2), _fitting(words, right - left, font), INK, font, "mm")
        begin = column


def _factor(size_px: tuple[int, int]) -> int:
    return max(1, -(-CELL_PX // min(size_px)))


def _enlarged(image: Image.Image) -> Image.Image:
    factor = _factor(image.size)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC) if factor > 1 else image


def _fitting(label: str, width: float, font: Font) -> str:
    """The label, each line cut to a width."""
    lines = []
    for line in label.split("\n"):
        kept = line if len(line) <= LONGEST else line[:LONGEST] + "…"  # measuring 5,000 letters one by one less takes seconds
        while font.getlength(kept) > width and len(kept) > 4:
            kept = kept.rstrip("…")[:-1] + "…"
        lines.append(kept)
    return "\n".join(lines)


def _wrapped(words: str, width: float, font: Font, *, most_lines: int = 7) -> str:
    """The words in lines of at most a width."""
    lines = [""]
    for word in (piece for long in words[: LONGEST * most_lines].split() for piece in _pieces(long, width, font)):
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    kept = lines[:most_lines]
    if len(lines) > most_lines or len(words) > LONGEST * most_lines:
        kept[-1] += " …"
    return _fitting("\n".join(kept), width, font)


def _pieces(word: str, width: float, font: Font) -> Iterator[str]:
    """A word in pieces of at most a width: not every script has spaces."""
    length = 1
    while length < len(word):
        if font.getlength(word[: length + 1]) > width:
            yield word[:length]
            word, length = word[length:], 0
        length += 1
    yield word
