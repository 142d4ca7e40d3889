"""The names of an original checkpoint's tensors, and where each belongs in diffusers' parts: tables with both directions.

One `.safetensors` checkpoint holds UNet, VAE and text encoders under the names of the original LDM and SGM code. Three things are more
than a name: OpenCLIP keeps query, key and value as one tensor, its projection transposed, and the VAE's attention as 1×1 convolutions.
The tables are our own, because diffusers' conversion follows transformers' module names of the day, and because writing needs the other
direction too. Parameter names are those of diffusers folders; the text encoders' always begin with `text_model.` there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora import lora_names

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {},
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer."},
}
OPEN_CLIP = {"sd1": {}, "sd2": {"text_encoder": "cond_stage_model.model."}, "sdxl": {"text_encoder_2": "conditioner.embedders.1.model."}}
LEVELS = 4  # of every Stable Diffusion VAE; the original counts the decoder's from the end

_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17
_OPEN_CLIP_FIXED = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight", "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}  # fmt: skip
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_QKV = ("q_proj", "k_proj", "v_proj")
_BUFFERS = ("embeddings.position_ids", "logit_scale")  # held by checkpoints, not learned or not asked


@dataclass(frozen=True)
class Place:
    """Where one tensor of a checkpoint belongs: a part of the base, and its parameters there.

    Args:
        part: "unet", "vae", "text_encoder" or "text_encoder_2".
        parameters: one name, or three that stand in the tensor one below the other.
        form: "same", "transposed", or "conv": a linear weight that the checkpoint keeps as a 1×1 convolution.
    """

    part: str
    parameters: tuple[str, ...]
    form: str = "same"


# --- from the checkpoint ------------------------------------------------------------------------------------------------------


def place(key: str, *, family: str) -> Place | None:
    """Where a checkpoint's tensor belongs; nothing if it is no weight of a base, such as an average kept beside it.

    Args:
        family: "sd1", "sd2" or "sdxl".

    Raises:
        ValueError: if the key is a UNet's, VAE's or text encoder's, but none that Stable Diffusion has.
    """
    if key.startswith(UNET):
        return Place("unet", (_module_of(key, key.removeprefix(UNET), lora_names.from_sgm),))
    if key.startswith(VAE):
        return vae_place(key.removeprefix(VAE))
    for part, prefix in CLIP[family].items():
        if key.startswith(prefix) and not key.endswith(_BUFFERS):
            return Place(part, (text_name(key.removeprefix(prefix)),))
    for part, prefix in OPEN_CLIP[family].items():
        if key.startswith(prefix) and not key.endswith(_BUFFERS):
            return _open_clip_place(part, key.removeprefix(prefix))
    return None


def vae_place(key: str) -> Place | None:
    """The same for the key of a VAE alone, in the original layout or diffusers' own.

    Raises:
        ValueError: if it is none that Stable Diffusion's VAE has.
    """
    if key.startswith(("loss.", "model_ema.")):
        return None
    name = _module_of(key, key, from_vae)
    is_projection = re.fullmatch(r".+\.attentions\.0\.to_(?:q|k|v|out\.0)\.weight", name)
    return Place("vae", (name,), "conv" if is_projection else "same")


def text_name(name: str) -> str:
    """A text encoder's parameter with the prefix of files: transformers has dropped `text_model.` in modules, and some files lack it."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def parts_of(tensor: Tensor, at: Place) -> list[Tensor]:
    """A checkpoint's tensor as its parameters, in the order of `at.parameters`."""
    if at.form == "transposed":
        return [tensor.T.contiguous()]
    if at.form == "conv" and tensor.ndim == 4:
        return [tensor.reshape(tensor.shape[:2])]
    return [piece.clone() for piece in tensor.chunk(3)] if len(at.parameters) == 3 else [tensor]


def joined(parameters: Sequence[Tensor], at: Place) -> Tensor:
    """The inverse of `parts_of`: the tensor that a checkpoint holds."""
    tensor = torch.cat(list(parameters)) if len(parameters) > 1 else parameters[0]
    if at.form == "transposed":
        return tensor.T.contiguous()
    return tensor[:, :, None, None] if at.form == "conv" else tensor


# --- to the checkpoint --------------------------------------------------------------------------------------------------------


def places(part: str, parameters: Iterable[str], *, family: str) -> dict[str, Place]:
    """The keys under which a checkpoint keeps the parameters of a part, each with its place: a part's names, all at once.

    Args:
        part: "unet", "vae", "text_encoder" or "text_encoder_2".
        parameters: diffusers' names; text encoders' with or without `text_model.`.
        family: "sd1", "sd2" or "sdxl".

    Raises:
        ValueError: if a parameter is none that the family has.
    """
    found: dict[str, Place] = {}
    for name in parameters:
        key = _key(part, name, family)
        at = place(key, family=family)
        assert at is not None
        found[key] = at
    return found


def _key(part: str, name: str, family: str) -> str:
    if part == "unet":
        attended = family == "sdxl" or not name.startswith("up_blocks.0.")  # level 0 of SD 1.x and 2.x has no transformers
        return UNET + _module_of(name, name, lambda module: lora_names.to_sgm(module, attention_before_upsampler=attended))
    if part == "vae":
        return VAE + _module_of(name, name, to_vae)
    if part in CLIP[family]:
        return CLIP[family][part] + text_name(name)
    if part in OPEN_CLIP[family]:
        return OPEN_CLIP[family][part] + _to_open_clip(text_name(name))
    raise ValueError(f"{family} has no {part}")


# --- the VAE's modules --------------------------------------------------------------------------------------------------------


def from_vae(module: str) -> str | None:
    """`decoder.up.3.block.0.nin_shortcut` → `decoder.up_blocks.0.resnets.0.conv_shortcut`; diffusers' own names stay."""
    if found := re.fullmatch(r"((?:en|de)coder)\.mid\.(block_([12])|attn_1)\.(\w+)", module):
        inner = (_VAE_RESNET if found[3] else _VAE_ATTENTION).get(found[4])
        station = f"resnets.{int(found[3]) - 1}" if found[3] else "attentions.0"
        return f"{found[1]}.mid_block.{station}.{inner}" if inner else None
    if found := re.fullmatch(r"(en|de)coder\.(down|up)\.([0-3])\.(?:block\.(\d)\.(\w+)|(down|up)sample\.conv)", module):
        level = int(found[3]) if found[2] == "down" else LEVELS - 1 - int(found[3])
        start = f"{found[1]}coder.{found[2]}_blocks.{level}"
        inner = _VAE_RESNET.get(found[5] or "")
        return f"{start}.{found[6]}samplers.0.conv" if found[6] else f"{start}.resnets.{found[4]}.{inner}" if inner else None
    if found := re.fullmatch(r"((?:en|de)coder\.mid_block\.attentions\.0)\.(query|key|value|proj_attn)", module):
        return f"{found[1]}.{_OLD_VAE_ATTENTION[found[2]]}"
    module = re.sub(r"^((?:en|de)coder)\.norm_out$", r"\1.conv_norm_out", module)
    return module if re.match(r"(en|de)coder\.(conv_in|conv_out|conv_norm_out|.*_block)|(post_)?quant_conv$", module) else None


def to_vae(module: str) -> str | None:
    """The inverse of `from_vae`."""
    if found := re.fullmatch(r"((?:en|de)coder)\.mid_block\.(?:resnets\.([01])|attentions\.0)\.([\w.]+)", module):
        inner = _inverse(_VAE_RESNET if found[2] else _VAE_ATTENTION).get(found[3])
        return f"{found[1]}.mid.{f'block_{int(found[2]) + 1}' if found[2] else 'attn_1'}.{inner}" if inner else None
    if found := re.fullmatch(r"((?:en|de)coder)\.(down|up)_blocks\.([0-3])\.(?:resnets\.(\d)\.(\w+)|(down|up)samplers\.0\.conv)", module):
        level = int(found[3]) if found[2] == "down" else LEVELS - 1 - int(found[3])
        inner = _inverse(_VAE_RESNET).get(found[5] or "")
        start = f"{found[1]}.{found[2]}.{level}"
        return f"{start}.{found[6]}sample.conv" if found[6] else f"{start}.block.{found[4]}.{inner}" if inner else None
    module = re.sub(r"^((?:en|de)coder)\.conv_norm_out$", r"\1.norm_out", module)
    return module if re.fullmatch(r"(en|de)coder\.(conv_in|conv_out|norm_out)|(post_)?quant_conv", module) else None


# --- OpenCLIP -----------------------------------------------------------------------------------------------------------------


def _open_clip_place(part: str, key: str) -> Place:
    if key in _OPEN_CLIP_FIXED:
        return Place(part, (_OPEN_CLIP_FIXED[key],), "transposed" if key == "text_projection" else "same")
    if found := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(?:attn\.in_proj_(weight|bias)|(.+)\.(weight|bias))", key):
        layer = f"text_model.encoder.layers.{found[1]}"
        if found[2]:
            return Place(part, tuple(f"{layer}.self_attn.{one}.{found[2]}" for one in _QKV))
        if found[3] in _OPEN_CLIP_LAYER:
            return Place(part, (f"{layer}.{_OPEN_CLIP_LAYER[found[3]]}.{found[4]}",))
    raise ValueError(key)


def _to_open_clip(name: str) -> str:
    fixed = _inverse(_OPEN_CLIP_FIXED)
    if name in fixed:
        return fixed[name]
    if found := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(?:self_attn\.[qkv]_proj|(.+))\.(weight|bias)", name):
        start, inner = f"transformer.resblocks.{found[1]}", _inverse(_OPEN_CLIP_LAYER).get(found[2] or "")
        if not found[2]:
            return f"{start}.attn.in_proj_{found[3]}"
        if inner:
            return f"{start}.{inner}.{found[3]}"
    raise ValueError(name)


def _module_of(key: str, name: str, rename: Callable[[str], str | None]) -> str:
    """A parameter's name with its module renamed; the last word stays."""
    module, _, last = name.rpartition(".")
    renamed = rename(module)
    if renamed is None or last not in ("weight", "bias"):
        raise ValueError(key)
    return f"{renamed}.{last}"


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}
