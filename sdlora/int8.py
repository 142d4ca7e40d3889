"""Frozen linears in 8 bits: half the memory of bf16, for a base that would not fit otherwise.

Each row of W is kept as whole numbers from -127 to 127 and one step of its own, W ≈ step · codes, step = max|row| / 127: absmax
quantisation of rows (Dettmers et al. 2022, arXiv 2208.07339, section 2.1). In an answer the row is multiplied out into the number format of
the input, and once more on the way back, so the whole weight is there for one linear at a time. Only what stays frozen may be rounded:
adapters beside it stay in fp32, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314, equation 5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LARGEST = 127


class Int8Linear(nn.Linear):
    """A frozen linear whose weight lies in 8 bits; it is multiplied out for whoever asks for it, and not kept.

    Args:
        linear: the linear in whose place it stands; its weight [out, in] is not kept.
    """

    codes: Tensor
    steps: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # a linear's own would make a weight
        codes, steps = rounded(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("steps", steps)
        self.bias = linear.bias
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W [out, in] as it counts."""
        return whole(self.codes, self.steps, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """W x + b."""
        answer = self.product(x)
        return answer if self.bias is None else answer + self.bias

    def product(self, x: Tensor) -> Tensor:
        """W x, with a gradient to x for which nothing but the codes is kept."""
        made: Tensor = _Product.apply(x, self.codes, self.steps)  # type: ignore[no-untyped-call]
        return made


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, steps: Tensor) -> Tensor:
        ctx.save_for_backward(codes, steps)
        return F.linear(x, whole(codes, steps, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        codes, steps = ctx.saved_tensors
        return gradient @ whole(codes, steps, gradient.dtype), None, None


def kept(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """What a linear keeps of its weight: codes and steps, or the weight itself and None."""
    return (linear.codes, linear.steps) if isinstance(linear, Int8Linear) else (linear.weight, None)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as codes [out, in] in int8 and steps [out, 1] in fp32; a row of zeros has the step 0."""
    exact = weight.float()
    steps = exact.abs().amax(dim=1, keepdim=True) / LARGEST
    codes = torch.where(steps > 0, exact / steps, 0.0).round_().to(torch.int8)
    return codes, steps


def whole(codes: Tensor, steps: Tensor | None, dtype: torch.dtype) -> Tensor:
    """step · codes, multiplied in fp32 and rounded once to the format that is asked for; see `kept` for what has no steps."""
    if steps is None:
        return codes
    return torch.mul(codes, steps, out=torch.empty(codes.shape, dtype=dtype, device=codes.device))


def shrink(model: nn.Module) -> int:
    """Puts an `Int8Linear` into the place of each linear, one after the other.

    Returns:
        How many.
    """
    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Int8Linear(linear).train(linear.training))
    return len(linears)
