"""What is done to the LoRA's weights after an optimizer step: a running average of them, and a limit to how far one module may go.

The average (EMA) is a second list of tensors beside the weights; it is written into the model for as long as something is drawn or
saved with it and taken out again without a bit lost, since both lists are only exchanged, never computed back. The limit (kohya's
"scale weight norms") looks at ‖B A‖ without forming B A. Neither waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def start(weights: Iterable[Tensor]) -> list[Tensor]:
    """The average before the first step: a copy of the weights."""
    return [weight.detach().clone() for weight in weights]


def decay_at(step: int, *, decay: float) -> float:
    """min(d, step / (9 + step)), 0 at the first step: the average reaches no further back than the run itself does.

    So the weights before the first step leave no trace, and d = 0.999 counts fully from step 8,991 on (the warm-up of TensorFlow's
    `ExponentialMovingAverage`, in diffusers' numbering).

    Args:
        step: 1 for the first.
        decay: d, 0 to less than 1.
    """
    return min(decay, step / (9 + step)) if step > 1 else 0.0


@torch.no_grad()
def update(average: Sequence[Tensor], weights: Sequence[Tensor], *, decay: float) -> None:
    """average ← d · average + (1 - d) · weights, in place (Polyak & Juditsky 1992, in its exponential form).

    Args:
        average: as `start` or a checkpoint gave it.
        weights: of the same shapes.
        decay: d of this step, from `decay_at`.
    """
    torch._foreach_lerp_(list(average), list(weights), 1 - decay)


@torch.no_grad()
def exchange(weights: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    """Each tensor of one list takes the numbers of its partner in the other; one copy of one tensor is needed at a time."""
    for weight, other in zip(weights, others, strict=True):
        kept = weight.detach().clone()
        weight.copy_(other)
        other.copy_(kept)


@contextmanager
def swapped(weights: Sequence[Tensor], average: Sequence[Tensor]) -> Iterator[None]:
    """While it lasts the weights are the average, and the average keeps the weights; afterwards both have their exact bytes again."""
    exchange(weights, average)
    try:
        yield
    finally:
        exchange(weights, average)


def product_norm(down: Tensor, up: Tensor) -> Tensor:
    """‖B A‖, the Frobenius norm of a product through its factors: √(Σ (Bᵀ B) ∘ (A Aᵀ)), r² numbers instead of out · in.

    Args:
        down: A [r, in] (conv [r, in, k, k]).
        up: B [out, r] (conv [out, r, 1, 1]).

    Returns:
        [] fp32.
    """
    rows, columns = down.detach().float().flatten(1), up.detach().float().flatten(1)
    return ((columns.T @ columns) * (rows @ rows.T)).sum().clamp(min=0).sqrt()


@torch.no_grad()
def limit_norm(down: Tensor, up: Tensor, *, scale: float, limit: float) -> Tensor:
    """A and B ← √f A, √f B with f = min(1, limit / (scale · ‖B A‖)); below the limit not a bit changes.

    Args:
        down, up: A and B, see `product_norm`; changed in place. Not those of an adapter that is counted from where it started.
        scale: what B A is multiplied by, alpha / r.
        limit: the largest norm, above 0; 1 is usual.

    Returns:
        The norm scale · ‖B A‖ as it was [] fp32.
    """
    norm = product_norm(down, up) * abs(scale)
    root = (limit / norm).clamp(max=1).sqrt()  # a norm of 0 gives ∞, hence 1
    down.mul_(root)
    up.mul_(root)
    return norm
