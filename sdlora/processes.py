"""Several processes that train one LoRA together, on one machine or many; one process is the case of one.

Every process holds the whole base and the whole dataset, takes its rows of each batch, and after a step's batches all gradients are added
up in one flat all-reduce. What a step sees and which noise it meets is drawn for the whole batch first and shared out afterwards, so it
does not depend on how many share it. Only the first process writes. DDP is not used: a LoRA's gradients are one small buffer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from sdlora.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # how long the others wait while the first draws pictures or is paused; a lost process is noticed at once


def start(mixed_precision: str, *, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """Joins the processes that a launcher started, each with its own GPU; for one alone, fp16's scaler and the trackers.

    Args:
        mixed_precision: accelerate's word, see `devices.mixed_precision`.
        trackers: "tensorboard" and "wandb".
        folder: for what they write.

    Raises:
        UserError: if a tracker's package is not installed.
    """
    if missing := next((name for name in trackers if find_spec(name) is None), None):
        raise UserError(f"trackers: the package {missing} is not installed; pip install {missing}, or leave it out of the config.")
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[patience], log_with=list(trackers) or None, project_dir=folder)


def count() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """Which of them this is, 0 for the first."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this one writes."""
    return index() == 0


@torch.no_grad()
def add_up(weights: Sequence[nn.Parameter], numbers: Tensor) -> Tensor:
    """Adds up the gradients of all processes in place, and some numbers beside them, in one message.

    Args:
        weights: the same in every process; one without a gradient, as after an empty share of the batch, counts as zeros.
        numbers: [K] fp32.

    Returns:
        The sums of the numbers [K].

    Raises:
        UserError: if another process is gone.
    """
    if count() == 1:
        return numbers
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), numbers])
    try:
        dist.all_reduce(flat)
    except RuntimeError as problem:
        raise UserError(
            f"Process {index() + 1} of {count()} has lost the others, so the run ends here; states saved stand, and the same command "
            f"goes on from the newest. ({str(problem).splitlines()[0][:120]})"
        ) from problem
    *sums, told = torch.split(flat, [gradient.numel() for gradient in gradients] + [len(numbers)])
    for gradient, total in zip(gradients, sums, strict=True):
        gradient.copy_(total.view_as(gradient))
    return torch.as_tensor(told)


@contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process of each machine does it alone, the others after it: they find in the cache what it has made."""
    local_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not local_first:
        wait()
    yield
    if local_first:
        wait()


def wait() -> None:
    """Until all have come this far.

    Raises:
        UserError: if another process is gone.
    """
    if count() > 1:
        try:
            dist.barrier()
        except RuntimeError as problem:
            raise UserError(f"Process {index() + 1} of {count()} has lost the others; the first says why.") from problem


def from_first(value: T) -> T:
    """What the first process has, in all of them."""
    if count() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def agree(digest: str, *, what: str) -> None:
    """Makes sure that all processes have the same.

    Raises:
        UserError: in every process, if one has not.
    """
    if count() == 1:
        return
    found: list[str] = [""] * count()
    dist.all_gather_object(found, digest)
    others = [str(place + 1) for place, one in enumerate(found) if one != found[0]]
    if others:
        raise UserError(f"Process {', '.join(others)} of {count()} has another {what} than the first; give all machines the same files.")
