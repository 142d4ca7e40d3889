"""A base's weights one by one, from a folder or a checkpoint, under diffusers' names: for work that must not hold a whole model.

`tensors_of` says where each tensor lies, from headers alone; `read` brings one. OpenCLIP's fused query, key and value are three here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdlora import base_files, base_parts, base_sources, checkpoint_keys, deltas, lora_names, weights_file
from sdlora.base_kinds import Identity
from sdlora.base_model import LoRAFit
from sdlora.checkpoint_keys import Place
from sdlora.deltas import Update
from sdlora.errors import UserError
from sdlora.lora_tools import Weights
from sdlora.weights_file import Entry, Header

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
Parameter = tuple[str, str]  # a part of the base, and diffusers' name in it, text encoders' with `text_model.`


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


def fit(base: BaseTensors, modules: Mapping[str, Update]) -> LoRAFit:
    """How a LoRA sits in a base, from headers alone; no tokenizer and no weights are asked for.

    Args:
        modules: updates by canonical stem.
    """
    places, misshapen = {}, []
    for stem, update in modules.items():
        weight, bias = (base.spots.get(parameter_of(stem, ending)) for ending in ("weight", "bias"))
        if weight is None:
            continue
        places[stem] = lora_names.dotted(stem)
        own_bias = None if bias is None else torch.empty(bias.shape, device="meta")
        if why := deltas.misfit(update, torch.empty(weight.shape, device="meta"), bias=own_bias):
            misshapen.append(f"{stem} {why}")
    return LoRAFit(places, tuple(sorted(set(modules) - set(places))), tuple(misshapen))
