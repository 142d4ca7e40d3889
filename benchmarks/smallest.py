"""The smallest run that has all that a run can have: for benchmarks and tests which need many runs, or long ones.

A base with random weights and 28 trained modules, of which two steps cost a tenth of a second on one core, and eight pictures. The run
draws captions, ranks and timesteps, keeps an average, trains the text encoder, and adds up batches across the ends of epochs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora import config
from sdlora.config import Config
from sdlora.mini import pretrain, world
from sdlora.mini.tokens import build_tokenizer

STEPS, SAVE_EVERY = 16, 4
OPTIMIZER: dict[str, Any] = {
    "learning_rate": 1e-3, "text_encoder_learning_rate": 2e-4, "schedule": "cosine", "warmup": 0.2, "ema": 0.9, "accumulation": 2,
}  # fmt: skip


def make_base(
    folder: Path, *, widths: tuple[int, ...] = (8,), middle: str | None = None, text_width: int = 8, text_layers: int = 1
) -> Path:
    """A pipeline with random weights, by default as small as diffusers makes it: one block down, one up, nothing between.

    Args:
        widths: channels of the UNet's blocks down and, backwards, up.
        middle: diffusers' word for the block between, or None.
        text_width, text_layers: of the text encoder.
    """
    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder / "words")
    vae = AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=widths, layers_per_block=1, norm_num_groups=4, cross_attention_dim=text_width,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths), mid_block_type=middle,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=text_width, intermediate_size=2 * text_width, num_hidden_layers=text_layers,
            num_attention_heads=2, max_position_embeddings=77, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        )
    )  # fmt: skip
    pretrain.export(folder / "pipeline", vae, nn.ModuleDict({"unet": unet, "text_encoder": text}), tokenizer, 0.5)
    return folder / "pipeline"


def make_pictures(folder: Path) -> Path:
    """Eight pictures in two shapes: five batches of at most two, so that with steps of two batches every other epoch ends within a step."""
    folder.mkdir(parents=True)
    for i in range(8):
        scene = world.training_scene(1, i)
        picture = world.draw(scene, width_px=32)
        (picture if i < 5 else picture.resize((24, 48))).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(", ".join(dict.fromkeys(scene.caption.split())))
    return folder


def exacting(base: Path, pictures: Path, **changes: Any) -> Config:
    """A run with all that could go on wrongly: chance in captions and ranks, an average, trained text encoders, batches that add up."""
    values: dict[str, Any] = {
        "base": str(base), "data": str(pictures), "kind": "style", "trigger": "vitrail", "name": "tiny", "report": False, "batch": 2,
        "steps": STEPS, "save_every": SAVE_EVERY, "keep_last": 2, "sample_every": 0, "sample_prompts": ["a cup"],
        "validation": {"every": 2 * SAVE_EVERY, "draws": 4},
        "optimizer": OPTIMIZER,
        "lora": {"rank": 2, "alpha": 2.0, "targets": "attn", "text_encoder": True, "rank_dropout": 0.2},
        "captions": {"shuffle": True, "tag_dropout": 0.2, "dropout": 0.2},
    }  # fmt: skip
    return config.parse(values | changes, where="smallest")
