"""What a run has told so far, read only as far as it is new: the metrics of a long run have megabytes, and browsers ask every second."""

from __future__ import annotations

import statistics
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdlora import run_folder

MOST = 16  # runs that are remembered
RECENT = 30  # steps that the speed is taken from


@dataclass
class Reading:
    """The rows of one run's metrics, and how far in the file they reach; a file that was replaced is read anew."""

    identity: int = 0
    offset: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


_READINGS: OrderedDict[Path, Reading] = OrderedDict()
_LOCK = threading.Lock()


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics so far; a line that is still being written is left for the next look."""
    path = folder / "metrics.jsonl"
    with _LOCK:
        known = _READINGS.pop(folder, Reading())
        try:
            with path.open("rb") as file:
                stat = path.stat()
                if stat.st_ino != known.identity or stat.st_size < known.offset:
                    known = Reading(stat.st_ino)
                file.seek(known.offset)
                content = file.read()
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        known.offset += len(whole)
        known.rows += [row for line in whole.decode("utf-8", "replace").splitlines() if (row := run_folder.parsed(line))]
        _READINGS[folder] = known
        while len(_READINGS) > MOST:
            _READINGS.popitem(last=False)
        return list(known.rows)


@dataclass(frozen=True)
class Course:
    """A run's course in numbers.

    Args:
        step, steps: how far it is, of how many.
        step_s: of the last steps, from one to the next; None before there are two.
        left_s: until the last step, by the pace of all that was done since the run last began.
        peak_bytes: of memory, as it was last told.
        total_s: of a run that has come to its end.
    """

    step: int = 0
    steps: int = 0
    loss: float | None = None
    step_s: float | None = None
    left_s: float | None = None
    peak_bytes: int | None = None
    pictures_per_step: int = 1
    total_s: float | None = None


def course(told: list[dict[str, Any]], *, pictures_per_step: int) -> Course:
    """Where a run is, from its rows."""
    taken = [row for row in told if row["event"] == "step"]
    started: dict[str, Any] = next((row for row in reversed(told) if row["event"] == "started"), {})
    step = max((_number(row.get("step")) for row in told), default=0)
    steps = int(_number(started.get("steps")))
    times = [_number(row.get("time_s")) for row in taken[-RECENT:]]
    gaps = [later - earlier for earlier, later in pairwise(times) if later >= earlier]
    step_s = statistics.median(gaps) if gaps else None
    each_s = _pace(told, taken) or step_s
    peak = next((row["peak_bytes"] for row in reversed(told) if isinstance(row.get("peak_bytes"), int)), None)
    done = next((row for row in reversed(told) if row["event"] == "done"), None)
    return Course(
        step=int(step), steps=steps, loss=_mean([_number(row.get("loss")) for row in taken[-RECENT:]]), step_s=step_s,
        left_s=None if each_s is None else max(0.0, (steps - step) * each_s), peak_bytes=peak, pictures_per_step=pictures_per_step,
        total_s=_number(done.get("elapsed_s")) + _before(told) if done else None,
    )  # fmt: skip


def _before(told: list[dict[str, Any]]) -> float:
    """Seconds that a run took before it last began, in all earlier starts together, as far as what they did still counts."""
    begins = [i for i, row in enumerate(told) if row["event"] == "started"]
    return sum(max(0.0, _number(told[j - 1].get("time_s")) - _number(told[i].get("time_s"))) for i, j in pairwise(begins))


def _pace(told: list[dict[str, Any]], taken: list[dict[str, Any]]) -> float | None:
    """Seconds per step since the run last began or went on, with all samples, saves and looks between; None before the first."""
    begun = next((row for row in reversed(told) if row["event"] in ("started", "continued", "paused")), None)
    since = [row for row in taken if begun and _number(row.get("time_s")) > _number(begun.get("time_s"))]
    if begun is None or len(since) < 2:
        return None
    return max(0.0, _number(since[-1].get("time_s")) - _number(since[0].get("time_s"))) / (len(since) - 1)


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18 else 0.0
