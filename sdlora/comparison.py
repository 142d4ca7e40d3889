"""Several finished runs side by side: a table of what each came to, as Markdown and JSON, and a sheet of what each draws.

The last column of a run that came to nothing says why. The sheet's first column is the base alone, and each run speaks at the strength
that it recommends of itself: at one strength for all, a run would win by being louder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora import compare, devices, files, prepare, resuming, run_folder, runs
from sdlora.compare import Column
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.generate import LoRA, Request

SAME_BASE = ("base", "vae", "tokenizer", "family", "prediction", "clip_skip", "zero_terminal_snr")
_SAME_SCALE = ("lora.", "optimizer.", "captions.", "steps", "batch")  # settings that leave a held-out loss what it is


@dataclass(frozen=True)
class Outcome:
    """What has become of one run.

    Args:
        state: "done", "failed" (a mistake that the user can mend), "crashed" (ours), "stopped" (by the user), or "not begun".
        words: what went wrong, in a sentence.
        code: the exit code that follows from it; 130 of a run that is done if the user asked to stop when its last step was taken.
        loss, best_loss: held out, of the last look and the lowest; None if nothing is held out.
        drift: of the last look, as a share.
        step, strength: recommended; None if the run recommends nothing.
        file: the LoRA file, the recommended one if there is one.
        trace: where a crash happened.
    """

    name: str
    settings: Mapping[str, str]
    folder: Path
    state: str
    words: str = ""
    code: int = 0
    loss: float | None = None
    best_loss: float | None = None
    drift: float | None = None
    step: int | None = None
    strength: float | None = None
    minutes: float | None = None
    file: Path | None = None
    trace: str = ""


def check_own(folder: Path, names: Sequence[str]) -> None:
    """Refuses a folder in which other runs than these were compared: no comparison is written over another.

    Args:
        names: of the runs, in order.

    Raises:
        UserError: if it holds one, or something that is none.
    """
    path = folder / "comparison.json"
    if not path.exists():
        return
    try:
        found = [one["name"] for one in json.loads(path.read_text(encoding="utf-8"))["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        found = []
    if found != list(names):
        raise UserError(f"Folder {folder} holds the comparison of other runs; choose another with --out, or move it away.")


def measured(folder: Path) -> dict[str, Any]:
    """What a finished run's folder says of it, as `Outcome` calls it."""
    rows, told = run_folder.rows(folder), runs.look(folder)
    looks = [row for row in rows if row["event"] == "validated" and row.get("step")]
    held_out = [row["loss"] for row in looks if row.get("loss") is not None]
    done: dict[str, Any] = next((row for row in reversed(rows) if row["event"] == "done"), {})
    times = [row["time_s"] for row in rows if "time_s" in row]
    elapsed_s = done.get("elapsed_s") or (max(times) - min(times) if times else None)
    result = run_folder.result_path(folder, told.name)
    return {
        "loss": held_out[-1] if held_out else None, "best_loss": min(held_out, default=None),
        "drift": looks[-1].get("drift") if looks else None, "minutes": None if elapsed_s is None else elapsed_s / 60,
        "step": told.best.step if told.best else None, "strength": told.best.strength if told.best else None,
        "file": told.best.path if told.best and told.best.path else result if result.is_file() else None,
    }  # fmt: skip


def table(outcomes: Sequence[Outcome], *, beside: Path, reasons: bool = True) -> list[list[str]]:
    """The comparison as rows of words, the first being the heads: one column for each setting that a sweep changes, itself or by a link.

    Args:
        beside: the folder that files are named from.
        reasons: whether the sentence stands there that says why a run came to nothing.
    """
    keys = list(dict.fromkeys(key for one in outcomes for key in one.settings))
    moved = linked(outcomes) if keys else {}
    heads = ["run", *keys, *(f"{key} (linked)" for key in moved)]
    heads += ["held-out loss", "lowest", "drift", "step", "strength", "minutes", "file"]
    rows = [[one.name, *(one.settings.get(key, "") for key in keys), *(moved[key].get(one.name, "") for key in moved)] for one in outcomes]
    return [heads, *([*row, *_measures(one, beside, reasons)] for row, one in zip(rows, outcomes, strict=True))]


def linked(outcomes: Sequence[Outcome]) -> dict[str, dict[str, str]]:
    """Settings that differ between the runs of a sweep although it did not name them: by key, and then by run.

    A sweep over the rank moves the learning rate too where that is not set, and who compares ranks has to know.
    """
    swept = {"name", *(key for one in outcomes for key in one.settings)}
    settings = {one.name: runs.settings_of(one.folder)[0] for one in outcomes}
    told = {name: resuming.flat(values) for name, values in settings.items() if values}  # a run that never began has none
    keys = dict.fromkeys(key for values in told.values() for key in values if key not in swept)
    found = {key: {name: str(values.get(key, "-")) for name, values in told.items()} for key in keys}
    return {key: by_run for key, by_run in found.items() if len(set(by_run.values())) > 1}


def _measures(one: Outcome, beside: Path, reasons: bool) -> list[str]:
    file = "" if one.file is None else str(one.file.relative_to(beside) if one.file.is_relative_to(beside) else one.file)
    instead = f"{one.state}: {one.words}" if reasons and one.words else one.state
    return [
        _number(one.loss, ".4f"), _number(one.best_loss, ".4f"), _number(one.drift, ".1%"), _number(one.step, "d"),
        _number(one.strength, "g"), _number(one.minutes, ".1f"), file if one.state == "done" else instead,
    ]  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def best_sentence(outcomes: Sequence[Outcome]) -> str:
    """Which run of a sweep has the lowest held-out loss; "" if their losses do not measure the same."""
    losses = {one.name: one.best_loss for one in outcomes if one.best_loss is not None}
    keys = {key for one in outcomes for key in one.settings}
    if len(losses) < 2 or not keys or not all(key.startswith(_SAME_SCALE) for key in keys):
        return ""
    name = min(losses, key=lambda one: losses[one] or 0.0)
    return f"The lowest held-out loss is {losses[name]:.4f}, that of {name}; look at the pictures before you believe it."


def write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes the comparison as `comparison.md` and `comparison.json`.

    Raises:
        UserError: if they cannot be written.
    """
    heads, *rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table(outcomes, beside=folder)]
    lines = [heads, ["---"] * len(heads), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    files.write(folder / "comparison.md", f"{text}\n\n{best_sentence(outcomes)}".strip().encode() + b"\n")
    told = [{key: value for key, value in asdict(one).items() if key != "trace"} for one in outcomes]
    content = json.dumps({"runs": told}, indent=2, ensure_ascii=False, default=str)
    files.write(folder / "comparison.json", content.encode() + b"\n")


def no_sheet(configs: Sequence[Config], outcomes: Sequence[Outcome]) -> str:
    """Why no sheet can be drawn, in a sentence; "" if it can."""
    if not any(one.file for one in outcomes):
        return "No comparison sheet: no run has come to a LoRA file."
    if len({tuple(getattr(one, key) for key in SAME_BASE) for one in configs}) > 1:
        return "No comparison sheet: the runs have different bases."
    return ""


def sheet(configs: Sequence[Config], outcomes: Sequence[Outcome]) -> Iterator[tuple[int, int] | Image.Image]:
    """Draws the runs' sample prompts without LoRA and with each run's at its recommended strength; as `compare.draw`.

    Raises:
        UserError: if the base cannot be opened or a LoRA does not fit it.
    """
    done, first = [one for one in outcomes if one.file], configs[0]
    device = devices.best_device()
    base = prepare.open_base(first, device=device, dtype=devices.base_dtype(device, first.precision))
    requests = [Request(prompt, seed=first.seed + number) for number, prompt in enumerate(prompts(first, done[0].folder))]
    yield from compare.draw(base, requests, [Column("no LoRA"), *map(column, done)])


def prompts(run: Config, folder: Path) -> list[str]:
    """What a run has drawn while it trained, else its trigger word."""
    drawn = runs.pictures(folder)
    last = max((one.step for one in drawn), default=0)
    return run.sample_prompts or [one.prompt for one in drawn if one.step == last] or [run.trigger or run.kind]


def column(one: Outcome) -> Column:
    """A run's column of the sheet: what is different in it, and its strength."""
    assert one.file is not None
    strength = 1.0 if one.strength is None else one.strength
    label = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in one.settings.items()) or one.name
    return Column(f"{label}\nstrength {strength:g}", (LoRA(one.file, strength),))
