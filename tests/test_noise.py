"""Noise, targets and loss weights against diffusers' scheduler and the papers' formulas."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdlora import loss, noise
from sdlora.errors import UserError

ALPHAS = noise.alphas({})
TIMESTEPS = torch.tensor([0, 1, 10, 100, 250, 500, 750, 900, 998, 999])


def scheduler() -> diffusers.DDPMScheduler:
    return diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def latents_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(10, 4, 8, 8, generator=generator), torch.randn(10, 4, 8, 8, generator=generator)


def test_the_schedule_is_diffusers() -> None:
    torch.testing.assert_close(ALPHAS, scheduler().alphas_cumprod, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"beta_schedule": "linear"}, {"beta_start": 0.001, "beta_end": 0.02}, {"rescale_betas_zero_snr": True}], ids=str
)
def test_other_schedules_are_diffusers_too(changes: dict[str, Any]) -> None:
    config = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012} | changes
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod
    torch.testing.assert_close(noise.alphas(config)[:-1], theirs[:-1], atol=1e-6, rtol=1e-4)
    assert noise.alphas(config)[-1] == pytest.approx(theirs[-1], abs=1e-7)


def test_an_unknown_schedule_is_an_error() -> None:
    with pytest.raises(UserError, match="'cosine' is unknown"):
        noise.alphas({"beta_schedule": "cosine"})


def test_zero_terminal_snr_is_the_papers_algorithm_and_its_weights_are_those_of_the_rescaled_table() -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    roots = np.sqrt(np.cumprod(1 - betas))  # Lin et al. 2023, algorithm 1, line by line
    first, last = roots[0], roots[-1]
    roots = (roots - last) * (first / (first - last))
    ours = noise.alphas({"rescale_betas_zero_snr": True})
    np.testing.assert_allclose(ours.numpy(), roots**2, atol=1e-6)
    assert ours[-1] == 0
    ratio = loss.snr(ours, TIMESTEPS)
    np.testing.assert_allclose(ratio.numpy(), (roots**2 / (1 - roots**2))[TIMESTEPS.numpy()], rtol=1e-3, atol=1e-7)
    velocity = loss.min_snr_weight(ratio, gamma=5, prediction="v_prediction")
    np.testing.assert_allclose(velocity, np.minimum(ratio, 5) / (ratio + 1), rtol=1e-6)
    assert velocity[-1] == 0  # no signal: the paper's weight
    assert loss.min_snr_weight(ratio, gamma=5, prediction="epsilon")[-1] == 1
    latents, drawn = latents_and_noise()
    noisy = noise.add_noise(latents, drawn, ours, TIMESTEPS)
    assert torch.equal(noisy[-1], drawn[-1])
    assert torch.equal(noise.target(latents, drawn, ours, TIMESTEPS, prediction="v_prediction")[-1], -latents[-1])


def test_noisy_latents_equal_diffusers() -> None:
    latents, drawn = latents_and_noise()
    expected = scheduler().add_noise(latents, drawn, TIMESTEPS)
    torch.testing.assert_close(noise.add_noise(latents, drawn, ALPHAS, TIMESTEPS), expected, atol=1e-5, rtol=1e-5)


def test_targets_equal_diffusers() -> None:
    latents, drawn = latents_and_noise()
    expected = scheduler().get_velocity(latents, drawn, TIMESTEPS)
    ours = noise.target(latents, drawn, ALPHAS, TIMESTEPS, prediction="v_prediction")
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(noise.target(latents, drawn, ALPHAS, TIMESTEPS, prediction="epsilon"), drawn)
    assert torch.equal(noise.target(latents, drawn, ALPHAS, TIMESTEPS, prediction="sample"), latents)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_is_the_papers_formula(gamma: float) -> None:
    ratio = loss.snr(ALPHAS, TIMESTEPS)
    for i, t in enumerate(TIMESTEPS):
        signal = ALPHAS[t].double().item()
        expected = signal / (1 - signal)
        assert ratio[i].item() == pytest.approx(expected, rel=1e-3)
        epsilon = loss.min_snr_weight(ratio, gamma=gamma, prediction="epsilon")[i].item()
        velocity = loss.min_snr_weight(ratio, gamma=gamma, prediction="v_prediction")[i].item()
        assert epsilon == pytest.approx(min(expected, gamma) / expected, rel=1e-3)
        assert velocity == pytest.approx(min(expected, gamma) / (expected + 1), rel=1e-3)


def test_gamma_zero_weighs_all_timesteps_alike() -> None:
    assert loss.min_snr_weight(loss.snr(ALPHAS, TIMESTEPS), gamma=0, prediction="epsilon").tolist() == [1] * 10


def test_stratified_timesteps_hold_one_of_each_band_and_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([noise.stratified_timesteps(8, count=1000, generator=generator) for _ in range(2000)])
    assert (drawn.sort(1).values // 125 == torch.arange(8)).all()
    assert drawn[:, 0].float().mean().item() == pytest.approx(499.5, abs=20)
    assert drawn.min() >= 0
    assert drawn.max() <= 999


def test_squared_error_is_one_number_per_sample_in_fp32() -> None:
    latents, drawn = latents_and_noise()
    error = loss.squared_error(latents.bfloat16(), drawn.bfloat16())
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, ((latents.bfloat16().float() - drawn.bfloat16().float()) ** 2).mean((1, 2, 3)))
