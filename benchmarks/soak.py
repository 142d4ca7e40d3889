"""Whether a long run grows: resident memory and time per step over ten thousand steps of a tiny model.

    python -m benchmarks.soak --out FOLDER [--steps 10000]

The run saves and scores held-out pictures every 500 steps and draws every 2,500, with all that `benchmarks.smallest` has.
Memory is what the kernel counts as resident, read every 10 steps; its slope is a least-squares line after the first 1,000. Time is
the process's own work, which other programs on the machine do not lengthen: in the step alone, and from one step to the next with all
that happens between, saves and looks included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from benchmarks import smallest
from sdlora import events, train

PAGE = os.sysconf("SC_PAGE_SIZE")
LOOK_EVERY, SETTLED, BLOCK = 10, 1000, 1000  # steps
MOST_MB = 1.0  # per 1,000 steps
MOST_GROWTH = 0.01  # of a step's work per 1,000 steps


class Taken(NamedTuple):
    """One step, in as little memory as may be.

    Args:
        step_s: wall seconds in it.
        work_s: seconds of work since the step before.
        resident_bytes: after it.
    """

    step: int
    step_s: float
    work_s: float
    resident_bytes: int


def resident_bytes() -> int:
    """What of this process lies in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def taken(out: Path, *, steps: int) -> Iterator[Taken]:
    """Trains, and says of each step what it took."""
    run = smallest.exacting(
        smallest.make_base(out / "base"), smallest.make_pictures(out / "pictures"), steps=steps, batch=1, save_every=500,
        sample_every=2500, validation={"share": 0.2, "every": 500, "draws": 4}, optimizer=smallest.OPTIMIZER | {"accumulation": 1},
    )  # fmt: skip
    before_s, resident = time.process_time(), 0
    for event in train.train(run, out / "run"):
        if isinstance(event, events.Step):
            now_s = time.process_time()
            resident = resident_bytes() if event.step % LOOK_EVERY == 0 or not resident else resident
            yield Taken(event.step, event.step_s, now_s - before_s, resident)
            before_s = now_s


def growth_of(seen: list[Taken]) -> float:
    """By which share a step's work grows per 1,000 steps: a least-squares line through the medians after the settling."""
    medians = [statistics.median(one.work_s for one in seen[start : start + BLOCK]) for start in range(SETTLED, len(seen), BLOCK)]
    return float(np.polyfit(range(len(medians)), medians, 1)[0]) / medians[0]


def slope_mb(seen: list[Taken]) -> float:
    """Resident MB per 1,000 steps, by least squares over the steps after the settling."""
    looked = [one for one in seen if one.step > SETTLED and one.step % LOOK_EVERY == 0]
    return float(np.polyfit([one.step / 1000 for one in looked], [one.resident_bytes / 1e6 for one in looked], 1)[0])


def main() -> None:
    """Reads the command, trains, and prints a row per thousand steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=int, default=10_000, help="at least 3000")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.out.mkdir(parents=True)
    os.environ["SDLORA_CACHE"] = str(options.out / "cache")
    seen: list[Taken] = []
    print("  steps  resident MB  step ms, median  work ms, median  work ms, mean", flush=True)
    for one in taken(options.out, steps=options.steps):
        seen.append(one)
        if one.step % BLOCK == 0:
            last = seen[-BLOCK:]
            step_ms, work_ms = (1000 * statistics.median(values) for values in ([x.step_s for x in last], [x.work_s for x in last]))
            mean_ms = 1000 * statistics.fmean(x.work_s for x in last)
            print(f"{one.step:7} {one.resident_bytes / 1e6:12.1f} {step_ms:16.2f} {work_ms:16.2f} {mean_ms:14.2f}", flush=True)
    slope, growth = slope_mb(seen), growth_of(seen)
    print(f"per 1,000 steps: resident memory {slope:+.3f} MB, work of a step {100 * growth:+.2f} %")
    raise SystemExit(slope >= MOST_MB or growth >= MOST_GROWTH)


if __name__ == "__main__":
    main()
