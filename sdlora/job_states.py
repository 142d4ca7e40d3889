"""What has become of a training, read from its run folder: the lock says whether it is at work, the metrics and the log how it ended.

No exit code is asked for, since whoever started the child may be gone when it ends. What a run could not do it says in its log as one
sentence; a run that has ended without a word was ended from outside, and can go on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sdlora import run_folder, run_lock

LOG = "train.log"
AT_WORK = ("starting", "running", "paused")
_TAIL = 16_384  # bytes; the last line of the metrics, and all that a log ends with, is shorter


def state_of(folder: Path, *, has_child: bool) -> tuple[str, str]:
    """One of `AT_WORK`, "done", "stopped" (somebody asked it to end), "failed" or "interrupted"; and of a failed one why, in a sentence.

    Args:
        has_child: whether a process was started for it that has not ended.
    """
    owner, last = run_lock.owner(folder), last_row(folder)
    event = last.get("event")
    if owner:
        if event == "paused" and (folder / "pause").exists():
            return "paused", ""
        told_s = last.get("time_s")
        return ("running" if isinstance(told_s, int | float) and told_s >= owner.started_s else "starting"), ""
    if has_child:
        return "starting", ""
    spoke_later = _written_s(folder / LOG) >= _written_s(folder / "metrics.jsonl") + 1  # it had ended, and was to be lengthened
    if (event != "done" or spoke_later) and (words := complaint(folder)):
        return "failed", words
    if event == "failed":
        return "failed", str(last.get("words", ""))
    return (event if event in ("done", "stopped") else "interrupted"), ""


def has_ended(folder: Path) -> bool:
    """Whether a run has come to its end, also if it could not be lengthened afterwards."""
    return last_row(folder).get("event") == "done"


def complaint(folder: Path) -> str:
    """What a run said last in its log, if that is why it ended; what is older than its last step is of an earlier start."""
    if _written_s(folder / LOG) < _written_s(folder / "metrics.jsonl") - 1:
        return ""
    lines = [line for line in _tail(folder / LOG).splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("sdlora: ")]
    if starts:
        return " ".join(lines[starts[-1] :]).removeprefix("sdlora: ").strip()
    if any(line.startswith("Traceback ") for line in lines) and not lines[-1].startswith(" "):
        return f"This is a fault of the program, not yours: {lines[-1].strip()[:300]}"
    return ""


def last_row(folder: Path) -> dict[str, Any]:
    """The last whole line of the metrics; nothing if there is none."""
    found = (run_folder.parsed(line) for line in reversed(_tail(folder / "metrics.jsonl").splitlines()))
    return next((row for row in found if row), {})


def _written_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
