"""A few steps of a run, taken and measured before the run is begun.

It does what the run will do, in the run's order and with the run's own functions, on a few of its pictures: opens the base, encodes, draws,
takes a step or more of each training size, looks, writes, and draws with what it has written. It writes into a temporary folder alone: the
run folder is not touched, and the cache is read, never filled. What it finds of memory is only true in a fresh process, `trial_process`.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch
from PIL import Image
from torch import Tensor, nn

from sdlora import (
    adapters,
    averaging,
    base_model,
    cache,
    devices,
    excerpt,
    generate,
    lora_flat,
    memory,
    optimizer,
    prepare,
    result,
    samples,
    text,
)
from sdlora import material as materials
from sdlora.adapters import Trained
from sdlora.amounts import counted
from sdlora.base_model import Base
from sdlora.config import Config
from sdlora.excerpt import Kind
from sdlora.latents import Latents
from sdlora.material import Found, Material
from sdlora.prepare import Prepared, Speech

LOOK_AT = 4  # pictures for the doctor's time
DRAW_STEPS = 3  # of a sample picture; the first is warm-up
ENOUGH_S = 3.0  # of repeated batches per training size
MOST_REPEATS = 20
SLOW_S = 10.0  # a batch that takes longer is measured once


class TooLargeError(Exception):
    """The device has not enough memory."""


@dataclass(frozen=True)
class BatchTime:
    """A training size with the pictures of a batch, the first batch's seconds forward and backward, and those of the next."""

    shape_px: tuple[int, int]
    pictures: int
    first_s: float
    batch_s: float


@dataclass(frozen=True)
class Measured:
    """What a trial found.

    Args:
        peak_bytes: the most memory that it held, see `memory.peak_bytes`.
        step_s: what an optimizer step takes beside its batches.
        start_s: from the start of the process to the first step, without what is told apart below.
        check_s: of the doctor's look at a picture, `encode_s` of encoding a view, `speak_s` of encoding a text.
        missing: views that are not in the cache yet; if there are none, encoding is reading.
        forward_s: of one picture without gradients.
        picture_s: of drawing a sample, and `picture_bytes` its size.
        save_s: of writing the LoRA, and `lora_bytes` its size.
    """

    device: str
    peak_bytes: int
    batches: tuple[BatchTime, ...]
    step_s: float
    start_s: float
    check_s: float
    encode_s: float
    speak_s: float
    missing: int
    forward_s: float
    picture_s: float
    picture_bytes: int
    save_s: float
    lora_bytes: int


Progress = tuple[int, int]


@dataclass
class Clock:
    """Adds up seconds by name, each measured when the device has finished.

    Args:
        since_s: when the first lap begins, by the same clock as `now_s`.
    """

    device: torch.device
    since_s: float
    now_s: Callable[[], float] = time.perf_counter
    spent_s: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str = "") -> float:
        """The time since the last lap, added to a name."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now_s = self.now_s()
        passed_s, self.since_s = now_s - self.since_s, now_s
        self.spent_s[name] = self.spent_s.get(name, 0.0) + passed_s
        return passed_s


# --- the trial ----------------------------------------------------------------------------------------------------------------


def measure(run: Config, *, memory_limit_bytes: int | None = None, work: bool = False) -> Iterator[Progress | Measured]:
    """Tries a run in this process: (done, total) as it goes, and at the end what was found.

    Args:
        memory_limit_bytes: what a GPU may be asked for, if less than it has.
        work: whether times are of this process's work, for machines that do other things too, instead of the clock's.

    Raises:
        UserError: as the run itself would before its first step.
        TooLargeError: if the memory does not suffice.
    """
    device = devices.best_device()
    if memory_limit_bytes is not None and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_limit_bytes / torch.cuda.mem_get_info(device)[1]), device)
    try:
        yield from _measured(run, Clock(device, 0.0, time.process_time) if work else Clock(device, _born_s()))
    except RuntimeError as problem:
        if isinstance(problem, torch.OutOfMemoryError) or "out of memory" in str(problem) or "can't allocate memory" in str(problem):
            raise TooLargeError from problem
        raise


def _born_s() -> float:
    """When this process began, by `time.perf_counter`."""
    return time.perf_counter() - (time.time() - float(psutil.Process().create_time()))


def _measured(run: Config, clock: Clock) -> Iterator[Progress | Measured]:
    base, data, check_s = _opened(run, clock)
    chosen = excerpt.fullest(excerpt.kinds(data, batch=run.batch, seed=run.seed))
    total = len(chosen) + 3
    seen, missing, encode_s = _encoded(run, base, data, chosen, clock)
    yield 1, total
    trains_text = any(part != "unet" for part in adapters.add_lora(base, run))
    speech, speak_s = _heard(run, base, data, chosen, clock, trains_text=trains_text)
    steps = excerpt.ready(base, data, seen, speech)
    trained = adapters.trained(base, run)
    average = averaging.start(trained.weights) if run.optimizer.ema else []
    base_model.set_training(base, True)
    clock.lap("start")
    picture_s, picture_bytes = _drawn(run, base, data, clock, keep_text=speech.states is None) if run.sample_every else (0.0, 0)
    yield 2, total
    batches, step_s = list[BatchTime](), 0.0
    for done, kind in enumerate(chosen, start=3):
        one, step_s = _stepped(run, steps, kind, trained, average, clock)
        batches.append(one)
        yield done, total
    forward_s = _looked(run, steps, chosen[0], clock)
    save_s, lora_bytes = _saved(run, base, data, clock)
    yield total, total
    yield Measured(
        _title(clock.device), memory.peak_bytes(clock.device), tuple(batches), step_s, clock.spent_s["start"], check_s, encode_s,
        speak_s, missing, forward_s, picture_s, picture_bytes, save_s, lora_bytes,
    )  # fmt: skip


def _title(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"the CPU with {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else device.type


def _opened(run: Config, clock: Clock) -> tuple[Base, Material, float]:
    """The base, what it will be trained on, and seconds of the doctor's look at a picture."""
    found = materials.find_or_refuse(run)
    base = prepare.open_base(run, device=clock.device, dtype=devices.base_dtype(clock.device, run.precision))
    base_model.weights_hash(base)  # reads gigabytes, once; it goes into every file
    data = prepare.material_of(run, found.samples, base)
    clock.lap("start")
    _look(run, replace(found, samples=found.samples[:LOOK_AT], held_out=()), base)
    return base, data, clock.lap("check") / min(LOOK_AT, len(found.samples))


def _look(run: Config, few: Found, base: Base) -> None:
    def count(words: str) -> int:
        return text.count(base, words)

    for _ in materials.examined(run, few, grain_px=base.grain_px, resolution_px=base.resolution_px, token_count=count):
        pass


def _encoded(
    run: Config, base: Base, data: Material, chosen: Sequence[Kind], clock: Clock
) -> tuple[dict[tuple[int, int], Latents], int, float]:
    """The latents that some batches show, how many views the cache lacks, and seconds per view.

    Where the cache lacks none, the autoencoder is not opened, as it will not be in the run.
    """
    views = [view for item in data.items for view in item.views]
    folder = cache.default_folder() if run.cache == "disk" else None
    missing = cache.missing(base, views, folder=folder, background=run.sizes.background) if folder else len(views)
    places, _ = excerpt.wanted(run, data, chosen)
    if missing:
        _ = base.vae
    clock.lap("start")
    shown = [data.items[i].views[j] for i, j in places]
    made = cache.latents(base, shown, folder=None if missing else folder, background=run.sizes.background)
    seen = excerpt.placeholders(data, base.reduction) | {place: one.to(base.device) for place, one in zip(places, made, strict=True)}
    return seen, missing, clock.lap("encode") / len(places)


def _heard(run: Config, base: Base, data: Material, chosen: Sequence[Kind], clock: Clock, *, trains_text: bool) -> tuple[Speech, float]:
    """What is said at some batches, and seconds per text that is encoded ahead."""
    every = excerpt.heard(run, data)
    chunks, (_, said) = text.chunk_count(base, every), excerpt.wanted(run, data, chosen)
    clock.lap("start")
    speech = excerpt.speech_of(base, run, said, chunks=chunks, ahead=prepare.is_ahead(every, trains_text=trains_text))
    speak_s = clock.lap("speak") / len(speech.rows) if speech.states is not None else 0.0
    base_model.send_away(base, text=speech.states is not None)
    return speech, speak_s


def _stepped(
    run: Config, steps: Prepared, kind: Kind, trained: Trained, average: Sequence[Tensor], clock: Clock
) -> tuple[BatchTime, float]:
    """Times of a batch, and seconds of all else in a step; nothing is learned, since the rates are 0."""
    alphas, batch_s, step_s = steps.base.alphas, list[float](), list[float]()
    mover = trained.mover
    optimizer.set_rates(mover, 0.0)
    clock.lap()
    while len(batch_s) < 2 or (batch_s[-1] < SLOW_S and len(batch_s) <= MOST_REPEATS and sum(batch_s[1:]) < ENOUGH_S):
        _batch(run, steps, kind, alphas, trained)
        batch_s.append(clock.lap())
        nn.utils.clip_grad_norm_(trained.weights, run.optimizer.clip_norm or math.inf)
        mover.step()
        mover.zero_grad(set_to_none=True)
        if run.optimizer.max_norm:
            adapters.limit_norms(steps.base, run.optimizer.max_norm)
        if average:
            averaging.update(average, trained.weights, decay=1.0)
        step_s.append(clock.lap())
    return BatchTime(kind.shape_px, kind.pictures, batch_s[0], statistics.median(batch_s[1:])), statistics.median(step_s[1:])


def _batch(run: Config, steps: Prepared, kind: Kind, alphas: Tensor, trained: Trained) -> None:
    """Forward and backward; a function of its own, because a graph that outlives its batch makes 0.8 GiB of SD 1.5's heap unusable."""
    with lora_flat.spread(trained.flats, trained.adapters, steps.base.dtype):
        excerpt.loss(run, steps, kind, alphas).backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _looked(run: Config, steps: Prepared, kind: Kind, clock: Clock) -> float:
    """Seconds of one picture without gradients, in a batch as large as the run's."""
    alphas = steps.base.alphas
    clock.lap()
    float(excerpt.loss(run, steps, kind, alphas))
    return clock.lap() / kind.pictures


def _drawn(run: Config, base: Base, data: Material, clock: Clock, *, keep_text: bool) -> tuple[float, int]:
    """Seconds and bytes of a sample picture: a few of its steps are taken, and the others counted."""
    base_model.set_training(base, False)
    request, laps, picture = generate.Request(samples.prompts(run, data)[0], seed=run.seed), list[float](), None
    for found in generate.picture(base, replace(request, steps=DRAW_STEPS)):
        picture = found
        laps.append(clock.lap())
    assert isinstance(picture, Image.Image)
    base_model.set_training(base, True)
    base_model.send_away(base, text=not keep_text)
    each_s = statistics.median(laps[1:DRAW_STEPS])
    return sum(laps) + each_s * (request.steps - DRAW_STEPS), len(generate.png_bytes(picture, ""))


def _saved(run: Config, base: Base, data: Material, clock: Clock) -> tuple[float, int]:
    """Seconds of writing the LoRA file, and its bytes; where the run will end with a sheet, the file is also drawn with."""
    with tempfile.TemporaryDirectory() as folder:
        clock.lap()
        path = result.save(base, run, Path(folder) / "trial.safetensors", step=1, data=data)
        save_s, lora_bytes = clock.lap(), path.stat().st_size
        if run.report and run.sample_every:
            _shown(run, base, data, path)
    return save_s, lora_bytes


def _shown(run: Config, base: Base, data: Material, path: Path) -> None:
    """A step of a picture with a LoRA file, for its memory: the base's own weights are kept beside those with the LoRA in them."""
    base_model.set_training(base, False)
    generate.set_loras(base, [generate.LoRA(path)])
    for _ in generate.picture(base, generate.Request(samples.prompts(run, data)[0], steps=1)):
        pass
