"""What the presses on the page of pictures do: values of the controls become an order, and its state becomes what is shown.

Every mistake that a person can mend ends here as one sentence on the page. All text that comes from a file or a person is escaped
before it becomes HTML.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.errors import UserError
from sdlora.generate import LoRA, Request
from sdlora.ui import studio as studios
from sdlora.ui.studio import Drawn, Order, Studio

SMALL_PX = 128  # pictures up to this width are enlarged with hard edges
OWN_SIZE = "the base's own"


def message(text: str, *, kind: str = "calm", share: float | None = None) -> str:
    """One line of the page as HTML, escaped.

    Args:
        kind: "calm", "busy", "good" or "bad"; gives the colour.
        share: draws a bar, from 0 to 1.
    """
    bar = "" if share is None else f'<div class="bar"><div style="width:{100 * share:.1f}%"></div></div>'
    return f'<div class="message {kind}" role="status">{html.escape(text)}{bar}</div>'


def choices_of(studio: Studio) -> list[tuple[str, str]]:
    """What a LoRA list offers: what is shown and its id."""
    return [("none", ""), *((shown, key) for key, shown in studios.lora_names(studio).items())]


def size_of(text: str | None) -> tuple[int | None, int | None]:
    """Width and height in px of a size such as "512x768"; (None, None) for the base's own.

    Raises:
        UserError: if the text is no size.
    """
    if not text or text == OWN_SIZE:
        return None, None
    found = re.fullmatch(r"\s*(\d{1,5})\s*[xX×]\s*(\d{1,5})\s*", text)  # noqa: RUF001
    if not found:
        raise UserError(f"Size '{text}' is not understood; write width x height in pixels, such as 512x768.")
    return int(found[1]), int(found[2])


def order_of(
    studio: Studio, prompt: str, negative: str, seed: float | None, count: int, steps: int, guidance: float, sampler: str, size: str,
    base: str, beside: bool, *slots: Any,
) -> Order:  # fmt: skip
    """What the controls ask for; `slots` are the ids of the LoRAs and then their strengths.

    Raises:
        UserError: if a field is empty or says nothing that can be drawn.
    """
    if seed is None:
        raise UserError("The seed is empty; give a whole number from 0 up, or press 'New seed'.")
    if not (base or "").strip():
        raise UserError('The base model is empty; give "mini", a diffusers folder, a .safetensors checkpoint, or a hub name.')
    width, height = size_of(size)
    request = Request(prompt or "", negative or "", int(seed), int(steps), float(guidance), sampler, width, height)
    ids, strengths = slots[: len(slots) // 2], slots[len(slots) // 2 :]
    loras = tuple(LoRA(studios.lora_path(studio, key), float(strength)) for key, strength in zip(ids, strengths, strict=True) if key)
    return Order(base.strip(), request, int(count), loras, bool(beside) and bool(loras))


def progress_of(drawn: Drawn, order: Order) -> str:
    """The status line of a job."""
    total = order.count * (2 if order.beside else 1)
    finished = len(drawn.with_lora) + len(drawn.without)
    if drawn.ended == "stopped":
        return message(f"Stopped. {finished} of {total} pictures were finished." if total > 1 else "Stopped.")
    if drawn.ended:
        folder = _near(drawn.with_lora[0][0].parent)
        return message(f"Done in {drawn.elapsed_s:.1f} s. Saved in {folder}", kind="good")
    if not drawn.steps:
        return message("Getting ready…", kind="busy", share=0)
    left = "" if drawn.left_s is None else f" · {_duration(drawn.left_s)} left"
    return message(f"Drawing picture {min(finished + 1, total)} of {total}{left}", kind="busy", share=drawn.done / drawn.steps)


def _near(path: Path) -> str:
    """The path from where the program runs, if it is below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def shown(drawn: Drawn, order: Order) -> dict[str, Any]:
    """What changes on the page for a job's state, by the control's name."""
    names = ", ".join(f"{one.path.stem} × {one.strength:g}" for one in order.loras)  # noqa: RUF001
    columns = 1 if order.count == 1 or (order.beside and order.count <= 3) else 2
    sharp = "pictures small" if drawn.width_px <= SMALL_PX else "pictures"
    rows = {"with_lora": (f"With {names}" if names else "Without LoRA", bool(drawn.with_lora)), "without": ("Without LoRA", order.beside)}
    galleries = {
        row: gr.update(
            value=[(str(path), f"seed {seed}") for path, seed in getattr(drawn, row)], label=label, columns=columns, elem_classes=sharp,
            visible=visible and bool(drawn.with_lora),
        )
        for row, (label, visible) in rows.items()
    }  # fmt: skip
    running = not drawn.ended
    return galleries | {
        "status": progress_of(drawn, order),
        "go": gr.update(interactive=not running),
        "stop": gr.update(interactive=running),
        "welcome": gr.update(visible=not drawn.with_lora),
    }


def generate_pictures(studio: Studio, session: str, *values: Any) -> Iterator[dict[str, Any]]:
    """Generate was pressed: yields what changes on the page, a mistake as its one sentence."""
    yield {
        "status": message("Getting ready…", kind="busy", share=0),
        "go": gr.update(interactive=False),
        "stop": gr.update(interactive=True),
    }
    rest = {"go": gr.update(interactive=True), "stop": gr.update(interactive=False)}
    try:
        order, pictures = order_of(studio, *values), -1
        for drawn in studios.run(studio, session, order):
            finished = len(drawn.with_lora) + len(drawn.without)
            if finished != pictures or drawn.ended:
                yield shown(drawn, order)
            else:
                yield {"status": progress_of(drawn, order)}  # the pictures are sent only when there is a new one
            pictures = finished
    except UserError as problem:
        yield rest | {"status": message(str(problem), kind="bad")}
    except Exception:
        yield rest | {"status": message("This is a mistake in the program; the terminal shows where.", kind="bad")}
        raise


def choose_base(studio: Studio, name: str) -> tuple[Any, str]:
    """A base was named: loads it, and offers the sizes that suit it."""
    try:
        side = studios.open_base(studio, (name or "").strip())
    except UserError as problem:
        return gr.update(), message(str(problem), kind="bad")
    sizes = [OWN_SIZE, f"{side}x{side}", f"{side}x{side * 3 // 2}", f"{side * 3 // 2}x{side}"]
    return gr.update(choices=sizes, value=OWN_SIZE), message(f"Ready. Base '{name}' draws {side} × {side} pixels.")  # noqa: RUF001


def choose_loras(*slots: Any) -> list[Any]:
    """A LoRA was chosen: shows its strength, and the next slot below the last one in use."""
    in_use = [i for i, key in enumerate(slots) if key]
    last = max(in_use, default=-1)
    return [
        *(gr.update(visible=i <= last + 1) for i in range(len(slots))),
        *(gr.update(visible=i in in_use) for i in range(len(slots))),
        gr.update(visible=bool(in_use)),
    ]


def check_loras(studio: Studio, base: str, *slots: Any) -> str:
    """Says whether the chosen LoRAs fit the base, and if not, why."""
    try:
        paths = [studios.lora_path(studio, key) for key in slots if key]
        fits = studios.check_loras(studio, base.strip(), paths)
    except UserError as problem:
        return message(str(problem), kind="bad")
    told = ". ".join(f"{path.stem}: {fit}" for path, fit in zip(paths, fits, strict=True))
    return message(f"{told}." if paths else "Ready. No LoRA is chosen.")


def look_again(studio: Studio, *slots: Any) -> list[Any]:
    """The folder's LoRA files as they are now; a chosen file stays chosen if it is still there."""
    choices = choices_of(studio)
    known = {key for _, key in choices}
    found = len(choices) - 1
    text = f"{found} LoRA file{'' if found == 1 else 's'} in {studio.loras}" if found else f"No LoRA files in {studio.loras} yet."
    return [*(gr.update(choices=choices, value=key if key in known else "") for key in slots), message(text)]
