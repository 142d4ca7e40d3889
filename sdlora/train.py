"""The story of a run: pictures and captions become latents and text, batches become gradients, gradients become a LoRA file.

`train` is a generator of events. The command line draws a progress bar from them, a test lists them, and `metrics.jsonl` holds them
for the page; there are no callbacks. All chance comes from (seed, step), so the same config gives the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora import (
    adapters,
    averaging,
    base_model,
    buckets,
    devices,
    files,
    generate,
    latents,
    lora,
    loss,
    noise,
    optimizer,
    prepare,
    result,
    run_folder,
    text,
)
from sdlora import material as materials
from sdlora.base_model import Base, TextStates
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.events import Done, Event, Sampled, Saved, Started, Step, Stopped
from sdlora.latents import Latents
from sdlora.material import Material
from sdlora.prepare import Prepared, Speech


def train(run: Config, folder: Path) -> Iterator[Event]:
    """Trains a LoRA as `run` says and leaves everything in `folder`.

    Yields:
        Checking per picture and Checked, Drawing, Encoding per view of a picture, Started, then Step, Saved and Sampled as they
        happen, and Done, or Stopped if asked to end.

    Raises:
        UserError: if the data or the base cannot be used, the loss is not finite, or a file cannot be written.
    """
    began = time.monotonic()
    run_folder.check_free(folder)
    optimizer.check_schedule(run.optimizer.name, run.optimizer.schedule)
    device = devices.best_device()
    dtype = devices.base_dtype(device)
    accelerator = Accelerator(mixed_precision=devices.mixed_precision(dtype))
    ready = yield from prepare.prepare(run, folder, device=device, dtype=dtype)
    base, data, keep_text = ready.base, ready.data, ready.speech.states is None

    trainable = adapters.parameters(base)
    mover = accelerator.prepare_optimizer(adapters.optimizer_of(base, run), device_placement=False)
    average = averaging.start(trainable) if run.optimizer.ema else []
    base_model.set_training(base, True)
    run_folder.create(folder, run)
    parameters = sum(weight.numel() for weight in trainable)
    started = Started(len(data.samples), ready.modules, parameters, run.steps, base.title, tuple(adapters.limits(base, run)))
    run_folder.log(folder, event="started", **asdict(started))
    yield started
    if run.sample_every:
        yield draw_samples(base, run, folder, data, step=0, keep_text=keep_text)

    alphas = base.alphas
    for step in range(1, run.steps + 1):
        step_began = time.monotonic()
        factor = adapters.rate_factor(run, step - 1)
        optimizer.set_rates(mover, factor)
        total, pictures = torch.zeros((), device=device), set()
        for part in range(run.optimizer.accumulation):
            batch_index = (step - 1) * run.optimizer.accumulation + part
            torch.manual_seed(devices.key(run.seed, batch_index, 29))  # dropout draws from the global stream, as checkpointing replays it
            batch = gather(run, ready, batch_index=batch_index)
            batch_loss = loss_of_batch(base, batch, alphas, run=run, batch_index=batch_index)
            accelerator.backward(batch_loss / run.optimizer.accumulation)
            total += batch_loss.detach() / run.optimizer.accumulation
            pictures |= set(batch.pictures)
        norm = accelerator.clip_grad_norm_(trainable, run.optimizer.clip_norm or math.inf)
        value, length = torch.stack([total, norm]).tolist()
        if not math.isfinite(value) or not (math.isfinite(length) or accelerator.scaler):  # fp16's scaler leaves such steps out itself
            raise UserError(_not_finite(step, pictures))
        mover.step()
        mover.zero_grad(set_to_none=True)
        if run.optimizer.max_norm:
            adapters.limit_norms(base, run.optimizer.max_norm)
        if average:
            averaging.update(average, trainable, decay=averaging.decay_at(step, decay=run.optimizer.ema))
        taken = Step(step, value, run.optimizer.learning_rate * factor, time.monotonic() - step_began)
        run_folder.log(folder, event="step", **asdict(taken))
        yield taken

        last, stopping = step == run.steps, run_folder.is_asked_to_stop(folder)
        if not last and (stopping or (run.save_every and step % run.save_every == 0)):
            with speaking(mover, trainable, average):
                saved = result.save(base, run, run_folder.checkpoint_path(folder, run.name, step), step=step, data=data)
            yield Saved(step, saved)
        if not last and stopping:
            run_folder.log(folder, event="stopped", step=step)
            run_folder.forget_stop(folder)
            yield Stopped(step, run_folder.checkpoint_path(folder, run.name, step))
            return
        if run.sample_every and (last or step % run.sample_every == 0):
            with speaking(mover, trainable, average):
                sampled = draw_samples(base, run, folder, data, step=step, keep_text=keep_text)
            yield sampled

    with speaking(mover, trainable, average):
        path = result.save(base, run, run_folder.result_path(folder, run.name), step=run.steps, data=data)
    if run.output.sidecars:
        result.write_sidecars(base, run, path, preview=run_folder.newest_sample(folder))
    run_folder.log(folder, event="done", path=path.name)
    yield Saved(run.steps, path)
    yield Done(path, time.monotonic() - began)


@contextmanager
def speaking(mover: torch.optim.Optimizer, weights: Sequence[Tensor], average: Sequence[Tensor]) -> Iterator[None]:
    """While it lasts the adapters hold what is drawn with and saved: the average, if one is kept, and a settled optimizer's weights."""
    with optimizer.settled(mover), averaging.swapped(weights, average) if average else nullcontext():
        yield


@dataclass(frozen=True)
class Batch:
    """What one forward pass is fed: views of one size with their texts, SDXL's sizes [B, 6], weights [B], and the pictures' names.

    For prior prediction also the texts with the class word: as the trained encoders say them, and as the base's own did.
    """

    seen: tuple[Latents, ...]
    text: TextStates
    sizes: Tensor
    weights: Tensor
    pictures: tuple[str, ...]
    prior: tuple[TextStates, TextStates] | None = None


def gather(run: Config, ready: Prepared, *, batch_index: int) -> Batch:
    """The batch of an index, counted from the run's first: which pictures, which view of each, what is said of it."""
    base, data, speech = ready.base, ready.data, ready.speech
    epoch, visits = materials.batch_at(data, batch=run.batch, seed=run.seed, batch_index=batch_index)
    items = [data.items[visit.sample] for visit in visits]
    which = [materials.view_at(data, visit, seed=run.seed, epoch=epoch) for visit in visits]
    views = [item.views[i] for item, i in zip(items, which, strict=True)]
    said = [materials.caption_at(data, visit, seed=run.seed, epoch=epoch) for visit in visits]
    sources = [data.samples[item.sample].source for item in items]
    class_rows = [speech.rows[prepare.class_caption(run, words)] for words in said] if speech.base_states is not None else []
    return Batch(
        seen=tuple(ready.seen[visit.sample][i] for visit, i in zip(visits, which, strict=True)),
        text=spoken(base, speech, [speech.rows[words] for words in said]),
        sizes=torch.tensor([buckets.time_ids(view.original_px, view.fit, flipped=view.flipped) for view in views], dtype=torch.float32),
        weights=torch.tensor([data.weights[source] for source in sources]).to(base.device),
        pictures=tuple(view.picture.name for view in views),
        prior=(spoken(base, speech, class_rows), speech.base_states[class_rows]) if speech.base_states is not None else None,
    )


def spoken(base: Base, speech: Speech, rows: Sequence[int]) -> TextStates:
    """The text states of some rows: kept, or made by the encoders as they are now."""
    return speech.states[rows] if speech.states is not None else text.encode(base, speech.tokens[rows])


def loss_of_batch(base: Base, batch: Batch, alphas: Tensor, *, run: Config, batch_index: int) -> Tensor:
    """From pictures to a loss: draw latents, add noise, let the UNet predict, compare.

    Args:
        alphas: ᾱ [T].
    """
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
    wanted = noise.target(clean, drawn, alphas, timesteps, prediction=base.prediction)
    predicted = base_model.predict(base, noisy, timesteps, batch.text, batch.sizes)
    weight = loss.WEIGHTINGS[aim.weighting](loss.snr(alphas, timesteps), gamma=run.min_snr_gamma, prediction=base.prediction)
    delta = loss.DELTAS[aim.huber_schedule](alphas, timesteps, delta=aim.huber_delta) if aim.loss == "huber" else None
    error = loss.sample_error(predicted, wanted, form=aim.loss, mask=latents.masks(batch.seen), delta=delta)
    own = (error * weight * batch.weights).mean()
    return own + run.regularisation_weight * prior_loss(base, batch, noisy, timesteps) if batch.prior else own


def prior_loss(base: Base, batch: Batch, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """How far the LoRA moves the base's answer to the captions with the class word (DreamBooth's prior term without pictures)."""
    assert batch.prior is not None
    trained, untouched = batch.prior
    with torch.no_grad():
        lora.set_strength(base.unet, 0.0)
        wanted = base_model.predict(base, noisy, timesteps, untouched, batch.sizes)
        lora.set_strength(base.unet, 1.0)
    return loss.squared_error(base_model.predict(base, noisy, timesteps, trained, batch.sizes), wanted).mean()


def draw_samples(base: Base, run: Config, folder: Path, data: Material, *, step: int, keep_text: bool) -> Sampled:
    """Draws the run's sample prompts with the adapters as they are; the same seeds at every step, so that steps can be compared."""
    chosen = (data.samples[0], data.samples[len(data.samples) // 2])
    prompts = run.sample_prompts or [materials.plain_caption(data.rules, sample) for sample in chosen]
    base_model.set_training(base, False)
    paths = []
    for number, prompt in enumerate(prompts):
        request = generate.Request(prompt, seed=run.seed + number)
        ((_, image),) = generate.pictures(base, request)
        paths.append(run_folder.sample_path(folder, step, number))
        files.write(paths[-1], generate.png_bytes(image, generate.settings_text(base, request, [])))
    base_model.set_training(base, True)
    base_model.send_away(base, text=not keep_text)
    run_folder.log(folder, event="sampled", step=step, paths=[path.name for path in paths])
    return Sampled(step, tuple(paths))


def _not_finite(step: int, pictures: set[str]) -> str:
    return (
        f"The loss or a gradient of step {step} is not finite (pictures {', '.join(sorted(pictures))}); nothing of this step was kept, "
        "and checkpoints saved before stand. Lower optimizer.learning_rate, and look at these pictures."
    )
