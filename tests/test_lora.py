"""The LoRA layer: parity with PEFT, exact folding, and models that have nothing to do with diffusion."""

from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sdlora import deltas, lora
from sdlora.deltas import Full, Hadamard, Kronecker, LowRank, Update
from sdlora.errors import UserError
from sdlora.lora import Override


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_fold_is_the_pristine_weight_and_all_deltas_rounded_once(dtype: torch.dtype, layout: torch.memory_format) -> None:
    net, strengths = fresh(), {"default": 0.7, "second": -1.3, "third": 0.4}
    for name in ("second", "third"):
        lora.add(net, rank=3, alpha=5, targets=["to_*", "conv"], generator=torch.Generator().manual_seed(6), adapter=name)
        for weight in lora.parameters(net, name)[1::2]:
            nn.init.normal_(weight, std=0.3)
    for layer in lora.layers(net).values():
        layer.base.to(dtype)
    net.conv.base.to(memory_format=layout)  # type: ignore[operator, union-attr]
    pristine = {name: lora.base_weight(layer.base).clone() for name, layer in lora.layers(net).items()}
    lora.fold(net)
    for name, strength in strengths.items():
        lora.set_strength(net, strength, name)
    lora.fold(net)
    for name, layer in lora.layers(net).items():
        exact = pristine[name].double()
        for voice, strength in strengths.items():
            change = deltas.delta(lora.export(layer.voice(voice)), pristine[name])
            assert change is not None
            exact = exact + change.double() * strength
        found, spacing = lora.base_weight(layer.base).double(), torch.finfo(dtype).eps * exact.abs().clamp_min(1e-3)
        assert bool(((found - exact).abs() <= 0.5 * spacing + 1e-6).all())
        assert layer.pristine is not None
        assert torch.equal(layer.pristine, pristine[name])
    lora.remove(net)
    assert all(torch.equal(lora.base_weight(net.get_submodule(name)), weight) for name, weight in pristine.items())


def test_another_strength_is_one_product_per_layer_and_what_a_first_fold_gives() -> None:
    net, other = fresh(), fresh()
    lora.fold(net)
    lora.set_strength(net, 0.4)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        lora.fold(net)
    counted = {event.key: event.count for event in seen.key_averages()}
    assert counted["aten::addmm"] == len(lora.layers(net)) == 3
    assert counted.get("aten::mm", 0) == counted.get("aten::add", 0) == 0
    lora.set_strength(other, 0.4)
    lora.fold(other)
    for name, layer in lora.layers(net).items():
        assert torch.equal(lora.base_weight(layer.base), lora.base_weight(lora.layers(other)[name].base))


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


class Mixed(nn.Module):
    """Every kind of module that a file can change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.group = nn.GroupNorm(2, 8)
        self.layer = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 6)
        self.turned = transformers.pytorch_utils.Conv1D(4, 6)
        self.bare = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bare(self.turned(self.linear(self.layer(self.group(self.conv(x)).flatten(2).transpose(1, 2)))))


def draw(*shape: int) -> Tensor:
    return 0.5 * torch.randn(*shape)


def updates_of_all_forms() -> dict[str, Update]:
    return {
        "conv": Update(LowRank(draw(2, 3, 1, 1), draw(8, 2, 1, 1), 1.0, draw(2, 2, 3, 3)), draw(1, 3, 1, 1).abs(), draw(8)),
        "group": Update(Full(draw(8)), bias=draw(8)),
        "layer": Update(Full(draw(8))),
        "linear": Update(Hadamard(draw(6, 2), draw(2, 8), draw(6, 2), draw(2, 8), 1.0), draw(6, 1).abs()),
        "turned": Update(Kronecker(draw(2, 3), draw(2, 2), 1.0), draw(1, 6).abs(), draw(4)),
        "bare": Update(Full(draw(4, 4))),
    }


def mixed() -> tuple[Mixed, dict[str, Update]]:
    torch.manual_seed(4)
    return Mixed().requires_grad_(False), updates_of_all_forms()


def test_updates_of_every_form_answer_as_weights_and_biases_with_their_deltas() -> None:
    net, updates = mixed()
    plain = Mixed()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        for name, update in updates.items():
            module = plain.get_submodule(name)
            weight = lora.base_weight(module)
            view = weight.T if name == "turned" else weight
            change = deltas.delta(update, view)
            assert change is not None
            view += 0.6 * change
            if update.bias is not None:
                module.bias += 0.6 * update.bias  # type: ignore[operator]
    for name, update in updates.items():
        lora.attach(net, name, update, adapter="file")
    lora.set_strength(net, 0.6, "file")
    torch.testing.assert_close(net(picture()), plain(picture()), atol=1e-5, rtol=1e-5)
    lora.fold(net)
    torch.testing.assert_close(net(picture()), plain(picture()), atol=1e-5, rtol=1e-5)
    for name in updates:
        weight = lora.base_weight(net.get_submodule(name).base)  # type: ignore[arg-type]
        torch.testing.assert_close(weight, lora.base_weight(plain.get_submodule(name)), atol=1e-6, rtol=1e-6)
    assert lora.exports(net, "file") == updates
    assert lora.parameters(net, "file") == []


def test_folding_and_unfolding_updates_of_every_form_returns_the_exact_bytes_of_weights_and_biases() -> None:
    net, updates = mixed()
    net.bfloat16()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for name, update in updates.items():
        lora.attach(net, name, update, adapter="file")
    for strength in (1.0, -2.0, 0.3):
        lora.set_strength(net, strength, "file")
        lora.fold(net)
    lora.silence(net)
    lora.fold(net)
    lora.remove(net)
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_fixed_update_and_one_in_training_share_a_layer() -> None:
    net, updates = mixed()
    lora.attach(net, "linear", updates["linear"], adapter="file")
    lora.attach(net, "group", updates["group"], adapter="file")
    fixed = net(picture())
    names = lora.add(net, rank=2, alpha=2, targets=["*"], generator=torch.Generator().manual_seed(0))
    assert names == ["conv", "linear", "turned", "bare"]  # norms have no low rank
    assert torch.equal(net(picture()), fixed)
    net(picture()).square().sum().backward()
    assert all(weight.grad is not None for weight in lora.parameters(net))
    nn.init.normal_(lora.parameters(net)[3])
    both = net(picture())
    assert not torch.allclose(both, fixed)
    lora.fold(net)
    torch.testing.assert_close(net(picture()), both, atol=1e-5, rtol=1e-5)


def test_places_with_norms_are_all_that_a_file_may_change() -> None:
    net, updates = mixed()
    assert lora.places(net) == ["conv", "linear", "turned", "bare"]
    everything = ["conv", "group", "layer", "linear", "turned", "bare"]
    assert lora.places(net, norms=True) == everything
    for name, update in updates.items():
        lora.attach(net, name, update, adapter="file")
    assert lora.places(net) == ["conv", "linear", "turned", "bare"]
    assert lora.places(net, norms=True) == everything


def test_fixed_updates_follow_the_model_to_another_device_and_keep_their_precision_there() -> None:
    net, updates = mixed()
    lora.attach(net, "conv", deltas.mapped(updates["conv"], Tensor.half), adapter="file")
    net.to("meta")
    moved = deltas.tensors(lora.exports(net, "file")["conv"])
    assert {(one.device.type, one.dtype) for one in moved} == {("meta", torch.float16)}
    assert len(moved) == 5


@pytest.mark.parametrize(
    ("name", "update", "words"),
    [
        ("linear", Update(Full(torch.zeros(6, 9))), r"LoRA module 'linear' is \[6, 9\] in the file and \[6, 8\] in the base\."),
        ("turned", Update(Full(torch.zeros(6, 4))), r"LoRA module 'turned' is \[6, 4\] in the file and \[4, 6\] in the base\."),
        ("bare", Update(None, bias=torch.zeros(4)), r"LoRA module 'bare' has a bias of \[4\] in the file and none in the base\."),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_model_alone(name: str, update: Update, words: str) -> None:
    net, _ = mixed()
    with pytest.raises(UserError, match=words):
        lora.attach(net, name, update, adapter="file")
    assert lora.layers(net) == {}


def test_embeddings_and_norms_without_weights_are_refused() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4, elementwise_affine=False))
    assert lora.places(net, norms=True) == []
    for name, kind in (("0", "Embedding"), ("1", "LayerNorm")):
        assert kind in (lora.misfit(net, name, Update(Full(torch.zeros(4)))) or "")


def test_of_the_overrides_that_match_the_last_counts_for_rank_and_alpha_apart() -> None:
    overrides = [Override("to_*", rank=2), Override("*_q", alpha=5.0), Override("to_out", rank=1, alpha=3.0)]
    found = {name: lora.rank_and_alpha(name, rank=4, alpha=8.0, overrides=overrides) for name in ("conv", "to_q", "to_out")}
    assert found == {"conv": (4, 8.0), "to_q": (2, 5.0), "to_out": (1, 3.0)}
    net = Net()
    lora.add(net, rank=4, alpha=8, targets=["*"], generator=torch.Generator(), overrides=overrides)
    adapters = {name: next(layer.each_adapter()) for name, layer in lora.layers(net).items()}
    assert {name: (one.rank, one.alpha) for name, one in adapters.items()} == found


def test_nothing_that_was_asked_for_is_left_out_silently() -> None:
    with pytest.raises(UserError, match=r"LoRA override 'conv' matches none of the 2 modules to train, such as 'to_q'"):
        lora.add(Net(), rank=4, alpha=8, targets=["to_*"], generator=torch.Generator(), overrides=[Override("conv", rank=1)])
    start = {"conv": Update(LowRank(torch.zeros(1, 3, 3, 3), torch.zeros(8, 1, 1, 1), 1.0))}
    with pytest.raises(UserError, match=r"1 of the 1 modules of the LoRA to go on from, such as 'conv', are not among the 2 to train"):
        lora.add(Net(), rank=4, alpha=8, targets=["to_*"], generator=torch.Generator(), start_from=start)


def test_only_modules_of_the_lora_to_go_on_from_begin_with_it() -> None:
    start = {"to_q": Update(LowRank(torch.ones(2, 8), torch.ones(12, 2), 6.0))}
    net = Net()
    lora.add(net, rank=4, alpha=8, targets=["to_*"], generator=torch.Generator(), start_from=start, overrides=[Override("*", rank=3)])
    written = {name: update.change for name, update in lora.exports(net).items()}
    assert {name: (one.rank, one.alpha) for name, one in written.items() if isinstance(one, LowRank)} == {"to_q": (2, 6), "to_out": (3, 8)}
    nn.init.zeros_(lora.parameters(net)[0])
    assert start["to_q"].change.down.all()  # type: ignore[union-attr]


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
