"""Errors and weights against their papers' formulas, worked out in double precision, and against torch."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdlora import loss, noise

ALPHAS = noise.alphas({})
TIMESTEPS = torch.tensor([0, 1, 10, 100, 250, 500, 750, 900, 998, 999])
PREDICTIONS = ("epsilon", "v_prediction", "sample")

# Each paper's own statement: which prediction it speaks of, and its weight as a function of SNR and γ.
PAPERS: dict[str, tuple[str, Callable[[float, float], float]]] = {
    "min_snr": ("sample", lambda ratio, gamma: min(ratio, gamma)),  # Hang et al. 2023
    "soft_min_snr": ("sample", lambda ratio, gamma: 1 / (1 / ratio + 1 / gamma)),  # Crowson et al. 2024, with σ² = 1 / SNR
    "debiased": ("epsilon", lambda ratio, gamma: 1 / math.sqrt(ratio)),  # Yu et al. 2023
}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair() -> tuple[Tensor, Tensor]:
    return drawn(0, 10, 4, 8, 8), drawn(1, 10, 4, 8, 8)


def share_of_clean_error(ratio: float, prediction: str) -> float:
    """The squared error of a prediction per squared error of the x_0 that follows from it, found by moving the answer by 1."""
    signal, alone = math.sqrt(ratio / (1 + ratio)), math.sqrt(1 / (1 + ratio))
    clean_per_answer = {"epsilon": alone / signal, "v_prediction": alone, "sample": 1.0}[prediction]
    return 1 / clean_per_answer**2


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [1.0, 4.0, 5.0, 20.0])
@pytest.mark.parametrize("name", list(PAPERS))
def test_each_weighting_is_its_papers_formula_at_ten_timesteps(name: str, gamma: float, prediction: str) -> None:
    stated_for, formula = PAPERS[name]
    alphas = ALPHAS.double()
    ours = loss.WEIGHTINGS[name](loss.snr(alphas, TIMESTEPS), gamma=gamma, prediction=prediction)
    for t, weight in zip(TIMESTEPS.tolist(), ours.tolist(), strict=True):
        ratio = alphas[t].item() / (1 - alphas[t].item())
        on_clean = formula(ratio, gamma) * share_of_clean_error(ratio, stated_for)
        assert weight == pytest.approx(on_clean / share_of_clean_error(ratio, prediction), rel=1e-9)
    single = loss.WEIGHTINGS[name](loss.snr(ALPHAS, TIMESTEPS), gamma=gamma, prediction=prediction)
    torch.testing.assert_close(single.double(), ours, rtol=1e-4, atol=0)  # 1 - ᾱ of 0.00085 keeps four digits in fp32


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", list(loss.WEIGHTINGS))
def test_weights_are_finite_without_signal_and_without_noise(name: str, prediction: str) -> None:
    ratio = torch.tensor([0.0, 1e-30, 1e30, math.inf])
    weights = loss.WEIGHTINGS[name](ratio, gamma=5.0, prediction=prediction)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    torch.testing.assert_close(weights[[0, 3]], weights[[1, 2]])  # the limits, not something else


def test_gamma_zero_weighs_all_timesteps_alike() -> None:
    ratio = loss.snr(ALPHAS, TIMESTEPS)
    for name in ("none", "min_snr", "soft_min_snr"):
        assert loss.WEIGHTINGS[name](ratio, gamma=0, prediction="epsilon").tolist() == [1] * 10


def test_no_weighting_is_one_whatever_is_predicted() -> None:
    ratio = loss.snr(ALPHAS, TIMESTEPS)
    assert all(loss.no_weight(ratio, gamma=5, prediction=one).tolist() == [1] * 10 for one in PREDICTIONS)


def test_soft_min_snr_stays_below_min_snr_and_halves_it_at_gamma() -> None:
    ratio = torch.tensor([0.01, 4.0, 1000.0])
    soft, hard = (loss.WEIGHTINGS[name](ratio, gamma=4.0, prediction="sample") for name in ("soft_min_snr", "min_snr"))
    assert (soft / hard).tolist() == pytest.approx([1 / (1 + 0.01 / 4), 0.5, 1 / (1 + 4 / 1000)])


@pytest.mark.parametrize("weighting", list(loss.WEIGHTINGS))
def test_a_weighted_loss_asks_the_same_of_x0_whatever_is_predicted(weighting: str) -> None:
    """One wrong x_0, told as ε, as v and as x_0, costs the same; without a weighting it does not."""
    clean, wrong, eps = drawn(0, 10, 4, 4, 4).double(), drawn(1, 10, 4, 4, 4).double(), drawn(2, 10, 4, 4, 4).double()
    alphas = ALPHAS.double()
    signal = alphas[TIMESTEPS].view(-1, 1, 1, 1)
    noisy = noise.add_noise(clean, eps, alphas, TIMESTEPS)
    wrong_eps = (noisy - signal.sqrt() * wrong) / (1 - signal).sqrt()  # the ε that this x_0 implies
    costs = []
    for prediction in PREDICTIONS:
        wanted = noise.target(clean, eps, alphas, TIMESTEPS, prediction=prediction)
        predicted = noise.target(wrong, wrong_eps, alphas, TIMESTEPS, prediction=prediction)
        weight = loss.WEIGHTINGS[weighting](loss.snr(alphas, TIMESTEPS), gamma=5.0, prediction=prediction)
        costs.append(((predicted - wanted) ** 2).flatten(1).mean(1) * weight)
    same = all(torch.allclose(costs[0], cost, rtol=1e-6) for cost in costs)
    assert same == (weighting != "none")


def test_squared_error_is_one_number_per_sample_in_fp32() -> None:
    one, other = pair()
    error = loss.squared_error(one.bfloat16(), other.bfloat16())
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, ((one.bfloat16().float() - other.bfloat16().float()) ** 2).mean((1, 2, 3)))


def test_absolute_error_is_torchs() -> None:
    one, other = pair()
    expected = torch.stack([torch.nn.functional.l1_loss(a, b) for a, b in zip(one, other, strict=True)])
    torch.testing.assert_close(loss.sample_error(one, other, form="l1"), expected)


def test_pseudo_huber_is_the_papers_formula_with_a_delta_per_sample() -> None:
    one, other = pair()
    delta = torch.linspace(0.05, 1, 10)
    ours = loss.sample_error(one, other, form="huber", delta=delta)
    wide = delta.double().view(-1, 1, 1, 1)
    formula = 2 * wide**2 * ((1 + (one.double() - other.double()) ** 2 / wide**2).sqrt() - 1)
    torch.testing.assert_close(ours.double(), formula.mean((1, 2, 3)), rtol=1e-6, atol=0)


def test_pseudo_huber_is_the_squared_error_of_small_and_the_absolute_error_of_large_differences() -> None:
    zero, delta = torch.zeros(1, 1, 2, 2), torch.tensor([0.1])
    small = loss.sample_error(zero + 1e-5, zero, form="huber", delta=delta)
    assert small.item() == pytest.approx(1e-10, rel=1e-5)  # as a difference of roots fp32 would give 0
    large = loss.sample_error(zero + 100, zero, form="huber", delta=delta)
    assert large.item() == pytest.approx(2 * 0.1 * 100, rel=2e-3)
    answer = zero.clone().requires_grad_()
    loss.sample_error(answer, zero, form="huber", delta=delta).sum().backward()
    assert answer.grad is not None
    assert answer.grad.tolist() == zero.tolist()  # no NaN where the answer is right


@pytest.mark.parametrize("form", list(loss.FORMS))
def test_a_mask_leaves_the_rest_out_and_a_small_one_weighs_no_less(form: str) -> None:
    one, other = pair()
    delta, mask = torch.full((10,), 0.1), torch.zeros(10, 1, 8, 8)
    mask[:, :, :2, :3] = 1
    ours = loss.sample_error(one, other, form=form, mask=mask, delta=delta)
    cut = loss.sample_error(one[..., :2, :3], other[..., :2, :3], form=form, delta=delta)
    torch.testing.assert_close(ours, cut)
    half = loss.sample_error(one, other, form=form, mask=mask / 2, delta=delta)
    torch.testing.assert_close(half, ours)
    assert loss.sample_error(one, other, form=form, mask=mask * 0, delta=delta).tolist() == [0] * 10


def test_huber_deltas_are_the_papers_schedules_at_ten_timesteps() -> None:
    sigmas = [math.sqrt((1 - a) / a) for a in ALPHAS[TIMESTEPS].double().tolist()]
    expected = {
        "snr": [0.9 / (1 + sigma) ** 2 + 0.1 for sigma in sigmas],
        "exponential": [math.exp(math.log(0.1) * t / 1000) for t in TIMESTEPS.tolist()],
        "constant": [0.1] * 10,
    }
    assert set(loss.DELTAS) == set(expected)
    for name, values in expected.items():
        assert loss.DELTAS[name](ALPHAS, TIMESTEPS, delta=0.1).tolist() == pytest.approx(values, rel=1e-4)


def test_huber_deltas_hold_where_there_is_no_signal_or_no_noise() -> None:
    assert loss.snr_delta(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), delta=0.1).tolist() == pytest.approx([1, 0.1])
    assert loss.exponential_delta(ALPHAS, torch.tensor([0]), delta=0.1).tolist() == [1]
