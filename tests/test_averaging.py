"""The running average is diffusers', comes and goes without a bit lost, and the norm's limit is the product's."""

import math

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from sdlora import averaging


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(drawn(0, 3, 5)), nn.Parameter(drawn(1, 7)), nn.Parameter(drawn(2, 2, 3, 1, 1))]


@pytest.mark.parametrize("decay", [0.9999, 0.5, 0.0])
def test_the_average_is_diffusers_over_forty_steps(decay: float) -> None:
    ours = weights()
    theirs, average = EMAModel(ours, decay=decay), averaging.start(ours)
    for step in range(1, 41):
        with torch.no_grad():
            for i, weight in enumerate(ours):
                weight.add_(drawn(100 * step + i, *weight.shape))
        theirs.step(ours)
        averaging.update(average, ours, decay=averaging.decay_at(step, decay=decay))
        assert averaging.decay_at(step, decay=decay) == theirs.cur_decay_value
        for one, other in zip(average, theirs.shadow_params, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_average_forgets_where_the_run_began_and_reaches_its_decay() -> None:
    ours = weights()
    average = averaging.start([torch.full_like(weight, 1e6) for weight in ours])
    averaging.update(average, ours, decay=averaging.decay_at(1, decay=0.999))
    assert all(torch.equal(one, weight) for one, weight in zip(average, ours, strict=True))
    decays = [averaging.decay_at(step, decay=0.999) for step in range(1, 10_000)]
    assert decays == sorted(decays)
    assert decays.index(0.999) + 1 == 8991


def test_the_average_is_neither_trained_nor_tied_to_the_weights() -> None:
    ours = weights()
    average = averaging.start(ours)
    before = [one.clone() for one in average]
    with torch.no_grad():
        ours[0].add_(1)
    assert all(torch.equal(one, kept) and not one.requires_grad for one, kept in zip(average, before, strict=True))


def test_swapping_in_and_out_again_loses_no_bit_even_if_something_fails() -> None:
    ours = weights()
    average = [drawn(9 + i, *weight.shape) * 1e-7 for i, weight in enumerate(ours)]
    trained, averaged = [w.detach().clone() for w in ours], [a.clone() for a in average]
    addresses = [w.data_ptr() for w in ours]

    def fails_inside() -> None:
        with averaging.swapped(ours, average):
            assert all(torch.equal(w, a) for w, a in zip(ours, averaged, strict=True))
            assert all(torch.equal(a, w) for a, w in zip(average, trained, strict=True))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails_inside()
    assert all(torch.equal(w, t) for w, t in zip(ours, trained, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(average, averaged, strict=True))
    assert [w.data_ptr() for w in ours] == addresses  # the optimizer and a folded base keep hold of the same memory
    assert all(w.requires_grad for w in ours)


@pytest.mark.parametrize(("down", "up"), [((4, 30), (20, 4)), ((3, 5, 3, 3), (8, 3, 1, 1)), ((1, 6), (9, 1))])
def test_the_norm_is_that_of_the_product(down: tuple[int, ...], up: tuple[int, ...]) -> None:
    a, b = drawn(0, *down), drawn(1, *up)
    product = b.flatten(1).double() @ a.flatten(1).double()
    assert averaging.product_norm(a, b).item() == pytest.approx(product.norm().item(), rel=1e-5)


def test_a_product_above_the_limit_ends_at_it_and_keeps_its_direction() -> None:
    a, b = drawn(0, 4, 30), drawn(1, 20, 4)
    before = 0.5 * b @ a
    told = averaging.limit_norm(a, b, scale=0.5, limit=1.0)
    after = 0.5 * b @ a
    assert told.item() == pytest.approx(before.norm().item(), rel=1e-5)
    assert told > 5
    assert after.norm().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(after, before / before.norm(), rtol=1e-4, atol=1e-6)
    assert (a.norm() / drawn(0, 4, 30).norm()).item() == pytest.approx((b.norm() / drawn(1, 20, 4).norm()).item(), rel=1e-5)


@pytest.mark.parametrize("factor", [0.0, 1e-3])
def test_a_product_below_the_limit_keeps_every_bit(factor: float) -> None:
    a, b = drawn(0, 4, 30), factor * drawn(1, 20, 4)
    kept = a.clone(), b.clone()
    told = averaging.limit_norm(nn.Parameter(a), nn.Parameter(b), scale=0.5, limit=1.0)
    assert math.isfinite(told.item())
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])
