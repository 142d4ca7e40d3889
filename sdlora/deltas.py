"""What a LoRA file can change in one module, in every form found in the wild: from the stored factors to ΔW, as pure functions.

Training and our own files know `LowRank` only. The other forms exist so that files made by other tools work here exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
        first: `lokr_w1`, or the pair (`lokr_w1_a`, `lokr_w1_b`).
        second: `lokr_w2`, or the pair (`lokr_w2_a`, `lokr_w2_b`).
        alpha: scale is alpha / r if a factor is a pair, else 1.
        core: `lokr_t2`, or None.
    """

    first: Tensor | tuple[Tensor, Tensor]
    second: Tensor | tuple[Tensor, Tensor]
    alpha: float
    core: Tensor | None = None


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
