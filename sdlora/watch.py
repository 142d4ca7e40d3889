"""Tells when a run is much slower than it was forecast to be: a spilled GPU and a second program are the usual reasons, and both can be
mended while they last."""

from __future__ import annotations

import statistics
from collections import deque

import torch

from sdlora import memory

SLOW = 3.0  # times the forecast
WINDOW = 20  # steps whose median is compared
OWN = slice(4, 25)  # without a forecast: the median of steps 5 to 25 is taken for one
SPILL_BYTES = 2**28  # less may be rounding of the driver's count


class Watch:
    """Looks at each step's time and, now and then, at the device's memory; each alarm is told once.

    Args:
        forecast_s: of a step, if there is one; else the run's own first steps are taken.
        device: whose memory is looked at.
    """

    def __init__(self, forecast_s: float | None = None, *, device: torch.device | None = None) -> None:
        self.forecast_s = forecast_s
        self.device = device or torch.device("cpu")
        self.last: deque[float] = deque(maxlen=WINDOW)
        self.first: list[float] = []
        self.told = {"slow": False, "spill": False}

    def after(self, step_s: float) -> str | None:
        """What is to be said after a step of so many seconds, if anything.

        A step in which a graphics card is paused or samples are drawn belongs to nobody: give the time of the step alone.
        """
        self.last.append(step_s)
        if self.forecast_s is None:
            self.first.append(step_s)
            if len(self.first) == OWN.stop:
                self.forecast_s = statistics.median(self.first[OWN])
            return self._spill()
        return self._spill() or self._slow(self.forecast_s)

    def _slow(self, forecast_s: float) -> str | None:
        now_s = statistics.median(self.last)
        if self.told["slow"] or len(self.last) < WINDOW or now_s < SLOW * forecast_s:
            return None
        self.told["slow"] = True
        return (
            f"Steps take {now_s / forecast_s:.1f} times as long as forecast ({_time(now_s)} instead of {_time(forecast_s)}): the GPU's "
            "memory may have spilled, or something else uses the machine."
        )

    def _spill(self) -> str | None:
        if self.told["spill"] or (spilled := memory.spilled_bytes(self.device)) < SPILL_BYTES:
            return None
        self.told["spill"] = True
        return (
            f"{spilled / memory.GIB:.1f} GiB of what the run holds do not fit onto the GPU and lie in the machine's memory, which is many "
            "times slower; end other programs on the GPU, or stop and ask `sdlora plan` for settings that fit."
        )


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
