"""Writing LoRA files, first half: which tensors a file of each layout holds, by key and shape.

kohya's layout loads in A1111, Forge, ComfyUI, InvokeAI, SD.Next and diffusers: `.lora_down.weight`, `.lora_up.weight` and a one-element
float `.alpha` per module. Every module gets the same alpha, because diffusers 0.42 scales some wrongly where they differ: the difference
is folded into `lora_up`. The smallest alpha is taken, so that factors are above 1 and no number falls under fp16's 6e-8; factors that
are powers of two lose nothing. diffusers' layout holds each module's own rank and alpha in its header: nothing is folded there, and
what came from kohya's layout goes back to the same tensors.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdlora import deltas, lora_names
from sdlora.deltas import Full, Hadamard, Kronecker, LowRank, Update
from sdlora.errors import UserError

_PROJECTIONS = ("_proj_in", "_proj_out")


def tensors_of(
    modules: Mapping[str, Update], *, family: str, dtype: torch.dtype | None = torch.float16, layout: str = "kohya"
) -> dict[str, Tensor]:
    """The file's tensors by key.

    Args:
        modules: updates by canonical stem.
        family: "sd1", "sd2", "sdxl" or "mini": names and the shapes of projections depend on it.
        dtype: what they are stored in; None keeps the widest of each module's own.
        layout: "kohya" or "diffusers".

    Raises:
        UserError: if a number is not finite in `dtype`, or the layout cannot carry an update.
        ValueError: if there is no module.
    """
    if not modules:
        raise ValueError("a LoRA file needs at least one module")
    write, alpha, tensors = LAYOUTS[layout], _one_alpha(modules), {}
    for stem, update in modules.items():
        kept = dtype or functools.reduce(torch.promote_types, (tensor.dtype for tensor in deltas.tensors(update)))
        shaped = _shaped(stem, update, family=family, layout=layout)
        for key, tensor in write(stem, shaped, family=family, alpha=alpha).items():
            tensors[key] = _stored(key, tensor, kept)
    return tensors


def peft_config(modules: Mapping[str, Update]) -> dict[str, Any]:
    """PEFT's settings of each part of the base, "unet.r" and so on, as diffusers reads them from the header's `lora_adapter_metadata`.

    Names of modules are without `text_model.`: PEFT compares ends of names, so it finds them whether transformers has it or not.

    Raises:
        UserError: if some modules of a part have DoRA's magnitudes and others have not.
    """
    by_part: dict[str, dict[str, Update]] = {}
    for stem, update in modules.items():
        part, name = lora_names.dotted(stem)
        by_part.setdefault(part, {})[name] = update
    return {f"{part}.{key}": value for part, updates in by_part.items() for key, value in _peft_part(part, updates).items()}


def form_of(stem: str, update: Update) -> str:
    """What an update is called among users: LoRA, LoCon, LoHa, LoKr, DoRA, full, norm or bias."""
    change = update.change
    if update.magnitude is not None:
        return "DoRA"
    if _is_norm(stem):
        return "norm"
    if isinstance(change, LowRank):
        return "LoCon" if change.down.ndim == 4 and not stem.endswith(_PROJECTIONS) else "LoRA"
    return {Hadamard: "LoHa", Kronecker: "LoKr", Full: "full"}.get(type(change), "bias")


def _stored(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as it is stored; an alpha that `dtype` would round (45.25 for √8 · 16) in fp32, because it scales the whole module."""
    if key.endswith(".alpha") and tensor.to(dtype).double() != tensor:
        dtype = torch.float32
    stored = tensor.detach().to(dtype)
    if stored.is_meta:
        return stored
    if not torch.isfinite(stored.float()).all():
        raise UserError(_not_finite(key, tensor, dtype))
    return stored.cpu().contiguous()


def _not_finite(key: str, tensor: Tensor, dtype: torch.dtype) -> str:
    if torch.isfinite(tensor).all():
        largest = tensor.abs().max().item()
        return f"{key} reaches {largest:.3g}, which is infinite in {dtype}; write the LoRA in bf16 or fp32 (output.dtype)."
    return f"{key} is not finite, so no LoRA file is written; lower optimizer.learning_rate and train again."


# What a module is in kohya's layout


def _kohya(stem: str, update: Update, *, family: str, alpha: float) -> dict[str, Tensor]:
    written = lora_names.written_stem(stem, family=family)
    return {f"{written}.{ending}": tensor for ending, tensor in _endings(stem, update, alpha).items()}


def _one_alpha(modules: Mapping[str, Update]) -> float:
    """The alpha of all low-rank modules of a file: theirs, or the one nearest to 0 that is not 0."""
    alphas = {update.change.alpha for update in modules.values() if isinstance(update.change, LowRank)}
    return min(alphas - {0.0}, key=lambda alpha: (abs(alpha), alpha), default=0.0)


def _endings(stem: str, update: Update, alpha: float) -> dict[str, Tensor]:
    """kohya's and LyCORIS's names of an update's tensors, low-rank ones scaled for the file's alpha."""
    change, norm = update.change, _is_norm(stem)
    found: dict[str, Tensor | float | None] = {}
    if isinstance(change, LowRank):
        up = change.up if change.alpha == alpha else change.up.float() * (change.alpha / alpha)
        found = {"lora_down.weight": change.down, "lora_up.weight": up, "lora_mid.weight": change.core, "alpha": alpha}
    elif isinstance(change, Hadamard):
        found = {
            "hada_w1_a": change.up1, "hada_w1_b": change.down1, "hada_t1": change.core1,
            "hada_w2_a": change.up2, "hada_w2_b": change.down2, "hada_t2": change.core2, "alpha": change.alpha,
        }  # fmt: skip
    elif isinstance(change, Kronecker):
        found = _factor("lokr_w1", change.first) | _factor("lokr_w2", change.second) | {"lokr_t2": change.core, "alpha": change.alpha}
    elif isinstance(change, Full):
        found = {"w_norm" if norm else "diff": change.weight}
    found |= {"dora_scale": update.magnitude, "b_norm" if norm else "diff_b": update.bias}
    return {name: torch.as_tensor(value, dtype=_own(value)) for name, value in found.items() if value is not None}


def _own(value: Tensor | float) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) else torch.float64


def _factor(name: str, factor: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor | float | None]:
    return {name: factor} if isinstance(factor, Tensor) else {f"{name}_a": factor[0], f"{name}_b": factor[1]}


def _shaped(stem: str, update: Update, *, family: str, layout: str) -> Update:
    """The shapes that readers expect of `proj_in` and `proj_out`: 1×1 convolutions in SD 1.x and kohya's SD 2.x, linear otherwise.

    diffusers 0.42 has linear projections in SD 2.x and refuses kohya's there, whoever wrote them; its own layout suits it.
    """
    if not stem.startswith("lora_unet_") or not stem.endswith(_PROJECTIONS) or family not in ("sd1", "sd2", "sdxl"):
        return update
    as_conv = family == "sd1" or (family == "sd2" and layout == "kohya")

    def reshape(tensor: Tensor) -> Tensor:
        if math.prod(tensor.shape[2:]) != 1:
            raise UserError(f"'{stem}' has a kernel of {tuple(tensor.shape[2:])}, and projections have none; the file is malformed.")
        return tensor.reshape(*tensor.shape[:2], 1, 1) if as_conv else tensor.flatten(1)

    change = update.change
    if isinstance(change, LowRank) and change.core is None:
        change = replace(change, down=reshape(change.down), up=reshape(change.up))
    elif isinstance(change, Full):
        change = Full(reshape(change.weight))
    elif isinstance(change, Kronecker) and isinstance(change.second, Tensor):
        change = replace(change, second=reshape(change.second))
    return replace(update, change=change, magnitude=None if update.magnitude is None else reshape(update.magnitude))


def _is_norm(stem: str) -> bool:
    return "norm" in lora_names.dotted(stem)[1].rpartition(".")[2]


# What a module is in diffusers' layout


def _peft(stem: str, update: Update, *, family: str, alpha: float) -> dict[str, Tensor]:
    part, name = lora_names.dotted(stem)
    change = update.change
    if not isinstance(change, LowRank) or change.core is not None or update.bias is not None:
        what = "a bias" if update.bias is not None else form_of(stem, update)
        raise UserError(f"diffusers' layout cannot carry what the LoRA changes in {stem} ({what}); write kohya's layout instead.")
    inside = f"{part}.{name}" if part == "unet" or name == "text_projection" else f"{part}.text_model.{name}"
    tensors = {f"{inside}.lora_A.weight": change.down, f"{inside}.lora_B.weight": change.up}
    if update.magnitude is not None:
        # PEFT itself leaves `.weight` out, and then transformers 5.23 does not find a text encoder's magnitudes again
        tensors[f"{inside}.lora_magnitude_vector.weight"] = _peft_magnitude(stem, update.magnitude, change)
    return tensors


def _peft_magnitude(stem: str, magnitude: Tensor, change: LowRank) -> Tensor:
    """DoRA's magnitude as PEFT keeps it: [out], of convolutions [1, out, 1, 1]."""
    if magnitude.shape[0] != change.up.shape[0]:
        raise UserError(f"diffusers' layout cannot carry DoRA's magnitudes per input, as in {stem}; write kohya's layout instead.")
    return magnitude.reshape(1, -1, 1, 1) if change.down.ndim == 4 else magnitude.flatten()


def _peft_part(part: str, updates: Mapping[str, Update]) -> dict[str, Any]:
    changes = {name: update.change for name, update in updates.items() if isinstance(update.change, LowRank)}
    rank, _ = Counter(change.rank for change in changes.values()).most_common(1)[0]
    alpha, _ = Counter(change.alpha for change in changes.values()).most_common(1)[0]
    with_magnitude = [name for name, update in updates.items() if update.magnitude is not None]
    if 0 < len(with_magnitude) < len(updates):
        raise UserError(
            f"diffusers' layout cannot carry DoRA in {len(with_magnitude)} of {len(updates)} modules of {part}, only in all or none; "
            "write kohya's layout instead."
        )
    return {
        "r": rank, "rank_pattern": {name: change.rank for name, change in changes.items() if change.rank != rank},
        "lora_alpha": alpha, "alpha_pattern": {name: change.alpha for name, change in changes.items() if change.alpha != alpha},
        "target_modules": sorted(changes), "use_dora": bool(with_magnitude), "use_rslora": False, "lora_bias": False, "bias": "none",
    }  # fmt: skip


LAYOUTS = {"kohya": _kohya, "diffusers": _peft}
