"""The report of a run: what to do with the LoRA first, then the proof, then everything else.

It is written for somebody who has never trained a LoRA: one sentence says which file to use and how strongly, the pictures stand before
the curves, and each curve says how it is read. Paths are shown by their last part only, so that the page can be passed on.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import sdlora
from sdlora import files, report_curves, report_facts, report_markdown, report_page, report_settings, run_folder, runs
from sdlora.amounts import counted, duration, size
from sdlora.report_blocks import (
    Block,
    Box,
    Cell,
    Charts,
    Code,
    Details,
    Inline,
    Listed,
    Page,
    Paragraph,
    Picture,
    Section,
    Strip,
    Strong,
    Table,
    Words,
)  # fmt: skip
from sdlora.report_curves import evenly
from sdlora.report_facts import Facts, LoRAPath
from sdlora.verdict import Verdict, still_falls

_STEPS = 8  # pictures of a prompt; more are not compared but counted
_FILES = 4  # with their hashes in sight; more are folded away
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
_FORECAST = {
    "step_s": "One step", "course_s": "From the first step to the last save", "peak_bytes": "Memory at most", "disk_bytes": "On the disk",
}  # fmt: skip


def write(folder: Path, *, verdict: Verdict | None, sheet: Path | None) -> Path:
    """Writes `report.html` and `report.md` into a run's folder, whether the run is finished or not.

    Args:
        verdict: what is recommended; None if nothing could be compared.
        sheet: the picture of `compare`, if one was drawn.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: if the folder holds no run, its config cannot be read, or a file cannot be written.
    """
    page = build(report_facts.read(folder), verdict=verdict, sheet=sheet)
    path = folder / "report.html"
    files.write(folder / "report.md", report_markdown.to_markdown(page, beside=folder).encode())
    files.write(path, report_page.to_html(page).encode())
    return path


def build(facts: Facts, *, verdict: Verdict | None, sheet: Path | None) -> Page:
    """The report as blocks, in the order in which a beginner needs them."""
    chosen = _chosen(facts, verdict)
    curves = tuple(report_curves.curves(facts, recommended=verdict.step if verdict else None))
    sections = {
        "How to use it": tuple(_usage(facts, chosen, verdict)),
        "Without and with the LoRA": tuple(_sheet(facts, chosen, sheet)),
        "How it learned": tuple(_progress(facts, verdict)),
        "Curves": (Charts(curves),) if curves else (),
        "What happened": tuple(_course(facts)),
        "Settings": report_settings.blocks(facts.run),
        "Files and versions": tuple(_files(facts, chosen)),
    }
    return Page(
        title=facts.run.name,
        words=_about(facts),
        blocks=tuple(_boxes(facts, chosen, verdict)),
        sections=tuple(Section(title, blocks) for title, blocks in sections.items() if blocks),
    )


def _chosen(facts: Facts, verdict: Verdict | None) -> LoRAPath | None:
    """The file that is recommended, of two of the same step the result; without a verdict the newest."""
    fitting = [one for one in facts.loras if verdict is None or one.step == verdict.step]
    return fitting[-1] if fitting else None


def _about(facts: Facts) -> Words:
    """What was trained on what, and how far it has come."""
    run, started = facts.run, facts.started
    pictures = f", trained on {counted(started.pictures, 'picture')}" if started else ""
    held_out = (
        f" ({counted(started.held_out, 'more')[: -1 if started.held_out != 1 else None]} held out)" if started and started.held_out else ""
    )
    took = f" in {duration(facts.measured['total_s'])}" if "total_s" in facts.measured else ""
    steps = f"{facts.last_step:,} of {counted(started.steps if started else run.steps, 'step')}{took}."
    return (f"A LoRA of a {run.kind}{pictures}{held_out} for ", *_base(facts), f". {steps}")


def _base(facts: Facts) -> Words:
    """The base by its name, and what it is."""
    title = facts.started.base if facts.started else ""
    if facts.run.base == "mini":
        return (title or "the embedded base",)
    name = Code(report_settings.last_part(facts.run.base))
    return (name, f" ({title})") if title else (name,)


def _boxes(facts: Facts, chosen: LoRAPath | None, verdict: Verdict | None) -> Iterator[Block]:
    """What must not be missed: what to use, that it has learned by heart, that the run is not at its end."""
    if verdict and chosen:
        yield Box("advice", "Recommended", (_advice(chosen, verdict),))
    elif verdict:
        lost = f"Step {verdict.step:,} at strength {verdict.strength:g} is recommended, but its file is no longer in the folder. "
        yield Box("warning", "Recommended", ((lost, _sentence(verdict.reason)),))
    elif chosen:
        words: Words = ("Begin with ", Code(chosen.path.name), " at strength 1, the newest file of this run.")
        yield Box(
            "advice",
            "Nothing is recommended",
            (words, ("Nothing was measured that could tell its files apart; judge by the pictures below.",)),
        )
    else:
        yield Box("warning", "No LoRA yet", (("This run has not saved a LoRA file yet.",),))
    if verdict and verdict.warning:
        yield Box("warning", "Beware", ((_sentence(verdict.warning),),))
    if not facts.is_done:
        last = facts.happenings[-1].words if facts.happenings else "It has not begun."
        words = (f"The run is not at its end: {facts.last_step:,} of {counted(facts.run.steps, 'step')} were taken. {last}",)
        yield Box("warning", "Unfinished", (words,))


def _advice(chosen: LoRAPath, verdict: Verdict) -> Words:
    """The verdict in one sentence, or in two if the reason is one of its own."""
    head: Words = ("Use ", Code(chosen.path.name), " at strength ", Strong(f"{verdict.strength:g}"))
    reason = verdict.reason.strip().removesuffix(".")
    if not reason:
        return (*head, ".")
    return (*head, f", because {reason.removeprefix('because ')}." if reason[0].islower() else f". {reason}.")


def _sentence(words: str) -> str:
    """Words as a sentence of their own."""
    words = words.strip().removesuffix(".")
    return f"{words[:1].upper()}{words[1:]}." if words else ""


def _usage(facts: Facts, chosen: LoRAPath | None, verdict: Verdict | None) -> Iterator[Block]:
    """Where the file goes and what is written into prompts."""
    if not chosen:
        return
    run, strength = facts.run, f"{verdict.strength if verdict else 1:g}"
    prompt = _example(facts)
    call: Words = ("It is called by its trigger word ", Code(run.trigger), ".") if run.trigger else ("It needs no trigger word.",)
    if run.base == "mini":
        here = chosen.path.relative_to(facts.folder).as_posix()
        command = f"sdlora generate --lora {shlex.quote(f'{here}:{strength}')} --prompt {shlex.quote(prompt)}"
        on_page: Words = ("On sdlora's page: choose this training and press Draw with it.",)
        yield Listed((on_page, ("Or in the folder of this report: ", Code(command)), call), ordered=True)
        yield Paragraph(("The embedded base is small and made for trying out; other programs do not have it.",), faint=True)
    else:
        yield Listed(tuple(_elsewhere(facts, chosen, strength, prompt, call)), ordered=True)
    yield Paragraph(
        ("Strength says how much the LoRA changes the base: 0 is the base alone, 1 is as it was trained, in between is milder.",),
        faint=True,
    )
    if verdict and facts.is_done and (still_falls(facts.looks) or (verdict.step == run.steps and not verdict.warning)):
        more = f"sdlora train --resume {shlex.quote(facts.folder.name)} --set steps={run_folder.longer(run.steps)} --allow-changes"
        yield Paragraph(
            ("A longer run may do still better. To train on from the end of this one, beside its folder: ", Code(more)), faint=True
        )
    limits = facts.started.limits if facts.started else ()
    if limits:
        yield Listed(tuple((one,) for one in limits))


def _example(facts: Facts) -> str:
    """A prompt that calls the LoRA: that of the first sample if there is one, else the trigger word alone."""
    samples = [path for pictures in facts.samples.values() for path in pictures.values()]
    prompt, trigger = runs.prompt_in(samples[0]) or "" if samples else "", facts.run.trigger
    return prompt if prompt and trigger in prompt else ", ".join(part for part in (trigger, prompt) if part) or "a picture"


def _elsewhere(facts: Facts, chosen: LoRAPath, strength: str, prompt: str, call: Words) -> Iterator[Words]:
    """The steps in other programs, in the order in which they are done."""
    where = "in checkpoints, " if chosen.path.parent != facts.folder else ""
    yield (
        "Copy ", Code(chosen.path.name), f" ({where}{size(chosen.path.stat().st_size)}) to the folder of LoRAs: ", Code("models/Lora"),
        " in A1111, Forge and SD.Next, ", Code("models/loras"), " in ComfyUI; InvokeAI takes it in by its model manager.",
    )  # fmt: skip
    yield ("Choose the base that it was trained for, ", *_base(facts), ", or one made from it.")
    yield call
    tag = f"{prompt} <lora:{chosen.path.stem}:{strength}>"
    yield ("In A1111, Forge and SD.Next write ", Code(tag), f"; in ComfyUI set both strengths of the node Load LoRA to {strength}.")


def _sheet(facts: Facts, chosen: LoRAPath | None, sheet: Path | None) -> Iterator[Block]:
    """The sheet, or how to get one if the run was to draw nothing."""
    if sheet and sheet.is_file():
        words = (
            "Each row is a prompt and one seed. The first column is the base without the LoRA: what differs from it is the LoRA's work. "
            "Look for the column that has your subject or style and still shows what the prompt asks for.",
        )
        yield Picture(sheet, "Prompts as rows, no LoRA and checkpoints at their strengths as columns", words)
    elif chosen and not facts.run.sample_every:
        name = chosen.path.relative_to(facts.folder).as_posix()
        command = shlex.join(
            ["sdlora", "compare", "--base", facts.run.base, "--lora", name, "--prompt", _example(facts), "--out", "sheet.png"]
        )
        yield Paragraph(("The run drew no pictures (sample_every = 0). In the folder of this report this draws some: ", Code(command)))


def _progress(facts: Facts, verdict: Verdict | None) -> Iterator[Block]:
    """For each prompt its pictures from the base on, side by side."""
    steps = [step for step, pictures in facts.samples.items() if pictures]
    if not steps:
        return
    shown = {steps[place] for place in evenly(len(steps), most=_STEPS)} | ({verdict.step} if verdict else set())
    more = f" {len(shown & set(steps))} of {len(steps)} steps are shown; all are in the folder samples." if len(steps) > len(shown) else ""
    same = "The same prompt and the same seed at each step, so that only what was learned differs. Step 0 is the base without the LoRA."
    yield Paragraph((same + more,), faint=True)
    for prompt in sorted({prompt for pictures in facts.samples.values() for prompt in pictures}):
        of_steps = {step: facts.samples[step][prompt] for step in steps if step in shown and prompt in facts.samples[step]}
        if of_steps:
            cells = [Cell(path, _label(step), "recommended" if verdict and verdict.step == step else "") for step, path in of_steps.items()]
            yield Strip((runs.prompt_in(next(iter(of_steps.values()))) or f"prompt {prompt + 1}",), tuple(cells))


def _label(step: int) -> str:
    return f"step {step:,}" if step else "step 0, the base"


def _course(facts: Facts) -> Iterator[Block]:
    """What was forecast beside what came, then what happened in the order of time."""
    both = [key for key in report_facts.FORECAST if key in facts.forecast and key in facts.measured]
    if both:
        yield Table(("", "forecast", "measured", "difference"), tuple(_compared(facts, key) for key in both))
    else:
        words: Words = ("Nothing was forecast; ", Code("sdlora train --plan"), " does that first, and here it is held against what came.")
        yield Paragraph(words, faint=True)
    if facts.happenings:
        yield Listed(tuple(_dated(one) for one in facts.happenings))
    if facts.unreadable:
        yield Paragraph((f"{counted(facts.unreadable, 'line')} of metrics.jsonl could not be read, and left out here.",), faint=True)


def _compared(facts: Facts, key: str) -> tuple[Inline, ...]:
    said, was = facts.forecast[key], facts.measured[key]
    shown = duration if key.endswith("_s") else size
    return (_FORECAST[key], shown(said), shown(was), f"{100 * (was / said - 1):+.0f} %" if said else "")


def _dated(one: report_facts.Happening) -> Words:
    return (one.words,) if one.time_s is None else (Strong(report_facts.clock(one.time_s)), f" {one.words}")


def _files(facts: Facts, chosen: LoRAPath | None) -> Iterator[Block]:
    """The LoRA files with what proves them unchanged, and what wrote them."""
    rows = [_file_row(one, chosen) for one in facts.loras]
    if rows:
        table = Table(("file", "step", "size", "SHA-256"), tuple(rows), wordy=True)
        yield table if len(rows) <= _FILES else Details(f"{len(rows)} LoRA files with their SHA-256", (table,))
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    yield Paragraph((f"sdlora {sdlora.__version__}, Python {platform.python_version()}, {packages}.",), faint=True)


def _file_row(one: LoRAPath, chosen: LoRAPath | None) -> tuple[Inline, ...]:
    name = Strong(one.path.name) if one == chosen else one.path.name
    return (name, f"{one.step:,}", size(one.path.stat().st_size), Code(files.sha256(one.path)))
