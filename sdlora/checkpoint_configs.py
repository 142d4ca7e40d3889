"""What a checkpoint's shapes say of its parts, over the family's own config.

A single file brings no configs. Those of its family are in the package, and what shapes can tell (channels, layers, widths) is taken from
the file, so that distilled or small relatives open too. What shapes cannot tell is the family's: 32 groups per norm, 8 heads in SD 1.x
and heads of 64 numbers everywhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlora.checkpoint_keys import Place

FAMILIES = Path(__file__).parent / "families"
HEAD = 64
Shapes = Mapping[str, tuple[int, ...]]


def of_family(family: str, part: str) -> dict[str, Any]:
    """The config of a part at full size.

    Args:
        family: "sd1", "sd2", "sd2-v" or "sdxl".
        part: "unet", "vae", "text_encoder", "text_encoder_2" or "scheduler".
    """
    (path,) = (FAMILIES / family / part).glob("*.json")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def fitted(config: dict[str, Any], shapes: Shapes, *, part: str) -> dict[str, Any]:
    """A family's config of a part with the sizes that a checkpoint has.

    Args:
        shapes: of the part's parameters, by diffusers' names.

    Raises:
        KeyError: if a parameter that every such part has is missing.
        ValueError: if a size is none that the part can have.
    """
    known = {"unet": _unet, "vae": _vae}.get(part, _text)
    return config | known(config, shapes)


def shapes_of(entries: Mapping[str, tuple[int, ...]], places: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters by diffusers' names, from those of a checkpoint's tensors."""
    found: dict[str, tuple[int, ...]] = {}
    for key, at in places.items():
        shape = entries[key]
        if at.form == "transposed":
            shape = shape[::-1]
        elif at.form == "conv":
            shape = shape[:2]
        elif len(at.parameters) == 3:
            shape = (shape[0] // 3, *shape[1:])
        found |= dict.fromkeys(at.parameters, shape)
    return found


def _unet(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    channels = [shapes[f"down_blocks.{b}.resnets.0.conv1.weight"][0] for b in range(_count(shapes, r"down_blocks\.(\d+)\."))]
    layers = [max(1, _count(shapes, rf"down_blocks\.{b}\.attentions\.0\.transformer_blocks\.(\d+)\.")) for b in range(len(channels))]
    widths = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    if len(widths) != 1:
        raise ValueError(f"cross-attention of {len(widths)} widths")
    sizes: dict[str, Any] = {"block_out_channels": channels, "cross_attention_dim": widths.pop()}
    if isinstance(config["attention_head_dim"], list):
        sizes["attention_head_dim"] = [_heads(count) for count in channels]
    if "transformer_layers_per_block" in config:
        sizes["transformer_layers_per_block"] = layers
    if "projection_class_embeddings_input_dim" in config:
        sizes["projection_class_embeddings_input_dim"] = shapes["add_embedding.linear_1.weight"][1]
    return sizes


def _vae(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    channels = [shapes[f"encoder.down_blocks.{b}.resnets.0.conv1.weight"][0] for b in range(len(config["block_out_channels"]))]
    return {"block_out_channels": channels, "latent_channels": shapes["decoder.conv_in.weight"][1]}


def _text(config: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """OpenCLIP of SD 2.x has one layer more in checkpoints: the last one, whose answer is never asked; begin and end are the last words."""
    layers = _count(shapes, r"text_model\.encoder\.layers\.(\d+)\.") - (config["num_hidden_layers"] == 23)
    words, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": words, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": _heads(width),
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1 if config["pad_token_id"] else 0,
        "projection_dim": shapes.get("text_projection.weight", (width,))[0],
    }  # fmt: skip


def _heads(width: int) -> int:
    if width < HEAD or width % HEAD:
        raise ValueError(f"{width} numbers cannot be shared among heads of {HEAD}")
    return width // HEAD


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers stand at one place of the names."""
    return len({found[1] for name in shapes if (found := re.match(pattern, name))})
