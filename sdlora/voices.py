"""LoRA files that speak in a base: loaded once, folded into the weights, and forgotten when they have long been silent.

They are folded in the order in which they are asked for, so that the sum, and with it the picture, does not hang on what was drawn before.
A changed strength folds anew from the pristine weights and loads nothing. A strength that changes over the steps folds the UNet between
two steps, only when its value is another; the text encoder has spoken by then and keeps its one strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

from torch import nn

from sdlora import base_model, lora, lora_file, prompts
from sdlora.base_model import Base
from sdlora.errors import UserError
from sdlora.prompts import Course

SILENT = 8  # files that stay in memory without speaking
_heard: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()  # of each UNet, the file that spoke last at the end


@dataclass(frozen=True)
class LoRA:
    """A LoRA file and how strongly it speaks.

    Args:
        strength: on the UNet, -2 to 2.
        text_strength: on the text encoder; the same as `strength` if not given.
        course: the UNet's strength over the steps, see `prompts.course_of`; in the place of `strength` if it is not empty.
    """

    path: Path
    strength: float = 1.0
    text_strength: float | None = None
    course: Course = field(default=(), kw_only=True)


def load_lora(base: Base, one: LoRA) -> None:
    """Puts a LoRA file into the base under its path as name; one that is there already only gets the new strengths.

    Raises:
        UserError: if the file cannot be read, or a module of it does not fit this base.
    """
    name = _name(one.path)
    if not any(name in layer.adapters for part in base.parts.values() for layer in lora.layers(part).values()):
        _attach(base, one.path, name)
    for part, module in base.parts.items():
        lora.set_strength(module, _strength(one, part), name)


def _name(path: Path) -> str:
    written_ns = path.stat().st_mtime_ns if path.is_file() else 0  # a file trained anew is another LoRA
    return f"{path}@{written_ns}".replace(".", "·")  # PyTorch allows no dots in the names of modules


def _strength(one: LoRA, part: str, share: float = 0.0) -> float:
    """How strongly it speaks in a part when a share of the steps is done."""
    if part != "unet" and one.text_strength is not None:
        return one.text_strength
    if not one.course:
        return one.strength
    return prompts.strength_at(one.course, share) if part == "unet" else one.course[-1][1]


def _attach(base: Base, path: Path, name: str) -> None:
    """Adapters for every module of the file that the base has; nothing is attached if one has another shape, or none is there."""
    file = lora_file.read(path)
    fits = base_model.fit(base, file.modules)
    if fits.why_not:
        raise UserError(f"{path} does not fit base '{base.name}': {fits.why_not}.")
    for stem, (part, module_name) in fits.places.items():
        lora.attach(base.parts[part], module_name, file.modules[stem], adapter=name)


def set_loras(base: Base, loras: Sequence[LoRA]) -> None:
    """Makes exactly these LoRAs speak and folds them in; of those loaded earlier the last few stay in memory, silent.

    Raises:
        UserError: as `load_lora`; then nothing speaks, and weights are the base's own.
    """
    for part in base.parts.values():
        lora.silence(part)
    try:
        for one in loras:
            load_lora(base, one)
    except UserError:
        for part in base.parts.values():
            lora.silence(part)
            lora.unfold(part)
        raise
    names = [_name(one.path) for one in loras]
    heard = _heard.setdefault(base.unet, [])
    heard[:] = [name for name in heard if name not in names] + names
    forgotten, heard[:] = heard[: -SILENT - len(names)], heard[-SILENT - len(names) :]
    for name, part in base.parts.items():
        for layer in lora.layers(part).values():
            _arrange(layer, names, forgotten)
        if lora.layers(part):
            base_model.bring(base, name)
            _fold(base, part)


def _fold(base: Base, part: nn.Module) -> None:
    """Of a base whose parts take turns the pristine weights wait where the parts do."""
    lora.fold(part, aside=base.home and base_model.AWAY)


def _arrange(layer: lora.LoRALayer, last: list[str], forgotten: list[str]) -> None:
    """Forgets some adapters of a layer and puts others last, in that order: sums are formed in it."""
    for name in forgotten:
        if name in layer.adapters:
            del layer.adapters[name]
    for name in last:
        if name in layer.adapters:
            layer.adapters[name] = layer.adapters.pop(name)


def speak_at(base: Base, loras: Sequence[LoRA], share: float) -> bool:
    """Gives the LoRAs with a course the strength that they have when a share of the steps is done, and folds the UNet if it is another.

    Args:
        loras: as they were given to `set_loras`.

    Returns:
        Whether anything was folded.
    """
    layers = lora.layers(base.unet).values()
    changed = False
    for one in loras:
        if one.course:
            name, strength = _name(one.path), _strength(one, "unet", share)
            if any(name in layer.adapters and layer.voice(name).strength != strength for layer in layers):
                lora.set_strength(base.unet, strength, name)
                changed = True
    if changed:
        _fold(base, base.unet)
    return changed
