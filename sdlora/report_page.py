"""A report as one HTML file that needs nothing but itself.

The style is inside, charts are SVG, pictures are data URIs, there is no script, and a policy in its head forbids the browser to fetch
anything. Pictures that are larger than a page shows are made smaller on their way in, so that a run of
many 1,024 px samples stays a file that can be sent. All text is escaped here and nowhere else.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sdlora.report_blocks import (
    Block,
    Box,
    Cell,
    Chart,
    Charts,
    Code,
    Details,
    Inline,
    Listed,
    Page,
    Paragraph,
    Picture,
    Strip,
    Table,
    Words,
)  # fmt: skip
from sdlora.report_style import STYLE

_KEPT_BYTES = 300_000  # a PNG up to this size goes in as it is
_QUALITY = 88  # of JPEG; artefacts are not seen at it, and a 1,024 px sample has a seventh of its bytes as PNG
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def to_html(page: Page) -> str:
    """The page as one HTML file."""
    anchors = [re.sub(r"[^a-z]+", "-", one.title.lower()).strip("-") for one in page.sections]
    links = "".join(f'<a href="#{anchor}">{html.escape(one.title)}</a>' for anchor, one in zip(anchors, page.sections, strict=True))
    sections = "".join(
        f'<section id="{anchor}"><h2>{html.escape(one.title)}</h2>{_all_html(one.blocks)}</section>'
        for anchor, one in zip(anchors, page.sections, strict=True)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/><meta name="color-scheme" content="light dark"/>'
        f"<title>{html.escape(page.title)}</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{html.escape(page.title)}</h1><p class="lead">{_inline(page.words)}</p></header>'
        f"<main>{_all_html(page.blocks)}<nav>{links}</nav>{sections}</main></body></html>\n"
    )


def data_uri(path: Path, *, wide_px: int) -> tuple[str, tuple[int, int]] | None:
    """A picture's bytes as text, and its size; None if it cannot be read.

    Args:
        wide_px: a longer side is made this long, as JPEG.
    """
    try:
        with Image.open(path) as image:
            if max(image.size) <= wide_px and image.format == "PNG" and path.stat().st_size <= _KEPT_BYTES:
                image.load()
                return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", image.size
            small, buffer = image.convert("RGB"), io.BytesIO()
    except (OSError, SyntaxError, Image.DecompressionBombError):  # Pillow says of a damaged PNG that it is a SyntaxError
        return None
    small.thumbnail((wide_px, wide_px), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", small.size


def _all_html(blocks: Sequence[Block]) -> str:
    return "".join(_html(block) for block in blocks)


def _html(block: Block) -> str:
    match block:
        case Paragraph(words, faint):
            look = ' class="faint"' if faint else ""
            return f"<p{look}>{_inline(words)}</p>"
        case Box(kind, title, words):
            return f'<div class="box {kind}"><h2>{html.escape(title)}</h2>{"".join(f"<p>{_inline(one)}</p>" for one in words)}</div>'
        case Listed(items, ordered):
            tag = "ol" if ordered else "ul"
            return f"<{tag}>{''.join(f'<li>{_inline(one)}</li>' for one in items)}</{tag}>"
        case Table():
            return _html_table(block)
        case Picture(path, alt, words, wide_px):
            return f'<figure class="wide"><div class="scroll">{_img(path, wide_px=wide_px, alt=alt)}</div>{_caption(words)}</figure>'
        case Strip(words, cells, wide_px):
            inside = "".join(_html_cell(one, wide_px=wide_px) for one in cells)
            return f'<figure class="strip">{_caption(words)}<div class="cells">{inside}</div></figure>'
        case Charts(charts):
            return f'<div class="charts">{"".join(_html_chart(one) for one in charts)}</div>'
        case Details(summary, blocks):
            return f"<details><summary>{html.escape(summary)}</summary>{_all_html(blocks)}</details>"


def _html_table(table: Table) -> str:
    right = [bool(table.rows) and all(_is_number(row[column]) for row in table.rows) for column in range(len(table.head))]
    sides = [' class="number"' if one else "" for one in right]
    head = "".join(f"<th{side}>{html.escape(word)}</th>" for word, side in zip(table.head, sides, strict=True))
    rows = ("".join(f"<td{side}>{_inline((cell,))}</td>" for cell, side in zip(row, sides, strict=True)) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    look = ' class="wordy"' if table.wordy else ""
    return f'<div class="scroll"><table{look}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_cell(cell: Cell, *, wide_px: int) -> str:
    badge = f' <span class="badge">{html.escape(cell.badge)}</span>' if cell.badge else ""
    image = _img(cell.path, wide_px=wide_px, alt=cell.label)
    return f'<div class="cell{" marked" if cell.badge else ""}">{image}<span>{html.escape(cell.label)}{badge}</span></div>'


def _html_chart(chart: Chart) -> str:
    return f"<figure><h3>{html.escape(chart.title)}</h3>{chart.svg}<figcaption>{html.escape(chart.how)}</figcaption></figure>"


def _img(path: Path, *, wide_px: int, alt: str) -> str:
    found = data_uri(path, wide_px=wide_px)
    if not found:
        return f'<span class="missing">{html.escape(path.name)} cannot be read</span>'
    uri, (width, height) = found
    return f'<img src="{uri}" width="{width}" height="{height}" alt="{html.escape(alt)}"/>'


def _caption(words: Words) -> str:
    return f"<figcaption>{_inline(words)}</figcaption>"


def _inline(words: Words) -> str:
    return "".join(_one(word) for word in words)


def _one(word: Inline) -> str:
    if isinstance(word, str):
        return html.escape(word)
    tag = "code" if isinstance(word, Code) else "strong"
    return f"<{tag}>{html.escape(word.text)}</{tag}>"


def _is_number(cell: Inline) -> bool:
    return isinstance(cell, str) and re.match(r"[-+]?\d|$", cell) is not None
