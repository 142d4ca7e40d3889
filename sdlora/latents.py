"""Pictures as latents, encoded once: a LoRA's dataset is small enough to stay in memory as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from sdlora import base_model, images
from sdlora.base_model import Base
from sdlora.errors import UserError
from sdlora.views import View


@dataclass(frozen=True)
class Pixels:
    """A view before it is encoded: picture [3, H, W] from -1 to 1, and where the loss counts [h, w] at the latents' size, 0 to 1."""

    picture: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Latents:
    """A view as the autoencoder sees it: mean and deviation [4, h, w], so that each visit draws anew, and the mask [h, w]."""

    mean: Tensor
    deviation: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device) -> Latents:
        """The same on a device."""
        return Latents(self.mean.to(device), self.deviation.to(device), None if self.mask is None else self.mask.to(device))


def pixels(view: View, *, reduction: int, background: tuple[int, int, int] = images.BACKGROUND) -> Pixels:
    """Reads a view from its file.

    Args:
        reduction: pixels per latent in each direction; the mask is averaged down to the latents' size.
        background: what transparent pictures are laid on.

    Raises:
        UserError: if the picture or its mask cannot be read, or they differ in size.
    """
    opened = images.open_picture(view.picture, background=background)
    mask = opened.alpha if view.mask == "alpha" else None if view.mask is None else _mask_file(view)
    small = None if mask is None else _mask(mask, view, reduction)
    return Pixels(images.to_tensor(_placed(opened.image, view)), small)


def _mask_file(view: View) -> Image.Image:
    mask = images.open_picture(view.mask).image.convert("L")  # type: ignore[arg-type]  # "alpha" was dealt with
    if mask.size != view.original_px:
        raise UserError(f"Mask {view.mask} is {mask.size} px and its picture {view.picture} {view.original_px}; they must be of one size.")
    return mask


def _mask(mask: Image.Image, view: View, reduction: int) -> Tensor:
    width, height = view.fit.size_px
    return images.mask_tensor(_placed(mask, view), height=height // reduction, width=width // reduction)


def _placed(image: Image.Image, view: View) -> Image.Image:
    fit = view.fit
    part = images.place(image, resized_px=fit.resized_px, left=fit.left, top=fit.top, size_px=fit.size_px)
    return ImageOps.mirror(part) if view.flipped else part


def encode(base: Base, view: View, seen: Pixels) -> Latents:
    """The latents of one view, alone, so that they do not depend on what else is encoded.

    Raises:
        UserError: if they are not finite.
    """
    mean, deviation = base_model.encode(base, seen.picture[None])
    if not (torch.isfinite(mean).all() and torch.isfinite(deviation).all()):
        raise UserError(f"Picture {view.picture} gives latents that are not finite with base '{base.name}'; give another VAE (key 'vae').")
    return Latents(mean[0], deviation[0], None if seen.mask is None else seen.mask.to(mean.device))


def draw(chosen: Sequence[Latents], *, generator: torch.Generator) -> Tensor:
    """Latents [B, 4, h, w] of some views of one size: mean + deviation · ε with ε from the CPU generator."""
    mean = torch.stack([one.mean for one in chosen])
    deviation = torch.stack([one.deviation for one in chosen])
    return mean + deviation * torch.randn(mean.shape, generator=generator).to(mean.device)


def masks(chosen: Sequence[Latents]) -> Tensor | None:
    """Where the loss of each counts [B, 1, h, w], 1 where a picture has no mask; None if none has one."""
    if all(one.mask is None for one in chosen):
        return None
    return torch.stack([torch.ones_like(one.mean[0]) if one.mask is None else one.mask for one in chosen])[:, None]
