"""What large pictures cost before the first step: scanning, the doctor's look, encoding, and a second start with everything kept.

    python -m benchmarks.data_cost --out FOLDER [--pictures 1000] [--megapixels 12] [--base mini]

The pictures are drawn from a seed and written once. Each phase is timed with its process time and the memory that the process has
reached by then; the slowest functions of the first start come from the standard profiler, run over a tenth of the pictures.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sdlora import base_files, cache, config, dataset_report, devices, material, prepare

KINDS = 25  # drawings; each stands in many files whose bytes differ by a comment


def write_pictures(folder: Path, *, count: int, megapixels: float) -> None:
    """JPEGs of 4:3 with captions; nothing if they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    size, random = (height * 4 // 3, height), np.random.default_rng(0)
    for kind in range(min(KINDS, count)):
        coarse = Image.fromarray(random.integers(0, 256, (60 + kind, 80, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grained = np.asarray(coarse).astype(np.int16) + random.integers(-6, 7, (size[1], size[0], 1), dtype=np.int16)
        buffer = io.BytesIO()
        Image.fromarray(grained.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
        content = buffer.getvalue()
        for i in range(kind, count, KINDS):
            comment = f"{i:06d}".encode()
            part = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
            (folder / f"{i:06d}.jpg").write_bytes(content[:2] + part + content[2:])
            (folder / f"{i:06d}.txt").write_text(f"pip, picture {i}, colours")


def phases(run: config.Config, kept: Path) -> Iterator[str]:
    """Does what a run does before its first step; yields the name of each phase when it is over."""
    found = material.find(run)
    yield "scan"
    device = devices.best_device()
    base = base_files.load(run.base, device=device, dtype=devices.base_dtype(device))
    yield "open the base"
    for looked in material.examined(run, found, grain_px=base.grain_px, resolution_px=base.resolution_px):
        if isinstance(looked, dataset_report.Report) and any(one.severity == "stops" for one in looked.findings):
            raise SystemExit("a picture cannot be used")
    yield "the doctor"
    data = prepare.material_of(run, found.samples, base)
    for _ in prepare.encode(run, data, base, kept):
        pass
    yield "encode"


def main() -> None:
    """Reads the command, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--megapixels", type=float, default=12)
    parser.add_argument("--base", default="mini")
    options = parser.parse_args()
    pictures, kept = options.out / "pictures", options.out / "cache"
    write_pictures(pictures, count=options.pictures, megapixels=options.megapixels)
    shutil.rmtree(kept, ignore_errors=True)
    values = {"base": options.base, "data": str(pictures), "kind": "style", "trigger": "pip", "name": "cost"}
    run = config.parse(values, where="data_cost")
    for start in ("first", "second"):
        wall, work = time.monotonic(), time.process_time()
        for phase in phases(run, kept):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            now, worked = time.monotonic(), time.process_time()
            print(f"{start:6} start  {phase:14} {now - wall:7.1f} s  {worked - work:7.1f} s of work  {peak / 2**20:6.0f} MiB", flush=True)
            wall, work = now, worked
    print(f"the cache holds {cache.info(kept).bytes / 2**20:.1f} MiB")
    profile(run.model_copy(update={"cache": "memory"}), options.out / "tenth", options)


def profile(run: config.Config, folder: Path, options: argparse.Namespace) -> None:
    """The slowest functions over a tenth of the pictures, in one thread."""
    write_pictures(folder, count=max(1, options.pictures // 10), megapixels=options.megapixels)
    tenth = run.model_copy(update={"data": [run.data[0].model_copy(update={"folder": folder})]})
    watching = cProfile.Profile()
    watching.enable()
    for _ in phases(tenth, options.out / "none"):
        pass
    watching.disable()
    pstats.Stats(watching).sort_stats("tottime").print_stats(12)
    shutil.rmtree(options.out / "none", ignore_errors=True)


if __name__ == "__main__":
    main()
