"""What a run leaves so that it can go on, and what must be equal for it to go on exactly.

The order of pictures, the noise and the learning rate are functions of (seed, step), so a state is little: the adapters' tensors, the
optimizer's, the average, and how far the run is. Beside them stand the config and a hash of each picture with its caption: a run that goes
on with others is another run, and is told so by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

import sdlora
from sdlora import base_model, files, lora
from sdlora.base_model import Base
from sdlora.checkpoint import State
from sdlora.config import Config
from sdlora.dataset import Sample
from sdlora.errors import UserError

PACKAGES = ("torch", "diffusers", "transformers", "accelerate")
# what may change without another LoRA coming out: where things lie, how often is saved and drawn, how the file is written
FREE = {
    "base", "cache", "save_every", "keep_last", "keep_every", "sample_every", "sample_prompts", "report", "trackers", "output",
    "validation.every", "validation.draws", "validation.most_pictures", "validation.folder",
}  # fmt: skip
FREE_OF_A_FOLDER = {"folder", "masks", "metadata"}  # which files they hold is compared by content
NAMED = 4  # pictures in one sentence
CURRENT = ("lr", "peak", "weight_decay", "text")  # of the config, whatever the state says


def facts(run: Config, base: Base, samples: Sequence[Sample], held_out: Sequence[Sample]) -> dict[str, Any]:
    """What a state is compared by: the config, the base's hash, each picture with what is said of it, and the programs' versions."""
    return {
        "config": run.model_dump(mode="json"),
        "base": base_model.weights_hash(base),
        **pictures(samples, held_out),
        "versions": {"sdlora": sdlora.__version__, **{name: version(name) for name in PACKAGES}},
        "device": f"{base.device.type}, {str(base.dtype).removeprefix('torch.')}",
    }


def pictures(samples: Sequence[Sample], held_out: Sequence[Sample]) -> dict[str, Any]:
    """The part of `facts` that pictures, and what is said of them, are compared by."""
    return {"pictures": [_told(sample) for sample in samples], "held_out": [_told(sample) for sample in held_out]}


def _told(sample: Sample) -> list[Any]:
    mask = files.sha256(sample.mask) if sample.mask else None
    rest = [list(sample.captions), sample.repeats, sample.source, sample.alpha_mask]
    return [sample.picture.name, files.sha256(sample.picture), mask, *rest]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was and would make another LoRA, in words."""
    old, new = flat(before["config"]), flat(now["config"])
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not _is_free(key)]
    found = [f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in changed]
    if before["base"] != now["base"]:
        found.append("the base has other weights")
    for what, key in (("pictures", "pictures"), ("held-out pictures", "held_out")):
        names = _changed(before[key], now[key])
        if names:
            found.append(f"{len(names)} {what} are not as they were ({', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''})")
    return found


def _changed(before: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> list[str]:
    """The names of pictures that came, went, or are seen or described otherwise."""
    old, new = {str(one) for one in before}, {str(one) for one in now}
    names = sorted({one[0] for one in before if str(one) not in new} | {one[0] for one in now if str(one) not in old})
    return names if names or list(before) == list(now) else ["their order"]


def notes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was and may change the last digits."""
    found = [
        f"{name} was {old} and is {now['versions'].get(name)}; the rest of the run may differ in the last digits."
        for name, old in before["versions"].items()
        if now["versions"].get(name) != old
    ]
    if before["device"] != now["device"]:
        found.append(f"The run began on {before['device']} and goes on on {now['device']}; the rest may differ in the last digits.")
    return found


def check(state: State, now: Mapping[str, Any], *, allow_changes: bool, before: Sequence[str] = ()) -> list[str]:
    """What is worth knowing before the run goes on.

    Args:
        before: what else is to be said if it does not.

    Raises:
        UserError: if something has changed that makes another LoRA, and that is not allowed.
    """
    changed = differences(state.facts, now)
    if changed and not allow_changes:
        told = (
            f"The run stopped after step {state.step} with other settings or pictures: {'; '.join(changed)}. Give --allow-changes to go on "
            "with them as they are now, put them back as they were, or start anew with --out FOLDER."
        )
        raise UserError(" ".join([*before, told]))
    return [*(f"Changed: {one}." for one in changed), *notes(state.facts, now)]


def flat(values: Any, inside: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    if isinstance(values, dict):
        return {key: value for name, part in values.items() for key, value in flat(part, f"{inside}{name}.").items()}
    if isinstance(values, list) and values and isinstance(values[0], dict):
        return {key: value for i, part in enumerate(values) for key, value in flat(part, f"{inside}{i}.").items()}
    return {inside.removesuffix("."): values}


def _is_free(key: str) -> bool:
    first, _, rest = key.partition(".")
    return key in FREE or first in FREE or (first == "data" and rest.partition(".")[2] in FREE_OF_A_FOLDER)


# --- tensors ------------------------------------------------------------------------------------------------------------------


def weights(base: Base) -> dict[str, Tensor]:
    """All tensors of the adapters by name; they are the model's own, not copies."""
    return {
        f"{part}.{name}.{key}": tensor
        for part, module in base.parts.items()
        for name, layer in lora.layers(module).items()
        for key, tensor in layer.adapters["default"].state_dict(keep_vars=True).items()
    }


def snapshot(base: Base, mover: torch.optim.Optimizer, average: Sequence[Tensor], *, step: int, facts: Mapping[str, Any]) -> State:
    """The state after a step.

    Raises:
        UserError: if a number in it is not finite: such a state is never written.
    """
    state = State(step, weights(base), list(average), mover.state_dict(), dict(facts))
    check_finite([*state.weights.values(), *state.average, *moments(mover)], what=f"state of step {step}")
    return state


def check_finite(tensors: Sequence[Tensor], *, what: str) -> None:
    """One look at many tensors, with one wait for the device.

    Raises:
        UserError: if a number is not finite.
    """
    floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    if floats and not bool(torch.stack([torch.isfinite(one).all() for one in floats]).all()):
        raise UserError(
            f"The {what} holds a number that is not finite, so it is not written; files saved before stand. "
            "Lower optimizer.learning_rate, and go on from the newest state with the same command."
        )


def moments(mover: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's tensors."""
    return [value for held in mover.state.values() for value in held.values() if isinstance(value, Tensor)]


@torch.no_grad()
def restore(state: State, base: Base, mover: torch.optim.Optimizer, average: Sequence[Tensor]) -> None:
    """Puts a state back; peak rates and weight decay stay those of the config.

    Raises:
        UserError: if the state is of other modules, or of another kind of optimizer.
    """
    own = weights(base)
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in state.weights.items()}:
        raise UserError(
            f"The state of step {state.step} is of other modules or ranks; put the config back, or start anew with --out FOLDER."
        )
    if len(average) != len(state.average) and average:
        raise UserError(f"The state of step {state.step} holds no average; put optimizer.ema back, or start anew with --out FOLDER.")
    for name, tensor in own.items():
        tensor.copy_(state.weights[name])
    for kept, tensor in zip(average, state.average, strict=False):
        kept.copy_(tensor)
    rates = [{key: group[key] for key in CURRENT if key in group} for group in mover.param_groups]
    try:
        mover.load_state_dict(state.optimizer)
    except (ValueError, KeyError) as problem:
        raise UserError(
            f"The state of step {state.step} is of another optimizer ({problem}); put [optimizer] back, or start anew with --out FOLDER."
        ) from problem
    for group, current in zip(mover.param_groups, rates, strict=True):
        group.update(current)
