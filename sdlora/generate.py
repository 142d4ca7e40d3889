"""Pictures from a base, a prompt and any number of LoRA files.

The sampling loop is ours, the samplers are diffusers'. LoRAs are folded into the weights before the loop, so a picture with LoRAs
costs what a picture without costs. All noise is drawn on the CPU, so a seed means the same picture on every device. A picture can begin
with another one, keep what a mask does not cover, and be drawn a second time at a larger size; all of that is the same loop, begun later.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sdlora import base_model, devices, images, samplers, text, voices
from sdlora import request as requests
from sdlora.base_model import Base, TextStates
from sdlora.errors import UserError
from sdlora.picture_settings import settings_text as settings_text
from sdlora.request import Request as Request
from sdlora.request import Source as Source
from sdlora.samplers import SAMPLERS as SAMPLERS
from sdlora.samplers import SCHEDULES as SCHEDULES
from sdlora.samplers import known_sampler as known_sampler
from sdlora.samplers import scheduler as scheduler
from sdlora.samplers import schedules_of as schedules_of
from sdlora.voices import LoRA as LoRA
from sdlora.voices import load_lora as load_lora
from sdlora.voices import set_loras as set_loras

CHEAP = 5_000_000  # weights of an autoencoder that is fast enough to look through at every step
# RGB from 0 to 1 of latents: the linear maps that were fitted for SD 1.x (Keturn 2022, "Decoding latents to RGB without upscaling") and
# for SDXL (Vass 2023, "Explaining the SDXL latent space")
_SD_RGB = ((0.149, 0.1035, 0.104), (0.0935, 0.143, 0.0865), (-0.079, 0.0945, 0.132), (-0.092, -0.1355, -0.2365))
_SDXL_RGB = ((0.2353, 0.2353, 0.2353), (-0.2353, -0.0196, 0.0392), (0.0980, 0.0588, -0.0196), (-0.2745, -0.1961, -0.1373))
_SDXL_GREY = (0.588, 0.549, 0.510)


@dataclass(frozen=True)
class Moment:
    """How far a picture is.

    Args:
        done: finished steps, of `steps` in all passes.
        heard: the latents that the UNet was asked about in the last step, at `timestep`; `answer` is what it said.
    """

    done: int
    steps: int
    latents: Tensor
    heard: Tensor
    answer: Tensor
    timestep: Tensor


@dataclass(frozen=True)
class _Begin:
    """Where a pass begins that does not begin with noise alone: clean latents, how much is drawn anew, and where (1) or where not (0)."""

    clean: Tensor
    denoise: float
    mask: Tensor | None = None


def denoise(base: Base, latents: Tensor, states: TextStates, request: Request) -> Iterator[Tensor]:
    """Runs the sampler; yields the latents after each step.

    Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): ε = ε_neg + guidance · (ε_prompt - ε_neg).

    Args:
        latents: unit noise [B, 4, h, w].
        states: text states of the B negative prompts and then of the B prompts.
    """
    for moment in _denoise(base, latents, states, request):
        yield moment.latents


@torch.no_grad()
def _denoise(
    base: Base, noise: Tensor, states: TextStates, request: Request, *, begin: _Begin | None = None, loras: Sequence[LoRA] = ()
) -> Iterator[Moment]:
    """As `denoise`, from a beginning, with strengths that change."""
    steps, timesteps = _schedule(base, request, begin)
    noise = noise.to(base.device)
    latents = noise * steps.init_noise_sigma if begin is None else steps.add_noise(begin.clean, noise, timesteps[:1])
    options = {"generator": devices.generator(request.seed, 17)} if samplers.named(request.sampler)[0] in samplers.STOCHASTIC else {}
    for i, t in enumerate(timesteps):
        voices.speak_at(base, loras, i / len(timesteps))
        scaled = steps.scale_model_input(latents, t)
        if request.guidance == 1:
            guided = base_model.predict(base, scaled, t, states[range(len(latents), 2 * len(latents))]).float()
        else:
            without, with_prompt = base_model.predict(base, torch.cat([scaled, scaled]), t, states).float().chunk(2)
            guided = without + request.guidance * (with_prompt - without)
        latents = steps.step(guided, t, latents, **options).prev_sample
        if begin is not None and begin.mask is not None:
            later = timesteps[i + 1 : i + 2]
            kept = steps.add_noise(begin.clean, noise, later) if len(later) else begin.clean
            latents = begin.mask * latents + (1 - begin.mask) * kept
        yield Moment(i + 1, len(timesteps), latents, scaled, guided, t)


def _schedule(base: Base, request: Request, begin: _Begin | None) -> tuple[Any, Tensor]:
    """The scheduler, and the timesteps that are left of it: all, or as diffusers and A1111 do the last `denoise` of them."""
    samplers.check_steps(request.sampler, request.steps)
    steps = samplers.scheduler(base, request.sampler, request.schedule)
    steps.set_timesteps(request.steps, device=base.device)
    if begin is None:
        return steps, steps.timesteps
    left = min(int(request.steps * begin.denoise), request.steps)
    if not 0 < begin.denoise <= 1 or left < 1:
        raise UserError(
            f"Denoising strength {begin.denoise:g} of {request.steps} steps leaves no step; choose up to 1, "
            f"and at least {1 / request.steps:.2g}."
        )
    first = (request.steps - left) * steps.order
    if hasattr(steps, "set_begin_index"):  # those that count their steps instead of looking the timestep up
        steps.set_begin_index(first)
    return steps, steps.timesteps[first:]


@torch.no_grad()
def drawing(base: Base, request: Request, *, loras: Sequence[LoRA] = (), source: Source | None = None) -> Iterator[Moment | Image.Image]:
    """Draws one picture: yields a moment after each step, and at the end the picture.

    Args:
        loras: as they were given to `set_loras`; those with a course change their strength in between.
        source: a picture to begin with.

    Raises:
        UserError: if something that is asked for cannot be drawn with this base.
    """
    width, height = requests.size_px(base, request, source)
    final = requests.final_size_px(base, request, source)
    read = text.weighted if request.weighted else text.tokens
    both = text.encode(base, read(base, [request.negative, request.prompt]), clip_skip=request.clip_skip)
    total, placed = step_count(base, request, source), None
    begin: _Begin | None = None
    if source:
        placed = requests.fitted(source, (width, height))
        begin = _Begin(_latents(base, placed.image), request.denoise, _mask(base, placed.mask))
    moment: Moment | None = None
    for moment in _denoise(base, _noise(base, request, (width, height)), both, request, begin=begin, loras=loras):
        yield replace(moment, steps=total)
    assert moment is not None
    picture = images.to_image(base_model.decode(base, moment.latents)[0])
    if final != (width, height):
        begin = _Begin(_latents(base, picture.resize(final, Image.Resampling.LANCZOS)), request.hires_denoise)
        first = moment.done
        for moment in _denoise(base, _noise(base, request, final), both, request, begin=begin, loras=loras):
            yield replace(moment, done=first + moment.done, steps=total)
        picture = images.to_image(base_model.decode(base, moment.latents)[0])
    if placed and placed.mask:
        picture = Image.composite(picture, placed.image, placed.mask.point(lambda value: 255 if value else 0))
    yield picture


def step_count(base: Base, request: Request, source: Source | None = None) -> int:
    """How often the UNet is asked for one picture, in all passes: some samplers ask twice in a step.

    Raises:
        UserError: if it cannot be drawn so.
    """
    blank = torch.zeros(())
    passes = [_Begin(blank, request.denoise) if source else None]
    if request.hires_scale != 1:
        passes.append(_Begin(blank, request.hires_denoise))
    return sum(len(_schedule(base, request, begin)[1]) for begin in passes)


def _noise(base: Base, request: Request, size: tuple[int, int]) -> Tensor:
    shape = (1, 4, size[1] // base.reduction, size[0] // base.reduction)
    return torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))


def _latents(base: Base, picture: Image.Image) -> Tensor:
    mean, _ = base_model.encode(base, images.to_tensor(picture)[None])
    return mean


def _mask(base: Base, mask: Image.Image | None) -> Tensor | None:
    """[1, 1, h, w]: 1 for each latent of which any pixel is to be drawn anew."""
    if mask is None:
        return None
    pixels = torch.from_numpy(np.array(mask) > 0).float()
    return F.max_pool2d(pixels[None, None], base.reduction).to(base.device)


def picture(base: Base, request: Request, *, loras: Sequence[LoRA] = (), source: Source | None = None) -> Iterator[int | Image.Image]:
    """As `drawing`, but of each moment only the number of its step."""
    for item in drawing(base, request, loras=loras, source=source):
        yield item.done if isinstance(item, Moment) else item


def pictures(
    base: Base, request: Request, *, count: int = 1, loras: Sequence[LoRA] = (), source: Source | None = None
) -> Iterator[tuple[Request, Image.Image]]:
    """`count` pictures of the seeds from `request.seed` on, each the same as if it were drawn alone."""
    for i in range(count):
        one = replace(request, seed=request.seed + i)
        *_, image = picture(base, one, loras=loras, source=source)
        assert isinstance(image, Image.Image)
        yield one, image


@torch.no_grad()
def preview(base: Base, moment: Moment) -> Image.Image:
    """What a picture will be like, as far as the UNet can tell at a moment: through the autoencoder if it is small, else by a linear map.

    The clean latents x₀ that the answer means: (x_t - √(1 - ᾱ) ε) / √ᾱ (Ho et al. 2020, arXiv 2006.11239, equation 15), or with v
    √ᾱ x_t - √(1 - ᾱ) v (Salimans & Ho 2022, arXiv 2202.00512, appendix D).
    """
    signal = base.alphas[moment.timestep.round().long().clamp(0, len(base.alphas) - 1)]
    root, rest = signal.sqrt(), (1 - signal).sqrt()
    by_kind = {
        "epsilon": lambda: (moment.heard - rest * moment.answer) / root.clamp(min=0.02),
        "v_prediction": lambda: root * moment.heard - rest * moment.answer,
        "sample": lambda: moment.answer,
    }
    clean = by_kind[base.prediction]()
    if sum(weight.numel() for weight in base.vae.parameters()) <= CHEAP:
        return images.to_image(base_model.decode(base, clean[:1])[0])
    factors, grey = (_SDXL_RGB, _SDXL_GREY) if base.family == "sdxl" else (_SD_RGB, (0.5, 0.5, 0.5))
    colours = torch.einsum("chw,cr->rhw", clean[0].float(), torch.tensor(factors, device=clean.device))
    return images.to_image((colours + torch.tensor(grey, device=clean.device)[:, None, None]) * 2 - 1)


def png_bytes(image: Image.Image, settings: str) -> bytes:
    """The picture as PNG with its settings in the text chunk `parameters`."""
    info, buffer = PngInfo(), io.BytesIO()
    add = info.add_text if settings.isascii() else info.add_itxt
    add("parameters", settings)
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
