"""Is the recommended checkpoint the best one? `python -m benchmarks.recommendation --kind style|character --seeds 10 --out FOLDER`.

For each seed a run that is deliberately too long: the 30 pictures of the example style, or 16 of the example character's drawn from the
seed; a quarter of them held out; a high rate that does not fall, and an average of the weights, so that each checkpoint is as good as a
run that ended there. Then, for each checkpoint, what the held-out pictures say, and the truth: pictures of prompts that the base never
saw, judged by the world. The true score is the mean of some shares, in points of 100: for a style, pictures in the style, and pictures
that show the thing, colour and background asked for; for a character, pictures that show it when called, pictures without its name in
which it is absent, and those that show what was asked for.
The reader of stained glass looks at fewer places than `sdlora.mini.evaluate` lets it (96 % of its readings are the same, in a quarter of
the time), and pictures are drawn in 6 steps. Where --count prompts cannot tell to a standard error whether the recommended checkpoint is
within 2 points of the best, all checkpoints are judged on more, up to --most. Everything is kept in FOLDER, so an interrupted benchmark
goes on, and a larger --count draws only more.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from PIL import Image

from sdlora import (
    base_files,
    base_model,
    captions,
    config,
    generate,
    latents,
    lora,
    lora_file,
    material,
    run_folder,
    train,
    validation,
    verdict,
)
from sdlora import cache as kept
from sdlora.base_model import Base
from sdlora.config import Config
from sdlora.events import Validated
from sdlora.generate import LoRA, Request
from sdlora.latents import Latents
from sdlora.material import Material
from sdlora.mini import evaluate, lead, reader
from sdlora.validation import Exam
from sdlora.verdict import Verdict

TRIGGERS = {"style": "vitrail", "character": "pip"}
RATES = {"style": (2e-3, 0.0), "character": (2e-3, 4e-4)}
PICTURES = {"style": 30, "character": 16}
STEPS = {"style": 3072, "character": 768}  # far beyond the best checkpoint
AVERAGES = {"style": 0.995, "character": 0.98}  # with fewer steps in it, a style's checkpoints break now and then at this rate
BLOCK = 40
NEAR, FALLEN = 2.0, 5.0  # points below the best checkpoint: as good, and clearly worse
LENGTHS, STRIDE = (0.5, 0.58, 0.66, 0.75), 6  # where the reader looks for things in stained glass
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One run: its looks, the step 0 among them, and by step each judged picture's part in the truth."""

    kind: str
    seed: int
    looks: tuple[Validated, ...]
    truth: dict[int, list[tuple[bool, ...]]]

    @cached_property
    def points(self) -> dict[int, float]:
        """The true score of each checkpoint, 0 to 100."""
        return {step: 100 * float(np.mean(pictures)) for step, pictures in self.truth.items()}

    @cached_property
    def told(self) -> Verdict:
        """What a user would be told."""
        return verdict.verdict(self.looks, kind=self.kind)

    @property
    def best(self) -> int:
        """The step whose true score is the highest."""
        return max(self.points, key=lambda step: self.points[step])

    @property
    def regret(self) -> float:
        """What the recommended checkpoint lacks of the best, in points."""
        return self.points[self.best] - self.points[self.told.step]

    @property
    def fall(self) -> float:
        """What the last checkpoint lacks of the best, in points."""
        return self.points[self.best] - self.points[max(self.points)]

    @property
    def regret_error(self) -> float:
        """The standard error of the regret, from the same prompts and seeds."""
        differences = np.mean(self.truth[self.best], axis=1) - np.mean(self.truth[self.told.step], axis=1)
        return 100 * stdev(differences.tolist()) / len(differences) ** 0.5


# --- a run --------------------------------------------------------------------------------------------------------------------


def write_data(kind: str, seed: int, folder: Path) -> None:
    """So many of the example pictures as `PICTURES` says with their captions, drawn from the seed."""
    folder.mkdir(parents=True, exist_ok=True)
    every = sorted(Path("datasets", kind).glob("*.png"))
    for i in np.random.default_rng([seed, 41]).permutation(len(every))[: PICTURES[kind]].tolist():
        for path in (every[i], every[i].with_suffix(".txt")):
            shutil.copy(path, folder / path.name)


def trained(kind: str, seed: int, folder: Path, *, steps: int, every: int, ema: float) -> Config:
    """The run of a seed, trained unless it has been."""
    write_data(kind, seed, folder / "data")
    rate, text_rate = RATES[kind]
    optimizer = {"learning_rate": rate, "text_encoder_learning_rate": text_rate, "schedule": "constant", "ema": ema}
    targets = {"targets": "attn-mlp-conv", "text_targets": "attn", "text_encoder": kind == "character", "rank": 16, "alpha": 16.0}
    values = {
        "base": "mini", "data": str(folder / "data"), "kind": kind, "trigger": TRIGGERS[kind], "name": "run", "steps": steps, "batch": 4,
        "seed": seed, "save_every": every, "sample_every": 0, "report": False, "min_snr_gamma": 0.0, "optimizer": optimizer,
        "lora": targets, "validation": {"share": 0.25, "every": 0},
    }  # fmt: skip
    run = config.parse(values, where="recommendation")
    if not (folder / "run" / "run.safetensors").exists():
        shutil.rmtree(folder / "run", ignore_errors=True)  # one that was interrupted
        for _ in train.train(run, folder / "run"):
            pass
    return run


def checkpoints(folder: Path, steps: int, every: int) -> dict[int, Path]:
    """The LoRA file of each step that was to be saved, the result last."""
    saved = {step: run_folder.checkpoint_path(folder / "run", "run", step) for step in range(every, steps, every)}
    return saved | {steps: folder / "run" / "run.safetensors"}


# --- what the held-out pictures say -------------------------------------------------------------------------------------------


def encoded(base: Base, run: Config, samples: tuple[material.Sample, ...]) -> tuple[Material, list[tuple[Latents, ...]]]:
    """Some samples at their sizes with their latents."""
    data = material.material(run, samples, grain_px=base.grain_px, resolution_px=base.resolution_px)
    views = [item.views[0] for item in data.items]
    return data, [(one,) for one in kept.latents(base, views, folder=None, background=latents.images.BACKGROUND)]


def exam_of(base: Base, run: Config) -> Exam:
    """What `train` asks at each look."""
    found = material.find(run)
    out = validation.subjects(*encoded(base, run, found.held_out), most=run.validation.most_pictures, held_out=True)
    seen = validation.subjects(*encoded(base, run, found.samples), most=len(out), held_out=False)
    return validation.exam(
        base, (*out, *seen), seed=run.seed, draws=run.validation.draws, trigger=run.trigger, class_word=run.class_word,
        trains_text=bool(run.lora.text_encoder),
    )  # fmt: skip


def looks_at(run: Config, files: dict[int, Path]) -> Iterator[Validated]:
    """A look at the base and at each checkpoint."""
    base = base_files.load("mini", device=CPU, dtype=torch.float32)
    asked, places = exam_of(base, run), base_model.stems(base)
    yield Validated(0, **asdict(validation.score(base, asked, batch=16)))
    for step, path in files.items():
        for part in base.parts.values():
            lora.remove(part)
        for stem, update in lora_file.read(path).modules.items():
            part_name, name = places[stem]
            lora.attach(base.parts[part_name], name, update, adapter="default")
        yield Validated(step, **asdict(validation.score(base, asked, batch=16)))


# --- the truth ----------------------------------------------------------------------------------------------------------------


@cache
def judge_base() -> Base:
    """The base that draws for the judge."""
    return base_files.load("mini", device=CPU, dtype=torch.float32)


def judged(kind: str, path: Path, *, block: int) -> list[tuple[bool, ...]]:
    """The shares of the true score for each prompt of a block; all checkpoints get the same prompts and seeds."""
    base, settings = judge_base(), Request("", seed=1000 + block * BLOCK, steps=6)
    asked = evaluate.held_out((block + 1) * BLOCK, seed=1)[block * BLOCK :]
    plain = [evaluate.prompt_of(one) for one in asked]
    generate.set_loras(base, [LoRA(path)])
    if kind == "style":
        pictures = list(evaluate.draw(base, [captions.with_trigger(words, TRIGGERS[kind]) for words in plain], settings))
        return [(lead.is_style(one, wanted), shows(one, wanted)) for one, wanted in zip(pictures, asked, strict=True)]
    called, others = (list(evaluate.draw(base, words, settings)) for words in (evaluate.pip_prompts(asked, company=False), plain))
    return [
        (reader.shows_pip(pip), not reader.shows_pip(one), shows(one, wanted))
        for pip, one, wanted in zip(called, others, asked, strict=True)
    ]


def shows(picture: Image.Image, wanted: lead.Combination) -> bool:
    """Whether the reader finds the thing, its colour and the background."""
    found = reader.read(picture)
    return (found.kind, found.colour, found.background) == wanted


# --- one case after the other -------------------------------------------------------------------------------------------------


def case(options: argparse.Namespace, seed: int) -> Case:
    """All of one seed, from the folder as far as it was done before."""
    folder: Path = options.out / f"{options.kind}-{seed}"
    run = trained(options.kind, seed, folder, steps=options.steps, every=options.every, ema=options.ema)
    files, noted = checkpoints(folder, options.steps, options.every), folder / "looks.json"
    if not noted.exists():
        noted.write_text(json.dumps([asdict(look) for look in looks_at(run, files)], indent=1))
    rows = json.loads(noted.read_text())
    looks = tuple(Validated(row["step"], row["loss"], row["seen_loss"], tuple(row["bands"]), row["drift"]) for row in rows)
    for count in range(options.count, max(options.count, options.most) + 1, BLOCK):
        truth = {step: truth_of(options, folder, step, path, count=count) for step, path in files.items()}
        found = Case(options.kind, seed, looks, truth)
        if abs(found.regret - NEAR) > found.regret_error:
            break
    return found


def truth_of(options: argparse.Namespace, folder: Path, step: int, path: Path, *, count: int) -> list[tuple[bool, ...]]:
    """What the judge says of a checkpoint; blocks judged before are not drawn again."""
    found: list[tuple[bool, ...]] = []
    for block in range(-(-count // BLOCK)):
        noted = folder / f"truth-{step:06d}-{block}.json"
        if not noted.exists():
            noted.write_text(json.dumps([[bool(one) for one in pair] for pair in judged(options.kind, path, block=block)]))
        found += map(tuple, json.loads(noted.read_text()))
    return found


def line(one: Case) -> str:
    """A row of the table."""
    scores = " ".join(f"{value:.0f}" for value in one.points.values())
    losses = " ".join(f"{look.loss:.4f}" for look in one.looks if look.loss is not None)
    return (
        f"| {one.seed} | {scores} | {losses} | {one.told.step} | {one.best} | {one.regret:.1f} ± {one.regret_error:.1f} "
        f"| {len(next(iter(one.truth.values())))} | {one.fall:.1f} | {'yes' if one.told.overfitting else 'no'} |"
    )


def table(cases: Sequence[Case]) -> str:
    """Every case, and how often the recommendation and the flag were right."""
    near = sum(one.regret <= NEAR for one in cases)
    surely_not = sum(one.regret - 2 * one.regret_error > NEAR for one in cases)
    fell = [one for one in cases if one.fall >= FALLEN]
    rows = "\n".join(line(one) for one in cases)
    return (
        "| seed | true scores | held-out losses, the base's first | recommended | best | regret | prompts | fall at the end "
        "| overfitting flagged |\n"
        f"| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |\n{rows}\n\n"
        f"Within {NEAR:g} points of the best: {near} of {len(cases)}; more than that below it by two standard errors: {surely_not}. "
        f"Mean regret {fmean(one.regret for one in cases):.1f} points; of always taking the last checkpoint "
        f"{fmean(one.fall for one in cases):.1f}, of the lowest held-out loss {fmean(map(regret_of_loss, cases)):.1f}. Overfitting flagged "
        f"in {sum(one.told.overfitting for one in fell)} of {len(fell)} runs that fell by {FALLEN:g} points, and in "
        f"{sum(one.told.overfitting for one in cases)} of all.\n"
    )


def regret_of_loss(one: Case) -> float:
    """What the checkpoint with the lowest held-out loss lacks of the best, in points."""
    lowest = min(one.looks[1:], key=lambda look: look.loss or 0.0)
    return one.points[one.best] - one.points[lowest.step]


def main() -> None:
    """Reads the command, goes through the seeds, and prints the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=tuple(TRIGGERS), required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="of a run; 3072 for a style and 768 for a character if not given")
    parser.add_argument("--every", type=int, help="steps between checkpoints; a quarter of those if not given")
    parser.add_argument("--ema", type=float, help="of the average of weights that checkpoints are made of; 0.995 and 0.98 if not given")
    parser.add_argument("--count", type=int, default=120, help="prompts for the judge, in blocks of 40")
    parser.add_argument("--most", type=int, default=400, help="prompts where more are needed to say whether the regret is small")
    options = parser.parse_args()
    options.steps = options.steps or STEPS[options.kind]
    options.every = options.every or options.steps // 4
    options.ema = options.ema or AVERAGES[options.kind]
    reader.STRIDE, reader.LENGTHS = STRIDE, LENGTHS
    cases = []
    for seed in range(options.first, options.first + options.seeds):
        cases.append(case(options, seed))
        (options.out / f"{options.kind}.md").write_text(table(cases), encoding="utf-8")
        print(line(cases[-1]), flush=True)
    print(table(cases))


if __name__ == "__main__":
    main()
