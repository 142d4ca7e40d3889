"""What the presses on the page of pictures do: values of the controls become an order, and its state becomes what is shown.

Every mistake that a person can mend ends here as one sentence on the page. All text that comes from a file or a person is escaped
before it becomes HTML.
"""

from __future__ import annotations

import asyncio
import html
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora import prompts
from sdlora.errors import UserError
from sdlora.ui import gallery, generate_cards, lora_shelf, studio_line, words
from sdlora.ui import studio as studios
from sdlora.ui.generate_form import OWN_SIZE, Form, order_of
from sdlora.ui.studio import Drawn, Job, Order, Studio

SMALL_PX = 128  # pictures up to this width are enlarged with hard edges
POLL_S = 0.1
RESTORED = (
    "prompt", "negative", "loras", "seed", "random", "count", "steps", "guidance", "sampler", "schedule", "size", "clip_skip", "denoise",
    "hires_scale", "hires_denoise", "base",
)  # fmt: skip


def message(text: str, *, kind: str = "calm", share: float | None = None) -> str:
    """One line of the page as HTML, escaped.

    Args:
        kind: "calm", "busy", "good" or "bad"; gives the colour.
        share: draws a bar, from 0 to 1.
    """
    bar = "" if share is None else f'<div class="bar"><div style="width:{100 * share:.1f}%"></div></div>'
    return f'<div class="message {kind}" role="status">{html.escape(text)}{bar}</div>'


def progress_of(drawn: Drawn, order: Order, language: str = "en") -> str:
    """The status line of a drawing."""
    total = order.count * (2 if order.beside else 1)
    finished = len(drawn.with_lora) + len(drawn.without)
    if drawn.ended == "stopped":
        return message(words.say("generate.stopped", language, done=finished, pictures=total))
    if drawn.ended:
        return message(words.say("generate.done", language, pictures=finished, seconds=f"{drawn.elapsed_s:.1f}"), kind="good")
    if drawn.place is not None and drawn.training:
        return message(words.say("generate.training_waits", language, run=drawn.training), kind="busy", share=0)
    if drawn.place:
        return message(words.say("generate.in_line", language, place=drawn.place), kind="busy", share=0)
    if not drawn.steps:
        return message(words.say("generate.starting", language), kind="busy", share=0)
    left = "" if drawn.left_s is None else words.say("generate.left", language, time=_duration(drawn.left_s))
    beside = words.say("generate.training_beside", language, run=drawn.training) if drawn.training else ""
    text = words.say("generate.drawing", language, number=min(finished + 1, total), pictures=total) + left + beside
    return message(text, kind="busy", share=drawn.done / drawn.steps)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def voices_of(order: Order) -> str:
    """The LoRAs of an order and their strengths in words; "" without any."""
    said = [f"{one.path.stem} × {prompts.course_text(one.course) or f'{one.strength:g}'}" for one in order.loras]  # noqa: RUF001
    return ", ".join(said)


def shown(drawn: Drawn, order: Order, language: str = "en") -> dict[str, Any]:
    """What changes on the page when there are more pictures, by the control's name."""
    columns = 1 if order.count == 1 or (order.beside and order.count <= 3) else 2
    sharp = "pictures small" if drawn.width_px <= SMALL_PX else "pictures"
    alone, names = words.say("generate.without", language), voices_of(order)
    rows = {
        "with_lora": (words.say("generate.with", language, names=names) if names else alone, bool(drawn.with_lora)),
        "without": (alone, order.beside),
    }
    return {
        row: gr.update(
            value=[(str(path), f"seed {seed}") for path, seed in getattr(drawn, row)], label=label, columns=columns, elem_classes=sharp,
            visible=visible and bool(drawn.with_lora),
        )
        for row, (label, visible) in rows.items()
    } | {"welcome": gr.update(visible=not drawn.with_lora)}  # fmt: skip


def look_of(drawn: Drawn, language: str = "en") -> dict[str, Any]:
    """The newest look at the unfinished picture, inside the page's text."""
    if drawn.preview is None:
        return {"preview": gr.update(value="", visible=False)}
    small = "small" if drawn.preview.width <= SMALL_PX else ""
    said = html.escape(words.say("generate.preview", language))
    picture = f'<img class="preview {small}" alt="{said}" src="{lora_shelf.data_address(drawn.preview)}">'
    return {"preview": gr.update(value=picture, visible=True)}


async def generate_pictures(studio: Studio, session: str, language: str, form: Form) -> AsyncIterator[dict[str, Any]]:
    """Generate was pressed: yields what changes on the page, by the control's name; a mistake as its one sentence.

    Generate can be pressed again only when all of it has come to its end, as a browser passes over a press before that; see `wire`.
    """
    free = {"preview": gr.update(value="", visible=False)}
    try:
        if form.random is True:
            form = replace(form, seed=secrets.randbelow(2**31))
        order = await asyncio.to_thread(order_of, studio, form, session)
        job = studio_line.begin(studio, session, order)
        try:
            first = {"status": progress_of(job.state, order, language), "seed": gr.update(value=order.request.seed)}
            yield first | {"go": gr.update(interactive=False), "stop": gr.update(interactive=True)}
            async for changes in _following(job, language):
                yield changes
        finally:
            job.stop.set()  # the tab may have been closed
        yield free | shown(job.state, order, language) | {"status": progress_of(job.state, order, language)}
    except UserError as problem:
        yield free | {"status": message(str(problem), kind="bad")}
    except Exception:
        yield free | {"status": message(words.say("generate.bug", language), kind="bad")}
        raise


async def _following(job: Job, language: str) -> AsyncIterator[dict[str, Any]]:
    """What changes while a job is in line and at work: the line at each new state, pictures and previews only when there are new ones."""
    seen, pictures, preview = job.state, 0, job.state.preview
    while not job.ended.is_set():
        await asyncio.sleep(POLL_S)
        state = job.state
        if state is seen:
            continue
        changes: dict[str, Any] = {"status": progress_of(state, job.order, language)}
        finished = len(state.with_lora) + len(state.without)
        if finished != pictures:
            changes |= shown(state, job.order, language)
        if state.preview is not preview:
            changes |= look_of(state, language)
        seen, pictures, preview = state, finished, state.preview
        yield changes
    if job.problem:
        raise job.problem


def history(studio: Studio, token: Any, session: str, page: Any, language: str = "en") -> tuple[Any, list[str], int, str]:
    """A page of a browser's pictures: what the gallery shows, the files behind it, the page's number from 1, and of how many."""
    wanted = int(page) - 1 if isinstance(page, int | float) and 1 <= page < 1e6 else 0
    found, pages = gallery.pictures(studio.roots, gallery.owner_of(token, session), wanted)
    captions = [path.stem.partition("-seed")[2].rpartition("-")[0] for path in found]
    shown_files = [(str(path), caption.replace("-base", " · base")) for path, caption in zip(found, captions, strict=True)]
    return (
        gr.update(value=shown_files, selected_index=None), [str(path) for path in found], min(wanted, pages - 1) + 1,
        words.say("generate.pages", language, pages=pages),
    )  # fmt: skip


def choose_base(studio: Studio, word: str, language: str = "en") -> tuple[Any, str]:
    """A base was chosen: offers the sizes that suit it, and says what it draws."""
    try:
        found = studios.look_at_base(studio, studios.base_of(studio, str(word or "").strip()))
    except UserError as problem:
        return gr.update(), message(str(problem), kind="bad")
    if found is None:
        return gr.update(), message(words.say("generate.base_later", language))
    side = found[0]
    sizes = [f"{side}x{side}", f"{side}x{side * 3 // 2}", f"{side * 3 // 2}x{side}"]
    return gr.update(choices=sizes), message(words.say("generate.ready", language, side=side))


def restore(studio: Studio, path: Path | None, language: str = "en") -> dict[str, Any]:
    """A picture was dropped or chosen: what its settings make of the controls, by their names.

    Raises:
        UserError: if it says nothing.
    """
    if path is None:
        raise UserError("No picture is chosen; drop a PNG that a Stable Diffusion tool has written.")
    found = gallery.restored(path)
    request, missed = found.request, list(found.missed)
    rows, lost = generate_cards.rows_of(studio, found.tags)
    base = _base_named(studio, found.model)
    if found.model and base is None:
        missed.append(words.say("generate.other_base", language, model=found.model))
    if found.source:
        missed.append(words.say("generate.other_picture", language))
    size = f"{request.width_px}x{request.height_px}" if request.width_px else OWN_SIZE
    spoken = request.weighted
    values = {
        "prompt": request.prompt if spoken else prompts.escaped(request.prompt),
        "negative": request.negative if spoken else prompts.escaped(request.negative),
        "loras": {"chosen": rows}, "seed": request.seed, "random": False, "count": 1, "steps": request.steps,
        "guidance": request.guidance, "sampler": request.sampler, "schedule": request.schedule, "size": size,
        "clip_skip": request.clip_skip or 0, "denoise": request.denoise, "hires_scale": request.hires_scale,
        "hires_denoise": request.hires_denoise,
    }  # fmt: skip
    told = " ".join([words.say("generate.restored", language), *(f"{one.rstrip('.')}." for one in [*missed, *lost])])
    more = {} if base is None else {"base": gr.update(value=base)}
    return {name: gr.update(value=value) for name, value in values.items()} | more | {
        "status": message(told, kind="busy" if missed or lost else "good")
    }  # fmt: skip


def _base_named(studio: Studio, name: str) -> str | None:
    """The base that a picture names, as the list of bases has it."""
    offered = lora_shelf.bases_of(studio.roots)
    return next((word for shown_name, word in offered if name and shown_name.lower() == name.lower()), None)


def take(studio: Studio, setting: Any, language: str = "en") -> dict[str, Any]:
    """A setting that another page hands over, see `compare_cells.setting_of`: what it makes of the controls, by their names."""
    if not isinstance(setting, dict):
        return {}
    side = setting.get("width_px")
    rows = [{"lora": setting["lora"], "strength": setting["strength"], "text": None, "on": True, "course": ""}] if setting["lora"] else []
    names = ("seed", "steps", "guidance", "sampler", "base")
    values = {name: setting[name] for name in names} | {
        "prompt": prompts.escaped(setting["prompt"]), "negative": prompts.escaped(setting["negative"]),
        "loras": {"chosen": rows}, "size": f"{side}x{setting['height_px']}" if side else OWN_SIZE,
        "random": False,
    }  # fmt: skip
    return {name: gr.update(value=value) for name, value in values.items()} | {
        "status": message(words.say("generate.taken", language), kind="good")
    }
