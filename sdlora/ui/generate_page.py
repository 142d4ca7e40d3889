"""The page on which pictures are made: a prompt, LoRAs with a strength each, and beside them the same seeds without.

`layout` says what is seen, `wire` which press leads to which function of `generate_actions`. Drawing and everything else that uses
the base goes through one queue of one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from sdlora import generate
from sdlora.generate import Request
from sdlora.ui import generate_actions as actions
from sdlora.ui import studio as studios
from sdlora.ui.studio import Studio

SLOTS = 4
EXAMPLES = ("a red star on a blue background", "a big teal cat on an orange background", "a small yellow fish on a purple background")
GPU: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1}
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
WELCOME = """<div class="welcome"><h2>Your pictures appear here</h2><ol>
<li><b>Say what to draw</b>, or take one of the examples.</li>
<li><b>Choose a LoRA</b> if you have one; you will see the same picture with and without it.</li>
<li><b>Press Generate.</b> Then move the strength and press it again.</li></ol></div>"""


@dataclass
class Parts:
    """The page's controls."""

    prompt: gr.Textbox
    negative: gr.Textbox
    loras: list[gr.Dropdown]
    strengths: list[gr.Slider]
    refresh: gr.Button
    beside: gr.Checkbox
    seed: gr.Number
    dice: gr.Button
    count: gr.Slider
    steps: gr.Slider
    guidance: gr.Slider
    sampler: gr.Dropdown
    size: gr.Dropdown
    base: gr.Dropdown
    go: gr.Button
    stop: gr.Button
    status: gr.HTML
    welcome: gr.HTML
    with_lora: gr.Gallery
    without: gr.Gallery


def layout(studio: Studio, *, base: str) -> Parts:
    """Everything that is seen, to be called inside a `gr.Blocks`."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=380):
            made = _words(studio) | _seeds()
            with gr.Row(elem_id="buttons"):
                made["go"] = gr.Button("Generate", variant="primary", size="lg", scale=3, elem_id="generate")
                made["stop"] = gr.Button("Stop", variant="stop", size="lg", scale=1, interactive=False, elem_id="stop")
            made |= _settings(base)
        with gr.Column(scale=6, min_width=420):
            made |= _results()
    return Parts(**made)


def _words(studio: Studio) -> dict[str, Any]:
    """Prompt, examples, LoRAs."""
    prompt = gr.Textbox(EXAMPLES[0], label="What to draw", lines=2, max_lines=6, elem_id="prompt")
    with gr.Row(elem_id="examples"):
        for i, example in enumerate(EXAMPLES):
            button = gr.Button(example, size="sm", variant="secondary", min_width=60, elem_id=f"example-{i}")
            button.click(None, js=f"() => '{example}'", outputs=prompt, api_visibility="private")
    negative = gr.Textbox(
        label="What to avoid (optional)", placeholder="words for what must not be in the picture", lines=1, elem_id="negative"
    )
    loras, strengths = [], []
    with gr.Group(elem_id="lora-box"):
        for i in range(SLOTS):
            with gr.Row(elem_classes="lora-slot"):
                label = "LoRA" if i == 0 else "Another LoRA"
                loras.append(gr.Dropdown(actions.choices_of(studio), value="", label=label, visible=i == 0, elem_id=f"lora-{i}"))
                strengths.append(gr.Slider(-2, 2, 1, step=0.05, label="Strength", visible=False, elem_id=f"strength-{i}"))
        refresh = gr.Button("Look again for LoRA files", size="sm", elem_id="refresh", elem_classes="flat")
    beside = gr.Checkbox(True, label="Beside the same without LoRA", visible=False, container=False, elem_id="beside")
    return {"prompt": prompt, "negative": negative, "loras": loras, "strengths": strengths, "refresh": refresh, "beside": beside}


def _seeds() -> dict[str, Any]:
    """Which pictures and how many."""
    made: dict[str, Any] = {}
    with gr.Row(elem_id="seed-row", equal_height=True):
        with gr.Group(elem_id="seed-box"):
            made["seed"] = gr.Number(Request("").seed, label="Seed", precision=0, min_width=150, elem_id="seed")
            made["dice"] = gr.Button("New seed", size="sm", elem_id="dice", elem_classes="flat")
        made["count"] = gr.Slider(1, 8, 2, step=1, label="Pictures", min_width=150, elem_id="count")
    return made


def _settings(base: str) -> dict[str, Any]:
    """What has good defaults, folded away."""
    plain = Request("")
    made: dict[str, Any] = {}
    with gr.Accordion("More settings", open=False, elem_id="more"):
        with gr.Row():
            made["steps"] = gr.Slider(1, 100, plain.steps, step=1, label="Steps", elem_id="steps")
            made["guidance"] = gr.Slider(1, 15, plain.guidance, step=0.5, label="Guidance", elem_id="guidance")
        with gr.Row():
            made["sampler"] = gr.Dropdown(list(generate.SAMPLERS), value=plain.sampler, label="Sampler", elem_id="sampler")
            made["size"] = gr.Dropdown(
                [actions.OWN_SIZE],
                value=actions.OWN_SIZE,
                allow_custom_value=True,
                label="Size",
                info="Or type, such as 512x768",
                elem_id="size",
            )
        made["base"] = gr.Dropdown(
            list(dict.fromkeys(["mini", base])), value=base, allow_custom_value=True, label="Base model", elem_id="base",
            info="mini comes with the program. Or type the path of a diffusers folder or a .safetensors checkpoint, or a hub name.",
        )  # fmt: skip
    return made


def _results() -> dict[str, Any]:
    """The line that says how far it is, and the two rows of pictures."""
    look: dict[str, Any] = {
        "columns": 2, "object_fit": "contain", "height": "auto", "format": "png", "visible": False, "interactive": False,
        "buttons": ["download", "fullscreen"], "elem_classes": "pictures", "show_label": True,
    }  # fmt: skip
    made: dict[str, Any] = {
        "status": gr.HTML(actions.message("Starting…"), elem_id="status", padding=False),
        "welcome": gr.HTML(WELCOME, elem_id="welcome", padding=False),
    }
    with gr.Row(equal_height=False):
        made["without"] = gr.Gallery(label="Without LoRA", elem_id="pictures-without", **look)
        made["with_lora"] = gr.Gallery(label="Pictures", elem_id="pictures-with", **look)
    return made


def wire(studio: Studio, parts: Parts, demo: gr.Blocks) -> None:
    """Says what each press does."""
    inputs = [
        parts.prompt, parts.negative, parts.seed, parts.count, parts.steps, parts.guidance, parts.sampler, parts.size, parts.base,
        parts.beside, *parts.loras, *parts.strengths,
    ]  # fmt: skip
    changing = {name: getattr(parts, name) for name in ("status", "go", "stop", "welcome", "with_lora", "without")}

    def on_generate(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        for changes in actions.generate_pictures(studio, str(request.session_hash), *values):
            yield {changing[name]: change for name, change in changes.items()}

    def on_stop(request: gr.Request) -> None:
        studios.stop(studio, str(request.session_hash))

    def on_base(name: str) -> tuple[Any, str]:
        return actions.choose_base(studio, name)

    def on_check(base: str, *slots: Any) -> str:
        return actions.check_loras(studio, base, *slots)

    def on_refresh(*slots: Any) -> list[Any]:
        return actions.look_again(studio, *slots)

    gr.on([parts.go.click, parts.prompt.submit], on_generate, inputs, list(changing.values()), **GPU, **QUIET)
    parts.stop.click(on_stop, queue=False, **QUIET)
    parts.dice.click(lambda: random.randrange(2**31), outputs=parts.seed, queue=False, **QUIET)
    parts.refresh.click(on_refresh, parts.loras, [*parts.loras, parts.status], **QUIET)
    parts.base.change(on_base, parts.base, [parts.size, parts.status], **GPU, **QUIET)
    for slot in parts.loras:
        slot.change(actions.choose_loras, parts.loras, [*parts.loras, *parts.strengths, parts.beside], queue=False, **QUIET)
        slot.input(on_check, [parts.base, *parts.loras], parts.status, **GPU, **QUIET)
    looked = demo.load(on_refresh, parts.loras, [*parts.loras, parts.status], **QUIET)
    looked.then(on_base, parts.base, [parts.size, parts.status], **GPU, **QUIET)
