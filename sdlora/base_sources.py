"""Where a base's parts come from: a diffusers folder, the hub, or one checkpoint; each gives the same record to open them from.

Configs of a folder are its own, those of a single file are its family's in the package, fitted to the file's shapes. A single file
brings no tokenizer. From the hub come only the files that are needed, the fp16 variant where 16 bits are enough; what the cache holds
is used as it is, without a request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora import base_parts, checkpoint_configs, checkpoint_keys, hub, tokenizer_files, weights_file
from sdlora.checkpoint_keys import Place
from sdlora.errors import UserError
from sdlora.weights_file import Header

HALF = (torch.float16, torch.bfloat16)
_CONFIGS = ("config.json", "scheduler_config.json", "model_index.json", *tokenizer_files.FILES)


@dataclass(frozen=True)
class Source:
    """How to open the parts of a base.

    Args:
        part: opens one, by its name and in the number format given.
        shell: the same without weights.
        digest: SHA-256 of a part's tensors as they lie on the disk.
        tokenizers: the folder of each text encoder's tokenizer.
        pads: what follows the end of a prompt for each, where its own files do not say.
        schedule: the scheduler's config.
        scaling: the VAE's, that the UNet's latents are multiplied by.
        weights: the files of the UNet.
    """

    part: Callable[[str, torch.dtype], Any]
    shell: Callable[[str], Any]
    digest: Callable[[str], str]
    tokenizers: tuple[Path, ...]
    pads: tuple[str | None, ...]
    schedule: dict[str, Any]
    scaling: float
    weights: tuple[Path, ...]


# --- folders and the hub ------------------------------------------------------------------------------------------------------


def of_folder(folder: Path, *, name: str, family: str, tokenizer: str | None, device: torch.device, half: bool) -> Source:
    """The parts of a diffusers pipeline.

    Args:
        name: what the user called it, for errors.
        family: "mini", "sd1", "sd2" or "sdxl".
        tokenizer: a folder or hub id to take instead of its own.
        half: whether the UNet is wanted in 16 bits.

    Raises:
        UserError: if a file is missing or damaged; opening a part may raise one too.
    """
    where = f"Base '{name}'"

    def shell(kind: str) -> Any:
        base_parts.files(folder / kind, part=kind, half=False)  # its weights must be there too
        return base_parts.empty(base_parts.config(folder / kind / "config.json"), part=kind, where=where)

    def digest(kind: str) -> str:
        return "".join(weights_file.digest(path) for path in base_parts.files(folder / kind, part=kind, half=half and kind != "vae"))

    def part(kind: str, dtype: torch.dtype) -> Any:
        module = base_parts.empty(base_parts.config(folder / kind / "config.json"), part=kind, where=where)
        tensors = base_parts.tensors(base_parts.files(folder / kind, part=kind, half=dtype in HALF))
        named = base_parts.modern_vae(tensors, where=where) if kind == "vae" else tensors
        return base_parts.filled(module, named, where=f"{where} ({kind})", device=device, dtype=dtype)

    given = tokenizer_files.named(tokenizer) if tokenizer else None
    pads = tokenizer_files.PADDING.get(family, (None,)) if given else (None, None)
    return Source(
        part=part,
        shell=shell,
        digest=digest,
        tokenizers=(given, given) if given else (folder / "tokenizer", folder / "tokenizer_2"),
        pads=pads,
        schedule=base_parts.schedule(base_parts.config(folder / "scheduler" / "scheduler_config.json"), where=where),
        scaling=base_parts.scaling(base_parts.config(folder / "vae" / "config.json"), where=where),
        weights=base_parts.files(folder / "unet", part="unet", half=half),
    )


def hub_folder(name: str, *, half: bool, weights: bool) -> Path:
    """The folder of a hub pipeline in the cache, fetched if the cache lacks what is needed.

    Args:
        half: whether 16 bits are enough, so that a smaller fp16 variant is taken.
        weights: whether more than the configs is needed.

    Raises:
        UserError: if the hub has no such pipeline, or cannot be reached.
    """
    folder = hub.cached(name)
    if folder is not None and _is_complete(folder, half=half, weights=weights):
        return folder
    names = hub.listing(name)
    if "model_index.json" not in names:
        raise UserError(
            f"'{name}' on the Hugging Face hub is no diffusers pipeline (it has no model_index.json); if it offers a .safetensors "
            "checkpoint, download that and give its path."
        )
    return hub.fetch(name, wanted(names, half=half, weights=weights))


def wanted(names: list[str], *, half: bool, weights: bool) -> list[str]:
    """Which of a hub pipeline's files are fetched.

    Args:
        names: paths in the repository.
    """
    folders = ("", "scheduler", "tokenizer", "tokenizer_2", *base_parts.STEMS)
    found = [name for name in names if name.rpartition("/")[0] in folders and name.rpartition("/")[2] in _CONFIGS]
    for part in base_parts.STEMS if weights else ():
        inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        variant, first = base_parts.chosen(inside, part=part, half=half and part != "vae")
        found += [f"{part}/{name}" for name in first]
        if first and first[0].endswith(".json"):
            pieces = [name for name in inside if "-of-" in name and name.endswith(".safetensors") and ("fp16" in name) == bool(variant)]
            found += [f"{part}/{name}" for name in pieces]
    return found


def _is_complete(folder: Path, *, half: bool, weights: bool) -> bool:
    """Whether a folder of the cache holds all that opening it will ask for."""
    try:
        index = base_parts.config(folder / "model_index.json")
        parts = [part for part in base_parts.STEMS if isinstance(index.get(part), list) and index[part][1:] != [None]]
        found = [folder / part / "config.json" for part in parts] + [folder / "scheduler" / "scheduler_config.json"]
        for part in parts if weights else []:
            found += base_parts.files(folder / part, part=part, half=half and part != "vae")
            tokenizer = part.replace("text_encoder", "tokenizer")
            if tokenizer != part and tokenizer_files.folder_in(folder / tokenizer) is None:
                return False
    except UserError:
        return False
    return all(path.is_file() for path in found)


# --- single files -------------------------------------------------------------------------------------------------------------


def of_file(path: Path, header: Header, *, family: str, configs: str, tokenizer: str | None, device: torch.device) -> Source:
    """The parts of a checkpoint in the original layout.

    Args:
        header: the file's own.
        family: "sd1", "sd2" or "sdxl".
        configs: whose configs in the package are taken, "sd2-v" among them.
        tokenizer: a folder or hub id; one is looked for if not given.

    Raises:
        UserError: if it holds what no Stable Diffusion has, or no tokenizer is found; opening a part may raise one too.
    """
    places = _places(path, header, family)

    def shell(kind: str) -> Any:
        return _shell(path, header, places.get(kind, {}), kind=kind, configs=configs)

    def digest(kind: str) -> str:
        return weights_file.digest(path, only=places[kind])

    def part(kind: str, dtype: torch.dtype) -> Any:
        return _part(path, header, places.get(kind, {}), kind=kind, configs=configs, device=device, dtype=dtype)

    schedule = checkpoint_configs.of_family(configs, "scheduler")
    if "ztsnr" in header.tensors:  # marks fine-tunes on a schedule that ends without signal, as `v_pred` marks what they predict
        schedule["rescale_betas_zero_snr"] = True
    folder = tokenizer_files.for_checkpoint(path, tokenizer)
    scaling = checkpoint_configs.of_family(configs, "vae")["scaling_factor"]
    return Source(part, shell, digest, (folder, folder), tokenizer_files.PADDING[family], schedule, scaling, (path,))


def _places(path: Path, header: Header, family: str) -> dict[str, dict[str, Place]]:
    """Where each tensor of a checkpoint belongs, by part."""
    found: dict[str, dict[str, Place]] = {}
    for key in header.tensors:
        try:
            at = checkpoint_keys.place(key, family=family)
        except ValueError as problem:
            raise UserError(f"{path} holds '{key[:200]}', which no Stable Diffusion of its family has; it is of another kind.") from problem
        if at is not None:
            found.setdefault(at.part, {})[key] = at
    return found


def _part(
    path: Path, header: Header, places: Mapping[str, Place], *, kind: str, configs: str, device: torch.device, dtype: torch.dtype
) -> Any:
    module, named = _shell(path, header, places, kind=kind, configs=configs), _named(path, places)
    if kind.startswith("text_encoder"):
        named = _asked(named, module)
    return base_parts.filled(module, named, where=f"{path} ({kind})", device=device, dtype=dtype)


def _shell(path: Path, header: Header, places: Mapping[str, Place], *, kind: str, configs: str) -> Any:
    if not places:
        hint = "give one as the VAE beside it" if kind == "vae" else "give a whole checkpoint"
        raise UserError(f"{path} brings no {kind}; {hint}.")
    entries = {key: header.tensors[key].shape for key in places}
    try:
        shapes = checkpoint_configs.shapes_of(entries, places)
        config = checkpoint_configs.fitted(checkpoint_configs.of_family(configs, kind), shapes, part=kind)
    except (KeyError, ValueError, IndexError) as problem:
        raise UserError(f"{path} has a {kind} that cannot be understood ({problem}); it is incomplete or of another kind.") from problem
    return base_parts.empty(config, part=kind, where=str(path))


def _named(path: Path, places: Mapping[str, Place]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one part under diffusers' names."""
    for key, tensor in base_parts.tensors([path], only=set(places)):
        yield from zip(places[key].parameters, checkpoint_keys.parts_of(tensor, places[key]), strict=True)


def _asked(named: Iterator[tuple[str, Tensor]], module: Any) -> Iterator[tuple[str, Tensor]]:
    """A text encoder's tensors without those that Stable Diffusion never asks: OpenCLIP's last layer and projection in SD 2.x."""
    known = {checkpoint_keys.text_name(name) for name in module.state_dict()}
    return ((name, tensor) for name, tensor in named if name in known)


# --- another VAE --------------------------------------------------------------------------------------------------------------


def other_vae(name: str, *, scaling: float, device: torch.device) -> Any:
    """A VAE given beside a base, in fp32.

    Args:
        name: a folder with a VAE or with one in `vae`, a `.safetensors` file in diffusers' or the original layout, or a hub id.
        scaling: the base's, which a folder's own must equal: the same number of channels says nothing of whose latents they are.

    Raises:
        UserError: if there is none, or it is one for other latents.
    """
    path = Path(name)
    if path.is_file() or (path.suffix.lower() in (".safetensors", ".ckpt", ".pt", ".bin") and not path.is_dir()):
        return _vae_of_file(path, scaling=scaling, device=device)
    if not path.is_dir() and not hub.is_name(name):
        raise UserError(f"VAE '{name}' is unknown; give a folder with a diffusers VAE, a .safetensors file, or a hub id \"owner/name\".")
    folder = path if path.is_dir() else _hub_vae(name)
    folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    config = base_parts.config(folder / "config.json")
    own = base_parts.scaling(config, where=f"VAE '{name}'")
    if abs(own - scaling) > 1e-4:
        raise UserError(f"VAE '{name}' scales latents by {own:g} and the base's by {scaling:g}; give one that was made for this family.")
    module = base_parts.empty(config, part="vae", where=f"VAE '{name}'")
    named = base_parts.modern_vae(base_parts.tensors(base_parts.files(folder, part="vae", half=False)), where=f"VAE '{name}'")
    return base_parts.filled(module, named, where=f"VAE '{name}'", device=device, dtype=torch.float32)


def state_digest(module: Any) -> str:
    """SHA-256 of a module's tensors as they are in memory."""
    told = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        told.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return told.hexdigest()


def _hub_vae(name: str) -> Path:
    folder = hub.cached(name)
    for inside in ("", "vae"):
        if folder is not None and base_parts.chosen(base_parts.names_in(folder / inside), part="vae", half=False)[1]:
            return folder / inside
    names = hub.listing(name)
    start = "vae/" if "vae/config.json" in names else ""
    _, files = base_parts.chosen([one.removeprefix(start) for one in names if one.startswith(start)], part="vae", half=False)
    return hub.fetch(name, [f"{start}config.json", *(start + one for one in files)])


def _vae_of_file(path: Path, *, scaling: float, device: torch.device) -> Any:
    """A whole checkpoint is a VAE's file too: what is not the VAE's in it is passed over."""
    header = weights_file.header(path)
    prefixed = any(key.startswith(checkpoint_keys.VAE) for key in header.tensors)
    keys = [key for key in header.tensors if not prefixed or key.startswith(checkpoint_keys.VAE)]
    places: dict[str, Place] = {}
    for key in keys:
        try:
            at = checkpoint_keys.vae_place(key.removeprefix(checkpoint_keys.VAE))
        except ValueError as problem:
            raise UserError(f"{path} holds '{key[:200]}', which Stable Diffusion's VAE does not have; give a VAE.") from problem
        if at is not None:
            places[key] = at
    vae = _part(path, header, places, kind="vae", configs="sd1", device=device, dtype=torch.float32)
    vae.register_to_config(scaling_factor=scaling)
    return vae
