"""The LoRA files and runs that the page offers, by id: their facts, their names, and a small picture of each.

Facts come from headers and are remembered (`shelf.facts`); so are the small pictures, the newest few hundred of them. Pictures are made
small here and travel inside the page's text, so that no file of a LoRA folder has to be served.
"""

from __future__ import annotations

import base64
import io
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image

from sdlora import chosen, images, run_folder, run_lock, runs, shelf
from sdlora.errors import UserError
from sdlora.runs import Run
from sdlora.shelf import Facts
from sdlora.ui import roots as places
from sdlora.ui.roots import Roots

FAMILIES = {"mini": "mini", "sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", "other": "?"}
ORDERS = ("newest", "name", "size")
MARKS = ("marked", "recommended")  # a person's word goes before the run's own
SMALL_PX = 256
_LIMIT_PX = 40_000_000  # of a picture that somebody put beside a file


@dataclass(frozen=True)
class Item:
    """A LoRA file of the list: its id, the name that is shown, its place, the run folder that it is of, its bytes and unix time."""

    key: str
    shown: str
    path: Path
    run: Path | None
    size_bytes: int
    written_s: float

    @property
    def facts(self) -> Facts:
        """What its header tells: read when it is first asked for, as 500 headers of SDXL take some seconds."""
        return shelf.facts(self.path)


def paths(roots: Roots) -> dict[str, Path]:
    """All LoRA files by id; the states that runs can go on from are none."""
    return places.listed([roots.runs, roots.loras], _is_lora)


def _is_lora(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors" and path.parts[-3:-2] != ("state",) and path.is_file()


def items(roots: Roots) -> list[Item]:
    """All LoRA files. A file's name is shown alone if it is the only one of that name."""
    found = paths(roots)
    stems = Counter(path.stem for path in found.values())
    run_of = cache(shelf.run_of_folder)  # for this list alone: a folder becomes a run's while the page is open
    return [_item(roots, key, path, stems, run_of(path.parent)) for key, path in found.items()]


def _item(roots: Roots, key: str, path: Path, stems: Counter[str], run: Path | None) -> Item:
    above = path.parent if path.parent.name != "checkpoints" else path.parent.parent
    shown = path.stem if stems[path.stem] == 1 else f"{name_of(roots, above)}/{path.stem}"
    size, written_ns = _stamp(path)
    return Item(key, shown.encode("utf-8", "replace").decode(), path, run, size, written_ns / 1e9)


def name_of(roots: Roots, folder: Path) -> str:
    """How a folder of a run, or of LoRAs, is called: by its place, as the runs of a queue lie in a folder of their own."""
    root = next((root for root in (roots.runs, roots.loras) if folder != root and folder.is_relative_to(root)), folder.parent)
    return folder.relative_to(root).as_posix().encode("utf-8", "replace").decode()


def warm(roots: Roots) -> None:
    """Reads all headers in a thread of its own, so that the first search need not wait for them."""

    def read() -> None:
        for one in items(roots):
            shelf.facts(one.path)

    threading.Thread(target=read, name="headers", daemon=True).start()


def item(roots: Roots, key: str) -> Item:
    """One of them.

    Raises:
        UserError: if it is not there.
    """
    found = paths(roots)
    path = places.find(key, found, what="LoRA")
    return _item(roots, key, path, Counter(one.stem for one in found.values()), shelf.run_of(path))


def matching(found: Iterable[Item], *, words: str = "", family: str = "", order: str = "newest") -> list[Item]:
    """Those in which every word stands (in name, trigger words, base, run or notes), of one family or any, in one of `ORDERS`.

    Raises:
        UserError: if the order is unknown.
    """
    keys = {"newest": lambda one: -one.written_s, "name": lambda one: one.shown.lower(), "size": lambda one: -one.size_bytes}
    if order not in keys:
        raise UserError(f"Order {places.shown(str(order))} is unknown; there are {', '.join(ORDERS)}.")
    wanted = words.lower().split()  # without any, and of all families, no header is read here
    kept = [one for one in found if (not family or one.facts.family == family) and all(word in _text(one) for word in wanted)]
    return sorted(kept, key=keys[order])


def _text(one: Item) -> str:
    facts = one.facts
    told = (one.shown, facts.trigger, facts.base, facts.notes, facts.family, one.run.name if one.run else "")
    return " ".join(told).lower()


def stacked(found: Iterable[Item]) -> list[list[Item]]:
    """The files of one run together, in the place of the first of them; every other file alone."""
    stacks: dict[Path, list[Item]] = {}
    for one in found:
        stacks.setdefault(one.run or one.path, []).append(one)
    return list(stacks.values())


def best_first(stack: Sequence[Item]) -> list[Item]:
    """The files of one run: what a person has marked, what the run recommends, what it ended with, then from the last checkpoint on."""
    run = stack[0].run
    if run is None or len(stack) == 1:
        return list(stack)
    told = marks(run)
    return sorted(stack, key=lambda one: (*(told.get(word) != one.path for word in MARKS), -(shelf.step_of(one.path) or 1e12)))


def fronts_first(found: Iterable[Item], most: int) -> list[Item]:
    """The first so many of a list: one file of each run and all others, then, as far as there is room, the runs' further files."""
    stacks = [best_first(stack) for stack in stacked(found)[:most]]
    return [*(stack[0] for stack in stacks), *(one for stack in stacks for one in stack[1:])][:most]


def marks(run: Path) -> dict[str, Path]:
    """Which of a run's files has each of `MARKS`."""
    told = look(run)
    best = {"marked": chosen.marked(told), "recommended": told.best}
    return {word: one.path for word, one in best.items() if one and one.path}


def marks_of(one: Item) -> list[str]:
    """Which of `MARKS` a file has."""
    return [word for word, path in marks(one.run).items() if path == one.path] if one.run else []


def run_folders(roots: Roots) -> dict[str, Path]:
    """All run folders by id."""
    return places.listed([roots.runs], lambda path: path.is_dir() and runs.is_run(path))


def look(folder: Path) -> Run:
    """A run as it is now; a folder in which nothing has changed is not read anew, as the metrics of a long run have megabytes."""
    stamps = tuple(_stamp(folder / name) for name in ("metrics.jsonl", "config.toml", "verdict.json", "checkpoints", "samples"))
    return _looked(folder, stamps, run_lock.owner(folder) is not None, (folder / "pause").exists())


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=1024)
def _looked(folder: Path, *_: object) -> Run:
    return runs.look(folder)


def choices_of(roots: Roots) -> list[tuple[str, str]]:
    """What the list of LoRAs offers: what is shown and its id, by name; each run's best has a star."""
    found = matching(items(roots), order="name")
    best = [chosen.best(look(run)) for run in {one.run for one in found if one.run}]
    starred = {one.path for one in best if one}
    return [(f"{one.shown} ★" if one.path in starred else one.shown, one.key) for one in found]


def runs_of(roots: Roots) -> list[tuple[str, str]]:
    """What the list of runs offers, by name."""
    found = ((name_of(roots, folder), key) for key, folder in run_folders(roots).items())
    return sorted(found, key=lambda pair: pair[0].lower())


def runs_with_loras(roots: Roots) -> list[tuple[str, str]]:
    """As `runs_of`, without runs that have saved none yet."""
    folders = run_folders(roots)
    return [(name, key) for name, key in runs_of(roots) if run_folder.has_lora(folders[key])]


def bases_of(roots: Roots) -> list[tuple[str, str]]:
    """What the list of bases offers."""
    found = [("mini", "mini"), *((path.stem if path.is_file() else path.name, key) for key, path in places.bases(roots).items())]
    return (
        found if roots.first in [key for _, key in found] else [*found, (Path(roots.first).name.removesuffix(".safetensors"), roots.first)]
    )


def small_picture(path: Path | None) -> str:
    """A picture as a data address of a small JPEG; "" if there is none or it cannot be read."""
    if path is None:
        return ""
    size, written_ns = _stamp(path)
    return _small(path, size, written_ns) if written_ns else ""


@lru_cache(maxsize=512)
def _small(path: Path, *_: int) -> str:
    try:
        picture = images.open_picture(path, limit_px=_LIMIT_PX, enough_px=(SMALL_PX, SMALL_PX)).image
    except UserError:
        return ""
    if max(picture.size) < SMALL_PX:  # the pictures of the mini base have 64 px: their pixels stay sharp
        factor = SMALL_PX // max(picture.size)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((SMALL_PX, SMALL_PX), Image.Resampling.LANCZOS)
    return data_address(picture)


def data_address(picture: Image.Image) -> str:
    """A picture as text that an `img` shows."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
