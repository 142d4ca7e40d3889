"""From the tensors of anyone's LoRA file to what each changes in which module, whatever tool spelled the names.

A key is a module and an ending. Endings are one table (`_ENDINGS`); modules are brought to one stem by `lora_names`, so one file may mix
spellings. Ranks and alphas are taken per module, exactly. Nothing is guessed in silence: a module that cannot be understood is an
error that names it, a key that belongs to nothing is listed, and a file without one known module is an error, never "no effect".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sdlora import lora_names
from sdlora.deltas import Full, Hadamard, Kronecker, LowRank, Update
from sdlora.errors import UserError

_ENDINGS = {
    "lora_down": r"lora_down\.weight|lora_A(?:\.[^.]+)?\.weight|lora(?:_linear_layer)?\.down\.weight",
    "lora_up": r"lora_up\.weight|lora_B(?:\.[^.]+)?\.weight|lora(?:_linear_layer)?\.up\.weight",
    "lora_mid": r"lora_mid\.weight",
    "lora_magnitude_vector": r"lora_magnitude_vector(?:\.[^.]+)?",
    "alpha": r"(?:lora\.)?alpha",
} | {name: name for name in (
    "dora_scale", "diff", "diff_b", "w_norm", "b_norm",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)}  # fmt: skip
_KEY = re.compile(r"(?P<stem>.+?)\.(?:" + "|".join(f"(?P<{slot}>{ending})" for slot, ending in _ENDINGS.items()) + ")")
_PROCESSOR = re.compile(r"(attn\d?)(?:\.processor)?\.to_(q|k|v|out)_lora\.")  # diffusers once kept LoRA in attention processors
_PART = re.compile(r"(?:(unet|text_encoder_2|text_encoder|(?:model\.)?diffusion_model)\.)?(?:base_model\.model\.)?(.+)", re.DOTALL)
_TEXT_MODULE = re.compile(r"(?:text_model\.)?(?:encoder\.layers|embeddings|final_layer_norm)\.|text_projection$")
_RANK_FIRST = ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # the tensors whose first axis is the rank
_Change = LowRank | Hadamard | Kronecker | Full | None
_LAYOUTS = ("kohya", "kohya with SGM names", "PEFT", "diffusers", "diffusers attention processors")


@dataclass(frozen=True)
class Parsed:
    """What a file holds.

    Args:
        modules: what is changed, by the canonical stem of the module (kohya's, with diffusers module names).
        layout: how the file spells its names, in words; several joined by " + ".
        unknown: keys that belong to no module or ending that is known here, as the file spells them.
        warnings: one sentence for each thing that its user should know.
    """

    modules: dict[str, Update]
    layout: str
    unknown: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Key:
    """A key of the file, its module as it is spelled there and by its canonical stem ("" if unknown), and its slot (`_ENDINGS`)."""

    key: str
    spelled: str
    stem: str
    slot: str


def parse(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Parsed:
    """What the tensors of a LoRA file mean, module by module.

    Args:
        path: where they came from, for messages; PEFT's `adapter_config.json` is looked for beside it if only that can state the scale.
        tensors: as `weights_file.read` gives them.
        metadata: the header's; PEFT's configuration in `lora_adapter_metadata` is used.

    Raises:
        UserError: if no module is known, or one is incomplete, contradictory or of shapes that do not fit.
    """
    keys = list(_keys(tensors))
    known = [key for key in keys if key.stem]
    if not known:
        raise _nothing(path, list(tensors), keys)
    scales = _scales(path, metadata, known)
    slots: dict[str, dict[str, _Key]] = {}
    for key in known:
        first = slots.setdefault(key.stem, {}).setdefault(key.slot, key)
        if first is not key:
            raise UserError(f"{path} holds the same weight twice, as {first.key!r} and {key.key!r}; keep one of them.")
    modules = {stem: _module(path, slots[stem], tensors, scales) for stem in sorted(slots)}
    mine = {key.key for key in known}
    return Parsed(
        modules, _layout(known), tuple(key for key in tensors if key not in mine), tuple(_warnings(path, modules, known, bool(scales)))
    )


def _keys(names: Iterable[str]) -> Iterator[_Key]:
    """The keys that end like a LoRA's."""
    for name in names:
        match = _KEY.fullmatch(_PROCESSOR.sub(_without_processor, name).replace(".processor.", "."))
        if match and match.lastgroup:
            spelled = match["stem"] + (".0" if match["stem"].endswith(".to_out") else "")
            yield _Key(name, spelled, _canonical(spelled) or "", match.lastgroup)


def _without_processor(match: re.Match[str]) -> str:
    attention, role = match.groups()  # a text encoder's is self_attn, a UNet's attn1 or attn2
    return f"attn.{role}_proj.lora." if attention == "attn" else f"{attention}.to_{role}.lora."


def _part_and_name(spelled: str) -> tuple[str, str]:
    """`unet`, `text_encoder` or `text_encoder_2`, and the module's dotted name in it; without a prefix the name tells the part."""
    match = _PART.fullmatch(spelled)
    assert match, "every name matches"
    part, name = match[1] or ("text_encoder" if _TEXT_MODULE.match(match[2]) else "unet"), match[2]
    return ("unet" if part.endswith("diffusion_model") else part), name.removeprefix("text_model.")


def _canonical(spelled: str) -> str | None:
    """The one name of the module, or None if Stable Diffusion has none like it."""
    if "." not in spelled:
        return lora_names.canonical(spelled)
    part, name = _part_and_name(spelled)
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
    return lora_names.canonical(prefix + name.replace(".", "_"))


def _layout(known: Iterable[_Key]) -> str:
    spelled = {_spelling(key) for key in known if key.slot not in ("alpha", "lora_magnitude_vector")}
    if "kohya with SGM names" in spelled:
        spelled.discard("kohya")  # the text encoders of such a file
    return " + ".join(layout for layout in _LAYOUTS if layout in spelled)


def _spelling(key: _Key) -> str:
    if "." not in key.spelled:
        return "kohya with SGM names" if re.search("input_blocks|middle_block|output_blocks", key.spelled) else "kohya"
    if _PROCESSOR.search(key.key):
        return "diffusers attention processors"
    return "PEFT" if re.search(r"\.lora_[AB]\.", key.key) else "diffusers"


def _nothing(path: Path, names: list[str], keys: list[_Key]) -> UserError:
    none = f"{path} holds no LoRA weights that are known here:"
    if keys:
        return UserError(f"{none} no module of Stable Diffusion 1.x, 2.x or SDXL is called {keys[0].spelled!r}; it is for another model.")
    if names:
        return UserError(f"{none} {names[0]!r} does not end like a LoRA's tensor; if the file is a whole model, give it as the base.")
    return UserError(f"{none} it is empty; use another file.")


def _warnings(path: Path, modules: Mapping[str, Update], known: Iterable[_Key], scaled: bool) -> Iterator[str]:
    silent = [stem for stem, one in modules.items() if _alpha_of(one) == 0 and one.magnitude is None and one.bias is None]
    if silent:
        yield f"{path.name}: {len(silent)} of {len(modules)} modules have alpha 0 and change nothing, such as {silent[0]}."
    if _is_peft_folder(known) and not scaled and not any(key.slot == "alpha" for key in known):
        yield f"{path.name} does not state its scale, so alpha = rank is taken; keep PEFT's adapter_config.json beside it."


def _alpha_of(update: Update) -> float | None:
    return None if update.change is None or isinstance(update.change, Full) else update.change.alpha


# Scales that are stated beside the tensors


@dataclass(frozen=True)
class _Scale:
    """What PEFT's configuration says of a part of the model: alpha for all, alphas by pattern with their places, and whether √r divides."""

    alpha: float | None
    by_name: dict[str, tuple[int, float]]
    rank_stabilised: bool


def _scales(path: Path, metadata: Mapping[str, str], known: Iterable[_Key]) -> dict[str, _Scale]:
    """PEFT's configuration by part, from the header or from the file that PEFT writes beside its own; {} if there is none."""
    text, source = metadata.get("lora_adapter_metadata", ""), "lora_adapter_metadata"
    beside = path.with_name("adapter_config.json")
    try:
        if not text and _is_peft_folder(known) and beside.is_file():
            text, source = beside.read_text(encoding="utf-8"), beside.name
        config = json.loads(text or "{}")
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{path} has a scale that cannot be read: its {source} is not JSON; fetch or make it again.") from problem
    if not isinstance(config, dict):
        raise UserError(f"{path} has a scale that cannot be read: its {source} is not a table of settings; fetch or make it again.")
    return {part: _scale(path, config, part) for part in ("unet", "text_encoder", "text_encoder_2")} if config else {}


def _is_peft_folder(known: Iterable[_Key]) -> bool:
    return any(key.key.startswith("base_model.model.") for key in known)


def _scale(path: Path, config: Mapping[str, Any], part: str) -> _Scale:
    own = {key.removeprefix(f"{part}."): value for key, value in config.items()}
    patterns = own.get("alpha_pattern") or {}
    alphas = [own.get("lora_alpha", own.get("alpha")), *(patterns.values() if isinstance(patterns, dict) else [None])]
    sound = [isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) < 1e30 for alpha in alphas]
    if not all(sound[1:]) or (not sound[0] and alphas[0] is not None):
        raise UserError(f"{path} has a lora_alpha or alpha_pattern that is no finite number; fetch or make it again.")
    by_name = {_plain(path, pattern): (place, float(alpha)) for place, (pattern, alpha) in enumerate(patterns.items())}
    return _Scale(alphas[0], by_name, bool(own.get("use_rslora")))


def _plain(path: Path, pattern: str) -> str:
    """A pattern that names a module or its dotted end, `^` before it meaning the whole; a stranger's regex may run for ever."""
    begin, plain = "^" * pattern.startswith("^"), pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if re.search(r"[*+?()|\[\]{}\\^$]", plain):
        raise UserError(f"{path} states alphas by the pattern {pattern[:80]!r}, but only names of modules are understood; spell them out.")
    return begin + plain.removeprefix("text_model.")


def _stated_alpha(spelled: str, scales: Mapping[str, _Scale], rank: int) -> float:
    """The alpha that PEFT's configuration gives a module, by the first pattern that names it or for all; without any, alpha is the rank.

    Rank-stabilised LoRA divides by √r (Kalajdzievski 2023, arXiv 2312.03732, equation 3), so its alpha is √r times as large here.
    """
    if "." not in spelled or not scales:
        return float(rank)
    part, name = _part_and_name(spelled)
    scale, words = scales[part], name.split(".")
    ends = [f"^{name}", *(".".join(words[i:]) for i in range(len(words)))]
    stated = min((scale.by_name[end] for end in ends if end in scale.by_name), default=(0, scale.alpha))[1]
    alpha = float(rank if stated is None else stated)
    return alpha * math.sqrt(rank) if scale.rank_stabilised else alpha


# One module's tensors


def _module(path: Path, keys: Mapping[str, _Key], tensors: Mapping[str, Tensor], scales: Mapping[str, _Scale]) -> Update:
    """The update that one module's slots make."""
    spelled = next(iter(keys.values())).spelled
    where = f"{path} holds {spelled!r}"
    slots = {slot: tensors[key.key] for slot, key in keys.items()}
    for slot, tensor in slots.items():
        if tensor.numel() == 0:
            raise UserError(f"{where} with an empty {slot}, of rank or width 0; use another file.")
        if slot != "alpha" and not tensor.is_floating_point():
            raise UserError(f"{where} with a {slot} of {str(tensor.dtype).removeprefix('torch.')}, which is no weight; use another file.")
    kinds = [build for build, names in _KINDS.items() if any(name in slots for name in names)]
    if len(kinds) > 1:
        raise UserError(f"{where} in more than one form ({', '.join(slots)}), and one is allowed; use another file.")
    rank = next((slots[name].shape[0] for name in _RANK_FIRST if name in slots and slots[name].ndim), 1)
    alpha = _alpha(where, slots["alpha"]) if "alpha" in slots else _stated_alpha(spelled, scales, rank)
    change = kinds[0](where, slots, alpha) if kinds else None
    bias = _one_of(where, slots, "diff_b", "b_norm")
    _check(where, slots, bias is None or bias.ndim == 1)
    if change is None and bias is None:
        raise UserError(f"{where} with nothing but {', '.join(slots)}, which changes nothing by itself; use another file.")
    return Update(change, _magnitude(where, slots, change), bias)


def _alpha(where: str, tensor: Tensor) -> float:
    value = float(tensor.flatten()[0].float())
    if tensor.numel() != 1 or not abs(value) < 1e30:
        raise UserError(f"{where} with an alpha that is not one finite number; use another file.")
    return value


def _check(where: str, slots: Mapping[str, Tensor], fits: bool) -> None:
    if not fits:
        shapes = ", ".join(f"{slot} {list(tensor.shape)}" for slot, tensor in slots.items())
        raise UserError(f"{where} with shapes that do not fit each other ({shapes}); use another file.")


def _all_of(where: str, slots: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in slots]
    if missing:
        raise UserError(f"{where} with {', '.join(slots)} but without {' and '.join(missing)}; use a file that is complete.")
    return [slots[name] for name in names]


def _one_of(where: str, slots: Mapping[str, Tensor], first: str, second: str) -> Tensor | None:
    if first in slots and second in slots:
        raise UserError(f"{where} with both {first} and {second}, and one is allowed; use another file.")
    return slots.get(first, slots.get(second))


def _low_rank(where: str, slots: Mapping[str, Tensor], alpha: float) -> LowRank:
    down, up = _all_of(where, slots, "lora_down", "lora_up")
    core = slots.get("lora_mid")
    _check(where, slots, down.ndim in (2, 4) and up.ndim in (2, 4) and up.shape[1] == down.shape[0] and math.prod(up.shape[2:]) == 1)
    if core is not None:
        _check(where, slots, core.ndim == 4 and set(core.shape[:2]) == {down.shape[0]} and math.prod(down.shape[2:]) == 1)
    return LowRank(down, up, alpha, core)


def _hadamard(where: str, slots: Mapping[str, Tensor], alpha: float) -> Hadamard:
    up1, down1, up2, down2 = _all_of(where, slots, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    cores = _all_of(where, slots, "hada_t1", "hada_t2") if {"hada_t1", "hada_t2"} & set(slots) else []
    _check(where, slots, up1.ndim == down1.ndim == 2 and up1.shape == up2.shape and down1.shape == down2.shape)
    _check(where, slots, up1.shape[0 if cores else 1] == down1.shape[0])
    _check(where, slots, all(core.ndim == 4 and set(core.shape[:2]) == {down1.shape[0]} for core in cores))
    _check(where, slots, len({core.shape for core in cores}) <= 1)
    return Hadamard(up1, down1, up2, down2, alpha, *cores)


def _kronecker(where: str, slots: Mapping[str, Tensor], alpha: float) -> Kronecker:
    first, second, core = _factor(where, slots, "lokr_w1"), _factor(where, slots, "lokr_w2"), slots.get("lokr_t2")
    _check(where, slots, not isinstance(first, Tensor) or first.ndim == 2)
    ranks = {factor[1].shape[0] for factor in (first, second) if not isinstance(factor, Tensor)}
    _check(where, slots, len(ranks) <= 1)
    if core is not None:
        pair = _all_of(where, slots, "lokr_w2_a", "lokr_w2_b")
        _check(where, slots, core.ndim == 4 and pair[1].ndim == 2 and set(core.shape[:2]) == {pair[0].shape[0], pair[1].shape[0]})
    return Kronecker(first, second, alpha if ranks else 1.0, core)


def _factor(where: str, slots: Mapping[str, Tensor], name: str) -> Tensor | tuple[Tensor, Tensor]:
    if name in slots:
        _check(where, slots, slots[name].ndim in (2, 4) and not {f"{name}_a", f"{name}_b"} & set(slots))
        return slots[name]
    left, right = _all_of(where, slots, f"{name}_a", f"{name}_b")
    inner = 0 if name == "lokr_w2" and "lokr_t2" in slots else 1
    _check(where, slots, left.ndim == 2 and right.ndim in (2, 4) and left.shape[inner] == right.shape[0])
    return left, right


def _full(where: str, slots: Mapping[str, Tensor], alpha: float) -> Full:
    weight = _one_of(where, slots, "diff", "w_norm")
    assert weight is not None, "it is this that makes the module one of this kind"
    return Full(weight)


_KINDS: dict[Callable[[str, Mapping[str, Tensor], float], _Change], tuple[str, ...]] = {
    _low_rank: ("lora_down", "lora_up", "lora_mid"),
    _hadamard: ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    _kronecker: ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    _full: ("diff", "w_norm"),
}


def _magnitude(where: str, slots: Mapping[str, Tensor], change: _Change) -> Tensor | None:
    """DoRA's magnitude as it multiplies a weight: PEFT's is per output and flat ([out], of convolutions [1, out, 1, 1])."""
    magnitude = _one_of(where, slots, "dora_scale", "lora_magnitude_vector")
    if magnitude is None:
        return None
    size = magnitude.numel()
    if isinstance(change, LowRank):
        _check(where, slots, size == change.up.shape[0] or ("dora_scale" in slots and size == change.down.shape[1]))
    _check(where, slots, change is not None)
    if "lora_magnitude_vector" in slots:
        return magnitude.reshape(-1, *[1] * (change.down.ndim - 1 if isinstance(change, LowRank) else 1))
    _check(where, slots, magnitude.ndim in (2, 4) and size in magnitude.shape[:2])
    return magnitude
