"""The LoRA layer: parity with PEFT, exact folding, and models that have nothing to do with diffusion."""

from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from sdlora import lora
from sdlora.errors import UserError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.to_q = nn.Linear(8, 12)
        self.to_out = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(torch.tanh(self.to_q(self.conv(x).flatten(2).transpose(1, 2))))


def fresh(*, rank: int = 4, alpha: float = 2.0, random_up: bool = True) -> Net:
    torch.manual_seed(0)
    net = Net()
    lora.add(net, rank=rank, alpha=alpha, targets=["to_*", "conv"], generator=torch.Generator().manual_seed(1))
    if random_up:
        for layer in lora.layers(net).values():
            for adapter in layer.each_adapter():
                nn.init.normal_(adapter.up, std=0.3)
    return net


def picture() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains() -> None:
    torch.manual_seed(0)
    expected = Net()(picture())
    net = fresh(random_up=False)
    assert torch.equal(net(picture()), expected)
    trainable = {id(p) for p in net.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in lora.parameters(net)}
    assert len(trainable) == 6


def test_down_has_the_stated_deviation() -> None:
    net = nn.Sequential(nn.Linear(4000, 10))
    lora.add(net, rank=8, alpha=8, targets=["0"], generator=torch.Generator().manual_seed(0))
    assert lora.parameters(net)[0].std().item() == pytest.approx(1 / 8, rel=0.02)


def test_outputs_and_gradients_equal_peft() -> None:
    ours = fresh()
    torch.manual_seed(0)
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_out", "conv"]))
    pairs = []
    for name, layer in lora.layers(ours).items():
        wrapped = theirs.base_model.model.get_submodule(name)
        (adapter,) = layer.each_adapter()
        for mine, other in ((adapter.down, wrapped.lora_A["default"].weight), (adapter.up, wrapped.lora_B["default"].weight)):
            other.data.copy_(mine.data)
            pairs.append((mine, other))
    torch.testing.assert_close(ours(picture()), theirs(picture()), atol=1e-6, rtol=0)
    ours(picture()).square().mean().backward()
    theirs(picture()).square().mean().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_answers_the_same_and_unfolding_returns_the_exact_bytes(dtype: torch.dtype) -> None:
    net = fresh()
    for layer in lora.layers(net).values():
        layer.base.to(dtype)
    before = {name: lora.base_weight(layer.base).clone() for name, layer in lora.layers(net).items()}
    unfolded = net(picture().to(dtype))
    for strength in (0.3, -1.0, 1.0):
        lora.set_strength(net, strength)
        lora.fold(net)
    tolerance = 1e-6 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(net(picture().to(dtype)), unfolded, atol=tolerance, rtol=tolerance)
    lora.unfold(net)
    for name, layer in lora.layers(net).items():
        assert torch.equal(lora.base_weight(layer.base), before[name])
    assert torch.equal(net(picture().to(dtype)), unfolded)


def test_strength_zero_is_the_base_exactly_and_strength_scales_the_update() -> None:
    net = nn.Sequential(nn.Linear(6, 7))
    x = torch.randn(3, 6)
    base = net(x)
    lora.add(net, rank=2, alpha=1, targets=["0"], generator=torch.Generator().manual_seed(0))
    nn.init.normal_(lora.parameters(net)[1])
    full = net(x) - base
    lora.set_strength(net, -0.5)
    torch.testing.assert_close(net(x) - base, -0.5 * full)
    lora.set_strength(net, 0)
    assert torch.equal(net(x), base)
    lora.fold(net)
    assert torch.equal(net(x), base)


def test_several_adapters_add_up_each_with_its_own_strength() -> None:
    net = fresh()
    alone = net(picture())
    lora.add(net, rank=2, alpha=2, targets=["to_*"], generator=torch.Generator().manual_seed(5), adapter="second")
    torch.testing.assert_close(net(picture()), alone, atol=1e-6, rtol=0)
    nn.init.normal_(lora.parameters(net, "second")[1])
    both = net(picture())
    assert not torch.allclose(both, alone)
    lora.fold(net)
    torch.testing.assert_close(net(picture()), both, atol=1e-5, rtol=1e-5)
    lora.set_strength(net, 0, "second")
    lora.fold(net)
    torch.testing.assert_close(net(picture()), alone, atol=1e-5, rtol=1e-5)
    lora.remove(net)
    torch.manual_seed(0)
    assert torch.equal(net(picture()), Net()(picture()))


def test_a_bf16_base_keeps_fp32_adapters() -> None:
    net = nn.Sequential(nn.Linear(6, 7)).to(torch.bfloat16)
    lora.add(net, rank=2, alpha=1, targets=["0"], generator=torch.Generator().manual_seed(0))
    answer = net(torch.randn(3, 6, dtype=torch.bfloat16))
    answer.float().sum().backward()
    assert answer.dtype == torch.bfloat16
    assert {p.dtype for p in lora.parameters(net)} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora.parameters(net))


def test_a_pattern_without_match_is_an_error_that_shows_a_real_name() -> None:
    with pytest.raises(UserError, match=r"'attn\*' matches none of the 3 .* such as 'conv'"):
        lora.add(Net(), rank=2, alpha=1, targets=["to_*", "attn*"], generator=torch.Generator())


def tiny_gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def tiny_llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16
        )
    )


def tiny_roberta() -> nn.Module:
    return transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=20
        )
    )


@pytest.mark.parametrize(
    ("build", "targets", "count"),
    [
        (tiny_gpt2, ["*.attn.c_attn", "*.attn.c_proj"], 4),
        (tiny_llama, ["*.self_attn.?_proj"], 8),
        (tiny_roberta, ["*.attention.self.query", "*.attention.self.value"], 4),
    ],
    ids=["gpt2", "llama", "roberta"],
)
def test_any_transformer_learns_and_folds(build: Callable[[], nn.Module], targets: list[str], count: int) -> None:
    torch.manual_seed(0)
    model = build().eval()
    for weight in model.parameters():
        weight.data *= 10 if weight.ndim > 1 else 1  # a fresh transformer's logits are almost flat; these have something to say
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    names = lora.add(model, rank=4, alpha=4, targets=targets, generator=torch.Generator().manual_seed(0))
    assert len(names) == count
    ids, wanted = torch.randint(5, 50, (4, 12)), torch.full((4, 12), 7)
    optimizer = torch.optim.AdamW(lora.parameters(model), lr=0.03)
    losses = []
    for _ in range(40):
        loss = model(input_ids=ids, labels=wanted).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trained = model(input_ids=ids).logits
    lora.fold(model)
    torch.testing.assert_close(model(input_ids=ids).logits, trained, atol=1e-4, rtol=1e-4)
    lora.remove(model)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters())
