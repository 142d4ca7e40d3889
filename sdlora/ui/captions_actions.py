"""What the presses on captions do: look at the pictures of a set with all that the doctor finds, write a caption, change all of them.

The findings stand with the pictures that they concern. A set's captions are the page's own copies, see `uploads`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora import captioner, captions, contact_sheet, counts, dataset_report, devices, text
from sdlora import material as materials
from sdlora.base_model import Base
from sdlora.config import Config
from sdlora.dataset import Finding
from sdlora.dataset_report import Report
from sdlora.errors import UserError
from sdlora.material import Found
from sdlora.ui import lora_shelf, train_settings, uploads, words
from sdlora.ui import roots as places
from sdlora.ui.generate_actions import message
from sdlora.ui.roots import Roots
from sdlora.ui.train_settings import Flat, Form

PAGE = 24
LONGEST_TAG = 200
NOTHING: dict[str, Any] = {"set": "", "page": 1, "pages": 1, "pictures": [], "findings": []}
Looked = tuple[int, int] | tuple[Config, Found, Report]


@lru_cache(maxsize=4)
def _shell(base: str, *_: int) -> Base:
    return counts.shell(base, dtype=devices.base_dtype(devices.best_device()))


def shell(base: str) -> Base:
    """What can be known of a base without its weights; a folder or file is looked at anew when it has changed.

    Raises:
        UserError: if it cannot be opened.
    """
    return _shell(base, Path(base).stat().st_mtime_ns if base != "mini" and Path(base).exists() else 0)


def looked(roots: Roots, key: str, form: Form, changes: Flat) -> Iterator[Looked]:
    """The doctor's look at a set: (done, total) after each picture, at the end the run, what was found, and the report.

    Raises:
        UserError: if there is no such set, the settings are not allowed, or the base cannot be opened.
    """
    run = train_settings.run_of(roots, form, changes, uploads.set_folder(roots, key), named=False)
    found, known = materials.find(run), shell(run.base)
    count = partial(text.count, known)
    for one in materials.examined(run, found, grain_px=known.grain_px, resolution_px=known.resolution_px, token_count=count):
        yield (run, found, one) if isinstance(one, Report) else one


def cards(roots: Roots, key: str, found: Sequence[Finding], page: float, language: str) -> dict[str, Any]:
    """A page of a set's pictures with their captions and what was found about each, and what is about none of them."""
    folder = uploads.set_folder(roots, key)
    every = sorted(uploads.pictures(folder), key=lambda path: (_worst(path, found), path))
    pages = max(1, -(-len(every) // PAGE))
    shown = min(max(1, int(page) if isinstance(page, int | float) and page == page and abs(page) < 1e6 else 1), pages)
    about = {path for path in every} | {path.with_suffix(ending) for path in every for ending in (".txt", ".caption")}
    others = [one for one in found if one.path not in about]
    return {
        "set": key, "page": shown, "pages": pages, "count": len(every),
        "said": words.say("train.cards_count", language, count=len(every), page=shown, pages=pages),
        "findings": [_finding(one, folder) for one in others[:20]],
        "pictures": [_card(roots, path, found) for path in every[(shown - 1) * PAGE : shown * PAGE]],
    }  # fmt: skip


def _worst(path: Path, found: Sequence[Finding]) -> int:
    """Pictures that something must be done about come first; notes move none."""
    severities = [one.severity for one in found if one.path and one.path.with_suffix("") == path.with_suffix("")]
    return 0 if "stops" in severities else 1 if "warns" in severities else 2


def _card(roots: Roots, path: Path, found: Sequence[Finding]) -> dict[str, Any]:
    own = [one for one in found if one.path and one.path.with_suffix("") == path.with_suffix("") and one.code != "caption-missing"]
    return {
        "id": places.key_of(roots.data, path), "name": _clean(path.name), "picture": lora_shelf.small_picture(path),
        "caption": _clean(uploads.caption_of(path)), "findings": [_finding(one, path.parent) for one in own],
    }  # fmt: skip


def _finding(one: Finding, folder: Path) -> dict[str, str]:
    where = "" if one.path is None or one.path.suffix else f"{dataset_report.shown(one.path, folder)}: "
    return {"severity": one.severity, "what": _clean(f"{where}{one.what} {one.advice}".replace(str(folder), "…"))}


def summary(report: Report, language: str) -> str:
    """The doctor's word on the whole set, as the status line."""
    count = {severity: sum(one.severity == severity for one in report.findings) for severity in dataset_report.SEVERITIES}
    if count["stops"]:
        return message(words.say("train.check_stops", language, count=count["stops"]), kind="bad")
    if count["warns"]:
        return message(words.say("train.check_warns", language, pictures=report.pictures, count=count["warns"]), kind="busy")
    return message(words.say("train.check_good", language, pictures=report.pictures), kind="good")


def sheet(run: Config, found: Found, report: Report) -> Image.Image:
    """Every picture as it will be trained, on one page."""
    plain = [materials.plain_caption(materials.all_rules(run), sample) for sample in found.samples]
    return contact_sheet.draw(report.items, found.samples, plain, report.findings)


# --- writing ------------------------------------------------------------------------------------------------------------------


def write(roots: Roots, key: str, picture: str, caption: str) -> str:
    """Writes the caption of one picture; gives its name.

    Raises:
        UserError: if there is no such set or picture, or the caption is too long.
    """
    there = {places.key_of(roots.data, path): path for path in uploads.pictures(uploads.set_folder(roots, key))}
    path = places.find(picture, there, what="picture")
    uploads.write_caption(path, caption)
    return path.name


def _added(old: str, tag: str, other: str) -> str:
    own = captions.tags(old)
    return old if tag.lower() in [one.lower() for one in own] else ", ".join([*own, tag])


def _first(old: str, tag: str, other: str) -> str:
    return ", ".join([tag, *(one for one in captions.tags(old) if one.lower() != tag.lower())])


def _removed(old: str, tag: str, other: str) -> str:
    own = captions.tags(old)
    kept = [one for one in own if one.lower() != tag.lower()]
    return ", ".join(kept) if len(kept) < len(own) else old


def _replaced(old: str, tag: str, other: str) -> str:
    own = captions.tags(old)
    if tag.lower() not in [one.lower() for one in own]:
        return old
    return ", ".join(dict.fromkeys(one for one in (other if one.lower() == tag.lower() else one for one in own) if one))


def _prefixed(old: str, tag: str, other: str) -> str:
    return old if old.startswith(tag) else f"{tag} {old}".strip()


EDITS: dict[str, Callable[[str, str, str], str]] = {
    "add": _added, "first": _first, "remove": _removed, "replace": _replaced, "prefix": _prefixed,
}  # fmt: skip


def edit(roots: Roots, key: str, action: str, tag: str, other: str = "") -> tuple[int, int]:
    """Changes the captions of a whole set.

    Args:
        action: "add" a tag last, put it "first", "remove" or "replace" it (by `other`), or put a "prefix" before each caption.

    Returns:
        How many captions changed, of how many.

    Raises:
        UserError: if there is no such set or action, or the tag is empty or too long.
    """
    if action not in EDITS:
        raise UserError(f"{places.shown(str(action))} cannot be done to captions; there are {', '.join(EDITS)}.")
    told = [" ".join(str(one or "").split()) for one in (tag, other)]
    if not told[0] or max(map(len, told)) > LONGEST_TAG:
        raise UserError(f"The words are empty, or longer than {LONGEST_TAG} characters; write the tag that is meant.")
    if action != "prefix" and any("," in one for one in told):
        raise UserError("A tag has no comma in it; change one tag after the other.")
    there, changed = uploads.pictures(uploads.set_folder(roots, key)), 0
    for path in there:
        old = uploads.caption_of(path)
        new = EDITS[action](old, *told)
        if new != old:
            uploads.write_caption(path, new)
            changed += 1
    return changed, len(there)


def draft(roots: Roots, key: str) -> Iterator[tuple[int, int]]:
    """Writes captions for the pictures that have none, by the captioner: (done, total) after each.

    Raises:
        UserError: if there is no such set, or no captioner.
    """
    bare = [path for path in uploads.pictures(uploads.set_folder(roots, key)) if not uploads.caption_of(path)]
    for done, said in enumerate(captioner.captions(bare), 1):
        uploads.write_caption(bare[done - 1], said)
        yield done, len(bare)


def _clean(told: str) -> str:
    return told.encode("utf-8", "replace").decode()
