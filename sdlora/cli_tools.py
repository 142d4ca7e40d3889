"""The commands around LoRA files and data folders: convert, merge, bake, extract, resize, check, cache.

Each calls one function of a room and says what it made and how far that is from what was asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdlora.errors import UserError
from sdlora.progress import console, progress

if TYPE_CHECKING:
    from sdlora.dataset_report import Report
    from sdlora.lora_tools import Made

tools = typer.Typer()

LoRAFileName = Annotated[Path, typer.Argument(metavar="FILE", help="a LoRA file")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="the file to be written; never over an existing one")]
Rank = Annotated[int | None, typer.Option(min=1, max=4096, help="the rank of every module")]
Energy = Annotated[float | None, typer.Option(min=0.01, max=1, help="share of the squared singular values to keep, such as 0.95")]
MaxError = Annotated[float | None, typer.Option(min=0, max=1, help="largest relative error of a module")]
Base = Annotated[str | None, typer.Option(help="the base; only DoRA files need it")]


@tools.command()
def convert(
    file: LoRAFileName,
    out: Out,
    to: Annotated[str, typer.Option(help="kohya (loads everywhere) or diffusers")],
    family: Annotated[str, typer.Option(help="sd1, sd2 or sdxl, if the file does not tell")] = "auto",
) -> None:
    """Writes a LoRA file in the other layout, bit for bit where the layouts allow."""
    from sdlora import lora_merge

    _refuse_existing(out, ".safetensors")
    _write(out, lora_merge.convert(file, to=to, name=out.stem, family=family))


@tools.command()
def merge(
    parts: Annotated[list[str], typer.Argument(metavar="FILE:WEIGHT … OUT", help="LoRA files with their weights, and last the new file")],
    rank: Rank = None,
    exact: Annotated[bool, typer.Option("--exact", help="keep all that the method made, at whatever rank; sum does so anyway")] = False,
    method: Annotated[str, typer.Option(help="sum, svd, ties or dare")] = "sum",
    density: Annotated[float, typer.Option(min=0.01, max=1, help="share of the values that ties and dare keep")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="of dare")] = 0,
    base: Base = None,
) -> None:
    """Makes one LoRA of several: the weighted sum of what each does, without cross terms."""
    from sdlora import base_tensors, lora_merge

    if len(parts) < 2:
        raise UserError(
            "merge needs at least one FILE:WEIGHT and the file to be written, such as a.safetensors:0.6 b.safetensors:-0.3 OUT."
        )
    out, weighed = Path(parts[-1]), [_weighed(one) for one in parts[:-1]]
    _refuse_existing(out, ".safetensors")
    weights = base_tensors.weights_of(base) if base else None
    work = lora_merge.merge(weighed, name=out.stem, method=method, rank=rank, exact=exact, density=density, seed=seed, weights=weights)
    _write(out, _followed("merging", work))


@tools.command()
def resize(file: LoRAFileName, out: Out, rank: Rank = None, energy: Energy = None, max_error: MaxError = None, base: Base = None) -> None:
    """Writes a LoRA at a smaller rank, and says what that costs."""
    from sdlora import base_tensors, lora_extract

    _refuse_existing(out, ".safetensors")
    weights = base_tensors.weights_of(base) if base else None
    work = lora_extract.resize(file, rank=rank, energy=energy, max_error=max_error, name=out.stem, weights=weights)
    _write(out, _followed("resizing", work))


@tools.command()
def extract(
    out: Out,
    base: Annotated[str, typer.Option(help="the base that the other one was tuned from")],
    tuned: Annotated[str, typer.Option(help="the tuned base")],
    rank: Rank = None,
    energy: Energy = None,
    max_error: MaxError = None,
    conv: Annotated[bool, typer.Option(help="convolutions too")] = True,
    text_encoder: Annotated[bool, typer.Option(help="text encoders too")] = True,
    norms: Annotated[bool, typer.Option("--norms", help="norms and biases too, which not every tool reads")] = False,
) -> None:
    """Makes a LoRA of the difference between two bases."""
    from sdlora import lora_extract

    _refuse_existing(out, ".safetensors")
    work = lora_extract.extract(
        base, tuned, name=out.stem, rank=rank, energy=energy, max_error=max_error, conv=conv, text_encoder=text_encoder, norms=norms
    )
    _write(out, _followed("extracting", work))


@tools.command()
def bake(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="a new folder, or a new .safetensors checkpoint")],
    base: Annotated[str, typer.Option(help="the base")],
    lora: Annotated[list[str], typer.Option("--lora", metavar="FILE[:STRENGTH[:TEXT]]", help="a LoRA; can be given several times")],
) -> None:
    """Folds LoRAs into a base: the result draws with them, and needs no LoRA any more."""
    from sdlora import bake as baking
    from sdlora.generate import LoRA

    _refuse_existing(out, None)
    loras = [LoRA(path, *numbers) for path, numbers in (with_numbers(one, "--lora") for one in lora)]
    made = _followed("baking", baking.bake(base, loras, out))
    _say(made.path, made.errors, made.notes)


@tools.command()
def check(
    data: Annotated[
        Path, typer.Argument(metavar="FOLDER|CONFIG", help="a folder of pictures, a run's TOML, or a dataset TOML of sd-scripts")
    ],
    kind: Annotated[str | None, typer.Option(help="style or character, if a folder is given")] = None,
    trigger: Annotated[str, typer.Option(help="the trigger word, if a folder is given")] = "",
    resolution: Annotated[int | None, typer.Option(min=64, max=4096, help="in px, if a folder is given; 512 if nothing says it")] = None,
    batch: Annotated[int, typer.Option(min=1, help="pictures per step, if a folder is given")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    sheet: Annotated[Path | None, typer.Option(help="a .png of every picture as it will be trained")] = None,
) -> None:
    """Looks at pictures and captions before any time is spent: what is wrong, where, and what to do. Changes nothing."""
    from sdlora import contact_sheet, dataset_report, files, images
    from sdlora import material as materials

    if sheet is not None:
        _refuse_existing(sheet, ".png")
    run, family, grain_px, resolution_px = _run_of(data, kind, trigger, resolution, batch)
    if sheet is not None and any(sheet.resolve().is_relative_to(folder.folder.resolve()) for folder in run.data):
        raise UserError(f"{sheet} lies among the pictures, where nothing is ever written; give another place for the sheet.")
    found = materials.find(run)
    work = materials.examined(run, found, grain_px=grain_px, resolution_px=resolution_px, family=family)
    report: Report = _followed("looking at pictures", work, quiet=as_json)
    if sheet is not None:
        captions = [materials.plain_caption(materials.all_rules(run), sample) for sample in found.samples]
        files.write(sheet, images.png_bytes(contact_sheet.draw(report.items, found.samples, captions, report.findings)))
    if as_json:
        print(json.dumps(dataset_report.as_json(report), indent=2, ensure_ascii=False))
    else:
        for line in dataset_report.lines(report, batch=run.batch * run.optimizer.accumulation):
            console.print(line, style=STYLES.get(line.partition(":")[0]), highlight=False, soft_wrap=True, markup=False)
        if sheet is not None:
            console.print(f"The sheet: {sheet}", highlight=False, soft_wrap=True, markup=False)
    if any(finding.severity == "stops" for finding in report.findings):
        raise typer.Exit(2)


STYLES = {"stops": "bold red", "warns": "yellow", "notes": "dim"}


@tools.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="delete all that is kept")] = False,
    info: Annotated[bool, typer.Option("--info", help="say what is kept (the default)")] = False,
) -> None:
    """Says how much encoded pictures and captions are kept, or deletes them."""
    from sdlora import cache as caches

    folder = caches.default_folder()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder, so nothing can be kept in it; set SDLORA_CACHE to another.")
    was = caches.clear(folder) if clear else caches.info(folder)
    told = f"{was.entries} entries, {was.bytes / 2**20:.1f} MiB in {was.folder}"
    console.print(f"Deleted {told}" if clear else told, highlight=False, soft_wrap=True, markup=False)


# --- from words to values -----------------------------------------------------------------------------------------------------


def number(words: str, option: str, low: float, high: float) -> float:
    """A number from a range.

    Raises:
        UserError: if it is none.
    """
    try:
        value = float(words)
    except ValueError:
        raise UserError(f"{option}: '{words}' is not a number; give one from {low:g} to {high:g}.") from None
    if not low <= value <= high:
        raise UserError(f"{option}: {words} is out of range; give a number from {low:g} to {high:g}.")
    return value


def with_numbers(words: str, option: str) -> tuple[Path, list[float]]:
    """`FILE`, `FILE:NUMBER` or `FILE:NUMBER:NUMBER`; a colon in the file's own name is left alone.

    Raises:
        UserError: if what stands behind the file is no number from -2 to 2.
    """
    found = re.fullmatch(r"(.+?\.safetensors)((?::[^:]*){0,2})", words, re.IGNORECASE)
    name, numbers = (found[1], found[2].split(":")[1:]) if found else (words, [])
    return Path(name), [number(one, f"{option} {words}", -2, 2) for one in numbers]


def _weighed(words: str) -> tuple[Path, float]:
    path, numbers = with_numbers(words, "merge")
    if len(numbers) > 1:
        raise UserError(f"merge {words}: give one weight, such as {path}:0.6.")
    return path, numbers[0] if numbers else 1.0


def _run_of(data: Path, kind: str | None, trigger: str, resolution: int | None, batch: int) -> tuple[Any, str, int, int]:
    """The run that is meant, with family, step and resolution of its base: a folder alone is looked at as Stable Diffusion would."""
    from sdlora import base_files, config, material

    is_toml = data.suffix == ".toml"
    if is_toml and not data.is_file():
        raise UserError(f"{data} does not exist; name a folder of pictures or the TOML file of a run.")
    if is_toml and config.is_run(data):
        run = config.load(data)
        return run, base_files.identify(run.base, family=run.family).family, *base_files.sizes_of(run.base)
    values: dict[str, Any] = {"base": "", "data": str(data), "kind": kind or "style", "trigger": trigger, "name": "check"}
    values |= {} if resolution is None else {"resolution_px": resolution}
    run = config.parse(values | ({} if is_toml else {"batch": batch}), where="check")
    return run.model_copy(update={} if kind else {"kind": None}), "sd1", material.SD_STEP_PX, 512


def _refuse_existing(out: Path, suffix: str | None) -> None:
    if suffix and out.suffix.lower() != suffix:
        raise UserError(f"{out}: the name of what is written must end in {suffix}.")
    if out.exists():
        raise UserError(f"{out} exists already; give another name, or move it away.")


# --- what was done ------------------------------------------------------------------------------------------------------------


def _followed(name: str, work: Iterator[Any], *, quiet: bool = False) -> Any:
    """Follows work with a bar, to its result."""
    if quiet:
        *_, last = work
        return last
    with progress() as bar:
        return bar.run(name, work)


def _write(out: Path, made: Made) -> None:
    from sdlora import files

    files.write(out, made.content)
    console.print(f"{len(made.content) / 2**20:.1f} MiB", end=" ", highlight=False)
    _say(out, made.errors, made.notes)


def _say(path: Path, errors: Any, notes: tuple[str, ...]) -> None:
    console.print(f"Written: {path}", highlight=False, soft_wrap=True, markup=False)
    console.print(errors.sentence[:1].upper() + errors.sentence[1:], highlight=False, soft_wrap=True, markup=False)
    for note in notes:
        console.print(f"Note: {note}", highlight=False, soft_wrap=True, markup=False)
