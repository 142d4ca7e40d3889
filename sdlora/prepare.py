"""Before the first step: the base is opened, the doctor looks, pictures and captions become tensors, adapters sit in the base.

`prepare` is a generator of events, like the run that it begins, and returns what the steps need.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sdlora import (
    adapters,
    base_files,
    base_model,
    cache,
    dataset_report,
    devices,
    generate,
    int8,
    linked,
    regularisation,
    text,
    validation,
)
from sdlora import material as materials
from sdlora.base_model import Base, TextStates
from sdlora.config import Config
from sdlora.dataset import Sample
from sdlora.events import Checked, Checking, Drawing, Encoding, Event
from sdlora.latents import Latents
from sdlora.linked import Linked
from sdlora.material import Found, Material
from sdlora.text import Tokens
from sdlora.validation import Exam, Subject

ASKED = 4  # pictures that are looked at if none is held out
MOST_STATES = 4096  # texts that are encoded ahead; a run that hears more keeps its text encoder and encodes each batch


@dataclass(frozen=True)
class Speech:
    """All that a run will hear: the row of each text, its tokens, and its states unless a text encoder is trained."""

    rows: dict[str, int]
    tokens: Tokens
    states: TextStates | None
    base_states: TextStates | None = None  # by the encoders as they came, for prior prediction


@dataclass(frozen=True)
class Prepared:
    """What the steps need: the base with its adapters, what is trained on, each item's views as latents, and all that will be heard."""

    base: Base
    data: Material
    seen: tuple[tuple[Latents, ...], ...]
    speech: Speech
    modules: int
    apart: tuple[Sample, ...] = ()  # held out
    exam: Exam | None = None  # what is asked of them, if they are looked at


def linked_run(run: Config) -> Linked:
    """The run with all that follows from its base and its pictures, both only looked at from outside.

    Raises:
        UserError: if the base is none that is known.
    """
    dtype = devices.base_dtype(devices.best_device(), run.precision)
    what = base_files.identify(run.base, dtype=dtype, family=run.family, prediction=run.prediction)
    prediction = "epsilon" if what.prediction == "unstated" else what.prediction  # of most bases; it is measured when opened
    found = materials.find(run)
    every = [*found.samples, *(() if run.validation.folder else found.held_out)]
    pictures = sum(not run.data[sample.source].regularisation for sample in every)
    return linked.resolve(run, family=what.family, prediction=prediction, pictures=max(1, pictures))


def prepare(run: Config, found: Found, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Generator[Event, None, Prepared]:
    """Everything up to the first step.

    Args:
        found: the run's pictures, from `material.find_or_refuse`.
        folder: the run's, for drawn pictures if nothing is kept in the user's cache.

    Yields:
        Checking per picture and Checked, Drawing per regularisation picture, Encoding per view of a picture.

    Raises:
        UserError: if the data or the base cannot be used.
    """
    began_s = time.time()
    base = open_base(run, device=device, dtype=dtype)
    kept = cache.default_folder() if run.cache == "disk" else None
    trouble = cache.trouble(kept) if kept else None
    yield from look(run, found, base, notes=(f"warns: {trouble}",) if trouble else ())
    kept = None if trouble else kept
    data = material_of(run, found.samples, base)
    if run.regularisation == "auto":
        extra = yield from draw_class(run, data, base, (kept or folder) / cache.DRAWN)
        data = material_of(run, (*found.samples, *extra), base)
    seen = yield from encode(run, data, base, kept)
    added = adapters.add_lora(base, run)
    speech = listen(base, run, data, trains_text=any(part != "unet" for part in added), folder=kept)
    exam = examination(run, base, data, seen, found.held_out, speech, kept) if every(run) else None
    base_model.send_away(base, text=speech.states is not None)
    if kept:
        cache.trim(kept, since_s=began_s)
    return Prepared(base, data, seen, speech, sum(map(len, added.values())), found.held_out, exam)


def open_base(run: Config, *, device: torch.device, dtype: torch.dtype) -> Base:
    """The run's base, with what the config overrides.

    Raises:
        UserError: as `base_files.load`.
    """
    base = base_files.load(
        run.base, device=device, dtype=dtype, vae=run.vae, tokenizer=run.tokenizer, family=run.family, prediction=run.prediction,
        clip_skip=run.clip_skip,
    )  # fmt: skip
    if run.zero_terminal_snr is not None:
        base.schedule = base.schedule | {"rescale_betas_zero_snr": run.zero_terminal_snr}
    ease(base, run)
    return base


def ease(base: Base, run: Config) -> None:
    """What the run asks for to take less memory of a base, which answers the same, or with `quantise` nearly so."""
    if run.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    if run.quantise == "int8":
        int8.shrink(base.unet)


def look(run: Config, found: Found, base: Base, *, notes: tuple[str, ...] = ()) -> Generator[Event, None, None]:
    """The doctor looks at every picture and caption.

    Args:
        notes: what else is to be said with the findings.

    Raises:
        UserError: if something must be mended first.
    """
    count = partial(text.count, base)
    for looked in materials.examined(run, found, grain_px=base.grain_px, resolution_px=base.resolution_px, token_count=count):
        if isinstance(looked, dataset_report.Report):
            materials.refuse(looked.findings)
            yield Checked((*dataset_report.lines(looked, batch=run.batch * run.optimizer.accumulation), *notes))
        else:
            yield Checking(*looked)


def material_of(run: Config, samples: tuple[Sample, ...], base: Base) -> Material:
    """The samples at sizes that suit the base."""
    return materials.material(run, samples, grain_px=base.grain_px, resolution_px=base.resolution_px)


def draw_class(run: Config, data: Material, base: Base, folder: Path) -> Generator[Event, None, list[Sample]]:
    """Regularisation pictures, drawn by the base from the user's captions, as samples of a data folder behind the last."""
    asked = class_requests(run, data)
    found = []
    for path, request in zip(regularisation.drawn(base, asked, folder), asked, strict=True):
        found.append(Sample(path, (request.prompt,), source=len(run.data)))
        yield Drawing(len(found), len(asked))
    return found


def encode(run: Config, data: Material, base: Base, folder: Path | None) -> Generator[Event, None, tuple[tuple[Latents, ...], ...]]:
    """The latents of each item's views, on the base's device."""
    views = [view for item in data.items for view in item.views]
    made: list[Latents] = []
    for one in cache.latents(base, views, folder=folder, background=run.sizes.background):
        made.append(one.to(base.device))
        yield Encoding(len(made), len(views))
    ready = iter(made)
    return tuple(tuple(next(ready) for _ in item.views) for item in data.items)


def class_requests(run: Config, data: Material) -> list[generate.Request]:
    """One picture of the class for each of the user's, of the same size and from the same caption."""
    own = [item for item in data.items if not run.data[data.samples[item.sample].source].regularisation]
    captions = [class_caption(run, materials.plain_caption(data.rules, data.samples[item.sample])) for item in own]
    return [
        regularisation.request(words, seed=run.seed + i, size_px=item.shape_px)
        for i, (words, item) in enumerate(zip(captions, own, strict=True))
    ]


def class_caption(run: Config, caption: str) -> str:
    """A caption with the class word for the trigger word."""
    return regularisation.class_caption(caption, trigger=run.trigger, class_word=run.class_word)


@torch.no_grad()
def listen(base: Base, run: Config, data: Material, *, trains_text: bool, folder: Path | None) -> Speech:
    """Tokens of all that the run will hear, and the states unless they change while it trains."""
    said = materials.everything_said(data, batch=run.batch, batches=run.steps * run.optimizer.accumulation, seed=run.seed)
    heard = with_prior(run, said)
    tokens = text.tokens(base, heard)
    states = cache.text_states(base, tokens, folder=folder) if is_ahead(heard, trains_text=trains_text) else None
    prior = untouched(base, tokens, folder) if run.regularisation == "prediction" else None
    return Speech({words: row for row, words in enumerate(heard)}, tokens, states, prior)


def with_prior(run: Config, said: Sequence[str]) -> list[str]:
    """Captions, and for prior prediction the same with the class word behind them; each once."""
    more = {class_caption(run, words) for words in said} - set(said) if run.regularisation == "prediction" else set()
    return [*said, *sorted(more)]


def is_ahead(heard: Sequence[str], *, trains_text: bool) -> bool:
    """Whether all texts are encoded before the first step: their encoders do not change, and they are not too many."""
    return not trains_text and len(heard) <= MOST_STATES


def every(run: Config) -> int:
    """Steps between looks at held-out pictures; 0 for none."""
    return run.save_every if run.validation.every is None else run.validation.every


def examination(
    run: Config,
    base: Base,
    data: Material,
    seen: Sequence[Sequence[Latents]],
    apart: tuple[Sample, ...],
    speech: Speech,
    folder: Path | None,
) -> Exam:
    """What is asked at each look: of the held-out pictures, and of as many that are trained on."""
    held = material_of(run, apart, base) if apart else None
    asked: list[Subject] = []
    if held:
        views = [view for item in held.items for view in item.views[:1]]
        made = list(cache.latents(base, views, folder=folder, background=run.sizes.background))
        asked += validation.subjects(held, [(one.to(base.device),) for one in made], most=run.validation.most_pictures, held_out=True)
    extra = {source for source, one in enumerate((*run.data, None)) if one is None or one.regularisation}
    asked += validation.subjects(data, seen, most=len(asked) or ASKED, held_out=False, without=extra)
    return validation.exam(
        base, asked, seed=run.seed, draws=run.validation.draws, trigger=run.trigger, class_word=run.class_word,
        trains_text=bool(run.lora.text_encoder), chunks=speech.tokens.ids[0].shape[1],
    )  # fmt: skip


def untouched(base: Base, tokens: Tokens, folder: Path | None) -> TextStates:
    """Text states as the base's own encoders say them, the LoRA silent."""
    with validation.answering(base, strength=0.0):
        return cache.text_states(base, tokens, folder=folder)
