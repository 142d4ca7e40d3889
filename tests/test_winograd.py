"""Convolutions after Winograd answer and learn what torch's do, are no farther from the truth, and are asked in training alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sdlora import lora, winograd


def given(channels: int, out: int, height: int, width: int, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """An input, filters and a bias."""
    torch.manual_seed(0)
    some = torch.randn(batch, channels, height, width), torch.randn(out, channels, 3, 3) / (3 * channels**0.5), torch.randn(out)
    return [one.to(dtype) for one in some]


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 10), (14, 6)])
@pytest.mark.parametrize("strip_bytes", [1, 3000, 5 << 20])
def test_answers_and_gradients_are_those_of_a_convolution(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int, strip_bytes: int
) -> None:
    monkeypatch.setattr(winograd, "STRIP_BYTES", strip_bytes)
    x, weight, bias = given(5, 7, height, width)
    x.requires_grad_()
    kept, wanted = winograd.filters(weight), F.conv2d(x, weight, bias, padding=1)
    assert torch.allclose(winograd.convolved(x.detach(), kept, bias), wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(winograd.convolved(x.detach(), kept), F.conv2d(x, weight, padding=1), rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(wanted)
    here, there = (torch.autograd.grad(made, x, gradient)[0] for made in (winograd._Convolve.apply(x, kept, bias), wanted))
    assert torch.allclose(here, there, rtol=1e-12, atol=1e-12)


def test_in_fp32_they_are_no_farther_from_the_truth_than_torchs() -> None:
    x, weight, bias = given(256, 256, 16, 16, dtype=torch.float32)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    found, usual = winograd.convolved(x, winograd.filters(weight), bias), F.conv2d(x, weight, bias, padding=1)
    assert (found - truth).norm() <= 2 * (usual - truth).norm()
    assert (found - truth).norm() <= 1e-6 * truth.norm()


def test_they_multiply_sixteen_times_where_a_convolution_does_36_times() -> None:
    x, weight, bias = given(256, 256, 8, 8, batch=1, dtype=torch.float32)
    kept, counted = winograd.filters(weight), []
    for ask in (lambda: winograd.convolved(x, kept, bias), lambda: F.conv2d(x, weight, bias, padding=1)):
        with FlopCounterMode(display=False) as flops:
            ask()
        counted.append(flops.get_total_flops())
    assert counted[0] * 36 == counted[1] * 16


def model() -> nn.Sequential:
    """One convolution for each reason to be asked in this way or not."""
    wide = winograd.LEAST_CHANNELS
    made = nn.Sequential(
        nn.Conv2d(wide, wide, 3, padding=1), nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.Conv2d(wide, wide, 1),
        nn.Conv2d(wide, wide, 3, padding=1, groups=2), nn.Conv2d(wide, wide // 2, 3, padding=1), nn.Conv2d(wide // 2, wide, 3, padding=1),
        nn.Conv2d(wide, wide, 3, padding=1, padding_mode="reflect"), nn.Conv2d(wide, wide, 3, padding=1, stride=2),
    )  # fmt: skip
    return made.requires_grad_(False)


def test_only_those_are_asked_in_this_way_that_it_suits_and_only_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    real = winograd.convolved
    monkeypatch.setattr(winograd, "convolved", lambda x, *some, **more: asked.append(tuple(x.shape)) or real(x, *some, **more))
    some = model()
    x = torch.randn(1, winograd.LEAST_CHANNELS, 8, 8)
    wanted = some(x)
    assert winograd.use(some) == 2
    assert torch.equal(some.eval()(x), wanted)
    assert not asked
    assert torch.allclose(some.train()(x), wanted, rtol=1e-4, atol=1e-6)
    assert len(asked) == 2
    uneven = torch.randn(1, winograd.LEAST_CHANNELS, 7, 8)
    assert torch.equal(some[0](uneven), F.conv2d(uneven, some[0].weight, some[0].bias, padding=1))
    assert len(asked) == 2


@pytest.mark.parametrize("change", ["bfloat16", "learns", "meta"])
def test_other_weights_are_left_alone(change: str) -> None:
    some = model()
    if change == "learns":
        some.requires_grad_(True)
    else:
        some.to(*(["meta"] if change == "meta" else [torch.bfloat16]))
    assert winograd.use(some) == 0


def test_what_would_keep_much_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "MOST_KEPT_BYTES", 64 * winograd.LEAST_CHANNELS**2 - 1)
    assert winograd.use(model()) == 0


def test_a_lora_beside_such_a_convolution_learns_the_same() -> None:
    learned = []
    for short in (True, False):
        torch.manual_seed(0)
        some = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.SiLU(), nn.Conv2d(256, 256, 3, padding=1)).train()
        lora.add(some, rank=2, alpha=2, targets=["0", "2"], generator=torch.Generator().manual_seed(1))
        for layer in lora.layers(some).values():
            for one in layer.each_adapter():
                nn.init.normal_(one.up)
        assert not short or winograd.use(some) == 2
        some(torch.randn(1, 256, 8, 8, generator=torch.Generator().manual_seed(2))).square().mean().backward()
        learned.append([weight.grad for weight in lora.parameters(some)])
    for here, there in zip(*learned, strict=True):
        assert here is not None
        assert torch.allclose(here, there, rtol=1e-4, atol=1e-6 * float(there.abs().max()))
