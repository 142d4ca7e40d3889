"""Which Stable Diffusion a folder or a checkpoint is, from configs and headers alone, and why others are refused.

The family shows in the structure: SDXL has two text encoders, SD 2.x linear projections and OpenCLIP, SD 1.x neither. What a model
predicts does not show in its structure: a folder's scheduler states it, a checkpoint's metadata or marker tensors may. SD 1.x and SDXL
without a statement predict noise, as nearly all do. For SD 2.x both are common, so without a statement it is left open here, and measured
when the base is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdlora.base_model import TITLES
from sdlora.checkpoint_keys import UNET, VAE
from sdlora.errors import UserError
from sdlora.weights_file import Header

PREDICTIONS = ("epsilon", "v_prediction", "sample")
UNSTATED = "unstated"
_MARKERS = {  # an architecture that is none of ours, by how one of its keys begins
    "lora_": "a LoRA, not a base; give the base here and the LoRA as a LoRA",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3, and only 1.x, 2.x and XL are known",
    "model.diffusion_model.double_blocks.": "Flux, and only Stable Diffusion 1.x, 2.x and XL are known",
    "joint_blocks.": "Stable Diffusion 3, and only 1.x, 2.x and XL are known",
    "double_blocks.": "Flux, and only Stable Diffusion 1.x, 2.x and XL are known",
    "control_model.": "a ControlNet, not a base; give a Stable Diffusion checkpoint",
    "down_blocks.": "a UNet alone in diffusers' layout; give the whole pipeline folder",
    "input_blocks.": "a UNet alone, without text encoder; give a whole checkpoint",
}
_LORA_ENDS = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", ".hada_w1_a", ".lokr_w1", ".lora_linear_layer.down.weight")


@dataclass(frozen=True)
class Identity:
    """What a base is, told without opening its weights.

    Args:
        form: "embedded", "folder", "single file" or "hub".
        family: "mini", "sd1", "sd2" or "sdxl".
        prediction: "epsilon", "v_prediction", "sample", or "unstated": then it is measured when the base is opened.
        variant: "fp16" if the smaller of a folder's variants is taken, else "".
        why: what told the family and the prediction.
    """

    form: str
    family: str
    prediction: str
    variant: str
    why: str

    @property
    def sentence(self) -> str:
        """ "Stable Diffusion XL, epsilon (by the keys of the file)"."""
        return f"{TITLES[self.family]}, {self.prediction}{', fp16 variant' if self.variant else ''} ({self.why})"


def of_folder(index: Mapping[str, Any], unet: Mapping[str, Any], *, where: str) -> str:
    """The family of a diffusers pipeline.

    Args:
        index: its `model_index.json`.
        unet: the config of its UNet.

    Raises:
        UserError: if it is no Stable Diffusion 1.x, 2.x or XL that draws from text alone.
    """
    _check_channels(unet.get("in_channels"), where=where)
    width = unet.get("cross_attention_dim")
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise UserError(f"{where} has a UNet whose cross_attention_dim is {width!r}; Stable Diffusion's is 768, 1024 or 2048.")
    encoders = [part for part in ("text_encoder", "text_encoder_2") if _is_there(index, part)]
    if unet.get("addition_embed_type") == "text_time":
        if encoders == ["text_encoder_2"]:
            raise UserError(f"{where} is the refiner of Stable Diffusion XL; give the base model.")
        if len(encoders) < 2:
            raise UserError(f"{where} is a Stable Diffusion XL without text_encoder_2; fetch the whole pipeline folder again.")
        return "sdxl"
    if encoders != ["text_encoder"]:
        raise UserError(
            f"{where} has {len(encoders)} text encoders; Stable Diffusion 1.x and 2.x have one, XL two and a UNet that knows it."
        )
    if width == 128:
        return "mini"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def check_index(index: Mapping[str, Any], *, where: str) -> None:
    """Whether a `model_index.json` is that of a pipeline with a UNet, VAE, text encoder and tokenizer.

    Raises:
        UserError: if not.
    """
    name = str(index.get("_class_name", "without a name"))[:80]
    if "Inpaint" in name:
        raise UserError(f"{where} is an inpainting model; give the base model that it was made from.")
    if _is_there(index, "transformer") or not _is_there(index, "unet"):
        raise UserError(f"{where} is a {name}, and only Stable Diffusion 1.x, 2.x and XL are known.")
    for part in ("vae", "scheduler"):
        if not _is_there(index, part):
            raise UserError(f"{where} has no {part} in its model_index.json; fetch the whole pipeline folder again.")


def _is_there(index: Mapping[str, Any], part: str) -> bool:
    value = index.get(part)
    return isinstance(value, list) and len(value) == 2 and value[1] is not None


def _check_channels(count: Any, *, where: str) -> None:
    kinds = {9: "an inpainting model", 8: "an instruction model (pix2pix)"}
    if count != 4:
        what = kinds.get(count, "no Stable Diffusion that draws from text alone") if isinstance(count, int) else "of an unknown kind"
        raise UserError(f"{where} is {what}: its UNet takes {count!r} channels, 4 are known; give the base model that it was made from.")


def of_checkpoint(header: Header, *, where: str) -> str:
    """The family of a single file, from its keys and shapes.

    Raises:
        UserError: if it is no Stable Diffusion 1.x, 2.x or XL that draws from text alone, or not a whole one.
    """
    keys = header.tensors
    first = keys.get(f"{UNET}input_blocks.0.0.weight")
    if first is None:
        raise UserError(f"{where} is {_what_else(header)}.")
    _check_channels(first.shape[1] if len(first.shape) == 4 else None, where=where)
    starts = {key.split(".", 4)[0] + "." + ".".join(key.split(".", 4)[1:3]) for key in keys}
    if any(start.startswith("conditioner.embedders.1") for start in starts):
        return "sdxl"
    if "conditioner.embedders.0" in starts:
        raise UserError(f"{where} is the refiner of Stable Diffusion XL; give the base model.")
    if any(start.startswith("cond_stage_model.model") for start in starts):
        return "sd2"
    if any(start.startswith("cond_stage_model.transformer") for start in starts):
        return "sd1"
    raise UserError(f"{where} is a UNet without text encoder; give a whole checkpoint, or a pipeline folder.")


def _what_else(header: Header) -> str:
    keys = header.tensors
    if any(key.endswith(_LORA_ENDS) for key in keys):
        return _MARKERS["lora_"]
    for start, what in _MARKERS.items():
        if any(key.startswith(start) for key in keys):
            return what
    if any(key.startswith((VAE, "encoder.", "decoder.")) for key in keys):
        return "a VAE alone; give it as the VAE beside a base"
    if {"emb_params", "clip_l", "clip_g"} & set(keys):
        return "a textual inversion, not a base; give a Stable Diffusion checkpoint"
    return f"no Stable Diffusion checkpoint: none of its {len(keys)} tensors is named {UNET}input_blocks.0.0.weight"


def stated_prediction(header: Header) -> tuple[str, str]:
    """What a checkpoint says that it predicts, and where it says so; ("unstated", "") if it does not.

    `modelspec.prediction_type` and `modelspec.architecture` are those of the Stability model metadata standard 1.0.1; `v_pred` is an
    empty tensor that marks v-prediction in SDXL fine-tunes.
    """
    said = header.metadata.get("modelspec.prediction_type", "").strip().lower()
    known = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction"}
    if said in known:
        return known[said], "the metadata"
    if "v_pred" in header.tensors:
        return "v_prediction", "its tensor v_pred"
    architecture = header.metadata.get("modelspec.architecture", "").split("/")[0]
    if architecture.startswith("stable-diffusion-v2"):
        return ("v_prediction" if architecture.endswith("-v") else "epsilon"), "the metadata"
    return UNSTATED, ""
