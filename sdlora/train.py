"""The story of a run: pictures and captions become latents and text, batches become gradients, gradients become a LoRA file.

`train` is a generator of events. The command line draws a progress bar from them, a test lists them, and `metrics.jsonl` holds them
for the page; there are no callbacks. All chance comes from (seed, step), so the same config gives the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora import (
    base_files,
    base_model,
    captions,
    dataset,
    devices,
    files,
    generate,
    latents,
    lora,
    lora_file,
    loss,
    noise,
    optimizer,
    run_folder,
    text,
)  # fmt: skip
from sdlora.base_model import Base, TextStates
from sdlora.config import Config
from sdlora.dataset import Sample
from sdlora.errors import UserError
from sdlora.latents import Latents
from sdlora.text import Tokens


@dataclass(frozen=True)
class Encoding:
    """A picture was encoded."""

    done: int
    total: int


@dataclass(frozen=True)
class Started:
    """Everything is in memory and the first step is next."""

    pictures: int
    modules: int
    parameters: int
    steps: int


@dataclass(frozen=True)
class Step:
    """One optimizer step was taken."""

    step: int
    loss: float
    rate: float
    step_s: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint, or at the end the LoRA file, was written."""

    step: int
    path: Path


@dataclass(frozen=True)
class Sampled:
    """Pictures were drawn with what is learned so far; those of step 0 are the base's."""

    step: int
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Stopped:
    """Somebody asked the run to end: a checkpoint of this step was saved."""

    step: int
    path: Path


@dataclass(frozen=True)
class Done:
    """The run is over."""

    path: Path
    elapsed_s: float


Event = Encoding | Started | Step | Saved | Sampled | Stopped | Done


def train(run: Config, folder: Path) -> Iterator[Event]:
    """Trains a LoRA as `run` says and leaves everything in `folder`.

    Yields:
        Encoding per picture, Started, then Step, Saved and Sampled as they happen, and Done, or Stopped if asked to end.

    Raises:
        UserError: if the data or the base cannot be used, the loss is not finite, or a file cannot be written.
    """
    began = time.monotonic()
    run_folder.check_free(folder)
    samples = find_samples(run)
    device = devices.best_device()
    dtype = devices.base_dtype(device)
    accelerator = Accelerator(mixed_precision=devices.mixed_precision(dtype))
    base = base_files.load(run.base, device=device, dtype=dtype)

    encoded = []
    side_px = run.resolution_px or base.resolution_px
    for pair in latents.encode(base, [sample.picture for sample in samples], side_px=side_px):
        encoded.append(pair)
        yield Encoding(len(encoded), len(samples))
    store = Latents(torch.cat([mean for mean, _ in encoded]), torch.cat([deviation for _, deviation in encoded]))
    base.vae.to("cpu")  # it comes back for samples

    names = add_lora(base, run)
    weights = {part: lora.parameters(module) for part, module in base.parts.items()}
    every = [weight for part in weights.values() for weight in part]
    rates = {"unet": run.optimizer.learning_rate, "text_encoder": run.optimizer.text_encoder_learning_rate}
    groups = [(weights[part], rates.get(part, run.optimizer.text_encoder_learning_rate)) for part in weights]
    adamw = accelerator.prepare_optimizer(optimizer.adamw(groups, weight_decay=run.optimizer.weight_decay), device_placement=False)

    spoken = text.tokens(base, [sample.caption for sample in samples] + [""])
    states = None if any(weights[part] for part in weights if part != "unet") else encode_once(base, spoken)
    alphas = base.alphas
    run_folder.create(folder, run)
    started = Started(len(samples), len(names), sum(weight.numel() for weight in every), run.steps)
    run_folder.log(folder, event="started", **asdict(started))
    yield started
    if run.sample_every:
        yield draw_samples(base, run, folder, samples, step=0)

    for step in range(1, run.steps + 1):
        step_began = time.monotonic()
        factor = optimizer.rate_factor(step - 1, steps=run.steps, warmup=run.optimizer.warmup, schedule=run.optimizer.schedule)
        optimizer.set_rates(adamw, factor)
        total, seen = torch.zeros((), device=device), set()
        for part in range(run.optimizer.accumulation):
            batch_index = (step - 1) * run.optimizer.accumulation + part
            chosen = dataset.batch_at(samples, seed=run.seed, batch_index=batch_index, batch=run.batch)
            rows = [len(samples) if _drops(run, batch_index, place) else i for place, i in enumerate(chosen)]
            context = states[rows] if states is not None else text.encode(base, spoken[rows])
            batch_loss = loss_of_batch(base, store, chosen, context, alphas, run=run, batch_index=batch_index)
            accelerator.backward(batch_loss / run.optimizer.accumulation)
            total += batch_loss.detach() / run.optimizer.accumulation
            seen |= set(chosen)
        norm = accelerator.clip_grad_norm_(every, run.optimizer.clip_norm or math.inf)
        value, length = torch.stack([total, norm]).tolist()
        if not math.isfinite(value) or not (math.isfinite(length) or accelerator.scaler):  # fp16's scaler leaves such steps out itself
            raise UserError(_not_finite(step, [samples[i] for i in sorted(seen)]))
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        done = Step(step, value, run.optimizer.learning_rate * factor, time.monotonic() - step_began)
        run_folder.log(folder, event="step", **asdict(done))
        yield done

        last, stopping = step == run.steps, run_folder.is_asked_to_stop(folder)
        if not last and (stopping or step % run.save_every == 0):
            yield save(base, run, run_folder.checkpoint_path(folder, run.name, step), step)
        if not last and stopping:
            run_folder.log(folder, event="stopped", step=step)
            run_folder.forget_stop(folder)
            yield Stopped(step, run_folder.checkpoint_path(folder, run.name, step))
            return
        if run.sample_every and (last or step % run.sample_every == 0):
            yield draw_samples(base, run, folder, samples, step=step)

    saved = save(base, run, run_folder.result_path(folder, run.name), run.steps)
    run_folder.log(folder, event="done", path=saved.path.name)
    yield saved
    yield Done(saved.path, time.monotonic() - began)


def find_samples(run: Config) -> list[Sample]:
    """All pictures of a run with their captions.

    Raises:
        UserError: as `dataset.scan` does.
    """
    return [one for part in run.data for one in dataset.scan(part.folder, trigger=run.trigger, repeats=part.repeats)]


def loss_of_batch(
    base: Base, store: Latents, chosen: list[int], context: TextStates, alphas: Tensor, *, run: Config, batch_index: int
) -> Tensor:
    """From pictures to a loss: draw latents, add noise, let the UNet predict, compare.

    Args:
        chosen: indices of the pictures [B].
        context: their text states.
        alphas: ᾱ [T].
    """
    generator = devices.generator(run.seed, batch_index)
    clean = store.draw(chosen, generator=generator)
    drawn = torch.randn(clean.shape, generator=generator).to(clean.device)
    timesteps = noise.stratified_timesteps(len(chosen), count=len(alphas), generator=generator).to(clean.device)
    noisy = noise.add_noise(clean, drawn, alphas, timesteps)
    wanted = noise.target(clean, drawn, alphas, timesteps, prediction=base.prediction)
    predicted = base_model.predict(base, noisy, timesteps, context)
    weight = loss.min_snr_weight(loss.snr(alphas, timesteps), gamma=run.min_snr_gamma, prediction=base.prediction)
    return (loss.squared_error(predicted, wanted) * weight).mean()


def add_lora(base: Base, run: Config) -> list[str]:
    """Puts fresh adapters into the UNet and, if asked for, the text encoder; returns the wrapped modules' names."""
    generator = devices.generator(run.seed, 2**31)
    names = []
    for part, module in base.parts.items():
        if part != "unet" and not run.lora.text_encoder:
            continue
        wanted = run.lora.targets if part == "unet" else run.lora.text_targets
        assert wanted is not None  # `config.parse` says which
        targets = base_model.targets(wanted, part=part)
        names += lora.add(module, rank=run.lora.rank, alpha=run.lora.alpha, targets=targets, generator=generator)
    return names


@torch.no_grad()
def encode_once(base: Base, spoken: Tokens) -> TextStates:
    """Text states of all captions, for text encoders that do not change."""
    return base_model.joined([text.encode(base, spoken[[row]]) for row in range(len(spoken.ids[0]))])


def draw_samples(base: Base, run: Config, folder: Path, samples: list[Sample], *, step: int) -> Sampled:
    """Draws the run's sample prompts with the adapters as they are; the same seeds at every step, so that steps can be compared."""
    prompts = run.sample_prompts or [samples[0].caption, samples[len(samples) // 2].caption]
    paths = []
    for number, prompt in enumerate(prompts):
        request = generate.Request(prompt, seed=run.seed + number)
        ((_, image),) = generate.pictures(base, request)
        paths.append(run_folder.sample_path(folder, step, number))
        files.write(paths[-1], generate.png_bytes(image, generate.settings_text(base, request, [])))
    base.vae.to("cpu")
    run_folder.log(folder, event="sampled", step=step, paths=[path.name for path in paths])
    return Sampled(step, tuple(paths))


def save(base: Base, run: Config, path: Path, step: int) -> Saved:
    """Writes the adapters as a LoRA file."""
    modules = {
        stem(name): lora_file.LoRAModule(adapter.down, adapter.up, adapter.alpha)
        for part, stem in (("unet", lora_file.unet_stem), ("text_encoder", lora_file.text_stem))
        for name, layer in lora.layers(base.parts[part]).items()
        for adapter in layer.each_adapter()
    }
    files.write(path, lora_file.to_bytes(modules, metadata(base, run, step)))
    return Saved(step, path)


def metadata(base: Base, run: Config, step: int) -> dict[str, str]:
    """What other tools show of a LoRA: kohya's `ss_` and Stability's `modelspec` keys, no times, so that equal runs are equal bytes."""
    family = base.family
    architecture = {"sd1": "stable-diffusion-v1/lora", "sd2": "stable-diffusion-v2-512/lora"}.get(family, f"{family}/lora")
    version = {"sd1": "sd_v1", "sd2": "sd_v2"}.get(family, family)
    values = {
        "ss_output_name": run.name, "ss_base_model_version": version, "ss_network_module": "networks.lora",
        "ss_network_dim": run.lora.rank, "ss_network_alpha": run.lora.alpha, "ss_sd_model_name": run.base,
        "ss_new_sd_model_hash": base_model.weights_hash(base), "ss_steps": step, "ss_seed": run.seed,
        "ss_learning_rate": run.optimizer.learning_rate, "ss_unet_lr": run.optimizer.learning_rate,
        "ss_text_encoder_lr": run.optimizer.text_encoder_learning_rate if run.lora.text_encoder else 0,
        "ss_optimizer": run.optimizer.name, "ss_lr_scheduler": run.optimizer.schedule, "ss_min_snr_gamma": run.min_snr_gamma,
        "modelspec.sai_model_spec": "1.0.1", "modelspec.title": run.name, "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers", "modelspec.prediction_type": {"epsilon": "epsilon"}.get(base.prediction, "v"),
        "modelspec.trigger_phrase": run.trigger,
    }  # fmt: skip
    return {key: str(value) for key, value in values.items()}


def _drops(run: Config, batch_index: int, place: int) -> bool:
    return captions.is_dropped(batch_index * run.batch + place, seed=run.seed, share=run.caption_dropout)


def _not_finite(step: int, samples: list[Sample]) -> str:
    pictures = ", ".join(sample.picture.name for sample in samples)
    return (
        f"The loss or a gradient of step {step} is not finite (pictures {pictures}); nothing of this step was kept, "
        "and the last checkpoint stands. Lower optimizer.learning_rate, and look at these pictures."
    )
