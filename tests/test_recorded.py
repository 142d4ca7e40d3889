"""A recorded step ends in the same bits as one that was asked the usual way, whatever base and adapters, and keeps no more."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdlora import adapters, base_model, config, counts, lora, lora_flat, prepare, recorded, text
from sdlora.adapters import Trained
from sdlora.base_model import Base
from tests import tiny_families
from tests.bases import Made
from tests.test_fast_path import Launches

pytest_plugins = ("tests.base_fixtures",)
Opener = Callable[..., tuple[Base, Trained]]
CAPTIONS = ["a red circle", "pip on the moon", "nothing at all"]


def opened(folder: Path, *, dtype: torch.dtype = torch.float32, **values: Any) -> tuple[Base, Trained]:
    """A base that is trained, the same each time."""
    given = {"base": str(folder), "data": "x", "kind": "character", "name": "tiny", "steps": 4, "batch": 1, "trigger": "pip"}
    run = prepare.linked_run(config.parse(given | values, where="test")).run
    base = prepare.open_base(run, device=torch.device("cpu"), dtype=dtype)
    adapters.add_lora(base, run)
    for one in adapters.each(base):
        torch.nn.init.normal_(one.up, std=0.02, generator=torch.Generator().manual_seed(one.up.numel()))
    trained = adapters.trained(base, run)
    base_model.set_training(base, True)
    return base, trained


def step(base: Base, trained: Trained, number: int, *, side: int = 16) -> tuple[Tensor, list[Tensor]]:
    """What the UNet says to a picture of a step, and what the weights learn from it."""
    chance = torch.Generator().manual_seed(number)
    noisy = torch.randn(2, 4, side, side, generator=chance).to(base.dtype)
    tokens = text.tokens(base, [CAPTIONS[number % 3], CAPTIONS[(number + 1) % 3]])
    with lora_flat.spread(trained.flats, trained.adapters, base.dtype):
        heard = text.encode(base, tokens)
        said = base_model.predict(base, noisy, torch.randint(0, 1000, (2,), generator=chance), heard)
        said.float().square().mean().backward()
    found = [weight.grad.clone() for weight in trained.weights if weight.grad is not None]
    assert len(found) == len(trained.weights)
    with torch.no_grad():
        for weight in trained.weights:
            assert weight.grad is not None
            weight.sub_(weight.grad, alpha=1e-2)
            weight.grad = None
    return said.detach(), found


class Watched(TorchDispatchMode):
    """Follows operations and bytes; `recorded` is not told, so that it plays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr(recorded, "is_in_torch_dispatch_mode", lambda: False)
        self.operations: list[str] = []
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        made = func(*args, **(kwargs or {}))
        if counts.computes(func):
            self.operations.append(str(func))
        for one in tree_leaves(made):
            storage = one.untyped_storage() if isinstance(one, Tensor) else None
            if storage is not None and storage._cdata not in before | set(self.alive):
                self.alive[storage._cdata] = storage.nbytes()
                self.most = max(self.most, sum(self.alive.values()))
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        return made


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> Opener:
    """Opens a base that records nothing."""

    def opening(folder: Path, **values: Any) -> tuple[Base, Trained]:
        with monkeypatch.context() as patch:
            patch.setattr(recorded, "record", lambda *some: False)
            return opened(folder, **values)

    return opening


def asked(module: nn.Module) -> list[int]:
    """Grows by one each time that a module is called."""
    calls: list[int] = []
    module.register_forward_hook(lambda *some: calls.append(1))
    return calls


def assert_same(found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(found[0], wanted[0])
    assert len(found[1]) == len(wanted[1]) > 0
    for here, there in zip(found[1], wanted[1], strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize(
    ("values", "plays"),
    [
        ({"lora": {"targets": "attn"}}, True),
        ({"lora": {"text_encoder": False}}, True),
        ({"lora": {"dora": True}}, True),
        ({"lora": {"init": "pissa"}}, True),
        ({"quantise": "int8"}, True),
        ({"optimizer": {"lora_plus_ratio": 4.0}}, True),
        ({"lora": {"network_dropout": 0.1}}, False),
        ({"gradient_checkpointing": True}, False),
        ({"optimizer": {"name": "adafactor"}}, False),
    ],
    ids=str,
)
def test_recorded_steps_end_in_the_same_bits(tiny_base: Path, usual: Opener, values: dict[str, Any], plays: bool) -> None:
    values = values | {"lora": {"targets": "attn-mlp-conv", "rank": 2} | values.get("lora", {})}
    one, other = opened(tiny_base, **values), usual(tiny_base, **values)
    calls = asked(one[0].unet.conv_in)
    for number in range(3):
        torch.manual_seed(number)
        found = step(*one, number)
        torch.manual_seed(number)
        assert_same(found, step(*other, number))
    assert len(calls) == (1 if plays else 3)


@pytest.mark.parametrize(("family", "dtype"), [*((family, torch.float32) for family in tiny_families.FAMILIES), ("sd1", torch.bfloat16)])
def test_every_part_of_every_family_plays(family: str, made: Made, usual: Opener, dtype: torch.dtype) -> None:
    values = {"lora": {"text_encoder": True, "rank": 2}, "dtype": dtype, "gradient_checkpointing": False}
    one, other = opened(made(family)[0], **values), usual(made(family)[0], **values)
    calls = [asked(one[0].unet.conv_in), *(asked(getattr(part, "text_model", part).embeddings) for part in one[0].text_encoders)]
    for number in range(2):
        assert_same(step(*one, number), step(*other, number))
    assert [len(some) for some in calls] == [1, *([1] * (len(calls) - 1))]


def test_each_size_has_a_recording_of_its_own(tiny_base: Path, usual: Opener) -> None:
    one, other = opened(tiny_base), usual(tiny_base)
    calls = asked(one[0].unet.conv_in)
    for number, side in enumerate([16, 8, 16, 8, 16]):
        assert_same(step(*one, number, side=side), step(*other, number, side=side))
    assert len(calls) == 2


def test_a_played_step_does_the_same_operations_and_keeps_no_more(tiny_base: Path, usual: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for base, trained in (opened(tiny_base), usual(tiny_base)):
        step(base, trained, 0)
        with Watched(monkeypatch) as watched:
            step(base, trained, 1)
        seen.append(watched)
    played, wanted = seen
    assert sorted(played.operations) == sorted(wanted.operations)
    assert played.most <= 1.01 * wanted.most


def test_who_watches_the_operations_sees_the_usual_way(tiny_base: Path) -> None:
    base, trained = opened(tiny_base)
    calls = asked(base.unet.conv_in)
    for number in range(2):
        with Launches():
            step(base, trained, number)
    assert len(calls) == 2


def test_drawing_and_looking_go_the_usual_way(tiny_base: Path, usual: Opener) -> None:
    one, other = opened(tiny_base), usual(tiny_base)
    for base, trained in (one, other):
        step(base, trained, 0)
    for strength in (1.0, 0.0, -0.5):
        said = []
        for base, _ in (one, other):
            lora.set_strength(base.unet, strength)
            with torch.no_grad():
                said.append(
                    base_model.predict(base, torch.ones(1, 4, 16, 16), torch.tensor([5]), text.encode(base, text.tokens(base, ["x"])))
                )
        assert torch.equal(*said)


def test_another_strength_is_another_recording(tiny_base: Path, usual: Opener) -> None:
    one, other = opened(tiny_base), usual(tiny_base)
    for number, strength in enumerate([1.0, 0.5, 1.0, 0.5]):
        for base, _ in (one, other):
            lora.set_strength(base.unet, strength)
        assert_same(step(*one, number), step(*other, number))


def test_weights_that_were_put_elsewhere_are_found_there(tiny_base: Path, usual: Opener) -> None:
    one, other = opened(tiny_base), usual(tiny_base)
    for base, trained in (one, other):
        step(base, trained, 0)
        for weight in base.unet.parameters():
            if not weight.requires_grad and weight.ndim == 4:
                weight.data = weight.data * 1.5
    assert_same(step(*one, 1), step(*other, 1))


class Doubting(nn.Module):
    """Does what the numbers say."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.linear(x)
        return answer if x.sum().item() > 0 else -answer


def test_a_model_that_decides_by_numbers_is_not_recorded() -> None:
    model = Doubting()
    lora.add(model, rank=2, alpha=2, targets=["linear"], generator=torch.Generator().manual_seed(0))
    (one,) = next(iter(lora.layers(model).values())).each_adapter()
    flat = lora_flat.pack(list(one.parameters()))
    assert recorded.record(model, [flat], [one], torch.float32)
    said = []
    for sign in (1.0, -1.0, 1.0):
        with lora_flat.spread([flat], [one], torch.float32):
            answer = model(torch.full((1, 3), sign))
            answer.sum().backward()
        said.append(answer.detach() - model.linear.base.bias * sign)
    assert torch.allclose(said[0], said[1])
    assert torch.equal(said[0], said[2])


def test_attention_as_gpus_do_it_can_be_noted() -> None:
    """It answers with sizes, too, which are the same in all steps."""
    some = [torch.empty(1, 2, 16, 8, device="meta", dtype=torch.bfloat16) for _ in range(3)]
    notes = recorded.Notes(some)
    with notes:
        torch.ops.aten._scaled_dot_product_flash_attention(*some)
        torch.ops.aten._scaled_dot_product_efficient_attention(*some, None, True)
    assert notes.is_fit
    assert len(notes.lines) == 2


@pytest.mark.parametrize("ask", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool((x > 0).all())])
def test_what_asks_for_numbers_cannot(ask: Callable[[Tensor], object]) -> None:
    x = torch.tensor([1.0, -1.0])
    notes = recorded.Notes([x])
    with notes:
        _ = x[torch.tensor([1, 0])] + 1
    assert notes.is_fit
    with notes:
        ask(x)
    assert not notes.is_fit


def test_nothing_of_a_step_stays_after_it(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, trained = opened(tiny_base)
    step(base, trained, 0)
    with Watched(monkeypatch) as watched:
        step(base, trained, 1)
    gc.collect()
    assert watched.most > 1e6
    assert sum(watched.alive.values()) < 1e4
