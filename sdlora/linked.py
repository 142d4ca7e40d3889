"""Defaults that move together: what a run does not set follows from its base, its pictures and what it does set.

Each rule looks at the run as far as it is resolved and says a value with the reason for it; the order of `RULES` is the order in which one
value may depend on another. What the user set stands, known from pydantic's record of it, so a resolved run resolves to itself and its
config.toml repeats it. The numbers are in `recipes`; keys without a rule have the config's own defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tomlkit
from pydantic import BaseModel

from sdlora import optimizer, recipes
from sdlora.config_tables import Config

AS_SET = "As you set it."
_TEXT_RATES = ("optimizer.text_encoder_learning_rate", "optimizer.text_encoder_2_learning_rate")
_WIDEST = 24  # characters in the column of values; a list of patterns may be longer
_RESTARTS = 3  # half cosines, as in the recipe that made restarts usual (hollowstrawberry)


@dataclass(frozen=True)
class Linked:
    """A run with a value for each key, and the reasons for those that it did not set, by dotted key."""

    run: Config
    reasons: dict[str, str]


@dataclass(frozen=True)
class Facts:
    """What is known of a run beside its config.

    Args:
        family: a key of `recipes.FAMILIES`.
        prediction: "epsilon", "v_prediction" or "sample".
        pictures: to learn from, before any is held out.
        zero_terminal: whether the base's last timestep holds no signal.
    """

    family: str
    prediction: str
    pictures: int
    zero_terminal: bool


Choice = tuple[Any, str]


def resolve(run: Config, *, family: str, prediction: str, pictures: int, zero_terminal: bool = False) -> Linked:
    """The run with every key that it does not set filled from those that it does.

    Args:
        family: of the base: "mini", "sd1", "sd2" or "sdxl".
        prediction: of the base: "epsilon", "v_prediction" or "sample".
        pictures: to learn from, before any is held out; without those for regularisation.
        zero_terminal: whether the base says that its last timestep holds no signal; the run's own word on it counts for more.
    """
    said = run.zero_terminal_snr
    facts = Facts(family, prediction, pictures, zero_terminal if said is None else said)
    reasons: dict[str, str] = {}
    for key, rule in RULES.items():
        if not is_set(run, key) and (choice := rule(run, facts)):
            value, reasons[key] = choice
            run = _with(run, key, value)
    return Linked(run, reasons)


def lines(linked: Linked) -> list[str]:
    """Each value that is linked to others with its reason, in columns; what the user set among them says so."""
    keys = [key for key in RULES if key in linked.reasons or is_set(linked.run, key)]
    rows = [(key, tomlkit.item(_get(linked.run, key)).as_string(), linked.reasons.get(key, AS_SET)) for key in keys]
    width, depth = max(len(key) for key, _, _ in rows), max(min(len(value), _WIDEST) for _, value, _ in rows)
    return [f"{key:{width}}  {value:{depth}}  {reason}" for key, value, reason in rows]


def is_set(run: Config, key: str) -> bool:
    """Whether a run has a value of its own for a dotted key."""
    *tables, last = key.split(".")
    table: BaseModel = run
    for name in tables:
        table = getattr(table, name)
    return last in table.model_fields_set and getattr(table, last) is not None


def _get(run: Config, key: str) -> Any:
    value: Any = run
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _with(run: Config, key: str, value: Any) -> Config:
    table, _, last = key.rpartition(".")
    changed = getattr(run, table).model_copy(update={last: value}) if table else value
    return run.model_copy(update={table or last: changed})


# --- rules --------------------------------------------------------------------------------------------------------------------


def _per_step(run: Config) -> int:
    return run.batch * run.optimizer.accumulation


def _finds_rate(run: Config) -> bool:
    return optimizer.OPTIMIZERS[run.optimizer.name].rate is None


def _rank(run: Config, facts: Facts) -> Choice:
    return recipes.rank(facts.family, run.kind, pictures=facts.pictures)


def _alpha(run: Config, facts: Facts) -> Choice:
    own = run.lora
    return recipes.alpha(facts.family, rank=own.rank, rank_stabilised=own.rank_stabilised, finds_rate=_finds_rate(run))


def _targets(run: Config, facts: Facts) -> Choice:
    return recipes.targets(facts.family, run.kind, layout=run.output.format)


def _text_encoder(run: Config, facts: Facts) -> Choice:
    return recipes.text_encoder(facts.family, run.kind)


def _text_targets(run: Config, facts: Facts) -> Choice:
    if isinstance(run.lora.targets, str):
        return run.lora.targets, "The same preset as in the UNet."
    return "attn", "Patterns for the UNet say nothing about text encoders; attention is where words meet."


def _schedule(run: Config, facts: Facts) -> Choice:
    name = run.optimizer.name
    usual = optimizer.OPTIMIZERS[name].schedules[0]
    if usual == "constant":
        return usual, "Averaging takes the place of a falling rate; the warm-up stays, as its authors advise."
    return usual, f"Fine corrections at the end; the usual course with {name}."


def _cycles(run: Config, facts: Facts) -> Choice | None:
    if run.optimizer.schedule != "cosine_with_restarts":
        return None
    return _RESTARTS, "One half cosine has no restart; recipes with restarts have three."


def _weight_decay(run: Config, facts: Facts) -> Choice | None:
    multiple = optimizer.OPTIMIZERS[run.optimizer.name].rate
    if multiple is None or multiple == 1:
        return None
    wanted = round(run.optimizer.weight_decay / multiple, 6)
    return wanted, f"AdamW's over the {multiple:g} of its rate, so that rate times decay stays (Chen et al. 2023, section 5)."


def _rate(run: Config, facts: Facts) -> Choice:
    how = run.optimizer
    own = [_get(run, key) for key in _TEXT_RATES if is_set(run, key)]
    if _finds_rate(run) and any(own):
        return max(own), f"The text encoder's: {how.name} finds one rate for all."
    return recipes.rate(
        facts.family, optimizer=how.name, multiple=optimizer.OPTIMIZERS[how.name].rate, batch=_per_step(run), rank=run.lora.rank,
        alpha=run.lora.alpha, rank_stabilised=run.lora.rank_stabilised,
    )  # fmt: skip


def _text_rate(run: Config, facts: Facts) -> Choice:
    return recipes.text_rate(run.optimizer.learning_rate, finds_rate=_finds_rate(run))


def _second_text_rate(run: Config, facts: Facts) -> Choice | None:
    if facts.family != "sdxl":
        return None
    return run.optimizer.text_encoder_learning_rate, "The same as the first text encoder's."


def _steps(run: Config, facts: Facts) -> Choice:
    shown = facts.pictures - recipes.held_out(facts.pictures, share=run.validation.share)
    return recipes.steps(facts.family, run.kind, pictures=shown, batch=_per_step(run))


def _weighting(run: Config, facts: Facts) -> Choice:
    if is_set(run, "min_snr_gamma"):
        return "min_snr", "You set min_snr_gamma, its limit."
    return recipes.weighting(facts.prediction, zero_terminal=facts.zero_terminal)


def _gamma(run: Config, facts: Facts) -> Choice:
    return recipes.gamma(run.objective.weighting)


def _checkpointing(run: Config, facts: Facts) -> Choice:
    return recipes.checkpointing(facts.family)


def _share(run: Config, facts: Facts) -> Choice:
    own = run.validation
    return recipes.share(pictures=facts.pictures, has_folder=own.folder is not None, is_watched=own.every != 0)


def _save_every(run: Config, facts: Facts) -> Choice:
    return recipes.every(run.steps)


def _with_checkpoints(run: Config, facts: Facts) -> Choice:
    if run.save_every:
        return run.save_every, "With each checkpoint, so that they can be told apart."
    return recipes.every(run.steps)


RULES: dict[str, Callable[[Config, Facts], Choice | None]] = {
    "lora.rank": _rank,
    "lora.alpha": _alpha,
    "lora.targets": _targets,
    "lora.text_encoder": _text_encoder,
    "lora.text_targets": _text_targets,
    "optimizer.schedule": _schedule,
    "optimizer.cycles": _cycles,
    "optimizer.weight_decay": _weight_decay,
    "optimizer.learning_rate": _rate,
    "optimizer.text_encoder_learning_rate": _text_rate,
    "optimizer.text_encoder_2_learning_rate": _second_text_rate,
    "validation.share": _share,
    "steps": _steps,
    "objective.weighting": _weighting,
    "min_snr_gamma": _gamma,
    "gradient_checkpointing": _checkpointing,
    "save_every": _save_every,
    "sample_every": _with_checkpoints,
    "validation.every": _with_checkpoints,
}
