"""A report as Markdown: for editors, chats and pages of a hub, with links to the pictures in the run folder and numbers for the charts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from sdlora.report_blocks import Block, Box, Charts, Code, Details, Inline, Listed, Page, Paragraph, Picture, Strip, Table, Words


def to_markdown(page: Page, *, beside: Path) -> str:
    """The page as Markdown.

    Args:
        beside: the folder that it will lie in; pictures are linked from there.
    """
    parts = [f"# {_plain(page.title)}", _marked(page.words), *_all_marked(page.blocks, beside)]
    for section in page.sections:
        parts += [f"## {_plain(section.title)}", *_all_marked(section.blocks, beside)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _all_marked(blocks: Sequence[Block], beside: Path) -> list[str]:
    return [part for block in blocks for part in _markdown(block, beside)]


def _markdown(block: Block, beside: Path) -> list[str]:
    match block:
        case Paragraph(words):
            return [_paragraph(words)]
        case Box(_, title, words):
            return ["\n>\n".join(f"> {one}" for one in (f"**{_plain(title)}**", *(_marked(one) for one in words)))]
        case Listed(items, ordered):
            return ["\n".join(f"{f'{number}.' if ordered else '-'} {_marked(one)}" for number, one in enumerate(items, 1))]
        case Table(head, rows):
            lines = [tuple(_plain(word) for word in head), ("---",) * len(head), *(tuple(_in_table(cell) for cell in row) for row in rows)]
            return ["\n".join(f"| {' | '.join(line)} |" for line in lines)]
        case Picture(path, alt, words):
            return [f"![{_plain(alt)}]({_link(path, beside)})", _paragraph(words)]
        case Strip(words, cells):
            labels = [_plain(f"{one.label} ({one.badge})" if one.badge else one.label) for one in cells]
            images = [f"![{label}]({_link(one.path, beside)})" for label, one in zip(labels, cells, strict=True)]
            return [_paragraph(words), "\n".join(f"| {' | '.join(line)} |" for line in (labels, ["---"] * len(cells), images))]
        case Charts(charts):
            return [part for one in charts for part in (f"### {_plain(one.title)}", _plain(one.how), *_markdown(one.numbers, beside))]
        case Details(summary, blocks):
            return [f"### {_plain(summary)}", *_all_marked(blocks, beside)]


def _marked(words: Words) -> str:
    return "".join(
        _plain(one) if isinstance(one, str) else _fenced(one.text) if isinstance(one, Code) else f"**{_plain(one.text)}**" for one in words
    )


def _in_table(cell: Inline) -> str:
    return _marked((cell,)).replace("|", "\\|") if isinstance(cell, Code) else _marked((cell,))


def _fenced(text: str) -> str:
    """Code between more backticks than it has in a row itself."""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{' '.join(text.split())}{pad}{fence}"


def _plain(text: str) -> str:
    """Text on one line in which no sign means anything to Markdown."""
    return re.sub(r"([\\`*_\[\]<>#|~&])", r"\\\1", re.sub(r"\s+", " ", text))


def _paragraph(words: Words) -> str:
    """Words that are not taken for a list, however they begin."""
    return re.sub(r"^(\d*)([-+.)])", r"\1\\\2", _marked(words).strip())


def _link(path: Path, beside: Path) -> str:
    return quote(path.relative_to(beside).as_posix() if path.is_relative_to(beside) else path.name)
