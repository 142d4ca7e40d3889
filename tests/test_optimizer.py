"""Optimizers step as their papers say and go on exactly from a saved state; learning rates follow their stated course."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn

from sdlora import optimizer
from sdlora.errors import UserError

PACKAGES = {"adamw8bit": "bitsandbytes", "lion": "lion_pytorch", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}
RATES = {"prodigy": 1.0}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def need(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])


def matrices() -> list[nn.Parameter]:
    """A and B as a LoRA starts, B at 0; 8-bit AdamW keeps tensors of 4,096 numbers or more in 8 bits."""
    return [nn.Parameter(drawn(0, 8, 600)), nn.Parameter(torch.zeros(40, 8))]


def go(made: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range) -> None:
    """Some steps with gradients that depend on the step and the weights."""
    for step in steps:
        for i, weight in enumerate(weights):
            weight.grad = drawn(100 * step + i, *weight.shape) + 0.1 * weight.detach()
        made.step()
        made.zero_grad()


Grads = Iterator[Tensor]


def adamw_by_hand(w: Tensor, grads: Grads, rate: float, decay: float) -> Tensor:
    """Loshchilov & Hutter 2019, algorithm 2."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for k, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - rate * ((m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8) + decay * w)
    return w


def lion_by_hand(w: Tensor, grads: Grads, rate: float, decay: float) -> Tensor:
    """Chen et al. 2023, algorithm 2."""
    m = torch.zeros_like(w)
    for g in grads:
        w = w - rate * ((0.9 * m + 0.1 * g).sign() + decay * w)
        m = 0.99 * m + 0.01 * g
    return w


def adafactor_by_hand(w: Tensor, grads: Grads, rate: float, decay: float) -> Tensor:
    """Shazeer & Stern 2018, algorithm 4 with α_t = rate, and decoupled weight decay."""
    r, c = torch.zeros_like(w[:, 0]), torch.zeros_like(w[0])
    for k, g in enumerate(grads, 1):
        beta = 1 - k**-0.8
        r = beta * r + (1 - beta) * (g**2 + 1e-30).sum(1)
        c = beta * c + (1 - beta) * (g**2 + 1e-30).sum(0)
        u = g / (torch.outer(r, c) / r.sum()).sqrt()
        w = w - rate * decay * w - rate * u / max(1.0, (u**2).mean().sqrt().item())
    return w


def schedule_free_by_hand(w: Tensor, grads: Grads, rate: float, decay: float) -> Tensor:
    """Defazio et al. 2024, algorithm 1 at a constant rate; what it hands over is x, though gradients are taken at y."""
    x, z, v = w, w, torch.zeros_like(w)
    for k, g in enumerate(grads, 1):
        y = 0.1 * z + 0.9 * x
        v = 0.999 * v + 0.001 * g**2
        z = z - rate * (g / ((v / (1 - 0.999**k)).sqrt() + 1e-8) + decay * y)
        x = (1 - 1 / k) * x + z / k
    return x


def prodigy_by_hand(w: Tensor, grads: Grads, rate: float, decay: float) -> Tensor:
    """Mishchenko & Defazio 2024, algorithm 4, with Adam's bias correction and the rate left out of the denominator."""
    w0, m, v, s = w, torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    d, r, root = 1e-6, 0.0, math.sqrt(0.999)
    for k, g in enumerate(grads, 1):
        step = d * rate * math.sqrt(1 - 0.999**k) / (1 - 0.9**k)
        m, v = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * (d * g) ** 2
        r = root * r + d / 1e-6 * step * (g * (w0 - w)).sum().item()
        s = root * s + d / 1e-6 * d * g
        d = max(d, r / s.abs().sum().item())
        w = w - decay * step * w - step * m / (v.sqrt() + d * 1e-8)
    return w


PAPERS: dict[str, Callable[[Tensor, Grads, float, float], Tensor]] = {
    "adamw": adamw_by_hand,
    "lion": lion_by_hand,
    "adafactor": adafactor_by_hand,
    "schedule_free": schedule_free_by_hand,
    "prodigy": prodigy_by_hand,
}


@pytest.mark.parametrize("steps", [1, 6, 60])
@pytest.mark.parametrize("name", list(PAPERS))
def test_steps_are_those_of_the_paper(name: str, steps: int) -> None:
    need(name)
    start, rate = (1e-4 * drawn(5, 6, 9), 0.5) if name == "prodigy" else (drawn(5, 6, 9), 1e-2)  # Prodigy begins with steps of 5e-7
    grads = [drawn(step, 6, 9) + 1 for step in range(steps)]  # a common direction, by which Prodigy grows
    weight = nn.Parameter(start.clone())
    made = optimizer.make(name, [([weight], rate)], weight_decay=0.1)
    for grad in grads:
        weight.grad = grad.clone()
        made.step()
    expected = PAPERS[name](start.double(), (grad.double() for grad in grads), rate, 0.1)
    moved, rounding = (expected - start).abs().max().item(), 1e-6 if steps <= 6 else 1e-5  # of 60 sums in fp32
    with optimizer.settled(made):
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=min(rounding, 1e-3 * moved))
    assert moved > 0.4 * rate * (1e-6 if name == "prodigy" else 1)


def test_eight_bits_take_adamws_first_step_and_stay_near_it() -> None:
    need("adamw8bit")
    ours, theirs = matrices(), matrices()
    eight = optimizer.make("adamw8bit", [(ours, 1e-3)], weight_decay=0.01)
    full = optimizer.adamw([(theirs, 1e-3)], weight_decay=0.01)
    for steps, tolerance in ((range(1), 1e-6), (range(1, 10), 5e-3)):  # 10 steps of 1e-3 can go 1e-2
        go(eight, ours, steps)
        go(full, theirs, steps)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    states = [value for state in eight.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert {state.dtype for state in states} == {torch.uint8, torch.float32}


@pytest.mark.parametrize("name", list(optimizer.OPTIMIZERS))
def test_a_run_goes_on_exactly_from_tensors_and_json(name: str) -> None:
    need(name)
    rate = RATES.get(name, 1e-3)
    whole, broken = matrices(), matrices()
    unbroken = optimizer.make(name, [(whole, rate)], weight_decay=0.01)
    go(unbroken, whole, range(7))

    first = optimizer.make(name, [(broken, rate)], weight_decay=0.01)
    go(first, broken, range(4))
    saved = first.state_dict()
    assert not any(isinstance(value, Tensor) for group in saved["param_groups"] for value in group.values())
    groups = json.loads(json.dumps(saved["param_groups"]))
    state = {key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in one.items()} for key, one in saved["state"].items()}
    again = [nn.Parameter(weight.detach().clone()) for weight in broken]
    second = optimizer.make(name, [(again, rate)], weight_decay=0.01)
    second.load_state_dict({"state": state, "param_groups": groups})
    go(second, again, range(4, 7))
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


@pytest.mark.parametrize("name", list(optimizer.OPTIMIZERS))
def test_every_optimizer_brings_a_small_problem_down_at_its_usual_rate(name: str) -> None:
    """‖B A - M‖² falls to less than half within 200 steps at the usual rate, as a multiple of an AdamW rate of 1e-2."""
    need(name)
    goal, (a, b) = drawn(3, 12, 4) @ drawn(4, 4, 20) / 4, (nn.Parameter(drawn(0, 4, 20) / 4), nn.Parameter(torch.zeros(12, 4)))
    multiple = optimizer.OPTIMIZERS[name].rate
    made = optimizer.make(name, [([a, b], 1.0 if multiple is None else 1e-2 * multiple)], weight_decay=0.0)
    for _ in range(200):
        loss = ((b @ a - goal) ** 2).mean()
        made.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        made.step()
    with optimizer.settled(made), torch.no_grad():
        assert ((b @ a - goal) ** 2).mean() < 0.5 * (goal**2).mean()


def test_the_default_is_the_fused_adamw_of_before_bit_by_bit() -> None:
    one, other = matrices(), matrices()
    ours = optimizer.make("adamw", [(one, 1e-3), ([], 1.0)], weight_decay=0.01)
    before = torch.optim.AdamW([{"params": other, "lr": 1e-3}], weight_decay=0.01, fused=True)
    for made, weights in ((ours, one), (before, other)):
        go(made, weights, range(5))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert optimizer.make("adamw", [(matrices(), 1e-3)], weight_decay=0.01).param_groups[0]["fused"]


@pytest.mark.parametrize("name", list(PACKAGES))
def test_a_missing_package_is_told_with_the_command_that_mends_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [one for one in sys.modules if one.partition(".")[0] == PACKAGES[name]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    extra = "8bit" if name == "adamw8bit" else "optimizers"
    with pytest.raises(
        UserError, match=rf"'{name}' needs the package {PACKAGES[name]}.*pip install 'sdlora\[{extra}\]', or choose 'adamw'"
    ):
        optimizer.make(name, [(matrices(), 1.0)], weight_decay=0.0)


def test_prodigy_refuses_rates_of_its_groups_that_differ_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    need("prodigy")
    a, b = matrices()
    with pytest.raises(UserError, match=r"one rate for all weights, but 0.5 and 1 were asked for"):
        optimizer.make("prodigy", [([a], 1.0), ([b], 0.5)], weight_decay=0.0)
    made = optimizer.make("prodigy", [([a], 1.0), ([b], 0.0)], weight_decay=0.1)  # 0 leaves weights as they are
    go(made, [a, b], range(3))
    assert b.abs().max() == 0
    assert (a - matrices()[0]).abs().max() > 0
    assert capsys.readouterr().out == ""


def test_schedules_that_make_no_sense_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="'cosine' does not go with optimizer 'schedule_free'; choose 'constant'"):
        optimizer.check_schedule("schedule_free", "cosine")
    with pytest.raises(UserError, match="'cosine_with_restarts' does not go with optimizer 'prodigy'; choose 'cosine' or 'constant'"):
        optimizer.check_schedule("prodigy", "cosine_with_restarts")
    for name, kind in optimizer.OPTIMIZERS.items():
        assert set(kind.schedules) <= set(optimizer.SCHEDULES)
        for schedule in kind.schedules:
            optimizer.check_schedule(name, schedule)


@pytest.mark.parametrize("wrapped", [False, True])
def test_schedule_free_hands_over_its_average_and_trains_on_as_if_nothing_had_been_looked_at(wrapped: bool) -> None:
    need("schedule_free")

    def run(*, look: bool) -> tuple[list[nn.Parameter], list[Tensor]]:
        weights, seen = matrices(), []
        made = optimizer.make("schedule_free", [(weights, 1e-2)], weight_decay=0.01)
        if wrapped:
            made = Accelerator(cpu=True).prepare_optimizer(made, device_placement=False)
        for step in range(5):
            go(made, weights, range(step, step + 1))
            if look:
                with optimizer.settled(made):
                    seen.append(weights[0].detach().clone())
        return weights, seen

    (looked, seen), (unlooked, _) = run(look=True), run(look=False)
    assert all(torch.equal(one, other) for one, other in zip(looked, unlooked, strict=True))
    assert not torch.equal(seen[-1], looked[0].detach())


def test_settled_leaves_other_optimizers_weights_alone() -> None:
    weights = matrices()
    made = optimizer.adamw([(weights, 1e-3)], weight_decay=0.0)
    go(made, weights, range(2))
    before = [weight.detach().clone() for weight in weights]
    with optimizer.settled(made):
        assert all(torch.equal(one, kept) for one, kept in zip(weights, before, strict=True))
    assert all(torch.equal(one, kept) for one, kept in zip(weights, before, strict=True))


def test_warmup_from_outside_is_schedule_frees_own() -> None:
    need("schedule_free")
    import schedulefree

    ours, theirs = matrices(), matrices()
    made = optimizer.make("schedule_free", [(ours, 1e-2)], weight_decay=0.01)
    reference: Any = schedulefree.AdamWScheduleFree(theirs, lr=1e-2, weight_decay=0.01, warmup_steps=4)
    reference.train()
    for step in range(10):
        optimizer.set_rates(made, optimizer.rate_factor(step, steps=10, warmup=0.4, schedule="constant"))
        go(made, ours, range(step, step + 1))
        go(reference, theirs, range(step, step + 1))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_lora_plus_gives_only_b_the_faster_rate() -> None:
    (a, b), (c, d), extra = matrices(), matrices(), nn.Parameter(torch.ones(3))
    groups = [([a, b, extra], 1e-3), ([d, c], 1e-4), ([], 1.0)]
    split = optimizer.with_ratio(groups, ups=[b, d], ratio=16)
    found = {id(weight): rate for weights, rate in split for weight in weights}
    assert [found[id(w)] for w in (a, b, extra, c, d)] == pytest.approx([1e-3, 16e-3, 1e-3, 1e-4, 16e-4])
    assert sum(len(weights) for weights, _ in split) == 5
    assert optimizer.with_ratio(groups, ups=[b, d], ratio=1) == groups


def test_lora_plus_is_pefts() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]))
    theirs = create_loraplus_optimizer(model, optimizer_cls=torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, weight_decay=0.0)
    rates = {id(weight): group["lr"] for group in theirs.param_groups for weight in group["params"]}
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    ups = [weight for name, weight in named.items() if "lora_B" in name]
    split = optimizer.with_ratio([(list(named.values()), 1e-3)], ups=ups, ratio=16)
    assert {id(weight): rate for weights, rate in split for weight in weights} == rates


SAME_AS_TRANSFORMERS = [
    ("cosine", optimizer.PLAIN, "cosine", {}),
    ("constant", optimizer.PLAIN, "constant_with_warmup", {}),
    ("cosine_with_restarts", optimizer.Shape(cycles=3), "cosine_with_restarts", {"num_cycles": 3}),
    ("linear", optimizer.PLAIN, "linear", {}),
    ("polynomial", optimizer.Shape(power=2.5), "polynomial", {"power": 2.5, "lr_end": 0.0}),
    ("warmup_stable_decay", optimizer.Shape(decay=0.3), "warmup_stable_decay", {"num_decay_steps": 27, "decay_type": "1-sqrt"}),
]


@pytest.mark.parametrize(("name", "shape", "theirs", "extra"), SAME_AS_TRANSFORMERS, ids=[row[0] for row in SAME_AS_TRANSFORMERS])
def test_schedules_are_those_of_transformers(name: str, shape: optimizer.Shape, theirs: str, extra: dict[str, Any]) -> None:
    reference = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=1.0)
    schedule = transformers.get_scheduler(
        theirs, reference, num_warmup_steps=10, num_training_steps=None if theirs == "constant_with_warmup" else 100,
        scheduler_specific_kwargs=extra,
    )  # fmt: skip
    for step in range(99):
        reference.step()
        schedule.step()  # transformers starts at 0 and is one step behind during warm-up
        ours = optimizer.rate_factor(step if step < 10 else step + 1, steps=100, warmup=0.1, schedule=name, shape=shape)
        assert ours == pytest.approx(reference.param_groups[0]["lr"], abs=1e-9)


def test_rex_is_the_papers_formula() -> None:
    for step in range(10, 100):
        left = 1 - (step - 10) / 90
        expected = left / (1 / 2 + 1 / 2 * left)  # Chen et al. 2021
        assert optimizer.rate_factor(step, steps=100, warmup=0.1, schedule="rex") == pytest.approx(expected)


@pytest.mark.parametrize("schedule", list(optimizer.SCHEDULES))
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_every_step_of_every_schedule_trains(schedule: str, warmup: float, steps: int) -> None:
    shape = optimizer.Shape(cycles=3, power=2.0, decay=0.01)
    rates = [optimizer.rate_factor(step, steps=steps, warmup=warmup, schedule=schedule, shape=shape) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1


def test_restarts_start_again() -> None:
    rates = [
        optimizer.rate_factor(s, steps=90, warmup=0, schedule="cosine_with_restarts", shape=optimizer.Shape(cycles=3)) for s in range(90)
    ]
    assert [step for step, rate in enumerate(rates) if rate == 1] == [0, 30, 60]


def test_constant_stays_and_each_group_has_its_own_peak() -> None:
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    adamw = optimizer.adamw([([one], 1e-3), ([other], 1e-4), ([], 1.0)], weight_decay=0.01)
    assert [optimizer.rate_factor(s, steps=10, warmup=0.2, schedule="constant") for s in (0, 1, 2, 9)] == [0.5, 1, 1, 1]
    optimizer.set_rates(adamw, 0.5)
    assert [group["lr"] for group in adamw.param_groups] == [5e-4, 5e-5]
