"""What a run will take, told before it is begun: memory, time, disk; and where it does not fit, the settings with which it does.

Counts come first, since they cost nothing and need no device; what they already show to be too large is never tried. Then a trial measures
what cannot be counted. Settings that need less memory are looked for in a stated order, from what costs only time to what changes the
LoRA, and are proposed as words for the command line: nothing is changed by itself.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Generator, Iterator

import torch

from sdlora import adapters, base_model, config, counts, devices, excerpt, lora_flat, memory, optimizer, prepare, text, trial_process
from sdlora import material as materials
from sdlora.adapters import Trained
from sdlora.base_model import Base
from sdlora.config import Config
from sdlora.counts import StepCost
from sdlora.errors import UserError
from sdlora.excerpt import Kind
from sdlora.forecast import Counted, Forecast, Scope, forecast
from sdlora.material import Material
from sdlora.memory import GIB
from sdlora.prepare import Prepared
from sdlora.trial import Measured, Progress, TooLargeError

Attempt = Callable[..., Iterator[Progress | Measured]]


# --- the search ---------------------------------------------------------------------------------------------------------------


def plan(
    run: Config, *, measure: bool = True, memory_limit_bytes: int | None = None, attempt: Attempt = trial_process.tried
) -> Iterator[Progress | Forecast]:
    """Forecasts a run: (done, total) of each trial, and at the end the forecast.

    Args:
        measure: whether the device is tried; else all is counted, and there are no times.
        memory_limit_bytes: what the run may take; what is free if not given.
        attempt: tries a config, as `trial_process.tried` does.

    Raises:
        UserError: if the data or the base cannot be used, or no settings fit.
    """
    device, run = devices.best_device(), prepare.linked_run(run).run
    limit = memory.free_bytes(device) if memory_limit_bytes is None else memory_limit_bytes
    reasons, least = list[str](), math.inf
    for changes in ({}, *easings(run, device)):
        candidate = changed(run, changes)
        scope, counted = count(candidate, device, free_bytes=limit)
        measured, needed = None, counted.memory_bytes
        if needed <= limit and measure:
            try:
                measured = yield from _last(attempt(candidate, memory_limit_bytes=memory_limit_bytes))
                needed = measured.peak_bytes
            except TooLargeError:
                needed = max(needed, limit + 1)
        if needed <= limit:
            yield forecast(candidate, scope, counted, measured, limit=limit, changes=words(changes), reasons=reasons)
            return
        least = min(least, needed)
        reasons.append(_reason(changes, needed, limit, measured))
    raise UserError(
        f"The run needs {_gib(least)} of memory or more with every setting that saves some, and {_gib(limit)} are free; "
        "lower resolution_px or lora.rank, choose a smaller base, or end other programs."
    )


def _last(work: Iterator[Progress | Measured]) -> Generator[Progress, None, Measured]:
    """Passes on what a trial yields, and returns its result."""
    for one in work:
        if isinstance(one, Measured):
            return one
        yield one
    raise AssertionError("a trial ends with what it measured")


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def _reason(changes: dict[str, str], needed: float, limit: int, measured: Measured | None) -> str:
    with_what = f"with {', '.join(words(changes))}" if changes else "as it is"
    if measured or needed > limit + 1:
        return f"- {with_what} it needs {_gib(needed)} ({'measured' if measured else 'counted'}), and {_gib(limit)} are free;"
    return f"- {with_what} the trial ran out of memory;"


def easings(run: Config, device: torch.device) -> list[dict[str, str]]:
    """What is tried where a run does not fit, each with all that came before: keys of the config with values in TOML.

    First what costs only time: gradient checkpointing, then smaller batches, accumulated to as many pictures per step. Then what changes
    the LoRA: a text encoder that stands still, then a base in 16 bits, then its linears in 8.
    """
    found: list[dict[str, str]] = []
    if not run.gradient_checkpointing:
        found.append({"gradient_checkpointing": "true"})
    batch = run.batch
    while batch > 1:
        batch = next(one for one in range(batch // 2, 0, -1) if batch % one == 0)
        found.append({"batch": str(batch), "optimizer.accumulation": str(run.optimizer.accumulation * run.batch // batch)})
    if run.lora.text_encoder:
        found.append({"lora.text_encoder": "false"})
    if devices.base_dtype(device, run.precision) == torch.float32:
        half = "fp16" if device.type == "cuda" and not torch.cuda.is_bf16_supported() else "bf16"
        found.append({"precision": f'"{half}"'})
    if run.quantise == "none":
        found.append({"quantise": '"int8"'})
    together: dict[str, str] = {}
    return [together := together | one for one in found]


def words(changes: dict[str, str]) -> tuple[str, ...]:
    """Changes as words for `--set`."""
    return tuple(f"{key}={value.strip(chr(34))}" for key, value in changes.items())


def changed(run: Config, changes: dict[str, str]) -> Config:
    """A run with other values for some keys."""
    values = tomllib.loads(config.to_toml(run))
    for key, value in changes.items():
        *tables, last = key.split(".")
        place = values
        for table in tables:
            place = place.setdefault(table, {})
        place[last] = tomllib.loads(f"value = {value}")["value"]
    return config.parse(values, where="plan")


# --- counting -----------------------------------------------------------------------------------------------------------------


def count(run: Config, device: torch.device, *, free_bytes: int) -> tuple[Scope, Counted]:
    """What a run does and what that takes, from configs and the sizes of pictures alone.

    Args:
        device: that it will run on; nothing is put there.
        free_bytes: its memory; on a GPU that is small the parts of a base take turns.

    Raises:
        UserError: if the data or the base cannot be used.
    """
    found = materials.find_or_refuse(run)
    base = counts.shell(
        run.base, dtype=devices.base_dtype(device, run.precision), family=run.family, prediction=run.prediction, tokenizer=run.tokenizer,
        clip_skip=run.clip_skip,
    )  # fmt: skip
    opened_bytes = counts.weights_bytes([base.unet, *base.text_encoders, base.autoencoder])
    turns = device.type == "cuda" and base_model.take_turns(opened_bytes, free_bytes)
    prepare.ease(base, run)
    data = prepare.material_of(run, found.samples, base)
    kinds = excerpt.kinds(data, batch=run.batch, seed=run.seed)
    chosen, every = excerpt.fullest(kinds), excerpt.heard(run, data)
    trains_text = any(part != "unet" for part in adapters.add_lora(base, run))
    ahead = prepare.is_ahead(every, trains_text=trains_text)
    said = excerpt.wanted(run, data, chosen)[1]
    speech = excerpt.speech_of(base, run, said, chunks=text.chunk_count(base, every), ahead=ahead)
    seen = excerpt.placeholders(data, base.reduction)
    steps = excerpt.ready(base, data, seen, speech)
    base_model.set_training(base, True)
    resident = _resident(base, device, keeps_text=not ahead)
    trained = adapters.trained(base, run)
    costs = {kind.shape_px: _cost(run, steps, kind, trained) for kind in chosen}
    fullest = {kind.shape_px: kind.pictures for kind in chosen}
    flops = sum(kind.share * costs[kind.shape_px].flops * kind.pictures / fullest[kind.shape_px] for kind in kinds)
    states = 0 if speech.states is None else sum(_bytes(one) for one in (speech.states.context, speech.states.pooled)) // len(speech.rows)
    latent_bytes = sum(_bytes(one) for view in seen.values() for one in (view.mean, view.deviation, view.mask))
    coding = _coding(run, base, data, turns=turns)
    counted = Counted(
        flops=flops * run.optimizer.accumulation,
        parameters=sum(weight.numel() for weight in adapters.parameters(base)),
        weights_bytes=resident,
        trained_bytes=_trained(base, run),
        data_bytes=latent_bytes + states * len(every),
        heaviest=max(costs.values(), key=lambda cost: cost.peak_bytes),
        coding_bytes=coding if turns else max(coding, opened_bytes),  # opened whole, before any of it is in 8 bits
        takes_turns=turns,
    )
    drawn = len(prepare.class_requests(run, data)) if run.regularisation == "auto" else 0
    return Scope(tuple(kinds), len(data.samples), len(found.held_out), drawn, len(seen), len(every)), counted


def _cost(run: Config, steps: Prepared, kind: Kind, trained: Trained) -> StepCost:
    base = steps.base
    there = [tensor for part in base.parts.values() for tensor in (*part.parameters(), *part.buffers())]
    with lora_flat.spread(trained.flats, trained.adapters, base.dtype):
        return counts.of_step(lambda: excerpt.loss(run, steps, kind, base.alphas), weights=there)


def _resident(base: Base, device: torch.device, *, keeps_text: bool) -> int:
    """The frozen weights that stay: on a GPU what each step asks, on the CPU all, since what is sent away goes nowhere."""
    stays = [base.unet, *(base.text_encoders if keeps_text or device.type == "cpu" else ())]
    return counts.weights_bytes([*stays, *([base.autoencoder] if device.type == "cpu" else [])])


def _coding(run: Config, base: Base, data: Material, *, turns: bool) -> int:
    """The bytes that are there while pictures are encoded, or decoded if any are drawn.

    Args:
        turns: whether the autoencoder is there alone.
    """
    there_too = [] if turns else [base.unet, *base.text_encoders]
    width, height = max((item.shape_px for item in data.items), key=math.prod)
    pixels = torch.empty(1, 3, height, width, device=counts.META)
    there = [*base.autoencoder.parameters(), *base.autoencoder.buffers()]
    peaks = [counts.of_answer(lambda: base_model.encode(base, pixels), weights=there)]
    if run.sample_every or run.report:
        side = base.resolution_px // base.reduction
        drawn = torch.empty(1, 4, side, side, device=counts.META)
        peaks.append(counts.of_answer(lambda: base_model.decode(base, drawn), weights=there))
    return max(peaks) + counts.weights_bytes([base.autoencoder, *there_too])


def _trained(base: Base, run: Config) -> int:
    state = optimizer.OPTIMIZERS[run.optimizer.name].state
    return counts.trained_bytes(adapters.parameters(base), state=state, average=run.optimizer.ema > 0)


def _bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
