"""What is counted on the `meta` device is what happens on a real one: operations, weights, and bytes kept for the way back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdlora import adapters, base_model, cache, config, counts, excerpt, lora, optimizer, prepare, train
from sdlora import material as materials
from sdlora.base_model import Base
from sdlora.errors import UserError
from sdlora.latents import Latents
from tests.base_fixtures import made as made
from tests.bases import Made

CPU = torch.device("cpu")


def run_config(tiny: Path, pictures: Path, **changes: Any) -> config.Config:
    values = {"base": str(tiny), "data": str(pictures), "kind": "style", "name": "tiny", "steps": 6, "batch": 2, "lora": {"rank": 2}}
    return prepare.linked_run(config.parse(values | changes, where="test")).run


def step_of(run: config.Config, base: Base) -> Callable[[], Tensor]:
    """The run's first batch as a forward pass, on latents of noise where the base has weights."""
    if run.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    data = prepare.material_of(run, materials.find_or_refuse(run).samples, base)
    kind = excerpt.kinds(data, batch=run.batch, seed=run.seed)[0]
    trains_text = "text_encoder" in adapters.add_lora(base, run)
    speech = excerpt.speech_of(base, run, excerpt.wanted(run, data, [kind])[1], chunks=1, ahead=not trains_text)
    seen = excerpt.placeholders(data, base.reduction)
    if base.device.type != "meta":
        seen = {place: Latents(torch.randn(one.mean.shape), torch.rand(one.mean.shape)) for place, one in seen.items()}
    base_model.set_training(base, True)
    steps, alphas = excerpt.ready(base, data, seen, speech), base.alphas
    return lambda: excerpt.loss(run, steps, kind, alphas)


def there(base: Base) -> list[Tensor]:
    return [tensor for part in base.parts.values() for tensor in (*part.parameters(), *part.buffers())]


def counted(run: config.Config, base: Base) -> counts.StepCost:
    step = step_of(run, base)
    return counts.of_step(step, weights=there(base))


@pytest.mark.parametrize("learns_input", [False, True])
def test_the_operations_of_one_linear_with_a_lora_are_those_counted_by_hand(learns_input: bool) -> None:
    rows, wide, out, rank = 5, 24, 40, 3
    model = nn.Sequential(nn.Linear(wide, out)).to("meta")
    lora.add(model, rank=rank, alpha=1, targets=["0"], generator=torch.Generator())
    x = torch.empty(rows, wide, device="meta", requires_grad=learns_input)
    found = counts.of_step(lambda: model(x).sum(), weights=[*model.parameters(), x])
    base, down, up = 2 * rows * wide * out, 2 * rows * wide * rank, 2 * rows * rank * out
    # forward: W x, A x, B (A x); back: both factors' gradients and that of A x, and to the input once more through W and A
    assert found.flops == base + down + up + (down + up + up) + (base + down if learns_input else 0)


def test_attention_counts_as_the_fused_kernels_do_it() -> None:
    batch, heads, length, seen, width = 2, 3, 512, 300, 16
    query, key, value = (torch.empty(batch, heads, n, width, device="meta", requires_grad=True) for n in (length, seen, seen))
    found = counts.of_step(lambda: F.scaled_dot_product_attention(query, key, value).sum(), weights=[query, key, value])
    product = 2 * batch * heads * length * seen * width
    assert found.flops == 2 * product + 5 * product
    pairs = 4 * batch * heads * length * seen
    assert found.saved_bytes < found.peak_bytes < pairs
    assert F.scaled_dot_product_attention(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)).shape == (1, 1, 2, 4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True}, {"lora": {"rank": 2, "text_encoder": True}}, {"lora": {"rank": 2, "dora": True}}],
    ids=["plain", "checkpointing", "text-encoder", "dora"],
)
def test_what_is_counted_is_what_the_cpu_keeps(tiny_base: Path, pictures: Path, changes: dict[str, Any]) -> None:
    run = run_config(tiny_base, pictures, **changes)
    on_paper = counted(run, counts.shell(run.base, dtype=torch.float32))
    real = counted(run, prepare.open_base(run, device=CPU, dtype=torch.float32))
    assert (on_paper.flops, on_paper.saved_bytes) == (real.flops, real.saved_bytes)
    assert on_paper.peak_bytes == real.peak_bytes
    assert 0 < on_paper.saved_bytes < on_paper.peak_bytes


def test_checkpointing_keeps_less_and_computes_more(tiny_base: Path, pictures: Path) -> None:
    plain, saving = (
        counted(run_config(tiny_base, pictures, gradient_checkpointing=saves), counts.shell(str(tiny_base), dtype=torch.float32))
        for saves in (False, True)
    )
    assert saving.saved_bytes < plain.saved_bytes / 2
    assert saving.peak_bytes < plain.peak_bytes
    assert plain.flops < saving.flops < 1.6 * plain.flops


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("form", [0, 1], ids=["folder", "file"])
def test_a_shell_has_the_base_s_own_weights_in_shape_and_takes_a_lora_of_as_many_numbers(
    made: Made, pictures: Path, family: str, form: int
) -> None:
    source = made(family)[form]
    tokenizer = str(made(family)[0] / "tokenizer")
    run = run_config(source, pictures, tokenizer=tokenizer, lora={"rank": 2, "targets": "attn-mlp-conv", "text_encoder": True})
    shell = counts.shell(run.base, dtype=torch.float16, tokenizer=tokenizer)
    base = prepare.open_base(run, device=CPU, dtype=torch.float16)
    assert (shell.family, shell.grain_px, shell.resolution_px, shell.clip_skip) == (
        base.family, base.grain_px, base.resolution_px, base.clip_skip,
    )  # fmt: skip
    assert [(one.shape, one.dtype) for one in there(shell)] == [(one.shape, one.dtype) for one in there(base)]
    for one in (shell, base):
        adapters.add_lora(one, run)
    assert [one.shape for one in adapters.parameters(shell)] == [one.shape for one in adapters.parameters(base)]
    assert counts.weights_bytes(shell.parts.values()) == counts.weights_bytes(base.parts.values())
    assert all(one.is_meta for one in there(shell))


def test_a_shell_needs_no_weights_only_configs(tiny_base: Path, tmp_path: Path) -> None:
    for path in tiny_base.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            (tmp_path / path.relative_to(tiny_base)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(tiny_base)).write_bytes(path.read_bytes())
    assert counts.shell(str(tmp_path), dtype=torch.float32).unet.config == counts.shell(str(tiny_base), dtype=torch.float32).unet.config
    (tmp_path / "unet/config.json").unlink()
    with pytest.raises(UserError, match=r"unet.config.json is missing"):
        counts.shell(str(tmp_path), dtype=torch.float32)


def test_half_the_bits_are_half_the_weights(tiny_base: Path) -> None:
    whole, half = (counts.shell(str(tiny_base), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    places = counts.weights_bytes([*whole.text_encoders]) - 2 * counts.weights_bytes([*half.text_encoders])
    assert counts.weights_bytes([whole.unet]) == 2 * counts.weights_bytes([half.unet])
    assert abs(places) == 77 * 8  # a text encoder's list of positions is of whole numbers in both
    assert counts.weights_bytes([whole.autoencoder]) == counts.weights_bytes([half.autoencoder])


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_trained_weights_weigh_what_the_optimizer_really_keeps(name: str) -> None:
    weights = [nn.Parameter(torch.zeros(16, 640)), nn.Parameter(torch.zeros(640, 16))]
    mover = optimizer.make(name, [(weights, 1e-3)], weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    mover.step()
    state = [value for one in mover.state.values() for value in one.values() if isinstance(value, Tensor)]
    kept = sum(one.numel() * one.element_size() for one in (*weights, *state))
    told = counts.trained_bytes(weights, state=optimizer.OPTIMIZERS[name].state, average=False)
    assert told == pytest.approx(kept, rel=0.01)
    averaged = counts.trained_bytes(weights, state=optimizer.OPTIMIZERS[name].state, average=True)
    assert averaged - told == 4 * sum(one.numel() for one in weights)


def test_the_step_that_is_counted_is_the_run_s_own(tiny_base: Path, pictures: Path) -> None:
    run = run_config(tiny_base, pictures, cache="memory", seed=3)
    base = prepare.open_base(run, device=CPU, dtype=torch.float32)
    data = prepare.material_of(run, materials.find_or_refuse(run).samples, base)
    views = [view for item in data.items for view in item.views]
    made_now = cache.latents(base, views, folder=None, background=run.sizes.background)
    seen = {(i, 0): one for i, one in enumerate(made_now)}
    adapters.add_lora(base, run)
    speech = prepare.listen(base, run, data, trains_text=False, folder=None)
    whole = excerpt.ready(base, data, seen, speech)
    kind = excerpt.kinds(data, batch=run.batch, seed=run.seed)[0]
    places, said = excerpt.wanted(run, data, [kind])
    few = excerpt.placeholders(data, base.reduction) | {place: seen[place] for place in places}
    part = excerpt.ready(base, data, few, excerpt.speech_of(base, run, said, chunks=1, ahead=True))
    batch = train.gather(run, whole, batch_index=kind.index)
    assert batch is not None
    torch.testing.assert_close(
        excerpt.loss(run, part, kind, base.alphas),
        train.loss_of_batch(base, batch, base.alphas, run=run, batch_index=kind.index), rtol=1e-6, atol=0,
    )  # fmt: skip
