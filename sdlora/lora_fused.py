"""The same answers in fewer pieces: linears that see one input, their adapters, and the whole way back as one autograd function.

Written out, y = W x + b + s B A x is five operations and leaves autograd seven more and a sum for the way back. Here it is a product for
the base, one for all A's of linears with the same input (q, k and v of an attention), and one per B that adds onto the base's answer in
place; back, the gradients of the input are added up by the products themselves. x is kept once for all of them. Dropouts, DoRA,
convolutions and several adapters in one layer take the way that is written out, see `lora.LoRALayer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sdlora import int8


class Linear(NamedTuple):
    """A frozen linear with its update: W [out, in] or its codes, b [out] or None, A [r, in], B [out, r], s of s B A, and steps of codes."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scale: float
    steps: Tensor | None = None


def answers(x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
    """W x + b + s B A x of each linear (Hu et al. 2021, arXiv 2106.09685, section 4.1), with gradients to x, A and B.

    Args:
        x: [..., in], which all of them see; W, A and B have its dtype.
        linears: at least one.

    Returns:
        [..., out] of each.
    """
    downs = [one.down for one in linears]
    down = downs[0] if len(downs) == 1 else torch.cat(downs)
    ranks, scales = [len(one) for one in downs], tuple(one.scale for one in linears)
    frozen = [part for one in linears for part in (one.weight, one.steps, one.bias)]
    made: tuple[Tensor, ...] = _Together.apply(x, ranks, scales, down, *(one.up for one in linears), *frozen)  # type: ignore[no-untyped-call]
    return made


class _Together(torch.autograd.Function):
    """See `answers`: the linears' whole arithmetic there and back as one node of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: list[int], scales: tuple[float, ...], down: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        """W x + b + s B A x of each linear: one product for all A's, and each B adds onto its base's answer in place.

        Args:
            x: [..., in].
            ranks, scales: r and s of each linear.
            down: A's one below the other [Σ r, in].
            rest: the B's [out, r], then W [out, in], its steps or None, and b [out] or None of each linear in turn.

        Returns:
            [..., out] of each.
        """
        count = len(ranks)
        ups, weights, steps, biases = rest[:count], rest[count::3], rest[count + 1 :: 3], rest[count + 2 :: 3]
        rows = x.reshape(-1, x.shape[-1])
        hidden = torch.mm(rows, down.t())
        whole = (int8.whole(weight, step, x.dtype) for weight, step in zip(weights, steps, strict=True))  # type: ignore[arg-type]
        made = [F.linear(rows, weight, bias) for weight, bias in zip(whole, biases, strict=True)]
        for answer, part, up, scale in zip(made, _parts(hidden, ranks), ups, scales, strict=True):
            answer.addmm_(part, up.t(), alpha=scale)  # type: ignore[union-attr]
        ctx.save_for_backward(rows, hidden, down, *ups, *weights, *steps)
        ctx.ranks, ctx.scales, ctx.shape = ranks, scales, x.shape
        return tuple(answer.view(*x.shape[:-1], -1) for answer in made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """dx = Σ G W + H A, dA = Hᵀ x and dB = s Gᵀ (x Aᵀ), with H = s G B side by side [rows, Σ r] and G each answer's gradient.

        Args:
            gradients: G [..., out] of each linear's answer.

        Returns:
            One for each argument of `forward`: of x, A and each B where needed, else None.
        """
        rows, hidden, down, *rest = ctx.saved_tensors
        ranks, scales, count = ctx.ranks, ctx.scales, len(ctx.ranks)
        ups, weights, steps, needed = rest[:count], rest[count : 2 * count], rest[2 * count :], ctx.needs_input_grad
        flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        parts = _parts(hidden, ranks)
        if count == 1:
            inner = torch.addmm(hidden, flat[0], ups[0], beta=0, alpha=scales[0])
        else:
            inner = torch.empty_like(hidden)
            for part, gradient, up, scale in zip(_parts(inner, ranks), flat, ups, scales, strict=True):
                torch.addmm(part, gradient, up, beta=0, alpha=scale, out=part)
        to_x = None
        if needed[0]:
            to_x = torch.mm(flat[0], int8.whole(weights[0], steps[0], rows.dtype))
            for gradient, weight, step in zip(flat[1:], weights[1:], steps[1:], strict=True):
                to_x.addmm_(gradient, int8.whole(weight, step, rows.dtype))
            to_x = to_x.addmm_(inner, down).view(ctx.shape)
        to_down = torch.mm(inner.t(), rows) if needed[3] else None
        to_ups = [torch.addmm(ups[i], flat[i].t(), parts[i], beta=0, alpha=scales[i]) if needed[4 + i] else None for i in range(count)]
        return (to_x, None, None, to_down, *to_ups, *(None,) * (3 * count))


def _parts(hidden: Tensor, ranks: list[int]) -> Sequence[Tensor]:
    """The columns of each, by the operation itself: `torch.split` is a Python function around it, called thousands of times in a run."""
    return (hidden,) if len(ranks) == 1 else hidden.split_with_sizes(ranks, 1)
