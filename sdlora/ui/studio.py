"""What the server process keeps for the page: one loaded base, the lock that owns it, and the folders.

Drawing runs in a thread of its own and the page's handler only looks at how far it is. So a closed browser tab leaves no half-held
lock behind, and a second job can never start beside the first: it waits for the lock. Each job has an event that is looked at after
every step, which is what Stop sets.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from PIL import Image

from sdlora import base_files, base_model, devices, files, generate, lora, lora_file
from sdlora.base_model import Base
from sdlora.errors import UserError
from sdlora.generate import LoRA, Request

LARGEST_SIDE_PX = 2048
POLL_S = 0.1


@dataclass
class Studio:
    """The server's one workplace.

    Args:
        loras: the folder in which LoRA files are looked for, at any depth.
        outputs: the folder into which pictures are saved.
        base: the base that is loaded, if one is.
        busy: held by whoever uses the base.
        stops: the stop event of each browser session's running job.
        stamps: when each LoRA file in the base was last written; a file trained anew must not speak with its old voice.
        plain: the pictures without LoRA that the loaded base drew already.
    """

    loras: Path
    outputs: Path
    base: Base | None = None
    busy: threading.Lock = field(default_factory=threading.Lock)
    stops: dict[str, threading.Event] = field(default_factory=dict)
    stamps: dict[Path, int] = field(default_factory=dict)
    plain: dict[Request, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """What Generate was pressed for; `beside` asks for the same pictures without LoRA too."""

    base: str
    request: Request
    count: int
    loras: tuple[LoRA, ...] = ()
    beside: bool = False


@dataclass(frozen=True)
class Drawn:
    """How far a job is: pictures so far as (file, seed), steps done of all steps, and how it ended ("" while it runs)."""

    with_lora: tuple[tuple[Path, int], ...] = ()
    without: tuple[tuple[Path, int], ...] = ()
    done: int = 0
    steps: int = 0
    width_px: int = 0
    elapsed_s: float = 0.0
    ended: str = ""

    @property
    def left_s(self) -> float | None:
        """Seconds left at the pace so far; None before the first two steps are done."""
        return self.elapsed_s / self.done * (self.steps - self.done) if self.done >= 2 else None


def lora_names(studio: Studio) -> dict[str, str]:
    """The LoRA files in the studio's folder: what to show for each id, in order of what is shown.

    The id, not the path, goes to the browser. A file's name is shown alone if it is the only one of that name.
    """
    paths = _lora_paths(studio)
    stems = [path.stem for path in paths.values()]
    root = studio.loras.resolve()
    shown = {
        key: path.stem if stems.count(path.stem) == 1 else path.relative_to(root).with_suffix("").as_posix() for key, path in paths.items()
    }
    return dict(sorted(shown.items(), key=lambda item: item[1].lower()))


def _lora_paths(studio: Studio) -> dict[str, Path]:
    root = studio.loras.resolve()
    found = [path.resolve() for path in root.rglob("*.safetensors") if path.is_file()] if root.is_dir() else []
    inside = {path for path in found if path.is_relative_to(root)}  # a link may point out of the folder
    return {hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()[:16]: path for path in inside}


def lora_path(studio: Studio, key: str) -> Path:
    """The file that an id means.

    Raises:
        UserError: if there is no such file now.
    """
    paths = _lora_paths(studio)
    if key not in paths:
        raise UserError(f"That LoRA is no longer in {studio.loras}; press 'Look again' and choose another.")
    return paths[key]


def use_base(studio: Studio, name: str) -> Base:
    """The base of that name, loaded only if another one, or none, is. To be called by the holder of `busy`.

    Raises:
        UserError: if there is no such base, or it cannot be opened; the one loaded before then stays.
    """
    if studio.base is None or studio.base.name != name:
        device = devices.best_device()
        studio.base = base_files.load(name, device=device, dtype=devices.base_dtype(device))
        studio.stamps.clear()
        studio.plain.clear()
    return studio.base


def open_base(studio: Studio, name: str) -> int:
    """Loads a base and says how wide its pictures are, in px.

    Raises:
        UserError: as `use_base`.
    """
    with studio.busy:
        return use_base(studio, name).resolution_px


def check_loras(studio: Studio, base: str, paths: list[Path]) -> list[str]:
    """Puts the files into the base, silent, so that one that does not fit is known before anything is drawn.

    Returns:
        For each file how many of its modules matched, and which did not.

    Raises:
        UserError: if a file cannot be read or does not fit the base.
    """
    with studio.busy:
        loaded = use_base(studio, base)
        _forget_changed(studio, loaded, paths)
        generate.set_loras(loaded, [LoRA(path, 0.0) for path in paths])
        return [base_model.fit(loaded, lora_file.read(path).modules).sentence for path in paths]


def _forget_changed(studio: Studio, base: Base, paths: list[Path]) -> None:
    """Takes all LoRAs out of the base if one of these files was written anew since it was read."""
    try:
        stamps = {path: path.stat().st_mtime_ns for path in paths}
    except OSError as problem:
        raise UserError(f"LoRA file {problem.filename} cannot be read ({problem.strerror}); press 'Look again'.") from problem
    if any(studio.stamps.get(path, stamp) != stamp for path, stamp in stamps.items()):
        for part in base.parts.values():
            lora.remove(part)
        studio.stamps.clear()
    studio.stamps.update(stamps)


def run(studio: Studio, session: str, order: Order) -> Iterator[Drawn]:
    """Draws an order in a thread of its own; yields the newest state whenever there is a newer one, and the last one at the end.

    Raises:
        UserError: as `draw`.
    """
    stop, ended = threading.Event(), threading.Event()
    states: list[Drawn] = [Drawn()]
    problems: list[BaseException] = []

    def work() -> None:
        try:
            for state in draw(studio, order, stop):
                states[0] = state
        except BaseException as problem:
            problems.append(problem)
        finally:
            ended.set()

    studio.stops[session] = stop
    shown = None
    try:
        threading.Thread(target=work, name="drawing", daemon=True).start()
        while not ended.wait(POLL_S):
            if states[0] is not shown:
                shown = states[0]
                yield shown
        if problems:
            raise problems[0]
        yield states[0]
    finally:
        stop.set()  # the tab may have been closed
        if studio.stops.get(session) is stop:
            del studio.stops[session]


def stop(studio: Studio, session: str) -> None:
    """Tells the session's job to end after the step that it is in."""
    if session in studio.stops:
        studio.stops[session].set()


def draw(studio: Studio, order: Order, stop: threading.Event) -> Iterator[Drawn]:
    """Draws an order: all pictures with LoRA, then the same seeds without. Each picture is saved as soon as it is done.

    Raises:
        UserError: if the base, a LoRA, or what is asked for is not as it must be.
    """
    check_order(order)
    with studio.busy:
        base = use_base(studio, order.base)
        _forget_changed(studio, base, [one.path for one in order.loras])
        seeds = range(order.request.seed, order.request.seed + order.count)
        steps = _steps_of(base, order) * order.count * (2 if order.beside else 1)
        drawn = Drawn(steps=steps, width_px=order.request.width_px or base.resolution_px)
        started_s, stamp = time.monotonic(), datetime.now()
        for row in ("with_lora", "without") if order.beside else ("with_lora",):
            loras = list(order.loras) if row == "with_lora" else []
            generate.set_loras(base, loras)
            for request in (replace(order.request, seed=seed) for seed in seeds):
                for result in _one_picture(studio, base, request, loras, stamp):
                    drawn = replace(drawn, elapsed_s=time.monotonic() - started_s)
                    if isinstance(result, Path):
                        drawn = _with_picture(drawn, row, result, request.seed)
                    else:
                        drawn = replace(drawn, done=drawn.done + result)
                    yield drawn
                    if stop.is_set():
                        yield replace(drawn, ended="stopped")
                        return
        yield replace(drawn, ended="done")


def _with_picture(drawn: Drawn, row: str, path: Path, seed: int) -> Drawn:
    if row == "with_lora":
        return replace(drawn, with_lora=(*drawn.with_lora, (path, seed)))
    return replace(drawn, without=(*drawn.without, (path, seed)))


def _one_picture(studio: Studio, base: Base, request: Request, loras: list[LoRA], stamp: datetime) -> Iterator[int | Path]:
    """Yields 1 for each step, then the saved file; a plain picture that was drawn before is not drawn again."""
    known = None if loras else studio.plain.get(request)
    if known and known.is_file():
        yield _steps_of(base, Order("", request, 1))
        yield known
        return
    for result in generate.picture(base, request):
        if isinstance(result, Image.Image):
            path = studio.outputs.resolve() / f"{stamp:%Y-%m-%d}" / f"{stamp:%H%M%S-%f}-seed{request.seed}{'' if loras else '-base'}.png"
            files.write(path, generate.png_bytes(result, generate.settings_text(base, request, loras)))
            if not loras:
                studio.plain[request] = path
            yield path
        else:
            yield 1


def _steps_of(base: Base, order: Order) -> int:
    """How often the sampler asks the UNet for one picture: some ask twice in a step."""
    scheduler = generate.scheduler(base, order.request.sampler)
    scheduler.set_timesteps(order.request.steps)
    return len(scheduler.timesteps)


def check_order(order: Order) -> None:
    """What no base could draw, said before anything is loaded.

    Raises:
        UserError: with what is wrong and what is allowed.
    """
    request = order.request
    paths = [one.path for one in order.loras]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise UserError(f"LoRA '{twice.stem}' is chosen twice; choose it once and give it the strength that you want.")
    if not 0 <= request.seed <= 2**32 - order.count:
        raise UserError(f"Seed {request.seed} is out of range; it must be from 0 to {2**32 - order.count}.")
    if max(request.width_px or 0, request.height_px or 0) > LARGEST_SIDE_PX:
        raise UserError(f"Size {request.width_px}x{request.height_px} is too large; a side may have at most {LARGEST_SIDE_PX} px.")
