"""Opening a base: a diffusers folder; `mini` is the one in the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from sdlora.base_model import Base
from sdlora.errors import UserError

MINI = Path(__file__).parent / "mini" / "weights"


def folder_of(name: str) -> Path:
    """The folder that a base's name means.

    Raises:
        UserError: if it is neither "mini" nor a folder with a diffusers pipeline.
    """
    folder = MINI if name == "mini" else Path(name)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"Base '{name}' is unknown; give \"mini\" or a folder with a diffusers pipeline (it holds model_index.json).")
    return folder


def load(name: str, *, device: torch.device, dtype: torch.dtype) -> Base:
    """Opens a base, frozen and ready; the VAE stays in fp32, where it cannot overflow.

    Raises:
        UserError: if there is no such base, or its files are damaged.
    """
    folder = folder_of(name)
    transformers_logging.disable_progress_bar()  # it would run through our own bars
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    try:
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=dtype, **options)
        text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype, **options)
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32, **options)
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
        schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    except (OSError, ValueError, RuntimeError) as problem:
        raise UserError(f"Base '{name}' cannot be opened: {str(problem).splitlines()[0]}") from problem
    for module in (unet, text_encoder, vae):
        module.to(device).eval().requires_grad_(False)
    weights = tuple(sorted((folder / "unet").glob("*.safetensors")))
    family = "mini" if unet.config.cross_attention_dim == 128 else "sd1"
    return Base(name, family, unet, vae, (text_encoder,), (tokenizer,), schedule.get("prediction_type", "epsilon"), schedule, weights)
