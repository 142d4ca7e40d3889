"""NaN and infinity, wherever they come from: the step is not taken, nothing broken is written, and the run can go on from before."""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import interrupted, smallest
from sdlora import checkpoint, course, events, material, run_folder, train
from sdlora.config import Config
from sdlora.course import Course
from sdlora.errors import UserError
from sdlora.events import Event

VALUES = (float("nan"), float("inf"), float("-inf"))
INJECTIONS = 200  # for each of two optimizers: one that leaves a step out on the device, one that must be asked first
STEPS = 8


@dataclass
class Going:
    """A run under way, from outside and inside."""

    run: Iterator[Event]
    inside: Course

    def until(self, step: int) -> "Going":
        """Has taken that step, and not yet saved."""
        while not ((event := next(self.run)) and isinstance(event, events.Step) and event.step == step):
            pass
        return self


def begun(run: Config, folder: Path, *, step: int) -> Going:
    caught: list[Course] = []
    honest = course.assembled

    def assembled(*args: Any) -> Course:
        caught.append(honest(*args))
        return caught[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(course, "assembled", assembled)
        going = train.train(run, folder)
        while not isinstance(next(going), events.Started):
            pass
    return Going(going, caught[0]).until(step)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("made")
    return smallest.make_base(root), smallest.make_pictures(root / "pictures")


def exacting(made: tuple[Path, Path], *, name: str = "adamw", accumulation: int = 2, **changes: Any) -> Config:
    how = smallest.OPTIMIZER | {"name": name, "accumulation": accumulation}
    values = {"steps": STEPS, "save_every": 2, "keep_last": 9, "validation": {"every": 0}, "optimizer": how}
    return smallest.exacting(*made, **values | changes)


# --- where it comes from ------------------------------------------------------------------------------------------------------


@contextmanager
def element(tensor: Tensor, value: float, chance: random.Random) -> Iterator[None]:
    """One number of a tensor is another for a while."""
    flat = tensor.detach().view(-1)
    at = chance.randrange(len(flat))
    before = flat[at].clone()
    flat[at] = value
    yield
    flat[at] = before


@contextmanager
def in_loss(go: Course, step: int, value: float, chance: random.Random) -> Iterator[str]:
    """The loss itself; its gradients are fine."""
    honest = train.loss_of_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "loss_of_batch", lambda *args, **more: honest(*args, **more) + value)
        yield ""


@contextmanager
def in_gradient(go: Course, step: int, value: float, chance: random.Random) -> Iterator[str]:
    """One number of one weight's gradient; the loss is fine."""
    weight = chance.choice(go.trainable)
    at = chance.randrange(weight.numel())

    def broken(gradient: Tensor) -> Tensor:
        other = gradient.clone().reshape(-1)
        other[at] = value
        return other.view_as(gradient)

    handle = weight.register_hook(broken)
    yield ""
    handle.remove()


@contextmanager
def in_latent(go: Course, step: int, value: float, chance: random.Random) -> Iterator[str]:
    """One number of a picture that the step sees; says which."""
    run, data, parts = go.run, go.ready.data, go.run.optimizer.accumulation
    index = chance.randrange((step - 1) * parts, step * parts)
    _, visits = material.batch_at(data, batch=run.batch, seed=run.seed, batch_index=index)
    number = chance.choice(visits).sample
    with element(go.ready.seen[number][0].mean, value, chance):
        yield data.samples[data.items[number].sample].picture.name


@contextmanager
def in_weight(go: Course, step: int, value: float, chance: random.Random) -> Iterator[str]:
    """One number of one trained weight."""
    with element(chance.choice(go.trainable), value, chance):
        yield ""


KINDS: dict[str, Callable[..., Any]] = {"loss": in_loss, "gradient": in_gradient, "latent": in_latent, "weight": in_weight}


# --- what stays ---------------------------------------------------------------------------------------------------------------


def bits(go: Course) -> list[Tensor]:
    """Weights, the optimizer's tensors and the average, as bytes: NaN would not equal itself."""
    held = [value for state in go.mover.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone().reshape(-1).view(torch.uint8) for tensor in (*go.trainable, *held, *go.average)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def assert_all_finite(folder: Path) -> None:
    """Every number in every file of a run."""
    paths = list(folder.rglob("*.safetensors"))
    assert paths
    assert [path for path in paths for tensor in load_file(path).values() if not torch.isfinite(tensor.float()).all()] == []


def pictures_of(go: Course, step: int) -> list[str]:
    parts, found = go.run.optimizer.accumulation, []
    for index in range((step - 1) * parts, step * parts):
        batch = train.gather(go.run, go.ready, batch_index=index)
        found += batch.pictures if batch else ()
    return found


def assert_told(told: str, go: Course, step: int, broken: str) -> None:
    """One sentence: the step, its pictures with their timesteps, which of them is broken, and what to do."""
    assert "\n" not in told
    start, inside, rest = re.fullmatch(r"(.*?) \((.*)\); (nothing of this step was kept.*)", told).groups()  # type: ignore[union-attr]
    assert start == f"The loss or a gradient of step {step} is not finite"
    parts = [re.fullmatch(r"(\d\.png) at timestep \d+(, whose latents are broken)?", part) for part in inside.split("; ")]
    assert [part and part[1] for part in parts] == pictures_of(go, step)
    assert {part[1] for part in parts if part and part[2]} == ({broken} if broken else set())
    assert "lower optimizer.learning_rate" in rest


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_two_hundred_broken_numbers_anywhere_change_nothing(name: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    going = begun(exacting(made, name=name, accumulation=1), tmp_path / "run", step=2)
    go, chance = going.inside, random.Random(0)
    next(going.run)  # saved
    files, honest = interrupted.contents(tmp_path / "run"), bits(go)
    for number in range(INJECTIONS):
        kind, value = [*KINDS][number % 4], VALUES[number // 4 % 3]
        step = chance.randrange(3, STEPS)
        with KINDS[kind](go, step, value, chance) as broken:
            before = bits(go)
            with pytest.raises(UserError) as caught:
                train.take_step(go, step)
            assert equal(bits(go), before), (kind, value)
            assert_told(str(caught.value), go, step, broken)
            if kind == "weight":  # whoever asks for a save now gets none
                with pytest.raises(UserError, match="holds a number that is not finite, so it is not written"):
                    list(course.kept(go, step))
        go.mover.zero_grad(set_to_none=True)
        assert equal(bits(go), honest)
    assert interrupted.contents(tmp_path / "run") == files
    assert_all_finite(tmp_path / "run")


def test_the_first_step_leaves_the_optimizer_as_new(made: tuple[Path, Path], tmp_path: Path) -> None:
    going = begun(exacting(made), tmp_path / "run", step=1)
    go = going.inside
    go.mover.state.clear()
    with in_loss(go, 1, float("nan"), random.Random(0)), pytest.raises(UserError, match="step 1 is not finite"):
        train.take_step(go, 1)
    assert {int(value.count_nonzero()) for state in go.mover.state.values() for value in state.values()} <= {0}


# --- whole runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The LoRA files of runs in which nothing happens."""
    found = {}
    for name in ("adamw", "adafactor"):
        folder = tmp_path_factory.mktemp(name) / "run"
        list(train.train(exacting(made, name=name), folder))
        found[name] = run_folder.result_path(folder, "tiny").read_bytes()
    return found


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", "loss"), ("adamw", "gradient"), ("adamw", "latent"), ("adamw", "weight"), ("adafactor", "gradient")]
)
def test_a_run_stops_before_the_broken_step_and_goes_on_from_the_state_before_it(
    name: str, kind: str, made: tuple[Path, Path], unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    folder, run = tmp_path / "run", exacting(made, name=name)
    going = begun(run, folder, step=4)
    next(going.run)  # saved
    with KINDS[kind](going.inside, 5, float("nan"), random.Random(5)) as broken, pytest.raises(UserError) as caught:
        list(going.run)
    assert_told(str(caught.value), going.inside, 5, broken)
    assert checkpoint.steps(folder / "state") == [2, 4]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["tiny-000002.safetensors", "tiny-000004.safetensors"]
    assert not run_folder.result_path(folder, "tiny").exists()
    assert_all_finite(folder)
    assert run_folder.is_unfinished(folder)
    list(train.train(run, folder, resume=True))
    assert run_folder.result_path(folder, "tiny").read_bytes() == unbroken[name]


@pytest.mark.parametrize("step", [4, STEPS], ids=["a checkpoint", "the end"])
@pytest.mark.parametrize("ema", [0.9, 0.0], ids=["average", "no average"])
@pytest.mark.parametrize("value", VALUES[:2])
def test_a_weight_that_breaks_between_step_and_save_is_not_written(
    value: float, ema: float, step: int, made: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    going = begun(exacting(made, optimizer=smallest.OPTIMIZER | {"ema": ema}), folder, step=step)
    before = interrupted.contents(folder)
    going.inside.trained.flats[0].parts[3].detach().view(-1)[1] = value
    with pytest.raises(UserError, match=rf"state of step {step} holds a number that is not finite, so it is not written; [^\n]*$"):
        list(going.run)
    assert interrupted.contents(folder) == before
    assert_all_finite(folder)


def test_a_weight_too_large_for_the_files_numbers_is_said_and_the_run_goes_on_with_larger_ones(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, how = tmp_path / "run", smallest.OPTIMIZER | {"ema": 0.0}
    going = begun(exacting(made, optimizer=how), folder, step=STEPS)
    going.inside.trained.flats[0].parts[3].detach().view(-1)[1] = 1e6
    with pytest.raises(UserError, match=r"reaches 1e\+06, which is infinite in torch\.float16; write the LoRA in bf16 or fp32"):
        list(going.run)
    assert not run_folder.result_path(folder, "tiny").exists()
    list(train.train(exacting(made, optimizer=how, output={"dtype": "fp32"}), folder, resume=True))
    assert max(float(tensor.max()) for tensor in load_file(run_folder.result_path(folder, "tiny")).values()) == 1e6
    assert_all_finite(folder)
