"""What each default does to the result: `python -m benchmarks.defaults --kind style|character --out FOLDER [--jobs 1] [--only NAME]`.

Every row trains the example config with one setting changed and all else equal: steps, rank, rates, pictures, and by seed the same
batches and noise. The score is the world's own (`sdlora.mini.evaluate`, 0 to 100): for a style the share of pictures that are in the
style and show what was asked for, all three; for a character the share in which it is shown when called less the share in which it is
shown when not. Prompts were never seen, and each seed draws them from its own noise. Few steps keep scores away from 100, where nothing
could help. Each finished run is a JSON in FOLDER and is not run again; the table holds what is there, compared seed by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from sdlora import base_files, captions, config, devices, files, generate, train
from sdlora.base_model import Base
from sdlora.config import Config
from sdlora.events import Done
from sdlora.generate import LoRA, Request
from sdlora.mini import evaluate, lead, reader

CONFIGS = {"style": "configs/mini-style.toml", "character": "configs/mini-character.toml"}

# What is measured is pinned, so that the comparison means the same when a default changes; the rest is no part of training.
PINNED = (
    "min_snr_gamma=0.0", 'objective.weighting="min_snr"', "objective.stratified=true", "optimizer.lora_plus_ratio=1.0",
    "lora.rank_stabilised=false", "optimizer.ema=0.0", "captions.dropout=0.05",
    "sample_every=0", "save_every=0", "validation.share=0.0", "validation.every=0", "report=false", 'cache="memory"',
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What is changed, what it is compared with, and a factor on all learning rates."""

    changes: tuple[str, ...] = ()
    against: str = "baseline"
    rates: float = 1.0


VARIANTS = {
    "baseline": Variant(),
    "min-SNR 5": Variant(("min_snr_gamma=5.0",)),
    "independent timesteps": Variant(("objective.stratified=false",)),
    "LoRA+ 4": Variant(("optimizer.lora_plus_ratio=4.0",)),
    "LoRA+ 16": Variant(("optimizer.lora_plus_ratio=16.0",)),
    "LoRA+ 16, rates / 4": Variant(("optimizer.lora_plus_ratio=16.0",), rates=1 / 4),  # A / 4, B · 4: the same rate in the geometric mean
    "EMA 0.99": Variant(("optimizer.ema=0.99",)),
    "EMA 0.995": Variant(("optimizer.ema=0.995",)),
    "no caption dropout": Variant(("captions.dropout=0.0",)),
    "rsLoRA": Variant(("lora.rank_stabilised=true",)),  # alpha 16: updates count 4 times as much
    "rank 64": Variant(("lora.rank=64", "lora.alpha=64.0")),  # the same scale of 1
    "rank 64, rsLoRA": Variant(("lora.rank=64", "lora.alpha=4.0", "lora.rank_stabilised=true"), "rank 64"),  # 1 at rank 16, ½ here
}


def run_of(kind: str, variant: Variant, *, seed: int, steps: int) -> Config:
    """The example config of a kind with a variant's changes."""
    rates = config.load(Path(CONFIGS[kind])).optimizer
    scaled = (
        f"optimizer.learning_rate={rates.learning_rate * variant.rates}",
        f"optimizer.text_encoder_learning_rate={rates.text_encoder_learning_rate * variant.rates}",
    )
    return config.load(Path(CONFIGS[kind]), changes=[*PINNED, *scaled, f"seed={seed}", f"steps={steps}", *variant.changes])


def score_style(base: Base, run: Config, settings: Request, count: int) -> dict[str, float]:
    """Shares of the pictures, 0 to 100: in the style and right, in the style, right."""
    chosen = evaluate.held_out(count, seed=0)
    prompts = [captions.with_trigger(evaluate.prompt_of(one), run.trigger) for one in chosen]
    pictures = list(evaluate.draw(base, prompts, settings))
    styled = np.array([lead.is_style(picture, one) for picture, one in zip(pictures, chosen, strict=True)])
    right = np.array([_is_right(picture, one) for picture, one in zip(pictures, chosen, strict=True)])
    shares = {"score": styled & right, "in the style": styled, "all three right": right}
    return {name: 100 * float(np.mean(share)) for name, share in shares.items()}


def _is_right(picture: Image.Image, asked: lead.Combination) -> bool:
    read = reader.read(picture)
    return (read.kind, read.colour, read.background) == asked


def score_character(base: Base, run: Config, settings: Request, count: int) -> dict[str, float]:
    """Shares of the pictures, 0 to 100: shown when called less shown when not, and its two parts."""
    chosen = evaluate.held_out(count, seed=0)
    called, others = evaluate.pip_prompts(chosen, company=False), [evaluate.prompt_of(one) for one in chosen]
    shown, intruding = (
        100 * float(np.mean([reader.shows_pip(picture) for picture in evaluate.draw(base, prompts, settings)]))
        for prompts in (called, others)
    )
    return {"score": shown - intruding, "shown when called": shown, "absent when not called": 100 - intruding}


SCORES: dict[str, Callable[[Base, Config, Request, int], dict[str, float]]] = {"style": score_style, "character": score_character}


def measure(kind: str, variant: Variant, *, seed: int, steps: int, count: int, sampler_steps: int) -> dict[str, float]:
    """Trains one run and judges what it draws; with the seconds that each took."""
    began_s = time.perf_counter()
    run = run_of(kind, variant, seed=seed, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        *_, done = train.train(run, Path(folder) / "run")
        assert isinstance(done, Done)
        trained_s = time.perf_counter()
        device = devices.best_device()
        base = base_files.load(run.base, device=device, dtype=devices.base_dtype(device))
        generate.set_loras(base, [LoRA(done.path)])
        found = SCORES[kind](base, run, Request("", seed=1000 * (seed + 1), steps=sampler_steps), count)
    return found | {"train_s": trained_s - began_s, "judge_s": time.perf_counter() - trained_s}


def path_of(folder: Path, kind: str, name: str, seed: int, *, steps: int) -> Path:
    """Where the figures of one run lie."""
    return folder / f"{kind}-{steps}-{''.join(c if c.isalnum() else '-' for c in name)}-{seed}.json"


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error s / √n; infinite for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("inf")
    return statistics.fmean(values), error


def verdict(difference: float, error: float) -> str:
    """What a difference says at two standard errors; five seeds go beyond them by chance alone one time in nine (Student's t)."""
    if error == float("inf"):
        return "one seed says nothing"
    return "no difference" if abs(difference) <= 2 * error else "helps" if difference > 0 else "harms"


def table(found: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """The lines of a markdown table.

    Args:
        found: figures by variant and seed.
    """
    columns = [name for name in next(iter(found["baseline"].values())) if not name.endswith("_s")]
    head = ["", *columns, "compared with", "difference", "", "seeds", "s per run"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * len(columns) + " --- | ---: | --- | ---: | ---: |"]
    for name, by_seed in found.items():
        figures = ["{:.1f} ± {:.1f}".format(*mean_and_error([one[column] for one in by_seed.values()])) for column in columns]
        seconds = statistics.fmean(one["train_s"] + one["judge_s"] for one in by_seed.values())
        against = VARIANTS[name].against
        shared = [seed for seed in by_seed if name != against and seed in found.get(against, {})]
        change, error = mean_and_error([by_seed[seed]["score"] - found[against][seed]["score"] for seed in shared]) if shared else (0, 0)
        compared = [against, f"{change:+.1f} ± {error:.1f}", verdict(change, error)] if shared else ["", "", ""]
        lines.append(f"| {' | '.join([name, *figures, *compared, str(len(by_seed)), f'{seconds:.0f}'])} |")
    return lines


def read(folder: Path, kind: str, *, steps: int, seeds: int) -> dict[str, dict[int, dict[str, float]]]:
    """What has been measured so far, by variant and seed."""
    paths = {name: {seed: path_of(folder, kind, name, seed, steps=steps) for seed in range(seeds)} for name in VARIANTS}
    there = {name: {seed: path for seed, path in by_seed.items() if path.is_file()} for name, by_seed in paths.items()}
    return {
        name: {seed: json.loads(path.read_text())["figures"] for seed, path in by_seed.items()}
        for name, by_seed in there.items()
        if by_seed
    }


def main() -> None:
    """Measures what is missing, seed by seed, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description="What each default does to the result.")
    parser.add_argument("--kind", choices=tuple(CONFIGS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures of each run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--count", type=int, default=100, help="prompts per run")
    parser.add_argument("--sampler-steps", type=int, default=10)
    parser.add_argument("--only", choices=tuple(VARIANTS), action="append", help="this row; may be given again")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; set OMP_NUM_THREADS=1")
    options = parser.parse_args()
    judged = {"steps": options.steps, "count": options.count, "sampler_steps": options.sampler_steps}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = {}
        for seed in range(options.seeds):
            for name in options.only or VARIANTS:
                path = path_of(options.out, options.kind, name, seed, steps=options.steps)
                if not path.is_file():
                    waiting[pool.submit(measure, options.kind, VARIANTS[name], seed=seed, **judged)] = (name, seed, path)
        for done in as_completed(waiting):
            name, seed, path = waiting[done]
            files.write(path, (json.dumps(judged | {"figures": done.result()}, indent=2) + "\n").encode())
            print(f"{name}, seed {seed}: " + ", ".join(f"{key} {value:.1f}" for key, value in done.result().items()), flush=True)
    found = read(options.out, options.kind, steps=options.steps, seeds=options.seeds)
    print("\n".join(table(found)) if "baseline" in found else "The baseline has not been measured yet.")


if __name__ == "__main__":
    main()
