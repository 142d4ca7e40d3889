"""Base models: opening one, and what differs between families.

A base is a diffusers folder; `mini` is the one in the package. What the rest of the project needs of it stands in one record, so
that the trainer and the generator never ask which family they have.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from sdlora import lora, lora_file
from sdlora.errors import UserError

MINI = Path(__file__).parent / "mini" / "weights"
ATTENTION = ("*.attn?.to_q", "*.attn?.to_k", "*.attn?.to_v", "*.attn?.to_out.0")
MLP = ("*.ff.net.0.proj", "*.ff.net.2", "*.proj_in", "*.proj_out")
CONV = ("*.resnets.?.conv1", "*.resnets.?.conv2", "*.resnets.?.conv_shortcut", "*.resnets.?.time_emb_proj", "*samplers.0.conv")
PRESETS: dict[str, tuple[str, ...]] = {"attn": ATTENTION, "attn-mlp": ATTENTION + MLP, "attn-mlp-conv": ATTENTION + MLP + CONV}
TEXT_ATTENTION = ("*.self_attn.?_proj", "*.self_attn.out_proj")


@dataclass
class Base:
    """A loaded base: frozen modules, in evaluation mode, on one device."""

    name: str
    folder: Path
    unet: Any
    text_encoder: Any
    vae: Any
    tokenizer: Any
    prediction: str
    schedule: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        device: torch.device = next(self.unet.parameters()).device
        return device

    @property
    def reduction(self) -> int:
        """Pixels per latent in each direction: 8 for Stable Diffusion."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def resolution_px(self) -> int:
        """The side of the square that the base was trained on."""
        return int(self.unet.config.sample_size) * self.reduction

    @property
    def scaling(self) -> float:
        """Latents are multiplied by this after encoding, so that their deviation is about 1."""
        return float(self.vae.config.scaling_factor)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules that a LoRA may change."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}


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
    return Base(name, folder, unet, text_encoder, vae, tokenizer, schedule.get("prediction_type", "epsilon"), schedule)


def family_of(base: Base) -> str:
    """The base's family by the width of its text states, which every LoRA file shows too."""
    return lora_file.FAMILIES.get(int(base.unet.config.cross_attention_dim), "other")


def targets(preset: str | list[str]) -> tuple[str, ...]:
    """The UNet's name patterns of a preset, or the patterns themselves.

    Raises:
        UserError: if a preset's name is unknown.
    """
    if isinstance(preset, list):
        return tuple(preset)
    if preset not in PRESETS:
        raise UserError(f"LoRA targets '{preset}' are unknown; presets are {', '.join(PRESETS)}, or give a list of patterns.")
    return PRESETS[preset]


def stems(base: Base) -> dict[str, tuple[str, str]]:
    """Where each stem of a LoRA file belongs: the part of the base and the module's name in it."""
    places = {}
    for part, stem_of in (("unet", lora_file.unet_stem), ("text_encoder", lora_file.text_stem)):
        for name in lora.places(base.parts[part]):
            if part == "unet" or "encoder.layers." in name:
                places[stem_of(name)] = (part, name)
    return places


def weights_hash(base: Base) -> str:
    """SHA-256 over the UNet's weight file: says which base a LoRA was made for."""
    digest = hashlib.sha256()
    for path in sorted((base.folder / "unet").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@torch.no_grad()
def encode(base: Base, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [B, 4, H/8, W/8] of the latents of pictures [B, 3, H, W] from -1 to 1, scaled, fp32."""
    posterior = base.vae.encode(images.to(base.device, torch.float32)).latent_dist
    return posterior.mean * base.scaling, posterior.std * base.scaling


@torch.no_grad()
def decode(base: Base, latents: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] from about -1 to 1 of scaled latents."""
    base.vae.to(latents.device)  # training sends it away between samples
    pictures: Tensor = base.vae.decode(latents.float() / base.scaling).sample
    return pictures
