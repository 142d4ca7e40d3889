"""From an image file to an upright RGB square of the training size. The file itself is never changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sdlora.errors import UserError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
BACKGROUND = (255, 255, 255)  # what transparent pictures are laid on, so that hidden pixels cannot leak into training


def open_upright(path: Path) -> Image.Image:
    """The picture as RGB, turned as its EXIF says, transparency laid on white.

    Raises:
        UserError: if it cannot be read to its last byte.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                layered = image.convert("RGBA")
                image = Image.new("RGBA", layered.size, (*BACKGROUND, 255))
                image.alpha_composite(layered)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise UserError(
            f"Picture {path} cannot be read ({problem}); save it anew as PNG or JPEG, or take it out of the folder."
        ) from problem


def square(image: Image.Image, side_px: int) -> Image.Image:
    """The middle square of a picture, resized to `side_px`."""
    return ImageOps.fit(image, (side_px, side_px), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture → [3, H, W] floats from -1 to 1, as the autoencoder takes them."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] floats from -1 to 1 → RGB picture, rounded as diffusers rounds."""
    array = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
