"""What is seen on the page of LoRA files and runs: cards to choose from, what is known of the chosen one, what can be done with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from sdlora import lora_layouts, lora_merge
from sdlora.ui import library_cards as cards
from sdlora.ui import lora_shelf, words
from sdlora.ui.library_actions import LIMITS
from sdlora.ui.library_merge import SLOTS
from sdlora.ui.roots import Roots
from sdlora.ui.studio import Studio

CSS = (
    cards.CSS
    + """
#library-status, #library-status > *, #library-cards, #library-cards > *, #library-detail, #library-detail > * { padding: 0 !important; }
#library-pages { align-items: center; }
:has(> #library-cards .one-page) > #library-pages { display: none; }
#library-inside, #library-inside > * { padding: 0 !important; }
#library-stop:disabled { background: var(--border-color-primary); color: var(--body-text-color-subdued); opacity: 1; }
"""
)
CHOOSE_JS = """element.addEventListener('click', (event) => {
  const card = event.target.closest('[data-key]');
  if (!card) return;
  trigger('click', {key: card.dataset.key});
  if (window.innerWidth <= 700) document.querySelector('#library-chosen')?.scrollIntoView({behavior: 'smooth'});
});"""


@dataclass
class Parts:
    """The page's controls."""

    what: gr.Radio
    search: gr.Textbox
    family: gr.Dropdown
    order: gr.Dropdown
    cards: gr.HTML
    page: gr.Number
    back: gr.Button
    next: gr.Button
    refresh: gr.Button
    upload: gr.File
    import_name: gr.Textbox
    do_import: gr.Button
    status: gr.HTML
    chosen: gr.Dropdown
    use: gr.Button
    setting: gr.JSON
    detail: gr.HTML
    notes: gr.Textbox
    save_notes: gr.Button
    base: gr.Dropdown
    do_inspect: gr.Button
    inside: gr.HTML
    name: gr.Textbox
    rename: gr.Button
    licence: gr.Textbox
    prompts: gr.Checkbox
    share: gr.Button
    pack: gr.File
    sure: gr.Checkbox
    delete: gr.Button
    made_name: gr.Textbox
    limit: gr.Radio
    amount: gr.Number
    resize: gr.Button
    layout: gr.Radio
    convert: gr.Button
    parts: list[gr.Dropdown]
    weights: list[gr.Slider]
    method: gr.Dropdown
    rank: gr.Number
    prompt: gr.Textbox
    seed: gr.Number
    draw_base: gr.Dropdown
    merge_name: gr.Textbox
    preview: gr.Button
    merge: gr.Button
    stop: gr.Button
    merge_status: gr.HTML
    row: gr.Image


def layout(roots: Roots, studio: Studio, *, base: str = "mini") -> Parts:
    """Everything that is seen, to be called inside a `gr.Blocks`.

    Args:
        base: what LoRAs are compared with and drawn with to begin with.
    """
    made: dict[str, Any] = {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            made |= _shelf() | _import()
        with gr.Column(scale=5, min_width=320):
            made |= _chosen() | _inside(roots, base) | _managed() | _made()
    with gr.Accordion(words.label("library.merge"), open=False, elem_id="library-merge-box"):
        made |= _merge(roots, base)
    return Parts(**made)


def _text(name: str, **values: object) -> dict[str, Any]:
    """A control's label, its line of help and its id."""
    return {"label": words.label(f"library.{name}"), "info": words.label(f"library.{name}_info"), "elem_id": _id(name)}


def _id(name: str) -> str:
    return f"library-{name.replace('_', '-')}"


def _button(name: str, **options: Any) -> gr.Button:
    return gr.Button(words.label(f"library.{name}"), elem_id=_id(name), **{"min_width": 100, **options})


def _shelf() -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Group():
        with gr.Row():
            made["search"] = gr.Textbox(max_lines=1, scale=3, min_width=160, **_text("search"))
            kinds = [(words.label(f"library.what_{name}"), name) for name in ("loras", "runs")]
            made["what"] = gr.Radio(kinds, value="loras", scale=2, min_width=180, **_text("what"))
        with gr.Row():
            families = [(words.label("library.family_any"), ""), *((shown, name) for name, shown in lora_shelf.FAMILIES.items())]
            made["family"] = gr.Dropdown(families, value="", min_width=130, **_text("family"))
            orders = [(words.label(f"library.order_{name}"), name) for name in lora_shelf.ORDERS]
            made["order"] = gr.Dropdown(orders, value="newest", min_width=130, **_text("order"))
    made["cards"] = gr.HTML(elem_id="library-cards", padding=False, js_on_load=CHOOSE_JS)
    with gr.Row(elem_id="library-pages"):
        made["back"] = _button("back", size="sm", min_width=70)
        made["page"] = gr.Number(1, precision=0, minimum=1, min_width=90, **_text("page"))
        made["next"] = _button("next", size="sm", min_width=70)
    made["refresh"] = _button("refresh", size="sm", elem_classes="flat")
    return made


def _import() -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Accordion(words.label("library.import"), open=False, elem_id="library-import-box"):
        made["upload"] = gr.File(
            file_types=[".safetensors"], file_count="single", label=words.label("library.upload"), height=120, elem_id="library-upload"
        )  # fmt: skip
        made["import_name"] = gr.Textbox(max_lines=1, **_text("import_name"))
        made["do_import"] = _button("do_import")
    return made


def _chosen() -> dict[str, Any]:
    made: dict[str, Any] = {"status": gr.HTML(elem_id="library-status", padding=False)}
    made["chosen"] = gr.Dropdown([], value=None, allow_custom_value=True, **_text("chosen"))
    made["use"] = _button("use", variant="primary")
    made["setting"] = gr.JSON(visible="hidden", label="setting", elem_id="library-setting")
    made["detail"] = gr.HTML(elem_id="library-detail", padding=False)
    made["notes"] = gr.Textbox(lines=2, max_lines=8, **_text("notes"))
    made["save_notes"] = _button("save_notes", size="sm")
    return made


def _bases(roots: Roots, name: str, base: str) -> gr.Dropdown:
    return gr.Dropdown(lora_shelf.bases_of(roots), value=base, allow_custom_value=True, **_text(name))


def _inside(roots: Roots, base: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Accordion(words.label("library.inspect"), open=False, elem_id="library-inspect-box"):
        made["base"] = _bases(roots, "base", base)
        made["do_inspect"] = _button("do_inspect")
        made["inside"] = gr.HTML(elem_id="library-inside", padding=False)
    return made


def _managed() -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Accordion(words.label("library.manage"), open=False, elem_id="library-manage-box"):
        made["name"] = gr.Textbox(max_lines=1, **_text("name"))
        made["rename"] = _button("rename")
        made["licence"] = gr.Textbox(max_lines=1, **_text("licence"))
        made["prompts"] = gr.Checkbox(False, **_text("prompts"))
        made["share"] = _button("share")
        made["pack"] = gr.File(label=words.label("library.pack"), interactive=False, visible=False, elem_id="library-pack")
        made["sure"] = gr.Checkbox(False, **_text("sure"))
        made["delete"] = _button("delete", variant="stop")
    return made


def _made() -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Accordion(words.label("library.make"), open=False, elem_id="library-make-box"):
        made["made_name"] = gr.Textbox(
            max_lines=1, label=words.label("library.made_name"), info=words.label("library.name_info"), elem_id="library-made-name"
        )  # fmt: skip
        limits = [(words.label(f"library.limit_{name}"), name) for name in LIMITS]
        made["limit"] = gr.Radio(limits, value="rank", **_text("limit"))
        made["amount"] = gr.Number(8, **_text("amount"))
        made["resize"] = _button("resize")
        made["layout"] = gr.Radio(list(lora_layouts.LAYOUTS), value="kohya", **_text("layout"))
        made["convert"] = _button("convert")
    return made


def _merge(roots: Roots, base: str) -> dict[str, Any]:
    made: dict[str, Any] = {"parts": [], "weights": []}
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            for number in range(1, SLOTS + 1):
                with gr.Row():
                    part, weight = words.label(f"library.part_{number}"), words.label(f"library.weight_{number}")
                    made["parts"].append(gr.Dropdown(
                        [("-", "")], value="", allow_custom_value=True, min_width=150, label=part, info=words.label("library.part_info"),
                        elem_id=f"library-part-{number}",
                    ))  # fmt: skip
                    made["weights"].append(gr.Slider(
                        -2, 2, 1.0 if number == 1 else 0.5, step=0.05, min_width=150, label=weight, info=words.label("library.weight_info"),
                        elem_id=f"library-weight-{number}",
                    ))  # fmt: skip
        with gr.Column(min_width=320):
            with gr.Row():
                made["method"] = gr.Dropdown(list(lora_merge.METHODS), value="sum", min_width=130, **_text("method"))
                made["rank"] = gr.Number(0, precision=0, min_width=130, **_text("rank"))
            made["prompt"] = gr.Textbox("a red star on a blue background", max_lines=3, **_text("prompt"))
            with gr.Row():
                made["seed"] = gr.Number(0, precision=0, min_width=130, **_text("seed"))
                made["draw_base"] = _bases(roots, "draw_base", base)
            made["merge_name"] = gr.Textbox(
                max_lines=1, label=words.label("library.made_name"), info=words.label("library.name_info"), elem_id="library-merge-name"
            )  # fmt: skip
            with gr.Row():
                made["preview"] = _button("preview")
                made["merge"] = gr.Button(words.label("library.do_merge"), variant="primary", min_width=120, elem_id="library-merge")
                made["stop"] = _button("stop", variant="stop", interactive=False, min_width=80)
    made["merge_status"] = gr.HTML(elem_id="library-merge-status", padding=False)
    made["row"] = gr.Image(
        show_label=False, label=words.label("library.preview"), format="png", interactive=False, buttons=["download", "fullscreen"],
        visible=False, height="auto", alt_text="preview", elem_id="library-row",
    )  # fmt: skip
    return made
