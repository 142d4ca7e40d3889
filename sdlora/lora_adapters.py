"""What one adapter says beside its base: a low-rank update in training, plain or as one of its variants, or a fixed one from a file.

Both answer the same two questions: what they add to the base's answer, and what a file would hold of them (`export`). All bases
(linears, convolutions, norms) are linear in their weight and bias, so what ΔW adds is the base's own operation with ΔW in W's place, and
adapters add up. The variants compose: each changes the factors, the scale, the magnitude or what is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sdlora import deltas
from sdlora.deltas import LowRank, Update
from sdlora.errors import UserError
from sdlora.int8 import Int8Linear


@dataclass(frozen=True)
class Variant:
    """How adapters in training differ from plain LoRA.

    Args:
        rank_stabilised: scale by alpha / √r instead of alpha / r (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2).
        dora: also learn the magnitude of the weights that read each input (DoRA, Liu et al. 2024, arXiv 2402.09353, equation 5).
        init: "gaussian" (see `gaussian`) or "pissa" (see `principal`).
        network_dropout: share of the numbers of A x set to 0, from 0 to less than 1, as all three.
        rank_dropout: share of the ranks left out, drawn once for a batch; those that stay speak 1 / (1 - p) times as loud.
        module_dropout: how often the whole adapter is left out, drawn once for a batch.
    """

    rank_stabilised: bool = False
    dora: bool = False
    init: Literal["gaussian", "pissa"] = "gaussian"
    network_dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0


PLAIN = Variant()
Factors = Callable[["Adapter"], tuple[Tensor, ...]]


class Adapter(nn.Module):
    """One low-rank update that can be trained. Dropouts act in training mode only and draw from torch's own generators, so that
    gradient checkpointing can draw the same again.

    Args:
        down: A [r, in] (conv [r, in, k, k]).
        up: B [out, r] (conv [out, r, 1, 1]).
        alpha: the numerator of the scale.
        magnitude: DoRA's m per input [1, in, …], or None.
        relative: the base holds what A and B are now, and only B A - B₀ A₀ counts.
    """

    magnitude: nn.Parameter | None
    start_down: Tensor | None
    start_up: Tensor | None

    def __init__(
        self, down: Tensor, up: Tensor, *, alpha: float, magnitude: Tensor | None = None, variant: Variant = PLAIN, relative: bool = False
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(down.float())
        self.up = nn.Parameter(up.float())
        self.register_parameter("magnitude", None if magnitude is None else nn.Parameter(magnitude.float()))
        self.register_buffer("start_down", down.float().clone() if relative else None)
        self.register_buffer("start_up", up.float().clone() if relative else None)
        self.alpha, self.rank = alpha, len(down)  # the number of rows of A
        self.variant = variant
        self.strength = 1.0
        self.two_factors = magnitude is None and not relative  # this and the next are asked of every adapter in every step
        self.drops = max(variant.network_dropout, variant.rank_dropout, variant.module_dropout) > 0
        self.current: Factors | None = None  # gives A, B and, if there is one, m while `lora_flat.spread` lasts

    @property
    def is_plain(self) -> bool:
        """Whether it adds scale · B A x and does nothing else now."""
        return self.two_factors and not (self.training and self.drops)

    @property
    def scale(self) -> float:
        """What B A x is multiplied by: (alpha / r) · strength, or (alpha / √r) · strength."""
        return scale_of(self.rank, self.alpha, self.variant) * self.strength

    def answer(self, base: nn.Module, x: Tensor) -> Tensor:
        """What it adds to the base's answer to x: scale · B A x.

        With a magnitude, where W' x = W (g x) + ΔW (g x) for g = m / ‖W + ΔW‖, it adds strength · W ((g - 1) x) + scale · B A (g x):
        in bf16 a g of 1.001 would be 1, but its g - 1 is exact enough.
        """
        share = self.variant.module_dropout
        if self.training and share > 0 and torch.rand(()) < share:
            return self._nothing()
        if self.magnitude is None:
            return self._low_rank(base, x) * self.scale
        turned = x * (self._gain(base) - 1).to(x.dtype)
        return operate(base, turned) * self.strength + self._low_rank(base, x + turned) * self.scale

    def say(self, current: Factors | None) -> None:
        """Answers with what this gives, or with its own; set past `nn.Module`, which would ask each time whether it is a weight."""
        object.__setattr__(self, "current", current)

    def spoken(self) -> tuple[Tensor, Tensor]:
        """A and B as they count in an answer: those that `lora_flat` has handed out, or its own."""
        down, up, *_ = self._now()
        return self._counted(down, up)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as they count, in fp32."""
        return self._counted(self.down, self.up)

    def _now(self) -> tuple[Tensor, ...]:
        return self.current(self) if self.current else tuple(self.parameters())

    def _counted(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """A and B; if relative, [A; A - A₀] and [B - B₀, B₀], whose product is B A - B₀ A₀.

        The differences are taken in fp32 because the small steps of training would vanish from A and B themselves in bf16 or fp16.
        """
        if self.two_factors or self.start_down is None or self.start_up is None:
            return down, up
        return torch.cat([down, down - self.start_down]), torch.cat([up - self.start_up, self.start_up], dim=1)

    def low_rank(self) -> LowRank:
        """The factors with the alpha that gives them their scale by everyone's formula, alpha / r."""
        down, up = self.factors()
        stabilised = math.sqrt(self.rank) if self.variant.rank_stabilised else 1
        return LowRank(down, up, self.alpha * stabilised * (len(down) // self.rank))

    def _low_rank(self, base: nn.Module, x: Tensor) -> Tensor:
        """B A x in the dtype of x; gradients reach the fp32 weights through the cast."""
        down, up = (factor.to(x.dtype) for factor in self.spoken())
        if isinstance(base, nn.Conv2d):
            padding = base.padding if isinstance(base.padding, str) else tuple(base.padding)
            hidden = F.conv2d(x, down, None, base.stride, padding, base.dilation)
            return F.conv2d(self._dropped(hidden, channel=-3), up)
        return F.linear(self._dropped(F.linear(x, down), channel=-1), up)

    def _nothing(self) -> Tensor:
        """0 with gradients that are 0 and not missing, so that a step in which no module speaks is a step like any other."""
        return torch.stack([weight.sum() for weight in self._now()]).sum() * 0

    def _dropped(self, hidden: Tensor, *, channel: int) -> Tensor:
        """A x as it is outside training, else without what network and rank dropout take."""
        elements, ranks = self.variant.network_dropout, self.variant.rank_dropout
        if self.training and elements > 0:
            hidden = F.dropout(hidden, elements)
        if self.training and ranks > 0:
            kept = (torch.rand(self.rank, device=hidden.device) >= ranks) / (1 - ranks)
            kept = kept.repeat(hidden.shape[channel] // self.rank)  # a relative adapter has every rank twice
            hidden = hidden * kept.to(hidden.dtype).view(-1, *[1] * (-1 - channel))
        return hidden

    def _gain(self, base: nn.Module) -> Tensor:
        """g = m / ‖W + ΔW‖ for each input, the norm a constant to the gradient (Liu et al. 2024, section 4.3)."""
        weight = oriented(base, base_weight(base))
        with torch.no_grad():
            change = deltas.product(self.low_rank(), weight.shape)
            norm = deltas.norms(weight.float() + change, per_input=True)
        *_, magnitude = self._now()
        return (magnitude / norm).view(-1, *[1] * (weight.ndim - 2))


class Fixed(nn.Module):
    """An update of any form that is not trained, such as one from a file. It follows the model to other devices."""

    def __init__(self, update: Update) -> None:
        super().__init__()
        self.update = update
        self.strength = 1.0

    def answer(self, base: nn.Module, x: Tensor) -> Tensor:
        """What it adds to the base's answer to x: strength · (ΔW x + Δb)."""
        weight = oriented(base, base_weight(base))
        change = deltas.delta(self.update, weight)
        if change is None:
            change = torch.zeros_like(weight)
        bias = None if self.update.bias is None else self.update.bias * self.strength
        return operate(base, x, weight=oriented(base, change) * self.strength, bias=bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.update = deltas.mapped(self.update, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def export(adapter: Adapter | Fixed) -> Update:
    """What a file would hold of an adapter: an ordinary LoRA whatever the variant, with DoRA's magnitude if there is one.

    rsLoRA's scale becomes alpha · √r, and a PiSSA adapter of rank r one of rank 2r.
    """
    if isinstance(adapter, Fixed):
        return adapter.update
    return deltas.mapped(Update(adapter.low_rank(), adapter.magnitude), Tensor.detach)


def scale_of(rank: int, alpha: float, variant: Variant) -> float:
    """alpha / r, or alpha / √r if rank-stabilised."""
    return alpha / (math.sqrt(rank) if variant.rank_stabilised else rank)


def fresh(weight: Tensor, *, name: str, rank: int, alpha: float, variant: Variant, generator: torch.Generator) -> Adapter:
    """An adapter that does not change the module's answers yet.

    Args:
        weight: the module's W [out, in, …].
        name: of the module, for the error.

    Raises:
        UserError: if PiSSA is to find more directions than the weight has.
    """
    directions = min(len(weight), math.prod(weight.shape[1:]))
    relative = variant.init == "pissa"
    if relative and rank > directions:
        raise UserError(f"PiSSA cannot start '{name}' at rank {rank}: it has {directions} directions; give it a lower rank by an override.")
    down, up = principal(weight, rank, scale_of(rank, alpha, variant)) if relative else gaussian(weight, rank, generator)
    magnitude = deltas.norms(weight.float(), per_input=True) if variant.dora else None
    return Adapter(down, up, alpha=alpha, magnitude=magnitude, variant=variant, relative=relative)


def gaussian(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A from N(0, (1/r)²) and B = 0: a Gaussian and zeros as in the LoRA paper, section 4.1; 1/r is PEFT's "gaussian"."""
    down = torch.randn(rank, *weight.shape[1:], generator=generator) / rank
    return down, torch.zeros(len(weight), rank, *[1] * (weight.ndim - 2))


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A = √(S / scale) Vᵀ and B = U √(S / scale) of the r largest singular triples: scale · B A is the best rank-r part of W.

    PiSSA: Meng et al. 2024, arXiv 2404.02948, equations 2 and 3. Their base keeps the rest; here W stays whole and B₀ A₀ is taken off.
    """
    left, values, right = torch.linalg.svd(weight.float().flatten(1), full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    down = (root[:, None] * right[:rank]).reshape(rank, *weight.shape[1:])
    return down, (left[:, :rank] * root).reshape(len(weight), rank, *[1] * (weight.ndim - 2))


def continued(update: Update, weight: Tensor, *, name: str, variant: Variant) -> Adapter:
    """An adapter that says what an existing LoRA says, with its rank and scale.

    Args:
        weight: the module's W [out, in, …].
        name: of the module, for errors.

    Raises:
        UserError: if the update does not fit, or is of a form that is not trained here.
    """
    one, where = update.change, f"Training cannot go on from the LoRA's module '{name}'"
    if not isinstance(one, LowRank) or one.core is not None or update.bias is not None:
        raise UserError(f"{where}: it is more than two factors A and B, and only those are trained; start from another file.")
    if reason := deltas.misfit(update, weight, bias=None):
        raise UserError(f"{where}: it {reason}.")
    if update.magnitude is not None and not (variant.dora and update.magnitude.numel() == update.magnitude.shape[1]):
        raise UserError(f"{where}: it has DoRA magnitudes {list(update.magnitude.shape)}; with dora on, those per input can be trained.")
    trailing = [1] * (weight.ndim - 2)
    down, up = one.down.clone().reshape(one.rank, *weight.shape[1:]), one.up.clone().reshape(len(weight), one.rank, *trailing)
    magnitude = None
    if variant.dora:
        whole = weight.float() + deltas.product(one, weight.shape)
        magnitude = deltas.norms(whole, per_input=True) if update.magnitude is None else update.magnitude
        magnitude = magnitude.clone().reshape(1, -1, *trailing)
    alpha = one.alpha / math.sqrt(one.rank) if variant.rank_stabilised else one.alpha
    return Adapter(down, up, alpha=alpha, magnitude=magnitude, variant=variant)


def operate(base: nn.Module, x: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The base's own operation on x, with another weight if one is given, and with this bias or none instead of its own."""
    if isinstance(base, Int8Linear):  # its weight is none that could be replaced
        product = base.product(x) if weight is None else F.linear(x, weight.to(x.dtype))
        return product if bias is None else product + bias.to(x.dtype)
    values = {} if weight is None else {"weight": weight.to(base_weight(base).dtype)}
    if isinstance(base.bias, Tensor):
        values["bias"] = torch.zeros_like(base.bias) if bias is None else bias.to(base.bias.dtype)
    answer: Tensor = functional_call(base, values, (x,))
    return answer


def base_weight(module: nn.Module) -> Tensor:
    """The weight of a module that can be wrapped."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def oriented(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight as [out, in, …], or one of that form as the module keeps it: the same swap both ways, for `Conv1D` alone."""
    return weight.T if is_transposed(module) else weight


def is_transposed(module: nn.Module) -> bool:
    """transformers' `Conv1D` keeps its weight as [in, out]; known by name, so that this file needs no transformers."""
    return type(module).__name__ == "Conv1D"
