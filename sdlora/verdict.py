"""From looks at held-out pictures to a recommendation in a sentence: which checkpoint, at which strength, and what to beware of.

Numbers in, words out; nothing here touches a model. The error on held-out pictures alone is lowest before a look is fully learned, and
what is gained on a run's own pictures after that is partly the look and partly memory; so checkpoints are compared by both, see `price`.
Looks share their pictures, timesteps and noise, so a difference between two of them is the weights' own and small ones count; still, of
checkpoints that are as good to `ALIKE` the earliest is taken, which has memorised least and drifted least, unless the error falls up to
the end, where later is better if anything. Without held-out pictures memory cannot be told from learning, and the verdict says so
instead of guessing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sdlora.events import Validated

# How many times an error on the run's own pictures counts beside one on held-out pictures, by what they have in common: a style is all of
# a picture, a character a part of it, and the rest is only memorised. Fitted to what is true of the runs in docs/log.md.
OWN = {"style": 5.0, "character": 0.1}
KEPT = 0.6  # of what was gained on held-out pictures: a checkpoint that has lost more again is worth nothing, whatever else it learned
ALIKE = 0.005  # losses that differ by less, as a share, are as good as each other
OVERFIT = 0.05  # a rise of the held-out loss above its lowest that is said aloud
BROKEN_DRIFT = 1.0  # answers to captions without the trigger have moved as far as they are long
SAME_STRENGTH = 0.01  # a strength must lower the loss by more to be preferred to one nearer to 1
LOUDEST = 1.0  # more than what was trained lowers the error of a short run and spoils its pictures: nothing louder is recommended


@dataclass(frozen=True)
class Verdict:
    """What to use, why, and what to beware of.

    Args:
        step: of the recommended checkpoint.
        strength: to draw with.
        reason: one sentence for somebody who has never trained a LoRA.
        overfitting: whether later checkpoints are worse on pictures that they were not trained on.
        warning: one sentence, or "".
    """

    step: int
    strength: float
    reason: str
    overfitting: bool
    warning: str


def recommended(looks: Sequence[Validated], *, kind: str = "style", saved: Collection[int] | None = None) -> int:
    """The step of the checkpoint to use: the earliest whose `price` is the lowest, to `ALIKE`, of those that have `KEPT`.

    While the error still falls in the end, the latest of them.

    Without held-out pictures: the last before the loss of the training pictures rose or the LoRA broke the base.

    Args:
        looks: of one run, by step; at least one after step 0.
        kind: what the pictures have in common, a key of `OWN`.
        saved: steps that have a checkpoint; all if not given.
    """
    every = [look for look in looks if look.step > 0]
    kept = [look for look in every if saved is None or look.step in saved] or every
    sound = [look for look in kept if _is_sound(look)]
    if not sound:
        return kept[0].step
    if any(look.loss is None for look in sound):
        return _until_it_rises(sound).step
    dearest = _dearest(looks, sound)
    worth = [look for look in sound if _held(look) <= dearest]
    lowest = min(price(look, kind) for look in worth)
    alike = [look.step for look in worth if price(look, kind) <= lowest * (1 + ALIKE)]
    return alike[-1 if still_falls(looks) else 0]


def _dearest(looks: Sequence[Validated], sound: Sequence[Validated]) -> float:
    """The held-out loss at which `KEPT` of what was gained from the base to the lowest is left; any, where nothing was gained or known."""
    start, lowest = next((_held(look) for look in looks if look.step == 0), 0.0), min(map(_held, sound))
    return start - KEPT * (start - lowest) if start > lowest else math.inf


def price(look: Validated, kind: str) -> float:
    """held-out loss + `OWN` · training loss, by which checkpoints are compared; lower is better."""
    return _held(look) + OWN[kind] * look.seen_loss


def verdict(
    looks: Sequence[Validated], *, kind: str = "style", strengths: Sequence[tuple[float, float]] = (), saved: Collection[int] | None = None
) -> Verdict:
    """The recommendation with its reason.

    Args:
        looks: as for `recommended`; with that of step 0 the reason compares with the base.
        strengths: (strength, held-out loss) of the recommended checkpoint, see `validation.losses_at_strengths`.
        kind, saved: as for `recommended`.
    """
    step = recommended(looks, kind=kind, saved=saved)
    chosen = next(look for look in looks if look.step == step)
    last = max(looks, key=lambda look: look.step)
    if chosen.loss is None:
        return Verdict(step, 1.0, _reason_unknown(step, last), False, _warning_unknown(chosen, last))
    turn = _lowest(looks, chosen)
    rise = _rise(looks, turn)
    overfits = rise > OVERFIT or not _is_sound(last)
    warning = _warning_after(looks, chosen if not _is_sound(last) else turn, rise) if overfits else _warning_useless(looks, chosen)
    best = strength(strengths)
    reason = f"{_reason(looks, chosen, kind).removesuffix('.')}{_why_strength(strengths, best)}."
    return Verdict(step, best, reason, overfits, warning)


def still_falls(looks: Sequence[Validated]) -> bool:
    """Whether the held-out loss is at its lowest in the end, to `ALIKE`, and at half of the steps was above that by `OVERFIT`."""
    known = [look for look in looks if look.step > 0 and look.loss is not None and _is_sound(look)]
    if not known:
        return False
    last = known[-1]
    before = [look for look in known if look.step <= last.step / 2]
    return bool(before) and _is_lowest(known, last) and _held(before[-1]) > _held(_lowest(known, last)) * (1 + OVERFIT)


def strength(table: Sequence[tuple[float, float]]) -> float:
    """Of the strengths up to `LOUDEST` whose loss is the lowest, to `SAME_STRENGTH`, the one nearest to 1; 1 for an empty table."""
    quiet = [(one, loss) for one, loss in table if one <= LOUDEST]
    lowest = min((loss for _, loss in quiet), default=0.0)
    good = [one for one, loss in quiet if loss <= lowest * (1 + SAME_STRENGTH)]
    return max(good, default=1.0)


def _why_strength(table: Sequence[tuple[float, float]], best: float) -> str:
    """Why a strength is recommended, as the sentence's last part; "" if nothing was measured."""
    losses = dict(table)
    if best not in losses or 1.0 not in losses:
        return ""
    if best < 1:
        return f"; at strength {best:g} those pictures are predicted better (error {losses[best]:.3g}) than at 1 ({losses[1.0]:.3g})"
    if min(losses.values()) < losses[1.0] * (1 - SAME_STRENGTH):
        return "; above strength 1 they are predicted still better, but louder than trained spoils pictures"
    return "; no other strength predicts those pictures better than 1"


def _held(look: Validated) -> float:
    assert look.loss is not None
    return look.loss


def _is_sound(look: Validated) -> bool:
    numbers = (look.seen_loss, look.drift, 0.0 if look.loss is None else look.loss)
    return all(map(math.isfinite, numbers)) and look.drift < BROKEN_DRIFT


def _until_it_rises(sound: Sequence[Validated]) -> Validated:
    """The last look, unless the loss of the training pictures has risen since its lowest, which no sound training does."""
    lowest = min(sound, key=lambda look: look.seen_loss)
    return lowest if sound[-1].seen_loss > lowest.seen_loss * (1 + OVERFIT) else sound[-1]


def _rise(looks: Sequence[Validated], turn: Validated) -> float:
    """By which share the held-out loss has risen in the end above its lowest: the mean of the last two looks after that."""
    after = [_held(look) for look in looks if look.step > turn.step and _is_sound(look)][-2:]
    return sum(after) / len(after) / _held(turn) - 1 if after else 0.0


def _lowest(looks: Sequence[Validated], chosen: Validated) -> Validated:
    """The look with the lowest held-out loss, step 0 left out."""
    return min((look for look in looks if look.step > 0 and _is_sound(look)), key=_held, default=chosen)


def _is_lowest(looks: Sequence[Validated], chosen: Validated) -> bool:
    return _held(chosen) <= _held(_lowest(looks, chosen)) * (1 + ALIKE)


def _reason(looks: Sequence[Validated], chosen: Validated, kind: str) -> str:
    later = [look for look in looks if look.step > chosen.step]
    told = f"Step {chosen.step}{'' if later else ', the last,'} is recommended: {_praise(looks, chosen, kind)}"
    if not later:
        return f"{told}, so a longer run may do still better." if _is_lowest(looks, chosen) else f"{told}."
    if still_falls(looks):
        return f"{told}; up to the last step the error falls, so a longer run may do still better."
    alike = [look.step for look in later if _is_sound(look) and price(look, kind) <= price(chosen, kind) * (1 + ALIKE)]
    return told + (f", and what came after, up to step {alike[-1]}, brought nothing more." if alike else ".")


def _praise(looks: Sequence[Validated], chosen: Validated, kind: str) -> str:
    """What the chosen checkpoint does best, with the numbers to check it by."""
    base = next((look for look in looks if look.step == 0), None)
    without = f", {_held(base):.3g} without the LoRA" if base else ""
    lowest = _lowest(looks, chosen)
    if _is_lowest(looks, chosen):
        how = "best there" if lowest.step == chosen.step else "there as well as anywhere"
        return f"pictures that it was not trained on are predicted {how} (error {_held(chosen):.3g}{without})"
    numbers = f"(error {_held(chosen):.3g}, lowest {_held(lowest):.3g} at step {lowest.step}{without})"
    if price(lowest, kind) * (1 + ALIKE) < price(chosen, kind):
        return f"of the checkpoints that were saved it does best on pictures that it was not trained on {numbers}"
    if lowest.step > chosen.step:
        return f"pictures that it was not trained on are predicted there nearly as well as anywhere {numbers}"
    return f"more of the look is learned there than before, and pictures that it was not trained on are still predicted well {numbers}"


def _warning_after(looks: Sequence[Validated], turn: Validated, rise: float) -> str:
    """What went wrong after a look: the base broke, or the error on pictures that are not trained on rose."""
    last = max(looks, key=lambda look: look.step)
    if not _is_sound(last):
        return (
            f"After step {turn.step} the run breaks the base: answers to prompts without the trigger word have moved as far as they are "
            "long; lower optimizer.learning_rate."
        )
    change = last.seen_loss / turn.seen_loss - 1
    told = f"from step {turn.step} to {last.step} the error on pictures that it was not trained on rises by {rise:.0%}"
    if change > OVERFIT:
        return f"The run spoils itself: {told}, and on its own pictures by {change:.0%}; lower optimizer.learning_rate."
    own = f"while on its own pictures it falls by {-change:.0%}" if change < -OVERFIT else "while on its own pictures it stays"
    return f"The run overfits: {told}, {own}, so it memorises them; more pictures or fewer steps help."


def _warning_useless(looks: Sequence[Validated], chosen: Validated) -> str:
    base = next((look for look in looks if look.step == 0), None)
    if base is None or _held(chosen) < _held(base) * (1 - ALIKE):
        return ""
    return (
        "No checkpoint predicts pictures that it was not trained on better than the base does, so nothing general was learned; see whether "
        "captions and pictures fit each other, and try another optimizer.learning_rate."
    )


def _reason_unknown(step: int, last: Validated) -> str:
    if step == last.step:
        return (
            f"Step {step} is recommended only because it is the last: no picture was held out, and without one numbers cannot tell "
            "learning from memorising, so compare the sample pictures."
        )
    return (
        f"Step {step} is recommended because it is the last before training went wrong; no picture was held out, so numbers cannot tell "
        "whether it memorises."
    )


def _warning_unknown(chosen: Validated, last: Validated) -> str:
    if chosen.step == last.step and _is_sound(last):
        return "Whether the run overfits is unknown; validation.share = 0.1 holds a tenth of the pictures out and answers it."
    return (
        f"After step {chosen.step} the error on the run's own pictures rises or the base breaks (drift {last.drift:.2g}); lower "
        "optimizer.learning_rate."
    )
