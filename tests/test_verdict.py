"""What is recommended from which curve, and whether a beginner is told the truth about it."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from sdlora import verdict
from sdlora.events import Validated

BASE = Validated(0, 0.46, 0.44, (1.1, 0.5, 0.2, 0.03), 0.0)


def looks(losses: Sequence[float | None], seen: Sequence[float], drift: Sequence[float] | float = 0.3) -> list[Validated]:
    """A run with a look every 100 steps."""
    drifts = [drift] * len(seen) if isinstance(drift, float) else drift
    rows = [Validated(100 * i, *row[:2], (0.0,) * 4, row[2]) for i, row in enumerate(zip(losses, seen, drifts, strict=True), start=1)]
    start = BASE if losses[0] is not None else Validated(0, None, 0.44, BASE.bands, 0.0)
    return [start, *rows]


def test_a_run_that_still_improves_gives_its_last_checkpoint_and_says_that_more_may_help() -> None:
    told = verdict.verdict(looks([0.2, 0.15, 0.13, 0.12], [0.18, 0.13, 0.11, 0.1]))
    assert (told.step, told.overfitting, told.warning) == (400, False, "")
    assert told.reason.startswith("Step 400, the last, is recommended")
    assert "0.12" in told.reason
    assert "0.46 without the LoRA" in told.reason


def test_a_run_that_was_too_short_is_told_so_and_its_end_is_recommended_although_an_earlier_checkpoint_is_as_good() -> None:
    told = verdict.verdict(looks([0.3, 0.25, 0.23, 0.2111, 0.21], [0.28, 0.23, 0.21, 0.19, 0.19]))
    assert told.step == 500
    assert told.reason.startswith("Step 500, the last, is recommended: pictures that it was not trained on are predicted best there")
    assert told.reason.endswith("so a longer run may do still better.")
    told = verdict.verdict(looks([0.3, 0.25, 0.23, 0.2111, 0.21], [0.28, 0.23, 0.21, 0.19, 0.2]))
    assert told.step == 400
    assert "predicted there nearly as well as anywhere (error 0.211, lowest 0.21 at step 500" in told.reason
    assert told.reason.split(";")[1] == " up to the last step the error falls, so a longer run may do still better."
    assert not verdict.still_falls(looks([0.2, 0.1301, 0.13, 0.1302, 0.1301], [0.18, 0.1201, 0.12, 0.1199, 0.12]))
    assert not verdict.still_falls(looks([0.3, 0.25, 0.2, 0.21], [0.28, 0.23, 0.18, 0.17]))
    assert not verdict.still_falls(looks([None] * 3, [0.3, 0.2, 0.1]))


def test_a_run_that_memorises_gives_the_checkpoint_before_and_says_so() -> None:
    told = verdict.verdict(looks([0.16, 0.13, 0.15, 0.3, 0.35], [0.15, 0.12, 0.119, 0.07, 0.04]))
    assert (told.step, told.overfitting) == (200, True)
    assert "The run overfits: from step 200 to 500" in told.warning
    assert "memorises" in told.warning
    assert "while on its own pictures it falls by 67%" in told.warning


def test_a_run_that_spoils_itself_is_not_said_to_memorise() -> None:
    told = verdict.verdict(looks([0.13, 0.12, 0.2, 0.28], [0.11, 0.1, 0.19, 0.28]))
    assert (told.step, told.overfitting) == (200, True)
    assert "memoris" not in told.warning
    assert "lower optimizer.learning_rate" in told.warning


def test_a_flat_end_gives_its_beginning_and_no_alarm() -> None:
    told = verdict.verdict(looks([0.2, 0.1301, 0.13, 0.1302, 0.1301], [0.18, 0.1201, 0.12, 0.1199, 0.12]))
    assert (told.step, told.overfitting, told.warning) == (200, False, "")
    assert "up to step 500, brought nothing more" in told.reason


def test_a_single_bad_look_is_no_overfitting_and_does_not_end_the_search() -> None:
    told = verdict.verdict(looks([0.2, 0.15, 0.17, 0.14, 0.13, 0.132], [0.18, 0.13, 0.15, 0.12, 0.11, 0.11]))
    assert (told.step, told.overfitting) == (500, False)


def test_a_checkpoint_that_was_not_saved_is_not_recommended() -> None:
    rows = looks([0.16, 0.13, 0.15, 0.3], [0.15, 0.12, 0.119, 0.07])
    assert verdict.recommended(rows) == 200
    assert verdict.recommended(rows, saved={100, 300, 400}) in (100, 300)
    told = verdict.verdict(rows, saved={300, 400})
    assert told.step == 300
    assert "of the checkpoints that were saved" in told.reason


def test_a_look_that_is_learned_further_is_worth_some_error_but_not_any() -> None:
    rows = looks([0.14, 0.13, 0.15, 0.2], [0.06, 0.05, 0.03, 0.025])
    told = verdict.verdict(rows)
    assert (told.step, told.overfitting) == (300, True)
    assert "more of the look is learned there" in told.reason
    assert "(error 0.15, lowest 0.13 at step 200, 0.46 without the LoRA)" in told.reason
    last = verdict.verdict(rows[:-1])
    assert last.step == 300
    assert "longer run" not in last.reason  # the error has begun to rise


def test_what_has_lost_most_of_what_it_had_gained_is_never_recommended() -> None:
    rows = looks([0.14, 0.13, 0.25, 0.27], [0.14, 0.12, 0.06, 0.01])  # 0.33 gained, and 0.19 left of it
    assert verdict.recommended(rows) == 300
    flat = [replace(BASE, loss=0.15, seen_loss=0.15), *looks([0.147, 0.145, 0.15, 0.16], [0.14, 0.13, 0.1, 0.05])[1:]]
    assert verdict.recommended(flat) == 200  # a large base, whose errors hardly move on pictures that it does not know


def test_of_a_character_less_error_is_given_for_what_is_learned_further() -> None:
    rows = looks([0.14, 0.13, 0.135, 0.2], [0.14, 0.12, 0.06, 0.055])
    assert [verdict.recommended(rows, kind=kind) for kind in ("style", "character")] == [300, 300]  # twice as near to its own pictures
    rows = looks([0.14, 0.13, 0.135, 0.24], [0.14, 0.12, 0.1, 0.09])
    assert [verdict.recommended(rows, kind=kind) for kind in ("style", "character")] == [300, 200]
    told = verdict.verdict(rows, kind="character")
    assert "predicted best there" in told.reason


def test_memorising_before_the_recommended_checkpoint_is_said_too() -> None:
    told = verdict.verdict(looks([0.127, 0.122, 0.131, 0.14, 0.143], [0.12, 0.11, 0.08, 0.06, 0.0595]))
    assert (told.step, told.overfitting) == (400, True)
    assert "The run overfits: from step 200 to 500" in told.warning


def test_without_held_out_pictures_nothing_is_claimed() -> None:
    told = verdict.verdict(looks([None] * 4, [0.18, 0.13, 0.11, 0.04]), strengths=[(0.5, 0.01), (1.0, 0.04)])
    assert (told.step, told.strength, told.overfitting) == (400, 1.0, False)
    assert "only because it is the last" in told.reason
    assert "unknown" in told.warning
    assert "validation.share" in told.warning


@pytest.mark.parametrize("loss", [None, 0.1])
def test_a_base_that_breaks_gives_the_checkpoint_before(loss: float | None) -> None:
    told = verdict.verdict(looks([loss] * 4, [0.18, 0.13, 0.12, 0.11], [0.1, 0.2, 1.4, 5.0]))
    assert told.step in (100, 200)
    assert told.overfitting == (loss is not None)
    assert "optimizer.learning_rate" in told.warning
    assert verdict.verdict(looks([loss] * 2, [0.2, 0.1], [2.0, math.inf])).step == 100


def test_without_held_out_pictures_a_rising_error_on_the_own_pictures_is_believed() -> None:
    told = verdict.verdict(looks([None] * 4, [0.18, 0.13, 0.25, 0.4]))
    assert told.step == 200
    assert "went wrong" in told.reason


def test_nothing_learned_is_said() -> None:
    told = verdict.verdict(looks([0.47, 0.465, 0.466], [0.45, 0.44, 0.44]))
    assert "nothing general was learned" in told.warning


@pytest.mark.parametrize(
    ("table", "strength"),
    [
        ((), 1.0),
        ([(0.6, 0.2), (0.8, 0.15), (1.0, 0.13), (1.2, 0.14)], 1.0),
        ([(0.6, 0.2), (0.8, 0.12), (1.0, 0.13), (1.2, 0.14)], 0.8),
        ([(0.6, 0.13), (0.8, 0.1299), (1.0, 0.1301), (1.2, 0.1302)], 1.0),  # all alike: what was trained
        ([(0.8, 0.15), (1.0, 0.14), (1.2, 0.12)], 1.0),  # louder than what was trained spoils pictures
    ],
)
def test_another_strength_is_recommended_only_where_it_is_clearly_better(table: list[tuple[float, float]], strength: float) -> None:
    assert verdict.strength(table) == strength


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ([(0.8, 0.12), (1.0, 0.13)], "; at strength 0.8 those pictures are predicted better (error 0.12) than at 1 (0.13)."),
        ([(0.8, 0.15), (1.0, 0.13), (1.2, 0.14)], "; no other strength predicts those pictures better than 1."),
        ([(0.8, 0.15), (1.0, 0.14), (1.2, 0.12)], "but louder than trained spoils pictures."),
    ],
)
def test_the_strength_has_a_reason_too(table: list[tuple[float, float]], why: str) -> None:
    told = verdict.verdict(looks([0.2, 0.13], [0.18, 0.11]), strengths=table)
    assert told.reason.endswith(why)


def test_of_two_that_are_as_good_the_earlier_is_not_called_the_best() -> None:
    told = verdict.verdict(looks([0.2, 0.135, 0.1301, 0.13], [0.18, 0.125, 0.1201, 0.1203]))
    assert (told.step, "predicted there as well as anywhere (error 0.13," in told.reason) == (300, True)


def test_every_sentence_is_one_sentence() -> None:
    curves = (
        looks([0.2, 0.15], [0.2, 0.1]), looks([0.1, 0.2], [0.1, 0.05]), looks([0.1, 0.2], [0.1, 0.3]), looks([None, None], [0.2, 0.1]),
        looks([0.1, 0.1], [0.1, 0.1], [0.2, 3.0]), looks([0.5, 0.5], [0.5, 0.5]),
    )  # fmt: skip
    for curve in curves:
        told = verdict.verdict(curve)
        for words in (told.reason, told.warning):
            assert words == "" or (words.endswith(".") and ". " not in words and words[0].isupper())
