"""How much memory a device has left, and the most that this process has taken of it.

On the CPU that is the process's resident memory, libraries and all: what the system counts when it looks for somebody to end. Linux keeps
the peak since the program began (VmHWM); `getrusage` would also count the parent's, from the moment before the program was loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch

GIB = 2**30
_STATUS = Path("/proc/self/status")
_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """What a new process could still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return min(int(psutil.virtual_memory().available), _group_free())


def _group_free() -> int:
    """What a container's limit leaves (control groups of version 2); without a limit more than any machine has."""
    try:
        return int((_GROUP / "memory.max").read_text()) - int((_GROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return sys.maxsize


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held since it began: on a GPU what was reserved there, on the CPU resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    if _STATUS.exists():
        return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    told = psutil.Process().memory_info()
    return int(getattr(told, "peak_wset", told.rss))  # Windows keeps the peak; elsewhere it is what is held now


def spilled_bytes(device: torch.device) -> int:
    """How much of what this process reserved on a GPU does not lie there: some drivers move it to the machine's memory, unasked.

    The driver's own count of used memory holds what every process has there; ours cannot be more, unless it lies elsewhere.
    """
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(torch.cuda.memory_reserved(device)) - int(total - free))
