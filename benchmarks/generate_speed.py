"""What a changed strength costs before the next picture: `python -m benchmarks.generate_speed --out FOLDER [--rounds 5] [--loras 1]`.

A base of Stable Diffusion 1.5's size with random weights and LoRAs of rank 16 over attention and MLP of UNet and text encoder. Prints the
seconds to load the LoRAs and, as medians, to fold anew after a change of strength (what the page does), and between two steps of a
strength that changes over the steps (the UNet alone).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import full_size_step
from sdlora import base_files, base_model, devices, files, generate, lora, lora_file, voices
from sdlora.base_model import Base
from sdlora.deltas import LowRank, Update
from sdlora.generate import LoRA

RANK = 16


def write_lora(base: Base, path: Path, *, seed: int) -> None:
    """A LoRA of rank 16 over the preset "attn-mlp" of both parts."""
    generator, modules = torch.Generator().manual_seed(seed), {}
    wanted = {part: set(lora.matching(module, base_model.targets("attn-mlp", part=part))) for part, module in base.parts.items()}
    for stem, (part, name) in base_model.stems(base).items():
        if name in wanted[part]:
            shape = lora.base_weight(base.parts[part].get_submodule(name)).shape
            down = torch.randn(RANK, *shape[1:], generator=generator) * 0.01
            up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator) * 0.01
            modules[stem] = Update(LowRank(down, up, float(RANK)))
    files.write(path, lora_file.to_bytes(modules, {}, family="sd1"))


def timed(device: torch.device, action: Callable[[], object]) -> float:
    """Seconds of one action, the GPU's work included."""
    began_s = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate_speed", description="What a changed strength costs.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the base and the LoRAs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loras", type=int, default=1)
    options = parser.parse_args()
    full_size_step.write_base(options.out / "sd1", "sd1")
    device = devices.best_device()
    base = base_files.load(str(options.out / "sd1"), device=device, dtype=devices.base_dtype(device))
    paths = [options.out / f"{number}.safetensors" for number in range(options.loras)]
    for number, path in enumerate(paths):
        if not path.is_file():
            write_lora(base, path, seed=number)
    loras = [LoRA(path, 1.0) for path in paths]
    first_s = timed(device, lambda: generate.set_loras(base, loras))
    anew, between = [], []
    for number in range(options.rounds):
        changed = [replace(one, strength=0.1 * number) for one in loras]
        anew.append(timed(device, lambda changed=changed: generate.set_loras(base, changed)))  # type: ignore[misc]
    moving = [replace(one, course=((0.0, 0.0), (1.0, 1.0))) for one in loras]
    for number in range(options.rounds):
        between.append(timed(device, lambda number=number: voices.speak_at(base, moving, (number + 1) / options.rounds)))  # type: ignore[misc]
    layers = sum(len(lora.layers(part)) for part in base.parts.values())
    print(f"{options.loras} LoRA of rank {RANK} over {layers} layers, {base.dtype}, {device.type}, {torch.get_num_threads()} threads")
    print("| | seconds |\n| --- | ---: |")
    print(f"| loading and folding | {first_s:.2f} |")
    print(f"| folding anew after a change of strength, median | {statistics.median(anew):.2f} |")
    print(f"| folding the UNet between two steps, median | {statistics.median(between):.2f} |")


if __name__ == "__main__":
    main()
