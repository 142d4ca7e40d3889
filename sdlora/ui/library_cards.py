"""What is seen of LoRA files and runs: cards, and all that is known of one. Every text that comes from a file or a person is escaped.

A card is a button that carries an id. Pictures travel inside the page's text, so that no file of these folders has to be served.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sdlora import chosen, run_folder, shelf
from sdlora.runs import Run
from sdlora.ui import lora_shelf, words
from sdlora.ui.lora_shelf import FAMILIES, Item
from sdlora.ui.roots import Roots

PER_PAGE = 24
_MOST_CHARACTERS = 1500  # of a value of the metadata
CSS = """
.shelf { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; }
.shelf:has(.fold[open]) { align-items: start; }
.shelf .stack { display: flex; flex-direction: column; gap: 4px; min-width: 0; } .shelf .card { flex: 1; }
.shelf .card { display: flex; flex-direction: column; gap: 4px; padding: 8px; text-align: left; border-radius: 10px; cursor: pointer; }
.shelf .fold summary { cursor: pointer; font-size: 0.78rem; padding: 4px 8px; color: var(--body-text-color-subdued); }
.shelf .fold[open] { max-height: 220px; overflow: auto; }
.shelf .leaf { display: block; width: 100%; padding: 4px 8px; text-align: left; font-size: 0.8rem; border-radius: 6px; cursor: pointer; }
.shelf .leaf { color: var(--body-text-color); font-weight: 400; overflow-wrap: anywhere; background: none; border: 0; }
.shelf .leaf:hover, .shelf .leaf:focus-visible { background: var(--background-fill-secondary); }
.shelf .leaf:focus-visible { outline: 1px solid var(--primary-500); outline-offset: -1px; }
.shelf .leaf .badge { margin: 0 0 0 5px; }
.shelf .card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary); min-width: 0; font: inherit; }
.shelf .card:hover, .shelf .card:focus-visible { border-color: var(--primary-500); box-shadow: 0 0 0 1px var(--primary-500); }
.shelf .card:focus-visible { outline: none; }
.shelf img, .shelf .blank, .facts-head img, .facts-head .blank { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 6px; }
.blank { display: flex; align-items: center; justify-content: center; font-size: 2rem; font-weight: 600; }
.blank { color: var(--body-text-color-subdued); background: var(--background-fill-secondary); }
.shelf .name { font-weight: 600; overflow-wrap: anywhere; line-height: 1.25; color: var(--body-text-color); }
.shelf .line { font-size: 0.78rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; line-height: 1.3; }
.badge { display: inline-block; font-size: 0.74rem; padding: 0 7px; border-radius: 99px; line-height: 1.5; margin: 0 3px 2px 0; }
.badge { border: 1px solid var(--border-color-primary); color: var(--body-text-color); background: var(--background-fill-secondary); }
.badge.bad { border-color: #dc2626; } .badge.good { border-color: #16a34a; } .badge.busy { border-color: var(--primary-500); }
.shelf-count { color: var(--body-text-color-subdued); font-size: 0.85rem; margin: 8px 2px 0; }
.facts-head { display: grid; grid-template-columns: minmax(96px, 160px) 1fr; gap: 14px; align-items: start; margin-bottom: 10px; }
.facts-head h3 { margin: 0 0 6px; font-size: 1.15rem; overflow-wrap: anywhere; color: var(--body-text-color); }
.facts { display: grid; grid-template-columns: minmax(90px, max-content) 1fr; gap: 3px 14px; margin: 0; font-size: 0.88rem; }
.facts dt { color: var(--body-text-color-subdued); } .facts dd { margin: 0; overflow-wrap: anywhere; color: var(--body-text-color); }
.facts .mono { font-family: var(--font-mono); font-size: 0.8rem; }
@media (max-width: 700px) { .facts-head { grid-template-columns: 1fr; } .facts-head > :first-child { max-width: 160px; } }
.tags { margin: 10px 0 0; max-height: 180px; overflow: auto; } .tags b { font-weight: 600; margin-left: 3px; }
.all-metadata { margin-top: 10px; } .all-metadata summary { cursor: pointer; } .all-metadata dl { max-height: 420px; overflow: auto; }
.trouble { border-left: 4px solid #dc2626; padding: 6px 10px; margin: 0 0 10px; overflow-wrap: anywhere; }
"""


def escaped(text: str) -> str:
    """A stranger's text as HTML; half characters, which names of files can hold and no answer can carry, become question marks."""
    return html.escape(text.encode("utf-8", "replace").decode())


def lora_cards(found: Sequence[list[Item]], page: int, language: str, *, all_count: int) -> str:
    """A page of cards of LoRA files, those of one run on one card.

    Args:
        found: as `lora_shelf.stacked` gives them.
        all_count: how many there are before any search.
    """
    begin = PER_PAGE * (page - 1)
    cards = "".join(_lora_card(*lora_shelf.best_first(stack), language=language) for stack in found[begin : begin + PER_PAGE])
    return _shelf(cards, len(found), page, language, all_count)


def _lora_card(one: Item, *folded: Item, language: str) -> str:
    facts, told = one.facts, lora_shelf.marks(one.run) if one.run else {}
    badges = [_marks(one, told, language), _badge(FAMILIES.get(facts.family, facts.family))]
    badges += [_badge(f"r {ranks(facts.ranks)}")] if facts.ranks else []
    badges += [_badge("!", "bad", facts.trouble)] if facts.trouble else []
    lines = [facts.trigger[:80], facts.trouble[:90]] if facts.trouble else [facts.trigger[:80]]
    picture = lora_shelf.small_picture(shelf.preview(facts.path))
    return _card(one.key, one.shown, picture, [*badges, _badge(size(facts.size_bytes))], lines, _fold(folded, told, language))


def _fold(folded: Sequence[Item], told: Mapping[str, Path], language: str) -> str:
    """The further files of a run, by name alone: a run of a hundred checkpoints is one card, and no header of theirs is read."""
    if not folded:
        return ""
    rows = "".join(
        f'<button type="button" class="leaf" data-key="{one.key}"><span>{escaped(one.shown)}</span>{_marks(one, told, language)}</button>'
        for one in folded
    )
    said = words.say("library.fold_one" if len(folded) == 1 else "library.fold_many", language, count=len(folded))
    return f'<details class="fold"><summary>{escaped(said)}</summary>{rows}</details>'


def _marks(one: Item, told: Mapping[str, Path], language: str) -> str:
    return "".join(_badge(words.say(f"library.mark_{word}", language), "good") for word, path in told.items() if path == one.path)


def run_cards(roots: Roots, found: Sequence[tuple[str, Run]], page: int, language: str, *, all_count: int) -> str:
    """A page of cards of runs."""
    begin = PER_PAGE * (page - 1)
    cards = []
    for key, run in found[begin : begin + PER_PAGE]:
        kind = {"running": "busy", "paused": "busy", "done": "good"}.get(run.state, "" if run.state == "stopped" else "bad")
        badges = [_badge(words.say(f"library.state_{run.state}", language), kind), _badge(f"{run.step} / {run.steps}")]
        picture = lora_shelf.small_picture(run_folder.newest_sample(run.folder))
        name, badges = lora_shelf.name_of(roots, run.folder), [*badges, _badge(size(run.size_bytes))]
        cards.append(_card(key, name, picture, badges, [run.trigger, run.trouble[:90]]))
    return _shelf("".join(cards), len(found), page, language, all_count)


def _shelf(cards: str, count: int, page: int, language: str, all_count: int) -> str:
    if not count:
        said = words.say("library.no_match" if all_count else "library.nothing", language)
        return f'<div class="welcome one-page">{escaped(said)}</div>'
    said = words.say("library.count", language, shown=count, count=all_count, page=page, pages=pages(count))
    alone = " one-page" if pages(count) == 1 else ""  # there is nothing to turn
    return f'<div class="shelf">{cards}</div><div class="shelf-count{alone}">{escaped(said)}</div>'


def pages(count: int) -> int:
    """How many pages so many cards fill."""
    return max(1, math.ceil(count / PER_PAGE))


def _card(key: str, name: str, picture: str, badges: Iterable[str], lines: Iterable[str], below: str = "") -> str:
    said = "".join(f'<span class="line">{escaped(line)}</span>' for line in lines if line)
    return (
        f'<div class="stack"><button type="button" class="card" data-key="{key}">{_picture(picture, name)}'
        f'<span class="name">{escaped(name)}</span><span>{"".join(badges)}</span>{said}</button>{below}</div>'
    )


def _picture(address: str, name: str) -> str:
    return f'<img src="{address}" alt="">' if address else f'<span class="blank" aria-hidden="true">{escaped(name[:1].upper())}</span>'


def _badge(text: str, kind: str = "", title: str = "") -> str:
    told = f' title="{escaped(title)}"' if title else ""
    return f'<span class="badge {kind}"{told}>{escaped(text)}</span>'


def ranks(found: Sequence[int]) -> str:
    """ "8", or "4 to 16" of a file with several."""
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}" if found else "-"


def size(count: int) -> str:
    """Bytes in words: "2.2 MB"."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.1f} MB" if count >= 1e5 else f"{count / 1024:.0f} KB"


def _day(time_s: float | None) -> str:
    return f"{datetime.fromtimestamp(time_s):%Y-%m-%d %H:%M}" if time_s else "-"


# --- one of them --------------------------------------------------------------------------------------------------------------


def lora_facts(roots: Roots, one: Item, language: str) -> str:
    """All that the header of a LoRA file and the files beside it tell."""
    facts, unknown = one.facts, words.say("library.not_stated", language)
    said = [words.say(f"library.mark_{word}", language) for word in lora_shelf.marks_of(one)]
    root = next(root for root in (roots.runs, roots.loras) if facts.path.is_relative_to(root))
    rows = {
        "family": FAMILIES.get(facts.family, facts.family), "rank": ranks(facts.ranks), "trigger": facts.trigger or "-",
        "strength": f"{facts.strength:g}", "base": facts.base or unknown, "size": size(facts.size_bytes), "date": _day(facts.written_s),
        "run": " · ".join([one.run.name, *said]) if one.run else "-",
        "place": facts.path.relative_to(root).as_posix(), "hash": facts.hash or unknown,
        "legacy": facts.legacy_hash or unknown,
    }  # fmt: skip
    tags = "" if facts.trouble else _tags(shelf.tags(facts.path), language)
    return _head(one.shown, lora_shelf.small_picture(shelf.preview(facts.path)), facts.trouble, _said(rows, language)) + tags


def run_facts(run: Run, language: str) -> str:
    """All that a run tells of itself, and what a person has chosen of it."""

    def strength_of(one: Any) -> str:
        return words.say("library.strength_of", language, step=one.step, strength=f"{one.strength:g}") if one else "-"

    rows = {
        "state": words.say(f"library.state_{run.state}", language), "steps": f"{run.step} / {run.steps}", "kind": run.kind or "-",
        "trigger": run.trigger or "-", "base": Path(run.base).name or "-", "size": size(run.size_bytes), "date": _day(run.when_s),
        "best": strength_of(run.best), "yours": strength_of(chosen.read(run.folder)),
    }  # fmt: skip
    return _head(run.folder.name, lora_shelf.small_picture(run_folder.newest_sample(run.folder)), run.trouble, _said(rows, language))


def _said(rows: Mapping[str, str], language: str) -> str:
    return table({words.say(f"library.fact_{key}", language): value for key, value in rows.items()})


def table(rows: Mapping[str, str]) -> str:
    """Names and values as a list of two columns, escaped."""
    cells = "".join(f"<dt>{escaped(key)}</dt><dd>{escaped(value)}</dd>" for key, value in rows.items())
    return f'<dl class="facts">{cells}</dl>'


def _head(name: str, picture: str, trouble: str, facts: str) -> str:
    warned = f'<p class="trouble">{escaped(trouble)}</p>' if trouble else ""
    return f'<div class="facts-head">{_picture(picture, name)}<div><h3>{escaped(name)}</h3>{warned}{facts}</div></div>'


def _tags(found: Sequence[tuple[str, int]], language: str) -> str:
    if not found:
        return ""
    chips = "".join(f'<span class="badge">{escaped(tag[:80])}<b>{count}</b></span>' for tag, count in found[:80])
    return f'<div class="tags"><div class="line">{escaped(words.say("library.fact_tags", language))}</div>{chips}</div>'


def inside(facts: Mapping[str, Any], legacy_hash: str, metadata: Mapping[str, str], language: str) -> str:
    """What a file holds after it was read whole, and all of its metadata."""
    told = {key.replace("_", " "): _plain(value) for key, value in facts.items()} | {"legacy hash": legacy_hash}
    rows = {key: value if len(value) <= _MOST_CHARACTERS else f"{value[:_MOST_CHARACTERS]}…" for key, value in sorted(metadata.items())}
    summary = escaped(words.say("library.metadata", language, count=len(metadata)))
    return f'{table(told)}<details class="all-metadata"><summary>{summary}</summary>{table(rows)}</details>'


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items()) or "-"
    return ", ".join(map(str, value)) or "-" if isinstance(value, list) else str(value)
