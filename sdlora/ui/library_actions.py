"""What the presses on the page of LoRA files and runs do: look, inspect, note, rename, resize, convert, share, delete, import.

An id becomes a file here, and the work is done by the rooms below. Each function answers with what is shown, and a mistake that a person
can mend is a `UserError`, which `said` turns into the page's one sentence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sdlora import (
    base_tensors,
    hub,
    lora_extract,
    lora_file,
    lora_merge,
    lora_moves,
    lora_notes,
    run_lock,
    share,
    shelf,
)  # fmt: skip
from sdlora.errors import UserError
from sdlora.lora_tools import Made, Weights
from sdlora.ui import hand_over, lora_shelf, words
from sdlora.ui import library_cards as cards
from sdlora.ui import roots as places
from sdlora.ui import studio as studios
from sdlora.ui.compare_actions import number
from sdlora.ui.generate_actions import message
from sdlora.ui.roots import Roots
from sdlora.ui.studio import Studio

LIMITS = ("rank", "energy", "max_error")
Answer = TypeVar("Answer")


def said(language: str, work: Callable[[], str]) -> str:
    """The status line of a press: what it says that it did, or why it could not."""
    try:
        return message(work(), kind="good")
    except UserError as problem:
        return message(clean(str(problem)), kind="bad")
    except Exception:
        print(words.say("library.bug", language))
        raise


def clean(text: str) -> str:
    """A text without half characters, which no answer can carry."""
    return text.encode("utf-8", "replace").decode()


# --- looking ------------------------------------------------------------------------------------------------------------------


def shelf_of(roots: Roots, what: str, search: str, family: str, order: str, page: Any, language: str) -> tuple[str, int, int]:
    """The cards of a page, which page that is, and how many there are; the files of one run that are found are one card.

    Args:
        what: "loras" or "runs".

    Raises:
        UserError: if a word is none that is known.
    """
    if what not in ("loras", "runs"):
        raise UserError(f"{places.shown(str(what))} cannot be shown; there are loras and runs.")
    if family and family not in lora_shelf.FAMILIES:
        raise UserError(f"Family {places.shown(str(family))} is unknown; there are {', '.join(lora_shelf.FAMILIES)}.")
    wanted = int(number(page or 1, "The page", 1, 100_000, whole=True))
    draw: Callable[..., str]
    if what == "runs":
        every = [(key, lora_shelf.look(folder)) for key, folder in lora_shelf.run_folders(roots).items()]
        told = {key: f"{lora_shelf.name_of(roots, run.folder)} {run.trigger} {run.base}".lower() for key, run in every}
        runs = [(key, run) for key, run in every if (search or "").lower() in told[key]]
        runs.sort(key=lambda pair: -(pair[1].when_s or 0.0))
        count, draw = len(runs), functools.partial(cards.run_cards, roots, runs, all_count=len(every))
    else:
        all_of_them = lora_shelf.items(roots)
        loras = lora_shelf.stacked(lora_shelf.matching(all_of_them, words=search or "", family=family or "", order=order))
        count, draw = len(loras), functools.partial(cards.lora_cards, loras, all_count=len(lora_shelf.stacked(all_of_them)))
    shown = min(wanted, cards.pages(count))
    return draw(page=shown, language=language), shown, cards.pages(count)


def turned(page: Any, *, by: int) -> int:
    """The page before or after one; the first if the control holds no page."""
    return int(min(max(1, page + by), 100_000)) if isinstance(page, int | float) and math.isfinite(page) else 1


def choices_of(roots: Roots, language: str) -> list[tuple[str, str]]:
    """What the list of all files and runs offers, whatever is searched for."""
    run = words.say("library.fact_run", language)
    return [*lora_shelf.choices_of(roots), *((f"{run}: {name}", key) for name, key in lora_shelf.runs_of(roots))]


def look(roots: Roots, key: str, language: str) -> tuple[str, str]:
    """What is shown of a LoRA file or a run, and its notes.

    Raises:
        UserError: if it is not there.
    """
    if folder := _run(roots, key):
        return cards.run_facts(lora_shelf.look(folder), language), ""
    one = lora_shelf.item(roots, key)
    return cards.lora_facts(roots, one, language), clean(one.facts.notes)


def inspect(studio: Studio, key: str, base: str, language: str) -> tuple[str, str]:
    """Reads a LoRA file whole: how it fits a base, and all that it holds.

    Returns:
        The status line, and the rest as HTML.

    Raises:
        UserError: if the file or the base cannot be read.
    """
    path = _lora(studio.roots, key)
    name, file = base_of(studio, base), lora_file.read(path)
    fit = base_tensors.fit(base_tensors.tensors_of(name), file.modules)
    values = {"name": path.stem, "base": Path(name).name, "sentence": fit.sentence, "reason": fit.why_not}
    status = message(
        clean(words.say("library.fits_not" if fit.why_not else "library.fits", language, **values)), kind="bad" if fit.why_not else "good"
    )
    return status, cards.inside(lora_file.facts(path), shelf.legacy_hash(path), file.metadata, language)


def base_of(studio: Studio, word: str) -> str:
    """A base's name; one of the hub only if it was fetched before, as looking must not fetch many GB.

    Raises:
        UserError: if it is not offered.
    """
    name = studios.base_of(studio, word)
    there = ("mini", studio.roots.first, *map(str, places.bases(studio.roots).values()))
    if name not in there and hub.cached(name) is None:
        raise UserError(f"Base '{name}' was not fetched from the hub yet; draw with it once, then it can be compared with.")
    return name


def _lora(roots: Roots, key: str) -> Path:
    return places.find(key, lora_shelf.paths(roots), what="LoRA")


def _run(roots: Roots, key: str) -> Path | None:
    return lora_shelf.run_folders(roots).get(key) if isinstance(key, str) else None


def setting_of(roots: Roots, key: str, base: str) -> dict[str, Any]:
    """What Generate needs to draw with a LoRA file, or with the best of a run.

    Args:
        base: for a file that is of no run, as the page's controls say it.

    Raises:
        UserError: if it is not there, or the run has saved none.
    """
    folder = _run(roots, key)
    return hand_over.of_run(roots, folder) if folder else hand_over.of_file(roots, _lora(roots, key), base=base)


# --- changing -----------------------------------------------------------------------------------------------------------------


def keep_notes(roots: Roots, key: str, notes: str, language: str) -> str:
    """Keeps notes beside a LoRA file.

    Raises:
        UserError: if it is not there, or the notes cannot be kept.
    """
    path = _lora(roots, key)
    lora_notes.write(path, notes or "")
    return words.say("library.notes_saved", language, name=path.stem)


def rename(roots: Roots, key: str, name: str, language: str) -> str:
    """Renames a LoRA file and what stands beside it; a run keeps its own, and a copy gets the name.

    Raises:
        UserError: if it is not there, or the name cannot be given.
    """
    path, stem = _lora(roots, key), free_name(roots, name)
    if shelf.run_of(path):
        copy = lora_moves.take_in(path, roots.loras, stem)
        return words.say("library.copied", language, name=path.stem, new=copy.stem)
    return words.say("library.renamed", language, name=path.stem, new=lora_moves.rename(path, stem).stem)


def free_name(roots: Roots, name: str) -> str:
    """A new LoRA's name that no other has, wherever it lies: a prompt calls LoRAs by name.

    Raises:
        UserError: if it cannot be a name, or is taken.
    """
    found = lora_moves.checked_name(name or "")
    if any(path.stem == found for path in lora_shelf.paths(roots).values()):
        raise UserError(f"A LoRA called {found} is there already, and prompts call LoRAs by name; choose another name.")
    return found


def delete(roots: Roots, key: str, sure: bool, language: str) -> str:
    """Moves a LoRA file with what stands beside it, or a whole run, to the trash.

    Raises:
        UserError: if nobody is sure, it is not there, or its run is at work.
    """
    folder = _run(roots, key)
    path = folder or _lora(roots, key)
    run = folder or shelf.run_of(path)
    if sure is not True:
        raise UserError(f"{path.name} is still there; tick that you are sure, then press Delete.")
    if run and run_lock.owner(run):
        raise UserError(f"Run {run.name} is at work in that folder; stop it first, then delete.")
    goal = lora_moves.discard([path] if folder else [path, *lora_notes.sidecars(path)], roots.trash, path.stem)
    return words.say("library.deleted", language, name=path.name, place=goal.relative_to(roots.trash.parent))


def take_in(roots: Roots, upload: str | None, name: str, language: str) -> str:
    """Checks an uploaded file whole and copies it into the LoRA folder.

    Raises:
        UserError: if it is no sound LoRA file, or its name cannot be one.
    """
    if not upload:
        raise UserError("No file was given; drop a .safetensors file first.")
    source = Path(upload)
    try:
        path = lora_moves.take_in(source, roots.loras, free_name(roots, (name or "").strip() or source.stem))
    except UserError as problem:
        raise UserError(str(problem).replace(str(source), source.name)) from problem
    return words.say("library.imported", language, name=path.stem)


def share_pack(roots: Roots, key: str, licence: str, keep_prompts: bool, language: str) -> tuple[str, Path]:
    """Makes the folder and the zip of a run, or of the run that a LoRA file is of; a checkpoint's step is the one that is given away.

    Returns:
        What was done, and the zip.

    Raises:
        UserError: if it is of no run, or not complete.
    """
    path = _run(roots, key) or _lora(roots, key)
    folder = path if path.is_dir() else shelf.run_of(path)
    if folder is None:
        raise UserError(f"{path.name} is of no run here, and a share pack tells how a LoRA was made; give the file itself away.")
    if len(licence or "") > 200:
        raise UserError(f"The licence has {len(licence)} characters, and 200 are allowed; give its name, such as cc-by-4.0.")
    out = _free_folder(roots.outputs / "shared", folder.name)
    wishes = share.Wishes(shelf.step_of(path) if path.is_file() else None, bool(keep_prompts), (licence or "").strip())
    shared = share.share(folder, out, wishes=wishes)
    return words.say("library.shared", language, name=folder.name, pictures=shared.pictures), shared.archive


def _free_folder(parent: Path, name: str) -> Path:
    tried = (parent / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(one for one in tried if not one.exists() and not one.with_name(f"{one.name}.zip").exists())


# --- making -------------------------------------------------------------------------------------------------------------------


def resize(studio: Studio, key: str, name: str, limit: str, amount: Any, base: str, language: str) -> Iterator[str]:
    """Writes a LoRA at a smaller rank beside the others: yields status lines.

    Raises:
        UserError: if it is not there, or the limit is out of range.
    """
    roots = studio.roots
    path = _lora(roots, key)
    if limit not in LIMITS:
        raise UserError(f"Limit {places.shown(str(limit))} is unknown; there are {', '.join(LIMITS)}.")
    share_of = number(amount, "The amount", 0, 4096, whole=limit == "rank")
    stem = lora_moves.free(roots.loras, free_name(roots, name)).stem
    given: dict[str, Any] = {limit: int(share_of) if limit == "rank" else share_of}
    yield from keep(roots, stem, lora_extract.resize(path, name=stem, weights=weights_of(studio, base), **given), language)


def convert(roots: Roots, key: str, name: str, to: str, language: str) -> Iterator[str]:
    """Writes a LoRA in another layout beside the others: yields status lines.

    Raises:
        UserError: if it is not there, or the layout is unknown.
    """
    path = _lora(roots, key)
    stem = lora_moves.free(roots.loras, free_name(roots, name)).stem
    yield from keep(roots, stem, iter([lora_merge.convert(path, to=str(to), name=stem)]), language)


def weights_of(studio: Studio, base: str) -> Weights | None:
    """The base's weights, which only DoRA files ask for; None if no base is given.

    Raises:
        UserError: if it is not offered.
    """
    return base_tensors.weights_of(base_of(studio, base)) if base else None


def keep(roots: Roots, stem: str, work: Iterator[tuple[int, int] | Made], language: str) -> Iterator[str]:
    """Follows work on a file to its end and keeps the file: yields status lines.

    Raises:
        UserError: if the work cannot be done or the name was taken meanwhile.
    """
    for state in work:
        if isinstance(state, Made):
            path = lora_moves.add(roots.loras, stem, state.content)
            notes = "".join(f" {note}" for note in state.notes)
            told = {"name": path.stem, "size": cards.size(len(state.content)), "errors": state.errors.sentence, "notes": notes}
            yield message(clean(words.say("library.made", language, **told)), kind="good")
        else:
            yield working(*state, language)


def working(done: int, total: int, language: str) -> str:
    """The status line of work on modules."""
    return message(words.say("library.working", language, done=done, total=total), kind="busy", share=done / max(1, total))
