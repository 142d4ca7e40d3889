"""Drawings one after the other: the line in which they wait, and the work of the one at its front.

A drawing works in a thread of its own and the page's handler only looks at how far it is, so a closed browser tab leaves no half-held
lock behind, and a second drawing never starts beside the first. Drawings are served in the order in which they were asked for. Each has an
event that is looked at after every step and while it waits, which is what Stop sets, for the session that began it and no other.

While a training run is at work on the same GPU a drawing waits for it; on the CPU both go on side by side, slower.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from PIL import Image

from sdlora import devices, files, generate
from sdlora import request as requests
from sdlora.base_model import Base
from sdlora.errors import UserError
from sdlora.generate import LoRA, Moment, Request
from sdlora.ui import studio as studios
from sdlora.ui.roots import Roots
from sdlora.ui.studio import LARGEST_SIDE_PX, Drawn, Job, Order, Studio

POLL_S = 0.1
PREVIEW_S = 0.4  # between two previews; a picture that is done sooner needs none
TRAINING_S = 2.0  # between two looks whether a run is at work
_REMEMBERED = 500


def begin(studio: Studio, session: str, order: Order) -> Job:
    """Puts an order into the line and begins to work on it in a thread of its own.

    Raises:
        UserError: if it asks for what no base could draw.
    """
    check_order(order)
    job = Job(session, order, Drawn(place=len(studio.line)))
    studio.line.append(job)
    threading.Thread(target=_work, args=(studio, job), name="drawing", daemon=True).start()
    return job


def _work(studio: Studio, job: Job) -> None:
    try:
        for state in _in_turn(studio, job):
            job.state = state
    except BaseException as problem:
        job.problem = problem
    finally:
        studio.line.remove(job)
        job.ended.set()


def follow(job: Job) -> Iterator[Drawn]:
    """The newest state of a job whenever there is a newer one, and at the end the last; closing it stops the job.

    Raises:
        UserError: as `draw`.
    """
    shown = None
    try:
        while not job.ended.wait(POLL_S):
            if job.state is not shown:
                shown = job.state
                yield shown
        if job.problem:
            raise job.problem
        yield job.state
    finally:
        job.stop.set()


def stop(studio: Studio, session: str) -> int:
    """Tells a session's drawings to end after the step that they are in, and says how many there are."""
    own = [job for job in list(studio.line) if job.session == session]
    for job in own:
        job.stop.set()
    return len(own)


def _in_turn(studio: Studio, job: Job) -> Iterator[Drawn]:
    """Waits for those before, for a training run on the same GPU and for the base; then draws."""
    shares_gpu, looked_s, run = devices.best_device().type == "cuda", -TRAINING_S, ""
    while not job.stop.is_set():
        place = studio.line.index(job)
        if place == 0 and time.monotonic() - looked_s >= TRAINING_S:
            looked_s, run = time.monotonic(), studios.training(studio.roots)
        yield Drawn(place=place, training=run if shares_gpu else "")
        if place or (run and shares_gpu):
            job.stop.wait(POLL_S)
        elif studio.busy.acquire(timeout=POLL_S):
            try:
                for state in draw(studio, job.order, job.stop.is_set):
                    yield replace(state, training=run)
            finally:
                studio.busy.release()
            return
    yield Drawn(ended="stopped")


def draw(studio: Studio, order: Order, stopped: Callable[[], bool]) -> Iterator[Drawn]:
    """Draws an order: all pictures with LoRA, then the same seeds without. Each is saved as soon as it is done.

    To be called by the holder of `busy`.

    Args:
        stopped: asked after each step.

    Raises:
        UserError: if the base, a LoRA, or what is asked for is not as it must be.
    """
    yield Drawn()
    base = studios.use_base(studio, order.base)
    _check_side(requests.final_size_px(base, order.request, order.source))
    each = generate.step_count(base, order.request, order.source)
    seeds = range(order.request.seed, order.request.seed + order.count)
    drawn = Drawn(steps=each * order.count * (2 if order.beside else 1))
    began_s, looked_s = time.monotonic(), time.monotonic()
    for row in ("with_lora", "without") if order.beside else ("with_lora",):
        loras = order.loras if row == "with_lora" else ()
        generate.set_loras(base, loras)
        for request in (replace(order.request, seed=seed) for seed in seeds):
            for result in _one_picture(studio, base, order, request, loras):
                drawn = replace(drawn, elapsed_s=time.monotonic() - began_s)
                if isinstance(result, tuple):
                    path, width = result
                    drawn = _with_picture(replace(drawn, preview=None, width_px=width), row, path, request.seed)
                    drawn = replace(drawn, done=each * (len(drawn.with_lora) + len(drawn.without)))
                else:
                    drawn = replace(drawn, done=drawn.done + 1)
                    if time.monotonic() - looked_s >= PREVIEW_S:
                        looked_s = time.monotonic()
                        drawn = replace(drawn, preview=generate.preview(base, result))
                yield drawn
                if stopped():
                    yield replace(drawn, ended="stopped", preview=None)
                    return
    yield replace(drawn, ended="done", preview=None)


def _with_picture(drawn: Drawn, row: str, path: Path, seed: int) -> Drawn:
    if row == "with_lora":
        return replace(drawn, with_lora=(*drawn.with_lora, (path, seed)))
    return replace(drawn, without=(*drawn.without, (path, seed)))


def _one_picture(
    studio: Studio, base: Base, order: Order, request: Request, loras: tuple[LoRA, ...]
) -> Iterator[Moment | tuple[Path, int]]:
    """Yields each moment, then the saved file and its width; a plain picture that was drawn before is not drawn again."""
    plain = not loras and order.source is None
    known = studio.plain.get((order.owner, request)) if plain else None
    if known and known.is_file():
        with Image.open(known) as image:
            yield known, image.width
        return
    for result in generate.drawing(base, request, loras=loras, source=order.source):
        if isinstance(result, Image.Image):
            text = generate.settings_text(base, request, loras, order.source)
            path = _free_place(studio.roots, order, request.seed, bool(loras))
            files.write(path, generate.png_bytes(result, text))
            if plain:
                if len(studio.plain) >= _REMEMBERED:
                    studio.plain.clear()
                studio.plain[order.owner, request] = path
            yield path, result.width
        else:
            yield result


def _free_place(roots: Roots, order: Order, seed: int, with_lora: bool) -> Path:
    """A name that sorts by time, tells the seed, and cannot be guessed by who only knows the folder."""
    now = datetime.now()
    name = f"{now:%H%M%S-%f}-seed{seed}{'' if with_lora else '-base'}-{secrets.token_hex(4)}.png"
    return roots.outputs.resolve() / "drawn" / order.owner / f"{now:%Y-%m-%d}" / name


def check_order(order: Order) -> None:
    """What no base could draw, said before anything is loaded.

    Raises:
        UserError: with what is wrong and what is allowed.
    """
    request = order.request
    paths = [one.path for one in order.loras]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise UserError(f"LoRA '{twice.stem}' is chosen twice, on cards or as <lora:…> in the prompt; keep one, at the strength you want.")
    if not 0 <= request.seed <= 2**32 - order.count:
        raise UserError(f"Seed {request.seed} is out of range; it must be from 0 to {2**32 - order.count}.")
    _check_side((request.width_px or 0, request.height_px or 0))
    generate.known_sampler(request.sampler)


def _check_side(size: tuple[int, int]) -> None:
    if max(size) > LARGEST_SIDE_PX:
        raise UserError(f"Size {size[0]}x{size[1]} is too large; a side may have at most {LARGEST_SIDE_PX} px.")
