"""Small random pipelines with the real block structure of each family, and single files in the layout of the original checkpoints.

What a file's shapes cannot tell is real, so that single files of these load too: 32 groups per norm, heads of 64 (SD 1.x: 8 heads), two
layers per block. The name tables for single files are written out here from the original code, without a look at the package's.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdlora.mini.tokens import build_tokenizer

FAMILIES = ("sd1", "sd2", "sd2-v", "sdxl")
SAMPLE_SIZE = 16  # latents: pictures of 128 px
_DOWN, _CROSS_DOWN, _UP, _CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclass(frozen=True)
class Widths:
    """Widths of the text encoders; small, or the family's own so that LoRA files are recognised by their shapes."""

    first: int
    second: int = 0


_SMALL = {"sd1": Widths(192), "sd2": Widths(256), "sdxl": Widths(192, 256)}
_REAL = {"sd1": Widths(768), "sd2": Widths(1024), "sdxl": Widths(768, 1280)}


def make_folder(family: str, folder: Path, *, real_widths: bool = False, seed: int = 0) -> Path:
    """A random pipeline of "sd1", "sd2", "sd2-v" or "sdxl" in diffusers' layout, fp32; answers `folder`.

    With `real_widths` the text states are 768, 1024 or 2048 wide as in the real family, at 0.1 to 0.3 GB on the disk.
    """
    torch.manual_seed(seed)
    kind = family.removesuffix("-v")
    widths = (_REAL if real_widths else _SMALL)[kind]
    build = _xl_pipeline if kind == "sdxl" else _pipeline
    build(family, widths, folder).save_pretrained(folder)
    return folder


def _pipeline(family: str, widths: Widths, folder: Path) -> DiffusionPipeline:
    second_generation = family.startswith("sd2")
    words = tokenizer(folder, pad="!" if second_generation else "<|endoftext|>")
    structure = {"use_linear_projection": True, "attention_head_dim": [1, 1, 2, 2]} if second_generation else {"attention_head_dim": 8}
    unet = UNet2DConditionModel(
        sample_size=SAMPLE_SIZE, cross_attention_dim=widths.first, layers_per_block=2,
        block_out_channels=(64, 64, 128, 128) if second_generation else (32, 64, 64, 64),
        down_block_types=(_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN), up_block_types=(_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP), **structure,
    )  # fmt: skip
    if family == "sd2-v":
        schedule = DDIMScheduler(**_NOISE, set_alpha_to_one=False, clip_sample=False, prediction_type="v_prediction")
    else:
        schedule = PNDMScheduler(**_NOISE, set_alpha_to_one=False, skip_prk_steps=True)
    return StableDiffusionPipeline(
        unet=unet, vae=_vae(0.18215), text_encoder=CLIPTextModel(_text(widths.first, words, "gelu" if second_generation else "quick_gelu")),
        tokenizer=words, scheduler=schedule, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _xl_pipeline(family: str, widths: Widths, folder: Path) -> DiffusionPipeline:
    words, words_2 = tokenizer(folder, pad="<|endoftext|>"), tokenizer(folder, pad="!")
    unet = UNet2DConditionModel(
        sample_size=SAMPLE_SIZE, block_out_channels=(64, 64, 128), layers_per_block=2, attention_head_dim=[1, 1, 2],
        cross_attention_dim=widths.first + widths.second, use_linear_projection=True, transformer_layers_per_block=[1, 2, 2],
        down_block_types=(_DOWN, _CROSS_DOWN, _CROSS_DOWN), up_block_types=(_CROSS_UP, _CROSS_UP, _UP),
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=widths.second + 6 * 256,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        unet=unet, vae=_vae(0.13025), tokenizer=words, tokenizer_2=words_2,
        text_encoder=CLIPTextModel(_text(widths.first, words, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text(widths.second, words, "gelu", projected=True)),
        scheduler=EulerDiscreteScheduler(**_NOISE), add_watermarker=False,
    )  # fmt: skip


def _vae(scaling: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), layers_per_block=2, latent_channels=4, sample_size=SAMPLE_SIZE * 8, scaling_factor=scaling,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def _text(width: int, words: CLIPTokenizer, act: str, *, projected: bool = False) -> CLIPTextConfig:
    """Three layers; each deviates enough from the others for a mix-up to show."""
    return CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=width // 64,
        max_position_embeddings=77, hidden_act=act, eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id,
        pad_token_id=words.pad_token_id, **({"projection_dim": width} if projected else {}),
    )  # fmt: skip


def tokenizer(folder: Path, *, pad: str) -> CLIPTokenizer:
    """The mini world's tokenizer, which knows "!" as id 0 as CLIP's does, with the padding that a family wants."""
    plain = folder.parent / f".{folder.name}-words"
    if not plain.is_dir():
        build_tokenizer(plain)
    return CLIPTokenizer.from_pretrained(plain, model_max_length=77, pad_token=pad)


# --- single files -------------------------------------------------------------------------------------------------------------

State = dict[str, torch.Tensor]


def make_single_file(
    family: str, folder: Path, path: Path, *, metadata: dict[str, str] | None = None, extra: State | None = None, without: str = "nothing"
) -> Path:
    """The pipeline of `make_folder` as one checkpoint in the layout of the original LDM and SGM code; answers `path`.

    The blocks are numbered by walking through the levels as the original constructors do. What original files hold beside the weights
    is there too: buffers, an average, and OpenCLIP's last layer and projection that SD 2.x never asks.
    """
    kind = family.removesuffix("-v")
    out: State = {
        "betas": torch.linspace(0, 1, 8),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelout2bias": torch.ones(4),
    }
    out |= prefixed("model.diffusion_model.", original_unet(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")))
    out |= prefixed("first_stage_model.", original_vae(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")))
    first = load_file(folder / "text_encoder" / "model.safetensors")
    if kind == "sd2":
        out |= prefixed("cond_stage_model.model.", open_clip(first, unasked=True))
    else:
        start = "conditioner.embedders.0.transformer.text_model." if kind == "sdxl" else "cond_stage_model.transformer.text_model."
        out |= prefixed(start, first | {"embeddings.position_ids": torch.arange(77)[None]})
    if kind == "sdxl":
        second = load_file(folder / "text_encoder_2" / "model.safetensors")
        out |= prefixed("conditioner.embedders.1.model.", open_clip(second, unasked=False))
    kept = {key: tensor.contiguous() for key, tensor in (out | (extra or {})).items() if not key.startswith(without)}
    save_file(kept, path, metadata=metadata)
    return path


def prefixed(start: str, state: State) -> State:
    return {start + key: tensor for key, tensor in state.items()}


def _moved(state: State, out: State, names: dict[str, str]) -> None:
    """Moves everything that begins with the left-hand names to the right-hand names."""
    for old, new in names.items():
        found = [key for key in state if key.startswith(f"{old}.")]
        assert found, old
        for key in found:
            out[new + key.removeprefix(old)] = state.pop(key)


def _has(state: State, start: str) -> bool:
    return any(key.startswith(f"{start}.") for key in state)


def _resnet(state: State, out: State, old: str, new: str) -> None:
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
    }
    if _has(state, f"{old}.conv_shortcut"):
        names["conv_shortcut"] = "skip_connection"
    _moved(state, out, {f"{old}.{here}": f"{new}.{there}" for here, there in names.items()})


def original_unet(state: State) -> State:
    state, out = dict(state), {}
    levels = len({key.split(".")[1] for key in state if key.startswith("down_blocks.")})
    _moved(
        state, out, {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0"}
    )
    if _has(state, "add_embedding"):
        _moved(state, out, {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"})
    block = 0
    for level in range(levels):
        for layer in range(2):
            block += 1
            _resnet(state, out, f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{block}.0")
            if _has(state, f"down_blocks.{level}.attentions"):
                _moved(state, out, {f"down_blocks.{level}.attentions.{layer}": f"input_blocks.{block}.1"})
        if level < levels - 1:
            block += 1
            _moved(state, out, {f"down_blocks.{level}.downsamplers.0.conv": f"input_blocks.{block}.0.op"})
    _resnet(state, out, "mid_block.resnets.0", "middle_block.0")
    _moved(state, out, {"mid_block.attentions.0": "middle_block.1"})
    _resnet(state, out, "mid_block.resnets.1", "middle_block.2")
    block = 0
    for level in range(levels):
        for layer in range(3):
            stations = 1
            _resnet(state, out, f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{block}.0")
            if _has(state, f"up_blocks.{level}.attentions.{layer}"):
                _moved(state, out, {f"up_blocks.{level}.attentions.{layer}": f"output_blocks.{block}.1"})
                stations += 1
            if layer == 2 and level < levels - 1:
                _moved(state, out, {f"up_blocks.{level}.upsamplers.0.conv": f"output_blocks.{block}.{stations}.conv"})
            block += 1
    _moved(state, out, {"conv_norm_out": "out.0", "conv_out": "out.2"})
    assert not state
    return out


def original_vae(state: State) -> State:
    """The original counts the decoder's levels from the largest picture, and attends with 1×1 convolutions."""
    state, out = dict(state), {}
    _moved(state, out, {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"})
    for side, way, layers in (("encoder", "down", 2), ("decoder", "up", 3)):
        ends = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
        _moved(state, out, {f"{side}.{here}": f"{side}.{there}" for here, there in ends.items()})
        for i, number in enumerate((0, 1, 2, 3) if way == "down" else (3, 2, 1, 0)):
            for layer in range(layers):
                here, there = f"{side}.{way}_blocks.{i}.resnets.{layer}", f"{side}.{way}.{number}.block.{layer}"
                if _has(state, f"{here}.conv_shortcut"):
                    _moved(state, out, {f"{here}.conv_shortcut": f"{there}.nin_shortcut"})
                _moved(state, out, {here: there})
            if i < 3:
                _moved(state, out, {f"{side}.{way}_blocks.{i}.{way}samplers.0.conv": f"{side}.{way}.{number}.{way}sample.conv"})
        _moved(state, out, {f"{side}.mid_block.resnets.0": f"{side}.mid.block_1", f"{side}.mid_block.resnets.1": f"{side}.mid.block_2"})
        for here, there in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
            weight = state.pop(f"{side}.mid_block.attentions.0.{here}.weight")
            out[f"{side}.mid.attn_1.{there}.weight"] = weight if here == "group_norm" else weight[..., None, None]
            out[f"{side}.mid.attn_1.{there}.bias"] = state.pop(f"{side}.mid_block.attentions.0.{here}.bias")
    assert not state
    return out


def open_clip(state: State, *, unasked: bool) -> State:
    """OpenCLIP's names, with query, key and value as one; `unasked` adds the last layer and the projection of SD 2.x's original."""
    state, out = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}, {}
    out["positional_embedding"] = state.pop("embeddings.position_embedding.weight")
    _moved(state, out, {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"})
    layers = len({key.split(".")[2] for key in state if key.startswith("encoder.layers.")})
    for layer in range(layers):
        here, there = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            three = [state.pop(f"{here}.self_attn.{one}_proj.{kind}") for one in "qkv"]
            out[f"{there}.attn.in_proj_{kind}"] = torch.cat(three)
        names = {
            "layer_norm1": "ln_1",
            "layer_norm2": "ln_2",
            "self_attn.out_proj": "attn.out_proj",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        }
        _moved(state, out, {f"{here}.{one}": f"{there}.{other}" for one, other in names.items()})
    if unasked:
        last, width = f"transformer.resblocks.{layers - 1}", out["positional_embedding"].shape[1]
        out |= {
            key.replace(last, f"transformer.resblocks.{layers}"): tensor + 1 for key, tensor in out.items() if key.startswith(f"{last}.")
        }
        out["text_projection"] = torch.randn(width, width)
    else:
        out["text_projection"] = state.pop("text_projection.weight").T
    out["logit_scale"] = torch.tensor(4.6)
    assert not state
    return out
