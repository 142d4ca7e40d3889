"""The LoRA layer, and the verbs that put it into any PyTorch model: add, attach, parameters, strength, fold.

LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): the trained weight W stays frozen, two small matrices are learned, and the
layer answers h = W x + b + (alpha / r) · strength · B A x. The layer wraps the original module, which stays whole as `.base`;
several named adapters can sit in one layer. Adapter weights are fp32 whatever the base's dtype: Adam's small steps vanish in bf16.
Nothing here knows of diffusion; names of modules are all that selects them. What an adapter says is in `lora_adapters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sdlora import deltas, int8, lora_fused
from sdlora.deltas import Full, Update
from sdlora.errors import UserError
from sdlora.lora_adapters import PLAIN, Fixed, continued, fresh, is_transposed, oriented
from sdlora.lora_adapters import Adapter as Adapter
from sdlora.lora_adapters import Variant as Variant
from sdlora.lora_adapters import base_weight as base_weight
from sdlora.lora_adapters import export as export


class LoRALayer(nn.Module):
    """Wraps a module: the base's answer plus that of each adapter.

    Args:
        base: an `nn.Linear`, an `nn.Conv2d` without groups, or transformers' `Conv1D` (a linear whose weight is stored transposed);
            for fixed updates also an `nn.LayerNorm` or `nn.GroupNorm`.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.pristine: Tensor | None = None  # the base's own weight while deltas are folded into it
        self.pristine_bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """h = base(x) + Σ what each adapter adds; not asked while folded, see `fold`."""
        if plain := self._plain(x):
            return lora_fused.answers(x, [plain])[0]
        answer: Tensor = self.base(x)
        for adapter in self.voices():
            if adapter.strength != 0:
                answer = answer + adapter.answer(self.base, x)
        return answer

    def _plain(self, x: Tensor) -> lora_fused.Linear | None:
        """Its weights, if it is a linear with one adapter that does nothing special, so that the short way can be taken."""
        base, voices = self.base, self.adapters._modules  # each look through `nn.Module` costs a microsecond, so there are few
        if len(voices) != 1 or not isinstance(base, nn.Linear):
            return None
        (one,), (weight, steps) = voices.values(), int8.kept(base)
        if (steps is None and x.dtype != weight.dtype) or not isinstance(one, Adapter) or not one.is_plain or one.strength == 0:
            return None
        down, up = one.spoken()
        return lora_fused.Linear(weight, base.bias, down.to(x.dtype), up.to(x.dtype), one.scale, steps)

    def voices(self) -> Iterator[Adapter | Fixed]:
        """All adapters in the order in which they were added."""
        return (self.voice(name) for name in self.adapters)

    def voice(self, name: str) -> Adapter | Fixed:
        """The adapter of this name."""
        adapter = self.adapters[name]
        assert isinstance(adapter, (Adapter, Fixed))
        return adapter

    def each_adapter(self) -> Iterator[Adapter]:
        """Those that can be trained."""
        return (adapter for adapter in self.voices() if isinstance(adapter, Adapter))


def together(x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """What each of some modules answers to the same input; those that can, at once."""
    plain = [module._plain(x) if isinstance(module, LoRALayer) else None for module in modules]
    found = [one for one in plain if one is not None]
    if len(found) < len(modules):
        return tuple(module(x) for module in modules)
    return lora_fused.answers(x, found)


@dataclass(frozen=True)
class Override:
    """Another rank or alpha for the modules whose names match a pattern (`*` and `?` as in file names); None leaves it as it is."""

    pattern: str
    rank: int | None = None
    alpha: float | None = None


def can_wrap(module: nn.Module) -> bool:
    """Whether a low-rank update of this module can be trained."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1) or is_transposed(module)


def can_attach(module: nn.Module) -> bool:
    """Whether a fixed update can stand beside this module: what can be wrapped, and norms that have a weight."""
    return can_wrap(module) or (isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and module.weight is not None)


def layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers of a model by the name of the module that each wraps."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def places(model: nn.Module, *, norms: bool = False) -> list[str]:
    """Names of all modules that carry or could carry a low-rank update, or with `norms` any update of a file."""
    inside = tuple(f"{name}." for name in layers(model))
    suits = can_attach if norms else can_wrap
    return [name for name, module in model.named_modules() if suits(_bare(module)) and not name.startswith(inside)]


def _bare(module: nn.Module) -> nn.Module:
    """The module itself, without a LoRA layer around it."""
    return module.base if isinstance(module, LoRALayer) else module


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


def rank_and_alpha(name: str, *, rank: int, alpha: float, overrides: Sequence[Override] = ()) -> tuple[int, float]:
    """The rank and the alpha of one module: of the overrides that match its name, the last that gives a value counts."""
    for one in overrides:
        if fnmatchcase(name, one.pattern):
            rank = rank if one.rank is None else one.rank
            alpha = alpha if one.alpha is None else one.alpha
    return rank, alpha


def add(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Iterable[str],
    generator: torch.Generator,
    adapter: str = "default",
    variant: Variant = PLAIN,
    overrides: Sequence[Override] = (),
    start_from: Mapping[str, Update] | None = None,
) -> list[str]:
    """Freezes the model and adds an adapter to each matching module: fresh ones do not change the model's answers yet.

    Args:
        rank: r, at least 1.
        alpha: the update is scaled by alpha / r.
        targets: patterns for names of modules.
        generator: a CPU generator; modules draw from it in the order in which the model names them.
        adapter: a name, if more than one adapter is to sit in the model.
        variant: how the adapters differ from plain LoRA. Dropouts speak while the model is in training mode.
        overrides: other ranks and alphas for some modules.
        start_from: low-rank updates by module name, in the place of fresh ones and with their own ranks and alphas.

    Returns:
        The names of the wrapped modules.

    Raises:
        UserError: if a pattern matches nothing, or `start_from` names a module that is not to be trained or cannot be.
    """
    model.requires_grad_(False)
    names, start = matching(model, targets), start_from or {}
    _refuse_idle(names, overrides, start)
    for name in names:
        layer = wrap(model, name)
        weight = oriented(layer.base, base_weight(layer.base))
        if name in start:
            one = continued(start[name], weight, name=name, variant=variant)
        else:
            own_rank, own_alpha = rank_and_alpha(name, rank=rank, alpha=alpha, overrides=overrides)
            one = fresh(weight, name=name, rank=own_rank, alpha=own_alpha, variant=variant, generator=generator)
        layer.adapters[adapter] = one.to(weight.device).train(layer.training)
    return names


def _refuse_idle(names: list[str], overrides: Sequence[Override], start: Mapping[str, Update]) -> None:
    """Nothing that a person asked for is left out silently."""
    for one in overrides:
        if not any(fnmatchcase(name, one.pattern) for name in names):
            raise UserError(f"LoRA override '{one.pattern}' matches none of the {len(names)} modules to train, such as '{names[0]}'.")
    if idle := sorted(set(start) - set(names)):
        raise UserError(
            f"{len(idle)} of the {len(start)} modules of the LoRA to go on from, such as '{idle[0]}', "
            f"are not among the {len(names)} to train, such as '{names[0]}'; choose targets that hold them."
        )


def misfit(model: nn.Module, name: str, update: Update) -> str | None:
    """Why an update cannot be attached to a module, in words that go on after its name; None if it fits."""
    module = _bare(model.get_submodule(name))
    if not can_attach(module):
        return f"is for a module of type {type(module).__name__} in the base, and only linears, convolutions and norms can be changed"
    assert module.bias is None or isinstance(module.bias, Tensor)
    return deltas.misfit(update, oriented(module, base_weight(module)), bias=module.bias)


def attach(model: nn.Module, name: str, update: Update, *, adapter: str) -> None:
    """Puts an update of any form beside the module `name`, at strength 1; it is not trained.

    Args:
        adapter: the name by which its strength is set.

    Raises:
        UserError: if it does not fit, see `misfit`.
    """
    if reason := misfit(model, name, update):
        raise UserError(f"LoRA module '{name}' {reason}.")
    layer = wrap(model, name)
    layer.adapters[adapter] = Fixed(update).to(base_weight(layer.base).device)


def exports(model: nn.Module, adapter: str = "default") -> dict[str, Update]:
    """What a file would hold of one adapter, by module name."""
    return {name: export(one) for name, one in _named(model, adapter).items()}


def parameters(model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
    """The trainable weights of one adapter: A, B and, with DoRA, m of each layer in turn."""
    return [weight for one in _named(model, adapter).values() for weight in one.parameters()]


def _named(model: nn.Module, adapter: str) -> dict[str, Adapter | Fixed]:
    """One adapter's part in each layer that has it, by module name."""
    return {name: layer.voice(adapter) for name, layer in layers(model).items() if adapter in layer.adapters}


def set_strength(model: nn.Module, strength: float, adapter: str = "default") -> None:
    """Sets how strongly one adapter speaks: 0 gives the base's exact answer, 1 what was trained, negative values the opposite."""
    for one in _named(model, adapter).values():
        one.strength = strength


def silence(model: nn.Module) -> None:
    """Sets the strength of all adapters to 0."""
    for layer in layers(model).values():
        for one in layer.voices():
            one.strength = 0.0


@torch.no_grad()
def fold(model: nn.Module, *, aside: torch.device | None = None) -> None:
    """Adds all adapters into the weights and biases, W + Σ strength · ΔW, so that answering costs what the base costs.

    The sum is formed in fp32 from the pristine weight and rounded once, also when it is folded already, so nothing drifts. An fp32
    weight is written as the sum grows, without being put back first. Beside weights in 8 bits, which have no room for a sum, adapters go on
    speaking as they did.

    Args:
        aside: where the pristine weights are kept, if not beside the others.
    """
    for layer in layers(model).values():
        if isinstance(layer.base, int8.Int8Linear):
            continue
        weight, bias = base_weight(layer.base), layer.base.bias
        if layer.pristine is None:
            layer.pristine = weight.detach().to(aside or weight.device, copy=True)
            layer.pristine_bias = bias.detach().to(aside or bias.device, copy=True) if isinstance(bias, Tensor) else None
            layer.forward = layer.base.forward  # type: ignore[method-assign]  # no call more than the base's: 1.00 of its time, not 1.03
        active = [(export(one), one.strength) for one in layer.voices() if one.strength != 0]
        _write_sum(oriented(layer.base, weight), oriented(layer.base, layer.pristine.to(weight.device)), active)
        if isinstance(bias, Tensor) and layer.pristine_bias is not None:
            shifts = [(Update(Full(one.bias)), strength) for one, strength in active if one.bias is not None]
            _write_sum(bias, layer.pristine_bias.to(bias.device), shifts)


def _write_sum(goal: Tensor, pristine: Tensor, active: Sequence[tuple[Update, float]]) -> None:
    """goal ← pristine + Σ strength · ΔW, one ΔW in memory at a time; the exact bytes if there is none."""
    if not active:
        goal.copy_(pristine)
        return
    is_exact = goal.dtype == pristine.dtype == torch.float32
    total = goal if is_exact else pristine.to(torch.float32, copy=True)
    before = pristine if is_exact else total
    for update, strength in active:
        deltas.add(total, update, pristine, onto=before, strength=strength)
        before = total
    if total is not goal:
        goal.copy_(total)


@torch.no_grad()
def unfold(model: nn.Module) -> None:
    """Puts the base's exact bytes back; the adapters speak beside it again."""
    for layer in layers(model).values():
        if layer.pristine is None:
            continue
        _write_sum(base_weight(layer.base), layer.pristine, ())
        if isinstance(layer.base.bias, Tensor) and layer.pristine_bias is not None:
            _write_sum(layer.base.bias, layer.pristine_bias, ())
        layer.pristine = layer.pristine_bias = None
        del layer.forward


def remove(model: nn.Module) -> None:
    """Takes every LoRA layer out again and leaves the model as it was."""
    unfold(model)
    for name, layer in layers(model).items():
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, layer.base)
