"""All A's and B's of a learning rate in one tensor: one optimizer step, one norm, one message between processes instead of hundreds.

Each adapter's weights stay where they are for everybody who reads them, as views into that tensor. Only the way of the gradient changes:
before a batch the tensor is cast once to the base's dtype and split into the factors that the adapters answer with, so autograd brings
all gradients back in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from sdlora.lora_adapters import Adapter


@dataclass(frozen=True)
class Flat:
    """Some weights in one.

    Args:
        whole: what is trained [Σ numbers], fp32.
        parts: its views, in order.
    """

    whole: nn.Parameter
    parts: tuple[nn.Parameter, ...]


def pack(weights: Sequence[nn.Parameter]) -> Flat:
    """Lays weights end to end in one tensor, of which they become views; they have no gradients of their own from then on."""
    flat = Flat(nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights])), tuple(weights))
    tie(flat)
    for weight in weights:
        weight.requires_grad_(False)
    return flat


def tie(flat: Flat) -> None:
    """Makes the parts views of the whole, also after both were moved to another device."""
    for part, place in zip(flat.parts, torch.split(flat.whole.detach(), _sizes(flat)), strict=True):
        part.data = place.view(part.shape)


@contextmanager
def spread(
    flats: Sequence[Flat], adapters: Sequence[Adapter], dtype: torch.dtype, *, wholes: Sequence[Tensor] | None = None
) -> Iterator[None]:
    """While it lasts the adapters answer with factors through which gradients reach the whole; that takes in the way back.

    Args:
        flats: none, and the adapters go on with their own weights.
        adapters: all whose weights are in them.
        dtype: of the base. Where adapters take differences or norms of their weights, all stay in fp32.
        wholes: what stands in the place of each flat's own numbers.
    """
    exact = any(not one.two_factors for one in adapters)

    @cache
    def views() -> dict[int, Tensor]:
        """Made when the first adapter answers."""
        found: dict[int, Tensor] = {}
        for flat, whole in zip(flats, wholes or [flat.whole for flat in flats], strict=True):
            pieces = torch.split(whole if exact else whole.to(dtype), _sizes(flat))
            found |= {id(part): piece.view(part.shape) for part, piece in zip(flat.parts, pieces, strict=True)}
        return found

    def factors(one: Adapter) -> tuple[Tensor, ...]:
        return tuple(views()[id(part)] for part in one._parameters.values() if part is not None)

    before = [one.current for one in adapters]
    try:
        for one in adapters if flats else ():
            one.say(factors)
        yield
    finally:
        for one, was in zip(adapters, before, strict=True):
            one.say(was)


def _sizes(flat: Flat) -> list[int]:
    return [part.numel() for part in flat.parts]
