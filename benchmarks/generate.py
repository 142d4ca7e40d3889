"""What LoRAs cost while drawing: `python -m benchmarks.generate [--base mini] [--parts latency,ten,strength] [--rounds 7] [--json FILE]`.

latency: one picture by the base alone, with the LoRA folded into the weights, and with the LoRA beside them; folded should be 1.00, as
it is the same products of the same size. ten: the same with ten LoRAs. strength: another strength for a LoRA that is folded in (as the
page asks for it, the folding alone, and between two steps of a strength that changes over them), against diffusers' `unfuse_lora` and
`fuse_lora` on the same weights in the same process, what loading it took, and whether the base's bytes come back. All take turns in one
process (A B C C B A …). `--base sd15` writes random weights of that size once. LoRAs are random unless `--lora` names one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks import command, full_size_step, peers
from sdlora import base_files, base_model, devices, files, generate, lora, lora_file, lora_names, voices
from sdlora.base_model import Base
from sdlora.deltas import LowRank, Update
from sdlora.errors import UserError
from sdlora.generate import LoRA, Request

RANK, MANY = 16, 10
PARTS = ("latency", "ten", "strength")
STRENGTHS = (0.7, 1.0)
Times = dict[str, list[float]]


def random_lora(base: Base, path: Path, *, seed: int, targets: str) -> Path:
    """A LoRA file for a preset of a base's UNet, of numbers as small as trained ones; nothing if it is there."""
    chance, modules = torch.Generator().manual_seed(seed), {}
    for name in lora.matching(base.unet, base_model.targets(targets)) if not path.is_file() else ():
        weight = base.unet.get_submodule(name).weight
        down = torch.randn(RANK, *weight.shape[1:], generator=chance) / RANK
        up = torch.randn(len(weight), RANK, *[1] * (weight.ndim - 2), generator=chance) * 0.02
        modules[lora_names.stem_of("unet", name)] = Update(LowRank(down, up, RANK))
    if modules:
        files.write(path, lora_file.to_bytes(modules, {}, family=base.family, dtype=torch.float32))
    return path


# --- drawing ------------------------------------------------------------------------------------------------------------------


def states_of(base: Base, loras: Sequence[LoRA]) -> dict[str, Callable[[], None]]:
    """How to bring the base into each state."""

    def beside() -> None:
        generate.set_loras(base, list(loras))
        for part in base.parts.values():
            lora.unfold(part)

    def alone() -> None:
        for part in base.parts.values():
            lora.remove(part)

    return {"base": alone, "folded": lambda: generate.set_loras(base, list(loras)), "beside": beside}


def drawing(base: Base, loras: Sequence[LoRA], *, rounds: int, request: Request) -> Times:
    """Seconds per picture in each state, after one picture that warms up."""
    states = states_of(base, loras)
    return alternating(
        {name: (enter, lambda: list(generate.pictures(base, request))) for name, enter in states.items()}, rounds=rounds, device=base.device
    )


def alternating(work: dict[str, tuple[Callable[[], object], Callable[[], object]]], *, rounds: int, device: torch.device) -> Times:
    """Seconds of each piece of work, which take turns first to last and last to first; what comes before each is not counted."""
    times: Times = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name in list(work) if round_ % 2 else list(reversed(work)):
            before, measured = work[name]
            before()
            took = peers.seconds(measured, device)
            if round_:  # the first round warms up
                times[name].append(took)
    return times


# --- another strength ---------------------------------------------------------------------------------------------------------


def diffusers_unet(folder: Path, path: Path, *, targets: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The same UNet as diffusers opens it, with the same LoRA folded in at 1."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).to(device)
    told: dict[str, Tensor] = {}
    places = {lora_names.stem_of("unet", name): name for name in lora.matching(unet, base_model.targets(targets))}
    for stem, update in lora_file.read(path).modules.items():
        if stem not in places or not isinstance(update.change, LowRank):
            raise UserError(f"{path} changes {stem}, which is no plain update of --targets {targets}; give another LoRA or other targets.")
        told |= {f"{places[stem]}.lora_A.weight": update.change.down, f"{places[stem]}.lora_B.weight": update.change.up}
    unet.load_lora_adapter(told, prefix=None, adapter_name="bench")
    unet.fuse_lora(lora_scale=1.0)
    return unet


def strengths(base: Base, path: Path, *, rounds: int, targets: str) -> tuple[Times, dict[str, Any]]:
    """Seconds for another strength, ours in three ways and diffusers', and what loading took and is left afterwards."""
    names = lora.matching(base.unet, base_model.targets(targets))
    pristine = {name: base.unet.get_submodule(name).weight.detach().clone() for name in names}
    load_s = peers.seconds(lambda: generate.set_loras(base, [LoRA(path)]), base.device)
    key = next(iter(next(iter(lora.layers(base.unet).values())).adapters))
    peer = diffusers_unet(base_files.folder_of(base.name), path, targets=targets, device=base.device, dtype=base.dtype)
    moving = [LoRA(path, course=((0.0, 0.0), (1.0, 1.0)))]
    turn = {"ours": 0, "folding": 0, "between steps": 0, "diffusers": 0}

    def next_of(who: str) -> float:
        turn[who] += 1
        return STRENGTHS[turn[who] % 2]

    def folding() -> None:
        lora.set_strength(base.unet, next_of("folding"), key)
        lora.fold(base.unet)

    def between() -> None:
        assert voices.speak_at(base, moving, next_of("between steps") / 2)  # never the strength that the others leave

    def unfused() -> None:
        peer.unfuse_lora()
        peer.fuse_lora(lora_scale=next_of("diffusers"))

    work: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "ours": (lambda: None, lambda: generate.set_loras(base, [LoRA(path, next_of("ours"))])), "folding": (lambda: None, folding),
        "between steps": (lambda: None, between), "diffusers": (lambda: None, unfused),
    }  # fmt: skip
    times = alternating(work, rounds=rounds, device=base.device)
    lora.remove(base.unet)
    peer.unfuse_lora()
    left = {name: peer.get_submodule(name).base_layer.weight.detach() for name in names}
    return times, {
        "load_s": load_s, "modules": len(names),
        "ours_changed": sum(not torch.equal(base.unet.get_submodule(name).weight, pristine[name]) for name in names),
        "diffusers_changed": sum(not torch.equal(left[name], pristine[name]) for name in names),
        "diffusers_largest": max(float((left[name].float() - pristine[name].float()).abs().max()) for name in names),
    }  # fmt: skip


# --- the command --------------------------------------------------------------------------------------------------------------


def table(times: Times, *, against: str) -> str:
    """Medians, spread, and the ratio of each to one of them, turn by turn."""
    lines = [f"| | seconds, median | least and most | ratio to {against} |", "| --- | ---: | ---: | ---: |"]
    for name, seconds in times.items():
        ratio = quotient(times, name, against)
        lines.append(f"| {name} | {statistics.median(seconds):.3f} | {min(seconds):.3f} to {max(seconds):.3f} | {ratio:.2f} |")
    return "\n".join(lines)


def quotient(times: Times, one: str, other: str) -> float:
    """The median over all turns of what one takes of another."""
    return statistics.median(here / there for here, there in zip(times[one], times[other], strict=True))


def opened(options: argparse.Namespace) -> Base:
    """The base, of random weights if a size is asked for by its name."""
    name, device = options.base, devices.best_device()
    if name in ("sd15", "sdxl"):
        full_size_step.write_base(options.out / name, {"sd15": "sd1", "sdxl": "sdxl"}[name])
        name = str(options.out / name)
    return base_files.load(name, device=device, dtype=devices.base_dtype(device))


def measure(options: argparse.Namespace) -> None:
    """Measures and prints the tables; the last line says the ratios."""
    files.make_folder(options.out)
    parts = options.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        raise UserError(f"--parts {unknown[0]} is unknown; there are {', '.join(PARTS)}.")
    base = opened(options)
    stem = Path(options.base).name
    paths = [
        random_lora(base, options.out / f"{stem}-random-{options.targets}-{seed}.safetensors", seed=seed, targets=options.targets)
        for seed in range(MANY if "ten" in parts else 1)
    ]
    chosen = options.lora or paths[0]
    side = options.resolution
    request = Request("a red star on a blue background", steps=options.steps, width_px=side, height_px=side)
    found: dict[str, Any] = {}
    last = []
    for part, loras in (("latency", [LoRA(chosen)]), ("ten", [LoRA(path, 1 / MANY) for path in paths])):
        if part in parts:
            found[part] = times = drawing(base, loras, rounds=options.rounds, request=request)
            print(
                f"{part}: a picture of {options.steps} steps, {len(loras)} LoRA{'s' * (len(loras) > 1)}\n\n{table(times, against='base')}\n"
            )
            last.append(
                f"{part}: folded {quotient(times, 'folded', 'base'):.2f}, beside {quotient(times, 'beside', 'base'):.2f} of the base"
            )
    if "strength" in parts:
        for part_ in base.parts.values():
            lora.remove(part_)
        times, left = strengths(base, chosen, rounds=options.rounds, targets=options.targets)
        found["strength"] = times | {"left": left}
        print(f"strength: another strength for a LoRA in {left['modules']} modules\n\n{table(times, against='diffusers')}\n")
        print(f"Loading it and folding it for the first time took {left['load_s']:.2f} s.")
        print(
            f"Taken out again, {left['ours_changed']} of {left['modules']} weights differ from the base's bytes with ours, "
            f"{left['diffusers_changed']} with diffusers' (by up to {left['diffusers_largest']:.1e}).\n"
        )
        last.append(f"another strength: {quotient(times, 'ours', 'diffusers'):.2f} of diffusers' unfuse and fuse")
    if options.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings | {"device": str(base.device)}} | found, indent=1) + "\n")
    print("; ".join(last) + f" ({peers.clock_name(base.device)}).")


def main(words: list[str]) -> int:
    """Measures; 2 and one sentence for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description="What LoRAs cost while drawing.")
    parser.add_argument("--base", default="mini", help="mini, a folder, or sd15 or sdxl for random weights of that size")
    parser.add_argument("--lora", type=Path, help="instead of a random one")
    parser.add_argument("--targets", choices=("attn", "attn-mlp"), default="attn", help="what LoRAs change in the UNet")
    parser.add_argument("--parts", default="latency,ten,strength")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--steps", type=int, default=20, help="of a picture")
    parser.add_argument("--resolution", type=int, help="side in px; the base's own if not given")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for random weights, written once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    return command.code_of(measure, parser.parse_args(words))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
