"""Names of modules in LoRA files and in original checkpoints: fixed tables, in both directions.

Inside the package a module is called by its canonical stem: kohya's, with diffusers' names for the UNet (`lora_unet_down_blocks_0_…`) and
`lora_te1_`, `lora_te2_` for the text encoders of every family. Files differ: SDXL's carry the names of the original SGM code for
the UNet, SD 1.x and 2.x say `lora_te_`. Nothing here is asked of a library: transformers 5.6 renamed the inside of CLIPTextModel, and
files that follow such a change do not load anywhere else. A stem has lost which underscores were dots, so the words are listed.
"""

from __future__ import annotations

import re

_LAYERS = 2  # residual blocks per level in every family; on the way up one more
_BLOCK = _LAYERS + 1

_WORDS = (
    "down_blocks", "up_blocks", "mid_block", "resnets", "attentions", "downsamplers", "upsamplers", "conv", "conv1", "conv2", "norm",
    "norm1", "norm2", "norm3", "time_emb_proj", "conv_shortcut", "proj_in", "proj_out", "transformer_blocks", "attn1", "attn2", "to_q",
    "to_k", "to_v", "to_out", "ff", "net", "proj", "conv_in", "conv_out", "conv_norm_out", "time_embedding", "add_embedding", "linear_1",
    "linear_2", "input_blocks", "middle_block", "output_blocks", "in_layers", "emb_layers", "out_layers", "skip_connection", "op",
    "time_embed", "label_emb", "out", "text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj",
    "layer_norm1", "layer_norm2", "mlp", "fc1", "fc2", "final_layer_norm", "embeddings", "token_embedding", "position_embedding",
    "text_projection",
)  # fmt: skip
_WORD = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))}|[0-9]+)(?:_|$)")

_LAYER = r"(?:down_blocks\.[0-9]+\.{kind}\.[01]|up_blocks\.[0-9]+\.{kind}\.[012]|mid_block\.{kind}\.{middle})"
_IN_TRANSFORMER = r"transformer_blocks\.[0-9]+\.(?:norm[123]|attn[12]\.to_(?:q|k|v|out\.0)|ff\.net\.(?:0\.proj|2))"
_UNET = re.compile(
    _LAYER.format(kind="resnets", middle="[01]") + r"\.(?:norm[12]|conv[12]|time_emb_proj|conv_shortcut)|"
    + _LAYER.format(kind="attentions", middle="0") + rf"\.(?:norm|proj_in|proj_out|{_IN_TRANSFORMER})|"
    r"down_blocks\.[0-9]+\.downsamplers\.0\.conv|up_blocks\.[0-9]+\.upsamplers\.0\.conv|"
    r"conv_in|conv_out|conv_norm_out|(?:time|add)_embedding\.linear_[12]"
)  # fmt: skip
_BLOCKS = re.compile(r"(?P<where>\w+?)(?:\.(?P<level>[0-9]+))?\.(?P<kind>[a-z]+)\.(?P<layer>[0-9]+)\.(?P<inner>.+)")
_TEXT = re.compile(
    r"(?:encoder\.layers\.[0-9]+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12])"
    r"|final_layer_norm|embeddings\.(?:token|position)_embedding|text_projection)"
)

_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_READ = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}

_TO_SGM = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_FROM_SGM = {sgm: name for name, sgm in _TO_SGM.items()}
_RESNET_TO_SGM = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_RESNET_FROM_SGM = {sgm: name for name, sgm in _RESNET_TO_SGM.items()}
_MIDDLE = {"resnets0": "0", "attentions0": "1", "resnets1": "2"}


def stem_of(part: str, module_name: str) -> str:
    """The canonical stem of a module.

    Args:
        part: "unet", "text_encoder" or "text_encoder_2".
        module_name: as diffusers or transformers call it, with dots; a text encoder's with or without `text_model.` before it.

    Raises:
        ValueError: if a text encoder has no module of this name in the table, or the part is unknown.
    """
    if part not in _PREFIXES:
        raise ValueError(f"no part of a base is called {part}; there are {', '.join(_PREFIXES)}")
    if part != "unet":
        module_name = _text_name(module_name.removeprefix("text_model."))
    return _PREFIXES[part] + module_name.replace(".", "_")


def written_stem(stem: str, *, family: str) -> str:
    """What a canonical stem is called in a file of kohya's layout.

    Args:
        stem: a canonical stem.
        family: "sdxl" has SGM names in the UNet and two text encoders; all others have diffusers' names and `lora_te_`.

    Raises:
        ValueError: if the stem is not canonical.
    """
    part, name = dotted(stem)
    if family != "sdxl":
        return "lora_te_" + stem.removeprefix("lora_te1_") if part == "text_encoder" else stem
    return "lora_unet_" + to_sgm(name).replace(".", "_") if part == "unet" else stem


def canonical(stem: str) -> str | None:
    """The canonical stem of a stem that was found in a file, or None if it names no module of Stable Diffusion.

    Known are both namings of the UNet in every family, `lora_te_`, `lora_te1_`, `lora_te2_`, and the same after `lycoris_`.
    """
    stem = _without_lycoris(stem)
    prefix = next((prefix for prefix in _READ if stem.startswith(prefix)), None)
    words = None if prefix is None else _words(stem.removeprefix(prefix))
    if prefix is None or words is None:
        return None
    try:
        if prefix != "lora_unet_":
            return stem_of(_READ[prefix], words)
        name = words if _UNET.fullmatch(words) else from_sgm(words)
        return stem_of("unet", name)
    except ValueError:
        return None


def dotted(stem: str) -> tuple[str, str]:
    """The part of the base that a canonical stem belongs to, and the module's name with dots.

    Returns:
        The part ("unet", "text_encoder", "text_encoder_2"), and diffusers' name; that of a text encoder's module never begins with
        `text_model.`, whatever today's transformers calls it.

    Raises:
        ValueError: if the stem is not canonical.
    """
    for part, prefix in _PREFIXES.items():
        words = _words(stem.removeprefix(prefix)) if stem.startswith(prefix) else None
        if words is not None:
            name = words if part == "unet" else words.removeprefix("text_model.")
            if (_UNET if part == "unet" else _TEXT).fullmatch(name) and stem_of(part, name) == stem:
                return part, name
    raise ValueError(f"{stem} is not the canonical stem of a module")


def to_sgm(name: str, *, attention_before_upsampler: bool = True) -> str:
    """A UNet module's name in the original LDM and SGM code, as below `model.diffusion_model.` in a checkpoint.

    Level i and layer j of diffusers are input_blocks[3 i + j + 1] and output_blocks[3 i + j]; in each of these the residual block is
    0, the transformer 1, and an upsampler what comes after them.

    Args:
        name: diffusers' name with dots.
        attention_before_upsampler: whether the upsampler's level has transformers: SDXL's all do, level 0 of SD 1.x and 2.x has none.

    Raises:
        ValueError: if no such module is known.
    """
    if name in _TO_SGM:
        return _TO_SGM[name]
    found = _BLOCKS.fullmatch(name) if _UNET.fullmatch(name) else None
    if not found:
        raise ValueError(f"no UNet module is called {name}")
    where, level, kind, layer, inner = found.groups()
    if kind == "resnets":
        inner = _RESNET_TO_SGM[inner]
    if where == "mid_block":
        return f"middle_block.{_MIDDLE[kind + layer]}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{_BLOCK * int(level) + _BLOCK}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{_BLOCK * int(level) + _LAYERS}.{2 if attention_before_upsampler else 1}.conv"
    blocks, index = ("input", int(layer) + 1) if where == "down_blocks" else ("output", int(layer))
    return f"{blocks}_blocks.{_BLOCK * int(level) + index}.{0 if kind == 'resnets' else 1}.{inner}"


def from_sgm(name: str) -> str:
    """diffusers' name of a UNet module of the original LDM and SGM code: the inverse of `to_sgm`, for both places of an upsampler.

    Raises:
        ValueError: if no such module is known.
    """
    found = _FROM_SGM.get(name) or _inner_from_sgm(name)
    if found is None or not _UNET.fullmatch(found):
        raise ValueError(f"no module of the original UNet is called {name}")
    return found


def _inner_from_sgm(name: str) -> str | None:
    """The same for what is in blocks; names of no module come out as no module."""
    if middle := re.fullmatch(r"middle_block\.([012])\.(.+)", name):
        where = ("resnets.0", "attentions.0", "resnets.1")[int(middle[1])]
        return f"mid_block.{where}.{_RESNET_FROM_SGM.get(middle[2], middle[2])}"
    found = re.fullmatch(r"(input|output)_blocks\.([0-9]+)\.([012])\.(.+)", name)
    if not found:
        return None
    down, place, inner = found[1] == "input", int(found[3]), found[4]
    level, layer = divmod(int(found[2]) - down, _BLOCK)
    if down and layer == _LAYERS:
        return f"down_blocks.{level}.downsamplers.0.conv" if (place, inner) == (0, "op") else None
    if not down and inner == "conv":
        return f"up_blocks.{level}.upsamplers.0.conv" if layer == _LAYERS and place in (1, 2) else None
    way = "down" if down else "up"
    if place == 0:
        return f"{way}_blocks.{level}.resnets.{layer}.{_RESNET_FROM_SGM.get(inner, inner)}"
    return f"{way}_blocks.{level}.attentions.{layer}.{inner}" if place == 1 else None


def _text_name(name: str) -> str:
    """A text encoder's module as files spell it: `text_model.` before all but the projection, which stands outside of it."""
    if not _TEXT.fullmatch(name):
        raise ValueError(f"no LoRA file stem is known for text-encoder module {name}")
    return name if name == "text_projection" else f"text_model.{name}"


def _words(text: str) -> str | None:
    """`down_blocks_0_resnets_1_conv1` → `down_blocks.0.resnets.1.conv1`; None if a word is unknown."""
    words, place = [], 0
    while place < len(text):
        found = _WORD.match(text, place)
        if not found:
            return None
        words.append(found[1])
        place = found.end()
    return ".".join(words) if "_".join(words) == text else None


def _without_lycoris(stem: str) -> str:
    """`lycoris_unet_…` and `lycoris_te_…` → `lora_…`; with no part after the prefix it wrapped a UNet."""
    if not stem.startswith("lycoris_"):
        return stem
    rest = stem.removeprefix("lycoris_")
    return rest if rest.startswith("lora_") else f"lora_{rest}" if f"lora_{rest}".startswith(tuple(_READ)) else f"lora_unet_{rest}"
