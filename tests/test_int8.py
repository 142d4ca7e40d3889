"""Frozen linears in 8 bits: how far they round, what they answer and keep, and that a LoRA trained beside them is a LoRA like any other."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sdlora import base_files, base_model, checkpoint, counts, int8, lora, lora_file, plan, text, train
from sdlora.deltas import LowRank, Update
from sdlora.int8 import Int8Linear
from sdlora.lora import Variant
from tests.test_plan import run_config as planned_config
from tests.test_train import run_config

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_equals_torchs_own_per_row() -> None:
    weight = normal(7, 40) * torch.logspace(-6, 4, 7)[:, None]
    codes, steps = int8.rounded(weight)
    zeros = torch.zeros(7, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(weight, steps.flatten(), zeros, 0, -127, 127)
    assert torch.equal(int8.whole(codes, steps, torch.float32), theirs)
    assert codes.abs().amax(dim=1).tolist() == [127] * 7


def test_no_number_is_off_by_more_than_half_a_step_and_zeros_stay() -> None:
    weight = torch.cat([normal(5, 64), torch.zeros(1, 64)])
    codes, steps = int8.rounded(weight)
    off = (int8.whole(codes, steps, torch.float32) - weight).abs()
    assert (off <= steps * 0.5001).all()
    assert torch.equal(int8.whole(codes, steps, torch.float32)[5], torch.zeros(64))


def test_a_step_is_multiplied_in_fp32_and_rounded_once() -> None:
    codes, steps = int8.rounded(normal(8, 32))
    exact = int8.whole(codes, steps, torch.float32)
    assert torch.equal(int8.whole(codes, steps, torch.bfloat16), exact.bfloat16())
    assert torch.equal(int8.whole(codes, steps, torch.float16), exact.half())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.to_q = nn.Linear(24, 16, bias=False)
        self.to_k = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        query, key = lora.together(x, [self.to_q, self.to_k])
        return query * key


def pair(variant: Variant) -> tuple[Net, Net]:
    """A net in 8 bits, and one with the same rounded weights whole; each with the same LoRA."""
    torch.manual_seed(0)
    small, usual = Net(), Net()
    assert int8.shrink(small) == 3
    with torch.no_grad():
        for name in ("first", "to_q", "to_k"):
            one, other = small.get_submodule(name), usual.get_submodule(name)
            assert isinstance(one, Int8Linear)
            assert isinstance(other, nn.Linear)
            other.weight.copy_(one.weight)
            if one.bias is not None:
                other.bias.copy_(one.bias)
    for net in (small, usual):
        lora.add(net, rank=4, alpha=2.0, targets=["*"], generator=torch.Generator().manual_seed(1), variant=variant)
        for i, weight in enumerate(lora.parameters(net)):
            with torch.no_grad():
                weight += 0.1 * normal(*weight.shape, seed=i)
    return small, usual


@pytest.mark.parametrize(
    "variant",
    [Variant(), Variant(dora=True), Variant(init="pissa"), Variant(network_dropout=0.5)],
    ids=["plain", "dora", "pissa", "dropout"],
)
def test_answers_and_gradients_are_those_of_the_rounded_weights(variant: Variant) -> None:
    x, found = normal(3, 5, 12, seed=3).requires_grad_(), []
    for net in pair(variant):
        torch.manual_seed(5)  # of dropout
        answer = net(x)
        found.append([answer, *torch.autograd.grad((answer * normal(3, 5, 16)).sum(), [x, *lora.parameters(net)])])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapted", [True, False])
def test_the_whole_weight_is_not_kept_for_the_way_back(adapted: bool) -> None:
    net = nn.Sequential(nn.Linear(8, 512), nn.Linear(512, 512), nn.Linear(512, 512))
    int8.shrink(net)
    if adapted:
        lora.add(net, rank=1, alpha=1.0, targets=["*"], generator=torch.Generator().manual_seed(0))
    x = normal(2, 8).requires_grad_()
    cost = counts.of_step(lambda: net(x).sum(), weights=[*net.parameters(), *net.buffers()])
    assert cost.saved_bytes < 50_000 < 512 * 512 * 4 < cost.peak_bytes < 2.2 * 512 * 512 * 4  # one whole weight at a time


def test_a_lora_from_a_file_speaks_beside_8_bits_and_is_not_folded() -> None:
    torch.manual_seed(0)
    net = Net()
    int8.shrink(net)
    before, x = net.to_q.weight, normal(2, 24)
    change = LowRank(normal(3, 24), normal(16, 3, seed=1), alpha=3.0)
    lora.attach(net, "to_q", Update(change), adapter="a")
    wanted = x @ (before + change.up @ change.down).T
    assert torch.allclose(net.to_q(x), wanted, atol=1e-5)
    lora.fold(net)
    assert torch.allclose(net.to_q(x), wanted, atol=1e-5)
    lora.remove(net)
    assert torch.equal(net.to_q(x), x @ before.T)


def test_a_run_in_8_bits_resumes_exactly_and_its_file_fits_the_whole_base(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    run = run_config(tiny_base, pictures, quantise="int8", sample_every=0, validation={"share": 0.2, "every": 3})
    list(train.train(run, tmp_path / "whole"))
    for event in (going := train.train(run, tmp_path / "again")):
        if type(event).__name__ == "Saved":
            going.close()  # stopped after step 3
    assert checkpoint.steps(tmp_path / "again/state") == [3]
    list(train.train(run, tmp_path / "again", resume=True))
    contents = [(tmp_path / name / "tiny.safetensors").read_bytes() for name in ("whole", "again")]
    assert contents[0] == contents[1]

    list(train.train(run_config(tiny_base, pictures, sample_every=0), tmp_path / "plain"))
    ours, plain = (lora_file.read(tmp_path / name / "tiny.safetensors") for name in ("whole", "plain"))
    assert ours.modules.keys() == plain.modules.keys()
    assert contents[0] != (tmp_path / "plain/tiny.safetensors").read_bytes()


def test_the_bases_answer_hardly_moves(mini_answers: dict[str, list[Tensor]]) -> None:
    whole, small, half = (torch.stack(mini_answers[name]) for name in ("fp32", "int8", "bf16"))
    rounding, usual = ((one - whole).norm() / whole.norm() for one in (small, half))
    assert 0 < rounding < usual  # less than by bf16, in which bases are trained beside


@pytest.fixture(scope="module")
def mini_answers() -> dict[str, list[Tensor]]:
    """What the embedded base answers to noise at three timesteps, whole, with linears in 8 bits, and in bf16."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("int8", torch.float32), ("bf16", torch.bfloat16)):
        base = base_files.load("mini", device=CPU, dtype=dtype)
        if name == "int8":
            int8.shrink(base.unet)
        said, noisy = text.encode(base, text.tokens(base, ["a red cup"])), normal(1, 4, 16, 16)
        with torch.no_grad():
            found[name] = [base_model.predict(base, noisy, torch.tensor([at]), said).float() for at in (50, 500, 950)]
    return found


def test_counts_know_of_8_bits_and_that_the_base_is_opened_whole(tiny_base: Path, pictures: Path) -> None:
    run = planned_config(tiny_base, pictures)
    whole, small = (plan.count(plan.changed(run, {"quantise": f'"{how}"'}), CPU, free_bytes=2**36)[1] for how in ("none", "int8"))
    assert small.parameters == whole.parameters
    assert small.flops == whole.flops
    assert small.weights_bytes < whole.weights_bytes <= small.coding_bytes
