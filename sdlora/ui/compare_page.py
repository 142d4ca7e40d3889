"""The page of sheets: LoRAs, checkpoints, strengths and prompts side by side, filled in while one looks.

`layout` says what is seen, `wire` which press leads to which function of `compare_actions` and `compare_cells`. Drawing waits in the one
queue that everything has which uses the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from sdlora import generate, sheets
from sdlora.errors import UserError
from sdlora.generate import Request
from sdlora.ui import compare_actions as actions
from sdlora.ui import compare_cells as cells
from sdlora.ui import compare_prompts, lora_shelf, side_work, words
from sdlora.ui.generate_actions import message
from sdlora.ui.roots import Roots
from sdlora.ui.side_work import Desk
from sdlora.ui.studio import Studio

PROMPTS = "\n".join(compare_prompts.PLAIN)
MANY = 6  # files of a run that stand beside each other
QUIET: dict[str, Any] = {"show_progress": "hidden"}
GPU: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1}
CSS = """
#compare-welcome .welcome { text-align: center; }
#compare-sheet img { object-fit: contain; cursor: pointer; }
@media (max-width: 700px) {
  #compare-sheet .image-frame { overflow-x: auto; justify-content: flex-start; }
  #compare-sheet .image-frame img { min-width: 760px; }
}
#compare-stop:disabled { background: var(--border-color-primary); color: var(--body-text-color-subdued); opacity: 1; }
#compare-status, #compare-status > *, #compare-welcome, #compare-welcome > * { padding: 0 !important; }
"""


@dataclass
class Parts:
    """The page's controls."""

    loras: gr.Dropdown
    run: gr.Dropdown
    refresh: gr.Button
    strengths: gr.Textbox
    prompts: gr.Textbox
    rows: gr.Radio
    base: gr.Dropdown
    negative: gr.Textbox
    seed: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    sampler: gr.Dropdown
    side: gr.Number
    go: gr.Button
    stop: gr.Button
    status: gr.HTML
    welcome: gr.HTML
    sheet: gr.Image
    cell: gr.Dropdown
    use: gr.Button
    best: gr.Button
    file: gr.DownloadButton
    setting: gr.JSON
    shown: gr.State
    put: gr.Textbox
    proposed: gr.Textbox


def layout(roots: Roots, studio: Studio, *, base: str = "mini") -> Parts:
    """Everything that is seen, to be called inside a `gr.Blocks`.

    Args:
        base: what is chosen to begin with.
    """
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            made = _choices(roots)
            with gr.Row(elem_id="compare-buttons"):
                made["go"] = gr.Button(words.label("compare.go"), variant="primary", size="lg", scale=3, elem_id="compare-go")
                made["stop"] = gr.Button(
                    words.label("compare.stop"), variant="stop", size="lg", scale=1, min_width=90, interactive=False, elem_id="compare-stop"
                )  # fmt: skip
            made |= _settings(roots, base)
        with gr.Column(scale=7, min_width=320):
            made |= _results()
    return Parts(**made)


def _choices(roots: Roots) -> dict[str, Any]:
    """What is compared."""
    made: dict[str, Any] = {}
    made["loras"] = _list("loras", lora_shelf.choices_of(roots), multiselect=True, value=[])
    made["run"] = _list("run", lora_shelf.runs_with_loras(roots), value=None)
    made["refresh"] = gr.Button(words.label("compare.refresh"), size="sm", elem_id="compare-refresh", elem_classes="flat")
    made["strengths"] = gr.Textbox(
        "0.5, 1",
        label=words.label("compare.strengths"),
        info=words.label("compare.strengths_info"),
        max_lines=1,
        elem_id="compare-strengths",
    )
    made["prompts"] = gr.Textbox(
        PROMPTS, label=words.label("compare.prompts"), info=words.label("compare.prompts_info"), lines=3, max_lines=12,
        elem_id="compare-prompts",
    )  # fmt: skip
    for name in ("put", "proposed"):  # what the page itself has put into the prompts, and what it would put there now
        made[name] = gr.Textbox(PROMPTS, label=name, visible="hidden", elem_id=f"compare-{name}")
    made["rows"] = gr.Radio(
        [(words.label(f"compare.row_{name}"), name) for name in sheets.AXES], value="prompt", label=words.label("compare.rows"),
        info=words.label("compare.rows_info"), elem_id="compare-rows",
    )  # fmt: skip
    return made


def _list(name: str, choices: list[tuple[str, str]], **options: Any) -> gr.Dropdown:
    """A list whose choices change while the page is open: what is not in it any more is refused below with a sentence, not by the list."""
    return gr.Dropdown(
        choices, label=words.label(f"compare.{name}"), info=words.label(f"compare.{name}_info"), allow_custom_value=True,
        elem_id=f"compare-{name}", **options,
    )  # fmt: skip


def _settings(roots: Roots, base: str) -> dict[str, Any]:
    """What has good defaults, folded away."""
    plain = Request("")
    made: dict[str, Any] = {}
    with gr.Accordion(words.label("compare.more"), open=False, elem_id="compare-more"):
        made["base"] = _list("base", lora_shelf.bases_of(roots), value=base)

        def text(name: str) -> dict[str, Any]:
            return {
                "label": words.label(f"compare.{name}"), "info": words.label(f"compare.{name}_info"), "elem_id": f"compare-{name}",
            }  # fmt: skip

        made["negative"] = gr.Textbox(lines=1, **text("negative"))
        with gr.Row():
            made["seed"] = gr.Number(plain.seed, precision=0, min_width=130, **text("seed"))
            made["side"] = gr.Number(0, precision=0, min_width=130, **text("side"))
        made["steps"] = gr.Slider(1, 100, plain.steps, step=1, **text("steps"))
        made["guidance"] = gr.Slider(1, 15, plain.guidance, step=0.5, **text("guidance"))
        made["sampler"] = gr.Dropdown(list(generate.SAMPLERS), value=plain.sampler, **text("sampler"))
    return made


def _results() -> dict[str, Any]:
    """The line that says how far it is, the sheet, and what can be done with a cell."""
    made: dict[str, Any] = {"status": gr.HTML(elem_id="compare-status", padding=False), "shown": gr.State()}
    made["welcome"] = gr.HTML(_welcome("en"), elem_id="compare-welcome", padding=False)
    made["sheet"] = gr.Image(
        label=words.label("compare.sheet"), show_label=False, format="png", type="filepath", interactive=False, buttons=["fullscreen"],
        visible=False, height="auto", alt_text="sheet", elem_id="compare-sheet",
    )  # fmt: skip
    made["cell"] = _list("cell", [], value=None)
    with gr.Row():
        made["use"] = gr.Button(words.label("compare.use"), variant="primary", interactive=False, min_width=120, elem_id="compare-use")
        made["best"] = gr.Button(words.label("compare.best"), interactive=False, min_width=120, elem_id="compare-best")
        made["file"] = gr.DownloadButton(words.label("compare.download"), interactive=False, min_width=120, elem_id="compare-file")
    made["setting"] = gr.JSON(visible="hidden", label="setting", elem_id="compare-setting")
    return made


def _welcome(language: str) -> str:
    return f'<div class="welcome">{words.say("compare.welcome", language)}</div>'


def wire(roots: Roots, studio: Studio, parts: Parts, demo: gr.Blocks) -> gr.events.Dependency:
    """Says what each press does.

    Returns:
        The event of "Use this one": with `.then` and `parts.setting`, see `compare_cells.setting_of`, Generate takes it over.
    """
    _listing(roots, parts, demo)
    _proposing(roots, parts)
    _drawing(roots, studio, parts)
    return _choosing(roots, parts)


def _listing(roots: Roots, parts: Parts, demo: gr.Blocks) -> None:
    def on_refresh(request: gr.Request) -> tuple[Any, Any, Any, str]:
        """Looks again which LoRA files, runs and bases there are."""
        found, language = lora_shelf.choices_of(roots), words.language_of(request.headers)
        said = message(words.say("compare.found", language, count=len(found)))
        runs, bases = lora_shelf.runs_with_loras(roots), lora_shelf.bases_of(roots)
        return gr.update(choices=found), gr.update(choices=runs), gr.update(choices=bases), said

    def on_run(key: str, request: gr.Request) -> tuple[Any, str, Any]:
        """Chooses all checkpoints of a run; many stand below each other, as so many columns would be too narrow to see anything."""
        language = words.language_of(request.headers)
        try:
            name, keys = cells.checkpoints_of(roots, key)
        except UserError as problem:
            return gr.update(), message(str(problem), kind="bad"), gr.update()
        if not keys:
            return gr.update(), message(words.say("compare.no_checkpoints", language, run=name), kind="bad"), gr.update()
        said = words.say("compare.checkpoints", language, count=len(keys), run=name)
        rows = gr.update(value="checkpoint") if len(keys) > MANY else gr.update()
        return gr.update(choices=lora_shelf.choices_of(roots), value=keys), message(said), rows

    def on_load(request: gr.Request) -> tuple[Any, ...]:
        *updates, said = on_refresh(request)
        return (*updates, said, _welcome(words.language_of(request.headers)))

    lists = [parts.loras, parts.run, parts.base, parts.status]
    parts.refresh.click(on_refresh, outputs=lists, api_name="compare_refresh", **QUIET)
    parts.run.input(on_run, parts.run, [parts.loras, parts.status, parts.rows], api_name="compare_checkpoints", **QUIET)
    demo.load(on_load, outputs=[*lists, parts.welcome], api_visibility="private", **QUIET)


def _proposing(roots: Roots, parts: Parts) -> None:
    def on_loras(keys: list[str] | None) -> str:
        """Proposes prompts for LoRAs: what their runs have drawn, or the trigger word with something plain."""
        return compare_prompts.proposed(roots, keys)

    found = parts.loras.change(on_loras, parts.loras, parts.proposed, api_name="compare_prompts", trigger_mode="always_last", **QUIET)
    kept = [parts.prompts, parts.put]
    found.then(None, [*kept, parts.proposed], kept, js=compare_prompts.KEEP_JS, api_visibility="private", **QUIET)


def _drawing(roots: Roots, studio: Studio, parts: Parts) -> None:
    desk = Desk()
    inputs = [
        parts.base, parts.loras, parts.strengths, parts.prompts, parts.rows, parts.negative, parts.seed, parts.steps, parts.guidance,
        parts.sampler, parts.side,
    ]  # fmt: skip
    changing = {name: getattr(parts, name) for name in (
        "status", "go", "stop", "welcome", "sheet", "shown", "cell", "file", "use", "best",
    )}  # fmt: skip

    def on_draw(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """Draws a sheet and saves it as PNG; the cells fill in one by one."""
        language = words.language_of(request.headers)
        for changes in actions.draw_sheet(roots, studio, desk, str(request.session_hash), language, *values):
            yield {changing[name]: change for name, change in changes.items()}

    def on_stop(request: gr.Request) -> str:
        """Stops this browser's sheet after the step that it is in; what is drawn stays."""
        language = words.language_of(request.headers)
        found = side_work.stop(desk, str(request.session_hash))
        return message(words.say("compare.stopping" if found else "compare.nothing_runs", language))

    parts.go.click(on_draw, inputs, list(changing.values()), api_name="compare_draw", **GPU, **QUIET)
    parts.stop.click(on_stop, outputs=parts.status, queue=False, api_name="compare_stop", **QUIET)


def _choosing(roots: Roots, parts: Parts) -> gr.events.Dependency:
    def on_pick(shown: cells.Shown | None, event: gr.SelectData) -> Any:
        match getattr(event, "index", None):  # a direct post may come without, or with anything
            case [int() | float() as x, int() | float() as y]:
                return cells.cell_at(shown, x, y) or gr.update()
        return gr.update()

    def on_best(shown: cells.Shown | None, key: str, request: gr.Request) -> str:
        """Keeps a cell's checkpoint and strength as the best of its run."""
        try:
            return message(cells.mark_best(roots, shown, key, words.language_of(request.headers)), kind="good")
        except UserError as problem:
            return message(str(problem), kind="bad")

    def on_use(shown: cells.Shown | None, key: str, request: gr.Request) -> tuple[Any, str]:
        """Gives the setting of a cell of this browser's sheet: base, LoRA id, strength, prompt, seed and the rest."""
        try:
            setting = cells.setting_of(shown, key)
        except UserError as problem:
            return None, message(str(problem), kind="bad")
        said = f"{setting['prompt']}, seed {setting['seed']}"
        return setting, message(words.say("compare.used", words.language_of(request.headers), setting=said), kind="good")

    parts.sheet.select(on_pick, parts.shown, parts.cell, api_visibility="private", **QUIET)
    parts.best.click(on_best, [parts.shown, parts.cell], parts.status, api_name="compare_best", **QUIET)
    return parts.use.click(on_use, [parts.shown, parts.cell], [parts.setting, parts.status], api_name="compare_use", **QUIET)
