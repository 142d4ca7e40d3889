"""A training step, ours against the usual way, side by side on whatever machine this is.

    python -m benchmarks.train_step --family mini|block|sd15|sdxl --batch 1 --rank 16 --targets attn --against diffusers --json FILE

First the gate: with the same start, noise and timesteps our gradients are PEFT's to 1e-5 in fp32; where they are not, no speed is printed.
Then each contender has a process of its own, and they take turns, first to last and last to first. Ours is `train.take_step`, the
trainer's own; a piece is left out by `--leave-one-out` in the benchmark, not in the trainer. "block" is what SD 1.5 has at 320 and 640
channels, with its autoencoder and text encoder: a stack of full width that a CPU can repeat. What the columns are: docs/performance.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks import command, full_size_step, peers
from sdlora import (
    base_files,
    config,
    counts,
    course,
    devices,
    latents,
    lora,
    lora_attention,
    lora_flat,
    optimizer,
    prepare,
    processes,
    recorded,
    train,
    winograd,
)
from sdlora import material as materials
from sdlora.course import Course
from sdlora.errors import UserError
from sdlora.mini.tokens import build_tokenizer

FAMILIES = ("mini", "block", "sd15", "sdxl")
PIECES = {
    "fused": "one autograd function per linear", "shared": "q, k and v asked together",
    "flat": "one tensor, fused AdamW, without which nothing is recorded", "recorded": "operations noted once and played",
    "winograd": "3x3 convolutions with fewer products on a CPU", "cached": "latents and text kept",
    "whole": "linears as they came, not in 8 bits",
}  # fmt: skip
TOLERANCE = 1e-5
WIDTHS, KIND = [320, 640], "CrossAttn{}Block2D"  # of "block"


@dataclass(frozen=True)
class Runner:
    """A contender, ready: its whole step by number, and apart from that its loss and what moves the weights, to be counted."""

    step: Callable[[int], object]
    loss: Callable[[], Tensor]
    move: Callable[[], object]
    before: Iterable[Tensor]
    caching_s: float


# --- what all of them are given -----------------------------------------------------------------------------------------------


def base_of(options: argparse.Namespace) -> str:
    """The base that all train: the embedded one, or a folder of random weights in fp16, written once."""
    if options.base or options.family == "mini":
        return str(options.base or "mini")
    folder: Path = options.out / options.family
    if options.family == "block" and not (folder / "model_index.json").is_file():
        write_block(folder)
    elif options.family != "block":
        full_size_step.write_base(folder, {"sd15": "sd1", "sdxl": "sdxl"}[options.family])
    return str(folder)


def write_block(folder: Path) -> None:
    """SD 1.5's own parts, of its UNet two levels of transformers down, the middle, and two up, a layer each."""
    torch.manual_seed(0)
    source = full_size_step.FAMILIES / "sd1"
    settings = full_size_step.plain(source / "unet") | {
        "block_out_channels": WIDTHS, "layers_per_block": 1, "sample_size": 32, "down_block_types": [KIND.format("Down")] * 2,
        "up_block_types": [KIND.format("Up")] * 2,
    }  # fmt: skip
    UNet2DConditionModel(**settings).half().save_pretrained(folder / "unet")
    AutoencoderKL(**full_size_step.plain(source / "vae")).half().save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**full_size_step.plain(source / "text_encoder"))).half().save_pretrained(folder / "text_encoder")
    build_tokenizer(folder / "tokenizer")
    shutil.copytree(source / "scheduler", folder / "scheduler")
    (folder / "model_index.json").write_bytes((source / "model_index.json").read_bytes())


def pictures_of(options: argparse.Namespace) -> Path:
    """Pictures of noise with captions, enough for two batches."""
    folder: Path = options.out / f"pictures-{options.resolution}-{options.batch}"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(max(4, 2 * options.batch)):
        if not (folder / f"{i:03}.txt").is_file():
            pixels = np.random.default_rng(i).integers(0, 256, (options.resolution, options.resolution, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03}.png")
            (folder / f"{i:03}.txt").write_text(f"picture {i} of noise")
    return folder


def adapters_of(options: argparse.Namespace) -> Path:
    """The file with the adapters' first numbers, which the gate draws and all contenders take."""
    return options.out / f"adapters-{options.family}-{options.rank}-{options.targets}.safetensors"


# --- ours ---------------------------------------------------------------------------------------------------------------------


def our_course(options: argparse.Namespace, *, precision: str = "auto", quantise: str = "none") -> tuple[Course, float]:
    """A run of the trainer up to its first step, and what the caching took."""
    values = {
        "base": str(base_of(options)), "data": str(pictures_of(options)), "kind": "style", "name": "bench", "quantise": quantise,
        "steps": 2000, "batch": options.batch, "resolution_px": options.resolution, "cache": "memory", "precision": precision,
        "validation": {"every": 0}, "report": False, "sample_every": 0, "save_every": 0, "captions": {"dropout": 0.0},
        "lora": {"rank": options.rank, "alpha": options.rank, "targets": options.targets, "text_encoder": False},
        "objective": {"weighting": "none"},
        "optimizer": {
            "schedule": "constant", "warmup": 0.0, "learning_rate": peers.LEARNING_RATE, "weight_decay": peers.WEIGHT_DECAY,
            "clip_norm": peers.CLIP_NORM,
        },
    }  # fmt: skip
    run = prepare.linked_run(config.parse(values, where="train_step")).run
    device = devices.best_device()
    dtype = devices.base_dtype(device, run.precision)
    accelerator = processes.start(devices.mixed_precision(dtype))
    began = 0.0
    work = prepare.prepare(run, materials.find_or_refuse(run), options.out, device=device, dtype=dtype)
    while True:
        try:
            if type(next(work)).__name__ == "Checked":  # from here on it encodes
                began = clock(device)
        except StopIteration as done:
            return course.assembled(run, options.out, done.value, accelerator), clock(device) - began


def clock(device: torch.device) -> float:
    """Process CPU seconds on a CPU, else seconds."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def voices(go: Course) -> dict[str, lora.Adapter]:
    """The UNet's adapters by the names of their modules."""
    return {name: next(layer.each_adapter()) for name, layer in lora.layers(go.ready.base.unet).items()}


def ours(options: argparse.Namespace, without: str) -> Runner:
    """The trainer's step, or what is left of it without a piece."""
    if without == "flat":
        optimizer.OPTIMIZERS["adamw"] = replace(optimizer.OPTIMIZERS["adamw"], shapeless=False)
    if without == "shared":
        lora_attention.share_inputs = lambda model: 0
    if without == "recorded":
        recorded.record = lambda *some: False
    if without == "winograd":
        winograd.use = lambda model: 0
    if without == "fused":
        lora.LoRALayer._plain = lambda self, x: None  # type: ignore[method-assign]
    go, caching_s = our_course(options, quantise="int8" if without == "whole" else "none")
    start(go, load_file(adapters_of(options)))
    if without == "cached":
        go = uncached(go)
    base, run, seen = go.ready.base, go.run, go.ready

    def loss() -> Tensor:
        with lora_flat.spread(go.trained.flats, go.trained.adapters, base.dtype):
            batch = train.gather(run, seen, batch_index=0)
            assert batch
            return train.loss_of_batch(base, batch, go.alphas, run=run, batch_index=0)

    def move() -> None:
        nn.utils.clip_grad_norm_(go.trainable, run.optimizer.clip_norm)
        go.mover.step()
        go.mover.zero_grad(set_to_none=True)

    before = [tensor for part in base.parts.values() for tensor in (*part.parameters(), *part.buffers())]
    return Runner(lambda step: train.take_step(go, step), loss, move, [*before, *go.trainable], caching_s)


@torch.no_grad()
def start(go: Course, numbers: dict[str, Tensor]) -> None:
    """Gives the adapters their numbers."""
    for name, one in voices(go).items():
        one.down.copy_(numbers[f"{name}.down"].view_as(one.down))
        one.up.copy_(numbers[f"{name}.up"].view_as(one.up))


def uncached(go: Course) -> Course:
    """A run that reads and encodes its pictures and texts at each step."""
    base, ready = go.ready.base, go.ready
    views = {
        id(one): view for item, kept in zip(ready.data.items, ready.seen, strict=True) for view, one in zip(item.views, kept, strict=True)
    }
    for encoder in base.text_encoders:
        encoder.to(base.device)
    gather = train.gather

    def encoding(run: Any, now: Any, *, batch_index: int) -> train.Batch | None:
        batch = gather(run, now, batch_index=batch_index)
        if batch is None:
            return None
        chosen = [views[id(one)] for one in batch.seen]
        return replace(batch, seen=tuple(latents.encode(base, view, latents.pixels(view, reduction=base.reduction)) for view in chosen))

    train.gather = encoding
    return replace(go, ready=replace(ready, speech=replace(ready.speech, states=None)))


# --- theirs -------------------------------------------------------------------------------------------------------------------


def opened_peer(options: argparse.Namespace, *, dtype: torch.dtype) -> peers.Peer:
    """PEFT's form of the same base, with the same numbers in its adapters."""
    numbers = load_file(adapters_of(options))
    return peers.open_peer(
        base_files.folder_of(str(base_of(options))), numbers, alpha=options.rank, pictures=pictures_of(options),
        side_px=options.resolution, device=devices.best_device(), dtype=dtype,
    )  # fmt: skip


def theirs(options: argparse.Namespace, *, caches: bool) -> Runner:
    """The example script's step, with or without latents and text kept."""
    device = devices.best_device()
    dtype = devices.base_dtype(device)
    if dtype == torch.float16:
        raise UserError("This GPU has no bf16, and the example script scales losses in fp16; compare on one that has it, or on a CPU.")
    peer, caching_s = opened_peer(options, dtype=dtype), 0.0
    if caches:
        began = clock(device)
        peers.keep(peer)
        caching_s = clock(device) - began
    before = [tensor for part in (peer.unet, peer.vae, *peer.texts) for tensor in (*part.parameters(), *part.buffers())]
    return Runner(
        lambda step: peers.take_step(peer, step, options.batch), lambda: peers.loss_at(peer, 0, options.batch), lambda: peers.move(peer),
        before, caching_s,
    )  # fmt: skip


# --- the gate -----------------------------------------------------------------------------------------------------------------


def gate(options: argparse.Namespace) -> float:
    """How far our gradients are from PEFT's, in fp32, as a share of the largest; leaves the adapters' numbers for the contenders."""
    torch.backends.cudnn.allow_tf32 = False
    go, _ = our_course(options, precision="fp32")
    chance = torch.Generator().manual_seed(7)
    numbers = {}
    for name, one in voices(go).items():
        numbers |= {f"{name}.down": one.down.detach().cpu().clone(), f"{name}.up": torch.randn(one.up.shape, generator=chance) * 0.02}
    save_file(numbers, adapters_of(options))
    start(go, numbers)
    batch = train.gather(go.run, go.ready, batch_index=0)
    assert batch
    clean, drawn, _, timesteps = train.chance(go.ready.base, batch, go.alphas, run=go.run, batch_index=0)
    train.accumulated(go, 1)
    found, alphas, pictures = our_gradients(go), go.alphas.cpu(), batch.pictures
    del go, batch
    gc.collect()
    peer = opened_peer(options, dtype=torch.float32)
    peer.scheduler.alphas_cumprod = alphas  # its own product is formed in fp32 and off by up to 1e-5
    told = {path.name: words for path, words in zip(peer.paths, peer.said, strict=True)}
    peers.loss(peer, clean, drawn, timesteps, peers.heard(peer, [told[name] for name in pictures])).backward()
    wanted = {}
    for name in {key.rpartition(".")[0] for key in found}:
        layer = peer.unet.get_submodule(name)
        wanted |= {f"{name}.{place}": one["default"].weight.grad.cpu() for one, place in ((layer.lora_A, "down"), (layer.lora_B, "up"))}
    assert len(wanted) == len(peer.weights)
    largest = max(float(one.abs().max()) for one in wanted.values())
    return max(float((found[key] - one.view_as(found[key])).abs().max()) for key, one in wanted.items()) / largest


def our_gradients(go: Course) -> dict[str, Tensor]:
    """What each A and B has got, out of the tensor that holds them all."""
    pieces: dict[int, Tensor] = {}
    for flat in go.trained.flats:
        assert flat.whole.grad is not None
        parts = torch.split(flat.whole.grad, [part.numel() for part in flat.parts])
        pieces |= {id(part): piece.view(part.shape).cpu() for part, piece in zip(flat.parts, parts, strict=True)}
    return {f"{name}.{place}": pieces[id(getattr(one, place))] for name, one in voices(go).items() for place in ("down", "up")}


# --- a contender's process ----------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that compute something, and the bytes that they read and write at least."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if counts.computes(func):
            self.launches += 1
            self.bytes += sum(one.nbytes for one in tree_leaves((args, kwargs, made)) if isinstance(one, Tensor))
        return made


def counted(runner: Runner) -> dict[str, float]:
    """What is exact about a step."""
    cost = counts.of_step(runner.loss, weights=runner.before)
    with Traffic() as moved:
        runner.move()
    with Traffic() as whole:
        runner.loss().backward()
        runner.move()
    return {
        "flops": cost.flops, "saved_bytes": cost.saved_bytes, "tensor_peak_bytes": cost.peak_bytes, "launches": cost.launches,
        "optimizer_launches": moved.launches, "traffic_bytes": whole.bytes,
    }  # fmt: skip


def turns_of(options: argparse.Namespace) -> Callable[[int], dict[str, float]]:
    """Gets a contender ready; asked for a number of steps it takes them and tells their figures, for 0 what is exact."""
    who, _, without = options.child.partition(" without ")
    device, taken = devices.best_device(), 1
    runner = ours(options, without) if who == "ours" else theirs(options, caches=who == "peer, cached")
    first = peers.seconds(lambda: runner.step(1), device)
    exact = {"first_step_s": first, "caching_s": runner.caching_s, **counted(runner)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def turn(steps: int) -> dict[str, float]:
        nonlocal taken
        if not steps:
            return exact
        which, taken = range(taken + 1, taken + 1 + steps), taken + steps
        cpu, wall = time.process_time(), time.perf_counter()
        took = peers.seconds(lambda: [runner.step(step) for step in which], device)
        row = {"step_s": took / steps, "cpu_s": (time.process_time() - cpu) / steps, "wall_s": (time.perf_counter() - wall) / steps}
        if device.type == "cuda":
            row |= {"allocated_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
            torch.cuda.empty_cache()  # the others have the same GPU
        return row | {"process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}

    return turn


def contend(options: argparse.Namespace) -> None:
    """A contender's process: a line of figures when it is ready, and one for each number of steps that it is asked for."""
    turn = turns_of(options)
    answer(turn(0))
    for line in sys.stdin:
        answer(turn(int(line)))


def answer(row: dict[str, float]) -> None:
    """One line for the process that asked."""
    print(json.dumps(row), flush=True)


# --- the command --------------------------------------------------------------------------------------------------------------


@contextmanager
def contender(words: list[str], name: str) -> Iterator[Callable[[int], dict[str, float]]]:
    """A contender in a process of its own; asked for a number of steps it answers with their figures, for 0 with what is exact."""
    asked = [sys.executable, "-m", "benchmarks.train_step", *words, "--child", name]
    with subprocess.Popen(asked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin
        assert child.stdout
        ready = said(child.stdout, name)

        def turn(steps: int) -> dict[str, float]:
            if not steps:
                return ready
            assert child.stdin
            assert child.stdout
            print(steps, file=child.stdin, flush=True)
            return said(child.stdout, name)

        yield turn
        child.stdin.close()


def said(lines: Iterable[str], name: str) -> dict[str, float]:
    """The next line of figures among whatever libraries print.

    Raises:
        UserError: if there is none.
    """
    for line in lines:
        if line.startswith("{"):
            found: dict[str, float] = json.loads(line)
            return found
    raise UserError(f"The contender '{name}' ended without figures; its own words stand above.")


def compared(options: argparse.Namespace, words: list[str], names: list[str]) -> dict[str, dict[str, Any]]:
    """All turns of some contenders, which alternate first to last and last to first; the figures of each."""
    with ExitStack() as stack:
        turns = {name: stack.enter_context(contender(words, name)) for name in names}
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for turn in turns.values():
            turn(options.warmup)
        for round_ in range(options.pairs):
            for name in names if round_ % 2 == 0 else reversed(names):
                rows[name].append(turns[name](options.steps))
        return {name: turns[name](0) | {"turns": rows[name]} for name in names}


def quotient(found: dict[str, dict[str, Any]], one: str, other: str) -> list[float]:
    """What one contender's step takes of another's, turn by turn, on the device's clock."""
    return [here["step_s"] / there["step_s"] for here, there in zip(found[one]["turns"], found[other]["turns"], strict=True)]


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def row(name: str, found: dict[str, Any], first: str, ratios: list[float], options: argparse.Namespace, top: peers.Ceilings) -> str:
    """A contender's line of a table."""
    median = {key: statistics.median(turn[key] for turn in found["turns"]) for key in ("step_s", "cpu_s", "wall_s")}
    last, step_s = found["turns"][-1], median["step_s"]
    mebibytes = [f"{last[key] / 2**20:,.0f}" if key in last else "" for key in ("allocated_bytes", "reserved_bytes", "process_bytes")]
    cells = [
        name, f"{options.batch / step_s:.2f}", f"{1000 * median['wall_s']:.0f}", f"{1000 * median['cpu_s']:.0f}",
        f"{found['flops'] / step_s / top.flops:.0%}", f"{found['traffic_bytes'] / step_s / top.bytes:.0%}", *mebibytes,
        f"{found['tensor_peak_bytes'] / 2**20:,.1f}", f"{found['saved_bytes'] / 2**20:,.1f}", f"{found['flops'] / 1e9:,.2f}",
        f"{found['launches']:,} + {found['optimizer_launches']:,}", f"{found['first_step_s']:.2f}", f"{found['caching_s']:.1f}",
        "" if name == first else spread(ratios),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(found: dict[str, dict[str, Any]], options: argparse.Namespace, top: peers.Ceilings) -> str:
    """The contenders side by side; the first is what the others are compared with."""
    first, *_ = found
    heads = (
        "", "img/s", "ms/step", "CPU ms/step", "of matmul", "of copy", "allocated MiB", "reserved MiB", "process MiB", "tensors MiB",
        "saved MiB", "GFLOP", "launches", "first step s", "caching s", f"{first} / this",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    return "\n".join([*lines, *(row(name, one, first, quotient(found, first, name), options, top) for name, one in found.items())])


def plot(bars: dict[str, float], path: Path, title: str) -> None:
    """Milliseconds per step as bars, in a PNG."""
    letters, high = ImageFont.load_default(16), 34
    image = Image.new("RGB", (900, high * (len(bars) + 1) + 16), "white")
    draw = ImageDraw.Draw(image)
    draw.text((12, 8), title, "black", letters)
    for i, (name, value) in enumerate(bars.items(), start=1):
        draw.rectangle(
            (330, i * high + 8, 330 + 440 * value / max(bars.values()), i * high + 30), "#0072b2" if "ours" in name else "#d55e00"
        )
        draw.text((12, i * high + 8), name, "black", letters)
        draw.text((780, i * high + 8), f"{value:,.1f} ms", "black", letters)
    image.save(path)


def measure(options: argparse.Namespace, words: list[str]) -> int:
    """The gate, the tables, the file and the plot; the last line is what ours takes of theirs."""
    asked = dict(part.partition("=")[::2] for part in options.against.split(","))
    if unknown := sorted(set(asked) - {"diffusers", "kohya"}):
        raise UserError(f"--against {unknown[0]} is unknown; give diffusers, or diffusers,kohya=CHECKOUT.")
    base, pictures = base_files.folder_of(base_of(options)), pictures_of(options)
    out = options.out.resolve()
    others = {"kohya": peers.kohya_command(Path(asked["kohya"]), base, pictures, options, out)} if "kohya" in asked else {}
    others |= {"script": peers.script_command(options.script, base, pictures, options, out)} if options.script else {}
    with contender(words, "gate") as turn:
        distance = turn(0)["distance"]
    if not distance <= TOLERANCE:
        print(f"Our gradients are {distance:.1e} of the largest away from PEFT's, more than {TOLERANCE:g}, so no speed is printed.")
        return 1
    print(f"Gate: with the same start, noise and timesteps our gradients are PEFT's to {distance:.1e} of the largest, in fp32.")
    device = devices.best_device()
    top = peers.ceilings(device, devices.base_dtype(device))
    clock_name = peers.clock_name(device)
    print(
        f"Ceilings of this device, measured: {top.flops / 1e9:,.0f} GFLOP/s, {top.bytes / 1e9:,.1f} GB/s; img/s and shares by {clock_name}."
    )
    plans = {"Like for like": ["ours", "peer, cached"], "Out of the box": ["ours", "peer"]}
    if options.leave_one_out:
        plans["Each piece left out"] = ["ours", *(f"ours without {piece}" for piece in PIECES)]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for title, names in plans.items():
        found[title] = compared(options, words, names)
        print(f"\n{title}\n\n{table(found[title], options, top)}", flush=True)
    box = {name: statistics.median(turn["step_s"] for turn in one["turns"]) for name, one in found["Out of the box"].items()}
    if box["peer"] > box["ours"]:
        even = found["Out of the box"]["ours"]["caching_s"] / (box["peer"] - box["ours"])
        print(f"\nKeeping latents and text of {len(list(pictures.glob('*.png')))} pictures has paid after {even:.0f} steps.")
    outside = {name: peers.seconds_per_step(*one, steps=options.steps, out=out) for name, one in others.items()}
    for name, (cpu_s, wall_s) in outside.items():
        print(f"\n{name}: {1000 * cpu_s:.0f} CPU ms, {1000 * wall_s:.0f} ms per step.")
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        whole = {"settings": settings | {"device": str(device), "torch": torch.__version__}, "gate": distance, "ceilings": vars(top)}
        options.json.write_text(json.dumps(whole | {"tables": found, "outside": outside}, indent=1) + "\n")
        bars = {
            f"{name}: {who}": 1000 * statistics.median(t["step_s"] for t in one["turns"])
            for name, a in found.items()
            for who, one in a.items()
        }
        plot(bars, options.json.with_suffix(".png"), f"{options.family}, batch {options.batch}, rank {options.rank}: {clock_name} per step")
    like, out_of = quotient(found["Like for like"], "ours", "peer, cached"), quotient(found["Out of the box"], "ours", "peer")
    print(f"\nours / theirs, {clock_name} per step: {spread(like)} like for like, {spread(out_of)} out of the box; {len(like)} pairs.")
    return 0


def arguments(words: list[str]) -> argparse.Namespace:
    """The command's options; the resolution is the family's own and the numbers of steps the device's, if not given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description="A training step, ours against the usual way.")
    parser.add_argument("--family", choices=FAMILIES, default="mini")
    parser.add_argument("--base", type=Path, help="a diffusers folder, in the place of the family's random weights")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=("attn", "attn-mlp"), default="attn")
    parser.add_argument("--against", default="diffusers", metavar="diffusers[,kohya=CHECKOUT]")
    parser.add_argument("--script", type=Path, help="diffusers' own train_text_to_image_lora.py, to be run as well")
    parser.add_argument("--resolution", type=int, help="side in px")
    parser.add_argument("--steps", type=int, help="per turn; 50 on a GPU, 4 on a CPU")
    parser.add_argument("--warmup", type=int, help="steps before the first turn; 20 on a GPU, 1 on a CPU")
    parser.add_argument("--pairs", type=int, default=7, help="turns of each")
    parser.add_argument("--leave-one-out", action="store_true", help="also ours without each of its pieces")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for bases and pictures, written once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures; a plot beside it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    gpu = devices.best_device().type == "cuda"
    options.resolution = options.resolution or {"mini": 64, "block": 256, "sd15": 512, "sdxl": 1024}[options.family]
    options.steps, options.warmup = options.steps or (50 if gpu else 4), options.warmup or (20 if gpu else 1)
    return options


def work(options: argparse.Namespace, words: list[str]) -> int:
    """Measures, or is one contender; the exit code."""
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.child:
        return measure(options, words)
    if options.child == "gate":
        answer({"distance": gate(options)})
    else:
        contend(options)
    return 0


def main(words: list[str]) -> int:
    """Measures, or is one contender; 2 and one sentence for a mistake that the user can mend."""
    return command.code_of(work, arguments(words), words)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
