"""What a run proves at its end: which checkpoint to use, how strongly and why, the sheet that shows it, and the report.

The run is over: its adapters fall silent, and checkpoints are read back from their files, as every other tool will read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from sdlora import base_model, compare, files, generate, images, lora, report, report_facts, run_folder, samples, validation, verdict
from sdlora.compare import Column
from sdlora.config import Config
from sdlora.events import Event, Proving, Reported, Validated
from sdlora.generate import LoRA, Request
from sdlora.prepare import Prepared
from sdlora.verdict import Verdict

PROMPTS = 3  # rows of the sheet at most
BESIDE = (0.6, 0.8, 1.0)  # strengths of the recommended checkpoint that are shown beside the recommended one
PAIRS = 8  # per forward pass


def proof(run: Config, folder: Path, ready: Prepared) -> Iterator[Event]:
    """Judges the checkpoints, draws the sheet, and writes the report.

    Yields:
        Proving per picture of the sheet, and Reported.

    Raises:
        UserError: if something cannot be written.
    """
    base = ready.base
    base_model.set_training(base, False)
    for part in base.parts.values():
        lora.silence(part)
    found = judged(run, folder, ready)
    sheet = folder / "compare.png" if run.sample_every else None
    if sheet:
        requests = [Request(words, seed=run.seed + i) for i, words in enumerate(samples.prompts(run, ready.data)[:PROMPTS])]
        for item in compare.draw(base, requests, columns(run, folder, found)):
            if isinstance(item, tuple):
                yield Proving(*item)
            else:
                files.write(sheet, images.png_bytes(item))
    path = report.write(folder, verdict=found, sheet=sheet)
    if found is None:
        yield Reported(path, "")
    else:
        yield Reported(path, f"{found.reason} {found.warning}".strip(), run_folder.lora_path(folder, run, found.step), found.strength)


def judged(run: Config, folder: Path, ready: Prepared) -> Verdict | None:
    """The verdict on all checkpoints that were looked at, left in `verdict.json`; None if none was."""
    looks = looked_at(folder)
    saved = {look.step for look in looks if look.step and run_folder.lora_path(folder, run, look.step).is_file()}
    if not ready.exam or not saved:
        return None
    file = run_folder.lora_path(folder, run, verdict.recommended(looks, kind=run.kind, saved=saved))
    generate.load_lora(ready.base, LoRA(file))
    strengths = validation.losses_at_strengths(ready.base, ready.exam, batch=PAIRS)
    found = verdict.verdict(looks, kind=run.kind, strengths=strengths, saved=saved)
    told = asdict(found) | {"path": str(file.relative_to(folder)), "trigger": run.trigger}
    files.write(folder / "verdict.json", json.dumps(told, indent=2, ensure_ascii=False).encode())
    return found


def looked_at(folder: Path) -> list[Validated]:
    """All looks of a run in the order of their steps."""
    looks = {row["step"]: report_facts.look_of(row) for row in run_folder.each_row(folder) if row["event"] == "validated"}
    return [looks[step] for step in sorted(looks)]


def columns(run: Config, folder: Path, found: Verdict | None) -> list[Column]:
    """No LoRA, the recommended checkpoint at several strengths, and the first and the last at the recommended one."""
    best, strength = (found.step, found.strength) if found else (run.steps, 1.0)
    steps = sorted({best, *[*run_folder.checkpoints(folder, run.name)][:1], run.steps})
    across = [Column("no LoRA")]
    for step in steps:
        for value in sorted({strength, *BESIDE}) if step == best else [strength]:
            word = ", best" if found and (step, value) == (best, strength) else ""
            across.append(Column(f"step {step}{word}\nstrength {value:g}", (LoRA(run_folder.lora_path(folder, run, step), value),)))
    return across
