"""From stored factors to ΔW: every form against LyCORIS's own functions or PEFT's layers, and what does not fit is said in words."""

import re
from collections.abc import Callable

import peft
import pytest
import torch
from lycoris.functional import general, locon, loha, lokr
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from sdlora import deltas
from sdlora.deltas import Full, Hadamard, Kronecker, LowRank, Update

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear() -> Tensor:
    return random(12, 10)


def conv() -> Tensor:
    return random(12, 10, 3, 3)


def of(change: LowRank | Hadamard | Kronecker | Full, weight: Tensor) -> Tensor:
    found = deltas.delta(Update(change), weight)
    assert found is not None
    assert found.shape == weight.shape
    assert found.dtype == torch.float32
    return found


def test_low_rank_is_lycoris_on_linears_convolutions_and_with_a_core() -> None:
    for down, up, core, weight in (
        (random(4, 10), random(12, 4), None, linear()),
        (random(4, 10, 3, 3), random(12, 4, 1, 1), None, conv()),
        (random(4, 10, 1, 1), random(12, 4, 1, 1), random(4, 4, 3, 3), conv()),
    ):
        expected = locon.diff_weight(down, up, core, gamma=3 / 4, backend="torch")
        torch.testing.assert_close(of(LowRank(down, up, 3.0, core), weight), expected.reshape(weight.shape), **CLOSE)


def test_hadamard_is_lycoris_on_linears_convolutions_and_with_cores() -> None:
    for ups, downs, cores, weight in (
        ((random(12, 4), random(12, 4) + 1), (random(4, 10), random(4, 10) + 1), (None, None), linear()),
        ((random(12, 4), random(12, 4) + 1), (random(4, 90), random(4, 90) + 1), (None, None), conv()),
        ((random(4, 12), random(4, 12) + 1), (random(4, 10), random(4, 10) + 1), (random(4, 4, 3, 3), random(4, 4, 3, 3) + 1), conv()),
    ):
        scale = torch.tensor(3 / 4)
        expected = loha.diff_weight(downs[0], ups[0], downs[1], ups[1], *cores, gamma=scale, backend="torch")
        change = Hadamard(ups[0], downs[0], ups[1], downs[1], 3.0, *cores)
        torch.testing.assert_close(of(change, weight), expected.reshape(weight.shape), **CLOSE)


def randomised(layer: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, weight in layer.named_parameters():
        if "base_layer" not in name:
            weight.data = torch.randn(weight.shape, generator=generator)


DIRECT1, PAIR1 = random(3, 2), (random(3, 2), random(2, 2))
LINEAR2, CONV2 = random(4, 5), random(4, 5, 3, 3)
PAIR2, CONV_PAIR2, FLAT_PAIR2 = (random(4, 2), random(2, 5)), (random(4, 2), random(2, 5, 3, 3)), (random(4, 2), random(2, 45))
CORED2, CORE = (random(2, 4), random(2, 5)), random(2, 2, 3, 3)


@pytest.mark.parametrize("first", [DIRECT1, PAIR1], ids=["direct", "pair"])
@pytest.mark.parametrize(
    ("second", "core", "weight"),
    [(LINEAR2, None, linear), (PAIR2, None, linear), (CONV2, None, conv), (CONV_PAIR2, None, conv), (CORED2, CORE, conv)],
    ids=["linear-direct", "linear-pair", "conv-direct", "conv-pair", "conv-core"],
)
def test_kronecker_is_lycoris_in_every_combination(
    first: Tensor | tuple[Tensor, Tensor], second: Tensor | tuple[Tensor, Tensor], core: Tensor | None, weight: Callable[[], Tensor]
) -> None:
    w1, (w1a, w1b) = (None, first) if isinstance(first, tuple) else (first, (None, None))
    w2, (w2a, w2b) = (None, second) if isinstance(second, tuple) else (second, (None, None))
    scale = 3 / 2 if isinstance(first, tuple) or isinstance(second, tuple) else 1  # both of the pairs have rank 2
    w1 = w1 if w1 is not None else w1a @ w1b
    if w2 is None:
        w2 = general.rebuild_tucker(core, w2a, w2b) if core is not None else (w2a @ w2b.flatten(1)).reshape(4, 5, *w2b.shape[2:])
    expected = lokr.make_kron(w1, w2, scale)
    torch.testing.assert_close(of(Kronecker(first, second, 3.0, core), weight()), expected, **CLOSE)


@pytest.mark.parametrize("base", [nn.Linear(60, 48), nn.Conv2d(60, 48, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize(("rank", "both"), [(1, True), (3, False), (100, False)], ids=["pairs", "direct-pair", "direct"])
def test_kronecker_has_the_scale_of_lycoris_modules(base: nn.Module, rank: int, both: bool) -> None:
    theirs = LokrModule("", base, lora_dim=rank, alpha=5, decompose_both=both, use_scalar=False)
    randomised(theirs)
    kept = {name: value.detach() for name, value in theirs.custom_state_dict().items()}
    factors = [kept[name] if name in kept else (kept[f"{name}_a"], kept[f"{name}_b"]) for name in ("lokr_w1", "lokr_w2")]
    assert [isinstance(factor, tuple) for factor in factors] == [both, rank < 100]
    alpha = 5.0  # the file of two direct factors says alpha = rank; whatever it says is not used
    torch.testing.assert_close(of(Kronecker(factors[0], factors[1], alpha), base.weight), theirs.get_weight(theirs.shape), **CLOSE)


def test_kronecker_reads_the_flat_factors_that_lycoris_writes_for_convolutions() -> None:
    flat = of(Kronecker(DIRECT1, FLAT_PAIR2, 3.0), conv())
    whole = of(Kronecker(DIRECT1, (FLAT_PAIR2[0], FLAT_PAIR2[1].reshape(2, 5, 3, 3)), 3.0), conv())
    assert torch.equal(flat, whole)


@pytest.mark.parametrize("base", [nn.Linear(10, 12), nn.Conv2d(10, 12, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("effective", [False, True])
def test_hadamard_and_kronecker_are_pefts(base: nn.Module, effective: bool) -> None:
    loha_layer = peft.get_peft_model(
        nn.Sequential(base), peft.LoHaConfig(r=4, alpha=3, target_modules=["0"], use_effective_conv2d=effective)
    ).base_model.model[0]
    randomised(loha_layer)
    one = {name: getattr(loha_layer, name)["default"] for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    cores = [getattr(loha_layer, name).get("default") for name in ("hada_t1", "hada_t2")]
    assert (cores[0] is not None) == (effective and isinstance(base, nn.Conv2d))
    ours = of(Hadamard(*one.values(), 3.0, *cores), base.weight)
    torch.testing.assert_close(ours, loha_layer.get_delta_weight("default"), atol=1e-4, rtol=1e-5)

    lokr_layer = peft.get_peft_model(
        nn.Sequential(base), peft.LoKrConfig(r=1, alpha=3, target_modules=["0"], use_effective_conv2d=effective, decompose_both=True)
    ).base_model.model[0]
    randomised(lokr_layer)
    names = ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
    w1a, w1b, w2a, w2b = (getattr(lokr_layer, name)["default"] for name in names)
    core = lokr_layer.lokr_t2.get("default")
    ours = of(Kronecker((w1a, w1b), (w2a, w2b), 3.0, core), base.weight)
    torch.testing.assert_close(ours, lokr_layer.get_delta_weight("default"), atol=1e-4, rtol=1e-5)


def low_rank(weight: Tensor) -> LowRank:
    return LowRank(random(4, *weight.shape[1:]), random(12, 4, *[1] * (weight.ndim - 2)), 3.0)


@pytest.mark.parametrize("weight", [linear(), conv()], ids=["linear", "conv"])
@pytest.mark.parametrize("per_output", [False, True])
def test_dora_is_lycoris_on_both_axes(weight: Tensor, per_output: bool) -> None:
    count = [12, 1] if per_output else [1, 10]
    magnitude = random(*count, *[1] * (weight.ndim - 2)).abs() + 0.5
    plain = of(low_rank(weight), weight)
    expected = general.weight_decompose(weight + plain, magnitude, 1, per_output, backend="torch")
    ours = deltas.delta(Update(low_rank(weight), magnitude), weight)
    assert ours is not None
    torch.testing.assert_close(weight + ours, expected, **CLOSE)
    norm = deltas.norms(weight + ours, per_input=not per_output)
    torch.testing.assert_close(norm, magnitude, **CLOSE)


@pytest.mark.parametrize("base", [nn.Linear(10, 12), nn.Conv2d(10, 12, 3)], ids=["linear", "conv"])
def test_dora_per_output_is_pefts(base: nn.Module) -> None:
    weight = base.weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    down, up = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    magnitude = theirs.lora_magnitude_vector["default"].weight
    up.data, magnitude.data = random(*up.shape), random(*magnitude.shape).abs() + 0.5
    theirs.merge()
    per_output = magnitude.detach().reshape(12, 1, *[1] * (weight.ndim - 2))  # PEFT keeps [out], or [1, out, 1, 1]
    ours = deltas.delta(Update(LowRank(down.detach(), up.detach(), 3.0), per_output), weight)
    assert ours is not None
    torch.testing.assert_close(weight + ours, theirs.base_layer.weight.detach(), **CLOSE)


def test_an_input_that_the_base_does_not_read_stays_silent_under_dora() -> None:
    weight = linear()
    weight[:, 3] = 0
    change = LowRank(torch.zeros(1, 10), torch.zeros(12, 1), 1.0)
    ours = deltas.delta(Update(change, torch.full((1, 10), 50.0)), weight)
    assert ours is not None
    assert (ours[:, 3] == 0).all()
    assert ours.isfinite().all()


def test_linear_factors_fit_a_1x1_convolution_and_the_reverse() -> None:
    flat, point = random(12, 10), random(12, 10, 1, 1)
    magnitude = random(1, 10).abs()
    down, up = random(4, 10), random(12, 4)
    on_conv = Update(LowRank(down, up, 2.0), magnitude)
    on_linear = Update(LowRank(down[..., None, None], up[..., None, None], 2.0), magnitude[..., None, None])
    expected = deltas.delta(Update(LowRank(down, up, 2.0), magnitude), flat)
    assert expected is not None
    for update, weight in ((on_conv, flat.reshape(point.shape)), (on_linear, flat)):
        assert deltas.misfit(update, weight, bias=None) is None
        found = deltas.delta(update, weight)
        assert found is not None
        assert torch.equal(found.flatten(), expected.flatten())


def test_full_deltas_and_biases() -> None:
    assert torch.equal(of(Full(random(12, 10, 1, 1).half()), linear()), random(12, 10, 1, 1).half().float().reshape(12, 10))
    assert torch.equal(of(Full(random(12)), torch.ones(12)), random(12))
    assert deltas.delta(Update(None, bias=random(12)), linear()) is None


def test_a_file_in_fp16_and_a_base_in_bf16_meet_in_fp32() -> None:
    change, weight = low_rank(linear()), linear()
    expected = of(deltas.mapped(change, Tensor.half), weight)
    assert torch.equal(of(deltas.mapped(change, Tensor.half), weight.bfloat16()), expected)
    torch.testing.assert_close(expected, of(change, weight), atol=0.02, rtol=0.002)


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (Update(LowRank(random(4, 9), random(12, 4), 1.0)), r"is \[12, 9\] in the file and \[12, 10\] in the base"),
        (Update(LowRank(random(4, 10, 3, 3), random(12, 4, 1, 1), 1.0)), r"is \[12, 10, 3, 3\] in the file and \[12, 10\] in the base"),
        (Update(LowRank(random(4, 5, 2, 1), random(12, 4), 1.0)), r"is \[12, 5, 2, 1\] in the file and \[12, 10\] in the base"),
        (Update(LowRank(random(8, 10), random(12, 4), 1.0)), r"has factors that do not fit each other: \[8, 10\], \[12, 4\]"),
        (
            Update(LowRank(random(4, 10, 1, 1), random(12, 4, 1, 1), 1.0, random(4, 1, 1, 1))),
            r"do not fit each other: .*\[4, 1, 1, 1\]",
        ),
        (
            Update(Hadamard(random(12, 4), random(4, 10), random(1, 4), random(4, 10), 1.0)),
            r"do not fit each other: .*\[1, 4\]",
        ),
        (Update(Kronecker(random(3, 2), random(4, 6), 1.0)), r"is \[12, 12\] in the file and \[12, 10\] in the base"),
        (Update(Kronecker(random(3), random(4, 5), 1.0)), r"do not fit each other: \[3\], \[4, 5\]"),
        (Update(Full(random(10, 12))), r"is \[10, 12\] in the file and \[12, 10\] in the base"),
        (Update(None, random(1, 12)), r"DoRA magnitudes of \[1, 12\] in the file, and \[1, 10\] or \[12, 1\] fits the base"),
        (Update(None, random(12)), r"DoRA magnitudes of \[12\]"),
        (Update(None, bias=random(10)), r"has a bias of \[10\] in the file and one of \[12\] in the base"),
    ],
)
def test_what_does_not_fit_is_said_in_words(update: Update, words: str) -> None:
    found = deltas.misfit(update, linear(), bias=torch.zeros(12))
    assert found is not None
    assert re.search(words, found), found


def test_what_fits_has_no_misfit() -> None:
    for change in (low_rank(linear()), Kronecker(DIRECT1, LINEAR2, 1.0), Full(linear())):
        assert deltas.misfit(Update(change, random(12, 1), random(12)), linear(), bias=torch.zeros(12)) is None
    assert deltas.misfit(Update(None, bias=random(12)), linear(), bias=None) == "has a bias of [12] in the file and none in the base"


def test_mapped_reaches_every_tensor_of_every_form() -> None:
    cored = Kronecker(PAIR1, CORED2, 1.0, CORE)
    update = Update(cored, random(1, 10), random(12))
    moved = deltas.mapped(update, lambda one: one.to("meta"))
    assert len(deltas.tensors(update)) == 7
    assert [one.shape for one in deltas.tensors(moved)] == [one.shape for one in deltas.tensors(update)]
    assert {one.device.type for one in deltas.tensors(moved)} == {"meta"}
