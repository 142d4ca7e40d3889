"""Variants of LoRA in training: each against its paper's formula or PEFT, and as the ordinary update that a file holds of it."""

from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sdlora import deltas, lora
from sdlora.deltas import Full, LowRank, Update
from sdlora.errors import UserError
from sdlora.lora import Adapter, LoRALayer, Variant

VARIANTS = {
    "plain": Variant(),
    "rslora": Variant(rank_stabilised=True),
    "dora": Variant(dora=True),
    "pissa": Variant(init="pissa"),
    "all": Variant(rank_stabilised=True, dora=True, init="pissa"),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(10, 12),
    "conv": lambda: nn.Conv2d(10, 12, 3, stride=2, padding=1, dilation=2),
    "conv1d": lambda: transformers.pytorch_utils.Conv1D(12, 10),
}


def wrapped(build: Callable[[], nn.Module], variant: Variant, *, rank: int = 3, moved: bool = True) -> tuple[LoRALayer, Adapter]:
    """A layer with one adapter, by default somewhere in the middle of its training."""
    torch.manual_seed(0)
    model = nn.Sequential(build())
    lora.add(model, rank=rank, alpha=2, targets=["0"], generator=torch.Generator().manual_seed(1), variant=variant)
    (adapter,) = lora.layers(model)["0"].each_adapter()
    if moved:
        for weight in adapter.parameters():
            weight.data += 0.2 * torch.randn(weight.shape)
    return lora.layers(model)["0"], adapter


def question(base: nn.Module) -> Tensor:
    return torch.randn(4, 10, 9, 9) if isinstance(base, nn.Conv2d) else torch.randn(4, 7, 10)


def with_delta(layer: LoRALayer, adapter: Adapter, x: Tensor) -> Tensor:
    """The base's own operation with W + ΔW, where ΔW is what a file would hold."""
    weight = lora.base_weight(layer.base)
    turn = (lambda one: one.T) if isinstance(layer.base, transformers.pytorch_utils.Conv1D) else (lambda one: one)
    change = deltas.delta(lora.export(adapter), turn(weight))
    assert change is not None
    return functional_call(layer.base, {"weight": weight + turn(change)}, (x,))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_says_what_its_file_says_folded_and_not(module: str, variant: str) -> None:
    layer, adapter = wrapped(MODULES[module], VARIANTS[variant])
    x = question(layer.base)
    expected = with_delta(layer, adapter, x)
    assert not torch.allclose(expected, layer.base(x), atol=0.01)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    adapter.strength = -0.4
    half = layer(x)
    torch.testing.assert_close(half - layer.base(x), -0.4 * (expected - layer.base(x)), atol=1e-5, rtol=1e-5)
    model = nn.Sequential(layer)
    lora.fold(model)
    torch.testing.assert_close(model(x), half, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_adapter_of_any_variant_changes_no_bit(module: str, variant: str) -> None:
    layer, adapter = wrapped(MODULES[module], VARIANTS[variant], moved=False)
    x = question(layer.base)
    assert torch.equal(layer(x), layer.base(x))
    layer(x).square().mean().backward()
    moves = [weight for weight in adapter.parameters() if weight.grad is not None and weight.grad.abs().max() > 0]
    assert len(moves) >= (2 if VARIANTS[variant].dora or VARIANTS[variant].init == "pissa" else 1)


@pytest.mark.parametrize("build", [MODULES["linear"], lambda: nn.Conv2d(10, 12, 3, stride=2, padding=1)], ids=["linear", "conv"])
def test_rank_stabilised_is_pefts(build: Callable[[], nn.Module]) -> None:
    layer, adapter = wrapped(build, VARIANTS["rslora"])
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["0"], use_rslora=True)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(nn.Sequential(build()), config).base_model.model[0]
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = adapter.down.data, adapter.up.data
    x = question(layer.base)
    torch.testing.assert_close(layer(x), theirs(x), atol=1e-5, rtol=1e-5)
    change = lora.export(adapter).change
    assert isinstance(change, LowRank)
    assert change.alpha == pytest.approx(2 * 3**0.5)


def dora_by_the_book(weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    """m · (W + s B A) / ‖W + s B A‖, the norm per input and a constant."""
    whole = weight + scale * torch.einsum("or,r...->o...", up.flatten(1), down)
    return magnitude * whole / whole.detach().transpose(0, 1).flatten(1).norm(dim=1).reshape(magnitude.shape)


@pytest.mark.parametrize("module", ["linear", "conv"])
def test_dora_learns_by_the_papers_gradient(module: str) -> None:
    layer, adapter = wrapped(MODULES[module], VARIANTS["dora"])
    copies = [weight.detach().clone().requires_grad_() for weight in adapter.parameters()]
    assert len(copies) == 3
    assert copies[2].shape == (1, 10) + (1,) * (copies[0].ndim - 2)
    x = question(layer.base)
    weight = dora_by_the_book(lora.base_weight(layer.base), copies[0], copies[1], copies[2], scale=2 / 3)
    expected = functional_call(layer.base, {"weight": weight}, (x,))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    (layer(x) ** 3).mean().backward()
    (expected**3).mean().backward()
    for mine, other in zip(adapter.parameters(), copies, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_a_magnitude_that_moved_by_a_thousandth_is_heard_in_bf16() -> None:
    layer, adapter = wrapped(lambda: nn.Linear(10, 12).bfloat16(), VARIANTS["dora"], moved=False)
    assert adapter.magnitude is not None
    adapter.magnitude.data *= 1.001
    x = torch.randn(50, 10)
    added = adapter.answer(layer.base, x.bfloat16())
    expected = 0.001 * x.bfloat16().float() @ lora.base_weight(layer.base).float().T
    torch.testing.assert_close(added.float(), expected, atol=2e-5, rtol=0.02)


@pytest.mark.parametrize("module", ["linear", "conv"])
def test_pissa_starts_where_pefts_does(module: str) -> None:
    layer, adapter = wrapped(MODULES[module], VARIANTS["pissa"], moved=False)
    torch.manual_seed(0)
    base = MODULES[module]()
    weight = lora.base_weight(base).detach()
    flat = nn.Linear(weight[0].numel(), 12)  # PEFT's is for linears alone; a convolution is one whose inputs are its patches
    flat.weight.data = weight.flatten(1).clone()
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["0"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(nn.Sequential(flat), config).base_model.model[0]
    product = adapter.up.flatten(1) @ adapter.down.flatten(1)
    torch.testing.assert_close(product, theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight, atol=1e-5, rtol=1e-5)
    whole = theirs.base_layer.weight + theirs.get_delta_weight("default")
    torch.testing.assert_close(whole, lora.base_weight(layer.base).flatten(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("module", ["linear", "conv"])
def test_pissa_is_what_b_a_gained_and_a_file_holds_it_as_an_ordinary_lora_of_twice_the_rank(module: str) -> None:
    layer, adapter = wrapped(MODULES[module], VARIANTS["pissa"], moved=False)
    start = adapter.up.detach().flatten(1) @ adapter.down.detach().flatten(1)
    for weight in adapter.parameters():
        weight.data += 1e-3 * torch.randn(weight.shape)
    gained = 2 / 3 * (adapter.up.detach().flatten(1) @ adapter.down.detach().flatten(1) - start)
    update = lora.export(adapter)
    assert isinstance(update.change, LowRank)
    assert (update.change.rank, update.change.alpha) == (6, 4)
    whole = deltas.delta(update, lora.base_weight(layer.base))
    assert whole is not None
    torch.testing.assert_close(whole.flatten(1), gained, atol=1e-6, rtol=1e-4)
    half = deltas.delta(deltas.mapped(update, Tensor.half), lora.base_weight(layer.base))
    assert half is not None
    error = (half.flatten(1) - gained).norm() / gained.norm()
    assert error < 1e-3  # [B, -B₀] and [A; A₀] in fp16 would lose most of a gain this small


def test_pissa_says_where_it_has_too_few_directions() -> None:
    with pytest.raises(UserError, match=r"PiSSA cannot start '0' at rank 11: it has 10 directions"):
        wrapped(MODULES["linear"], VARIANTS["pissa"], rank=11)


DROPOUTS = [Variant(network_dropout=0.3), Variant(rank_dropout=0.3), Variant(module_dropout=0.3)]
NAMES = ["network", "rank", "module"]


@pytest.mark.parametrize("variant", DROPOUTS, ids=NAMES)
@pytest.mark.parametrize("module", ["linear", "conv"])
def test_dropouts_draw_in_training_only_and_the_same_from_the_same_seed(variant: Variant, module: str) -> None:
    layer, _ = wrapped(MODULES[module], variant)
    plain, _ = wrapped(MODULES[module], Variant())
    x = question(layer.base)
    assert torch.equal(layer.eval()(x), plain(x))
    layer.train()

    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [layer(x) for _ in range(6)]

    first = drawn(0)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(0), strict=True))
    assert not all(torch.equal(one, first[0]) for one in first)


@pytest.mark.parametrize("variant", [*DROPOUTS, Variant(init="pissa", rank_dropout=0.3)], ids=[*NAMES, "rank-pissa"])
@pytest.mark.parametrize("module", ["linear", "conv"])
def test_dropouts_leave_out_the_stated_share(variant: Variant, module: str) -> None:
    rounds = 1500
    layer, _ = wrapped(MODULES[module], variant)
    x = question(layer.base)[:1]
    whole = layer.eval()(x).detach() - layer.base(x)
    layer.train()
    torch.manual_seed(3)
    with torch.no_grad():
        said = torch.stack([layer(x) - layer.base(x) for _ in range(rounds)])
    kept = 0.7 if variant.module_dropout else 1.0  # a module that is off is not made up for, numbers and ranks are
    scale = whole.norm()
    assert (said.mean(0) - kept * whole).norm() / scale < 0.06
    silent = (said.flatten(1).norm(dim=1) < 1e-6 * scale).float().mean()
    expected = {"module": 0.3, "rank": 0.3**3}.get("module" if variant.module_dropout else "rank" if variant.rank_dropout else "", 0.0)
    assert silent.item() == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("variant", [Variant(module_dropout=0.999), Variant(module_dropout=0.999, dora=True)], ids=["plain", "dora"])
def test_a_step_in_which_every_module_is_left_out_has_gradients_of_zero(variant: Variant) -> None:
    layer, adapter = wrapped(lambda: nn.Linear(10, 12).bfloat16(), variant)
    x = question(layer.base).bfloat16()
    torch.manual_seed(0)
    said = layer(x)
    assert torch.equal(said, layer.base(x))
    assert said.dtype == torch.bfloat16
    said.float().sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in adapter.parameters())


def test_rank_dropout_takes_whole_ranks_for_all_of_a_batch() -> None:
    layer, adapter = wrapped(MODULES["linear"], Variant(rank_dropout=0.5))
    adapter.up.data.zero_()
    adapter.up.data[:3] = torch.eye(3)  # the first three outputs show one rank each
    x = torch.randn(5, 6, 10)
    with torch.no_grad():
        said = (layer(x) - layer.base(x))[..., :3].abs().amax((0, 1))
        full = (x @ adapter.down.T * adapter.scale).abs().amax((0, 1))
    for one, whole in zip(said.tolist(), full.tolist(), strict=True):
        assert one == pytest.approx(0, abs=1e-6) or one == pytest.approx(2 * whole, rel=1e-4)


def test_rank_dropout_takes_what_a_rank_of_pissa_gained_as_a_whole() -> None:
    layer, adapter = wrapped(MODULES["linear"], Variant(init="pissa", rank_dropout=0.5), rank=2)
    assert adapter.start_up is not None
    assert adapter.start_down is not None
    x = question(layer.base)
    gains = [
        (torch.outer(adapter.up[:, i], adapter.down[i]) - torch.outer(adapter.start_up[:, i], adapter.start_down[i])).detach()
        for i in range(2)
    ]
    possible = [2 * adapter.scale * x @ (a * gains[0] + b * gains[1]).T for a in (0, 1) for b in (0, 1)]
    with torch.no_grad():
        for _ in range(10):
            said = layer(x) - layer.base(x)
            assert min((said - one).abs().max().item() for one in possible) < 1e-5


@pytest.mark.parametrize("variant", DROPOUTS, ids=NAMES)
def test_gradient_checkpointing_draws_the_same_again(variant: Variant) -> None:
    layer, adapter = wrapped(MODULES["linear"], variant)
    x = question(layer.base)
    found = []
    for replayed in (False, True):
        adapter.zero_grad()
        torch.manual_seed(5)
        for _ in range(4):
            (checkpoint(layer, x, use_reentrant=False) if replayed else layer(x)).square().mean().backward()
        assert adapter.down.grad is not None
        found.append(adapter.down.grad.clone())
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1])


def kept_as_update(module: str, variant: Variant, rank: int = 3) -> Update:
    return lora.export(wrapped(MODULES[module], variant, rank=rank)[1])


def going_on(module: str, update: Update, variant: Variant) -> tuple[LoRALayer, Adapter]:
    torch.manual_seed(0)
    model = nn.Sequential(MODULES[module]())
    lora.add(model, rank=8, alpha=8, targets=["0"], generator=torch.Generator(), variant=variant, start_from={"0": update})
    (adapter,) = lora.layers(model)["0"].each_adapter()
    return lora.layers(model)["0"], adapter


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("of", ["plain", "rslora", "pissa"])
def test_training_goes_on_from_an_existing_lora(module: str, variant: str, of: str) -> None:
    before, adapter = wrapped(MODULES[module], VARIANTS[of])
    after, gone_on = going_on(module, lora.export(adapter), VARIANTS[variant])
    x = question(before.base)
    torch.testing.assert_close(after(x), before(x), atol=1e-5, rtol=1e-5)
    assert gone_on.rank == (6 if of == "pissa" else 3)
    assert (gone_on.magnitude is not None) == VARIANTS[variant].dora


def test_training_goes_on_with_the_magnitudes_of_an_existing_dora() -> None:
    before, adapter = wrapped(MODULES["conv"], VARIANTS["dora"])
    after, _ = going_on("conv", lora.export(adapter), VARIANTS["dora"])
    x = question(before.base)
    torch.testing.assert_close(after(x), before(x), atol=1e-5, rtol=1e-5)


def test_training_goes_on_from_linear_factors_on_a_1x1_convolution() -> None:
    down, up = torch.randn(2, 10), torch.randn(12, 2)
    model = nn.Sequential(nn.Conv2d(10, 12, 1))
    start = {"0": Update(LowRank(down, up, 2.0))}
    lora.add(model, rank=8, alpha=8, targets=["0"], generator=torch.Generator(), start_from=start)
    x = torch.randn(1, 10, 3, 3)
    expected = lora.layers(model)["0"].base(x) + torch.einsum("or,rc,bchw->bohw", up, down, x)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("update", "variant", "words"),
    [
        (Update(Full(torch.zeros(12, 10))), Variant(), "more than two factors"),
        (Update(LowRank(torch.zeros(2, 10), torch.zeros(12, 2), 1.0), bias=torch.zeros(12)), Variant(), "more than two factors"),
        (Update(LowRank(torch.zeros(2, 9), torch.zeros(12, 2), 1.0)), Variant(), r"is \[12, 9\] in the file and \[12, 10\] in the base"),
        (kept_as_update("linear", Variant(dora=True)), Variant(), r"magnitudes \[1, 10\]; with dora on"),
        (Update(LowRank(torch.zeros(2, 10), torch.zeros(12, 2), 1.0), torch.ones(12, 1)), Variant(dora=True), r"magnitudes \[12, 1\]"),
    ],
    ids=["full", "bias", "shape", "dora-off", "per-output"],
)
def test_training_does_not_go_on_from_what_it_cannot_keep(update: Update, variant: Variant, words: str) -> None:
    with pytest.raises(UserError, match=rf"^Training cannot go on from the LoRA's module '0': it .*{words}"):
        going_on("linear", update, variant)
