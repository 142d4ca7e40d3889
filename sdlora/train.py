"""The story of a run: pictures and captions become latents and text, batches become gradients, gradients become a LoRA file.

`train` is a generator of events. The command line draws a progress bar from them, a test lists them, and `metrics.jsonl` holds them
for the page; there are no callbacks. All chance comes from (seed, step), so the same config gives the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora import (
    adapters,
    averaging,
    base_model,
    buckets,
    course,
    dataset,
    devices,
    latents,
    lora,
    lora_flat,
    loss,
    noise,
    optimizer,
    prepare,
    processes,
    run_folder,
    text,
)  # fmt: skip
from sdlora import material as materials
from sdlora.base_model import Base, TextStates
from sdlora.config import Config
from sdlora.course import Course
from sdlora.errors import UserError
from sdlora.events import Event, Step
from sdlora.latents import Latents
from sdlora.prepare import Prepared, Speech


def train(
    run: Config, folder: Path, *, resume: bool = False, allow_changes: bool = False, forecast: Mapping[str, Any] | None = None
) -> Iterator[Event]:
    """Trains a LoRA as `run` says and leaves everything in `folder`.

    Args:
        run: what it does not set is linked to what it does, see `linked`.
        resume: goes on with the run that the folder holds, from its newest good state, as if it had never stopped.
        allow_changes: even if the config or the pictures are not as they were.
        forecast: `Forecast.row()`, if the run was forecast; the report compares it with what happened.

    Yields:
        Checking per picture and Checked, Drawing, Encoding per view of a picture, Started, Continued if resumed, then Step, Sampled, Saved
        and Paused as they happen, and Done, or Stopped if asked to end.

    Raises:
        UserError: if the data or the base cannot be used, the loss is not finite, or a file cannot be written.
    """
    began = time.monotonic()
    run = prepare.linked_run(run).run
    optimizer.check_schedule(run.optimizer.name, run.optimizer.schedule)
    device = devices.best_device()
    dtype = devices.base_dtype(device, run.precision)
    accelerator = processes.start(devices.mixed_precision(dtype), trackers=run.trackers, folder=folder)
    folder, resume = processes.from_first((folder, resume))
    with run_folder.opened(folder, resume=resume) if processes.is_first() else nullcontext():
        found = materials.find_or_refuse(run)
        with processes.first_goes_first():
            ready = yield from prepare.prepare(run, found, folder, device=device, dtype=dtype)
        go = course.assembled(run, folder, ready, accelerator)
        step = yield from course.begun(go, resume=resume, allow_changes=allow_changes, forecast=forecast)
        yield from steps(go, step, began)


def steps(go: Course, step: int, began: float) -> Iterator[Event]:
    """All steps after one, and what happens between them.

    Args:
        began: when the run did, by `time.monotonic`.
    """
    run = go.run
    with course.failures_noted(go):
        while step < run.steps:
            step += 1
            taken, stopping = take_step(go, step)
            yield course.noted(go, taken)
            yield from course.watched(go, taken)
            if (stopping or course.is_stopping(go)) and step < run.steps:
                yield from course.kept(go, step)
                yield from course.stopped(go, step)
                return
            pausing = course.asked(go, "pause") and step < run.steps
            if course.is_due(run.save_every, step) or step == run.steps or pausing or course.asked(go, "save"):
                yield from course.kept(go, step)
            yield from course.looked(go, step)  # after saving: drawing takes long, and what it owes is made up for by `course.begun`
            if pausing:
                yield from course.waited(go, step)
                if course.is_stopping(go):  # saved before it waited
                    yield from course.stopped(go, step)
                    return
        yield from course.finished(go, began)


def take_step(go: Course, step: int) -> tuple[Step, bool]:
    """One optimizer step: its batches' gradients, added up over all processes, clipped, and taken unless they are not finite.

    Returns:
        What happened, and whether any process was asked to end before it.

    Raises:
        UserError: if the loss or a gradient is not finite; weights, optimizer and average are as they were before the step.
    """
    run, mover, scaler = go.run, go.mover, go.accelerator.scaler
    began = time.monotonic()
    rate = adapters.set_rates(mover, run, step - 1)
    own = accumulated(go, step)
    stop = torch.tensor(float(run_folder.is_asked(go.folder, "stop")))
    total, stop = processes.add_up(go.trainable, torch.stack([own, stop.to(own.device)]))
    if scaler:
        scaler.unscale_(mover)
    norm = torch.nn.utils.clip_grad_norm_(go.trainable, run.optimizer.clip_norm or math.inf)
    bad = 1 - torch.isfinite(total if scaler else total + norm).float()  # fp16's scaler looks at gradients itself
    if not scaler and not optimizer.leave_out(mover, bad) and bad:
        raise UserError(not_finite(go, step))
    if scaler:
        scaler.step(mover)  # not where gradients overflow: it halves its scale instead
        scaler.update()
    else:
        mover.step()
    mover.zero_grad(set_to_none=True)
    value, broken, stopping = torch.stack([total, bad, stop]).tolist()  # the step's one wait, when the device has all of it
    if broken:
        raise UserError(not_finite(go, step))
    if run.optimizer.max_norm:
        adapters.limit_norms(go.ready.base, run.optimizer.max_norm)
    if go.average:
        averaging.update(go.average, go.trainable, decay=averaging.decay_at(step, decay=run.optimizer.ema))
    return Step(step, value, rate, time.monotonic() - began), stopping > 0


def accumulated(go: Course, step: int) -> Tensor:
    """The loss of a step's batches [], as far as this process sees them; their gradients are left in the weights."""
    run, base, parts = go.run, go.ready.base, go.run.optimizer.accumulation
    total = torch.zeros((), device=base.device)
    for batch_index in range((step - 1) * parts, step * parts):
        devices.seed(base.device, run.seed, batch_index, 29)  # dropout draws from the global stream, as checkpointing replays it
        with lora_flat.spread(go.trained.flats, go.trained.adapters, base.dtype):
            batch = gather(run, go.ready, batch_index=batch_index)
            if batch:
                batch_loss = loss_of_batch(base, batch, go.alphas, run=run, batch_index=batch_index) / parts
                go.accelerator.backward(batch_loss)
                total += batch_loss.detach()
    return total


@dataclass(frozen=True)
class Batch:
    """What one forward pass is fed: views of one size; of the rows that are this process's, texts, SDXL's sizes [R, 6] and weights [R].

    Args:
        seen: the views of the whole batch [B]: noise is drawn for all of them, so that it does not depend on who takes which.
        rows: which of them are this process's.
        prior: for prior prediction also the texts with the class word: as the trained encoders say them, and as the base's own did.
    """

    seen: tuple[Latents, ...]
    rows: list[int]
    text: TextStates
    sizes: Tensor
    weights: Tensor
    pictures: tuple[str, ...]
    prior: tuple[TextStates, TextStates] | None = None


def gather(run: Config, ready: Prepared, *, batch_index: int) -> Batch | None:
    """The batch of an index, counted from the run's first: which pictures, which view of each, what is said of it.

    Returns:
        None if nothing of it is this process's: a size's last batch can be smaller than the processes are many.
    """
    base, data, speech = ready.base, ready.data, ready.speech
    epoch, visits = materials.batch_at(data, batch=run.batch, seed=run.seed, batch_index=batch_index)
    which = [materials.view_at(data, visit, seed=run.seed, epoch=epoch) for visit in visits]
    rows = dataset.share(range(len(visits)), process=processes.index(), processes=processes.count())
    if not rows:
        return None
    items = [data.items[visits[row].sample] for row in rows]
    views = [item.views[which[row]] for item, row in zip(items, rows, strict=True)]
    said = [materials.caption_at(data, visits[row], seed=run.seed, epoch=epoch) for row in rows]
    sources = [data.samples[item.sample].source for item in items]
    class_rows = [speech.rows[prepare.class_caption(run, words)] for words in said] if speech.base_states is not None else []
    return Batch(
        seen=tuple(ready.seen[visit.sample][i] for visit, i in zip(visits, which, strict=True)),
        rows=rows,
        text=spoken(base, speech, [speech.rows[words] for words in said]),
        sizes=torch.tensor([buckets.time_ids(view.original_px, view.fit, flipped=view.flipped) for view in views], dtype=torch.float32),
        weights=torch.tensor([data.weights[source] for source in sources]).to(base.device),
        pictures=tuple(data.samples[data.items[visit.sample].sample].picture.name for visit in visits),
        prior=(spoken(base, speech, class_rows), speech.base_states[class_rows]) if speech.base_states is not None else None,
    )


def spoken(base: Base, speech: Speech, rows: Sequence[int]) -> TextStates:
    """The text states of some rows: kept, or made by the encoders as they are now."""
    return speech.states[rows] if speech.states is not None else text.encode(base, speech.tokens[rows])


def loss_of_batch(base: Base, batch: Batch, alphas: Tensor, *, run: Config, batch_index: int) -> Tensor:
    """From pictures to a loss []: draw latents, add noise, let the UNet predict, compare.

    Args:
        alphas: ᾱ [T].

    Returns:
        This process's part of the batch's mean.
    """
    aim, rows = run.objective, batch.rows
    clean, drawn, noisy, timesteps = chance(base, batch, alphas, run=run, batch_index=batch_index)
    wanted = noise.target(clean, drawn, alphas, timesteps, prediction=base.prediction)[rows]
    noisy, timesteps = noisy[rows], timesteps[rows]
    predicted = base_model.predict(base, noisy, timesteps, batch.text, batch.sizes)
    weight = loss.WEIGHTINGS[aim.weighting](loss.snr(alphas, timesteps), gamma=run.min_snr_gamma, prediction=base.prediction)
    delta = loss.DELTAS[aim.huber_schedule](alphas, timesteps, delta=aim.huber_delta) if aim.loss == "huber" else None
    mask = latents.masks(batch.seen)
    error = loss.sample_error(predicted, wanted, form=aim.loss, mask=None if mask is None else mask[rows], delta=delta)
    own = error * weight * batch.weights
    whole = own + run.regularisation_weight * prior_error(base, batch, noisy, timesteps) if batch.prior else own
    return whole.sum() / len(batch.seen)


def chance(base: Base, batch: Batch, alphas: Tensor, *, run: Config, batch_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that is drawn for a batch, from (seed, batch_index) alone: clean latents, noise, noisy latents [B, 4, h, w], timesteps [B]."""
    generator, aim = devices.generator(run.seed, batch_index), run.objective
    clean = latents.draw(batch.seen, generator=generator)
    drawn = torch.randn(clean.shape, generator=generator)
    drawn = noise.with_offset(drawn, strength=aim.noise_offset, generator=generator)
    drawn = noise.pyramid(drawn, discount=aim.pyramid_discount, levels=aim.pyramid_levels, generator=generator).to(clean.device)
    timesteps = noise.timesteps(
        len(clean), count=len(alphas), generator=generator, stratified=aim.stratified, density=aim.timesteps, low=aim.timestep_low,
        high=aim.timestep_high, mean=aim.timestep_mean, scale=aim.timestep_scale,
    ).to(clean.device)  # fmt: skip
    noisy = noise.add_noise(clean, noise.perturbed(drawn, strength=aim.input_perturbation, generator=generator), alphas, timesteps)
    return clean, drawn, noisy, timesteps


def prior_error(base: Base, batch: Batch, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """How far the LoRA moves the base's answer to the captions with the class word [R] (DreamBooth's prior term without pictures)."""
    assert batch.prior is not None
    trained, untouched = batch.prior
    with torch.no_grad():
        lora.set_strength(base.unet, 0.0)
        wanted = base_model.predict(base, noisy, timesteps, untouched, batch.sizes)
        lora.set_strength(base.unet, 1.0)
    return loss.squared_error(base_model.predict(base, noisy, timesteps, trained, batch.sizes), wanted)


def not_finite(go: Course, step: int) -> str:
    """What to say of a step whose loss or gradients are not finite: which pictures, at which timesteps, and what usually helps."""
    run, base, parts = go.run, go.ready.base, go.run.optimizer.accumulation
    told = []
    for batch_index in range((step - 1) * parts, step * parts):
        batch = gather(run, go.ready, batch_index=batch_index)
        if not batch:
            continue
        clean, _, _, timesteps = chance(base, batch, go.alphas, run=run, batch_index=batch_index)
        fine = torch.isfinite(clean).flatten(1).all(1).tolist()
        told += [
            f"{name} at timestep {t}{'' if ok else ', whose latents are broken'}"
            for name, t, ok in zip(batch.pictures, timesteps.tolist(), fine, strict=True)
        ]
    saved = run_folder.has_lora(go.folder)
    remedy = 'set precision = "bf16" or "fp32"' if base.dtype == torch.float16 else "lower optimizer.learning_rate"
    return (
        f"The loss or a gradient of step {step} is not finite ({'; '.join(told)}); nothing of this step was kept, and "
        f"{'checkpoints saved before stand' if saved else 'nothing had been saved before'}. Usually it helps to {remedy}; if it is always "
        f"one picture, take that out. Then the run {'goes on from the newest' if saved else 'begins anew'}."
    )
