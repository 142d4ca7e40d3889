"""The page on which LoRAs are trained: drop pictures, give a name and a trigger word, press Train; below it what trains now.

`layout` says what is seen, `wire` which press leads to what. The pictures' part is in `captions_page`, the training's in `watch_page`. All
presses are API endpoints too; from a program, for example:

    client = gradio_client.Client("http://127.0.0.1:7860")
    set_id, _ = client.predict([handle_file("1.png"), handle_file("2.png")], "", api_name="/train_pictures")
    client.predict(set_id, "my-dragon", "zup", "character", changes="steps = 300", api_name="/train_start")
    client.predict("", api_name="/watch_job")
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio.events import api

from sdlora.errors import UserError
from sdlora.jobs import Jobs
from sdlora.ui import captions_page, gallery, lora_shelf, watch_page, words
from sdlora.ui import roots as places
from sdlora.ui import train_actions as actions
from sdlora.ui import train_settings as settings
from sdlora.ui.generate_actions import message
from sdlora.ui.roots import Roots
from sdlora.ui.train_parts import Parts, layout

__all__ = ["CSS", "Parts", "layout", "wire"]

Refresh = Callable[[gr.events.Dependency], None]
QUIET: dict[str, Any] = {"show_progress": "hidden"}
PRIVATE: dict[str, Any] = QUIET | {"api_visibility": "private"}
CSS = (
    watch_page.CSS
    + """
#train-drop { min-height: 150px; }
#train-status, #train-check, #train-forecast, #train-cards { padding: 0 !important; }
:is(#train-status, #train-check, #train-forecast, #train-cards) > * { padding: 0 !important; }
#train-text textarea, #train-text .cm-content { font-size: 0.8rem; }
.train-step { margin: 6px 0 -6px; overflow: visible !important; } .train-step p { font-weight: 600; color: var(--body-text-color); }
.train-help, .train-help p { font-size: 0.82rem; color: var(--body-text-color-subdued); margin-top: 0; }
#train-measure { margin-top: -8px; }
"""
)
# The browser keeps its own token (the one that Generate made, too), which set of pictures it was at, and what it is to be called.
REMEMBERED = """() => {
  let token = "", set = "", form = [];
  try {
    token = localStorage.getItem("sdlora-token") || "";
    if (token.length < 32) {
      token = Array.from(crypto.getRandomValues(new Uint8Array(24)), (byte) => byte.toString(16).padStart(2, "0")).join("");
      localStorage.setItem("sdlora-token", token);
    }
    set = localStorage.getItem("sdlora-set") || "";
    form = JSON.parse(localStorage.getItem("sdlora-form") || "[]");
  } catch { /* a browser that keeps nothing: its trainings are the session's */ }
  const [name, trigger, kind] = Array.isArray(form) && form.length === 3 ? form : ["", "", "style"];
  return [token, set, name, trigger, kind];
}"""
KEEP = """(set) => { try { localStorage.setItem("sdlora-set", set || ""); } catch { /* as above */ } }"""
KEEP_FORM = """(...form) => { try { localStorage.setItem("sdlora-form", JSON.stringify(form)); } catch { /* as above */ } }"""
# What was written meanwhile by hand is not replaced by an answer that comes late.
UNLESS_EDITED = """(fresh, text, shown) => (text || "") === (shown || "") ? [fresh, fresh] : [text, shown]"""
TO_WATCH = """() => { document.querySelector("#watch-title").scrollIntoView({ behavior: "smooth" }); }"""


def wire(roots: Roots, jobs: Jobs, parts: Parts, demo: gr.Blocks, is_free: Callable[[], bool] = lambda: True) -> gr.events.Dependency:
    """Says what each press does.

    Args:
        is_free: whether a trial would be alone on the device.

    Returns:
        The event of "Draw with it": with `.then` and `parts.watch.setting`, Generate takes it over as it does from Compare.
    """
    about = captions_page.About(parts.key, parts.trigger, parts.kind, parts.base, parts.changes, parts.status)
    look = captions_page.wire(roots, parts.captions, about)
    on_watch, watched, used = watch_page.wire(roots, jobs, parts.watch, parts.token, demo)
    refresh = _wire_settings(roots, parts)
    _wire_pictures(roots, parts, look, refresh)
    leave = _wire_forecast(roots, parts, demo, is_free)
    form = [parts.name, parts.trigger, parts.kind, parts.base]

    def on_start(
        request: gr.Request, set_id: str, name: str = "", trigger: str = "", kind: str = "style", base: str = "mini", changes: str = "",
        text: str = "", shown: str = "", token: str = "", cards: Any = None,
    ) -> tuple[str, Any]:  # fmt: skip
        """Puts a training in line: the set's id, name, trigger word, kind, base, changed settings as TOML; gives the training's id."""
        language, owner = words.language_of(request.headers), gallery.owner_of(token, str(request.session_hash))
        try:
            words_of_form, changed = settings.absorbed(
                text, shown, settings.form_of(name, trigger, kind, base), settings.changes_of(changes)
            )  # fmt: skip
            actions.check_seen(roots, set_id, cards)
            folder = actions.start(roots, jobs, set_id, words_of_form, changed, owner)
            leave(request)
        except UserError as problem:
            return message(str(problem), kind="bad"), gr.skip()
        job = places.key_of(roots.runs, folder)
        told = "waits" if actions.waits(jobs, folder) else "started"
        return message(words.say(f"train.{told}", language, name=folder.name), kind="good"), job

    def on_started(request: gr.Request, job: str, status: str) -> list[Any]:
        found: list[Any] = on_watch(request, job if 'class="message good"' in (status or "") else "", None)
        return found

    def on_load(request: gr.Request) -> tuple[Any, Any]:
        return gr.update(choices=actions.folder_choices(roots)), gr.update(choices=lora_shelf.bases_of(roots))

    def on_ready(request: gr.Request, set_id: str) -> str:
        return "" if set_id else message(words.say("train.ready", words.language_of(request.headers)))

    everything = [parts.key, *form, parts.changes, parts.text, parts.shown, parts.token, parts.captions.cards]
    started = parts.go.click(on_start, everything, [parts.status, parts.watch.job], api_name="train_start", **QUIET)
    seen = started.then(on_started, [parts.watch.job, parts.status], watched, **PRIVATE)
    seen.then(**look)
    seen.then(None, parts.status, js=f"(said) => {{ if ((said || '').includes('good')) ({TO_WATCH})(); }}", api_visibility="private")
    demo.load(on_load, outputs=[parts.folder, parts.base], **PRIVATE)
    remembered = demo.load(None, outputs=[parts.token, parts.key, parts.name, parts.trigger, parts.kind], js=REMEMBERED, **PRIVATE)
    refresh(remembered.then(on_ready, parts.key, parts.status, **PRIVATE).then(**look))
    listeners: list[Any] = [parts.name.blur, parts.trigger.blur, parts.kind.input]
    for listen in listeners:
        listen(None, [parts.name, parts.trigger, parts.kind], js=KEEP_FORM, **PRIVATE)
    return used


def _wire_pictures(roots: Roots, parts: Parts, look: dict[str, Any], refresh: Refresh) -> None:
    def on_pictures(request: gr.Request, files: list[str], set_id: str = "") -> tuple[Any, str]:
        """Checks pictures (and text files with their captions) and adds them to a set, a new one if none is named; gives the set's id."""
        try:
            return actions.drop(roots, set_id, files or [], words.language_of(request.headers))
        except UserError as problem:
            return gr.skip(), message(str(problem), kind="bad")

    def on_folder(request: gr.Request, folder: str) -> tuple[Any, str]:
        """Copies a listed folder of the data root into a new set, by the folder's id; gives the set's id."""
        try:
            return actions.choose(roots, folder, words.language_of(request.headers))
        except UserError as problem:
            return gr.skip(), message(str(problem), kind="bad")

    def on_clear(request: gr.Request) -> tuple[str, None, str]:
        return "", None, message(words.say("train.cleared", words.language_of(request.headers)))

    shown = [parts.key, parts.status]
    dropped = parts.drop.upload(on_pictures, [parts.drop, parts.key], shown, api_name="train_pictures", **QUIET)
    dropped.then(lambda: None, outputs=parts.drop, **PRIVATE)
    chosen = parts.folder.input(on_folder, parts.folder, shown, api_name="train_folder", **QUIET)
    cleared = parts.clear.click(on_clear, outputs=[parts.key, parts.folder, parts.status], **PRIVATE)
    for one in (dropped, chosen, cleared):
        refresh(one.then(**look))
    listeners: list[Any] = [parts.trigger.blur, parts.kind.input, parts.base.input, parts.changes.change]
    for listen in listeners:
        listen(**look)
    parts.key.change(None, parts.key, js=KEEP, **PRIVATE)
    parts.key.change(lambda key: gr.update(visible=bool(key)), parts.key, parts.clear, queue=False, **PRIVATE)


def _wire_settings(roots: Roots, parts: Parts) -> Refresh:
    """The form and the text of all settings follow each other.

    Returns:
        What writes the text anew after an event.
    """
    form = [parts.name, parts.trigger, parts.kind, parts.base]

    def on_settings(
        request: gr.Request, set_id: str = "", name: str = "", trigger: str = "", kind: str = "style", base: str = "mini",
        changes: str = "", text: str = "", shown: str = "",
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """Gives all settings of a run as TOML, with the reasons for those that follow from others."""
        try:
            told = settings.form_of(name, trigger, kind, base)
            _, changed = settings.absorbed(text, shown, told, settings.changes_of(changes))
            found = settings.text_of(roots, told, changed, actions.folder_of(roots, set_id))
        except UserError as problem:
            return gr.skip(), gr.skip(), message(str(problem), kind="bad")
        return found, settings.changes_text(changed), gr.skip()

    def on_text(
        request: gr.Request, text: str, shown: str = "", set_id: str = "", name: str = "", trigger: str = "", kind: str = "style",
        base: str = "mini", changes: str = "",
    ) -> tuple[Any, ...]:  # fmt: skip
        """Reads edited settings: gives the form's words and what was changed, or says what is wrong with the text."""
        try:
            told, changed = settings.absorbed(
                text if isinstance(text, str) else "", shown, settings.form_of(name, trigger, kind, base), settings.changes_of(changes)
            )  # fmt: skip
            settings.run_of(roots, told, changed, actions.folder_of(roots, set_id), named=False)
        except UserError as problem:
            return *(gr.skip() for _ in range(5)), gr.skip(), message(str(problem), kind="bad")
        return told.name, told.trigger, told.kind, told.base, settings.changes_text(changed), text, gr.skip()

    everything = [parts.key, *form, parts.changes, parts.text, parts.shown]
    outputs = [parts.fresh, parts.changes, parts.status]

    def written(event: gr.events.Dependency) -> None:
        event.then(None, [parts.fresh, parts.text, parts.shown], [parts.text, parts.shown], js=UNLESS_EDITED, **PRIVATE)

    def refresh(after: gr.events.Dependency) -> None:
        written(after.then(on_settings, everything, outputs, **PRIVATE))

    read = parts.text.blur(
        on_text, [parts.text, parts.shown, parts.key, *form, parts.changes], [*form, parts.changes, parts.shown, parts.status],
        api_name="train_settings_read", **QUIET,
    )  # fmt: skip
    refresh(read)
    mended: dict[str, Any] = {"fn": _mended, "inputs": [parts.status, parts.text, parts.shown], "outputs": parts.status, "queue": False}
    read.then(**mended, **PRIVATE)
    written(parts.kind.input(on_settings, everything, outputs, api_name="train_settings", **QUIET))
    for field in (parts.name, parts.trigger):  # a complaint about a field goes when the field is mended
        field.input(**mended, **PRIVATE)
    for listen in (parts.name.blur, parts.trigger.blur, parts.base.input, parts.key.change):
        written(listen(on_settings, everything, outputs, **PRIVATE))
    return refresh


def _wire_forecast(roots: Roots, parts: Parts, demo: gr.Blocks, is_free: Callable[[], bool]) -> Callable[[gr.Request], None]:
    """What a run will take stands there without being asked for: counted at once, and the time as soon as a trial has measured it.

    Returns:
        Ends a session's trial, since what it has the device for begins.
    """
    form = [parts.name, parts.trigger, parts.kind, parts.base]
    newest: dict[str, object] = {}  # each session's last question; a trial for one before it ends
    trying = threading.Lock()  # two trials at once would measure each other

    def leave(request: gr.Request) -> None:
        newest.pop(str(request.session_hash), None)

    def forecast(request: gr.Request, measure: bool, set_id: str, *told: str) -> Iterator[str]:
        """Says what a training would take: counted at once, then measured, until the session asks for something else."""
        language, session, mine = words.language_of(request.headers), str(request.session_hash), object()
        newest[session] = mine
        if not set_id:
            yield ""
            return

        def wanted() -> bool:
            return newest.get(session) is mine

        try:
            asked = roots, set_id, settings.form_of(*told[:-1]), settings.changes_of(told[-1]), language
            counted = actions.counted(*asked)
            if wanted():
                yield counted if measure else counted + message(words.say("train.forecast_waits", language), kind="calm")
            while measure and wanted():
                if trying.acquire(timeout=0.2):
                    try:
                        yield from _measured(actions.measured(*asked, wanted), counted, language)
                    finally:
                        trying.release()
                    return
        except UserError as problem:
            yield message(str(problem), kind="bad")

    def on_forecast(
        request: gr.Request, set_id: str, name: str = "", trigger: str = "", kind: str = "style", base: str = "mini", changes: str = ""
    ) -> Iterator[str]:
        """Counts what a run will take: steps, memory, disk."""
        yield from forecast(request, False, set_id, name, trigger, kind, base, changes)

    def on_measure(
        request: gr.Request, set_id: str, name: str = "", trigger: str = "", kind: str = "style", base: str = "mini", changes: str = ""
    ) -> Iterator[str]:
        """Tries a few steps and says what a run will take: time, memory, disk."""
        yield from forecast(request, True, set_id, name, trigger, kind, base, changes)

    def on_change(
        request: gr.Request, set_id: str, name: str = "", trigger: str = "", kind: str = "style", base: str = "mini", changes: str = ""
    ) -> Iterator[str]:
        yield from forecast(request, is_free(), set_id, name, trigger, kind, base, changes)

    told: dict[str, Any] = {"inputs": [parts.key, *form, parts.changes], "outputs": parts.forecast, "concurrency_limit": None, **QUIET}
    changing = [parts.key.change, parts.changes.change, parts.kind.input, parts.base.input]
    gr.on(changing, on_change, trigger_mode="multiple", api_visibility="private", **told)
    parts.measure.click(on_measure, trigger_mode="multiple", api_name="train_measure", **told)
    api(on_forecast, api_name="train_forecast")
    demo.unload(leave)
    return leave


def _measured(work: Iterator[tuple[int, int] | str], counted: str, language: str) -> Iterator[str]:
    """How far a trial is, below what was counted, and at the end what it has measured."""
    for one in work:
        if isinstance(one, str):
            yield one
        else:
            say = words.say("train.measuring", language, done=one[0], total=one[1])
            yield counted + message(say, kind="busy", share=one[0] / max(1, one[1]))


def _mended(status: str, text: str, shown: str) -> Any:
    """Takes away a complaint, unless it may be about settings that still stand there unread; anything else that was said stays."""
    return "" if 'class="message bad"' in (status or "") and (text or "") == (shown or "") else gr.skip()
