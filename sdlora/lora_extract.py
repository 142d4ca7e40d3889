"""A LoRA of a chosen rank: from another LoRA file, `resize`, or from two bases, `extract`.

A fine-tune that was made without LoRA differs from its base by a ΔW per module; the best LoRA of rank r is its r largest singular
directions. Both bases are read tensor by tensor, so memory holds two of them and not two models. Norms, biases and embeddings have no
factors: they are named as not carried, or norms and biases written whole on request, which not every tool reads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdlora import base_files, base_parts, base_sources, checkpoint_keys, lora_file, lora_metadata, lora_names, lora_tools, weights_file
from sdlora.base_kinds import UNSTATED, Identity
from sdlora.base_model import TITLES
from sdlora.checkpoint_keys import Place
from sdlora.deltas import Full, Update
from sdlora.errors import UserError
from sdlora.lora_metadata import Story
from sdlora.lora_tools import Made, Weights
from sdlora.weights_file import Entry, Header

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
Parameter = tuple[str, str]  # a part of the base, and diffusers' name in it, text encoders' with `text_model.`

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
    one, other = tensors_of(base), tensors_of(tuned)
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
    before, after = read(one, parameter), read(other, parameter)
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


# --- a base, tensor by tensor -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spot:
    """Where a parameter lies: a tensor of a file, its first byte, where it belongs, which piece of it, and the shape of that."""

    path: Path
    entry: Entry
    start: int
    at: Place
    piece: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The parameter's bytes."""
        return (self.entry.end - self.entry.start) // len(self.at.parameters)


@dataclass(frozen=True)
class BaseTensors:
    """A base that is not opened: what it is, its folder (None of a single file), and where each parameter lies."""

    name: str
    identity: Identity
    folder: Path | None
    spots: Mapping[Parameter, Spot]


def tensors_of(name: str) -> BaseTensors:
    """A base's parameters, by headers alone.

    Args:
        name: as for `base_files.load`.

    Raises:
        UserError: if there is no such base, or it is none that is known.
    """
    identity = base_files.identify(name)
    if identity.form == "single file":
        path, family = Path(name), identity.family
        return BaseTensors(name, identity, None, _spots(path, lambda key: checkpoint_keys.place(key, family=family)))
    folder = base_sources.hub_folder(name, half=False, weights=True) if identity.form == "hub" else base_files.folder_of(name)
    spots: dict[Parameter, Spot] = {}
    for part in parts_of_family(identity.family):
        for path in base_parts.files(folder / part, part=part, half=False):
            spots |= _spots(path, functools.partial(folder_place, part=part))
    return BaseTensors(name, identity, folder, spots)


def read(base: BaseTensors, parameter: Parameter) -> Tensor:
    """A parameter in the dtype that it is stored in.

    Raises:
        UserError: if the base has none of this name.
    """
    if parameter not in base.spots:
        raise UserError(f"Base '{base.name}' has no {'.'.join(parameter)}; it is of another family or incomplete.")
    spot = base.spots[parameter]
    return checkpoint_keys.parts_of(tensor_at(spot.path, spot.entry, spot.start), spot.at)[spot.piece]


def parameter_of(stem: str, ending: str = "weight") -> Parameter:
    """The parameter of a base that a canonical stem stands for."""
    part, module = lora_names.dotted(stem)
    return part, f"{module}.{ending}" if part == "unet" else checkpoint_keys.text_name(f"{module}.{ending}")


def weights_of(name: str) -> Weights:
    """A base's weights by canonical stem, for tools that meet DoRA.

    Raises:
        UserError: as `tensors_of`; asked for a weight that is not there, the function too.
    """
    base = tensors_of(name)
    return lambda stem: read(base, parameter_of(stem))


def parts_of_family(family: str) -> tuple[str, ...]:
    """The folders of a pipeline that hold weights."""
    return ("unet", "vae", "text_encoder", "text_encoder_2") if family == "sdxl" else ("unet", "vae", "text_encoder")


def places(path: Path, header: Header, belongs: Callable[[str], Place | None]) -> dict[str, Place]:
    """Where the tensors of a file belong, those that do.

    Args:
        belongs: says where a key does, raising a ValueError if it is none that is known.

    Raises:
        UserError: if one is none that is known.
    """
    try:
        found = {key: belongs(key) for key in header.tensors}
    except ValueError as problem:
        raise UserError(f"{path} holds what no Stable Diffusion of its family has ({problem}); it is of another kind.") from problem
    return {key: at for key, at in found.items() if at is not None}


def folder_place(key: str, *, part: str) -> Place | None:
    """Where a tensor in a part's folder belongs; nothing if it is no weight.

    Raises:
        ValueError: if it is a VAE's, but none that Stable Diffusion has.
    """
    if part == "vae":
        return checkpoint_keys.vae_place(key)
    return None if key.endswith("embeddings.position_ids") else Place(part, (key if part == "unet" else checkpoint_keys.text_name(key),))


def _spots(path: Path, belongs: Callable[[str], Place | None]) -> dict[Parameter, Spot]:
    """The parameters that a file holds."""
    header, found = weights_file.header(path), {}
    for key, at in places(path, header, belongs).items():
        entry = header.tensors[key]
        try:
            pieces = checkpoint_keys.parts_of(torch.empty(entry.shape, device="meta"), at)
            shapes = {name: tuple(one.shape) for name, one in zip(at.parameters, pieces, strict=True)}
        except (RuntimeError, ValueError) as problem:
            raise UserError(f"{path} holds '{key}' of shape {list(entry.shape)}, which its kind never has; fetch it again.") from problem
        for piece, (name, shape) in enumerate(shapes.items()):
            found[at.part, name] = Spot(path, entry, header.data_start + entry.start, at, piece, shape)
    return found


def tensor_at(path: Path, entry: Entry, start: int) -> Tensor:
    """One tensor of a file whose header was checked; opening a file of SDXL anew for each would take 3 ms more.

    Raises:
        UserError: if it holds no floating-point numbers, or the file cannot be read any more.
    """
    if entry.dtype not in _DTYPES:
        raise UserError(f"{path} holds weights as {entry.dtype}; quantised weights are not read, give the model in 16 or 32 bits.")
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = bytearray(file.read(entry.end - entry.start))
    except OSError as problem:
        raise UserError(f"{path} cannot be read any more ({problem.strerror}); check that the disk is there.") from problem
    if len(content) < entry.end - entry.start:
        raise UserError(f"{path} has become shorter while it was read; fetch it again.")
    numbers = torch.frombuffer(content, dtype=_DTYPES[entry.dtype]) if content else torch.empty(0, dtype=_DTYPES[entry.dtype])
    return numbers.reshape(entry.shape)
