"""The part of the training page that shows what trains now: how far it is, its curves, its pictures, and buttons that reach it.

The page asks the run folder every second and a half; what has not changed is not sent again. A training belongs to no page: it is found
again after a reload, by another browser, and by a page that was started anew.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api

from sdlora.errors import UserError
from sdlora.jobs import Jobs
from sdlora.ui import gallery, watch_buttons, words
from sdlora.ui import watch_actions as actions
from sdlora.ui.generate_actions import message
from sdlora.ui.roots import Roots

POLL_S = 1.5
QUIET: dict[str, Any] = {"show_progress": "hidden"}
PRIVATE: dict[str, Any] = QUIET | {"api_visibility": "private"}
BUTTONS = ("pause", "resume", "stop", "save", "sample", "go_on", "use", "report", "longer", "put_away")
TO_PAPER = """() => { document.querySelector("#watch-paper").scrollIntoView({ behavior: "smooth" }); }"""
CSS = """
#watch-title p { font-size: 1.3rem; font-weight: 700; margin: 18px 0 0; color: var(--body-text-color); }
#watch-head, #watch-curves, #watch-pictures, #watch-status, :is(#watch-head, #watch-curves, #watch-pictures, #watch-status) > * {
  padding: 0 !important; }
#watch-buttons { gap: 8px; flex-wrap: wrap; } #watch-buttons button { flex: 0 1 auto; min-width: 110px; }
.watch-head { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 16px 20px; overflow-wrap: anywhere; }
.watch-head { background: var(--block-background-fill); box-shadow: inset 4px 0 0 var(--border-color-primary); }
.watch-head.busy { box-shadow: inset 4px 0 0 var(--primary-500); } .watch-head.good { box-shadow: inset 4px 0 0 #16a34a; }
.watch-head.bad { box-shadow: inset 4px 0 0 #dc2626; }
.watch-head h2 { margin: 0; font-size: 1.2rem; color: var(--body-text-color); display: flex; gap: 10px; }
.watch-head h2 { align-items: center; flex-wrap: wrap; }
.watch-head .badge { font-size: 0.76rem; font-weight: 500; }
.watch-head p { margin: 6px 0 0; color: var(--body-text-color); }
.watch-head .watch-about { color: var(--body-text-color-subdued); margin: 2px 0 0; }
.watch-facts { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 12px 0 0; }
.watch-facts dt { font-size: 0.76rem; color: var(--body-text-color-subdued); }
.watch-facts dd { margin: 0; font-size: 1.02rem; font-variant-numeric: tabular-nums; color: var(--body-text-color); }
.watch-head .watch-alarm, .watch-verdict .watch-alarm { box-shadow: inset 3px 0 0 #d97706; padding: 4px 10px; }
.watch-verdict { border: 1px solid #16a34a; border-radius: 10px; padding: 12px 16px; margin: 10px 0 0; color: var(--body-text-color); }
.watch-paper { width: 100%; height: 85vh; margin: 10px 0; border-radius: 10px; background: #fff; }
.watch-paper { border: 1px solid var(--border-color-primary); }
#watch-paper, #watch-paper > * { padding: 0 !important; }
.watch-line { margin: 8px 2px 0; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.watch-curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 16px; }
.watch-curves figure { max-width: 640px; }
.watch-curves { --line-0: #2563eb; --line-1: #d55e00; color: var(--body-text-color); }
.dark .watch-curves { --line-0: #7aa7ff; --line-1: #ff9a4d; }
.watch-curves figure { margin: 0; padding: 14px 16px; border: 1px solid var(--border-color-primary); border-radius: 10px; }
.watch-curves figure { background: var(--block-background-fill); }
.watch-curves figcaption { font-size: 0.82rem; color: var(--body-text-color-subdued); margin: 0 0 8px; }
.watch-curves figcaption strong { color: var(--body-text-color); display: block; font-size: 0.95rem; }
.watch-title { margin: 4px 0 8px; font-size: 1.05rem; color: var(--body-text-color); }
.watch-pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 16px; }
.watch-pair { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 10px; background: var(--block-background-fill); }
.watch-two { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; max-width: 540px; }
.watch-two figure { margin: 0; }
.watch-two img, .watch-two .blank { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px; }
.watch-two figcaption { font-size: 0.8rem; text-align: center; color: var(--body-text-color); margin-top: 3px; }
.watch-pair p { margin: 6px 2px 0; font-size: 0.8rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
"""


@dataclass
class Parts:
    """The controls of this part."""

    job: gr.Dropdown
    status: gr.HTML
    head: gr.HTML
    curves: gr.HTML
    pictures: gr.HTML
    setting: gr.JSON
    file: gr.DownloadButton
    timer: gr.Timer
    seen: gr.State
    question: gr.State
    pause: gr.Button
    resume: gr.Button
    stop: gr.Button
    save: gr.Button
    sample: gr.Button
    go_on: gr.Button
    longer: gr.Button
    use: gr.Button
    report: gr.Button
    put_away: gr.Button
    paper: gr.HTML


def layout(roots: Roots, jobs: Jobs) -> Parts:
    """Everything that is seen, to be called inside a `gr.Blocks`."""
    looks: dict[str, Any] = {"resume": "primary", "stop": "stop", "go_on": "primary", "use": "primary"}
    made: dict[str, Any] = {}
    gr.Markdown(words.label("watch.title"), elem_id="watch-title")
    made["job"] = gr.Dropdown(
        [], value=None, allow_custom_value=True, label=words.label("watch.job"), info=words.label("watch.job_info"), elem_id="watch-job",
        visible=False,
    )  # fmt: skip
    made["head"] = gr.HTML(_empty("en"), elem_id="watch-head", padding=False)
    with gr.Row(elem_id="watch-buttons"):
        for one in BUTTONS:
            made[one] = gr.Button(
                words.label(f"watch.{one}"), variant=looks.get(one, "secondary"), visible=False, min_width=110, elem_id=f"watch-{one}"
            )
        made["file"] = gr.DownloadButton(words.label("watch.download"), visible=False, min_width=110, elem_id="watch-file")
    made["status"] = gr.HTML(elem_id="watch-status", padding=False)
    made["paper"] = gr.HTML(elem_id="watch-paper", padding=False)
    made["pictures"] = gr.HTML(elem_id="watch-pictures", padding=False)
    made["curves"] = gr.HTML(elem_id="watch-curves", padding=False)
    made["setting"] = gr.JSON(visible="hidden", label="setting", elem_id="watch-setting")
    made |= {"timer": gr.Timer(POLL_S), "seen": gr.State({}), "question": gr.State("")}
    return Parts(**made)


def _empty(language: str) -> str:
    return message(words.say("watch.empty", language))


def wire(roots: Roots, jobs: Jobs, parts: Parts, token: gr.Textbox, demo: gr.Blocks) -> tuple[Any, list[Any], gr.events.Dependency]:
    """Says what each press does.

    Args:
        token: the browser's own, by which its trainings are known as its.

    Returns:
        The function that looks and its outputs, to be called after another event with a job's id; and the event of "Draw with it".
    """
    look = _wire_looks(roots, jobs, parts)
    _wire_requests(roots, jobs, parts, token, look)
    _wire_report(roots, jobs, parts)
    parts.job.input(lambda: "", outputs=parts.status, queue=False, **PRIVATE)
    demo.load(**look, queue=False, **PRIVATE)
    return look["fn"], look["outputs"], _wire_use(roots, jobs, parts)


def _wire_looks(roots: Roots, jobs: Jobs, parts: Parts) -> dict[str, Any]:
    """The page shows how far the chosen training is.

    Returns:
        What an event's listener takes to look.
    """
    shown = [parts.job, parts.head, parts.curves, parts.pictures, *(getattr(parts, one) for one in BUTTONS), parts.seen, parts.status]

    def on_jobs() -> list[dict[str, Any]]:
        """Lists the trainings that are known: id, name, state; those at work come first, then the line."""
        return actions.rows(roots, jobs)

    def on_job(job: str = "") -> dict[str, Any]:
        """Says how far a training is, by its id; the one that matters most if none is named."""
        try:
            return actions.row(roots, jobs, job or actions.current(roots, jobs))
        except UserError as problem:
            return {"id": str(job), "state": "unknown", "words": actions.clean(str(problem))}

    def on_watch(request: gr.Request, job: str = "", seen: Any = None) -> list[Any]:
        """Shows a training as it is now; what the session has seen already is not sent again."""
        language = words.language_of(request.headers)
        key = job if isinstance(job, str) and job else actions.current(roots, jobs)
        old = seen if isinstance(seen, dict) else {}
        choices = actions.choices(roots, jobs, language)
        view = actions.View(_empty(language), "", "", ())
        if key:
            try:
                view = actions.view(roots, jobs, key, language)
            except UserError as problem:
                view = actions.View(message(str(problem), kind="bad"), "", "", ())
        new = {
            "job": key, "choices": _mark([choices, key]), "head": _mark(view.head), "curves": _mark(view.curves),
            "pictures": _mark(view.pictures), "buttons": _mark(view.buttons),
        }  # fmt: skip
        chosen = key if key in [one for _, one in choices] else None  # a word that is no id is not said back
        values = [
            gr.update(choices=choices, value=chosen, visible=bool(choices)), view.head, view.curves, view.pictures,
            *(gr.update(visible=one in view.buttons) for one in BUTTONS),
        ]  # fmt: skip
        names = ["choices", "head", "curves", "pictures", *["buttons"] * len(BUTTONS)]
        # what was asked for has happened, so that it "will" is said no more
        over = old.get("job") == key and new["buttons"] != old.get("buttons")
        found = (value if new[name] != old.get(name) else gr.skip() for name, value in zip(names, values, strict=True))
        return [*found, new, "" if over else gr.skip()]

    look: dict[str, Any] = {"fn": on_watch, "inputs": [parts.job, parts.seen], "outputs": shown}
    parts.timer.tick(**look, trigger_mode="once", queue=False, **PRIVATE)
    parts.job.input(**look, queue=False, **PRIVATE)
    api(on_jobs, api_name="watch_jobs")
    api(on_job, api_name="watch_job")
    return look


def _wire_requests(roots: Roots, jobs: Jobs, parts: Parts, token: gr.Textbox, look: dict[str, Any]) -> None:
    """Buttons that ask a training for something, or take it off the list."""

    def press(request_name: str) -> Any:
        """What a button does, by the name of its request."""

        def on_press(request: gr.Request, job: str, token: str = "", question: Any = "") -> tuple[str, str]:
            """Asks a training, by its id, to do what the endpoint is called; ending what somebody else started needs a second call."""
            language, owner = words.language_of(request.headers), gallery.owner_of(token, str(request.session_hash))
            try:
                return watch_buttons.press(roots, jobs, job, request_name, owner, question if isinstance(question, str) else "", language)
            except UserError as problem:
                return message(actions.clean(str(problem)), kind="bad"), ""

        return on_press

    def on_put_away(request: gr.Request, job: str) -> tuple[str, Any]:
        """Takes a training that has ended off the list, by its id; its files stay."""
        try:
            return watch_buttons.put_away(roots, jobs, job, words.language_of(request.headers)), None
        except UserError as problem:
            return message(actions.clean(str(problem)), kind="bad"), gr.skip()

    for name in watch_buttons.REQUESTS:
        pressed = getattr(parts, name).click(
            press(name), [parts.job, token, parts.question], [parts.status, parts.question], queue=False, api_name=f"watch_{name}", **QUIET
        )  # fmt: skip
        pressed.then(**look, queue=False, **PRIVATE)
    away = parts.put_away.click(on_put_away, parts.job, [parts.status, parts.job], queue=False, api_name="watch_put_away", **QUIET)
    away.then(**look, queue=False, **PRIVATE)


def _wire_report(roots: Roots, jobs: Jobs, parts: Parts) -> None:
    """The report of a training that has ended, as long as that training is the one that is shown."""

    def on_report(request: gr.Request, job: str) -> tuple[Any, str, str]:
        """Gives the report of a training that has come to its end, as a file, and as what the page shows."""
        try:
            path = watch_buttons.report_of(roots, jobs, job)
        except UserError as problem:
            return gr.skip(), message(actions.clean(str(problem)), kind="bad"), ""
        copy = Path(tempfile.mkdtemp(prefix="sdlora-report-")) / f"{path.parent.name}-report.html"
        shutil.copyfile(path, copy)  # from where it may be served; the run folder may not
        language = words.language_of(request.headers)
        paper = watch_buttons.paper(path, words.say("watch.report", language))
        return gr.update(value=str(copy), visible=True), message(words.say("watch.reported", language), kind="good"), paper

    read = parts.report.click(on_report, parts.job, [parts.file, parts.status, parts.paper], api_name="watch_report", **QUIET)
    read.then(None, js=TO_PAPER, api_visibility="private")
    for one in (parts.job.input, parts.put_away.click):
        one(lambda: ("", gr.update(visible=False)), outputs=[parts.paper, parts.file], queue=False, **PRIVATE)


def _wire_use(roots: Roots, jobs: Jobs, parts: Parts) -> gr.events.Dependency:
    """The event of "Draw with it"."""

    def on_use(request: gr.Request, job: str) -> tuple[Any, str]:
        """Gives what Generate needs to draw with a training's LoRA: base, LoRA id, strength, prompt, seed and the rest."""
        try:
            setting = watch_buttons.setting_of(roots, jobs, job)
        except UserError as problem:
            return None, message(actions.clean(str(problem)), kind="bad")
        return setting, message(words.say("watch.used", words.language_of(request.headers)), kind="good")

    return parts.use.click(on_use, parts.job, [parts.setting, parts.status], api_name="watch_use", **QUIET)


def _mark(value: Any) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]
