"""Noise and targets against diffusers' scheduler and the papers' formulas; kinds of noise and timesteps by what they are used for."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from sdlora import loss, noise
from sdlora.errors import UserError

ALPHAS = noise.alphas({})
TIMESTEPS = torch.tensor([0, 1, 10, 100, 250, 500, 750, 900, 998, 999])


def scheduler() -> diffusers.DDPMScheduler:
    return diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents_and_noise() -> tuple[Tensor, Tensor]:
    generator = seeded()
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
    assert noise.alphas(config)[-1] == pytest.approx(theirs[-1].item(), abs=1e-7)


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
    np.testing.assert_allclose(velocity.numpy(), np.minimum(ratio.numpy(), 5) / (ratio.numpy() + 1), rtol=1e-6)
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


KINDS = {
    "offset": lambda drawn, generator: noise.with_offset(drawn, strength=0.1, generator=generator),
    "pyramid": lambda drawn, generator: noise.pyramid(drawn, discount=0.6, levels=6, generator=generator),
    "perturbed": lambda drawn, generator: noise.perturbed(drawn, strength=0.1, generator=generator),
}
OFF = {
    "offset": lambda drawn, generator: noise.with_offset(drawn, strength=0, generator=generator),
    "pyramid": lambda drawn, generator: noise.pyramid(drawn, discount=0, levels=6, generator=generator),
    "perturbed": lambda drawn, generator: noise.perturbed(drawn, strength=0, generator=generator),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_noise_is_the_generators_alone_and_what_is_off_draws_nothing(kind: str) -> None:
    drawn = latents_and_noise()[1]
    one, again, other = (KINDS[kind](drawn, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    generator = seeded()
    assert OFF[kind](drawn, generator) is drawn
    assert torch.equal(generator.get_state(), seeded().get_state())
    assert KINDS[kind](drawn.bfloat16(), seeded()).dtype == torch.bfloat16


def test_offset_noise_is_one_number_per_sample_and_channel_with_the_stated_variance() -> None:
    drawn = torch.randn(500, 4, 8, 8, generator=seeded())
    added = noise.with_offset(drawn, strength=0.5, generator=seeded(1)) - drawn
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), atol=1e-6, rtol=0)
    one = added[:, :, 0, 0]
    assert one.std().item() == pytest.approx(0.5, rel=0.05)
    assert one.mean().item() == pytest.approx(0, abs=0.05)
    assert abs(torch.corrcoef(one.T)[0, 1].item()) < 0.15  # channels shift on their own


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 5)])
def test_pyramid_noise_has_variance_one_at_every_pixel_and_neighbours_that_agree(height: int, width: int) -> None:
    drawn = torch.randn(4000, 2, height, width, generator=seeded())
    ours = noise.pyramid(drawn, discount=0.8, levels=10, generator=seeded(1))
    assert (ours.var(0) - 1).abs().max() < 0.12  # the variance over 4,000 samples is off by 0.022, so this is 5 deviations
    assert ours.var().item() == pytest.approx(1, abs=0.01)
    assert abs(drawn.var().item() - 1) < 0.01

    def likeness(field: Tensor) -> float:
        return (field[..., :, :-1] * field[..., :, 1:]).mean().item()

    assert abs(likeness(drawn)) < 0.01
    assert likeness(ours) > 0.4
    assert abs((ours[:-1] * ours[1:]).mean().item()) < 0.01  # samples stay independent
    assert abs((ours[:, 0] * ours[:, 1]).mean().item()) < 0.02  # channels too


def test_pyramid_noise_correlates_as_its_formula_says() -> None:
    """Cov at level k is dᵏ up upᵀ dᵏ; taken from torch's own bilinear enlargement of every unit picture, 2 levels of a 4 × 4 field."""
    expected = torch.eye(16)
    for level, side in ((1, 2), (2, 1)):
        units = torch.eye(side * side).view(-1, 1, side, side)
        ups = torch.nn.functional.interpolate(units, size=(4, 4), mode="bilinear").flatten(1)
        expected = expected + 0.7 ** (2 * level) * ups.T @ ups
    expected = expected / torch.outer(expected.diag().sqrt(), expected.diag().sqrt())
    drawn = torch.randn(20000, 1, 4, 4, generator=seeded())
    ours = noise.pyramid(drawn, discount=0.7, levels=9, generator=seeded(1)).flatten(1)
    torch.testing.assert_close(ours.T @ ours / len(ours), expected, atol=0.04, rtol=0)
    fewer = noise.pyramid(drawn, discount=0.7, levels=1, generator=seeded(1)).flatten(1)
    assert (fewer[:, 0] * fewer[:, 15]).mean().abs() < 0.03  # without the second level the corners know nothing of each other


def test_a_sample_keeps_its_pyramid_noise_whatever_else_is_in_the_batch() -> None:
    drawn = latents_and_noise()[1]
    ours = noise.pyramid(drawn, discount=0.8, levels=3, generator=seeded(1))
    loud = torch.cat([drawn[:5], 100 * drawn[5:]])
    assert torch.equal(noise.pyramid(loud, discount=0.8, levels=3, generator=seeded(1))[:5], ours[:5])


def test_input_perturbation_changes_what_goes_in_and_not_what_is_asked() -> None:
    latents, drawn = torch.zeros(2000, 4, 4, 4), torch.randn(2000, 4, 4, 4, generator=seeded())
    t = torch.full((2000,), 700)
    noisy = noise.add_noise(latents, noise.perturbed(drawn, strength=0.3, generator=seeded(1)), ALPHAS, t)
    extra = noisy - noise.add_noise(latents, drawn, ALPHAS, t)
    assert extra.std().item() == pytest.approx(0.3 * (1 - ALPHAS[700]).sqrt().item(), rel=0.02)
    assert abs((extra * drawn).mean().item()) < 0.01  # ξ is not ε
    assert noisy.var().item() == pytest.approx((1 + 0.3**2) * (1 - ALPHAS[700]).item(), rel=0.02)


def batches(size: int, *, rounds: int = 2000, **choice: Any) -> Tensor:
    generator = seeded()
    return torch.stack([noise.timesteps(size, count=1000, generator=generator, **choice) for _ in range(rounds)])


def test_stratified_timesteps_hold_one_of_each_band_and_are_uniform() -> None:
    generator = seeded()
    drawn = torch.stack([noise.stratified_timesteps(8, count=1000, generator=generator) for _ in range(2000)])
    assert (drawn.sort(1).values // 125 == torch.arange(8)).all()
    assert drawn[:, 0].float().mean().item() == pytest.approx(499.5, abs=20)
    assert drawn.min() >= 0
    assert drawn.max() <= 999


def test_stratified_timesteps_are_the_ones_that_earlier_versions_drew() -> None:
    assert noise.stratified_timesteps(4, count=1000, generator=seeded(7)).tolist() == [914, 558, 106, 301]
    assert torch.equal(noise.timesteps(4, count=1000, generator=seeded(7)), noise.stratified_timesteps(4, count=1000, generator=seeded(7)))


def test_stratified_batches_have_steadier_means_than_independent_ones() -> None:
    stratified, independent = batches(8).float().mean(1).std(), batches(8, stratified=False).float().mean(1).std()
    assert independent.item() == pytest.approx(1000 / 12**0.5 / 8**0.5, rel=0.06)
    assert stratified.item() == pytest.approx(1000 / 12**0.5 / 8**1.5, rel=0.06)  # each band is 8 times as narrow


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (-0.6, 0.5), (1.0, 1.5)])
def test_logit_normal_timesteps_follow_the_papers_density(stratified: bool, mean: float, scale: float) -> None:
    drawn = batches(8, density="logit_normal", mean=mean, scale=scale, stratified=stratified).flatten().numpy()
    shares = (np.arange(1000) + 0.5) / 1000
    logits = np.log(shares / (1 - shares))
    density = np.exp(-((logits - mean) ** 2) / 2 / scale**2) / (scale * (2 * np.pi) ** 0.5 * shares * (1 - shares))  # as they write it
    expected = np.cumsum(density) / 1000
    found = np.searchsorted(np.sort(drawn), np.arange(1000), side="right") / len(drawn)
    assert np.abs(found - expected).max() < (0.004 if stratified else 0.015)  # Kolmogorov's bound for 16,000 independent draws: 0.0129


def test_stratified_logit_normal_batches_hold_one_of_each_band_of_equal_probability() -> None:
    drawn = batches(4, density="logit_normal").sort(1).values
    edges = (1000 / (1 + np.exp(-np.array([-0.67449, 0.0, 0.67449])))).astype(int)  # the normal distribution's quartiles
    for band, (low, high) in enumerate(zip([0, *edges], [*edges, 1000], strict=True)):
        assert low <= drawn[:, band].min()
        assert drawn[:, band].max() <= high


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("density", list(noise.DENSITIES))
def test_a_range_holds_for_every_kind_of_draw(stratified: bool, density: str) -> None:
    drawn = batches(8, low=250, high=300, stratified=stratified, density=density, scale=3.0)
    assert set(drawn.unique().tolist()) == set(range(250, 300))
    assert noise.timesteps(3, count=1000, generator=seeded(), low=999, density=density).tolist() == [999] * 3


@pytest.mark.parametrize(("low", "high"), [(500, 500), (-1, 10), (0, 1001), (900, 100)])
def test_a_range_outside_the_bases_timesteps_is_told(low: int, high: int) -> None:
    with pytest.raises(UserError, match=rf"Timesteps from {low} to below {high} .* has 0 to below 1000"):
        noise.timesteps(2, count=1000, generator=seeded(), low=low, high=high)


def test_the_extreme_places_of_a_draw_stay_in_the_range() -> None:
    ends = noise.logit_normal(torch.tensor([0.0, 1.0]), mean=0.0, scale=1.0)
    assert ends.tolist() == [0.0, 1.0]
    for mean, timestep in ((60.0, 299), (-60.0, 250)):  # a logit of 60 is 1 in double precision
        drawn = noise.timesteps(4, count=1000, generator=seeded(), density="logit_normal", mean=mean, low=250, high=300)
        assert drawn.tolist() == [timestep] * 4
