"""Stems are a table with a round trip: those that are written are sd-scripts' own, and every spelling of a module comes back to it."""

import gzip
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora import base_model, lora, lora_layouts, lora_names
from sdlora.deltas import LowRank, Update

GOLDEN = Path(__file__).parent / "data" / "kohya_modules_rank4.json.gz"  # what sd-scripts itself creates, by network
NETWORKS = {
    "sd15_default": ("sd1", "attn-mlp", 264),
    "sd15_conv": ("sd1", "attn-mlp-conv", 350),
    "sd2_default": ("sd2", "attn-mlp", 330),
    "sdxl_default": ("sdxl", "attn-mlp", 986),
    "sdxl_conv": ("sdxl", "attn-mlp-conv", 1052),
}


@cache
def golden() -> dict[str, dict[str, list[list[int]]]]:
    return dict(json.loads(gzip.decompress(GOLDEN.read_bytes())))


@cache
def full_size(family: str) -> dict[str, nn.Module]:
    """The parts of a family at their full size, without memory."""
    wide = {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
    with torch.device("meta"):
        if family == "sd1":
            return {
                "unet": UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
                "text_encoder": CLIPTextModel(text_config(768, 12)),
            }
        if family == "sd2":
            return {"unet": UNet2DConditionModel(cross_attention_dim=1024, **wide), "text_encoder": CLIPTextModel(text_config(1024, 23))}
        return {
            "unet": sdxl_unet(),
            "text_encoder": CLIPTextModel(text_config(768, 12)),
            "text_encoder_2": CLIPTextModelWithProjection(text_config(1280, 32)),
        }


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(320, 640, 1280), transformer_layers_per_block=[1, 2, 10], cross_attention_dim=2048,
        attention_head_dim=[5, 10, 20], use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def text_config(width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, projection_dim=width)


def update(module: nn.Module, *, rank: int = 4) -> Update:
    """A low-rank update of a module's shape, without memory."""
    weight = lora.base_weight(module)
    down = torch.empty(rank, *weight.shape[1:], device="meta")
    return Update(LowRank(down, torch.empty(weight.shape[0], rank, *[1] * (weight.ndim - 2), device="meta"), 4.0))


def targeted(family: str, preset: str) -> dict[str, Update]:
    """What training with a preset would write, by canonical stem."""
    return {
        lora_names.stem_of(part, name): update(model.get_submodule(name))
        for part, model in full_size(family).items()
        for name in lora.matching(model, base_model.targets(preset, part=part))
    }


def modules(family: str) -> Iterator[tuple[str, str]]:
    """Every module with a weight of its own, by part and name."""
    for part, model in full_size(family).items():
        for name, module in model.named_modules():
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                yield part, name


@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_written_is_what_sd_scripts_writes_key_by_key(network: str) -> None:
    family, preset, count = NETWORKS[network]
    found = lora_layouts.tensors_of(targeted(family, preset), family=family)
    shapes = {key: list(tensor.shape) for key, tensor in found.items()}
    expected = {}
    for stem, (down, up) in golden()[network].items():
        expected |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": []}
    assert shapes == expected
    assert len(shapes) == 3 * count


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_module_comes_back_from_every_spelling(family: str) -> None:
    seen = set()
    for part, name in modules(family):
        stem = lora_names.stem_of(part, name)
        spelled = {stem, f"lycoris_{stem}", f"lycoris_{stem.removeprefix('lora_')}"}
        spelled |= {lora_names.written_stem(stem, family=other) for other in ("sd1", "sd2", "sdxl", "mini", family)}
        assert {lora_names.canonical(one) for one in spelled} == {stem}
        assert lora_names.dotted(stem) == (part, name.removeprefix("text_model."))
        assert stem not in seen
        seen.add(stem)
    assert len(seen) > 400


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_original_unet_names_are_those_that_diffusers_reads_from_checkpoints(family: str) -> None:
    unet = full_size(family)["unet"]
    original = {}
    for name in unet.state_dict():
        module, _, kind = name.rpartition(".")
        bare_level = family == "sd1" and module.startswith("up_blocks.0.upsamplers")
        there = lora_names.to_sgm(module, attention_before_upsampler=not bare_level)
        assert lora_names.from_sgm(there) == module
        original[f"model.diffusion_model.{there}.{kind}"] = name
    assert len(original) == {"sd1": 686, "sdxl": 1680}[family]
    config = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": unet.config.addition_embed_type}
    assert {name: value for name, value in convert_ldm_unet_checkpoint(dict(original), config).items()} == {
        name: name for name in original.values()
    }


def test_both_places_of_an_upsampler_are_read() -> None:
    for place in ("output_blocks_2_1_conv", "output_blocks_2_2_conv", "up_blocks_0_upsamplers_0_conv"):
        assert lora_names.canonical(f"lora_unet_{place}") == "lora_unet_up_blocks_0_upsamplers_0_conv"
    assert lora_names.canonical("lycoris_up_blocks_0_upsamplers_0_conv") == "lora_unet_up_blocks_0_upsamplers_0_conv"


def test_text_encoder_stems_are_fixed_text_with_and_without_the_old_prefix() -> None:
    stem = "lora_te1_text_model_encoder_layers_3_self_attn_out_proj"
    for name in ("encoder.layers.3.self_attn.out_proj", "text_model.encoder.layers.3.self_attn.out_proj"):
        assert lora_names.stem_of("text_encoder", name) == stem
        assert lora_names.stem_of("text_encoder_2", name) == stem.replace("te1", "te2")
    for prefix in ("lora_te_", "lora_te1_"):
        assert lora_names.canonical(f"{prefix}text_model_encoder_layers_3_self_attn_out_proj") == stem
        assert lora_names.canonical(f"{prefix}encoder_layers_3_self_attn_out_proj") == stem
    assert lora_names.written_stem(stem, family="sd2").startswith("lora_te_text_model_")
    assert lora_names.written_stem(stem, family="sdxl") == stem
    assert lora_names.stem_of("text_encoder_2", "text_projection") == "lora_te2_text_projection"


@pytest.mark.parametrize(
    "stem",
    [
        "lora_unet_double_blocks_0_img_attn_qkv",  # Flux
        "lora_unet_joint_blocks_3_x_block_attn_qkv",  # SD 3
        "lora_unet_proj_out",
        "lora_unet_down_blocks_0_resnets_7_conv1",
        "lora_unet_down_blocks_0_resnets_0_conv1_",
        "lora_unet_input_blocks_3_1_proj_in",
        "lora_unet_input_blocks_3_0_conv",
        "lora_unet_output_blocks_1_2_conv",
        "lora_unet_output_blocks_1_2_proj_in",
        "lora_unet_middle_block_1_conv1_proj",
        "lora_unet_input_blocks_" + "9" * 5000 + "_0_op",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "lora_te_text_model_encoder_layers_3_self_attn_qkv",
        "lora_te2_text_model_",
        "lora_unet_",
        "lora_unet",
        "",
    ],
)
def test_names_of_other_models_are_no_stems(stem: str) -> None:
    assert lora_names.canonical(stem) is None
    with pytest.raises(ValueError, match="is not the canonical stem"):
        lora_names.dotted(stem)


def test_modules_that_no_table_knows_are_refused() -> None:
    with pytest.raises(ValueError, match="no LoRA file stem"):
        lora_names.stem_of("text_encoder", "embeddings.something")
    with pytest.raises(ValueError, match="no part of a base is called vae"):
        lora_names.stem_of("vae", "encoder.conv_in")
    with pytest.raises(ValueError, match="no UNet module"):
        lora_names.to_sgm("mid_block.resnets.2.conv1")
    with pytest.raises(ValueError, match="no module of the original UNet"):
        lora_names.from_sgm("down_blocks.0.resnets.0.conv1")
