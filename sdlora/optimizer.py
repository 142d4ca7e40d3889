"""The optimizer and the course of its learning rate.

AdamW in its fused form is the default and needs nothing more. The others come from their authors' packages or from transformers and are
only imported when chosen. The authors' own three small packages (75 kB) were taken before one large collection: the collection's Prodigy
silently uses the first group's rate for all groups and keeps tensors among its settings, which a checkpoint in JSON cannot hold.
Rates are set before each step from a pure function of the step, so a resumed run needs no state for them.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from sdlora.errors import UserError

Group = tuple[list[nn.Parameter], float]
Row = dict[str, Any]


def adamw(groups: list[Group], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with one peak rate per group of weights.

    Args:
        groups: weights with their peak learning rates; empty groups are left out.
    """
    return torch.optim.AdamW(_rows(groups), weight_decay=weight_decay, fused=True)


def _rows(groups: Sequence[Group]) -> list[Row]:
    return [{"params": weights, "lr": rate, "peak": rate} for weights, rate in groups if weights]


def _adamw_8bit(groups: Sequence[Group], weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with its averages in 8 bits (Dettmers et al. 2022, arXiv 2110.02861); tensors below 4,096 numbers keep 32."""
    optim = _package("bitsandbytes.optim", name="adamw8bit", extra="8bit")
    return cast(torch.optim.Optimizer, optim.AdamW8bit(_rows(groups), weight_decay=weight_decay))


def _adafactor(groups: Sequence[Group], weight_decay: float) -> torch.optim.Optimizer:
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235, algorithm 4) at the rates given.

    Not scaled by the size of the weights as in torch's form: B starts at 0 and would learn at a thousandth of the rate.
    """
    optim = importlib.import_module("transformers.optimization")  # seconds, so only when chosen
    rows = _rows(groups)
    return cast(torch.optim.Optimizer, optim.Adafactor(rows, weight_decay=weight_decay, scale_parameter=False, relative_step=False))


def _lion(groups: Sequence[Group], weight_decay: float) -> torch.optim.Optimizer:
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): the sign of an average, so every number moves by the rate."""
    package = _package("lion_pytorch", name="lion", extra="optimizers")
    return cast(torch.optim.Optimizer, package.Lion(_rows(groups), weight_decay=weight_decay))


def _prodigy(groups: Sequence[Group], weight_decay: float) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko & Defazio 2024, arXiv 2306.06101) as its authors advise for diffusion models; it finds one rate for all."""
    package = _package("prodigyopt", name="prodigy", extra="optimizers")
    moving = [row for row in _rows(groups) if row["lr"] > 0]  # its weight decay would move the others all the same
    rates = sorted({row["lr"] for row in moving})
    if len(rates) > 1:
        told = " and ".join(f"{rate:g}" for rate in rates)
        raise UserError(f"Optimizer 'prodigy' finds one rate for all weights, but {told} were asked for; give all the same, usually 1.")
    with redirect_stdout(io.StringIO()):  # it prints that weight decay is decoupled
        made = package.Prodigy(moving, weight_decay=weight_decay, safeguard_warmup=True, use_bias_correction=True)
    return cast(torch.optim.Optimizer, made)


def _schedule_free(groups: Sequence[Group], weight_decay: float) -> torch.optim.Optimizer:
    """Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682), ready to step; what it hands over is seen within `settled`."""
    package = _package("schedulefree", name="schedule_free", extra="optimizers")
    made = package.AdamWScheduleFree(_rows(groups), weight_decay=weight_decay)
    made.train()
    return cast(torch.optim.Optimizer, made)


def _package(module: str, *, name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"Optimizer '{name}' needs the package {package}, which cannot be imported here ({error}); "
            f"install it with: pip install 'sdlora[{extra}]', or choose 'adamw'."
        ) from error


@dataclass(frozen=True)
class Kind:
    """One of the optimizers to choose from.

    Args:
        make: from groups and weight decay to the optimizer.
        schedules: keys of `SCHEDULES` that make sense with it; the usual one first.
        rate: its usual peak rate as a multiple of AdamW's; None if the usual rate is 1 whatever AdamW's is.
        state: 4-byte numbers that it keeps per trained number of a LoRA, for a forecast of memory (measured at rank 16, width 640).
        shapeless: whether it treats each number by itself, so that weights may be laid end to end.
    """

    make: Callable[[Sequence[Group], float], torch.optim.Optimizer]
    schedules: tuple[str, ...]
    rate: float | None
    state: float
    shapeless: bool = True


@dataclass(frozen=True)
class Shape:
    """What some schedules leave open.

    Args:
        cycles: how many half cosines "cosine_with_restarts" has, at least 1.
        power: of "polynomial"; 1 is linear, more falls earlier.
        decay: share of the steps after the warm-up in which "warmup_stable_decay" falls, above 0, at most 1.
    """

    cycles: int = 1
    power: float = 1.0
    decay: float = 0.2


PLAIN = Shape()


def constant(done: int, total: int, shape: Shape) -> float:
    """1."""
    return 1.0


def cosine(done: int, total: int, shape: Shape) -> float:
    """(1 + cos(π p)) / 2 (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5)."""
    return 0.5 * (1 + math.cos(math.pi * done / total))


def cosine_with_restarts(done: int, total: int, shape: Shape) -> float:
    """(1 + cos(π (n p mod 1))) / 2: n half cosines of equal length (Loshchilov & Hutter 2017, equation 5)."""
    return 0.5 * (1 + math.cos(math.pi * (shape.cycles * done % total) / total))


def linear(done: int, total: int, shape: Shape) -> float:
    """1 - p."""
    return 1 - done / total


def polynomial(done: int, total: int, shape: Shape) -> float:
    """(1 - p)^power."""
    return float((1 - done / total) ** shape.power)


def warmup_stable_decay(done: int, total: int, shape: Shape) -> float:
    """1, then 1 - √q over the last steps, q being the share of these (Hägele et al. 2024, arXiv 2405.18392)."""
    falling = max(1, round(total * shape.decay))
    return 1 - math.sqrt(max(0, done - (total - falling)) / falling)


def rex(done: int, total: int, shape: Shape) -> float:
    """(1 - p) / (1/2 + (1 - p) / 2): high for long, then falling fast (Chen et al. 2021, arXiv 2107.04197)."""
    return (1 - done / total) / (0.5 + 0.5 * (1 - done / total))


# The share of the peak rate after `done` of `total` steps, warm-up not counted: p = done / total, from 0 to below 1.
SCHEDULES: dict[str, Callable[[int, int, Shape], float]] = {
    "constant": constant,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "linear": linear,
    "polynomial": polynomial,
    "warmup_stable_decay": warmup_stable_decay,
    "rex": rex,
}
_ALL = ("cosine", *(name for name in SCHEDULES if name != "cosine"))
_NO_RESTART = tuple(name for name in _ALL if name != "cosine_with_restarts")  # Prodigy's authors advise against restarts

OPTIMIZERS: dict[str, Kind] = {
    "adamw": Kind(lambda groups, weight_decay: adamw(list(groups), weight_decay=weight_decay), _ALL, 1.0, 2.0),
    "adamw8bit": Kind(_adamw_8bit, _ALL, 1.0, 0.56),
    "adafactor": Kind(_adafactor, _ALL, 1.0, 0.06, shapeless=False),
    "lion": Kind(_lion, _ALL, 0.2, 1.0),  # "3-10x smaller", Chen et al. 2023, section 5
    "prodigy": Kind(_prodigy, _NO_RESTART, None, 3.5),
    "schedule_free": Kind(_schedule_free, ("constant",), 1.0, 2.0),
}


def make(name: str, groups: Sequence[Group], *, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer of this name, with each group's peak rate kept beside its rate for `set_rates`.

    Args:
        name: a key of `OPTIMIZERS`.
        groups: weights with their peak learning rates; empty groups are left out.

    Raises:
        UserError: if its package is not installed, or it cannot give groups rates of their own.
    """
    return OPTIMIZERS[name].make(groups, weight_decay)


def check_schedule(name: str, schedule: str) -> None:
    """Whether a schedule makes sense with an optimizer.

    Raises:
        UserError: if it does not.
    """
    fitting = OPTIMIZERS[name].schedules
    if schedule not in fitting:
        raise UserError(f"Schedule '{schedule}' does not go with optimizer '{name}'; choose {' or '.join(map(repr, fitting))}.")


def with_ratio(groups: Sequence[Group], *, ups: Collection[nn.Parameter], ratio: float) -> list[Group]:
    """LoRA+: the matrices B learn `ratio` times as fast as the rest of their group (Hayou et al. 2024, arXiv 2402.12354).

    Args:
        groups: weights with their peak learning rates.
        ups: the matrices B among them.
        ratio: λ, about 16 in the paper for language models; at 1 the groups stay as they are.
    """
    if ratio == 1:
        return list(groups)
    fast = {id(weight) for weight in ups}
    split = [
        ([w for w in weights if (id(w) in fast) is up], rate * (ratio if up else 1)) for weights, rate in groups for up in (False, True)
    ]
    return [(weights, rate) for weights, rate in split if weights]


def rate_factor(step: int, *, steps: int, warmup: float, schedule: str, shape: Shape = PLAIN) -> float:
    """The share of the peak rate at a step: rises linearly over the warm-up, then goes as the schedule says.

    Args:
        step: 0 for the first.
        warmup: share of `steps`.
        schedule: a key of `SCHEDULES`.
    """
    rising = round(steps * warmup)
    if step < rising:
        return (step + 1) / rising
    return SCHEDULES[schedule](step - rising, max(1, steps - rising), shape)


def set_rates(optimizer: torch.optim.Optimizer, factor: float, *, text: float = 1.0) -> None:
    """Sets each group's rate to its peak times the factor.

    Args:
        text: another factor for groups that say `text`; 0 lets the text encoders stand still.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor * (text if group.get("text") else 1.0)


def leave_out(optimizer: torch.optim.Optimizer, bad: torch.Tensor) -> bool:
    """Tells the optimizer to leave out its next step if `bad` is not 0, without waiting to know whether it is.

    Fused optimizers of torch read such a number on the device, as they do for its loss scaler, and touch neither weights nor state.

    Args:
        bad: [] fp32, 0 or 1.

    Returns:
        Whether it can; if not, look at `bad` before the step.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        return False
    optimizer.found_inf = bad  # type: ignore[attr-defined]  # torch's own protocol, see torch.amp.GradScaler
    return True


@contextmanager
def settled(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While it lasts the weights are those to draw with and to save; afterwards they are, to the bit, those that are trained.

    Schedule-free AdamW takes gradients at y and hands over its average x; its own way back from x to y is rounded, so y is kept.
    All others hand over what they train, and nothing happens.
    """
    if not any(group.get("train_mode") for group in optimizer.param_groups):
        yield
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    trained = [weight.detach().clone() for weight in weights]
    own: Any = optimizer  # torch's class has neither eval nor train
    own.eval()
    try:
        yield
    finally:
        own.train()
        with torch.no_grad():
            for weight, kept in zip(weights, trained, strict=True):
                weight.copy_(kept)
