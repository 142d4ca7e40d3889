"""A LoRA of a chosen rank: from another LoRA file, `resize`, or from two bases, `extract`.

A fine-tune that was made without LoRA differs from its base by a ΔW per module; the best LoRA of rank r is its r largest singular
directions. Both bases are read tensor by tensor, so memory holds two of them and not two models. Norms, biases and embeddings have no
factors: they are named as not carried, or norms and biases written whole on request, which not every tool reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sdlora import (
    base_tensors,
    lora_file,
    lora_metadata,
    lora_names,
    lora_tools,
)
from sdlora.base_kinds import UNSTATED
from sdlora.base_model import TITLES
from sdlora.base_tensors import BaseTensors, Parameter
from sdlora.deltas import Full, Update
from sdlora.errors import UserError
from sdlora.lora_metadata import Story
from sdlora.lora_tools import Made, Weights

# --- from a file --------------------------------------------------------------------------------------------------------------


def resize(
    path: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
) -> Iterator[tuple[int, int] | Made]:
    """The best LoRA of smaller rank, module by module (Eckart & Young 1936): yields (done, total), and last the file in kohya's layout.

    A module whose rank is not above the new one keeps its own factors. Norms and biases are kept as they are.

    Args:
        rank, energy, max_error: exactly one, see `lora_tools.limit_of`.
        name: the stem of the file to be written, if it is to be called so in prompts.
        dtype: what the numbers are stored in; by default the format that the file has.
        weights: the base's weights by stem, needed for DoRA alone.

    Raises:
        UserError: if the file cannot be read, a limit is out of range, or DoRA is found and there are no weights.
    """
    limit, file = lora_tools.limit_of(rank=rank, energy=energy, max_error=max_error), lora_file.read(path)
    stored, alpha = dtype or lora_tools.dtype_of([file]), lora_tools.common_alpha([file])
    modules: dict[str, Update] = {}
    errors: dict[str, float] = {}
    for done, (stem, update) in enumerate(file.modules.items(), start=1):
        wanted = lora_tools.change_of(stem, update, weights, where=str(path))
        kept = None if wanted is None else lora_tools.cut(wanted, limit, alpha=alpha)
        modules[stem], errors[stem] = lora_tools.finished(kept, wanted, bias=update.bias, dtype=stored)
        yield done, len(file.modules)
    metadata = lora_tools.renamed(file.metadata, name) | lora_tools.network(modules, alpha)
    content = lora_file.to_bytes(modules, metadata, family=lora_tools.family_of(file), dtype=stored)
    yield Made(content, lora_tools.errors_of(errors), lora_tools.notes_of(path, file))


# --- from two bases -----------------------------------------------------------------------------------------------------------


def extract(
    base: str,
    tuned: str,
    *,
    name: str,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    conv: bool = True,
    text_encoder: bool = True,
    norms: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Iterator[tuple[int, int] | Made]:
    """What a fine-tune learned, W_tuned - W_base, as a LoRA: yields (done, total), and last the file in kohya's layout.

    Where the two are stored in different formats, the finer is rounded to the coarser first to see whether a module has changed at all.

    Args:
        base: what the fine-tune began with, as for `base_files.load`.
        tuned: the fine-tune, likewise.
        name: the stem of the file to be written.
        rank, energy, max_error: exactly one, see `lora_tools.limit_of`.
        conv: take 3×3 convolutions too, not only linears and 1×1 convolutions.
        text_encoder: take the text encoders too, not only the UNet.
        norms: write changes of norms and biases whole.
        dtype: what the numbers are stored in.

    Raises:
        UserError: if a base cannot be read, they are of two kinds or the same, or a limit is out of range.
    """
    limit, alpha = lora_tools.limit_of(rank=rank, energy=energy, max_error=max_error), float(rank or 1)
    one, other = base_tensors.tensors_of(base), base_tensors.tensors_of(tuned)
    modules = _modules_of_both(one, other, text_encoder=text_encoder)
    changes: dict[str, Update] = {}
    errors: dict[str, float] = {}
    left: list[str] = []
    for done, (module, parameters) in enumerate(modules.items(), start=1):
        found = {parameter: _difference(one, other, parameter) for parameter in parameters}
        changed = {parameter: change for parameter, change in found.items() if change is not None}
        taken = {parameter: change for parameter, change in changed.items() if _is_taken(module, change, conv=conv, norms=norms)}
        left += [".".join(parameter) for parameter in changed if parameter not in taken]
        if taken:
            stem = lora_names.stem_of(*module)
            whole = next((Full(change) for (_, name), change in taken.items() if not name.endswith(".bias")), None)
            bias = next((change for (_, name), change in taken.items() if name.endswith(".bias")), None)
            kept = None if whole is None else lora_tools.cut(whole, limit, alpha=alpha)
            changes[stem], errors[stem] = lora_tools.finished(kept, whole, bias=bias, dtype=dtype)
        yield done, len(modules)
    if not changes:
        raise UserError(_nothing(base, tuned, left, len(modules)))
    metadata = _metadata_of(one, other, name) | lora_tools.network(changes, alpha)
    content = lora_file.to_bytes(changes, metadata, family=one.identity.family, dtype=dtype)
    yield Made(content, lora_tools.errors_of(errors), tuple(_notes(one, other, left)))


def _modules_of_both(one: BaseTensors, other: BaseTensors, *, text_encoder: bool) -> dict[tuple[str, str], list[Parameter]]:
    """The parameters of each module (its part and name) that can be compared.

    A text encoder's last layer may be missing in one of the two, as it is in folders of SD 2.x; of the UNet nothing may.

    Raises:
        UserError: if the two are not of one kind.
    """
    family, another = one.identity.family, other.identity.family
    if family != another:
        raise UserError(f"'{one.name}' is {TITLES[family]} and '{other.name}' {TITLES[another]}; give two bases of one family.")
    if alone := sorted(name for part, name in {*one.spots} ^ {*other.spots} if part == "unet"):
        has, lacks = (one, other) if ("unet", alone[0]) in one.spots else (other, one)
        raise UserError(f"'{lacks.name}' has no unet.{alone[0]}, which '{has.name}' has; give two bases of one kind.")
    found: dict[tuple[str, str], list[Parameter]] = {}
    for (part, name), spot in one.spots.items():
        there = other.spots.get((part, name))
        if part == "vae" or there is None or (part != "unet" and not text_encoder):
            continue
        if there.shape != spot.shape:
            shapes = f"{list(spot.shape)} in '{one.name}' and {list(there.shape)} in '{other.name}'"
            raise UserError(f"{part}.{name} is {shapes}; give two bases of one kind.")
        found.setdefault((part, name.rpartition(".")[0]), []).append((part, name))
    return found


def _difference(one: BaseTensors, other: BaseTensors, parameter: Parameter) -> Tensor | None:
    """W_tuned - W_base in fp32, or None if they are equal once both are rounded to the coarser of their formats.

    Raises:
        UserError: if one of them is not finite.
    """
    before, after = base_tensors.read(one, parameter), base_tensors.read(other, parameter)
    coarser = max((before.dtype, after.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    if torch.equal(before.to(coarser).float(), after.to(coarser).float()):
        return None
    change = after.float() - before.float()
    if not torch.isfinite(change).all():
        culprit = other if torch.isfinite(before.float()).all() else one
        raise UserError(f"'{culprit.name}' holds NaN or infinity in {'.'.join(parameter)}; give a base that is whole.")
    return change


def _is_taken(module: tuple[str, str], change: Tensor, *, conv: bool, norms: bool) -> bool:
    """Whether a file is to carry a change: embeddings and the sentence's projection are known to few loaders, others as asked for."""
    try:
        lora_names.dotted(lora_names.stem_of(*module))
    except ValueError:
        return False
    if "embedding." in f"{module[1]}." or module[1] == "text_projection":
        return module[0] == "unet" and (change.ndim > 1 or norms)  # the UNet's time embedding is two linears
    if change.ndim < 2:
        return norms
    return conv or math.prod(change.shape[2:]) == 1


def _nothing(base: str, tuned: str, left: list[str], count: int) -> str:
    if not left:
        return f"'{base}' and '{tuned}' are the same in all {count} modules, so there is nothing to extract; give a fine-tune."
    what = f"{len(left)} weights that were not asked for or that no LoRA carries, such as {left[0]}"
    return f"'{base}' and '{tuned}' differ only in {what}; take convolutions, text encoder or norms too."


def _metadata_of(one: BaseTensors, other: BaseTensors, name: str) -> dict[str, str]:
    identity = other.identity
    prediction = "epsilon" if identity.prediction == UNSTATED else identity.prediction
    described = f"{Path(other.name).name} minus {Path(one.name).name}"
    metadata = lora_metadata.build(Story(name, identity.family, prediction=prediction, base=one.name, description=described))
    unknown = ("modelspec.prediction_type",) if identity.prediction == UNSTATED else ()
    return {key: value for key, value in metadata.items() if key not in unknown}


def _notes(one: BaseTensors, other: BaseTensors, left: list[str]) -> Iterator[str]:
    if left:
        yield f"{len(left)} changed weights are not carried (norms, biases, embeddings, and what was not asked for), such as {left[0]}."
    if one.identity.prediction != other.identity.prediction:
        yield f"The base predicts {one.identity.prediction} and the fine-tune {other.identity.prediction}; the LoRA does not change that."
