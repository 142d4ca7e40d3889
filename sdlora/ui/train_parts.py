"""What is seen on the page of trainings: its controls, where they stand, and what they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from sdlora import images
from sdlora.jobs import Jobs
from sdlora.ui import captions_page, lora_shelf, watch_page, words
from sdlora.ui import train_actions as actions
from sdlora.ui.captions_page import said
from sdlora.ui.generate_actions import message
from sdlora.ui.roots import Roots


@dataclass
class Parts:
    """The page's controls; those of its two parts have records of their own."""

    drop: gr.File
    folder: gr.Dropdown
    clear: gr.Button
    name: gr.Textbox
    trigger: gr.Textbox
    kind: gr.Radio
    base: gr.Dropdown
    forecast: gr.HTML
    go: gr.Button
    measure: gr.Button
    status: gr.HTML
    text: gr.Code
    shown: gr.Textbox
    fresh: gr.Textbox
    changes: gr.Textbox
    key: gr.Textbox
    token: gr.Textbox
    captions: captions_page.Parts
    watch: watch_page.Parts


def layout(roots: Roots, jobs: Jobs, *, base: str = "mini") -> Parts:
    """Everything that is seen, to be called inside a `gr.Blocks`.

    Args:
        base: what is chosen to begin with: "mini", or an id of `roots.bases`.
    """
    made: dict[str, Any] = {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            made |= _pictures(roots) | _words(roots, base)
            made["forecast"] = gr.HTML(elem_id="train-forecast", padding=False)
            made["measure"] = gr.Button(words.label("train.measure"), size="sm", elem_id="train-measure", elem_classes="flat")
            made["go"] = gr.Button(words.label("train.go"), variant="primary", size="lg", elem_id="train-go")
            made["status"] = gr.HTML(message(words.say("train.ready")), elem_id="train-status", padding=False)
            with gr.Accordion(words.label("train.expert"), open=False, elem_id="train-expert"):
                gr.Markdown(words.label("train.text_info"), elem_classes="train-help")
                made["text"] = gr.Code(
                    "", language=None, lines=12, max_lines=30, interactive=True, wrap_lines=True, label=words.label("train.text"),
                    elem_id="train-text",
                )  # fmt: skip
        with gr.Column(scale=6, min_width=320):
            made["captions"] = captions_page.layout(roots)
    for one in ("shown", "fresh", "changes", "key", "token"):
        made[one] = gr.Textbox("", label=one, visible="hidden", elem_id=f"train-{one}")
    made["watch"] = watch_page.layout(roots, jobs)
    return Parts(**made)


def _pictures(roots: Roots) -> dict[str, Any]:
    """Where the pictures come from."""
    made: dict[str, Any] = {}
    gr.Markdown(words.label("train.step_pictures"), elem_classes="train-step")
    made["drop"] = gr.File(
        file_count="multiple", file_types=[*sorted(images.SUFFIXES), ".txt", ".caption"], type="filepath", height=150,
        label=words.label("train.drop"), elem_id="train-drop",
    )  # fmt: skip
    gr.Markdown(words.label("train.drop_info"), elem_classes="train-help")
    made["folder"] = gr.Dropdown(actions.folder_choices(roots), value=None, allow_custom_value=True, **said("folder"))
    made["clear"] = gr.Button(words.label("train.clear"), size="sm", visible=False, elem_id="train-clear", elem_classes="flat")
    return made


def _words(roots: Roots, base: str) -> dict[str, Any]:
    """What it is called, what it is, and what learns it."""
    made: dict[str, Any] = {}
    gr.Markdown(words.label("train.step_name"), elem_classes="train-step")
    with gr.Row():
        made["name"] = gr.Textbox(max_lines=1, min_width=140, placeholder=words.label("train.name_hint"), **said("name"))
        made["trigger"] = gr.Textbox(max_lines=1, min_width=140, placeholder=words.label("train.trigger_hint"), **said("trigger"))
    kinds = [(words.label(f"train.kind_{one}"), one) for one in ("style", "character")]
    made["kind"] = gr.Radio(kinds, value="style", **said("kind"))
    made["base"] = gr.Dropdown(lora_shelf.bases_of(roots), value=base, allow_custom_value=True, **said("base"))
    return made
