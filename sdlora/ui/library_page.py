"""The page of LoRA files and runs: which press leads to what. Every press is an API endpoint too, named after what it does.

What is seen stands in `library_layout`. A card is chosen by the id that it carries, and everything is done by that id.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import gradio as gr

from sdlora.errors import UserError
from sdlora.ui import library_actions as actions
from sdlora.ui import library_merge, lora_shelf, side_work, words
from sdlora.ui.generate_actions import message
from sdlora.ui.library_layout import CSS, Parts, layout
from sdlora.ui.roots import Roots
from sdlora.ui.side_work import Desk
from sdlora.ui.studio import Studio

__all__ = ["CSS", "Parts", "layout", "wire"]
QUIET: dict[str, Any] = {"show_progress": "hidden"}
WORK: dict[str, Any] = {"concurrency_id": "library-work", "concurrency_limit": 1}  # merging and resizing take all cores
GPU: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1}


def _language(request: gr.Request) -> str:
    return words.language_of(request.headers)


def _lines(work: Iterator[str], language: str) -> Iterator[str]:
    """The status lines of work, its mistakes among them."""
    try:
        yield from work
    except UserError as problem:
        yield message(actions.clean(str(problem)), kind="bad")
    except Exception:
        yield message(words.say("library.bug", language), kind="bad")
        raise


def wire(roots: Roots, studio: Studio, parts: Parts, demo: gr.Blocks) -> gr.events.Dependency:
    """Says what each press does.

    Returns:
        The event of "Draw with it": with `.then` and `parts.setting`, Generate takes it over as it does from Compare.
    """
    lora_shelf.warm(roots)
    _looking(roots, studio, parts, demo)
    _changing(roots, parts)
    _making(roots, studio, parts)
    _merging(roots, studio, parts)
    return _using(roots, parts)


def _using(roots: Roots, parts: Parts) -> gr.events.Dependency:
    def on_use(key: str, base: str, request: gr.Request) -> tuple[Any, str]:
        """Gives what Generate needs to draw with a LoRA file or a run by its id: base, LoRA id, strength, prompt, seed and the rest."""
        try:
            setting = actions.setting_of(roots, key, base)
        except UserError as problem:
            return None, message(actions.clean(str(problem)), kind="bad")
        return setting, message(words.say("watch.used", _language(request)), kind="good")

    return parts.use.click(on_use, [parts.chosen, parts.base], [parts.setting, parts.status], api_name="library_use", **QUIET)


def _looking(roots: Roots, studio: Studio, parts: Parts, demo: gr.Blocks) -> None:
    def on_list(what: str, search: str, family: str, order: str, page: float, request: gr.Request) -> tuple[str, Any, Any, str]:
        """Lists LoRA files or runs: search, family, order, page."""
        language = _language(request)
        try:
            shown, at, last = actions.shelf_of(roots, what, search, family, order, page, language)
        except UserError as problem:
            return "", gr.update(), gr.update(), message(str(problem), kind="bad")
        listed, runs = actions.choices_of(roots, language), len(lora_shelf.run_folders(roots))
        said = words.say("library.found", language, loras=len(listed) - runs, runs=runs)
        return shown, gr.update(value=at, maximum=last), gr.update(choices=listed), message(said)

    def on_look(key: str | None, request: gr.Request) -> tuple[str, str, str, str]:
        """Shows what is known of a LoRA file or a run by its id."""
        if not key:
            return "", "", "", ""
        try:
            return (*actions.look(roots, key, _language(request)), "", "")
        except UserError as problem:
            return message(str(problem), kind="bad"), "", "", ""

    def on_inspect(key: str, base: str, request: gr.Request) -> tuple[str, str]:
        """Reads a LoRA file whole: modules, hashes, all metadata, and how its keys match a base."""
        try:
            return actions.inspect(studio, key, base, _language(request))
        except UserError as problem:
            return message(actions.clean(str(problem)), kind="bad"), ""

    def on_card(event: gr.EventData) -> Any:
        data = getattr(event, "_data", None)  # a direct post may come without, or with anything
        key = data.get("key") if isinstance(data, dict) else None
        return key if isinstance(key, str) and re.fullmatch("[0-9a-f]{16}", key) else gr.update()

    filters = [parts.what, parts.search, parts.family, parts.order]
    listed = [parts.cards, parts.page, parts.chosen, parts.status]
    parts.refresh.click(on_list, [*filters, parts.page], listed, api_name="library_list", **QUIET)
    changes: list[Any] = [parts.what.change, parts.search.change, parts.family.change, parts.order.change]

    def on_filter(what: str, search: str, family: str, order: str, request: gr.Request) -> tuple[str, Any]:
        try:
            shown, at, last = actions.shelf_of(roots, what, search, family, order, 1, _language(request))
        except UserError as problem:
            return message(str(problem), kind="bad"), gr.update()
        return shown, gr.update(value=at, maximum=last)

    gr.on(changes, on_filter, filters, listed[:2], trigger_mode="always_last", api_visibility="private", **QUIET)
    parts.page.submit(on_list, [*filters, parts.page], listed, api_visibility="private", **QUIET)
    for button, by in ((parts.back, -1), (parts.next, 1)):
        turned = button.click(
            functools.partial(actions.turned, by=by), parts.page, parts.page, queue=False, api_visibility="private", **QUIET
        )  # fmt: skip
        turned.then(on_list, [*filters, parts.page], listed, api_visibility="private", **QUIET)
    demo.load(on_list, [*filters, parts.page], listed, api_visibility="private", **QUIET)
    known = [parts.detail, parts.notes, parts.inside, parts.name]
    parts.chosen.change(on_look, parts.chosen, known, api_name="library_look", **QUIET)
    parts.cards.click(on_card, outputs=parts.chosen, queue=False, api_visibility="private", **QUIET)
    parts.do_inspect.click(
        on_inspect, [parts.chosen, parts.base], [parts.status, parts.inside], api_name="library_inspect", **WORK, **QUIET
    )


def _changing(roots: Roots, parts: Parts) -> None:
    def on_notes(key: str, notes: str, request: gr.Request) -> str:
        """Keeps notes beside a LoRA file."""
        language = _language(request)
        return actions.said(language, lambda: actions.keep_notes(roots, key, notes, language))

    def on_rename(key: str, name: str, request: gr.Request) -> str:
        """Renames a LoRA file, or copies a run's under the name."""
        language = _language(request)
        return actions.said(language, lambda: actions.rename(roots, key, name, language))

    def on_delete(key: str, sure: bool, request: gr.Request) -> tuple[str, bool, Any]:
        """Moves a LoRA file or a run to the trash folder."""
        language = _language(request)
        try:
            return message(actions.delete(roots, key, sure, language), kind="good"), False, None  # what is gone is chosen no more
        except UserError as problem:
            return message(actions.clean(str(problem)), kind="bad"), False, gr.skip()

    def on_import(upload: str | None, name: str, request: gr.Request) -> str:
        """Checks an uploaded LoRA file and keeps it."""
        language = _language(request)
        return actions.said(language, lambda: actions.take_in(roots, upload, name, language))

    def on_share(key: str, licence: str, prompts: bool, request: gr.Request) -> tuple[str, Any]:
        """Makes a share pack of a run: the LoRA, a card and pictures as a zip."""
        try:
            said, archive = actions.share_pack(roots, key, licence, prompts, _language(request))
        except UserError as problem:
            return message(actions.clean(str(problem)), kind="bad"), gr.update(value=None, visible=False)
        return message(said, kind="good"), gr.update(value=str(archive.resolve()), visible=True)

    status = parts.status
    parts.save_notes.click(on_notes, [parts.chosen, parts.notes], status, api_name="library_notes", **QUIET)
    parts.share.click(
        on_share, [parts.chosen, parts.licence, parts.prompts], [status, parts.pack], api_name="library_share", **WORK, **QUIET
    )  # fmt: skip
    for event in (
        parts.rename.click(on_rename, [parts.chosen, parts.name], status, api_name="library_rename", **WORK, **QUIET),
        parts.delete.click(on_delete, [parts.chosen, parts.sure], [status, parts.sure, parts.chosen], api_name="library_delete", **QUIET),
        parts.do_import.click(on_import, [parts.upload, parts.import_name], status, api_name="library_import", **WORK, **QUIET),
    ):
        _list_again(roots, parts, event)


def _list_again(roots: Roots, parts: Parts, event: Any) -> None:
    """After a file came, went or changed its name the cards are drawn anew; the status line stays."""

    def on_change(what: str, search: str, family: str, order: str, page: float, request: gr.Request) -> tuple[Any, Any]:
        language = _language(request)
        try:
            shown, _, _ = actions.shelf_of(roots, what, search, family, order, page, language)
        except UserError:
            return gr.update(), gr.update()
        return shown, gr.update(choices=actions.choices_of(roots, language))

    filters = [parts.what, parts.search, parts.family, parts.order, parts.page]
    event.then(on_change, filters, [parts.cards, parts.chosen], api_visibility="private", **QUIET)


def _making(roots: Roots, studio: Studio, parts: Parts) -> None:
    def on_resize(key: str, name: str, limit: str, amount: float, base: str, request: gr.Request) -> Iterator[str]:
        """Writes a LoRA at a smaller rank as a new file."""
        language = _language(request)
        yield from _lines(actions.resize(studio, key, name, limit, amount, base, language), language)

    def on_convert(key: str, name: str, to: str, request: gr.Request) -> Iterator[str]:
        """Writes a LoRA in another layout as a new file."""
        language = _language(request)
        yield from _lines(actions.convert(roots, key, name, to, language), language)

    sized = [parts.chosen, parts.made_name, parts.limit, parts.amount, parts.base]
    laid = [parts.chosen, parts.made_name, parts.layout]
    _list_again(roots, parts, parts.resize.click(on_resize, sized, parts.status, api_name="library_resize", **WORK, **QUIET))
    _list_again(roots, parts, parts.convert.click(on_convert, laid, parts.status, api_name="library_convert", **WORK, **QUIET))


def _merging(roots: Roots, studio: Studio, parts: Parts) -> None:
    desk = Desk()
    recipe = [parts.method, parts.rank, parts.draw_base, *parts.parts, *parts.weights]

    def on_focus() -> list[Any]:
        choices = [("-", ""), *lora_shelf.choices_of(roots)]
        return [gr.update(choices=choices) for _ in parts.parts]

    def on_merge(name: str, request: gr.Request, *values: Any) -> Iterator[str]:
        """Merges LoRAs into a new file."""
        language = _language(request)
        yield from _lines(library_merge.merge(studio, name, language, *values), language)

    def on_preview(prompt: str, seed: float, request: gr.Request, *values: Any) -> Iterator[tuple[str, Any, Any]]:
        """Draws a merge beside its parts."""
        language = _language(request)
        ended = gr.update(interactive=False)
        try:
            wanted = library_merge.recipe_of(studio, *values)
            states = side_work.run(
                desk, str(request.session_hash),
                lambda stop: library_merge.preview(studio, wanted, prompt or "", seed, language, stop),
            )  # fmt: skip
            for said, row in states:
                yield said, gr.update() if row is None else gr.update(value=row, visible=True), gr.update(interactive=True)
            yield said, gr.update(), ended
        except UserError as problem:
            yield message(actions.clean(str(problem)), kind="bad"), gr.update(), ended

    def on_stop(request: gr.Request) -> str:
        """Stops this browser's preview."""
        found = side_work.stop(desk, str(request.session_hash))
        return message(words.say("library.stopping" if found else "library.nothing_runs", _language(request)))

    for slot in parts.parts:
        slot.focus(on_focus, outputs=parts.parts, queue=False, api_visibility="private", **QUIET)
    merged = parts.merge.click(on_merge, [parts.merge_name, *recipe], parts.merge_status, api_name="library_merge", **WORK, **QUIET)
    _list_again(roots, parts, merged)
    shown = [parts.merge_status, parts.row, parts.stop]
    parts.preview.click(on_preview, [parts.prompt, parts.seed, *recipe], shown, api_name="library_merge_preview", **GPU, **QUIET)
    parts.stop.click(on_stop, outputs=parts.merge_status, queue=False, api_name="library_stop", **QUIET)
