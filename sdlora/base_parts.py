"""One part of a base: its config read and checked, its weights found, and the module made of both.

A module is built without weights (on the `meta` device) and takes the tensors of the files as its own, each in the number format and on
the device asked for, so that even SDXL needs its weights only once in memory. Nothing is filled in: a tensor that is missing, that no
module asks for, or that has another shape is an error, where the libraries would draw random weights and warn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora import checkpoint_keys, noise, weights_file
from sdlora.errors import UserError

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
_DEEPEST = 100  # layers of anything; Stable Diffusion's deepest has 32, and a config may claim a billion
_DEPTHS = ("layers_per_block", "num_hidden_layers", "transformer_layers_per_block")
_POSITIVE = ("mid_block_scale_factor", "norm_eps", "layer_norm_eps", "downsample_padding")  # asked only when the part answers
_COUNTS = ("num_attention_heads", "norm_num_groups")  # likewise
_SMALLEST = 1e-30


# --- configs ------------------------------------------------------------------------------------------------------------------


def config(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: if it is missing or something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise UserError(f"{path} is missing; fetch the whole pipeline folder again.") from problem
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{path} cannot be read as JSON; fetch the pipeline folder again.") from problem
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object; fetch the pipeline folder again.")
    return values


def schedule(values: dict[str, Any], *, where: str) -> dict[str, Any]:
    """A scheduler's config whose numbers make a noise schedule.

    Raises:
        UserError: if they do not.
    """
    start, end, count = (
        values.get(key, default) for key, default in (("beta_start", 1e-3), ("beta_end", 1e-2), ("num_train_timesteps", 1000))
    )
    if not (_is_number(start) and _is_number(end) and 0 < start <= end < 1 and type(count) is int and 1 < count <= 100_000):
        raise UserError(
            f"{where} has a noise schedule from beta {start!r} to {end!r} over {count!r} timesteps; "
            "0 < beta < 1 and 2 to 100,000 timesteps are allowed."
        )
    form, offset = values.get("beta_schedule", "scaled_linear"), values.get("steps_offset", 0)
    if not isinstance(form, str) or type(offset) is not int or not 0 <= offset < count:
        raise UserError(
            f"{where} has a noise schedule of form {form!r} with steps_offset {offset!r}; fetch its scheduler_config.json again."
        )
    noise.alphas(values)
    return values


def scaling(values: dict[str, Any], *, where: str) -> float:
    """What a VAE's config says that latents are multiplied by; Stable Diffusion's 0.18215 if it does not.

    Raises:
        UserError: if it is no number above 0.
    """
    factor = values.get("scaling_factor", 0.18215)
    if not _is_number(factor) or factor <= _SMALLEST:
        raise UserError(f"{where} has a VAE with scaling_factor {factor!r}; it must be a number above 0, Stable Diffusion's is 0.18215.")
    return float(factor)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _depths(value: Any) -> Iterator[int]:
    """All counts of layers that a value holds, a list's own length among them."""
    if isinstance(value, list):
        yield len(value)
        for one in value:
            yield from _depths(one)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _check(values: dict[str, Any], *, part: str, where: str) -> None:
    channels = values.get("block_out_channels")
    deep = max([len(channels) if isinstance(channels, list) else 0, *(depth for key in _DEPTHS for depth in _depths(values.get(key)))])
    if deep > _DEEPEST:
        raise UserError(f"{where} claims {deep:,} layers in its {part}; {_DEEPEST} are allowed, Stable Diffusion has 32 at most.")
    for key in (*_POSITIVE, *_COUNTS):  # a UNet's heads have another name there, and this one is empty
        least = 1 if key in _COUNTS else 0
        if (part, key) != ("unet", "num_attention_heads") and key in values and not (_is_number(values[key]) and values[key] >= least):
            raise UserError(
                f"{where} has {key} {values[key]!r} in its {part}; a number from {least} is allowed, fetch its config.json again."
            )


# --- weights ------------------------------------------------------------------------------------------------------------------


def chosen(names: Iterable[str], *, part: str, half: bool) -> tuple[str, list[str]]:
    """The variant ("fp16" or "") of a part's weights that is taken from a folder, and its files: one, or an index that lists several.

    Args:
        names: of the files in the part's folder.
        half: whether 16 bits are wanted, so that a smaller fp16 variant will do; else it is taken only if there is no other.

    Returns:
        The names; none if there are no .safetensors weights.
    """
    there, stem = set(names), STEMS[part]
    for variant in ("fp16", "") if half else ("", "fp16"):
        dotted = f".{variant}" if variant else ""
        for name in (f"{stem}{dotted}.safetensors", f"{stem}{dotted}.safetensors.index.json", f"{stem}.safetensors.index{dotted}.json"):
            if name in there:
                return variant, [name]
    return "", []


def names_in(folder: Path) -> list[str]:
    """The names of a folder's files, none if it is not there."""
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def files(folder: Path, *, part: str, half: bool) -> tuple[Path, ...]:
    """The weight files of a part's folder.

    Raises:
        UserError: if there are none, only pickles, or an index names one that is not there.
    """
    names = names_in(folder)
    _, found = chosen(names, part=part, half=half)
    if not found:
        if any(name.endswith((".bin", ".ckpt", ".pt")) for name in names):
            raise UserError(
                f"{folder} holds its weights only as pickles, which can run code when opened; "
                "save the pipeline with safe_serialization=True."
            )
        raise UserError(f"{folder} holds no {STEMS[part]}.safetensors; fetch the whole pipeline folder again.")
    if found[0].endswith(".safetensors"):
        return (folder / found[0],)
    return tuple(folder / name for name in shards(config(folder / found[0]), names, where=folder / found[0]))


def shards(index: dict[str, Any], names: Iterable[str], *, where: Path) -> list[str]:
    """The file names that an index lists.

    Raises:
        UserError: if it lists none, or one that is not there.
    """
    weight_map = index.get("weight_map")
    listed = (
        set(weight_map.values()) if isinstance(weight_map, dict) and all(isinstance(one, str) for one in weight_map.values()) else set()
    )
    lacking = sorted(listed - set(names))  # a path that leads out of the folder is none of its names either
    if not listed or lacking:
        raise UserError(
            f"{where} lists {f'{lacking[0]!r}, which is not there' if lacking else 'no files'}; fetch the pipeline folder again."
        )
    return sorted(listed)


def tensors(paths: Iterable[Path], *, only: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """All tensors of some files, one at a time.

    Args:
        only: the names that are read, if not all.

    Raises:
        UserError: if a file is damaged.
    """
    for path in paths:
        weights_file.header(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (the file is no dict)
                    if only is None or name in only:
                        yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as problem:
            raise UserError(f"{path} is damaged ({problem}); fetch it again.") from problem


# --- modules ------------------------------------------------------------------------------------------------------------------


def empty(values: dict[str, Any], *, part: str, where: str) -> Any:
    """A part's module on the `meta` device, without weights.

    Raises:
        UserError: if its config is none that the library can build.
    """
    _check(values, part=part, where=where)
    try:
        with torch.device("meta"):
            if part in ("unet", "vae"):
                return (UNet2DConditionModel if part == "unet" else AutoencoderKL).from_config(values)
            text_config = CLIPTextConfig.from_dict(values)
            return (CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection)(text_config)
    except Exception as problem:  # a stranger's config breaks the libraries in any way it likes
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(
            f"{where} has a config of its {part} that cannot be built ({reason[:200]}); fetch its config.json again."
        ) from problem


def filled(module: Any, tensors: Iterable[tuple[str, Tensor]], *, where: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A module of `empty` with its weights: frozen, in evaluation mode.

    Args:
        tensors: by diffusers' names; the text encoders' with or without `text_model.`.
        where: what the weights were read from, for errors.

    Raises:
        UserError: if a tensor is missing, superfluous, or of another shape.
    """
    wanted = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    state: dict[str, Tensor] = {}
    for given, tensor in tensors:
        if given.endswith("embeddings.position_ids"):  # counts from 0; old versions saved it
            continue
        name = _own_name(given, wanted)
        if name not in wanted:
            raise UserError(
                f"{where} holds '{given}', which this Stable Diffusion has no place for; it is of another kind or its config is."
            )
        if tuple(tensor.shape) != wanted[name]:
            raise UserError(f"{where} holds '{given}' of shape {list(tensor.shape)}; its config asks for {list(wanted[name])}.")
        if not tensor.is_floating_point():
            raise UserError(f"{where} holds '{given}' as {tensor.dtype}; quantised weights are not read, give the model in 16 or 32 bits.")
        state[name] = tensor.to(device, dtype)
    if lacking := sorted(set(wanted) - set(state)):
        raise UserError(f"{where} lacks {len(lacking)} of {len(wanted)} weights, such as '{lacking[0]}'; fetch it again.")
    module.load_state_dict(state, assign=True)
    _count_positions(module, device)
    return module.eval().requires_grad_(False)


def _own_name(name: str, wanted: Iterable[str]) -> str:
    """The name in the module for a name in a file."""
    bare = name.removeprefix("text_model.")
    return next((one for one in (name, bare, f"text_model.{bare}") if one in wanted), name)


def _count_positions(module: nn.Module, device: torch.device) -> None:
    """The text encoders' one buffer is computed, not read, so building on `meta` leaves it empty."""
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            assert name == "position_ids", name
            part.register_buffer(name, torch.arange(buffer.shape[-1], device=device)[None], persistent=False)


def modern_vae(tensors: Iterable[tuple[str, Tensor]], *, where: str) -> Iterator[tuple[str, Tensor]]:
    """A VAE's tensors under diffusers' names of today, from old diffusers names or the original's.

    Raises:
        UserError: if one is no VAE's.
    """
    for key, tensor in tensors:
        try:
            at = checkpoint_keys.vae_place(key.removeprefix(checkpoint_keys.VAE))
        except ValueError as problem:
            raise UserError(f"{where} holds '{key[:200]}', which Stable Diffusion's VAE does not have; fetch it again.") from problem
        if at is not None:
            yield at.parameters[0], checkpoint_keys.parts_of(tensor, at)[0]
