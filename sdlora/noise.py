"""The forward process: how much noise each timestep holds, noisy latents, and what the UNet is asked to predict.

Stable Diffusion's schedule is "scaled linear": the square roots of beta go evenly from √0.00085 to √0.012 over 1,000 timesteps
(Rombach et al. 2022, arXiv 2112.10752, their released configs). Everything is a pure function of tensors; chance comes from the CPU
generator that is given, so that a batch is the same on every device, and what is switched off draws nothing from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
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


def with_offset(noise: Tensor, *, strength: float, generator: torch.Generator) -> Tensor:
    """ε + s · o with one normal number o per sample and channel, so that overall brightness is learned too (Guttenberg 2023, "Diffusion
    with offset noise").

    Args:
        noise: ε [B, C, H, W].
        strength: s, 0 for none; 0.05 to 0.1 is usual. The variance becomes 1 + s².
        generator: on the CPU; not drawn from at 0.
    """
    if strength == 0:
        return noise
    return noise + strength * torch.randn(*noise.shape[:2], 1, 1, generator=generator).to(noise)


def pyramid(noise: Tensor, *, discount: float, levels: int, generator: torch.Generator) -> Tensor:
    """(ε + Σ_k dᵏ · up(ε_k)) / σ, where ε_k is noise of 2⁻ᵏ the size, bilinearly enlarged (Whitaker 2023, "Multi-resolution noise for
    diffusion model training").

    σ is the sum's exact standard deviation at each pixel, so the variance is 1 everywhere and no sample depends on its batch; the
    original divides by the deviation measured over the batch, and shrinks each level by a random factor from 2 to 4.

    Args:
        noise: ε [B, C, H, W].
        discount: d, 0 for none; 0.3 to 0.8 is usual.
        levels: the largest k; it ends at one number per channel in any case.
        generator: on the CPU; not drawn from at 0.
    """
    if discount == 0:
        return noise
    height, width = noise.shape[-2:]
    total, variance = torch.zeros(()), torch.ones(())
    for level in range(1, min(levels, max(height, width).bit_length() - 1) + 1):
        small = (max(1, height >> level), max(1, width >> level))
        rows, columns = _enlarging(small[0], height), _enlarging(small[1], width)
        drawn = torch.randn(*noise.shape[:2], *small, generator=generator)
        total = total + discount**level * (rows.T @ drawn @ columns)
        variance = variance + discount ** (2 * level) * torch.outer((rows**2).sum(0), (columns**2).sum(0))
    return (noise + total.to(noise)) / variance.sqrt().to(noise)


def _enlarging(count: int, size: int) -> Tensor:
    """How much each of `count` numbers weighs at each of `size` places between them [count, size]."""
    return F.interpolate(torch.eye(count)[None], size=size, mode="linear")[0]


def perturbed(noise: Tensor, *, strength: float, generator: torch.Generator) -> Tensor:
    """ε + γ ξ, to make x_t from while the target stays made of ε (Ning et al. 2023, arXiv 2301.11706).

    In training x_t comes from true pictures, in generation from earlier predictions with their errors; γ ξ stands for those.

    Args:
        noise: ε [B, C, H, W].
        strength: γ, 0 for none, 0.1 in the paper.
        generator: on the CPU; not drawn from at 0.
    """
    if strength == 0:
        return noise
    return noise + strength * torch.randn(noise.shape, generator=generator).to(noise)


def uniform_places(batch: int, *, generator: torch.Generator) -> Tensor:
    """Independent places [batch] between 0 and 1."""
    return torch.rand(batch, generator=generator)


def stratified_places(batch: int, *, generator: torch.Generator) -> Tensor:
    """One place [batch] from each of `batch` equal bands of 0 to 1, in random order: each alone is uniform, together they vary less."""
    bands = torch.randperm(batch, generator=generator)
    return (bands + torch.rand(batch, generator=generator)) / batch


def flat(places: Tensor, *, mean: float, scale: float) -> Tensor:
    """The places as they are: every timestep equally often. `mean` and `scale` mean nothing here."""
    return places


def logit_normal(places: Tensor, *, mean: float, scale: float) -> Tensor:
    """1 / (1 + exp(-(m + s · Φ⁻¹(u)))): the logit of a share of the range is normal (Esser et al. 2024, arXiv 2403.03206, section 3.1).

    Through the inverse Φ⁻¹ of the normal distribution function places that lie in bands stay in bands of equal probability.

    Args:
        places: u [B], uniform, 0 to 1.
        mean: m; 0 puts the middle timestep in the middle, more goes towards noise.
        scale: s; 1 in the paper's best setting, less is narrower.
    """
    return torch.sigmoid(mean + scale * torch.special.ndtri(places.double()))


DENSITIES: dict[str, Callable[..., Tensor]] = {"uniform": flat, "logit_normal": logit_normal}


def timesteps(
    batch: int,
    *,
    count: int,
    generator: torch.Generator,
    stratified: bool = True,
    density: str = "uniform",
    low: int = 0,
    high: int | None = None,
    mean: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """Timesteps of a batch: low + ⌊place · (high - low)⌋.

    Args:
        batch: how many.
        count: T, how many timesteps the base has.
        generator: on the CPU.
        stratified: one from each of `batch` bands of equal probability instead of independently.
        density: a key of `DENSITIES`; it is spread over the range.
        low, high: the range, `high` itself excluded; None for T.
        mean, scale: of "logit_normal".

    Returns:
        [batch] int64, low to high - 1.

    Raises:
        UserError: if the range is empty or leaves 0 to T.
    """
    high = count if high is None else high
    if not 0 <= low < high <= count:
        raise UserError(f"Timesteps from {low} to below {high} were asked for; the base has 0 to below {count}, so choose a range in that.")
    places = (stratified_places if stratified else uniform_places)(batch, generator=generator)
    shares = DENSITIES[density](places, mean=mean, scale=scale)
    return low + (shares * (high - low)).long().clamp(max=high - low - 1)  # rounding can make a share 1


def stratified_timesteps(batch: int, *, count: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `batch` equal bands, in random order.

    Returns:
        [batch] int64, 0 to count - 1.
    """
    return timesteps(batch, count=count, generator=generator)


def _per_sample(alphas: Tensor, timesteps: Tensor, latents: Tensor) -> Tensor:
    return alphas.to(latents.device)[timesteps].view(-1, *[1] * (latents.ndim - 1)).to(latents.dtype)
