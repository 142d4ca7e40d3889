"""What to begin with: the numbers that recipes for Stable Diffusion agree on, and how each follows from the others.

Shipped defaults of five trainers differ twentyfold in learning rate × alpha / rank, since each is right for one rank, alpha, batch and
optimizer only. So a family has its numbers once, for rank 16 and 4 pictures per step, and what a run changes moves the rest: each
function returns a value and the reason for it in a sentence. The embedded base's numbers were measured (docs/log.md); those for Stable
Diffusion are in the middle of what trusted recipes use, and none has been measured here on a full-size base. They are where to begin;
sample pictures along the way say when to stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_LEAST, _MOST = 20, 200  # visits of one picture in a run: what many pictures need, and what few can bear
_MOST_STEPS = 1_000_000  # that a config allows
_EPOCH = 300  # visits
_ROUND = (1, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000)  # steps
_RANK, _BATCH = 16, 4  # for which the rates are stated
_SMALL_SET, _LARGE_SET = 10, 100  # pictures
_HELD_OUT_FROM, _SHARE = 20, 0.1
_BATCH_FACTOR, _PACE = (0.5, 4.0), (1 / 8, 8.0)  # how far a rate is moved, in batches of 1 to 64 and by alpha and rank: none tried more


@dataclass(frozen=True)
class Family:
    """What suits one family of bases, at rank 16 and 4 pictures per step.

    Args:
        title: as it is called in reasons.
        rate: AdamW's peak rate of the UNet's layers.
        scale: alpha / rank.
        style_visits, character_visits: of pictures in a run.
        style_targets, character_targets: presets of UNet modules.
        character_rank: that of a style is 16.
        hears: whether the text encoder learns a character's name.
    """

    title: str
    rate: float
    scale: float
    style_visits: int
    character_visits: int
    style_targets: str
    character_targets: str
    character_rank: int
    hears: bool


# Rate × scale: 1e-4 lies between 2.5e-4 (hollowstrawberry) and 2e-5 (OneTrainer) for SD 1.x, 5e-5 between 1.5e-4 and 2e-5 for SDXL.
# SDXL has 6.3 times the weights per rank (2,659,840 to 423,936), so half the rank does for a figure.
FAMILIES: dict[str, Family] = {
    "mini": Family("the embedded base", 1e-3, 1.0, 4000, 2400, "attn-mlp-conv", "attn-mlp-conv", 16, hears=True),
    "sd1": Family("Stable Diffusion 1.x", 2e-4, 0.5, 4000, 4000, "attn-mlp-conv", "attn-mlp", 16, hears=True),
    "sd2": Family("Stable Diffusion 2.x", 2e-4, 0.5, 4000, 4000, "attn-mlp-conv", "attn-mlp", 16, hears=True),
    "sdxl": Family("Stable Diffusion XL", 1e-4, 0.5, 4000, 4000, "attn-mlp-conv", "attn-mlp", 8, hears=False),
}


def rank(family: str, kind: str, *, pictures: int) -> tuple[int, str]:
    """The rank: what the family needs for the kind, half of it for very few pictures and twice for many.

    Args:
        family: a key of `FAMILIES`.
        kind: "style" or "character".
        pictures: in the set.
    """
    usual = FAMILIES[family].character_rank if kind == "character" else _RANK
    if pictures < _SMALL_SET:
        return usual // 2, f"Fewer than {_SMALL_SET} pictures carry no more."
    if pictures >= _LARGE_SET:
        return 2 * usual, f"{_LARGE_SET} pictures or more hold more than rank {usual} can."
    return (
        usual,
        "Enough for a look or a figure." if usual == _RANK else "Enough for a figure, as a rank has 6 times the weights of SD 1.x.",
    )


def alpha(family: str, *, rank: int, rank_stabilised: bool, finds_rate: bool) -> tuple[float, str]:
    """Alpha in a fixed ratio to rank, so that the scale alpha / rank is the one that the rates are stated for.

    With rsLoRA the scale is alpha / √rank, and a fixed alpha gives at rank 16 the same scale and at others what rsLoRA wants.

    Args:
        family: a key of `FAMILIES`.
        finds_rate: whether the optimizer finds its rate itself.
    """
    scale = 1.0 if finds_rate else FAMILIES[family].scale
    if rank_stabilised:
        return scale * math.sqrt(_RANK), f"With rsLoRA as strong as alpha {scale * _RANK:g} at rank {_RANK} is without, at every rank."
    if finds_rate:
        return scale * rank, "As much as the rank: the optimizer finds the rate, so a smaller scale would only be undone."
    if scale == 1:
        return scale * rank, "As much as the rank, for which the rates of the embedded base are stated."
    return scale * rank, "Half the rank, for which most recipes state their rates."


def targets(family: str, kind: str, *, layout: str) -> tuple[str, str]:
    """The preset of UNet modules.

    Args:
        family: a key of `FAMILIES`.
        kind: "style" or "character".
        layout: of the LoRA file, "kohya" or "diffusers".
    """
    if family == "sd2" and layout == "kohya":
        return "attn", "The only preset whose file all tools load: diffusers refuses an SD 2.x file with proj_in and proj_out."
    suits = FAMILIES[family]
    preset = suits.style_targets if kind == "style" else suits.character_targets
    return preset, "So small a base shows little of a look in its attention alone." if family == "mini" else _WHY_TARGETS[preset]


_WHY_TARGETS = {
    "attn-mlp": "A figure is in attention and the layers between, and every tool loads these.",
    "attn-mlp-conv": "A style has its textures in the convolutions, and every tool loads these.",
}


def text_encoder(family: str, kind: str) -> tuple[bool, str]:
    """Whether the text encoders are trained too.

    Args:
        family: a key of `FAMILIES`.
        kind: "style" or "character".
    """
    if kind == "style":
        return False, "A style is how things look, which the UNet learns alone."
    if not FAMILIES[family].hears:
        return False, "For Stable Diffusion XL recipes advise the UNet alone; two large text encoders are easily spoilt."
    return True, "A character has a name, which the text encoder must learn to hear."


def rate(
    family: str, *, optimizer: str, multiple: float | None, batch: int, rank: int, alpha: float, rank_stabilised: bool
) -> tuple[float, str]:
    """The UNet's peak rate: the family's, times what optimizer, batch, rank and alpha change.

    rate = r16 · multiple · √(batch / 4) · (s16 √16) / (s √rank) with s = alpha / rank, or alpha / √rank for rsLoRA. Adam's rates grow with
    the root of the batch (Malladi et al. 2022, arXiv 2205.10287); outputs of a LoRA of scale s grow with s √rank (Kalajdzievski 2023,
    arXiv 2312.03732).

    Args:
        family: a key of `FAMILIES`.
        multiple: of AdamW's rate; None if the optimizer finds its rate itself and wants 1.
        batch: pictures per step.
    """
    if multiple is None:
        return 1.0, f"What {optimizer} is given: it finds the rate itself, one for all."
    suits = FAMILIES[family]
    for_batch = _within(math.sqrt(batch / _BATCH), _BATCH_FACTOR)
    scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
    pace = _within(suits.scale * math.sqrt(_RANK) / (scale * math.sqrt(rank)), _PACE)
    factors = {optimizer: multiple, f"{batch} {'picture' if batch == 1 else 'pictures'} per step": for_batch}
    factors[f"rank {rank} with alpha {alpha:g}"] = pace
    said = "".join(f", times {factor:.3g} for {what}" for what, factor in factors.items() if abs(factor - 1) > 1e-6)
    return _two_digits(suits.rate * multiple * for_batch * pace), f"{suits.rate:g} suits {suits.title} with AdamW{said}."


def text_rate(unet_rate: float, *, finds_rate: bool) -> tuple[float, str]:
    """The first text encoder's peak rate.

    Args:
        unet_rate: that of the UNet.
        finds_rate: whether the optimizer finds its rate itself, one for all.
    """
    if finds_rate:
        return unet_rate, "The same as the UNet's: the optimizer finds one rate for all."
    return _two_digits(unet_rate / 5), "A fifth of the UNet's: the text encoder is small and easily forgets other words."


def steps(family: str, kind: str, *, pictures: int, batch: int) -> tuple[int, str]:
    """The number of steps, from visits per run within what one picture needs and bears.

    Args:
        family: a key of `FAMILIES`.
        kind: "style" or "character".
        pictures: that are shown, so without those that are held out.
        batch: pictures per step.
    """
    pictures = max(1, pictures)
    usual = FAMILIES[family].style_visits if kind == "style" else FAMILIES[family].character_visits
    visits = min(max(usual, _LEAST * pictures), _MOST * pictures)
    unit = 50 if visits >= 250 * batch else 10
    count = min(max(unit, round(visits / batch / unit) * unit), _MOST_STEPS)
    seen = count * batch / pictures
    return count, f"{count:,} steps of {batch} show each picture about {seen:,.0f} times; beyond {_MOST} it is learned by heart."


def every(steps: int) -> tuple[int, str]:
    """Steps between checkpoints: a round number of which 9 to 10 fit into a run; fewer if it has under 80 steps."""
    wanted = steps / 10
    unit = max(one for one in _ROUND if one <= max(1, wanted / 8))
    count = max(1, math.ceil(wanted / unit) * unit)
    return count, f"About a tenth of the steps, so there are {max(1, steps // count)} to choose from."


def weighting(prediction: str, *, zero_terminal: bool) -> tuple[str, str]:
    """The weighting of timesteps.

    Args:
        prediction: "epsilon", "v_prediction" or "sample".
        zero_terminal: whether the last timestep holds no signal (Lin et al. 2024, arXiv 2305.08891, who train v without weights).
    """
    if zero_terminal and prediction != "epsilon":
        return "none", "Min-SNR gives a last timestep without signal the weight 0, and that one must be learned too."
    return "min_snr", "So that timesteps do not pull against each other (Hang et al. 2023)."


def gamma(weighting: str) -> tuple[float, str]:
    """The limit of the weight, as the weighting's paper has it."""
    if weighting == "soft_min_snr":
        return 4.0, "As in the paper of soft min-SNR."
    return 5.0, "As in the paper of min-SNR." if weighting == "min_snr" else f"Not used with the weighting {weighting}."


def checkpointing(family: str) -> tuple[bool, str]:
    """Whether what a step computes is computed again instead of kept for the way back."""
    if family == "sdxl":
        return True, "Without it a picture of 1,024 px keeps 7 GB for the way back, with it 0.6 GB, for a third more time."
    return False, "What a step keeps for the way back is small enough; it would cost a third more time."


def share(*, pictures: int, has_folder: bool, is_watched: bool) -> tuple[float, str]:
    """The share of pictures that are held out.

    Args:
        pictures: in the set.
        has_folder: whether a folder of its own is held out.
        is_watched: whether held-out pictures are looked at during the run.
    """
    if has_folder:
        return 0.0, "A folder of its own is held out."
    if not is_watched:
        return 0.0, "Nobody looks at held-out pictures with validation.every = 0."
    if pictures < _HELD_OUT_FROM:
        return 0.0, f"With fewer than {_HELD_OUT_FROM} pictures, each is needed for learning."
    return _SHARE, "What was never trained on shows when the rest is learned by heart."


def held_out(pictures: int, *, share: float) -> int:
    """How many of some pictures a share is: rounded to whole ones, and at least one; 0 for none."""
    return max(1, math.floor(share * pictures + 0.5)) if share else 0


def _within(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


@dataclass(frozen=True)
class Recipe:
    """Settings with their reasons in sentences, as a run has them if it does not set them.

    Args:
        targets: preset of UNet modules.
        reasons: for steps, repeats, rank and text encoder, in this order.
        title: of the bases that it is for.
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
    title: str


def recipe(kind: str, *, pictures: int, batch: int, family: str = "sd1") -> Recipe:
    """What to begin with.

    Args:
        kind: "style" or "character".
        pictures: in the set, at least 1.
        batch: pictures per step.
        family: a key of `FAMILIES`.
    """
    kept, _ = share(pictures=pictures, has_folder=False, is_watched=True)
    count, why_steps = steps(family, kind, pictures=pictures - held_out(pictures, share=kept), batch=batch)
    size, why_rank = rank(family, kind, pictures=pictures)
    strength, _ = alpha(family, rank=size, rank_stabilised=False, finds_rate=False)
    trains_text, why_text = text_encoder(family, kind)
    repeats = max(1, round(_EPOCH / pictures))
    reasons = (
        why_steps,
        f"{repeats} repeats make an epoch of {repeats * pictures} visits; with 200 to 400 its checkpoints differ enough to choose from.",
        f"Rank {size} with alpha {strength:g}: {why_rank[:1].lower()}{why_rank[1:]}",
        why_text,
    )
    preset, _ = targets(family, kind, layout="kohya")
    return Recipe(kind, count, batch, repeats, size, strength, preset, trains_text, reasons, FAMILIES[family].title)
