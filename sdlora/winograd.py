"""3x3 convolutions of frozen weights with fewer multiplications, on processors in fp32, while a model is trained.

Four answers of a 3x3 filter that lie in a square share their inputs. Winograd's F(2 x 2, 3 x 3) (Lavin and Gray 2015, arXiv 1509.09308,
section 4.1) makes them of 16 products instead of 36: with d a square of 4 x 4 inputs and g the filter,

    y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A,

where A and B hold nothing but 0, 1 and -1, and the product ⊙, summed over channels, is one matrix product for each of the 16 places.
G g Gᵀ is formed once, as the weights are frozen; the way back is the same with the filters turned, for which it only changes places.
GPUs' libraries do this by themselves; the one for processors does not any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
TURNED = (3, 1, 2, 0)  # G of a filter read backwards has the same four rows in this order
LEAST_CHANNELS = 256  # below, sums and copies take longer than what is saved
MOST_KEPT_BYTES = 64 << 20  # of a convolution, 16 / 9 of its weights: those of 1,280 channels would take 2 GB of Stable Diffusion 1.5
STRIP_BYTES = 5 << 20  # of sixteen planes, so that they are still in the cache when they are multiplied


def use(model: nn.Module) -> int:
    """Lets those convolutions of a model answer in this way that it suits, while the model is trained.

    Returns:
        How many they are.
    """
    found = [one for one in model.modules() if isinstance(one, nn.Conv2d) and _suits(one)]
    for one in found:
        one.forward = partial(_forward, one, one.forward, filters(one.weight))  # type: ignore[method-assign]
    return len(found)


def _suits(one: nn.Conv2d) -> bool:
    form = (one.kernel_size, one.stride, one.padding, one.dilation, one.groups, one.padding_mode)
    plain = form == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and not one.weight.requires_grad
    kept_bytes = 64 * one.in_channels * one.out_channels
    return (
        plain
        and min(one.in_channels, one.out_channels) >= LEAST_CHANNELS
        and kept_bytes <= MOST_KEPT_BYTES
        and one.weight.dtype == torch.float32
        and one.weight.device.type == "cpu"
    )


def _forward(one: nn.Conv2d, usual: Callable[[Tensor], Tensor], kept: Tensor, x: Tensor) -> Tensor:
    """The convolution's answer; the usual way where it draws, since a LoRA may be folded into its weights then."""
    if not one.training or x.dtype != torch.float32 or x.shape[-1] % 2 or x.shape[-2] % 2:
        return usual(x)
    answer: Tensor = _Convolve.apply(x, kept, one.bias)  # type: ignore[no-untyped-call]
    return answer


@torch.no_grad()
def filters(weight: Tensor) -> Tensor:
    """G g Gᵀ of filters [out, in, 3, 3], as sixteen matrices [4, 4, out, in]; formed in fp64."""
    made = torch.einsum("ir,ocrs,js->ijoc", G, weight.double(), G)
    return made.to(weight.dtype).contiguous()


class _Convolve(torch.autograd.Function):
    """A convolution with padding 1, whose filters and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, bias: Tensor | None) -> Tensor:
        """Answers [B, out, H, W] to x [B, in, H, W].

        Args:
            kept: the `filters`.
        """
        ctx.kept = kept
        return convolved(x, kept, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient's convolution with the filters turned, whose outputs are the inputs."""
        return convolved(gradient, ctx.kept.transpose(2, 3), turned=True), None, None


def convolved(x: Tensor, kept: Tensor, bias: Tensor | None = None, *, turned: bool = False) -> Tensor:
    """x [B, in, H, W] convolved with filters, padded with a zero on each side.

    Args:
        x: H and W even.
        kept: the filters' sixteen matrices [4, 4, out, in].
        bias: [out], which is added.
        turned: with the filters read backwards.

    Returns:
        [B, out, H, W].
    """
    batch, wide, height, width = x.shape
    order = TURNED if turned else range(4)
    padded = F.pad(x, (1, 1, 1, 1)).transpose(0, 1)
    answer = x.new_empty(batch, len(kept[0, 0]), height // 2, 2, width // 2, 2)
    rows = max(1, min(height // 2, STRIP_BYTES // (8 * x.element_size() * wide * width)))
    for picture in range(batch):
        for top in range(0, height // 2, rows):
            strip = padded[:, picture, 2 * top : 2 * (top + rows) + 2]
            _strip(strip, kept, bias, order, answer[picture, :, top : top + rows])
    return answer.view(batch, -1, height, width)


def _strip(x: Tensor, kept: Tensor, bias: Tensor | None, order: Sequence[int], answer: Tensor) -> None:
    """Some rows of a picture.

    Args:
        x: [in, 2 R + 2, W + 2].
        order: where each row and column of Bᵀ d B meets its filters.
        answer: takes [out, R, 2, W / 2, 2].
    """
    out, rows, _, columns, _ = answer.shape
    places = x.new_empty(4, 4, len(x), rows, columns)
    for i, row in zip(order, _apart([x[:, i : i + 2 * rows - 1 : 2] for i in range(4)]), strict=True):
        _apart([row[:, :, j : j + 2 * columns - 1 : 2] for j in range(4)], into=[places[i, j] for j in order])
    products = torch.bmm(kept.flatten(0, 1), places.view(16, len(x), -1)).view(4, 4, out, rows, columns)
    if bias is not None:
        products[1, 1] += bias[:, None, None]  # the place that all four answers have once
    for below, parts in enumerate(_together([products[i] for i in order])):
        _together([parts[j] for j in order], into=[answer[:, :, below, :, beside] for beside in range(2)])


def _apart(d: Sequence[Tensor], into: Sequence[Tensor | None] = (None,) * 4) -> list[Tensor]:
    """Bᵀ d: (d₀ - d₂, d₁ + d₂, d₂ - d₁, d₁ - d₃)."""
    return [
        torch.sub(d[0], d[2], out=into[0]), torch.add(d[1], d[2], out=into[1]), torch.sub(d[2], d[1], out=into[2]),
        torch.sub(d[1], d[3], out=into[3]),
    ]  # fmt: skip


def _together(m: Sequence[Tensor], into: Sequence[Tensor | None] = (None, None)) -> list[Tensor]:
    """Aᵀ m: (m₀ + m₁ + m₂, m₁ - m₂ - m₃)."""
    return [torch.add(m[0] + m[1], m[2], out=into[0]), torch.sub(m[1] - m[2], m[3], out=into[1])]
