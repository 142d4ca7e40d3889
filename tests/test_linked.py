"""What a run does not say follows from what it says, and what it says stands."""

import itertools
import math
import re
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora import config, linked, optimizer, recipes
from sdlora.config_tables import Config
from sdlora.linked import Linked

FOUR = {"base": "mini", "data": [{"folder": "pictures"}], "kind": "style", "name": "mine"}
FAMILIES = ("mini", "sd1", "sd2", "sdxl")
SET_BY_SOMEBODY: dict[str, list[Any]] = {
    "steps": [7, 3000],
    "batch": [1, 64],
    "save_every": [0, 30],
    "sample_every": [0, 40],
    "min_snr_gamma": [0.0, 1.0, 20.0],
    "lora.rank": [1, 128],
    "lora.alpha": [0.25, 1.0, 512.0],
    "lora.targets": ["attn-mlp", ["*.attn2.to_k"]],
    "lora.text_encoder": [True, False],
    "lora.text_targets": ["attn", ["*.mlp.fc1"]],
    "lora.rank_stabilised": [True, False],
    "optimizer.name": list(optimizer.OPTIMIZERS),
    "optimizer.learning_rate": [1e-6, 0.7],
    "optimizer.text_encoder_learning_rate": [0.0, 3e-5],
    "optimizer.text_encoder_2_learning_rate": [0.0, 4e-5],
    "optimizer.weight_decay": [0.0, 0.3],
    "optimizer.warmup": [0.0, 0.5],
    "optimizer.schedule": ["linear", "cosine_with_restarts"],
    "optimizer.cycles": [1, 5],
    "optimizer.accumulation": [1, 8],
    "objective.weighting": ["none", "debiased", "soft_min_snr"],
    "validation.share": [0.0, 0.4],
    "validation.every": [0, 25],
}


def told(changes: dict[str, Any]) -> Config:
    """A run that says four keys and some more, by dotted key."""
    values: dict[str, Any] = dict(FOUR)
    for key, value in changes.items():
        table, _, last = key.rpartition(".")
        values |= {table: values.get(table, {}) | {last: value}} if table else {last: value}
    return Config.model_validate(values)


def resolved(family: str = "sd1", *, pictures: int = 30, prediction: str = "epsilon", **changes: Any) -> Linked:
    run = told({key.replace("__", "."): value for key, value in changes.items()})
    return linked.resolve(run, family=family, prediction=prediction, pictures=pictures)


def value(run: Config, key: str) -> Any:
    found: Any = run
    for name in key.split("."):
        found = getattr(found, name)
    return found


# --- what is set stands -------------------------------------------------------------------------------------------------------


@given(
    changes=st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in SET_BY_SOMEBODY.items()}),
    kind=st.sampled_from(["style", "character"]),
    family=st.sampled_from(FAMILIES),
    pictures=st.integers(1, 500),
)
@settings(max_examples=150, deadline=None)
def test_nothing_that_a_user_set_is_changed_and_resolving_again_changes_nothing(
    changes: dict[str, Any], kind: str, family: str, pictures: int
) -> None:
    made = linked.resolve(told(changes | {"kind": kind}), family=family, prediction="epsilon", pictures=pictures)
    assert {key: value(made.run, key) for key in changes} == changes
    assert not set(changes) & set(made.reasons)
    again = linked.resolve(made.run, family=family, prediction="epsilon", pictures=pictures)
    assert (again.run, again.reasons) == (made.run, {})
    Config.model_validate(made.run.model_dump(mode="json", exclude_none=True))  # the strict model takes all that was filled in


def test_a_run_from_its_own_folder_is_the_same_run_whatever_the_set_has_become() -> None:
    made = resolved("sdxl", kind="character")
    read = config.parse(tomllib.loads(config.to_toml(made.run)), where="config.toml")
    again = linked.resolve(read, family="sdxl", prediction="epsilon", pictures=3)
    assert (again.run, again.reasons) == (made.run, {})


def test_a_key_that_is_set_to_its_default_or_in_a_copy_counts_as_set() -> None:
    assert resolved(steps=600).run.steps == 600 != resolved().run.steps
    run = told({})
    copy = run.model_copy(update={"lora": run.lora.model_copy(update={"rank": 16, "text_encoder": None})})
    made = linked.resolve(copy, family="sd1", prediction="epsilon", pictures=3)
    assert made.run.lora.rank == 16
    assert made.run.lora.text_encoder is False, "nothing is no value"
    assert run == told({}), "the run that came in is as it was"


# --- four keys are enough -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["style", "character"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_each_optimizer_and_set_size_four_keys_give_a_run_that_can_be_written_read_and_scheduled(family: str, kind: str) -> None:
    for name, pictures in itertools.product(optimizer.OPTIMIZERS, (0, 1, 5, 19, 20, 60, 1000, 10**6)):
        made = resolved(family, pictures=pictures, kind=kind, optimizer__name=name)
        written = tomllib.loads(config.to_toml(made.run))
        assert config.parse(written, where="config.toml") == made.run
        optimizer.check_schedule(name, made.run.optimizer.schedule)
        assert made.run.lora.text_encoder is not None
        assert made.run.lora.text_targets is not None
        assert made.run.validation.every


def test_every_reason_is_a_sentence_and_short() -> None:
    options = itertools.product(FAMILIES, ("style", "character"), optimizer.OPTIMIZERS, (5, 30, 200), (1, 4), (True, False))
    said = {
        (key, reason)
        for family, kind, name, pictures, batch, stabilised in options
        for key, reason in resolved(
            family, pictures=pictures, kind=kind, batch=batch, optimizer__name=name, lora__rank_stabilised=stabilised
        ).reasons.items()
    }
    assert {key for key, _ in said} >= set(linked.RULES) - {"optimizer.cycles"}
    for key, reason in said:
        assert re.fullmatch(r"[A-Z0-9].{10,170}\.", reason), (key, reason)


def test_sdxl_alone_computes_again_instead_of_keeping_what_few_cards_hold() -> None:
    chosen = {family: resolved(family).run.gradient_checkpointing for family in FAMILIES}
    assert chosen == {family: family == "sdxl" for family in FAMILIES}
    assert resolved("sdxl", gradient_checkpointing=False).run.gradient_checkpointing is False


def test_the_embedded_base_with_its_usual_set_keeps_the_defaults_of_the_config() -> None:
    made, plain = resolved("mini", kind="character").run, told({"kind": "character"})
    watched = ("save_every", "sample_every", "validation.every", "validation.share", "lora.text_encoder", "lora.text_targets")
    watched += ("gradient_checkpointing", "lora.targets")  # attention alone shows 72 of 100 pips, all of it 99 (docs/log.md)
    assert [key for key in linked.RULES if value(made, key) != value(plain, key)] == [key for key in linked.RULES if key in watched]


def test_the_doctor_recommends_what_a_run_would_do() -> None:
    for family, kind, pictures in itertools.product(FAMILIES, ("style", "character"), (4, 30, 300)):
        advice, run = recipes.recipe(kind, pictures=pictures, batch=4, family=family), resolved(family, pictures=pictures, kind=kind).run
        assert (advice.steps, advice.rank, advice.alpha) == (run.steps, run.lora.rank, run.lora.alpha)
        assert (advice.targets, advice.text_encoder) == (run.lora.targets, run.lora.text_encoder)


def test_the_lines_stand_in_columns_and_say_what_was_set() -> None:
    made = resolved(steps=1000, lora__targets=["*.attn1.*", "*.attn2.*", "*.ff.*"])
    said = linked.lines(made)
    assert len(said) == len(made.reasons) + 2
    (steps,) = [line for line in said if line.startswith("steps ")]
    assert re.fullmatch(r"steps +1000 +As you set it\.", steps)
    (rank,) = [line for line in said if line.startswith("lora.rank ")]
    assert rank.endswith(made.reasons["lora.rank"])
    assert len({line.index(made.reasons[key]) for key in made.reasons for line in said if line.startswith(f"{key} ")}) == 1


# --- what moves what ----------------------------------------------------------------------------------------------------------


def rate(family: str = "sd1", **changes: Any) -> float:
    return resolved(family, **changes).run.optimizer.learning_rate


def test_the_family_moves_rate_rank_and_text_encoder() -> None:
    assert (rate("mini"), rate("sd1"), rate("sd2"), rate("sdxl")) == (1e-3, 2e-4, 2e-4, 1e-4)
    characters = {family: resolved(family, kind="character").run.lora for family in FAMILIES}
    assert {family: one.text_encoder for family, one in characters.items()} == {"mini": True, "sd1": True, "sd2": True, "sdxl": False}
    assert {family: one.rank for family, one in characters.items()} == {"mini": 16, "sd1": 16, "sd2": 16, "sdxl": 8}


def test_the_kind_moves_targets_and_text_encoder() -> None:
    style, character = (resolved(kind=kind).run.lora for kind in ("style", "character"))
    assert (style.targets, style.text_encoder) == ("attn-mlp-conv", False)
    assert (character.targets, character.text_encoder, character.text_targets) == ("attn-mlp", True, "attn-mlp")
    assert resolved(lora__targets=["*.attn2.*"]).run.lora.text_targets == "attn"


def test_targets_for_sd_2_give_a_file_that_diffusers_can_load_unless_the_layout_is_its_own() -> None:
    assert resolved("sd2").run.lora.targets == "attn"
    assert resolved("sd2", output__format="diffusers").run.lora.targets == "attn-mlp-conv"


def test_the_set_size_moves_steps_rank_and_what_is_held_out() -> None:
    runs = {pictures: resolved(pictures=pictures).run for pictures in (5, 19, 20, 200, 1000)}
    assert {n: one.lora.rank for n, one in runs.items()} == {5: 8, 19: 16, 20: 16, 200: 32, 1000: 32}
    assert {n: one.steps for n, one in runs.items()} == {5: 250, 19: 950, 20: 900, 200: 1000, 1000: 4500}
    assert {n: one.validation.share for n, one in runs.items()} == {5: 0, 19: 0, 20: 0.1, 200: 0.1, 1000: 0.1}
    assert "show each picture about 200 times" in resolved(pictures=20).reasons["steps"]  # the 18 that are not held out


def test_nothing_is_held_out_beside_a_folder_or_when_nobody_looks() -> None:
    for changes in ({"validation.folder": "apart"}, {"validation.every": 0}):
        run = told(changes)
        assert linked.resolve(run, family="sd1", prediction="epsilon", pictures=100).run.validation.share == 0


def test_the_batch_moves_steps_and_rate_and_accumulation_counts_as_batch() -> None:
    for batch, factor in ((1, 0.5), (4, 1), (16, 2), (64, 4), (1024, 4)):
        assert rate(batch=batch) == pytest.approx(2e-4 * factor)
    one, same = resolved(batch=8).run, resolved(batch=2, optimizer__accumulation=4).run
    assert (one.steps, one.optimizer.learning_rate, one.save_every) == (same.steps, same.optimizer.learning_rate, same.save_every)
    assert one.steps * 8 == pytest.approx(resolved(batch=4).run.steps * 4, rel=0.05)


def test_the_rank_moves_alpha_and_rate_so_that_outputs_move_as_fast() -> None:
    for rank, alpha in itertools.product((4, 16, 64), (None, 2.0, 16.0)):
        changes: dict[str, Any] = {"lora__rank": rank} | ({"lora__alpha": alpha} if alpha else {})
        made = resolved(**changes).run
        assert made.lora.alpha == (alpha or rank / 2)
        speed = made.optimizer.learning_rate * made.lora.alpha / rank * math.sqrt(rank)
        assert speed == pytest.approx(2e-4 * 0.5 * 4, rel=0.04)  # rates have two digits


def test_a_rank_stabilised_run_has_one_alpha_and_one_rate_at_every_rank() -> None:
    runs = [resolved(lora__rank=rank, lora__rank_stabilised=True).run for rank in (4, 16, 64)]
    assert {(one.lora.alpha, one.optimizer.learning_rate) for one in runs} == {(2.0, 2e-4)}


def test_an_alpha_that_nobody_tried_does_not_run_away_with_the_rate() -> None:
    assert rate(lora__alpha=1e-6) == pytest.approx(8 * 2e-4)
    assert rate(lora__rank=1024, lora__alpha=1e6) == pytest.approx(2e-4 / 8)


def test_the_optimizer_moves_rates_decay_and_schedule() -> None:
    lion, plain = resolved(optimizer__name="lion").run.optimizer, resolved().run.optimizer
    assert lion.learning_rate == pytest.approx(plain.learning_rate / 5)
    assert lion.learning_rate * lion.weight_decay == pytest.approx(plain.learning_rate * plain.weight_decay)
    free = resolved(optimizer__name="schedule_free").run.optimizer
    assert (free.schedule, free.warmup) == ("constant", plain.warmup)
    assert resolved(optimizer__schedule="cosine_with_restarts").run.optimizer.cycles == 3


def test_prodigy_has_one_rate_for_all_and_an_alpha_as_large_as_the_rank() -> None:
    made = resolved("sdxl", kind="character", optimizer__name="prodigy").run
    how = made.optimizer
    assert (how.learning_rate, how.text_encoder_learning_rate, how.text_encoder_2_learning_rate) == (1, 1, 1)
    assert made.lora.alpha == made.lora.rank
    for key in ("learning_rate", "text_encoder_learning_rate", "text_encoder_2_learning_rate"):
        how = resolved("sdxl", optimizer__name="prodigy", **{f"optimizer__{key}": 0.5}).run.optimizer
        assert (how.learning_rate, how.text_encoder_learning_rate, how.text_encoder_2_learning_rate) == (0.5, 0.5, 0.5)


def test_the_text_encoders_learn_at_a_fifth_of_the_rate_whoever_chose_it() -> None:
    assert resolved().run.optimizer.text_encoder_learning_rate == pytest.approx(4e-5)
    how = resolved("sdxl", optimizer__learning_rate=3e-4).run.optimizer
    assert (how.text_encoder_learning_rate, how.text_encoder_2_learning_rate) == (6e-5, 6e-5)
    assert resolved("sd1").run.optimizer.text_encoder_2_learning_rate is None


def weights(prediction: str = "epsilon", *, zero_terminal: bool = False, **changes: Any) -> tuple[str, float]:
    run = told({key.replace("__", "."): one for key, one in changes.items()})
    made = linked.resolve(run, family="sd2", prediction=prediction, pictures=30, zero_terminal=zero_terminal).run
    return made.objective.weighting, made.min_snr_gamma


def test_timesteps_are_weighted_as_the_prediction_and_the_schedule_want_it() -> None:
    assert weights() == weights("v_prediction") == ("min_snr", 5)
    assert weights("v_prediction", zero_terminal=True)[0] == "none"
    assert weights("v_prediction", zero_terminal_snr=True)[0] == "none"
    assert weights("v_prediction", zero_terminal=True, zero_terminal_snr=False)[0] == "min_snr"
    assert weights("epsilon", zero_terminal=True)[0] == "min_snr"
    assert weights("v_prediction", zero_terminal=True, min_snr_gamma=3.0) == ("min_snr", 3)
    assert weights(objective__weighting="soft_min_snr") == ("soft_min_snr", 4)


@given(steps=st.integers(1, 10**6))
def test_there_are_about_ten_checkpoints_at_round_steps(steps: int) -> None:
    cadence, _ = recipes.every(steps)
    assert 1 <= cadence <= steps
    if steps >= 80:
        assert 8.8 <= steps / cadence <= 10.01
    if steps >= 1000:
        assert cadence % 5 == 0
    if steps >= 10_000:
        assert cadence % 50 == 0


def test_samples_and_looks_go_with_the_checkpoints_that_the_user_chose() -> None:
    run = resolved(save_every=70).run
    assert (run.sample_every, run.validation.every) == (70, 70)
    run = resolved(save_every=0, steps=500).run
    assert (run.save_every, run.sample_every, run.validation.every) == (0, 50, 50)
    assert resolved(steps=2000).run.save_every == 200
