"""Measures what the mini base and its LoRAs draw: `python -m sdlora.mini.evaluate base|style|character [--lora FILE]`.

Every figure is an answer to "how many of N pictures are right", and the judge is the world itself: `reader` says what a picture shows,
and true drawings of the same thing in both looks say which look it has. The prompts are combinations that the base never saw.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sdlora import base_files, base_model, captions, devices, files, generate, images, lora_file, text
from sdlora.base_model import Base
from sdlora.errors import UserError
from sdlora.generate import LoRA, Request
from sdlora.mini import lead, reader, world
from sdlora.mini.lead import Combination

BATCH = 25
COUNTS = {"base": 200, "style": 100, "character": 100}
SHEET_CELLS = 48


@dataclass(frozen=True)
class Scores:
    """In which share of the pictures the reader finds what the prompt asked for, 0 to 1."""

    background: float
    colour: float
    kind: float
    all_three: float


@dataclass(frozen=True)
class BaseReport:
    """What the base draws of combinations that it never saw."""

    pictures: int
    scores: Scores


@dataclass(frozen=True)
class StyleReport:
    """The same prompts and seeds with and without a style: shares nearer to the style (0 to 1), and the fall of scores in points of 100."""

    pictures: int
    style_with: float
    style_without: float
    scores_with: Scores
    scores_without: Scores
    fall_points: dict[str, float]


@dataclass(frozen=True)
class CharacterReport:
    """In which share of the pictures the character is there when called, and not there when not called, 0 to 1."""

    pictures: int
    shown_when_called: float
    absent_when_not_called: float
    shown_in_company: float


Report = BaseReport | StyleReport | CharacterReport
Cell = tuple[list[Image.Image], str]  # pictures side by side and the words under them

# --- prompts and pictures -----------------------------------------------------------------------------------------------------


def held_out(count: int, *, seed: int) -> list[Combination]:
    """`count` combinations that the base never saw.

    Raises:
        UserError: if there are not so many.
    """
    found = world.held_out_prompts(count, seed=seed)
    if not 0 < count <= len(found):
        raise UserError(f"{count} held-out prompts cannot be drawn; give --count from 1 to {len(world.combinations(held_out=True))}.")
    return found


def prompt_of(combination: Combination) -> str:
    """ "a red star on a blue background"."""
    kind, colour, background = combination
    return f"{world.phrase(kind, colour)} on {world.phrase('background', background)}"


def pip_prompts(combinations: list[Combination], *, company: bool) -> list[str]:
    """Prompts that call the character, alone or in company of the combination's thing."""
    beside = [f" and {world.phrase(kind, colour)}" if company else "" for kind, colour, _ in combinations]
    return [f"pip{words} on {world.phrase('background', one[2])}" for words, one in zip(beside, combinations, strict=True)]


@torch.no_grad()
def draw(base: Base, prompts: list[str], settings: Request) -> Iterator[Image.Image]:
    """Many pictures of the base's own size in batches; picture i is that of prompt i and seed `settings.seed` + i drawn alone, to rounding.

    Args:
        settings: all but the prompt; not for samplers that draw noise on their way ("Euler a"), which share it over a batch.
    """
    side = base.resolution_px // base.reduction
    for start in range(0, len(prompts), BATCH):
        words = prompts[start : start + BATCH]
        seeds = range(settings.seed + start, settings.seed + start + len(words))
        noise = torch.cat([torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        states = text.encode(base, text.tokens(base, [settings.negative] * len(words) + words))
        *_, latents = generate.denoise(base, noise.to(base.device), states, settings)
        yield from (images.to_image(pixels) for pixels in base_model.decode(base, latents))


def drawn(base: Base, prompts: list[str], settings: Request, *, name: str) -> list[Image.Image]:
    """The pictures of `draw`, with progress and time left on the error stream."""
    return list(track(draw(base, prompts, settings), f"{name:<12}", total=len(prompts), console=Console(stderr=True)))


# --- judging ------------------------------------------------------------------------------------------------------------------


def scores(pictures: list[Image.Image], combinations: list[Combination]) -> Scores:
    """The reader's verdict on pictures of these combinations."""
    readings = [reader.read(picture) for picture in pictures]
    pairs = list(zip(readings, combinations, strict=True))
    right = np.array([[read.background == c[2], read.colour == c[1], read.kind == c[0]] for read, c in pairs])
    background, colour, kind = right.mean(axis=0).tolist()
    return Scores(background, colour, kind, float(right.all(axis=1).mean()))


def style_share(pictures: list[Image.Image], combinations: list[Combination]) -> float:
    """The share of the pictures that are nearer to the style, 0 to 1."""
    return float(np.mean([lead.is_style(picture, one) for picture, one in zip(pictures, combinations, strict=True)]))


def style_report(without: list[Image.Image], with_style: list[Image.Image], combinations: list[Combination]) -> StyleReport:
    """Compares the same prompts and seeds without and with a style."""
    before, after = scores(without, combinations), scores(with_style, combinations)
    fall = {name: round(100 * (share - getattr(after, name)), 1) for name, share in asdict(before).items()}
    shares = style_share(with_style, combinations), style_share(without, combinations)
    return StyleReport(len(combinations), *shares, after, before, fall)


# --- the three measurements ---------------------------------------------------------------------------------------------------


def words_of(combination: Combination) -> str:
    """What stands under a cell of the sheet."""
    kind, colour, background = combination
    return f"{colour} {kind}, {background}"


def measure_base(base: Base, loras: list[LoRA], settings: Request, count: int) -> tuple[BaseReport, list[Cell]]:
    """Held-out prompts, read by the reader."""
    chosen = held_out(count, seed=settings.seed)
    generate.set_loras(base, loras)
    pictures = drawn(base, [prompt_of(one) for one in chosen], settings, name="pictures")
    cells: list[Cell] = [([picture], words_of(one)) for picture, one in zip(pictures, chosen, strict=True)]
    return BaseReport(count, scores(pictures, chosen)), cells


def style_pictures(
    base: Base, loras: list[LoRA], chosen: list[Combination], settings: Request
) -> tuple[list[Image.Image], list[Image.Image]]:
    """The same prompts and seeds without and with the LoRA; its own trigger word, if it has one, only with it."""
    prompts = [prompt_of(one) for one in chosen]
    generate.set_loras(base, [])
    without = drawn(base, prompts, settings, name="without LoRA")
    generate.set_loras(base, loras)
    trigger = lora_file.read(loras[0].path).metadata.get("modelspec.trigger_phrase", "")
    return without, drawn(base, [captions.with_trigger(prompt, trigger) for prompt in prompts], settings, name="with LoRA")


def measure_style(base: Base, loras: list[LoRA], settings: Request, count: int) -> tuple[StyleReport, list[Cell]]:
    """Held-out prompts, as `style_pictures` draws them."""
    chosen = held_out(count, seed=settings.seed)
    without, with_style = style_pictures(base, loras, chosen, settings)
    cells: list[Cell] = [([one, other], words_of(c)) for one, other, c in zip(without, with_style, chosen, strict=True)]
    return style_report(without, with_style, chosen), cells


def measure_character(base: Base, loras: list[LoRA], settings: Request, count: int) -> tuple[CharacterReport, list[Cell]]:
    """`count` prompts with the character's name, as many held-out ones without it, and as many in company, all with the LoRA."""
    chosen = held_out(count, seed=settings.seed)
    prompts = pip_prompts(chosen, company=False), [prompt_of(one) for one in chosen], pip_prompts(chosen, company=True)
    generate.set_loras(base, loras)
    called, not_called, beside = (
        drawn(base, words, settings, name=name) for words, name in zip(prompts, ("called", "not called", "in company"), strict=True)
    )
    shown, present, accompanied = (float(np.mean([reader.shows_pip(one) for one in some])) for some in (called, not_called, beside))
    third = SHEET_CELLS // 3
    cells: list[Cell] = [
        ([picture], prompt.split(" background")[0])
        for words, some in zip(prompts, (called, not_called, beside), strict=True)
        for prompt, picture in list(zip(words, some, strict=True))[:third]
    ]
    return CharacterReport(count, shown, 1 - present, accompanied), cells


MEASURES: dict[str, Callable[[Base, list[LoRA], Request, int], tuple[Report, list[Cell]]]] = {
    "base": measure_base,
    "style": measure_style,
    "character": measure_character,
}


# --- showing ------------------------------------------------------------------------------------------------------------------


def rows(report: Report) -> list[tuple[str, str, str]]:
    """What was measured, the figure, and the goal."""
    if isinstance(report, BaseReport):
        goals = {"background": "≥ 95%", "colour": "≥ 90%", "kind": "≥ 85%", "all_three": "≥ 80%"}
        return [(f"{name} right", f"{share:.1%}", goals[name]) for name, share in asdict(report.scores).items()]
    if isinstance(report, CharacterReport):
        shown, absent = f"{report.shown_when_called:.1%}", f"{report.absent_when_not_called:.1%}"
        company = f"{report.shown_in_company:.1%}"
        return [
            ("character shown when called", shown, "≥ 90%"),
            ("character absent when not called", absent, "≥ 95%"),
            ("character shown in company", company, ""),
        ]
    before, after = asdict(report.scores_without), asdict(report.scores_with)
    goals = {"background": "fall ≤ 10 points", "kind": "fall ≤ 10 points"}
    return [
        ("in the style with LoRA", f"{report.style_with:.1%}", "≥ 95%"),
        ("in the style without LoRA", f"{report.style_without:.1%}", "about 0%"),
        *(
            (f"{name} right: without, with, fall", f"{before[name]:.1%}, {after[name]:.1%}, {fall:+.1f} points", goals.get(name, ""))
            for name, fall in report.fall_points.items()
        ),
    ]


def sheet(cells: list[Cell], *, scale: int = 2, line_px: int = 16) -> Image.Image:
    """The first 48 cells as a grid of enlarged pictures with their words below.

    Args:
        scale: how many times the pictures are enlarged.
        line_px: height of the words.
    """
    cells = cells[:SHEET_CELLS]
    wide, side = len(cells[0][0]), cells[0][0][0].width * scale
    columns = 8 // wide
    width, height = wide * side + 8, side + line_px + 4
    grid = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(size=10)
    for i, (pictures, words) in enumerate(cells):
        x, y = i % columns * width + 4, i // columns * height + 4
        for k, picture in enumerate(pictures):
            grid.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x + k * side, y))
        pen.text((x + wide * side / 2, y + side + 2), words, fill="black", font=font, anchor="ma")
    return grid


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m sdlora.mini.evaluate", description="Measures what the mini base and its LoRAs draw.")
    parser.add_argument("measure", choices=tuple(MEASURES))
    parser.add_argument("--base", default="mini", help="mini, or a diffusers folder")
    parser.add_argument("--lora", type=Path, help="LoRA file; needed for style and character")
    parser.add_argument("--strength", type=float, default=LoRA.strength, help="of the LoRA")
    parser.add_argument("--count", type=int, help="prompts; 200 for base, else 100")
    parser.add_argument("--seed", type=int, default=Request.seed, help="chooses the prompts, and is the first picture's seed")
    parser.add_argument("--guidance", type=float, default=Request.guidance)
    parser.add_argument("--steps", type=int, default=Request.steps, help="of the sampler")
    parser.add_argument("--sheet", type=Path, help="PNG of the first 48 pictures")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(words)
    if options.lora is None and options.measure != "base":
        parser.error(f"{options.measure} needs --lora FILE")
    return options


def measure(options: argparse.Namespace) -> None:
    """Opens the base, measures, and writes what was asked for."""
    device = devices.best_device()
    base = base_files.load(options.base, device=device, dtype=devices.base_dtype(device))
    settings = Request("", seed=options.seed, steps=options.steps, guidance=options.guidance)
    loras = [LoRA(options.lora, options.strength)] if options.lora else []
    count = COUNTS[options.measure] if options.count is None else options.count
    report, cells = MEASURES[options.measure](base, loras, settings, count)
    table = Table("measure", "figure", "goal", title=f"{report.pictures} pictures")
    for row in rows(report):
        table.add_row(*row)
    Console().print(table)
    if options.sheet:
        buffer = io.BytesIO()
        sheet(cells).save(buffer, "PNG")
        files.write(options.sheet, buffer.getvalue())
    if options.json:
        values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        files.write(options.json, (json.dumps({"settings": values, **asdict(report)}, indent=2) + "\n").encode())


def main(words: list[str] | None = None) -> int:
    """Runs the command; 2 and one sentence for a mistake that the user can mend."""
    try:
        measure(arguments(words))
    except UserError as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
