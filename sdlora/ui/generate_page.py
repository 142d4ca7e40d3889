"""The page on which pictures are made: a prompt, LoRAs with their strengths, and beside them the same seeds without.

`layout` says what is seen, `wire` which press leads to which function. Ctrl+Enter presses Generate and Escape presses Stop. Waiting is done
in our own line (`studio_line`), so Generate has no limit of its own in gradio's queue, and its place in line can be shown and left.

From a program, for example (Gradio's client takes the defaults for what is not named):

    client = gradio_client.Client("http://127.0.0.1:7860")
    client.predict(prompt="a red star", loras=[{"lora": "my style", "strength": 0.8}], seed=3, api_name="/generate")
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api

from sdlora import generate
from sdlora.errors import UserError
from sdlora.ui import gallery, generate_cards, lora_shelf, studio_line, words
from sdlora.ui import generate_actions as actions
from sdlora.ui.generate_form import Form
from sdlora.ui.generate_parts import Parts, layout
from sdlora.ui.roots import Roots
from sdlora.ui.studio import Studio

__all__ = ["CSS", "KEYS", "Parts", "layout", "receive", "wire"]

QUIET: dict[str, Any] = {"show_progress": "hidden"}
PRIVATE: dict[str, Any] = QUIET | {"api_visibility": "private"}
# Ctrl+Enter and Escape press the page's own buttons, if they can be seen and pressed; returns the browser's token, made at the first visit.
KEYS = """() => {
  if (!window.sdloraKeys) {
    window.sdloraKeys = true;
    const press = (name, event) => {
      const button = document.querySelector(name);
      if (button && !button.disabled && button.offsetParent) { event.preventDefault(); button.click(); }
    };
    document.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        if (document.activeElement) document.activeElement.dispatchEvent(new Event("change", { bubbles: true }));
        setTimeout(() => press("#generate", event), 50);
      }
      if (event.key === "Escape") press("#stop", event);
    });
  }
  let token = "";
  try {
    token = localStorage.getItem("sdlora-token") || "";
    if (token.length < 32) {
      token = Array.from(crypto.getRandomValues(new Uint8Array(24)), (byte) => byte.toString(16).padStart(2, "0")).join("");
      localStorage.setItem("sdlora-token", token);
    }
  } catch { /* a browser that keeps nothing: the pictures are the session's */ }
  return token;
}"""
# On a phone the results stand below the settings.
TO_RESULTS = """() => { if (innerWidth < 700) document.querySelector("#status").scrollIntoView({ behavior: "smooth" }); }"""
CSS = """
#stop:disabled { background: var(--border-color-primary); color: var(--body-text-color-subdued); opacity: 1; }
#seed-row { gap: 1px; } #seed-row button { min-width: 44px; }
#loras, #loras > * { padding: 0 !important; }
#buttons { position: sticky; bottom: 0; z-index: 5; padding: 8px 0; background: var(--body-background-fill); }
#status, #preview, #welcome, :is(#status, #preview, #welcome) > * { padding: 0 !important; }
img.preview { width: 100%; max-height: 512px; object-fit: contain; border-radius: 8px; }
img.preview.small { image-rendering: pixelated; }
#history .grid-wrap { max-height: 520px; min-height: 0; height: auto; }
#history-pages { align-self: center; flex: none; min-width: 60px; }
#history-row { align-items: center; }
#history-text textarea { font-family: var(--font-mono); font-size: 0.8rem; }
#generate-restore { min-height: 90px; }
@media (max-width: 640px) { #seed-row, #buttons { flex-wrap: wrap; } }
"""


def wire(roots: Roots, studio: Studio, parts: Parts, demo: gr.Blocks) -> None:
    """Says what each press does."""
    _wire_drawing(studio, parts, demo)
    _wire_history(roots, studio, parts, demo)
    _wire_lists(roots, studio, parts, demo)


def _wire_drawing(studio: Studio, parts: Parts, demo: gr.Blocks) -> None:
    inputs = [getattr(parts, one.name) for one in fields(Form)]
    changing = {name: getattr(parts, name) for name in ("status", "preview", "go", "stop", "welcome", "with_lora", "without", "seed")}

    async def on_generate(
        request: gr.Request, prompt: Any, negative: Any = "", loras: Any = None, beside: Any = True, seed: Any = 0, random: Any = False,
        count: Any = 1, steps: Any = 20, guidance: Any = 4.0, sampler: Any = "DPM++ 2M", schedule: Any = "Automatic", size: Any = "",
        clip_skip: Any = 0, base: Any = "mini", picture: Any = None, denoise: Any = 0.75, hires_scale: Any = 1.0, hires_denoise: Any = 0.5,
        token: Any = "",
    ) -> AsyncIterator[dict[Any, Any]]:  # fmt: skip
        """Draws pictures in the order in which they are asked for; yields how far it is, and at the end the files."""
        language = words.language_of(request.headers)
        form = Form(
            prompt, negative, loras, beside, seed, random, count, steps, guidance, sampler, schedule, size, clip_skip, base, picture,
            denoise, hires_scale, hires_denoise, token,
        )  # fmt: skip
        async for changes in actions.generate_pictures(studio, str(request.session_hash), language, form):
            yield {changing[name]: change for name, change in changes.items()}

    def on_stop(request: gr.Request) -> str:
        """Stops this session's drawings after the step that they are in, also those that wait."""
        found = studio_line.stop(studio, str(request.session_hash))
        return actions.message(words.say("generate.stopping" if found else "generate.nothing_runs", words.language_of(request.headers)))

    def on_leave(request: gr.Request) -> None:
        studio_line.stop(studio, str(request.session_hash))

    drawn = parts.go.click(on_generate, inputs, list(changing.values()), api_name="generate", concurrency_limit=None, **QUIET)
    drawn.then(
        lambda: (gr.update(interactive=True), gr.update(interactive=False)), outputs=[parts.go, parts.stop], queue=False, **PRIVATE
    ).then(_newest(studio), [parts.token], _history(parts), **PRIVATE)  # fmt: skip
    parts.go.click(None, js=TO_RESULTS, api_visibility="private")
    parts.stop.click(on_stop, outputs=parts.status, queue=False, api_name="generate_stop", **QUIET)
    demo.unload(on_leave)
    parts.dice.click(lambda: random.randrange(2**31), outputs=parts.seed, queue=False, api_name="generate_new_seed", **QUIET)
    parts.less.click(lambda seed: max(0, int(seed or 0) - 1), parts.seed, parts.seed, queue=False, **PRIVATE)
    parts.more.click(lambda seed: min(2**32 - 1, int(seed or 0) + 1), parts.seed, parts.seed, queue=False, **PRIVATE)


def _history(parts: Parts) -> list[Any]:
    return [parts.history, parts.history_files, parts.page, parts.pages]


def _newest(studio: Studio) -> Any:
    def on_newest(token: str, request: gr.Request) -> tuple[Any, ...]:
        return actions.history(studio, token, str(request.session_hash), 1, words.language_of(request.headers))

    return on_newest


def _wire_history(roots: Roots, studio: Studio, parts: Parts, demo: gr.Blocks) -> None:
    changing = {name: getattr(parts, name) for name in (*actions.RESTORED, "status")}

    def on_pick(files: list[str] | None, event: gr.SelectData) -> tuple[str, str]:
        path = files[event.index] if files and isinstance(event.index, int) and 0 <= event.index < len(files) else ""
        return path, gallery.text_of(Path(path)) if path and gallery.is_ours(roots, Path(path)) else ""

    def on_restore(path: str | None, request: gr.Request) -> dict[Any, Any]:
        """Gives the settings that stand in a PNG back to the controls, also those of A1111 and Forge."""
        language = words.language_of(request.headers)
        try:
            changes = actions.restore(studio, Path(path) if path else None, language)
        except UserError as problem:
            changes = {"status": actions.message(str(problem), kind="bad")}
        return {changing[name]: change for name, change in changes.items()}

    def on_use(path: str, request: gr.Request) -> dict[Any, Any]:
        return on_restore(path if path and gallery.is_ours(roots, Path(path)) else None, request)

    page = [parts.token, parts.page]

    def on_page(token: str, page: float, request: gr.Request) -> tuple[Any, ...]:
        """Lists this browser's (or session's) own pictures, newest first, a page at a time."""
        return actions.history(studio, token, str(request.session_hash), page, words.language_of(request.headers))

    def on_newer(token: str, page: float, request: gr.Request) -> tuple[Any, ...]:
        return on_page(token, (page or 1) - 1, request)

    def on_older(token: str, page: float, request: gr.Request) -> tuple[Any, ...]:
        return on_page(token, (page or 0) + 1, request)

    parts.page.submit(on_page, page, _history(parts), api_name="generate_history", **QUIET)
    parts.newer.click(on_newer, page, _history(parts), **PRIVATE)
    parts.older.click(on_older, page, _history(parts), **PRIVATE)
    parts.history.select(on_pick, parts.history_files, [parts.picked, parts.text], **PRIVATE)
    parts.use.click(on_use, parts.picked, list(changing.values()), **PRIVATE)
    parts.dropped.upload(on_restore, parts.dropped, list(changing.values()), api_name="generate_restore", **QUIET)
    demo.load(None, outputs=parts.token, js=KEYS, **PRIVATE).then(_newest(studio), parts.token, _history(parts), **PRIVATE)


def _wire_lists(roots: Roots, studio: Studio, parts: Parts, demo: gr.Blocks) -> None:
    def on_base(base: str, request: gr.Request) -> tuple[Any, str]:
        """Loads a base if nobody is drawing, and offers the sizes that suit it."""
        return actions.choose_base(studio, base, words.language_of(request.headers))

    def on_load(request: gr.Request) -> tuple[Any, str]:
        choices = lora_shelf.bases_of(roots)
        return gr.update(choices=choices), words.say("generate.welcome", words.language_of(request.headers))

    def on_loras(search: str = "", base: str = "mini") -> dict[str, Any]:
        """Searches the LoRA files: how many match, and the first of them with family, rank, trigger words and why they do not fit."""
        return generate_cards.found(studio, search, base)

    def on_lora(lora: str, base: str = "mini") -> dict[str, Any]:
        """One LoRA file's facts by id, with how many of its modules match those of the base."""
        return generate_cards.card(studio, lora, base)

    def on_sampler(sampler: str, schedule: str) -> Any:
        known = generate.SAMPLERS.keys() & {sampler}
        offered = generate.schedules_of(sampler) if known else list(generate.SCHEDULES)
        return gr.update(choices=offered, value=schedule if schedule in offered else offered[0])

    outputs = [parts.size, parts.status]
    parts.base.change(None, parts.base, js=generate_cards.TELL_BASE, api_visibility="private")
    parts.base.change(on_base, parts.base, outputs, api_name="generate_base", **QUIET)
    parts.sampler.input(on_sampler, [parts.sampler, parts.schedule], parts.schedule, queue=False, **PRIVATE)
    api(on_loras, api_name="generate_loras")
    api(on_lora, api_name="generate_lora")
    demo.load(on_load, outputs=[parts.base, parts.welcome], **PRIVATE).then(on_base, parts.base, outputs, **PRIVATE)


def receive(studio: Studio, parts: Parts, event: gr.events.Dependency, setting: gr.components.Component) -> None:
    """After an event of another page its setting is put into the controls.

    Args:
        setting: what `compare_cells.setting_of` gives.
    """
    changing = {name: getattr(parts, name) for name in (*actions.RESTORED, "status")}

    def on_setting(told: Any, request: gr.Request) -> dict[Any, Any]:
        changes = actions.take(studio, told, words.language_of(request.headers))
        return {changing[name]: change for name, change in (changes or {"status": gr.skip()}).items()}

    event.then(on_setting, setting, list(changing.values()), **PRIVATE)
