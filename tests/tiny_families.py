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
