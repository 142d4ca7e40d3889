"""The page's second tab: a folder of pictures is looked at before any time is spent on it, as `sdlora check` does.

Folders are offered by name from one root and looked up on the server, so the page cannot reach any other. Nothing in them is changed.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sdlora import config, contact_sheet, dataset_report
from sdlora import material as materials
from sdlora.dataset_report import Report
from sdlora.errors import UserError
from sdlora.images import SUFFIXES
from sdlora.ui.generate_actions import message

COLOURS = {"stops": "bad", "warns": "busy", "notes": "calm"}


def folders(root: Path) -> list[str]:
    """The folders below the root that hold pictures at any depth, by their path in it."""
    if not root.is_dir():
        return []
    found = (path for path in [root, *root.rglob("*")] if path.is_dir() and not path.name.startswith("."))
    inside = (path for path in found if path.resolve().is_relative_to(root.resolve()))
    return sorted(path.relative_to(root).as_posix() for path in inside if any(one.suffix.lower() in SUFFIXES for one in path.rglob("*")))


def look(root: Path, folder: str, kind: str, trigger: str, resolution: float) -> Iterator[tuple[str, str, Image.Image | None]]:
    """Look was pressed: yields the status line, the findings as HTML, and at the end the contact sheet; all text is escaped."""
    try:
        if folder not in folders(root):
            raise UserError(f"That folder is no longer in {root}; press 'Look again' and choose another.")
        values = {"base": "", "data": str(root / folder), "kind": kind, "trigger": trigger.strip(), "name": "check"}
        run = config.parse(values | {"resolution_px": int(resolution)}, where="The form")
        found = materials.find(run)
        for looked in materials.examined(run, found, grain_px=materials.SD_STEP_PX, resolution_px=int(resolution)):
            if isinstance(looked, Report):
                yield _summary(looked), _findings(looked), _sheet(run, found, looked)
            else:
                yield message(f"Looking at picture {looked[0]} of {looked[1]}", kind="busy", share=looked[0] / max(1, looked[1])), "", None
    except UserError as problem:
        yield message(str(problem), kind="bad"), "", None


def _summary(report: Report) -> str:
    counts = {severity: sum(one.severity == severity for one in report.findings) for severity in dataset_report.SEVERITIES}
    if counts["stops"]:
        return message(f"Findings that must be mended before training: {counts['stops']}.", kind="bad")
    if counts["warns"]:
        return message(f"A run would start. Warnings: {counts['warns']}.", kind="busy")
    return message("Nothing is wrong.", kind="good")


def _findings(report: Report) -> str:
    rows = []
    for line in dataset_report.lines(report, batch=4):
        colour = COLOURS.get(line.partition(":")[0], "plain")
        rows.append(f'<li class="finding {colour}">{html.escape(line)}</li>')
    return f'<ul class="findings">{"".join(rows)}</ul>'


def _sheet(run: config.Config, found: materials.Found, report: Report) -> Image.Image:
    captions = [materials.plain_caption(materials.all_rules(run), sample) for sample in found.samples]
    return contact_sheet.draw(report.items, found.samples, captions, report.findings)


def layout(root: Path) -> None:
    """The controls of the tab, and what they do."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            choice = gr.Dropdown(folders(root), label="Folder of pictures", info=f"Folders in {root}", elem_id="check-folder")
            again = gr.Button("Look again for folders", size="sm", elem_id="check-refresh", elem_classes="flat")
            kind = gr.Radio(["style", "character"], value="style", label="What they have in common", elem_id="check-kind")
            trigger = gr.Textbox(label="Trigger word", info="The word that will call the LoRA", elem_id="check-trigger")
            resolution = gr.Number(512, label="Resolution in px", precision=0, minimum=64, maximum=4096, elem_id="check-resolution")
            go = gr.Button("Look at the pictures", variant="primary", elem_id="check")
        with gr.Column(scale=7, min_width=380):
            status = gr.HTML(message("Choose a folder. Nothing in it is changed."), elem_id="check-status", padding=False)
            findings = gr.HTML(elem_id="check-findings", padding=False)
            sheet = gr.Image(
                label="As they will be trained",
                show_label=False,
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="check-sheet",
            )

    def on_look(*values: Any) -> Iterator[tuple[str, str, Image.Image | None]]:
        yield from look(root, *values)

    def on_again() -> Any:
        return gr.update(choices=folders(root))

    go.click(on_look, [choice, kind, trigger, resolution], [status, findings, sheet], show_progress="hidden", api_name="check")
    again.click(on_again, outputs=choice, queue=False, show_progress="hidden", api_visibility="private")
