"""What the server process keeps for the page: one loaded base, the lock that owns it, and the line of drawings that wait for it."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from sdlora import base_files, base_model, devices, lora_file, run_lock
from sdlora.base_model import Base
from sdlora.generate import LoRA, Request, Source
from sdlora.ui import lora_shelf
from sdlora.ui import roots as places
from sdlora.ui.roots import Roots

LARGEST_SIDE_PX = 2048
PATIENCE_S = 5.0  # a look at the base waits so long for a drawing to end


@dataclass(frozen=True)
class Order:
    """What Generate was pressed for.

    Args:
        owner: the folder in `outputs` that the pictures go into, see `gallery.owner_of`.
        beside: asks for the same pictures without LoRA too.
    """

    base: str
    request: Request
    count: int
    loras: tuple[LoRA, ...] = ()
    beside: bool = False
    owner: str = "nobody"
    source: Source | None = None


@dataclass(frozen=True)
class Drawn:
    """How far a drawing is.

    Args:
        with_lora, without: pictures so far as (file, seed).
        done, steps: steps of all pictures.
        place: how many drawings are before it; None once it has begun.
        training: the run that it waits for, or beside which it draws; "" for none.
        preview: the newest look at the unfinished picture.
        ended: "done", "stopped", or "" while it goes on.
    """

    with_lora: tuple[tuple[Path, int], ...] = ()
    without: tuple[tuple[Path, int], ...] = ()
    done: int = 0
    steps: int = 0
    width_px: int = 0
    elapsed_s: float = 0.0
    place: int | None = None
    training: str = ""
    preview: Image.Image | None = None
    ended: str = ""

    @property
    def left_s(self) -> float | None:
        """Seconds left at the pace so far; None before the first two steps are done."""
        return self.elapsed_s / self.done * (self.steps - self.done) if self.done >= 2 else None


@dataclass(eq=False)
class Job:
    """An order at work or in line."""

    session: str
    order: Order
    state: Drawn = field(default_factory=Drawn)
    stop: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    problem: BaseException | None = None


@dataclass
class Studio:
    """The server's one workplace.

    Args:
        base: the base that is loaded, if one is.
        busy: held by whoever uses the base.
        line: the drawings in the order in which they were asked for, the one at work first.
        plain: the pictures without LoRA that the loaded base drew already, by owner.
    """

    roots: Roots
    base: Base | None = None
    busy: threading.Lock = field(default_factory=threading.Lock)
    line: list[Job] = field(default_factory=list)
    plain: dict[tuple[str, Request], Path] = field(default_factory=dict)


def base_of(studio: Studio, word: str) -> str:
    """What a base is called below the roof, for a word from the browser.

    Raises:
        UserError: if it is not offered.
    """
    return places.base_name(studio.roots, word)


def use_base(studio: Studio, name: str) -> Base:
    """The base of that name, loaded only if another one, or none, is. To be called by the holder of `busy`.

    Raises:
        UserError: if there is no such base, or it cannot be opened; the one loaded before then stays.
    """
    if studio.base is None or studio.base.name != name:
        device = devices.best_device()
        studio.base = base_files.load(name, device=device, dtype=devices.base_dtype(device))
        studio.plain.clear()
    return studio.base


def make_room(studio: Studio) -> bool:
    """Lets go of the base where a training would have to share a GPU's memory with it; whether there is room now.

    A drawing that is at work is waited for: then there is none yet.
    """
    if devices.best_device().type == "cpu":
        return True
    if not studio.busy.acquire(blocking=False):
        return False
    try:
        studio.base = None
        studio.plain.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    finally:
        studio.busy.release()
    return True


def is_free(studio: Studio) -> bool:
    """Whether a trial would have the device for itself: no training at work, and on a GPU no base of ours in its memory."""
    return not training(studio.roots) and (studio.base is None or devices.best_device().type == "cpu")


def look_at_base(studio: Studio, name: str) -> tuple[int, str] | None:
    """How wide a base's pictures are in px, and its family; None if it is not known because others are drawing with another one.

    Raises:
        UserError: as `use_base`.
    """
    if not studio.busy.acquire(timeout=PATIENCE_S):
        loaded = studio.base
        return (loaded.resolution_px, loaded.family) if loaded and loaded.name == name else None
    try:
        loaded = use_base(studio, name)
        return loaded.resolution_px, loaded.family
    finally:
        studio.busy.release()


def fit(studio: Studio, name: str, path: Path) -> tuple[str, str] | None:
    """How many of a LoRA file's modules match those of a base, in a sentence, and why it cannot be used ("" if it can).

    None if others are drawing, which is when nobody may look.

    Raises:
        UserError: if the file or the base cannot be read.
    """
    modules = lora_file.read(path).modules
    if not studio.busy.acquire(timeout=PATIENCE_S):
        return None
    try:
        found = base_model.fit(use_base(studio, name), modules)
        return found.sentence, found.why_not or ""
    finally:
        studio.busy.release()


def training(roots: Roots) -> str:
    """The name of a run that is at work and not paused; "" if there is none."""
    folders = lora_shelf.run_folders(roots).values()
    return next((one.name for one in folders if not (one / "pause").exists() and run_lock.owner(one) is not None), "")
