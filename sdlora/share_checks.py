"""What is looked at before a LoRA is given away: that the file is complete for others, and that nothing in it tells of this machine.

A file that lacks a few modules draws a little wrong everywhere but here, and nobody finds out why: so its names are brought through
diffusers' own conversion, which needs no base, and compared with ours. Paths are left out where the texts are made; the last look over
everything is for the words that a person has put there.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from PIL import Image
from torch import Tensor

from sdlora import deltas, lora_file, lora_names, weights_file
from sdlora.errors import UserError
from sdlora.lora_file import LoRAFile

LAYERS = SimpleNamespace(layers_per_block=2)  # all that diffusers asks of a UNet to map SGM names; 2 in every family
_SHOWN = 3  # modules that are named in a sentence


def check_complete(path: Path, source: Path, *, modules: int | None) -> None:
    """Reads a written file again, as we do and as diffusers does: as many modules as were trained, all known, all finite.

    Args:
        source: the file of the run that it was made from; the weights must be the same.
        modules: how many were trained; as many as the source has, if that is not known.

    Raises:
        UserError: if anything is missing.
    """
    ours, before = lora_file.read(path), lora_file.read(source)
    wanted = modules or len(before.modules)
    if len(ours.modules) != wanted or ours.unknown:
        raise UserError(
            f"{source} holds {len(ours.modules)} modules and {len(ours.unknown)} unknown keys, and {wanted} modules were trained; "
            "it is not complete, so nothing is shared. Choose another with --checkpoint."
        )
    if ours.metadata["sshs_model_hash"] != before.metadata.get("sshs_model_hash"):
        raise UserError(f"{source} has other weights than its own sshs_model_hash says; choose another with --checkpoint.")
    if missing := missing_in_diffusers(weights_file.read(path).tensors, ours):
        named = ", ".join(missing[:_SHOWN])
        raise UserError(f"{source}: diffusers finds no weights for {len(missing)} of {wanted} modules ({named}), so nothing is shared.")


def missing_in_diffusers(tensors: Mapping[str, Tensor], file: LoRAFile) -> list[str]:
    """The modules of a file that diffusers' mapping of names does not bring to a module of its own, with both factors.

    Args:
        tensors: the file's, by key.
        file: the same as we read it.
    """
    mixin = StableDiffusionXLLoraLoaderMixin if file.family == "sdxl" else StableDiffusionLoraLoaderMixin
    try:
        converted, _ = mixin.lora_state_dict(dict(tensors), unet_config=LAYERS)
        found = {part: _peft_keys(converted, part) for part in ("unet", "text_encoder", "text_encoder_2")}
    except (ValueError, KeyError, IndexError):  # what it says of a key that it does not know helps nobody here
        found = {}
    places = map(lora_names.dotted, sorted(file.modules))
    return [name for part, name in places if not {f"{name}.lora_A.weight", f"{name}.lora_B.weight"} <= found.get(part, set())]


def _peft_keys(tensors: Mapping[str, Tensor], part: str) -> set[str]:
    """One part's keys as PEFT is given them; a text encoder's without `text_model.`."""
    own = {key.removeprefix(f"{part}."): tensor for key, tensor in tensors.items() if key.startswith(f"{part}.")}
    if not own or part == "unet":
        return set(convert_unet_state_dict_to_peft(own))
    return {key.removeprefix("text_model.") for key in convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))}


def no_diffusers(file: LoRAFile) -> str:
    """Why diffusers cannot load a file whose names it understands, in a sentence; "" if it can.

    diffusers 0.42 has linear projections in SD 2.x, where kohya's layout has convolutions.
    """
    inside = [update for stem, update in file.modules.items() if stem.endswith(("_proj_in", "_proj_out"))]
    folded = any(tensor.ndim == 4 for update in inside for tensor in deltas.tensors(update))
    return "it cannot load this file, whose projections are convolutions as in the web UIs." if file.family == "sd2" and folded else ""


def check_private(contents: Mapping[str, bytes], folders: Iterable[Path]) -> None:
    """Looks through all words for the paths of some folders, and of the user's own.

    Args:
        contents: files by name.

    Raises:
        UserError: if a path is found.
    """
    secrets = {str(one.absolute()) for one in (Path.home(), *folders)} - {Path.home().anchor}
    for name, content in contents.items():
        words = words_of(name, content).replace("\\\\", "\\")
        if found := next((one for one in sorted(secrets) if one in words), None):
            raise UserError(f"{name} would tell others of {found} on this machine; take the path out of the config or the prompts.")


def words_of(name: str, content: bytes) -> str:
    """What a person could read in a file: a LoRA's header, a picture's text, or all of it."""
    if name.endswith(".safetensors"):
        return content[8 : 8 + struct.unpack("<Q", content[:8])[0]].decode()
    if name.endswith(".png"):
        with Image.open(io.BytesIO(content)) as image:
            return json.dumps({key: str(value) for key, value in image.info.items()}, ensure_ascii=False)
    return content.decode()
