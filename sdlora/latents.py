"""Pictures as latents, encoded once: a LoRA's dataset is small enough to stay in memory as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdlora import base_model, images
from sdlora.base_model import Base
from sdlora.errors import UserError


@dataclass(frozen=True)
class Latents:
    """Mean and deviation of each picture's latents [N, 4, h, w], so that each visit draws anew."""

    mean: Tensor
    deviation: Tensor

    def draw(self, indices: list[int], *, generator: torch.Generator) -> Tensor:
        """Latents [B, 4, h, w] of some pictures: mean + deviation · ε with ε from the CPU generator."""
        mean, deviation = self.mean[indices], self.deviation[indices]
        return mean + deviation * torch.randn(mean.shape, generator=generator).to(mean.device)


def encode(base: Base, pictures: list[Path], *, side_px: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and deviation [1, 4, h, w] of one picture after the other, so that the caller can show progress.

    Raises:
        UserError: if a picture cannot be read, or its latents are not finite.
    """
    for path in pictures:
        pixels = images.to_tensor(images.square(images.open_upright(path), side_px))
        mean, deviation = base_model.encode(base, pixels[None])
        if not (torch.isfinite(mean).all() and torch.isfinite(deviation).all()):
            raise UserError(f"Picture {path} gives latents that are not finite with base '{base.name}'; use another VAE.")
        yield mean, deviation
