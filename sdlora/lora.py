"""The low-rank layer, and the verbs that put it into any PyTorch model: add, parameters, strength, fold.

LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): the trained weight W stays frozen, two small matrices are learned, and the
layer answers h = W x + b + (alpha / r) · strength · B A x. The layer wraps the original module, which stays whole as `.base`;
several named adapters can sit in one layer. Adapter weights are fp32 whatever the base's dtype: Adam's small steps vanish in bf16.
Nothing here knows of diffusion; names of modules are all that selects them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.errors import UserError


class Adapter(nn.Module):
    """One low-rank update: `down` is A [r, in] (conv [r, in, k, k]), `up` is B [out, r] (conv [out, r, 1, 1])."""

    def __init__(self, down: Tensor, up: Tensor, *, alpha: float) -> None:
        super().__init__()
        self.down = nn.Parameter(down.float())
        self.up = nn.Parameter(up.float())
        self.alpha = alpha
        self.strength = 1.0

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What B A x is multiplied by: (alpha / r) · strength."""
        return self.alpha / self.rank * self.strength


class LoRALayer(nn.Module):
    """Wraps a linear or convolution: the base's answer plus that of each adapter.

    Args:
        base: an `nn.Linear`, an `nn.Conv2d` without groups, or transformers' `Conv1D` (a linear whose weight is stored transposed).
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.pristine: Tensor | None = None  # the base's own weight while deltas are folded into it

    def forward(self, x: Tensor) -> Tensor:
        """h = base(x) + Σ scale · B A x; not asked while folded, see `fold`."""
        answer: Tensor = self.base(x)
        for adapter in self.each_adapter():
            if adapter.strength != 0:
                answer = answer + self._low_rank(adapter, x) * adapter.scale
        return answer

    def each_adapter(self) -> Iterator[Adapter]:
        """The adapters in the order in which they were added."""
        for adapter in self.adapters.values():
            assert isinstance(adapter, Adapter)
            yield adapter

    def _low_rank(self, adapter: Adapter, x: Tensor) -> Tensor:
        """B A x in the dtype of x; gradients reach the fp32 weights through the cast."""
        down, up = adapter.down.to(x.dtype), adapter.up.to(x.dtype)
        if isinstance(self.base, nn.Conv2d):
            conv = self.base
            padding = conv.padding if isinstance(conv.padding, str) else tuple(conv.padding)
            return F.conv2d(F.conv2d(x, down, None, conv.stride, padding, conv.dilation), up)
        return F.linear(F.linear(x, down), up)

    def delta(self, adapter: Adapter) -> Tensor:
        """scale · B A in the base weight's own shape, fp32."""
        product = adapter.up.flatten(1) @ adapter.down.flatten(1) * adapter.scale
        weight = base_weight(self.base)
        return product.T if _is_transposed(self.base) else product.reshape(weight.shape)


def base_weight(module: nn.Module) -> Tensor:
    """The weight of a module that can be wrapped."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _is_transposed(module: nn.Module) -> bool:
    """transformers' `Conv1D` keeps its weight as [in, out]; known by name, so that this file needs no transformers."""
    return type(module).__name__ == "Conv1D"


def can_wrap(module: nn.Module) -> bool:
    """Whether a LoRA layer knows how to stand before this module."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1) or _is_transposed(module)


def layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers of a model by the name of the module that each wraps."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def places(model: nn.Module) -> list[str]:
    """Names of all modules that carry or could carry a LoRA layer."""
    inside = tuple(f"{name}." for name in layers(model))
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, LoRALayer) or can_wrap(module)) and not name.startswith(inside)
    ]


def matching(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Names of the modules that can be wrapped and match any of the patterns (`*` and `?` as in file names).

    Raises:
        UserError: if a pattern matches nothing.
    """
    names = places(model)
    chosen: set[str] = set()
    for pattern in targets:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise UserError(f"LoRA target '{pattern}' matches none of the {len(names)} linear and conv modules, such as '{names[0]}'.")
        chosen |= found
    return [name for name in names if name in chosen]


def wrap(model: nn.Module, name: str) -> LoRALayer:
    """The LoRA layer at `name`, put there if it is not yet, with everything else of the module frozen."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module = getattr(parent, child)
    if isinstance(module, LoRALayer):
        return module
    layer = LoRALayer(module)
    layer.train(module.training)
    setattr(parent, child, layer)
    return layer


def add(
    model: nn.Module, *, rank: int, alpha: float, targets: Iterable[str], generator: torch.Generator, adapter: str = "default"
) -> list[str]:
    """Freezes the model and adds a fresh adapter to each matching module: the model's answers do not change yet.

    A is drawn from N(0, (1/r)²) and B is zero: the LoRA paper, section 4.1, asks for a Gaussian A and a zero B; the deviation 1/r
    is that of PEFT's `init_lora_weights="gaussian"`.

    Args:
        rank: r, at least 1.
        alpha: the update is scaled by alpha / r.
        targets: patterns for names of modules.
        generator: a CPU generator; modules draw from it in the order in which the model names them.
        adapter: a name, if more than one adapter is to sit in the model.

    Returns:
        The names of the wrapped modules.

    Raises:
        UserError: if a pattern matches nothing.
    """
    model.requires_grad_(False)
    names = matching(model, targets)
    for name in names:
        layer = wrap(model, name)
        weight = base_weight(layer.base)
        out_in = weight.shape[::-1] if _is_transposed(layer.base) else weight.shape
        down = torch.randn(rank, *out_in[1:], generator=generator) / rank
        up = torch.zeros(out_in[0], rank, *[1] * (weight.ndim - 2))
        layer.adapters[adapter] = Adapter(down, up, alpha=alpha).to(weight.device)
    return names


def parameters(model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
    """The trainable weights of one adapter, A and B of each layer in turn."""
    found = [layer.adapters[adapter] for layer in layers(model).values() if adapter in layer.adapters]
    return [weight for one in found for weight in one.parameters()]


def set_strength(model: nn.Module, strength: float, adapter: str = "default") -> None:
    """Sets how strongly one adapter speaks: 0 gives the base's exact answer, 1 what was trained, negative values the opposite."""
    for layer in layers(model).values():
        if adapter in layer.adapters:
            one = layer.adapters[adapter]
            assert isinstance(one, Adapter)
            one.strength = strength


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Adds all adapters into the weights, W + Σ scale · B A, so that answering costs what the base costs.

    The sum is formed in fp32 from the pristine weight and rounded once; folding again after a change of strength starts from the
    pristine weight too, so nothing drifts.
    """
    for layer in layers(model).values():
        weight = base_weight(layer.base)
        if layer.pristine is None:
            layer.pristine = weight.detach().clone()
            layer.forward = layer.base.forward  # type: ignore[method-assign]  # no call more than the base's: 1.00 of its time, not 1.03
        active = [adapter for adapter in layer.each_adapter() if adapter.strength != 0]
        total = layer.pristine.float() if active else layer.pristine
        for adapter in active:
            total = total + layer.delta(adapter)
        weight.copy_(total)


@torch.no_grad()
def unfold(model: nn.Module) -> None:
    """Puts the base's exact bytes back; the adapters speak beside it again."""
    for layer in layers(model).values():
        if layer.pristine is not None:
            base_weight(layer.base).copy_(layer.pristine)
            layer.pristine = None
            del layer.forward


def remove(model: nn.Module) -> None:
    """Takes every LoRA layer out again and leaves the model as it was."""
    unfold(model)
    for name, layer in layers(model).items():
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, layer.base)
