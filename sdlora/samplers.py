"""The samplers and schedule types by the names under which people know them, each a scheduler of diffusers.

A sampler says how a step is taken, a schedule type where the steps lie. Not every scheduler of diffusers can lie its steps everywhere,
and what it cannot is refused instead of being drawn another way. LMS and the schedule type Beta need SciPy, which nothing else here does,
and diffusers' DPM2 does not run with NumPy 2.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers

from sdlora.base_model import Base
from sdlora.errors import UserError

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Heun": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "Automatic": {},
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "SGM Uniform": {"timestep_spacing": "trailing"},
}
STOCHASTIC = ("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "Euler a", "LCM")
LCM_STEPS = 50  # the steps that an LCM was distilled from; it draws in some of them
_NOISE = (
    "beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "steps_offset", "rescale_betas_zero_snr",
)  # fmt: skip


def known_sampler(words: str) -> str:
    """A sampler's name as it is listed, however it is capitalised; older tools name the schedule type with it, "DPM++ 2M Karras".

    Raises:
        UserError: if it is unknown.
    """
    sampler, schedule = named(words)
    return sampler if schedule == "Automatic" else f"{sampler} {schedule}"


def named(sampler: str, schedule: str = "Automatic") -> tuple[str, str]:
    """The listed names of a sampler and a schedule type.

    Raises:
        UserError: if one is unknown, or both do not go together.
    """
    words = " ".join(sampler.split()).lower()
    ending = next((name for name in SCHEDULES if name != "Automatic" and words.endswith(f" {name.lower()}")), "")
    bare = words.removesuffix(f" {ending.lower()}") if ending else words
    name = next((one for one in SAMPLERS if one.lower() == bare), None)
    if name is None:
        raise UserError(f"Sampler '{sampler}' is unknown; there are {', '.join(SAMPLERS)}.")
    asked = ending if ending and schedule == "Automatic" else schedule
    kind = next((one for one in SCHEDULES if one.lower() == " ".join(asked.split()).lower()), None)
    if kind is None:
        raise UserError(f"Schedule type '{schedule}' is unknown; there are {', '.join(SCHEDULES)}.")
    if kind not in schedules_of(name):
        raise UserError(f"Sampler {name} cannot be drawn with schedule type {kind}; choose one of {', '.join(schedules_of(name))}.")
    return name, kind


def schedules_of(sampler: str) -> list[str]:
    """The schedule types that go with a listed sampler."""
    if sampler == "LCM":  # it has a schedule of its own, whatever it is told
        return ["Automatic"]
    known = inspect.signature(getattr(diffusers, SAMPLERS[sampler][0]).__init__).parameters
    return [name for name, options in SCHEDULES.items() if set(options) <= set(known)]


def scheduler(base: Base, sampler: str, schedule: str = "Automatic") -> Any:
    """The diffusers scheduler of a sampler and a schedule type, with the base's noise.

    Raises:
        UserError: as `named`.
    """
    name, kind = named(sampler, schedule)
    class_name, options = SAMPLERS[name]
    kept = {key: base.schedule[key] for key in _NOISE if key in base.schedule}
    made = getattr(diffusers, class_name)
    kept = {key: value for key, value in kept.items() if key in inspect.signature(made.__init__).parameters}
    return made(**kept, prediction_type=base.prediction, **options, **SCHEDULES[kind])


def check_steps(sampler: str, steps: int) -> None:
    """Whether a sampler can draw in so many steps.

    Raises:
        UserError: if it cannot.
    """
    most = LCM_STEPS if named(sampler)[0] == "LCM" else 1000
    if not 1 <= steps <= most:
        raise UserError(f"Steps {steps} cannot be drawn with sampler {sampler}; choose from 1 to {most}.")
