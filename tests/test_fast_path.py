"""The short way of a step: it answers and learns what the written-out way does, and takes fewer operations and less memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdlora import adapters, base_files, base_model, config, counts, lora, lora_attention, lora_flat, lora_fused, prepare
from sdlora.lora_adapters import Adapter
from sdlora.lora_fused import Linear

FAMILIES = Path(base_files.__file__).parent / "families"
PEFT = {  # counted with PEFT 0.21 and diffusers 0.42 at batch 1 and rank 16: operations in bf16; activations of fp32 adapters with autocast
    "sd1": {"flops": 1788e9, "launches": 2585, "saved_MiB": 1090},
    "sdxl": {"flops": 14580e9, "launches": 9022, "saved_MiB": 7352},
}
SIDES, WIDTHS, POOLED = {"sd1": 64, "sdxl": 128}, {"sd1": 768, "sdxl": 2048}, 1280


def full_size(family: str) -> UNet2DConditionModel:
    """A UNet of a family without weights, with adapters of rank 16 in its attention, in one tensor."""
    settings = {key: value for key, value in json.loads((FAMILIES / family / "unet/config.json").read_text()).items() if key[0] != "_"}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**settings)
    nn.Module.to(unet, torch.bfloat16)
    lora.add(unet, rank=16, alpha=16, targets=base_model.targets("attn"), generator=torch.Generator())
    return unet.train()


def voices(model: nn.Module) -> list[Adapter]:
    return [adapter for layer in lora.layers(model).values() for adapter in layer.each_adapter()]


def question(family: str) -> dict[str, Any]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    more = {"text_embeds": empty(1, POOLED), "time_ids": empty(1, 6)} if family == "sdxl" else None
    return {
        "sample": empty(1, 4, SIDES[family], SIDES[family]), "timestep": torch.zeros(1, device="meta", dtype=torch.long),
        "encoder_hidden_states": empty(1, 77, WIDTHS[family]), "added_cond_kwargs": more,
    }  # fmt: skip


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_full_size_step_takes_no_more_arithmetic_fewer_launches_and_less_memory_than_peft(family: str) -> None:
    unet, asked, limits = full_size(family), question(family), PEFT[family]
    flat = lora_flat.pack([weight for one in voices(unet) for weight in one.parameters()])
    assert lora_attention.share_inputs(unet) == {"sd1": 32, "sdxl": 140}[family]
    with lora_flat.spread([flat], voices(unet), torch.bfloat16):
        cost = counts.of_step(
            lambda: unet(**asked).sample.float().square().mean(), weights=[*unet.parameters(), *unet.buffers(), flat.whole]
        )
    assert cost.flops == pytest.approx(limits["flops"], rel=0.01)
    assert cost.launches <= 0.80 * limits["launches"]
    assert cost.saved_bytes <= 0.75 * limits["saved_MiB"] * 2**20
    assert flat.whole.grad is not None
    assert flat.whole.grad.shape == flat.whole.shape


class Launches(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += counts.computes(func)
        return func(*args, **(kwargs or {}))


def test_clipping_and_the_optimizer_take_ten_launches_however_many_modules_there_are(tiny_base: Path) -> None:
    values = {"base": str(tiny_base), "data": "x", "kind": "style", "name": "tiny", "lora": {"targets": "attn-mlp-conv", "rank": 2}}
    run = prepare.linked_run(config.parse(values | {"steps": 4, "batch": 1}, where="test")).run
    base = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    adapters.add_lora(base, run)
    trained = adapters.trained(base, run)
    assert len(trained.weights) == 1
    assert len(voices(base.unet)) > 50
    for _ in range(2):  # the first step makes the averages
        trained.weights[0].grad = torch.ones_like(trained.weights[0])
        with Launches() as seen:
            nn.utils.clip_grad_norm_(trained.weights, 1.0)
            trained.mover.step()
    assert seen.count <= 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bases_number_format_is_its_own_whatever_sits_in_it(dtype: torch.dtype, tiny_base: Path) -> None:
    base = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=dtype)
    lora.add(base.unet, rank=2, alpha=1, targets=["*"], generator=torch.Generator())
    assert isinstance(base.unet.conv_in, lora.LoRALayer)  # the first weight of all
    assert {weight.dtype for weight in lora.parameters(base.unet)} == {torch.float32}
    assert base.dtype == base.unet.dtype == dtype
    lora_flat.pack(lora.parameters(base.unet))
    assert base.dtype == dtype


def linears(count: int, *, wide: int, out: int, rank: int) -> list[Linear]:
    torch.manual_seed(0)
    return [
        Linear(
            torch.randn(out + i, wide, dtype=torch.float64), None if i else torch.randn(out, dtype=torch.float64),
            torch.randn(rank + i, wide, dtype=torch.float64, requires_grad=True),
            torch.randn(out + i, rank + i, dtype=torch.float64, requires_grad=True), 0.5 + i,
        )
        for i in range(count)
    ]  # fmt: skip


def written_out(x: Tensor, one: Linear) -> Tensor:
    return nn.functional.linear(x, one.weight, one.bias) + one.scale * (x @ one.down.T @ one.up.T)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("learns_input", [True, False])
def test_the_fused_answers_and_their_gradients_are_those_of_the_formula(count: int, learns_input: bool) -> None:
    some = linears(count, wide=7, out=5, rank=2)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=learns_input)
    weights = [part for one in some for part in (one.down, one.up)] + [x] * learns_input
    fused, plain = lora_fused.answers(x, some), tuple(written_out(x, one) for one in some)
    for here, there in zip(fused, plain, strict=True):
        assert torch.allclose(here, there, rtol=1e-12)
    found, wanted = (torch.autograd.grad(sum(one.sin().sum() for one in made), weights) for made in (fused, plain))
    for here, there in zip(found, wanted, strict=True):
        assert torch.allclose(here, there, rtol=1e-10)


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    (one,) = linears(1, wide=4, out=3, rank=2)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(lora_fused.answers(x, [one])[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def gradients(base: Any, prepared: Callable[[], None], *, checkpointing: bool) -> list[Tensor]:
    """What each adapter's A and B of a tiny UNet learn from one batch."""
    noisy, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, base.unet.config.cross_attention_dim)
    prepared()
    if checkpointing:
        base.unet.enable_gradient_checkpointing()
    base.unet.train()
    base.unet(noisy, torch.tensor([10, 700]), text).sample.square().mean().backward()
    return [weight.grad for one in voices(base.unet) for weight in (one.down, one.up) if weight.grad is not None]


@pytest.mark.parametrize("targets", ["attn", "attn-mlp-conv"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_one_tensor_and_shared_inputs_bring_the_same_gradients(tiny_base: Path, targets: str, checkpointing: bool, dora: bool) -> None:
    def opened() -> Any:
        torch.manual_seed(0)
        base = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
        lora.add(
            base.unet, rank=2, alpha=3, targets=base_model.targets(targets), generator=torch.Generator().manual_seed(1),
            variant=lora.Variant(dora=dora),
        )  # fmt: skip
        for one in voices(base.unet):
            nn.init.normal_(one.up, std=0.1)
        torch.manual_seed(2)
        return base

    base = opened()
    plain = gradients(base, lambda: None, checkpointing=checkpointing)
    base = opened()
    every = voices(base.unet)
    flat = lora_flat.pack([weight for one in every for weight in one.parameters()])
    lora_attention.share_inputs(base.unet)
    with lora_flat.spread([flat], every, torch.float32):
        assert gradients(base, lambda: None, checkpointing=checkpointing) == []
    assert flat.whole.grad is not None
    pieces = {id(part): one for part, one in zip(flat.parts, flat.whole.grad.split([part.numel() for part in flat.parts]), strict=True)}
    found = [pieces[id(weight)].view(weight.shape) for one in every for weight in (one.down, one.up)]
    assert len(found) == len(plain) > 30
    for here, there in zip(found, plain, strict=True):
        assert torch.allclose(here, there, rtol=1e-4, atol=1e-6)


def test_the_parts_are_the_whole_and_stay_so_when_it_moves() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    lora.add(model, rank=2, alpha=1, targets=["0"], generator=torch.Generator().manual_seed(0))
    (adapter,) = voices(model)
    before = [adapter.down.detach().clone(), adapter.up.detach().clone()]
    flat = lora_flat.pack(list(adapter.parameters()))
    assert torch.equal(adapter.down, before[0])
    assert torch.equal(adapter.up, before[1])
    flat.whole.data = flat.whole.data.clone()
    lora_flat.tie(flat)
    with torch.no_grad():
        flat.whole.add_(1)
    assert torch.equal(adapter.down, before[0] + 1)
    assert torch.equal(adapter.up, before[1] + 1)
