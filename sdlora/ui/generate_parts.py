"""What is seen on the page of pictures: its controls, where they stand, and what they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from sdlora import generate
from sdlora.generate import Request
from sdlora.ui import generate_cards, generate_form, lora_shelf, words
from sdlora.ui.roots import Roots
from sdlora.ui.studio import Studio

EXAMPLES = ("a red star on a blue background", "a big teal cat on an orange background", "a small yellow fish on a purple background")


@dataclass
class Parts:
    """The page's controls."""

    prompt: gr.Textbox
    negative: gr.Textbox
    loras: gr.HTML
    beside: gr.Checkbox
    seed: gr.Number
    less: gr.Button
    more: gr.Button
    dice: gr.Button
    random: gr.Checkbox
    count: gr.Slider
    go: gr.Button
    stop: gr.Button
    steps: gr.Slider
    guidance: gr.Slider
    sampler: gr.Dropdown
    schedule: gr.Dropdown
    size: gr.Dropdown
    clip_skip: gr.Slider
    base: gr.Dropdown
    picture: gr.ImageEditor
    denoise: gr.Slider
    hires_scale: gr.Slider
    hires_denoise: gr.Slider
    dropped: gr.File
    status: gr.HTML
    preview: gr.HTML
    welcome: gr.HTML
    with_lora: gr.Gallery
    without: gr.Gallery
    history: gr.Gallery
    newer: gr.Button
    page: gr.Number
    pages: gr.Markdown
    older: gr.Button
    text: gr.Textbox
    use: gr.Button
    picked: gr.State
    history_files: gr.State
    token: gr.Textbox


def layout(roots: Roots, studio: Studio, *, base: str = "mini") -> Parts:
    """Everything that is seen, to be called inside a `gr.Blocks`.

    Args:
        base: what is chosen to begin with; the studio's `first`, or an id.
    """
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            made = _words(studio, base) | _seeds()
            with gr.Row(elem_id="buttons"):
                made["go"] = gr.Button(words.label("generate.go"), variant="primary", size="lg", scale=3, min_width=120, elem_id="generate")
                made["stop"] = gr.Button(
                    words.label("generate.stop"), variant="stop", size="lg", scale=1, min_width=90, interactive=False, elem_id="stop"
                )
            made |= _settings(roots, studio, base) | _beginnings()
        with gr.Column(scale=6, min_width=320):
            made |= _results() | _history()
    made["token"] = gr.Textbox("", label="token", visible="hidden", elem_id="generate-token")
    return Parts(**made)


def _said(name: str, *, elem_id: str = "") -> dict[str, Any]:
    """Label, line of help and id of a control."""
    return {
        "label": words.label(f"generate.{name}"), "info": words.label(f"generate.{name}_info"), "elem_id": elem_id or f"generate-{name}",
    }  # fmt: skip


def _words(studio: Studio, base: str) -> dict[str, Any]:
    """Prompt, examples, LoRAs."""
    made: dict[str, Any] = {"prompt": gr.Textbox(EXAMPLES[0], lines=2, max_lines=8, **_said("prompt", elem_id="prompt"))}
    with gr.Row(elem_id="examples"):
        for i, example in enumerate(EXAMPLES):
            button = gr.Button(example, size="sm", variant="secondary", min_width=60, elem_id=f"example-{i}")
            button.click(None, js=f"() => '{example}'", outputs=made["prompt"], api_visibility="private")
    made["negative"] = gr.Textbox("", lines=1, max_lines=6, **_said("negative", elem_id="negative"))
    made["loras"] = generate_cards.control(studio, base=base)
    made["beside"] = gr.Checkbox(True, **_said("beside", elem_id="beside"))
    return made


def _seeds() -> dict[str, Any]:
    """Which pictures and how many."""
    made: dict[str, Any] = {}
    with gr.Group():
        made["seed"] = gr.Number(Request("").seed, precision=0, **_said("seed", elem_id="seed"))
        with gr.Row(elem_id="seed-row", equal_height=True):
            made["less"] = gr.Button("−1", size="sm", elem_id="seed-less", elem_classes="flat", min_width=44)  # noqa: RUF001
            made["more"] = gr.Button("+1", size="sm", elem_id="seed-more", elem_classes="flat", min_width=44)
            made["dice"] = gr.Button(words.label("generate.dice"), size="sm", elem_id="dice", elem_classes="flat", min_width=90)
        made["random"] = gr.Checkbox(False, **_said("random"))
    made["count"] = gr.Slider(1, generate_form.MOST_PICTURES, 2, step=1, **_said("count", elem_id="count"))
    return made


def _settings(roots: Roots, studio: Studio, base: str) -> dict[str, Any]:
    """What has good defaults, folded away."""
    plain = Request("")
    made: dict[str, Any] = {}
    with gr.Accordion(words.label("generate.settings"), open=False, elem_id="more"):
        offered = lora_shelf.bases_of(roots)
        made["base"] = gr.Dropdown(offered, value=base, allow_custom_value=True, **_said("base", elem_id="base"))
        with gr.Row():
            made["sampler"] = gr.Dropdown(
                list(generate.SAMPLERS), value=plain.sampler, allow_custom_value=True, min_width=140, **_said("sampler", elem_id="sampler")
            )
            made["schedule"] = gr.Dropdown(
                generate.schedules_of(plain.sampler), value=plain.schedule, allow_custom_value=True, min_width=140, **_said("schedule")
            )
        made["steps"] = gr.Slider(1, generate_form.MOST_STEPS, plain.steps, step=1, **_said("steps", elem_id="steps"))
        made["guidance"] = gr.Slider(1, generate_form.HIGHEST_GUIDANCE, plain.guidance, step=0.1, **_said("guidance", elem_id="guidance"))
        with gr.Row():
            made["size"] = gr.Dropdown(
                [], value=generate_form.OWN_SIZE, allow_custom_value=True, min_width=140, **_said("size", elem_id="size")
            )
            made["clip_skip"] = gr.Slider(0, generate_form.MOST_SKIPPED, 0, step=1, min_width=140, **_said("clip_skip"))
    return made


def _beginnings() -> dict[str, Any]:
    """What a picture can begin with, what it can go on with, and settings from another one."""
    plain = Request("")
    made: dict[str, Any] = {}
    with gr.Accordion(words.label("generate.begin"), open=False, elem_id="generate-begin"):
        made["picture"] = gr.ImageEditor(
            type="pil", image_mode="RGBA", sources=["upload", "clipboard"], layers=False, transforms=[], height=380, format="png",
            brush=gr.Brush(default_size=24, colors=["#ffffff"], default_color="#ffffff", color_mode="fixed"),
            label=words.label("generate.picture"), elem_id="generate-picture",
        )  # fmt: skip
        gr.Markdown(words.label("generate.picture_info"), elem_id="generate-picture-help")
        made["denoise"] = gr.Slider(0.05, 1, plain.denoise, step=0.01, **_said("denoise"))
    with gr.Accordion(words.label("generate.hires"), open=False, elem_id="generate-hires"):
        made["hires_scale"] = gr.Slider(1, 4, plain.hires_scale, step=0.05, **_said("hires_scale"))
        made["hires_denoise"] = gr.Slider(0.05, 1, plain.hires_denoise, step=0.01, **_said("hires_denoise"))
    with gr.Accordion(words.label("generate.from_picture"), open=False, elem_id="generate-from"):
        made["dropped"] = gr.File(
            file_types=[".png", ".jpg", ".jpeg", ".webp"], type="filepath", height=110, label=words.label("generate.dropped"),
            elem_id="generate-restore",
        )  # fmt: skip
    return made


def _results() -> dict[str, Any]:
    """The line that says how far it is, the look at the unfinished picture, and the two rows of pictures."""
    look: dict[str, Any] = {
        "columns": 2, "object_fit": "contain", "height": "auto", "format": "png", "visible": False, "interactive": False,
        "buttons": ["download", "fullscreen"], "elem_classes": "pictures", "show_label": True,
    }  # fmt: skip
    made: dict[str, Any] = {
        "status": gr.HTML('<div class="message calm" role="status">…</div>', elem_id="status", padding=False),
        "preview": gr.HTML(visible=False, elem_id="preview", padding=False),
        "welcome": gr.HTML(words.say("generate.welcome"), elem_id="welcome", padding=False),
    }
    with gr.Row(equal_height=False):
        made["without"] = gr.Gallery(label=words.label("generate.without"), elem_id="pictures-without", **look)
        made["with_lora"] = gr.Gallery(label=words.label("generate.pictures"), elem_id="pictures-with", **look)
    return made


def _history() -> dict[str, Any]:
    """The pictures of this browser so far."""
    made: dict[str, Any] = {"picked": gr.State(""), "history_files": gr.State([])}
    with gr.Accordion(words.label("generate.history"), open=False, elem_id="generate-history"):
        made["history"] = gr.Gallery(
            label=words.label("generate.history"), columns=6, object_fit="cover", format="png", interactive=False, allow_preview=False,
            show_label=False, height="auto", buttons=[], elem_id="history",
        )  # fmt: skip
        with gr.Row(elem_id="history-row"):
            made["newer"] = gr.Button(words.label("generate.newer"), size="sm", min_width=80, elem_id="history-newer")
            made["page"] = gr.Number(1, precision=0, minimum=1, min_width=90, **_said("page", elem_id="history-page"))
            made["pages"] = gr.Markdown(elem_id="history-pages")
            made["older"] = gr.Button(words.label("generate.older"), size="sm", min_width=80, elem_id="history-older")
        made["text"] = gr.Textbox(lines=3, max_lines=10, interactive=False, buttons=["copy"], **_said("text", elem_id="history-text"))
        made["use"] = gr.Button(words.label("generate.use"), elem_id="history-use")
    return made
