"""Pictures from a base, a prompt and any number of LoRA files.

The sampling loop is ours, the samplers are diffusers'. LoRAs are folded into the weights before the loop, so a picture with LoRAs
costs what a picture without costs, and a changed strength folds anew from the pristine weights without loading anything. The first
noise is drawn on the CPU, so a seed means the same picture on every device.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import sdlora
from sdlora import base_model, devices, images, lora, lora_file, text
from sdlora.base_model import Base, TextStates
from sdlora.errors import UserError

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}

SCHEDULE = (
    "beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "steps_offset", "rescale_betas_zero_snr",
)  # fmt: skip


@dataclass(frozen=True)
class LoRA:
    """A LoRA file and how strongly it speaks.

    Args:
        strength: on the UNet, -2 to 2.
        text_strength: on the text encoder; the same as `strength` if not given.
    """

    path: Path
    strength: float = 1.0
    text_strength: float | None = None


@dataclass(frozen=True)
class Request:
    """What one picture is made from; with the same request, base and LoRAs it is the same picture."""

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 4.0
    sampler: str = "DPM++ 2M"
    width_px: int | None = None
    height_px: int | None = None


def known_sampler(words: str) -> str:
    """A sampler's name as it is listed, however it is capitalised.

    Raises:
        UserError: if it is unknown.
    """
    for name in SAMPLERS:
        if name.lower() == words.strip().lower():
            return name
    raise UserError(f"Sampler '{words}' is unknown; there are {', '.join(SAMPLERS)}.")


def scheduler(base: Base, sampler: str) -> Any:
    """The diffusers scheduler of a sampler's known name, with the base's noise schedule.

    Raises:
        UserError: if the name is unknown.
    """
    name, options = SAMPLERS[known_sampler(sampler)]
    kept = {key: base.schedule[key] for key in SCHEDULE if key in base.schedule}
    return getattr(diffusers, name)(**kept, prediction_type=base.prediction, **options)


def load_lora(base: Base, one: LoRA) -> None:
    """Puts a LoRA file into the base under its path as name; one that is there already only gets the new strengths.

    Raises:
        UserError: if the file cannot be read, or a module of it does not fit this base.
    """
    written_ns = one.path.stat().st_mtime_ns if one.path.is_file() else 0  # a file trained anew is another LoRA
    name = f"{one.path}@{written_ns}".replace(".", "·")  # PyTorch allows no dots in the names of modules
    if not any(name in layer.adapters for part in base.parts.values() for layer in lora.layers(part).values()):
        _attach(base, one.path, name)
    for part, module in base.parts.items():
        speaks = one.strength if part == "unet" or one.text_strength is None else one.text_strength
        lora.set_strength(module, speaks, name)


def _attach(base: Base, path: Path, name: str) -> None:
    """Adapters for every module of the file that the base has; nothing is attached if one has another shape, or none is there."""
    file = lora_file.read(path)
    fits = base_model.fit(base, file.modules)
    if fits.why_not:
        raise UserError(f"{path} does not fit base '{base.name}': {fits.why_not}.")
    for stem, (part, module_name) in fits.places.items():
        lora.attach(base.parts[part], module_name, file.modules[stem], adapter=name)


def set_loras(base: Base, loras: list[LoRA]) -> None:
    """Makes exactly these LoRAs speak and folds them in; files loaded earlier stay in memory, silent.

    Raises:
        UserError: as `load_lora`.
    """
    for part in base.parts.values():
        lora.unfold(part)
        lora.silence(part)
    for one in loras:
        load_lora(base, one)
    for part in base.parts.values():
        lora.fold(part)


@torch.no_grad()
def denoise(base: Base, latents: Tensor, states: TextStates, request: Request) -> Iterator[Tensor]:
    """Runs the sampler; yields the latents after each step.

    Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): ε = ε_neg + guidance · (ε_prompt - ε_neg).

    Args:
        latents: unit noise [B, 4, h, w].
        states: text states of the B negative prompts and then of the B prompts.
    """
    steps = scheduler(base, request.sampler)
    steps.set_timesteps(request.steps, device=base.device)
    latents = latents * steps.init_noise_sigma
    generator = devices.generator(request.seed, 17)
    options = {"generator": generator} if request.sampler == "Euler a" else {}
    for t in steps.timesteps:
        scaled = steps.scale_model_input(latents, t)
        if request.guidance == 1:
            guided = base_model.predict(base, scaled, t, states[range(len(latents), 2 * len(latents))]).float()
        else:
            without, with_prompt = base_model.predict(base, torch.cat([scaled, scaled]), t, states).float().chunk(2)
            guided = without + request.guidance * (with_prompt - without)
        latents = steps.step(guided, t, latents, **options).prev_sample
        yield latents


@torch.no_grad()
def picture(base: Base, request: Request) -> Iterator[int | Image.Image]:
    """Draws one picture: yields the number of each finished step, and at the end the picture.

    Raises:
        UserError: if the size is not a multiple of the base's reduction, or the sampler is unknown.
    """
    width, height = request.width_px or base.resolution_px, request.height_px or base.resolution_px
    grain = base.reduction
    if width % grain or height % grain or min(width, height) < base.grain_px:
        raise UserError(
            f"Size {width}x{height} cannot be drawn with base '{base.name}'; both sides must be multiples of {grain} px, "
            f"at least {base.grain_px}."
        )
    shape = (1, 4, height // base.reduction, width // base.reduction)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed)).to(base.device)
    both = text.encode(base, text.tokens(base, [request.negative, request.prompt]))
    for step, partial in enumerate(denoise(base, latents, both, request), start=1):
        latents = partial
        yield step
    yield images.to_image(base_model.decode(base, latents)[0])


def pictures(base: Base, request: Request, *, count: int = 1) -> Iterator[tuple[Request, Image.Image]]:
    """`count` pictures of the seeds from `request.seed` on, each the same as if it were drawn alone."""
    for i in range(count):
        one = replace(request, seed=request.seed + i)
        *_, image = picture(base, one)
        assert isinstance(image, Image.Image)
        yield one, image


def settings_text(base: Base, request: Request, loras: list[LoRA]) -> str:
    """The settings as A1111 writes them into its pictures, so that other tools show them."""
    tags = "".join(f" <lora:{one.path.stem}:{one.strength:g}>" for one in loras)
    lines = [request.prompt + tags]
    if request.negative:
        lines.append(f"Negative prompt: {request.negative}")
    width, height = request.width_px or base.resolution_px, request.height_px or base.resolution_px
    sampler = request.sampler.removesuffix(" Karras")
    values = {
        "Steps": request.steps, "Sampler": sampler, "Schedule type": "Karras" if "Karras" in request.sampler else "Automatic",
        "CFG scale": f"{request.guidance:g}", "Seed": request.seed, "Size": f"{width}x{height}", "Model": Path(base.name).name,
        "Version": f"sdlora {sdlora.__version__}",
    }  # fmt: skip
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in values.items())])


def png_bytes(image: Image.Image, settings: str) -> bytes:
    """The picture as PNG with its settings in the text chunk `parameters`."""
    info, buffer = PngInfo(), io.BytesIO()
    add = info.add_text if settings.isascii() else info.add_itxt
    add("parameters", settings)
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
