"""What the presses on the page of sheets do: controls become a sheet, the sheet is drawn cell by cell, and a cell becomes a setting.

Every mistake that a person can mend ends here as one sentence. What is drawn belongs to one browser session: its plan lies in the
session's own state, its finished file under a name that nobody can guess.
"""

from __future__ import annotations

import math
import re
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import gradio as gr
from PIL import Image

from sdlora import files, generate, images, sheets
from sdlora.errors import UserError
from sdlora.generate import Request
from sdlora.sheets import Sheet
from sdlora.ui import lora_shelf, side_work, words
from sdlora.ui import roots as places
from sdlora.ui import studio as studios
from sdlora.ui.compare_cells import Order, Shown, voice_of
from sdlora.ui.generate_actions import message
from sdlora.ui.roots import Roots
from sdlora.ui.side_work import Desk
from sdlora.ui.studio import Studio

LIVE_PX = 256  # a cell's larger side while the sheet fills in; the finished file has the pictures as they were drawn
LIVE_S = 0.5
MOST_VALUES = 32
LONGEST_PROMPT = 4000
Done = dict[tuple[int, int], Image.Image]


@dataclass(frozen=True)
class Drawing:
    """How far a sheet is; `ended` is "" while it runs."""

    done: Done = field(default_factory=dict)
    pictures: int = 0
    size_px: tuple[int, int] | None = None
    elapsed_s: float = 0.0
    ended: str = ""


def order_of(
    studio: Studio, base: str, keys: list[str] | None, strengths: str, prompts: str, rows: str, negative: str, seed: float, steps: float,
    guidance: float, sampler: str, side: float,
) -> Order:  # fmt: skip
    """What the controls ask for.

    Raises:
        UserError: if a field says nothing that can be drawn.
    """
    lines = [line.strip() for line in (prompts or "").splitlines() if line.strip()]
    if len(lines) > MOST_VALUES or any(len(line) > LONGEST_PROMPT for line in [*lines, negative or ""]):
        raise UserError(
            f"There may be up to {MOST_VALUES} prompts of up to {LONGEST_PROMPT:,} characters each; write fewer or shorter ones."
        )
    if sampler not in generate.SAMPLERS:
        raise UserError(f"Sampler {places.shown(str(sampler))} is unknown; there are {', '.join(generate.SAMPLERS)}.")
    px = number(side or 0, "The side", 0, studios.LARGEST_SIDE_PX, whole=True)
    start, count = number(seed, "The seed", 0, 2**32 - 1, whole=True), number(steps, "The number of steps", 1, 150, whole=True)
    side_px = int(px) or None
    request = Request("", negative or "", int(start), int(count), number(guidance, "Guidance", 1, 30), sampler, side_px, side_px)
    offered = lora_shelf.paths(studio.roots)
    chosen_paths = [places.find(key, offered, what="LoRA") for key in keys or []]
    sheet = sheets.plan(request, list(dict.fromkeys(lines)), [voice_of(path) for path in chosen_paths], strengths_of(strengths), rows=rows)
    return Order(studios.base_of(studio, base), base, sheet, dict(zip(chosen_paths, keys or [], strict=True)))


def number(value: Any, what: str, low: float, high: float, *, whole: bool = False) -> float:
    """A number of a control, which a direct post can set to anything.

    Raises:
        UserError: if it is none, or out of range.
    """
    kind = "a whole number" if whole else "a number"
    right = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high and not (whole and value != int(value))
    if not right:
        raise UserError(f"{what} is {places.shown(str(value))}; give {kind} from {low:g} to {int(high) if whole else high}.")
    return float(value)


def strengths_of(text: str) -> list[float]:
    """The strengths of a text such as "0.5, 1".

    Raises:
        UserError: if it holds something else, or too many.
    """
    found = [word for word in re.split(r"[\s,;]+", text or "") if word]
    try:
        values = [float(word) for word in found]
    except ValueError:
        values = [math.nan]
    if len(values) > MOST_VALUES or not all(-2 <= value <= 2 for value in values):
        raise UserError(
            f"Strengths {places.shown(text)} are not understood; give up to {MOST_VALUES} numbers from -2 to 2, such as 0.5, 1."
        )
    return values


def draw(studio: Studio, order: Order, stop: threading.Event) -> Iterator[Drawing]:
    """Draws an order cell by cell, once the workplace is free.

    Raises:
        UserError: if the base cannot be opened, or a LoRA does not fit it.
    """
    state, started_s = Drawing(), time.monotonic()
    yield state
    with side_work.holding(studio, stop) as held:
        if not held:
            yield replace(state, ended="stopped")
            return
        base = studios.use_base(studio, order.base)
        request = order.sheet.cells[0][0].request
        state = replace(state, size_px=(request.width_px or base.resolution_px, request.height_px or base.resolution_px))
        yield state
        done: Done = {}
        for item in sheets.draw(base, order.sheet, stopped=stop.is_set):
            if item:
                row, column, picture = item
                done = done | {(row, column): picture}
                pictures = len({order.sheet.cells[r][c] for r, c in done})
                state = replace(state, done=done, pictures=pictures, elapsed_s=time.monotonic() - started_s)
                yield state
    yield replace(state, ended="done" if state.pictures == order.sheet.pictures else "stopped", elapsed_s=time.monotonic() - started_s)


def draw_sheet(roots: Roots, studio: Studio, desk: Desk, session: str, language: str, *values: Any) -> Iterator[dict[str, Any]]:
    """Draw was pressed: yields what changes on the page, by the control's name; a mistake as its one sentence."""
    free = {"go": gr.update(interactive=True), "stop": gr.update(interactive=False)}
    try:
        order = order_of(studio, *values)
        yield {"go": gr.update(interactive=False), "stop": gr.update(interactive=True), "status": status(Drawing(), order, language)}
        drawn, shown_s = -1, 0.0
        for state in side_work.run(desk, session, lambda stop: draw(studio, order, stop)):
            last = state
            if state.ended:  # that it is done is said when its pictures can be clicked
                continue
            changes: dict[str, Any] = {"status": status(state, order, language)}
            if state.size_px and state.pictures != drawn and time.monotonic() - shown_s > LIVE_S:
                drawn, shown_s = state.pictures, time.monotonic()
                changes |= {"sheet": gr.update(value=live(order.sheet, state), visible=True), "welcome": gr.update(visible=False)}
            yield changes
        yield free | _finished(roots, order, last) | {"status": status(last, order, language)}
    except UserError as problem:
        yield free | {"status": message(str(problem), kind="bad")}
    except Exception:
        yield free | {"status": message(words.say("compare.bug", language), kind="bad")}
        raise


def status(state: Drawing, order: Order, language: str) -> str:
    """The line that says how far a sheet is."""
    total = order.sheet.pictures
    if state.ended == "stopped":
        return message(words.say("compare.stopped", language, done=state.pictures, pictures=total))
    if state.ended:
        return message(words.say("compare.done", language, pictures=total, seconds=f"{state.elapsed_s:.1f}"), kind="good")
    if state.size_px is None:
        return message(words.say("compare.waiting", language, pictures=total), kind="busy", share=0)
    left_s = state.elapsed_s / state.pictures * (total - state.pictures) if state.pictures else None
    left = "" if left_s is None else words.say("compare.left", language, seconds=f"{left_s:.0f}")
    text = words.say("compare.drawing", language, done=state.pictures, pictures=total, left=left)
    return message(text, kind="busy", share=state.pictures / total)


def live(sheet: Sheet, state: Drawing) -> Image.Image:
    """The sheet so far with pictures of at most `LIVE_PX`."""
    assert state.size_px is not None
    factor = min(1.0, LIVE_PX / max(state.size_px))
    size = (max(1, round(state.size_px[0] * factor)), max(1, round(state.size_px[1] * factor)))
    return sheets.picture(sheet, {at: one.resize(size) if factor < 1 else one for at, one in state.done.items()}, size_px=size)


def _finished(roots: Roots, order: Order, state: Drawing) -> dict[str, Any]:
    """The finished sheet as a file, the cells that can be chosen, and what the session remembers."""
    if not state.done or state.size_px is None:
        return {}
    now = datetime.now()
    path = roots.outputs.resolve() / f"{now:%Y-%m-%d}" / f"sheet-{now:%H%M%S}-{secrets.token_hex(8)}.png"
    files.write(path, images.png_bytes(sheets.picture(order.sheet, state.done, size_px=state.size_px)))
    choices = [(_label(order.sheet, row, column), f"{row}-{column}") for row, column in sorted(state.done)]
    return {
        "sheet": gr.update(value=str(path), visible=True), "shown": Shown(order, state.size_px), "welcome": gr.update(visible=False),
        "cell": gr.update(choices=choices, value=None), "file": gr.update(value=str(path), interactive=True),
        "use": gr.update(interactive=True), "best": gr.update(interactive=True),
    }  # fmt: skip


def _label(sheet: Sheet, row: int, column: int) -> str:
    parts = (sheet.rows[row], sheet.groups[column], sheet.columns[column])
    return " · ".join(part if len(part) <= 60 else part[:59] + "…" for part in parts if part)
