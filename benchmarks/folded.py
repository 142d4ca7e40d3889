"""What a LoRA costs while drawing: `python -m benchmarks.folded --lora FILE [--base mini] [--rounds 7]`.

Draws the same picture with the base alone, with the LoRA folded into the weights, and with the LoRA beside them, in turn in one
process (A B C C B A …), and prints the medians and their ratios to the base. Folded should be 1.00: the same products of the same size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from sdlora import base_files, devices, generate, lora
from sdlora.base_model import Base
from sdlora.generate import LoRA, Request


def contenders(base: Base, path: Path) -> dict[str, Callable[[], None]]:
    """How to bring the base into each state."""

    def beside() -> None:
        generate.set_loras(base, [LoRA(path)])
        for part in base.parts.values():
            lora.unfold(part)

    def alone() -> None:
        for part in base.parts.values():
            lora.remove(part)

    return {
        "base": alone,
        "folded": lambda: generate.set_loras(base, [LoRA(path)]),
        "beside": beside,
    }


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folded", description="What a LoRA costs while drawing.")
    parser.add_argument("--lora", type=Path, required=True)
    parser.add_argument("--base", default="mini")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = devices.best_device()
    base = base_files.load(options.base, device=device, dtype=devices.base_dtype(device))
    states = contenders(base, options.lora)
    times: dict[str, list[float]] = {name: [] for name in states}
    for round_ in range(options.rounds + 1):
        for name in list(states) if round_ % 2 else list(reversed(states)):
            states[name]()
            began = time.process_time() if device.type == "cpu" else time.perf_counter()
            list(generate.pictures(base, Request("a red star on a blue background")))
            now = time.process_time() if device.type == "cpu" else time.perf_counter()
            if round_:  # the first round warms up
                times[name].append(now - began)
    print("| | seconds per picture, median | least and most | ratio to the base |\n| --- | ---: | ---: | ---: |")
    for name, seconds in times.items():
        median, ratio = statistics.median(seconds), statistics.median(seconds) / statistics.median(times["base"])
        print(f"| {name} | {median:.3f} | {min(seconds):.3f} to {max(seconds):.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
