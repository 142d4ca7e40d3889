"""The command line: each command reads its arguments, calls the room that does the work, and shows its progress.

The heavy libraries are imported inside the commands, so that `--help` answers at once. Exit codes: 0 done, 2 a mistake that the user
can mend (one sentence), 130 and 143 interrupted (a state is kept that the run can go on from), 1 our bug.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdlora import cli_runs, cli_train
from sdlora.cli_tools import number, tools, with_numbers
from sdlora.errors import UserError
from sdlora.progress import console, progress

if TYPE_CHECKING:
    from sdlora.base_model import Base
    from sdlora.generate import LoRA, Request

cli = typer.Typer(help="Train a Stable Diffusion LoRA from a folder of pictures, and see that it worked.", no_args_is_help=True)
cli.add_typer(cli_train.training)
cli.add_typer(cli_runs.several)
cli.add_typer(tools)

BaseName = Annotated[str, typer.Option(help="mini, a diffusers folder, a .safetensors checkpoint, or a hub name")]
VAE = Annotated[str | None, typer.Option("--vae", help="another autoencoder: a folder or a .safetensors file")]
Tokenizer = Annotated[str | None, typer.Option(help="folder with a tokenizer, for a checkpoint that brings none")]
Family = Annotated[str, typer.Option(help="sd1, sd2 or sdxl, if the base is taken for something else")]
Prediction = Annotated[str, typer.Option(help="epsilon, v_prediction or sample, likewise")]
ClipSkip = Annotated[int | None, typer.Option(min=1, max=12, help="text layer counted from the last; 1 is the last")]
Embeddings = Annotated[
    list[str], typer.Option("--embedding", metavar="FILE[:WORD]", help="textual inversion; WORD calls it, else the file's name")
]
LoRANames = Annotated[list[str], typer.Option("--lora", metavar="FILE[:STRENGTH[:TEXT]]", help="LoRA file; strength -2 to 2")]
Prompts = Annotated[list[str], typer.Option("--prompt", help="what to draw; can be given several times")]
Negative = Annotated[str, typer.Option(help="what to keep out")]
Seed = Annotated[int, typer.Option(min=0, help="same seed, same picture")]
SamplingSteps = Annotated[int, typer.Option(min=1, max=1000, help="sampling steps")]
Guidance = Annotated[float, typer.Option(min=1, max=50, help="how closely to follow the prompt; 1 for none")]
Sampler = Annotated[str, typer.Option(help="DPM++ 2M, Euler a, DDIM, …")]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="in pixels; the base's own if not given")]
RunFolder = Annotated[Path | None, typer.Option("--out", help="the run folder; a new one below runs/ if not given")]


@cli.command()
def demo(out: RunFolder = None) -> None:
    """Trains on the bundled style and draws a sheet of pictures with and without the LoRA."""
    from sdlora import demo as story

    run = story.style_config()
    folder, resume = cli_train.folder_for(Path("runs/demo"), out)
    path = cli_train.follow(run, folder, resume=resume)
    with progress() as bar:
        sheet = bar.run("drawing the sheet", story.sheet(run, path, folder / "sheet.png"))
    console.print(f"\nThe style as a LoRA file:      {path}", soft_wrap=True)
    console.print(f"Pictures without and with it:  {sheet}", soft_wrap=True)
    command = f"{Path(sys.argv[0]).name if sys.argv[0].endswith('sdlora') else 'sdlora'} app --loras {folder}"
    console.print(f"Play with its strength:        {command}", soft_wrap=True)


@cli.command()
def generate(
    prompt: Prompts,
    base: BaseName = "mini",
    lora: LoRANames = [],  # noqa: B006
    negative: Negative = "",
    seed: Seed = 0,
    steps: SamplingSteps = 20,
    guidance: Guidance = 4.0,
    sampler: Sampler = "DPM++ 2M",
    size: Size = None,
    vae: VAE = None,
    tokenizer: Tokenizer = None,
    family: Family = "auto",
    prediction: Prediction = "auto",
    clip_skip: ClipSkip = None,
    embedding: Embeddings = [],  # noqa: B006
    count: Annotated[int, typer.Option(min=1, help="pictures per prompt, with seeds counted up")] = 1,
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("outputs"),
) -> None:
    """Draws pictures with any number of LoRAs."""
    from sdlora import files
    from sdlora import generate as generator

    loras = [_lora(one) for one in lora]
    requests = [_request(words, negative, seed, steps, guidance, sampler, size) for words in prompt]
    files.make_folder(out)
    opened = _open_base(base, embedding, vae=vae, tokenizer=tokenizer, family=family, prediction=prediction, clip_skip=clip_skip)
    generator.set_loras(opened, loras)
    with progress() as bar:
        if any("<lora:" in request.prompt for request in requests):
            bar.print("Note: <lora:…> in a prompt is drawn as words; give the file with --lora FILE:STRENGTH.")
        for request in requests:
            drawn = generator.pictures(opened, request, count=count)
            for one, image in bar.each(request.prompt, drawn, total=count):
                path = _free_picture(out, one.seed)
                files.write(path, generator.png_bytes(image, generator.settings_text(opened, one, loras)))
                bar.print(str(path))


@cli.command()
def compare(
    prompt: Prompts,
    lora: LoRANames,
    out: Annotated[Path, typer.Option(help="the sheet, a .png file")],
    base: BaseName = "mini",
    strengths: Annotated[str, typer.Option(help="columns for each LoRA, with commas between them")] = "0.5,1",
    negative: Negative = "",
    seed: Seed = 0,
    steps: SamplingSteps = 20,
    guidance: Guidance = 4.0,
    sampler: Sampler = "DPM++ 2M",
    size: Size = None,
    vae: VAE = None,
    tokenizer: Tokenizer = None,
    family: Family = "auto",
    prediction: Prediction = "auto",
    clip_skip: ClipSkip = None,
    embedding: Embeddings = [],  # noqa: B006
) -> None:
    """Draws a sheet: prompts as rows, no LoRA and each LoRA at each strength as columns, same seed in all."""
    from sdlora import compare as sheets
    from sdlora import files, images

    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the sheet is a PNG; give a name that ends in .png.")
    if out.exists():
        raise UserError(f"--out {out} exists already; give another name, or move it away.")
    paths = [_lora(one).path for one in lora]
    columns = sheets.columns(paths, [number(one, "--strengths", -2, 2) for one in strengths.split(",")])
    requests = [_request(words, negative, seed, steps, guidance, sampler, size) for words in prompt]
    files.make_folder(out.parent)
    opened = _open_base(base, embedding, vae=vae, tokenizer=tokenizer, family=family, prediction=prediction, clip_skip=clip_skip)
    with progress() as bar:
        sheet = bar.run("drawing the sheet", sheets.draw(opened, requests, columns))
    files.write(out, images.png_bytes(sheet))
    console.print(f"The sheet: {out}", soft_wrap=True)


@cli.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="a LoRA file")],
    base: Annotated[str | None, typer.Option(help="also say whether it fits this base, and which modules do not")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Says what a LoRA file holds: family, rank, alpha, modules, trigger words, hashes; and whether it fits a base."""
    from sdlora import base_tensors, lora_file

    facts = lora_file.facts(file)
    if base is not None:
        fit = base_tensors.fit(base_tensors.tensors_of(base), lora_file.read(file).modules)
        facts |= {"fits": fit.why_not is None, "matches": fit.sentence, "why_not": fit.why_not or ""}
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{count} {part.replace('_', ' ')}" for part, count in value.items())
        elif isinstance(value, list):
            value = "; ".join(map(str, value))
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        if value != "":
            console.print(f"{key.replace('_', ' '):16} {value}", highlight=False, soft_wrap=True)


@cli.command()
def app(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    runs: Annotated[Path, typer.Option(help="folder of runs; their LoRA files are offered too")] = Path("runs"),
    loras: Annotated[Path, typer.Option(help="folder of other LoRA files")] = Path("loras"),
    data: Annotated[Path, typer.Option(help="folder of folders of pictures")] = Path("datasets"),
    bases: Annotated[Path, typer.Option(help="folder of checkpoints and diffusers folders")] = Path("bases"),
    outputs: Annotated[Path, typer.Option(help="folder for pictures; all in it can be seen from the page")] = Path("outputs"),
    trash: Annotated[Path, typer.Option(help="folder for what is deleted on the page")] = Path("trash"),
    base: BaseName = "mini",
    password: Annotated[str | None, typer.Option(envvar="SDLORA_PASSWORD", help="needed to listen beyond this machine")] = None,
) -> None:
    """Opens the page in the browser: train, generate, compare, and the library of all LoRAs."""
    from sdlora.ui import page
    from sdlora.ui.roots import Roots

    page.launch(Roots(runs, loras, data, bases, outputs, trash, base), host=host, port=port, password=password)


def main() -> None:
    """Runs the command line and turns what goes wrong into a sentence and an exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints about image processors are not for our users
    try:
        cli()
    except UserError as problem:
        print(f"sdlora: {problem}", file=sys.stderr)
        sys.exit(2)


# --- from words to values -----------------------------------------------------------------------------------------------------


def _lora(words: str) -> LoRA:
    """`FILE`, `FILE:STRENGTH` or `FILE:STRENGTH:TEXT_STRENGTH`."""
    from sdlora.generate import LoRA

    path, values = with_numbers(words, "--lora")
    return LoRA(path, *values)


def _request(words: str, negative: str, seed: int, steps: int, guidance: float, sampler: str, size: str | None) -> Request:
    from sdlora.generate import Request, known_sampler

    found = re.fullmatch(r"(\d+)x(\d+)", size) if size else None
    if size and not found:
        raise UserError(f"--size {size}: give width and height in pixels, such as 512x768.")
    width, height = (int(found[1]), int(found[2])) if found else (None, None)
    return Request(words, negative, seed, steps, guidance, known_sampler(sampler), width, height)


def _open_base(name: str, embeddings: list[str], **options: Any) -> Base:
    """The base with its overrides, and the words that were loaded into it."""
    from sdlora import base_files, devices, text_embeddings

    device = devices.best_device()
    base = base_files.load(name, device=device, dtype=devices.base_dtype(device), **options)
    for one in embeddings:
        found = re.fullmatch(r"(.+?\.safetensors)(?::(.+))?", one, re.IGNORECASE)
        text_embeddings.load(base, Path(found[1] if found else one), word=found[2] if found else None)
    return base


def _free_picture(folder: Path, seed: int) -> Path:
    """A name that counts on from the pictures in a folder: nothing is written over."""
    taken = [int(found[1]) for path in folder.glob("*.png") if (found := re.match(r"(\d+)-", path.name))]
    return folder / f"{max(taken, default=0) + 1:05d}-{seed}.png"
