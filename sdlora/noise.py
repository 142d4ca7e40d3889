"""The forward process: how much noise each timestep holds, noisy latents, and what the UNet is asked to predict.

Stable Diffusion's schedule is "scaled linear": the square roots of beta go evenly from √0.00085 to √0.012 over 1,000 timesteps
(Rombach et al. 2022, arXiv 2112.10752, their released configs). Everything is a pure function of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_linear_alphas(*, beta_start: float = 0.00085, beta_end: float = 0.012, count: int = 1000) -> Tensor:
    """ᾱ_t = Π (1 - β_s), the share of signal power left at each timestep (Ho et al. 2020, arXiv 2006.11239, equation 4).

    Returns:
        [count] fp32, falling from almost 1 to almost 0.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, count, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def add_noise(latents: Tensor, noise: Tensor, alphas: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε (Ho et al. 2020, equation 4).

    Args:
        latents: x_0 [B, C, H, W].
        noise: ε of the same shape.
        alphas: ᾱ [T].
        timesteps: [B], 0 to T - 1.
    """
    signal = _per_sample(alphas, timesteps, latents)
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def target(latents: Tensor, noise: Tensor, alphas: Tensor, timesteps: Tensor, *, prediction: str) -> Tensor:
    """What the UNet should answer: ε, or v = √ᾱ_t ε - √(1 - ᾱ_t) x_0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D).

    Args:
        prediction: "epsilon" or "v_prediction", diffusers' words.
    """
    if prediction == "epsilon":
        return noise
    signal = _per_sample(alphas, timesteps, latents)
    return signal.sqrt() * noise - (1 - signal).sqrt() * latents


def stratified_timesteps(batch: int, *, count: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `batch` equal bands, in random order: each alone is uniform, together they vary less.

    Returns:
        [batch] int64, 0 to count - 1.
    """
    bands = torch.randperm(batch, generator=generator)
    place = (bands + torch.rand(batch, generator=generator)) / batch
    return (place * count).long().clamp(max=count - 1)


def _per_sample(alphas: Tensor, timesteps: Tensor, latents: Tensor) -> Tensor:
    return alphas.to(latents.device)[timesteps].view(-1, *[1] * (latents.ndim - 1)).to(latents.dtype)
