"""LoRA against full fine-tuning: `python -m benchmarks.full_finetune --config configs/mini-style.toml --out FOLDER`.

Both train the same UNet from the same base on the same batches with the same noise, in fp32, through `train.loss_of_batch`; only
which weights move differs. Each contender has a process of its own, one after the other, so that the memory figures are honest. Both
are then opened again from the files they have written, and judged as `sdlora.mini.evaluate` judges; the untouched base is judged too.
The table goes to the screen and to FOLDER/table.md, the figures to FOLDER/figures.json, sheets of pictures beside them.

    python -m benchmarks.full_finetune --counts
    python -m benchmarks.full_finetune --speed mini|block|sd15|sdxl --out FOLDER [--pairs 7] [--batch 1] [--resolution 512] [--steps 4]

The first counts SD 1.5 and SDXL at full size on the `meta` device: weights that move, what they weigh while training and as a file,
operations of a step. The second measures what a step takes, turn by turn in one process.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks import command, full_size_step, peers, train_step
from benchmarks import generate as drawing
from sdlora import (
    adapters,
    base_files,
    base_model,
    cache,
    captions,
    config,
    counts,
    devices,
    generate,
    lora,
    lora_attention,
    lora_file,
    lora_flat,
    lora_names,
    material,
    optimizer,
    prepare,
    result,
    train,
)
from sdlora.adapters import Trained
from sdlora.base_model import Base
from sdlora.config import Config
from sdlora.deltas import LowRank, Update
from sdlora.errors import UserError
from sdlora.generate import LoRA, Request
from sdlora.material import Material
from sdlora.mini import evaluate
from sdlora.prepare import Prepared

NAMES = {"base": "base", "lora": "LoRA", "full": "full fine-tuning"}


@dataclass(frozen=True)
class Cost:
    """What training took."""

    parameters: int
    checkpoint_bytes: int
    step_s: float
    step_cpu_s: float
    gradient_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    last_loss: float


@dataclass(frozen=True)
class Quality:
    """How the pictures of held-out prompts are judged: shares from 0 to 1."""

    pictures: int
    style: float
    scores: evaluate.Scores


def run_config(options: argparse.Namespace) -> Config:
    """The run that both contenders share; the text encoder stays as it is."""
    steps = [f"steps={options.steps}"] if options.steps else []
    return config.load(options.config, changes=[*steps, "lora.text_encoder=false"])


def trainable(base: Base, run: Config, options: argparse.Namespace) -> Trained:
    """The weights that move, and what moves them: fresh adapters as the trainer has them, or all of the UNet."""
    contender = options.contender
    if contender == "lora":
        adapters.add_lora(base, run)
        return adapters.trained(base, run)
    base.unet.requires_grad_(True)
    weights = list(base.unet.parameters())
    mover = optimizer.adamw([(weights, options.full_learning_rate)], weight_decay=run.optimizer.weight_decay)
    return Trained(mover, weights, [], [])


def data_of(base: Base, run: Config) -> Material:
    """The run's pictures at their sizes."""
    return material.material(run, material.find_or_refuse(run).samples, grain_px=base.grain_px, resolution_px=base.resolution_px)


def batches(base: Base, run: Config) -> Callable[[int], Tensor]:
    """A function from the step, 0 for the first, to its loss; pictures and captions are encoded once."""
    data = data_of(base, run)
    views = [view for item in data.items for view in item.views]
    encoded = cache.latents(base, views, folder=None, background=run.sizes.background)
    seen = tuple(tuple(next(encoded) for _ in item.views) for item in data.items)
    ready = Prepared(base, data, seen, prepare.listen(base, run, data, trains_text=False, folder=None), 0)
    alphas = base.alphas

    def loss(step: int) -> Tensor:
        batch = train.gather(run, ready, batch_index=step)
        return train.loss_of_batch(base, batch, alphas, run=run, batch_index=step)

    return loss


def peak_bytes() -> int:
    """The most memory that this process has held so far; macOS counts it in bytes, others in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_steps(base: Base, run: Config, trained: Trained) -> dict[str, Any]:
    """Trains and returns the figures of `Cost` that training shows; the settings of the optimizer are those of `train`."""
    loss, weights, adamw = batches(base, run), trained.weights, trained.mover
    step_s, step_cpu_s, value, gradients = [], [], math.nan, 0
    for step in track(range(run.steps), f"{run.steps} steps", console=Console(stderr=True)):
        began, cpu_began = time.perf_counter(), time.process_time()
        factor = optimizer.rate_factor(step, steps=run.steps, warmup=run.optimizer.warmup, schedule=run.optimizer.schedule)
        optimizer.set_rates(adamw, factor)
        with lora_flat.spread(trained.flats, trained.adapters, base.dtype):
            batch_loss = loss(step)
            torch.autograd.backward(batch_loss)
        torch.nn.utils.clip_grad_norm_(weights, run.optimizer.clip_norm or math.inf)
        gradients = sum(weight.grad.nbytes for weight in weights if weight.grad is not None)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        value = batch_loss.item()
        if not math.isfinite(value):
            raise UserError(f"The loss of step {step + 1} is not finite; lower the learning rate.")
        step_s.append(time.perf_counter() - began)
        step_cpu_s.append(time.process_time() - cpu_began)
    moments = sum(one.nbytes for state in adamw.state.values() for one in state.values() if isinstance(one, Tensor))
    return {
        "step_s": statistics.median(step_s), "step_cpu_s": statistics.median(step_cpu_s), "gradient_bytes": gradients,
        "optimizer_bytes": moments, "peak_bytes": peak_bytes(), "last_loss": value,
    }  # fmt: skip


def save(base: Base, run: Config, contender: str, out: Path) -> int:
    """Writes the LoRA file, or the fine-tuned base as a diffusers folder, both in fp16; returns the bytes of what was trained."""
    if contender == "lora":
        return result.save(base, run, out / "lora.safetensors", step=run.steps, data=data_of(base, run)).stat().st_size
    shutil.copytree(base_files.folder_of(run.base), out / "full", ignore=lambda folder, names: {"unet"} & set(names), dirs_exist_ok=True)
    base.unet.half().save_pretrained(out / "full" / "unet")
    return sum(path.stat().st_size for path in (out / "full" / "unet").glob("*.safetensors"))


def train_contender(options: argparse.Namespace) -> Cost:
    """Trains one contender and leaves its weights in the folder."""
    run = run_config(options)
    base = base_files.load(run.base, device=devices.best_device(), dtype=torch.float32)
    trained = trainable(base, run, options)
    figures = run_steps(base, run, trained)
    written = save(base, run, options.contender, options.out)
    return Cost(parameters=sum(weight.numel() for weight in trained.weights), checkpoint_bytes=written, **figures)


def judge(options: argparse.Namespace) -> Quality:
    """Opens what the contender has written, draws held-out prompts, and saves a sheet of them."""
    run = run_config(options)
    name = str(options.out / "full") if options.contender == "full" else run.base
    base = base_files.load(name, device=devices.best_device(), dtype=torch.float32)
    generate.set_loras(base, [LoRA(options.out / "lora.safetensors")] if options.contender == "lora" else [])
    trigger = "" if options.contender == "base" else run.trigger
    chosen = evaluate.held_out(options.count, seed=run.seed)
    prompts = [captions.with_trigger(evaluate.prompt_of(one), trigger) for one in chosen]
    pictures = evaluate.drawn(base, prompts, Request("", seed=run.seed), name="pictures")
    cells: list[evaluate.Cell] = [([picture], evaluate.words_of(one)) for picture, one in zip(pictures, chosen, strict=True)]
    evaluate.sheet(cells).save(options.out / f"{options.contender}.png")
    return Quality(len(pictures), evaluate.style_share(pictures, chosen), evaluate.scores(pictures, chosen))


def contend(options: argparse.Namespace) -> None:
    """One contender's whole work, its figures in `<contender>.json`."""
    cost = {} if options.contender == "base" else asdict(train_contender(options))
    (options.out / f"{options.contender}.json").write_text(json.dumps(cost | asdict(judge(options)), indent=2) + "\n")


def mebibytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.2f} MiB"


def markdown(figures: dict[str, dict[str, float]]) -> str:
    """The comparison as a Markdown table; figures that training alone has are empty for the base."""
    shown: list[tuple[str, str, Callable[[float], str]]] = [
        ("trainable parameters", "parameters", "{:,.0f}".format),
        ("checkpoint, fp16", "checkpoint_bytes", mebibytes),
        ("step, median", "step_s", "{:.3f} s".format),
        ("CPU time of a step, median", "step_cpu_s", "{:.3f} s".format),
        ("gradients", "gradient_bytes", mebibytes),
        ("optimizer state", "optimizer_bytes", mebibytes),
        ("peak memory of the process", "peak_bytes", mebibytes),
        ("nearer to the style", "style", "{:.1%}".format),
        *((f"{name} right", name, "{:.1%}".format) for name in ("background", "colour", "kind", "all_three")),
    ]
    lines = [f"| | {' | '.join(NAMES.values())} | full / LoRA |", "| --- | ---: | ---: | ---: | ---: |"]
    for label, key, form in shown:
        cells = [form(figures[name][key]) if key in figures[name] else "" for name in NAMES]
        ratio = f"{figures['full'][key] / figures['lora'][key]:.2f}" if figures["lora"][key] else ""
        lines.append(f"| {label} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines) + "\n"


# --- full size, counted -------------------------------------------------------------------------------------------------------


def unet_on_meta(family: str) -> Any:
    """A UNet of full size without weights, in bf16."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**full_size_step.plain(full_size_step.FAMILIES / family / "unet"))
    return nn.Module.to(unet, torch.bfloat16).train()


def step_flops(unet: Any, family: str, weights: list[nn.Parameter]) -> int:
    """Operations of a step of one picture at the family's own size."""
    side, width = unet.config.sample_size, unet.config.cross_attention_dim

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    more = {"text_embeds": empty(1, 1280), "time_ids": empty(1, 6)} if family == "sdxl" else None
    times = torch.zeros(1, device="meta", dtype=torch.long)
    answer = counts.of_step(
        lambda: unet(empty(1, 4, side, side), times, empty(1, 77, width), added_cond_kwargs=more).sample.float().square().mean(),
        weights=[*unet.parameters(), *weights],
    )
    return answer.flops


def counted(family: str, rank: int) -> dict[str, float]:
    """Full fine-tuning over LoRA: parameters, training state with the LoRA's base in fp32 and in bf16, fp16 file, operations."""
    unet = unet_on_meta(family)
    every = list(unet.parameters())
    size = sum(weight.numel() for weight in every)
    full_flops = step_flops(unet, family, [])
    lora.add(unet, rank=rank, alpha=rank, targets=base_model.targets("attn"), generator=torch.Generator())
    lora_attention.share_inputs(unet)
    weights = lora.parameters(unet)
    own = sum(weight.numel() for weight in weights)
    modules = {
        lora_names.stem_of("unet", name): Update(LowRank(torch.zeros(update.change.down.shape), torch.zeros(update.change.up.shape), rank))
        for name, update in lora.exports(unet).items()
        if isinstance(update.change, LowRank)
    }
    file = len(lora_file.to_bytes(modules, {}, family=family))
    state = 16  # bytes per weight that moves: itself, its gradient and AdamW's two averages, in fp32
    return {
        "parameters": size / own, "state, base in fp32": state * size / (4 * size + state * own),
        "state, base in bf16": state * size / (2 * size + state * own), "file, fp16": 2 * size / file,
        "operations": full_flops / step_flops(unet, family, weights),
    }  # fmt: skip


def show_counts() -> int:
    """Prints how many times as much full fine-tuning takes."""
    columns = [(family, rank) for family in ("sd1", "sdxl") for rank in (4, 16)]
    found = {f"{family}, rank {rank}": counted(family, rank) for family, rank in columns}
    print(f"| full / LoRA | {' | '.join(found)} |\n| --- |{' ---: |' * len(found)}")
    for key in next(iter(found.values())):
        print(f"| {key} | {' | '.join(f'{one[key]:,.2f}' for one in found.values())} |")
    return 0


# --- speed --------------------------------------------------------------------------------------------------------------------


def show_speed(options: argparse.Namespace) -> int:
    """Prints what a step of either takes, and the ratio of full fine-tuning to LoRA; both move the same UNet, so it is there once."""
    words = ["--family", options.speed, "--batch", str(options.batch), "--out", str(options.out)]
    asked = train_step.arguments(words + (["--resolution", str(options.resolution)] if options.resolution else []))
    steps = options.steps or asked.steps
    go, _ = train_step.our_course(asked)
    base, run, layers = go.ready.base, go.run, lora.layers(go.ready.base.unet)
    adapters_own = {id(weight) for weight in lora.parameters(base.unet)}
    weights = [weight for weight in base.unet.parameters() if id(weight) not in adapters_own]
    mover = optimizer.adamw([(weights, 1e-5)], weight_decay=run.optimizer.weight_decay)
    taken = {"LoRA": 0, "full": 0}

    def wear(*, layered: bool) -> None:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(base.unet.get_submodule(parent), child, layer if layered else layer.base)
        for weight in weights:
            weight.requires_grad_(not layered)

    def next_of(who: str) -> int:
        taken[who] += 1
        return taken[who]

    def full_step() -> None:
        step = next_of("full")
        batch = train.gather(run, go.ready, batch_index=step)
        assert batch
        torch.autograd.backward(train.loss_of_batch(base, batch, go.alphas, run=run, batch_index=step))
        nn.utils.clip_grad_norm_(weights, run.optimizer.clip_norm)
        mover.step()
        mover.zero_grad(set_to_none=True)

    device = devices.best_device()
    work: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "LoRA": (lambda: wear(layered=True), lambda: [train.take_step(go, next_of("LoRA")) for _ in range(steps)]),
        "full": (lambda: wear(layered=False), lambda: [full_step() for _ in range(steps)]),
    }
    times = drawing.alternating(work, rounds=options.pairs, device=device)
    told = f"{options.speed}, {asked.resolution} px, batch {options.batch}, {steps} step{'s' * (steps > 1)} per turn"
    print(f"{told}\n\n{drawing.table(times, against='LoRA')}\n")
    ratio = drawing.quotient(times, "full", "LoRA")
    print(f"LoRA's throughput is {ratio:.2f} times that of full fine-tuning ({peers.clock_name(device)}).")
    return 0


# --- both trained and judged --------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace, words: list[str]) -> int:
    """Runs each contender in a process of its own and shows the table; returns the code of the first that failed."""
    options.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for contender in NAMES:
        print(f"— {NAMES[contender]}", file=sys.stderr, flush=True)
        asked = [sys.executable, "-m", "benchmarks.full_finetune", *words, "--contender", contender]
        code = subprocess.run(asked, check=False).returncode
        if code:
            return code
        found[contender] = json.loads((options.out / f"{contender}.json").read_text())
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    settings |= {"device": str(devices.best_device()), "threads": torch.get_num_threads()}
    (options.out / "figures.json").write_text(json.dumps({"settings": settings} | found, indent=2) + "\n")
    table = markdown({name: one | one["scores"] for name, one in found.items()})
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def arguments(words: list[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_finetune", description="LoRA against full fine-tuning.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="the run that both train")
    what.add_argument("--counts", action="store_true", help="count SD 1.5 and SDXL at full size")
    what.add_argument("--speed", choices=train_step.FAMILIES, help="measure steps of this base")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for weights, figures and sheets")
    parser.add_argument("--pairs", type=int, default=7, help="turns of each, for --speed")
    parser.add_argument("--batch", type=int, default=1, help="for --speed")
    parser.add_argument("--resolution", type=int, help="side in px, for --speed; the family's own if not given")
    parser.add_argument("--steps", type=int, help="instead of the config's, or per turn for --speed")
    parser.add_argument("--full-learning-rate", type=float, default=3e-4, help="peak rate of full fine-tuning; the LoRA has the config's")
    parser.add_argument("--count", type=int, default=100, help="held-out prompts to judge")
    parser.add_argument("--contender", choices=tuple(NAMES), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def measure(options: argparse.Namespace, words: list[str]) -> int:
    """Compares, or is one contender's process; the exit code."""
    if options.counts:
        return show_counts()
    if options.speed:
        return show_speed(options)
    if options.contender is None:
        return compare(options, words)
    contend(options)
    return 0


def main(words: list[str]) -> int:
    """Compares, or is one contender's process; 2 and one sentence for a mistake that the user can mend."""
    return command.code_of(measure, arguments(words), words)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
