"""What a LoRA file can change in one module, in every form found in the wild: from the stored factors to ΔW, as pure functions.

Training and our own files know `LowRank` only. The other forms exist so that files made by other tools work here exactly.
A weight is [out, in] or, of a convolution, [out, in, k, k]; factors of a linear fit a 1×1 convolution and the reverse, because
`proj_in` is the one in SD 1.x and the other in SDXL. All arithmetic is in fp32 whatever the file stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Record = TypeVar("Record")

SMALLEST_NORM = 1e-7  # inputs that a base does not read at all have norm 0 and magnitude 0


@dataclass(frozen=True)
class LowRank:
    """LoRA and LoCon: ΔW = (alpha / r) · B A (Hu et al. 2021, arXiv 2106.09685); with a Tucker core, ΔW = (alpha / r) · B C A.

    Args:
        down: A [r, in], of a convolution [r, in, k, k] ([r, in, 1, 1] with a core).
        up: B [out, r], of a convolution [out, r, 1, 1].
        alpha: the numerator of the scale.
        core: C [r, r, k, k] (`lora_mid`), or None.
    """

    down: Tensor
    up: Tensor
    alpha: float
    core: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.down.shape[0]


@dataclass(frozen=True)
class Hadamard:
    """LoHa: ΔW = (alpha / r) · (B₁ A₁) ⊙ (B₂ A₂) (Hyeon-Woo et al. 2021, arXiv 2108.06098, proposition 1; with cores, proposition 2).

    Args:
        up1, down1, up2, down2: `hada_w1_a` [out, r], `hada_w1_b` [r, in·k·k] and the same of 2; with cores all are [r, …].
        core1, core2: `hada_t1`, `hada_t2` [r, r, k, k], or None.
    """

    up1: Tensor
    down1: Tensor
    up2: Tensor
    down2: Tensor
    alpha: float
    core1: Tensor | None = None
    core2: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of rows of A₁."""
        return self.down1.shape[0]


@dataclass(frozen=True)
class Kronecker:
    """LoKr: ΔW = scale · W₁ ⊗ W₂ (Yeh et al. 2023, arXiv 2309.14859), each factor direct or a low-rank product.

    Args:
        first: `lokr_w1` [a, b], or the pair (`lokr_w1_a` [a, r], `lokr_w1_b` [r, b]).
        second: `lokr_w2` [c, d] or [c, d, k, k], or the pair (`lokr_w2_a` [c, r], `lokr_w2_b` [r, d] or [r, d·k·k]); with a core
            the pair is [r, c] and [r, d]. ΔW is [a·c, b·d, …].
        alpha: scale is alpha / r if a factor is a pair, else 1, as LyCORIS does.
        core: `lokr_t2` [r, r, k, k], or None.
    """

    first: Tensor | tuple[Tensor, Tensor]
    second: Tensor | tuple[Tensor, Tensor]
    alpha: float
    core: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """The rows of the pair's second matrix, of W₂'s if both factors are pairs; None if both are direct."""
        pairs = [factor for factor in (self.second, self.first) if isinstance(factor, tuple)]
        return pairs[0][1].shape[0] if pairs else None


@dataclass(frozen=True)
class Full:
    """ΔW itself (`diff`, or `w_norm` of a normalisation layer)."""

    weight: Tensor


@dataclass(frozen=True)
class Update:
    """All that a file changes in one module.

    Args:
        change: how ΔW is stored; None if only the bias changes.
        magnitude: DoRA's m (Liu et al. 2024, arXiv 2402.09353, equation 5): per input [1, in, …] or per output [out, 1, …].
        bias: Δb [out] (`diff_b`, `b_norm`), or None.
    """

    change: LowRank | Hadamard | Kronecker | Full | None
    magnitude: Tensor | None = None
    bias: Tensor | None = None


def delta(update: Update, weight: Tensor) -> Tensor | None:
    """ΔW at strength 1; with DoRA's magnitude W' - W for W' = m · (W + ΔW) / ‖W + ΔW‖, so that a strength goes evenly from W to W'.

    Args:
        update: one that fits the weight, see `misfit`.
        weight: W [out, in, …] in any dtype; its values matter to DoRA alone.

    Returns:
        fp32 in the shape of the weight, or None if only the bias changes.
    """
    if update.change is None and update.magnitude is None:
        return None
    own = weight.float()
    change = torch.zeros_like(own) if update.change is None else product(update.change, weight.shape)
    if update.magnitude is None:
        return change
    return with_magnitude(own + change, update.magnitude.float()) - own


def add(goal: Tensor, update: Update, weight: Tensor, *, onto: Tensor, strength: float) -> None:
    """goal ← onto + strength · ΔW; a plain low-rank update is added by its product itself, ΔW on its own is never formed.

    Args:
        goal: fp32 [out, in, …], written in place.
        update, weight: as for `delta`.
        onto: fp32 in the shape of the goal, which may be the goal.
    """
    change, has_rows = update.change, all(one.ndim == 2 or one.is_contiguous() for one in (goal, onto))
    if isinstance(change, LowRank) and change.core is None and update.magnitude is None and has_rows:
        up, down = (factor.float().flatten(1) for factor in (change.up, change.down))
        torch.addmm(_rows(onto), up, down, alpha=strength * change.alpha / change.rank, out=_rows(goal))
    elif (whole := delta(update, weight)) is not None:
        torch.add(onto, whole, alpha=strength, out=goal)
    elif goal is not onto:
        goal.copy_(onto)


def product(change: LowRank | Hadamard | Kronecker | Full, shape: torch.Size) -> Tensor:
    """ΔW of the factors alone, without a magnitude.

    Args:
        shape: the weight's own, [out, in, …].

    Returns:
        fp32.
    """
    return _product(change).reshape(shape)


def with_magnitude(weight: Tensor, magnitude: Tensor) -> Tensor:
    """W' = m · W / ‖W‖ (Liu et al. 2024, arXiv 2402.09353, equation 5).

    Args:
        weight: [out, in, …].
        magnitude: m, per input [1, in, …] or per output [out, 1, …]; the norm is taken likewise.
    """
    divisor = norms(weight, per_input=_is_per_input(magnitude, weight))
    return weight * (magnitude.reshape(divisor.shape) / divisor)


def norms(weight: Tensor, *, per_input: bool) -> Tensor:
    """‖W‖ of what reads each input [1, in, …], or of what makes each output [out, 1, …]; never 0, so that it can divide."""
    kept = 1 if per_input else 0
    others = [axis for axis in range(weight.ndim) if axis != kept]
    length: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return length.clamp_min(SMALLEST_NORM)


def misfit(update: Update, weight: Tensor, *, bias: Tensor | None) -> str | None:
    """Why an update cannot be applied to a module, in words that go on after its name; None if it fits.

    Args:
        weight: the module's W [out, in, …]; nothing is computed with it.
        bias: the module's b [out], None if it has none.

    Returns:
        Such as "is [320, 768] in the file and [640, 768] in the base".
    """
    magnitude, shift = update.magnitude, update.bias
    if update.change is not None:
        try:
            found = _product(mapped(update.change, lambda factor: factor.to("meta"))).shape
        except (RuntimeError, IndexError):  # PyTorch's words for shapes that do not multiply
            return f"has factors that do not fit each other: {', '.join(str(list(one.shape)) for one in tensors(update.change))}"
        if not _same_counts(found, weight.shape):
            return f"is {list(found)} in the file and {list(weight.shape)} in the base"
    if magnitude is not None and not (_is_per_input(magnitude, weight) or _is_per_output(magnitude, weight)):
        allowed = f"{[1, *weight.shape[1:2]]} or {[weight.shape[0], 1]}"
        return f"has DoRA magnitudes of {list(magnitude.shape)} in the file, and {allowed} fits the base"
    if shift is not None and (bias is None or bias.shape != shift.shape):
        return f"has a bias of {list(shift.shape)} in the file and {'none' if bias is None else f'one of {list(bias.shape)}'} in the base"
    return None


def mapped(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """The same update, or part of one, with each of its tensors changed, such as moved to a device."""
    new: Any = record
    if isinstance(record, Tensor):
        new = change(record)
    elif isinstance(record, tuple):
        new = tuple(mapped(one, change) for one in record)
    elif is_dataclass(record) and not isinstance(record, type):
        new = replace(record, **{field.name: mapped(getattr(record, field.name), change) for field in fields(record)})
    return cast(Record, new)


def tensors(record: object) -> list[Tensor]:
    """All tensors of an update, or of a part of one, in the order of its fields."""
    if isinstance(record, Tensor):
        return [record]
    parts: Iterable[object] = record if isinstance(record, tuple) else vars(record).values() if is_dataclass(record) else ()
    return [one for part in parts for one in tensors(part)]


def _product(change: LowRank | Hadamard | Kronecker | Full) -> Tensor:
    """ΔW in fp32 as its factors give it: [out, in, …] or, where a file keeps a convolution flat, [out, in·k·k]."""
    one = mapped(change, Tensor.float)
    if isinstance(one, Full):
        return one.weight
    if isinstance(one, LowRank):
        return _factor(one.up, one.down, one.core) * (one.alpha / one.rank)
    if isinstance(one, Hadamard):
        both = [_stored_factor(one.up1, one.down1, one.core1), _stored_factor(one.up2, one.down2, one.core2)]
        return torch.stack(both).prod(0) * (one.alpha / one.rank)  # `stack` refuses different shapes, `*` would spread the smaller one
    w1 = _stored_factor(*one.first, None) if isinstance(one.first, tuple) else one.first
    w2 = _stored_factor(*one.second, one.core) if isinstance(one.second, tuple) else one.second
    flat = torch.kron(w1.flatten(1), w2.flatten(1)) * (1 if one.rank is None else one.alpha / one.rank)
    return flat.reshape(len(flat), -1, *w2.shape[2:])


def _rows(weight: Tensor) -> Tensor:
    """A weight as the same memory in two dimensions; a linear's stays as it is, also where it is stored transposed."""
    return weight if weight.ndim == 2 else weight.view(len(weight), -1)


def _stored_factor(up: Tensor, down: Tensor, core: Tensor | None) -> Tensor:
    """A factor of LoHa or LoKr; beside a core their `up` is stored as [r, out]."""
    return _factor(up, down, None) if core is None else _factor(up.T, down, core)


def _factor(up: Tensor, down: Tensor, core: Tensor | None) -> Tensor:
    """B A [out, …] with the rest of A's shape, or, with C, Σ_ij B_oi C_ij A_jc [out, in, k, k]; matrix products refuse what differs."""
    if core is None:
        return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    upper = (up.flatten(1) @ core.flatten(1)).reshape(len(up), core.shape[1], -1)
    return (down.flatten(1).T @ upper).reshape(len(up), -1, *core.shape[2:])


def _same_counts(found: torch.Size, wanted: torch.Size) -> bool:
    """Whether the one can be laid out as the other without mixing inputs: equal, flat, or a 1×1 convolution against a linear."""
    same = found[:1] == wanted[:1] and math.prod(found[1:]) == math.prod(wanted[1:])
    return same and (len(found) == 2 or found[1:2] == wanted[1:2])


def _is_per_input(magnitude: Tensor, weight: Tensor) -> bool:
    return weight.ndim > 1 and tuple(magnitude.shape[:2]) == (1, weight.shape[1]) and magnitude.numel() == weight.shape[1]


def _is_per_output(magnitude: Tensor, weight: Tensor) -> bool:
    return weight.ndim > 1 and tuple(magnitude.shape[:2]) == (weight.shape[0], 1) and magnitude.numel() == weight.shape[0]
