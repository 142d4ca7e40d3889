"""What a report is made of: paragraphs, boxes, tables, pictures and charts, without a word about how they are drawn.

The HTML and the Markdown are drawn from the same blocks, so what one of them says the other says too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Code:
    """Text to be typed or found as it stands: names of files, words of prompts."""

    text: str


@dataclass(frozen=True)
class Strong:
    """Text that is to be seen first."""

    text: str


Inline = str | Code | Strong
Words = tuple[Inline, ...]


@dataclass(frozen=True)
class Paragraph:
    """Words that stand by themselves."""

    words: Words
    faint: bool = False


@dataclass(frozen=True)
class Box:
    """What must not be missed, and what it is."""

    kind: Literal["advice", "warning"]
    title: str
    words: tuple[Words, ...]


@dataclass(frozen=True)
class Listed:
    """Things to do one after the other, or a list of what there is."""

    items: tuple[Words, ...]
    ordered: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a head; a column of numbers stands to the right.

    Args:
        wordy: on a phone the cells of a row stand below each other.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Inline, ...], ...]
    wordy: bool = False


@dataclass(frozen=True)
class Picture:
    """One wide picture.

    Args:
        alt: what it is, for who cannot see it.
        words: below it.
        wide_px: larger ones are made smaller in the HTML.
    """

    path: Path
    alt: str
    words: Words
    wide_px: int = 1800


@dataclass(frozen=True)
class Cell:
    """A small picture with its label; `badge` sets it apart."""

    path: Path
    label: str
    badge: str = ""


@dataclass(frozen=True)
class Strip:
    """Small pictures side by side, to be compared."""

    words: Words
    cells: tuple[Cell, ...]
    wide_px: int = 400


@dataclass(frozen=True)
class Chart:
    """A chart, how it is read, and for text alone its numbers."""

    title: str
    svg: str
    how: str
    numbers: Table


@dataclass(frozen=True)
class Charts:
    """Charts side by side where there is room."""

    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class Details:
    """What few want to see: closed until it is asked for."""

    summary: str
    blocks: tuple[Block, ...]


Block = Paragraph | Box | Listed | Table | Picture | Strip | Charts | Details


@dataclass(frozen=True)
class Section:
    """Blocks under a heading."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """The whole report: a title, what it is about, the blocks that come first, and the sections."""

    title: str
    words: Words
    blocks: tuple[Block, ...]
    sections: tuple[Section, ...]
