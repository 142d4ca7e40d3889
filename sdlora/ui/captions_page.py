"""The part of the training page that shows the pictures: each with its caption to write, and with what the doctor finds about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.events import api

from sdlora import captioner
from sdlora.errors import UserError
from sdlora.ui import captions_actions as actions
from sdlora.ui import train_actions, words
from sdlora.ui import train_settings as settings
from sdlora.ui.captions_js import CSS, HTML, SCRIPT
from sdlora.ui.generate_actions import message
from sdlora.ui.roots import Roots

QUIET: dict[str, Any] = {"show_progress": "hidden"}
WORK: dict[str, Any] = {"concurrency_id": "train-look", "concurrency_limit": 2}


@dataclass
class Parts:
    """The controls of this part."""

    summary: gr.HTML
    cards: gr.HTML
    page: gr.Number
    action: gr.Dropdown
    tag: gr.Textbox
    other: gr.Textbox
    apply: gr.Button
    draft: gr.Button
    sheet_go: gr.Button
    sheet: gr.Image


@dataclass
class About:
    """The controls of the form that say which pictures these are and what the doctor must know of them."""

    key: gr.Textbox
    trigger: gr.Textbox
    kind: gr.Radio
    base: gr.Dropdown
    changes: gr.Textbox
    status: gr.HTML


def said(name: str) -> dict[str, Any]:
    """Label, line of help and id of a control."""
    return {"label": words.label(f"train.{name}"), "info": words.label(f"train.{name}_info"), "elem_id": f"train-{name}"}


def layout(roots: Roots) -> Parts:
    """Everything that is seen, to be called inside a `gr.Blocks`."""

    def write(told: object) -> str:
        sent = [*told, "", "", ""][:3] if isinstance(told, list) else ["", "", ""]
        try:
            actions.write(roots, *map(str, sent))
        except UserError as problem:
            return str(problem)
        return ""

    made: dict[str, Any] = {}
    made["summary"] = gr.HTML(elem_id="train-check", padding=False)
    made["cards"] = gr.HTML(
        actions.NOTHING, html_template=HTML, css_template=CSS, apply_default_css=False,
        js_on_load=words.for_script("train.card_", "train.welcome", without="train.") + SCRIPT,
        server_functions=[write], elem_id="train-cards", label="captions",
    )  # fmt: skip
    made["page"] = gr.Number(1, label="page", visible="hidden", elem_id="train-page")
    with gr.Accordion(words.label("train.bulk"), open=False, elem_id="train-bulk"):
        offered = [(words.label(f"train.action_{one}"), one) for one in actions.EDITS]
        made["action"] = gr.Dropdown(offered, value="add", **said("action"))
        with gr.Row():
            made["tag"] = gr.Textbox(max_lines=1, min_width=140, **said("tag"))
            made["other"] = gr.Textbox(max_lines=1, min_width=140, **said("other"))
        made["apply"] = gr.Button(words.label("train.apply"), elem_id="train-apply")
        made["draft"] = gr.Button(words.label("train.draft"), visible=captioner.folder() is not None, elem_id="train-draft")
    with gr.Accordion(words.label("train.sheet_fold"), open=False, elem_id="train-sheet-fold"):
        made["sheet_go"] = gr.Button(words.label("train.sheet_go"), elem_id="train-sheet-go")
        made["sheet"] = gr.Image(
            label=words.label("train.sheet"), show_label=False, format="png", interactive=False, visible=False, height="auto",
            buttons=["download", "fullscreen"], elem_id="train-sheet",
        )  # fmt: skip
    return Parts(**made)


def wire(roots: Roots, parts: Parts, about: About) -> dict[str, Any]:
    """Says what each press does.

    Returns:
        What `.then` takes to look at the pictures after another event.
    """
    look = _wire_looks(roots, parts, about)
    _wire_changes(roots, parts, about, look)
    _wire_sheet(roots, parts, about)
    return look


def _wire_looks(roots: Roots, parts: Parts, about: About) -> dict[str, Any]:
    """The cards, page by page."""
    looking = [about.key, about.trigger, about.kind, about.base, about.changes, parts.page]
    shown = [parts.summary, parts.cards]

    def on_look(
        request: gr.Request, set_id: str, trigger: str = "", kind: str = "style", base: str = "mini", changes: str = "", page: float = 1
    ) -> Iterator[tuple[str, Any]]:
        """Looks at every picture of a set: yields the status, and at the end the captions with what was found about each."""
        language = words.language_of(request.headers)
        if not set_id:
            yield "", actions.NOTHING
            return
        try:
            for one in actions.looked(roots, set_id, settings.form_of("", trigger, kind, base), settings.changes_of(changes)):
                if len(one) == 2:
                    told = words.say("train.looking", language, done=one[0], total=one[1])
                    yield message(told, kind="busy", share=one[0] / max(1, one[1])), gr.skip()
                else:
                    found = actions.cards(roots, set_id, one[2].findings, page, language)
                    yield actions.summary(one[2], language), found
        except UserError as problem:
            yield message(str(problem), kind="bad"), gr.skip()

    def on_page(event: gr.EventData) -> Any:
        page = _told(event, "page")
        return page if isinstance(page, int) and abs(page) < 10**6 else 1

    look: dict[str, Any] = {"fn": on_look, "inputs": looking, "outputs": shown, "api_visibility": "private", **QUIET, **WORK}
    parts.cards.select(on_page, outputs=parts.page, api_visibility="private", **QUIET).then(**look)
    parts.cards.submit(on_look, looking, shown, api_name="train_check", trigger_mode="always_last", **QUIET, **WORK)
    return look


def _wire_changes(roots: Roots, parts: Parts, about: About, look: dict[str, Any]) -> None:
    """Captions that are written, one or all, and pictures that are taken out."""

    def on_write(set_id: str, picture: str, caption: str) -> str:
        """Writes one caption by the set's and the picture's id; says nothing if all is well, else why not."""
        try:
            actions.write(roots, set_id, picture, caption)
        except UserError as problem:
            return str(problem)
        return ""

    def on_edit(request: gr.Request, set_id: str, action: str, tag: str, other: str = "") -> str:
        """Changes all captions of a set: add, first, remove, replace, prefix."""
        try:
            changed, count = actions.edit(roots, set_id, action, tag, other)
        except UserError as problem:
            return message(str(problem), kind="bad")
        return message(words.say("train.edited", words.language_of(request.headers), changed=changed, count=count), kind="good")

    def on_draft(request: gr.Request, set_id: str) -> Iterator[str]:
        """Drafts captions for the pictures that have none, if a captioner lies on this machine."""
        language, done = words.language_of(request.headers), 0
        try:
            for done, total in actions.draft(roots, set_id):
                yield message(words.say("train.drafting", language, done=done, total=total), kind="busy", share=done / total)
            yield message(words.say("train.drafted", language, count=done), kind="good")
        except UserError as problem:
            yield message(str(problem), kind="bad")

    def on_remove(request: gr.Request, set_id: str, picture: str) -> str:
        """Takes one picture out of a set by its id."""
        try:
            train_actions.remove(roots, set_id, picture)
        except UserError as problem:
            return message(str(problem), kind="bad")
        return message(words.say("train.taken_out", words.language_of(request.headers)), kind="good")

    def on_away(key: str, event: gr.EventData, request: gr.Request) -> str:
        return on_remove(request, key, _told(event, "picture"))

    edited = parts.apply.click(on_edit, [about.key, parts.action, parts.tag, parts.other], about.status, api_name="train_captions", **QUIET)
    drafted = parts.draft.click(on_draft, about.key, about.status, api_name="train_draft", **QUIET, **WORK)
    away = parts.cards.delete(on_away, about.key, about.status, api_visibility="private", **QUIET)
    for one in (edited, drafted, away):
        one.then(**look)
    api(on_write, api_name="train_caption")
    api(on_remove, api_name="train_remove")


def _wire_sheet(roots: Roots, parts: Parts, about: About) -> None:
    """All pictures on one page."""

    def on_sheet(
        request: gr.Request, set_id: str, trigger: str = "", kind: str = "style", base: str = "mini", changes: str = ""
    ) -> tuple[str, Any]:
        """Draws every picture of a set as it will be trained, on one page."""
        try:
            *_, last = actions.looked(roots, set_id, settings.form_of("", trigger, kind, base), settings.changes_of(changes))
            assert len(last) == 3
            drawn = actions.sheet(*last)
        except UserError as problem:
            return message(str(problem), kind="bad"), gr.skip()
        told = words.say("train.sheet_done", words.language_of(request.headers))
        return message(told, kind="good"), gr.update(value=drawn, visible=True)

    asked = [about.key, about.trigger, about.kind, about.base, about.changes]
    parts.sheet_go.click(on_sheet, asked, [about.status, parts.sheet], api_name="train_sheet", **WORK)


def _told(event: gr.EventData, name: str) -> Any:
    """What the cards' script tells with an event; a direct post may come without, or with anything."""
    data = getattr(event, "_data", None)
    return data.get(name) if isinstance(data, dict) else None
