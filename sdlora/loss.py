"""The loss of one batch: an error per sample, weighted by how noisy the sample is.

Two choices, both by name: `FORMS` says how a difference becomes an error (squared, absolute, or pseudo-Huber between the two), and
`WEIGHTINGS` how much a timestep counts. A weighting is stated for one prediction in its paper; since an error of ε is SNR times and one
of v is SNR + 1 times that of x_0 when squared, the others follow from it. All weights are finite where there is no signal (SNR 0, as at
the end of a zero-terminal schedule) and where there is no noise (SNR ∞).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Stable Diffusion's own SNRs go from 0.0047 to 1,175; only rescaled schedules reach beyond, and no weight exceeds 100.
_DEBIASED_SNR = (1e-4, 1e4)


def snr(alphas: Tensor, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio ᾱ_t / (1 - ᾱ_t) [B] (Kingma et al. 2021, arXiv 2107.00630, equation 2)."""
    signal = alphas.to(timesteps.device)[timesteps]
    return signal / (1 - signal)


def no_weight(ratio: Tensor, *, gamma: float, prediction: str) -> Tensor:
    """1 at every timestep, whatever is predicted (Ho et al. 2020, arXiv 2006.11239, equation 14, for ε)."""
    return ratio.new_ones(ratio.shape)


def min_snr_weight(ratio: Tensor, *, gamma: float, prediction: str) -> Tensor:
    """min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    The paper's weight is min(SNR, γ) on the error of x_0; an error of ε is SNR times, one of v SNR + 1 times as large.
    Where there is no signal at all (zero-terminal schedules), the weight for ε is its limit, 1.

    Args:
        ratio: SNR [B].
        gamma: 5 in the paper; at 0 all weights are 1.
        prediction: "epsilon", "v_prediction" or "sample".
    """
    if gamma == 0:
        return ratio.new_ones(ratio.shape)
    if prediction == "epsilon":
        return (gamma / ratio).clamp(max=1)
    limited = ratio.clamp(max=gamma)
    return limited if prediction == "sample" else limited / (ratio + 1)


def soft_min_snr_weight(ratio: Tensor, *, gamma: float, prediction: str) -> Tensor:
    """γ SNR / (SNR + γ) for x_0, the smooth form of min(SNR, γ) (Crowson et al. 2024, arXiv 2401.11605).

    The paper writes 1 / (σ² + 1/γ) with σ² = 1 / SNR. So it is γ / (SNR + γ) for ε, and the weight for x_0 divided by SNR + 1 for v.

    Args:
        ratio: SNR [B].
        gamma: 4 in the paper; at 0 all weights are 1, as for min-SNR.
        prediction: "epsilon", "v_prediction" or "sample".
    """
    if gamma == 0:
        return ratio.new_ones(ratio.shape)
    if prediction == "epsilon":
        return gamma / (ratio + gamma)
    smooth = gamma / (1 + gamma / ratio)  # the same number, but neither 0/0 nor ∞/∞
    return smooth if prediction == "sample" else smooth / (ratio + 1)


def debiased_weight(ratio: Tensor, *, gamma: float, prediction: str) -> Tensor:
    """1 / √SNR for ε (Yu et al. 2023, arXiv 2310.08442), hence √SNR for x_0 and √SNR / (SNR + 1) for v.

    Args:
        ratio: SNR [B], taken as 1e-4 or 10,000 beyond these.
        gamma: means nothing here.
        prediction: "epsilon", "v_prediction" or "sample".
    """
    root = ratio.clamp(*_DEBIASED_SNR).sqrt()
    if prediction == "epsilon":
        return 1 / root
    return root if prediction == "sample" else root / (root**2 + 1)


WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "none": no_weight,
    "min_snr": min_snr_weight,
    "soft_min_snr": soft_min_snr_weight,
    "debiased": debiased_weight,
}


def constant_delta(alphas: Tensor, timesteps: Tensor, *, delta: float) -> Tensor:
    """δ at every timestep [B]."""
    return torch.full(timesteps.shape, delta, device=timesteps.device)


def exponential_delta(alphas: Tensor, timesteps: Tensor, *, delta: float) -> Tensor:
    """δ^(t / T): 1 without noise, δ at the noisiest, where outliers harm most (Khrapov et al. 2024, arXiv 2403.16728).

    Args:
        alphas: ᾱ [T].
        timesteps: [B], 0 to T - 1.
        delta: above 0, at most 1; 0.1 is usual.
    """
    return torch.exp(math.log(delta) * timesteps / len(alphas))


def snr_delta(alphas: Tensor, timesteps: Tensor, *, delta: float) -> Tensor:
    """δ + (1 - δ) / (1 + σ_t)² with σ_t = 1 / √SNR: 1 without noise, towards δ with it (Khrapov et al. 2024, their SD training code).

    Args:
        alphas: ᾱ [T].
        timesteps: [B], 0 to T - 1.
        delta: above 0, at most 1; 0.1 is usual.
    """
    return delta + (1 - delta) / (1 + snr(alphas, timesteps).rsqrt()) ** 2


DELTAS: dict[str, Callable[..., Tensor]] = {"snr": snr_delta, "exponential": exponential_delta, "constant": constant_delta}


def _squares(predicted: Tensor, wanted: Tensor, delta: Tensor | None) -> Tensor:
    return F.mse_loss(predicted, wanted, reduction="none")


def _magnitudes(predicted: Tensor, wanted: Tensor, delta: Tensor | None) -> Tensor:
    return F.l1_loss(predicted, wanted, reduction="none")


def _pseudo_huber(predicted: Tensor, wanted: Tensor, delta: Tensor | None) -> Tensor:
    """2 δ² (√(1 + e² / δ²) - 1), written without the difference of two almost equal numbers."""
    assert delta is not None
    squares = (predicted - wanted) ** 2
    width = delta.view(-1, *[1] * (squares.ndim - 1))
    return 2 * squares / (1 + (1 + squares / width**2).sqrt())


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {"mse": _squares, "l1": _magnitudes, "huber": _pseudo_huber}


def sample_error(predicted: Tensor, wanted: Tensor, *, form: str, mask: Tensor | None = None, delta: Tensor | None = None) -> Tensor:
    """Mean error of each sample [B], formed in fp32; with a mask m, Σ m · error / Σ m, so that a small mask weighs no less.

    "mse" is e², "l1" |e|, "huber" 2 δ² (√(1 + e² / δ²) - 1): e² where e is well below δ, 2 δ |e| well above (Khrapov et al. 2024, arXiv
    2403.16728; twice their formula, so that a learning rate for e² fits).

    Args:
        predicted, wanted: [B, C, h, w].
        form: a key of `FORMS`.
        mask: where the error counts [B, 1, h, w], 0 to 1.
        delta: δ [B] for "huber", from one of `DELTAS`.
    """
    error = FORMS[form](predicted.float(), wanted.float(), delta)
    if mask is None:
        return error.flatten(1).mean(1)
    area = mask.expand_as(error).flatten(1).sum(1)
    return (error * mask).flatten(1).sum(1) / area.clamp(min=1e-6)  # an empty mask has no error to divide


def squared_error(predicted: Tensor, wanted: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample [B], see `sample_error`."""
    return sample_error(predicted, wanted, form="mse", mask=mask)
