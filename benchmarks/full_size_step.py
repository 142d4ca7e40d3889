"""One training step at full size with random weights: what a base of that size needs, on this machine.

    python -m benchmarks.full_size_step --family sd1 --out FOLDER [--steps 1] [--resolution 512] ...

The base's weights are random, written once into the folder in fp16, in diffusers' layout; everything else is what `sdlora train`
does. The training runs in a process of its own, so that its peak memory is that of training alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora import base_files, config, events, train
from sdlora.mini.tokens import build_tokenizer

FAMILIES = Path(base_files.__file__).parent / "families"
TEXT_CLASSES = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}


def main() -> None:
    """Reads the command, and writes the base, trains, or tells a child to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["sd1", "sd2", "sdxl"], default="sd1")
    parser.add_argument("--out", type=Path, required=True, help="folder for the base, the pictures and the run")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=512, help="in px")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--targets", default="attn-mlp")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--quantise", default="none")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true", help="the figures as one line of JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options)))
        return
    write_base(options.out / options.family, options.family)
    write_pictures(options.out / "pictures", side_px=options.resolution)
    child = [sys.executable, "-m", "benchmarks.full_size_step", *sys.argv[1:], "--child"]
    figures = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:24} {value}")


def write_base(folder: Path, family: str) -> None:
    """A pipeline of the family's full size with random weights, in fp16; nothing if it is there."""
    if (folder / "model_index.json").is_file():
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)  # 2 bytes per weight from the start
    configs = FAMILIES / family
    UNet2DConditionModel(**plain(configs / "unet")).save_pretrained(folder / "unet")
    AutoencoderKL(**plain(configs / "vae")).save_pretrained(folder / "vae")
    index = json.loads((configs / "model_index.json").read_text())
    for part in ("text_encoder", "text_encoder_2"):
        if part in index:
            TEXT_CLASSES[index[part][1]](CLIPTextConfig(**plain(configs / part))).save_pretrained(folder / part)
            build_tokenizer(folder / part.replace("text_encoder", "tokenizer"))
    torch.set_default_dtype(torch.float32)
    shutil.copytree(configs / "scheduler", folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))


def plain(folder: Path) -> dict[str, object]:
    """The config of a part without the keys that only say who wrote it."""
    (path,) = folder.glob("*config.json")
    return {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("_")}


def write_pictures(folder: Path, *, side_px: int) -> None:
    """Two pictures of noise with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a picture of noise")


def measured(options: argparse.Namespace) -> dict[str, object]:
    """Trains and says what it took."""
    values = {
        "base": str(options.out / options.family), "data": str(options.out / "pictures"), "kind": "style", "name": "noise",
        "steps": options.steps, "batch": options.batch,
        "validation": {"every": 0}, "report": False, "resolution_px": options.resolution, "sample_every": 0, "save_every": 10**6,
        "precision": options.precision, "quantise": options.quantise,
        "gradient_checkpointing": options.checkpointing, "lora": {"targets": options.targets},
    }  # fmt: skip
    began, steps, modules = time.monotonic(), [], 0
    folder = options.out / f"run-{options.family}-{time.time_ns()}"
    for event in train.train(config.parse(values, where="full_size_step"), folder):
        if isinstance(event, events.Started):
            modules = event.modules
        if isinstance(event, events.Step):
            steps.append(event.step_s)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "family": options.family, "modules": modules, "steps": len(steps), "first_step_s": round(steps[0], 2),
        "median_step_s": round(statistics.median(steps), 3), "whole_run_s": round(time.monotonic() - began, 1),
        "peak_process_GiB": round(peak / 2**30, 2), "peak_gpu_GiB": round(gpu / 2**30, 2),
    }  # fmt: skip


if __name__ == "__main__":
    main()
