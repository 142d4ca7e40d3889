"""The loss of one batch: squared error per sample, weighted by how noisy the sample is."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def snr(alphas: Tensor, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio ᾱ_t / (1 - ᾱ_t) [B] (Kingma et al. 2021, arXiv 2107.00630, equation 2)."""
    signal = alphas.to(timesteps.device)[timesteps]
    return signal / (1 - signal)


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


def squared_error(predicted: Tensor, wanted: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample [B], formed in fp32; with a mask m, Σ m · e² / Σ m, so that a small mask weighs no less.

    Args:
        predicted, wanted: [B, C, h, w].
        mask: where the error counts [B, 1, h, w], 0 to 1.
    """
    error = F.mse_loss(predicted.float(), wanted.float(), reduction="none")
    if mask is None:
        return error.flatten(1).mean(1)
    area = mask.expand_as(error).flatten(1).sum(1)
    return (error * mask).flatten(1).sum(1) / area.clamp(min=1e-6)  # an empty mask has no error to divide
