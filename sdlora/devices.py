"""Which device and number format a run uses, and where its chance comes from."""

from __future__ import annotations

import numpy as np
import torch


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def base_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The frozen base's format.

    Args:
        precision: a key of `PRECISIONS`, or "auto": bf16 on GPUs that have it, fp16 on others, fp32 on the CPU.
    """
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16


def mixed_precision(dtype: torch.dtype) -> str:
    """accelerate's word for training beside a base of this format: only "fp16" needs its loss scaled."""
    return {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def key(*parts: int) -> int:
    """One number for a key such as (seed, step), mixed by numpy's `SeedSequence`, so that (0, 1) and (1, 0) have nothing in common."""
    mixed = np.random.SeedSequence(parts).generate_state(2, np.uint32)
    return int(mixed[0]) << 31 | int(mixed[1]) >> 1


def generator(*parts: int) -> torch.Generator:
    """A CPU generator for a key such as (seed, step): numbers drawn there are the same on every device."""
    return torch.Generator().manual_seed(key(*parts))


def seed(device: torch.device, *parts: int) -> None:
    """Sets the streams that dropout draws from; `torch.manual_seed` would note it for each kind of device that is not there, every time."""
    torch.default_generator.manual_seed(key(*parts))
    if device.type == "cuda":
        torch.cuda.manual_seed_all(key(*parts))
    elif device.type == "mps":
        torch.mps.manual_seed(key(*parts))
