"""The forward process: how much noise each timestep holds, noisy latents, and what the UNet is asked to predict.

Stable Diffusion's schedule is "scaled linear": the square roots of beta go evenly from √0.00085 to √0.012 over 1,000 timesteps
(Rombach et al. 2022, arXiv 2112.10752, their released configs). Everything is a pure function of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdlora.errors import UserError

_STABLE_DIFFUSION: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
_POWERS = {"scaled_linear": 2, "linear": 1}


def alphas(schedule: Mapping[str, Any]) -> Tensor:
    """ᾱ_t = Π (1 - β_s), the share of signal power left at each timestep (Ho et al. 2020, arXiv 2006.11239, equation 4).

    Args:
        schedule: a scheduler's config in diffusers' words: `beta_schedule` ("scaled_linear" or "linear"), `beta_start`, `beta_end`,
            `num_train_timesteps`, and `rescale_betas_zero_snr` for a last timestep without any signal. What it does not say is
            Stable Diffusion's.

    Returns:
        [T] fp32, falling from almost 1 to almost 0, or to exactly 0.

    Raises:
        UserError: if the form of the schedule is unknown.
    """
    start, end, count = (schedule.get(key, default) for key, default in _STABLE_DIFFUSION.items())
    form = schedule.get("beta_schedule", "scaled_linear")
    if form not in _POWERS or schedule.get("trained_betas"):
        raise UserError(f"The base's noise schedule '{form}' is unknown here; {' and '.join(_POWERS)} are known.")
    power = _POWERS[form]
    betas = torch.linspace(start ** (1 / power), end ** (1 / power), count, dtype=torch.float64) ** power
    signal = torch.cumprod(1 - betas, 0)
    return (zero_terminal(signal) if schedule.get("rescale_betas_zero_snr") else signal).float()


def zero_terminal(signal: Tensor) -> Tensor:
    """ᾱ rescaled so that the last timestep is noise alone (Lin et al. 2023, arXiv 2305.08891, algorithm 1).

    √ᾱ'_t = (√ᾱ_t - √ᾱ_T) · √ᾱ_1 / (√ᾱ_1 - √ᾱ_T): shifted to end at 0, scaled to keep its beginning.

    Args:
        signal: ᾱ [T].
    """
    roots = signal.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


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
    """What the UNet should answer: ε, x_0, or v = √ᾱ_t ε - √(1 - ᾱ_t) x_0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D).

    Args:
        prediction: "epsilon", "v_prediction" or "sample", diffusers' words.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return latents
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
