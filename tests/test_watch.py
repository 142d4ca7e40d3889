"""A run that is much slower than forecast says so, once, and one that spills says where its memory is."""

from pathlib import Path

import pytest
import torch

from sdlora import memory
from sdlora.watch import Watch

CPU = torch.device("cpu")


def said(watch: Watch, steps: list[float]) -> list[tuple[int, str]]:
    """What is said, with the number of the step after which."""
    every = [(number, watch.after(step_s)) for number, step_s in enumerate(steps, start=1)]
    return [(number, words) for number, words in every if words]


def test_steps_three_times_as_slow_as_forecast_are_told_once() -> None:
    ((step, words),) = said(Watch(0.24), [0.25] * 30 + [0.82] * 60)
    assert step == 41  # when 11 of the last 20 steps are slow
    assert words == (
        "Steps take 3.4 times as long as forecast (0.82 s instead of 0.24 s): the GPU's memory may have spilled, or something else uses "
        "the machine."
    )


def test_a_few_slow_steps_are_nobody_s_business() -> None:
    assert said(Watch(0.24), ([0.25] * 15 + [9.0] * 5) * 5) == []
    assert said(Watch(0.24), [0.7] * 100) == []
    assert said(Watch(0.24), [9.0] * 19) == []


def test_without_a_forecast_the_first_steps_are_one() -> None:
    watch = Watch()
    assert said(watch, [5.0] * 4 + [0.1] * 40) == []
    assert watch.forecast_s == pytest.approx(0.1)
    ((_, words),) = said(watch, [0.35] * 30)
    assert "3.5 times" in words
    slow_from_the_start = Watch()
    assert said(slow_from_the_start, [5.0] * 100) == []


def test_memory_that_does_not_lie_on_the_gpu_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, held = torch.device("cuda"), {"reserved": 6, "used": 7}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((8 - held["used"]) * memory.GIB, 8 * memory.GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held["reserved"] * memory.GIB)
    watch = Watch(0.1, device=gpu)
    assert said(watch, [0.1] * 5) == []
    held.update(reserved=10, used=8)
    ((step, words),) = said(watch, [0.1] * 5)
    assert step == 1
    assert words.startswith("2.0 GiB of what the run holds do not fit onto the GPU")
    assert memory.free_bytes(gpu) == 0


def test_the_peak_is_this_process_s_own_and_never_falls() -> None:
    block = torch.ones(100 * 2**20)
    full = memory.peak_bytes(CPU)
    assert full > block.nbytes
    del block
    assert memory.peak_bytes(CPU) > full - 4 * 2**20  # Linux counts each thread's last pages late
    assert memory.free_bytes(CPU) > 0
    assert memory.spilled_bytes(CPU) == 0


def test_a_container_s_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    free = memory.free_bytes(CPU)
    assert free > 100 * 2**20
    (tmp_path / "memory.max").write_text(f"{2 * 10**7}\n")
    (tmp_path / "memory.current").write_text("5000000\n")
    assert memory.free_bytes(CPU) == 15_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(CPU) > 100 * 2**20
