"""How far a forecast is from what then happens: plans a run, does it in a process of its own, and prints both.

    python -m benchmarks.forecast CONFIG --out FOLDER [--set key=value …] [--work]

The cache begins empty, in FOLDER. With --work times are of the processes' own work instead of the clock's, for machines that do other
things too: with one thread the two are the same on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from sdlora import config, devices, events, memory, plan, train, trial_process
from sdlora.forecast import Forecast


def main() -> None:
    """Reads the command, and forecasts and runs, or is the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the run and the cache")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--work", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    run = config.load(options.config, changes=options.changes)
    if options.child:
        print(json.dumps(happened(run, options.out / "run", work=options.work)))
        return
    os.environ["SDLORA_CACHE"] = str(options.out / "cache")
    told = forecast(run, work=options.work)
    print(*told.lines(), sep="\n")
    command = [sys.executable, "-m", "benchmarks.forecast", *sys.argv[1:], "--child"]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    actual = json.loads(child.stdout.splitlines()[-1])
    print(f"{'':12} {'forecast':>14} {'happened':>14} {'ratio':>7}")
    for name, value in told.row().items():
        print(f"{name:12} {value:14,.4g} {actual[name]:14,.4g} {value / actual[name]:7.3f}")


def forecast(run: config.Config, *, work: bool) -> Forecast:
    """What `sdlora plan` says."""
    *_, told = plan.plan(run, attempt=partial(trial_process.tried, work=work))
    assert isinstance(told, Forecast)
    return told


def happened(run: config.Config, folder: Path, *, work: bool) -> dict[str, Any]:
    """Trains, and says what it took, under the names of `Forecast.row`."""
    now = time.process_time if work else time.perf_counter
    born = 0.0 if work else time.perf_counter() - (time.time() - psutil.Process().create_time())
    last, each, ends = now(), list[float](), list[float]()
    for event in train.train(run, folder):
        if isinstance(event, events.Step):
            each.append(now() - last if work else event.step_s)
        last = now()
        if isinstance(event, (events.Step, events.Saved)):
            ends.append(last)
    total, course = now() - born, ends[-1] - ends[0] + each[0]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    found = {"step_s": statistics.fmean(each), "course_s": course, "total_s": total}
    return found | {"peak_bytes": memory.peak_bytes(devices.best_device()), "disk_bytes": size}


if __name__ == "__main__":
    main()
