"""Settings to begin with for a set of pictures, each with its reason.

From the recipes that people trust for Stable Diffusion: 200 to 400 visits per epoch, 1,500 to 2,500 steps at batch 2 to 4, rank 8 to 32
with half of it as alpha, the text encoder at a fifth of the UNet's rate for figures and silent for styles, whose textures are in the
convolutions. They are where to begin; sample pictures along the way say when to stop.
"""

from __future__ import annotations

from dataclasses import dataclass

_VISITS = 4000  # in a run; 2,000 steps at batch 2
_LEAST, _MOST = 20, 200  # visits of one picture in a run: what many pictures need, and what few can bear
_EPOCH = 300  # visits
_RANK, _SMALL_RANK, _SMALL_SET = 16, 8, 10


@dataclass(frozen=True)
class Recipe:
    """Settings with their reasons in sentences.

    Args:
        targets: preset of UNet modules.
        reasons: for steps, repeats, rank and text encoder, in this order.
    """

    kind: str
    steps: int
    batch: int
    repeats: int
    rank: int
    alpha: float
    targets: str
    text_encoder: bool
    reasons: tuple[str, ...]


def recipe(kind: str, *, pictures: int, batch: int) -> Recipe:
    """What to begin with.

    Args:
        kind: "style" or "character".
        pictures: in the set, at least 1.
        batch: pictures per step.
    """
    visits = min(max(_VISITS, _LEAST * pictures), _MOST * pictures)
    steps = max(50, round(visits / batch / 50) * 50)
    repeats = max(1, round(_EPOCH / pictures))
    rank = _SMALL_RANK if pictures < _SMALL_SET else _RANK
    reasons = (
        f"{steps:,} steps of {batch} show each picture about {steps * batch / pictures:.0f} times; beyond {_MOST} it is learned by heart.",
        f"{repeats} repeats make an epoch of {repeats * pictures} visits; with 200 to 400 its checkpoints differ enough to choose from.",
        f"Rank {rank} with alpha {rank // 2}: {'so few pictures carry no more' if rank < _RANK else 'enough for a look or a figure'}.",
        _WHY_TEXT[kind],
    )
    is_style = kind == "style"
    return Recipe(kind, steps, batch, repeats, rank, rank / 2, "attn-mlp-conv" if is_style else "attn-mlp", not is_style, reasons)


_WHY_TEXT = {
    "style": "A style is how things look, which the UNet learns alone, its textures in the convolutions.",
    "character": "A character has a name, which the text encoder must learn to hear, at a fifth of the UNet's rate.",
}
