"""The optimizer and the course of its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn


def adamw(groups: list[tuple[list[nn.Parameter], float]], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with one peak rate per group of weights.

    Args:
        groups: weights with their peak learning rates; empty groups are left out.
    """
    rows = [{"params": weights, "lr": rate, "peak": rate} for weights, rate in groups if weights]
    return torch.optim.AdamW(rows, weight_decay=weight_decay, fused=True)


def rate_factor(step: int, *, steps: int, warmup: float, schedule: str) -> float:
    """The share of the peak rate at a step: rises linearly over the warm-up, then stays ("constant") or falls to 0 as a half cosine.

    Args:
        step: 0 for the first.
        warmup: share of `steps`.
    """
    rising = round(steps * warmup)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's rate to its peak times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
