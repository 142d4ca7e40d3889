"""Trains the embedded base model from nothing: `python -m sdlora.mini.pretrain --work FOLDER`.

Three stages, each of which goes on where it was stopped: the autoencoder learns to show the world's pictures, all training pictures
are encoded once, and the UNet learns together with the text encoder to draw what captions say. All chance comes from (seed, step),
so a stopped and continued run takes the same samples. The curves are in `FOLDER/curves.jsonl`; `--export` writes the finished
pipeline in the ordinary diffusers layout, in fp16.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdlora.mini import world
from sdlora.mini.tokens import build_tokenizer

SEED = 20_26
CAPTION_DROPOUT = 0.1
NONSENSE_SHARE = 0.1
EMA_DECAY = 0.998


def autoencoder() -> AutoencoderKL:
    """A small `AutoencoderKL`: 4 latent channels as Stable Diffusion has, but 4× reduction, at which 64 px stay crisp."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 128), layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=world.WIDTH_PX,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, mid_block_add_attention=False,
    )  # fmt: skip


def unet() -> UNet2DConditionModel:
    """A small conditional UNet over 16 × 16 latents with cross-attention at each size."""
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(48, 96, 144), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=128, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer `CLIPTextModel`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=77, projection_dim=128, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def schedule() -> DDPMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        clip_sample=False, prediction_type="epsilon", steps_offset=1,
    )  # fmt: skip


def to_tensor(images: np.ndarray[Any, Any]) -> Tensor:
    """uint8 pictures [B, H, W, 3] as floats [B, 3, H, W] from -1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine(step: int, steps: int, *, peak: float, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning rate: linear warm-up, then a half cosine down to `floor` of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


# --- saving and going on ------------------------------------------------------------------------------------------------------


def save_state(path: Path, step: int, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Weights, their moving average, Adam's moments and the step in one safetensors file, replaced in one move."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"average.{k}": v for k, v in average.items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": v for k, v in moments.items()}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path.with_suffix(".part"), metadata={"step": str(step)})
    path.with_suffix(".part").replace(path)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Tensor]]:
    """Puts a state back and returns its step and moving average; a new start if there is none."""
    if not path.exists():
        return 0, {k: v.clone() for k, v in model.state_dict().items()}
    tensors = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    step = int(moments[0]["step"].item())
    return step, {k[8:]: v for k, v in tensors.items() if k.startswith("average.")}


def train_steps(
    name: str, work: Path, model: nn.Module, losses: Any, *, steps: int, peak: float, save_every: int = 500
) -> dict[str, Tensor]:
    """Runs AdamW over `losses(step)` and returns the moving average of the weights.

    Args:
        name: the file's stem in `work`, and the name in the curves.
        losses: a function from the step to a dict of losses, whose "loss" is minimised.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    path = work / f"{name}.safetensors"
    start, average = load_state(path, model, optimizer)
    began = time.monotonic()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, peak=peak)
        parts = losses(step)
        parts["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        state = model.state_dict()
        for key, value in average.items():
            if value.dtype.is_floating_point:
                value.lerp_(state[key], 1 - decay)
        if (step + 1) % 50 == 0:
            row = {"stage": name, "step": step + 1, "elapsed_s": round(time.monotonic() - began, 1)}
            row |= {k: round(v.item(), 5) for k, v in parts.items()}
            with (work / "curves.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_state(path, step + 1, model, average, optimizer)
    return average


# --- stage 1: the autoencoder -------------------------------------------------------------------------------------------------


def autoencoder_pictures(work: Path, count: int) -> np.ndarray[Any, Any]:
    """uint8 pictures [N, H, W, 3], drawn once and kept as a file: six of ten of the world, two abstract, two webs of dark lines."""
    path = work / f"pictures-{count}.npy"
    if not path.exists():
        drawn = [autoencoder_picture(i) for i in range(count)]
        np.save(path, np.stack([np.asarray(image) for image in drawn]))
    pictures: np.ndarray[Any, Any] = np.load(path)
    return pictures


def autoencoder_picture(i: int) -> Image.Image:
    """Picture `i` of the autoencoder's training set."""
    if i % 10 < 6:
        return world.draw(world.training_scene(SEED, i))
    return world.abstract(SEED, i) if i % 10 < 8 else world.web(SEED, i)


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbouring pixels, downwards and to the right."""
    return images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]


def train_autoencoder(work: Path, *, steps: int, batch: int = 16) -> AutoencoderKL:
    """L1 + L2 + edges + a trace of KL, in bf16: edges are what the eye sees first and squared error learns last."""
    torch.manual_seed(SEED)
    pictures = autoencoder_pictures(work, 12_000)
    model = autoencoder()

    def losses(step: int) -> dict[str, Tensor]:
        """What a batch of pictures loses there and back: "loss" is the weighted sum [] of all errors, the others are to watch."""
        chosen = np.random.default_rng([SEED, step, 1]).integers(len(pictures), size=batch)
        images = to_tensor(pictures[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
            shown = model.decode((posterior.mean + posterior.std * noise).float()).sample
        error = shown.float() - images
        edge = sum((a - b).abs().mean() for a, b in zip(edges(shown.float()), edges(images), strict=True))
        squared, kl = error.square().mean(), posterior.kl().float().mean() / posterior.mean[0].numel()
        return {"loss": error.abs().mean() + squared + 0.5 * edge + 3e-4 * kl, "squared": squared, "kl": kl}

    model.load_state_dict(train_steps("autoencoder", work, model, losses, steps=steps, peak=2e-3))
    return model.eval()


# --- stage 2: latents ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_world(work: Path, vae: AutoencoderKL, count: int) -> tuple[Tensor, list[str]]:
    """Latent means [N, 4, 16, 16] of the training pictures, unscaled, and their captions."""
    path, captions_path = work / f"latents-{count}.safetensors", work / f"captions-{count}.json"
    if not path.exists():
        latents, captions = [], []
        for start in range(0, count, 64):
            scenes = [world.training_scene(SEED + 1, i) for i in range(start, min(start + 64, count))]
            images = to_tensor(np.stack([np.asarray(world.draw(one)) for one in scenes]))
            latents.append(vae.encode(images).latent_dist.mean)
            captions += [one.caption for one in scenes]
        captions_path.write_text(json.dumps(captions))
        save_file({"latents": torch.cat(latents).contiguous()}, path)
    return load_file(path)["latents"], json.loads(captions_path.read_text())


# --- stage 3: UNet and text encoder -------------------------------------------------------------------------------------------


def nonsense(rng: np.random.Generator) -> str:
    """A word that means nothing, so that the base learns to overlook what it does not know (a trigger word, for instance)."""
    return "".join(str(rng.choice(list("bcdfgklmnprstvz"))) + str(rng.choice(list("aeiou"))) for _ in range(int(rng.integers(1, 4))))


def varied(caption: str, rng: np.random.Generator) -> str:
    """The caption, left out in one of ten cases and with a nonsense word before or after it in one of ten others."""
    chance = rng.random()
    if chance < CAPTION_DROPOUT:
        return ""
    if chance < CAPTION_DROPOUT + NONSENSE_SHARE:
        word = nonsense(rng)
        return f"{word}, {caption}" if rng.random() < 0.5 else f"{caption}, {word}"
    return caption


def train_unet(
    work: Path, vae: AutoencoderKL, *, steps: int, batch: int = 32, pictures: int = 24_000
) -> tuple[nn.ModuleDict, CLIPTokenizer, float]:
    """Epsilon prediction, UNet and text encoder together; returns both, the tokenizer and the latents' scaling factor."""
    torch.manual_seed(SEED + 2)
    tokenizer = build_tokenizer(work / "tokenizer")
    latents, captions = encode_world(work, vae, pictures)
    scale = 1 / latents.std().item()
    latents = latents * scale
    model = nn.ModuleDict({"unet": unet(), "text_encoder": text_encoder(tokenizer)})
    noise_schedule = schedule()

    def losses(step: int) -> dict[str, Tensor]:
        """The mean squared error [] of the noise that the UNet finds in a batch of latents, with varied captions."""
        rng = np.random.default_rng([SEED, step, 2])
        chosen = rng.integers(len(latents), size=batch)
        words = [varied(captions[i], rng) for i in chosen]
        ids = tokenizer(words, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        generator = torch.Generator().manual_seed(step)
        clean = latents[torch.from_numpy(chosen)]
        noise = torch.randn(clean.shape, generator=generator)
        # one timestep from each of `batch` equal bands: lower variance than independent draws, same distribution
        timesteps = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * (1000 / batch)).long()
        noisy = noise_schedule.add_noise(clean, noise, timesteps)
        context = model["text_encoder"](ids).last_hidden_state
        return {"loss": F.mse_loss(model["unet"](noisy, timesteps, context).sample, noise)}

    model.load_state_dict(train_steps("unet", work, model, losses, steps=steps, peak=1.2e-3))
    return model.eval(), tokenizer, scale


# --- export -------------------------------------------------------------------------------------------------------------------


def export(folder: Path, vae: AutoencoderKL, model: nn.ModuleDict, tokenizer: CLIPTokenizer, scale: float) -> None:
    """Writes the pipeline in diffusers' folder layout, fp16 safetensors."""
    vae.register_to_config(scaling_factor=scale)
    parts: dict[str, Any] = {
        "vae": vae, "unet": model["unet"], "text_encoder": model["text_encoder"], "tokenizer": tokenizer,
        "scheduler": PNDMScheduler.from_config(schedule().config, skip_prk_steps=True),
        "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip
    StableDiffusionPipeline(**parts, requires_safety_checker=False).to(dtype=torch.float16).save_pretrained(folder)


def arguments() -> Iterator[tuple[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for states, caches and curves")
    parser.add_argument("--export", type=Path, help="folder for the finished pipeline")
    parser.add_argument("--autoencoder-steps", type=int, default=3200)
    parser.add_argument("--unet-steps", type=int, default=5600)
    yield from vars(parser.parse_args()).items()


def main() -> None:
    """Runs all stages, each from where it was stopped."""
    options = dict(arguments())
    work: Path = options["work"]
    work.mkdir(parents=True, exist_ok=True)
    vae = train_autoencoder(work, steps=options["autoencoder_steps"])
    if options["unet_steps"] > 0:
        model, tokenizer, scale = train_unet(work, vae, steps=options["unet_steps"])
        if options["export"]:
            export(options["export"], vae, model, tokenizer, scale)


if __name__ == "__main__":
    main()
