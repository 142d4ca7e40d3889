"""What happens around the steps of a run: it begins or goes on, is looked at, saved, paused, and brought to its end.

Everything that is written is written here, by the first process alone. What an event says goes into `metrics.jsonl` before anybody hears
of it, so whoever reads the folder knows as much as whoever started the run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdlora import (
    adapters,
    averaging,
    base_model,
    checkpoint,
    memory,
    optimizer,
    pausing,
    prepare,
    processes,
    proof,
    result,
    resuming,
    run_folder,
    run_lock,
    samples,
    validation,
)  # fmt: skip
from sdlora.adapters import Trained
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.events import Alarm, Continued, Done, Event, Paused, Proving, Reported, Saved, Started, Step, Stopped, Validated
from sdlora.prepare import Prepared
from sdlora.watch import Watch

LOOK_BATCH = 8  # pairs per forward pass without gradients


@dataclass(frozen=True)
class Course:
    """A run under way: all that its steps need and change."""

    run: Config
    folder: Path
    ready: Prepared
    accelerator: Accelerator
    trained: Trained
    average: list[Tensor]
    alphas: Tensor
    facts: dict[str, Any]
    watch: Watch

    @property
    def mover(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return self.trained.mover

    @property
    def trainable(self) -> list[nn.Parameter]:
        """What it moves."""
        return self.trained.weights


def assembled(run: Config, folder: Path, ready: Prepared, accelerator: Accelerator) -> Course:
    """The optimizer, the average and the facts around what was prepared."""
    base = ready.base
    trained = adapters.trained(base, run)
    average = averaging.start(trained.weights) if run.optimizer.ema else []
    facts = resuming.facts(run, base, ready.data.samples, ready.apart)
    processes.agree(json.dumps(facts, sort_keys=True, default=str), what="config, base or set of pictures")
    base_model.set_training(base, True)
    if run.trackers:
        accelerator.init_trackers(
            run.name, config={key: value for key, value in resuming.flat(facts["config"]).items() if not isinstance(value, list)}
        )
    return Course(run, folder, ready, accelerator, trained, average, base.alphas, facts, Watch(device=base.device))


def begun(go: Course, *, resume: bool, allow_changes: bool, forecast: Mapping[str, Any] | None = None) -> Generator[Event, None, int]:
    """Puts the newest state back, if the run goes on; makes the folder ready, and looks at what is drawn before the first step.

    Returns:
        The step after which it goes on, 0 at the beginning.
    """
    run, base = go.run, go.ready.base
    state, notes = processes.from_first(
        checkpoint.newest(run_folder.states_path(go.folder)) if resume and processes.is_first() else (None, [])
    )
    step = 0
    if state:
        notes += resuming.check(state, go.facts, allow_changes=allow_changes, before=notes)
        resuming.restore(state, base, go.mover, go.average)
        if go.accelerator.scaler and "scaler" in state.facts:
            go.accelerator.scaler.load_state_dict(state.facts["scaler"])
        step = state.step
        if step > run.steps:
            raise UserError(f"The run has taken {step} steps, more than {run.steps}; raise steps, or start anew with --out FOLDER.")
    ended = run_folder.ended_at(go.folder) if resume and processes.is_first() else 0
    if step < ended:
        raise UserError(
            f"The run has ended after {ended} steps, and of that end no whole state is left to go on from; "
            f"train on from its file in a new run, with --set lora.start_from={run_folder.result_path(go.folder, run.name)}."
        )
    if processes.is_first():
        notes += run_folder.begin(go.folder, run, step=step)
        if state:  # a killed run may have had no time for it
            notes += checkpoint.tidy(run_folder.states_path(go.folder), keep_last=run.keep_last, keep_every=run.keep_every)
        if forecast:
            run_folder.log(go.folder, event="forecast", **forecast)
            go.watch.forecast_s = forecast.get("step_s")
    parameters = sum(weight.numel() for weight in go.trainable)
    held_out = len(go.ready.apart)
    limits = tuple(adapters.limits(base, run))
    yield noted(go, Started(len(go.ready.data.samples), go.ready.modules, parameters, run.steps, base.title, limits, held_out))
    if resume:
        yield noted(go, Continued(step, tuple(notes)))
    yield from looked(go, step)
    return step


def is_due(every: int, step: int) -> bool:
    """Whether something that is done every so many steps is done now; 0 for never."""
    return every > 0 and step % every == 0


def asked(go: Course, request: str) -> bool:
    """Whether somebody has asked for it; the first process answers."""
    return processes.is_first() and run_folder.is_asked(go.folder, request)


def noted(go: Course, event: Event, **more: Any) -> Event:
    """Writes an event, with `more` beside it, into the metrics, if this is the process that writes."""
    if processes.is_first():
        run_lock.beat(go.folder)
        run_folder.log(go.folder, **run_folder.event_row(event, go.folder), **more)
    if go.run.trackers and (told := numbers(event)):
        go.accelerator.log(told, step=getattr(event, "step", None))
    return event


@contextmanager
def failures_noted(go: Course) -> Iterator[None]:
    """What ends the run before its end is noted for whoever reads the folder."""
    try:
        yield
    except UserError as problem:
        if processes.is_first():
            with suppress(UserError):  # the disk may be what has failed
                run_folder.log(go.folder, event="failed", words=str(problem))
        raise


def watched(go: Course, taken: Step) -> Iterator[Event]:
    """An alarm when steps become much slower than they were, or memory spills."""
    if words := go.watch.after(taken.step_s):
        yield noted(go, Alarm(taken.step, words))


def numbers(event: Event) -> dict[str, float]:
    """What a tracker is told of an event."""
    if isinstance(event, Step):
        return {"train/loss": event.loss, "train/rate": event.rate, "train/step_s": event.step_s}
    if isinstance(event, Validated):
        own = {"held_out/seen_loss": event.seen_loss, "held_out/drift": event.drift}
        return own | ({} if event.loss is None else {"held_out/loss": event.loss})
    return {}


def looked(go: Course, step: int) -> Iterator[Event]:
    """Scores held-out pictures and draws the sample prompts when due: at step 0, at the end, and what an earlier start still owes."""
    if not processes.is_first():
        return
    run, wanted = go.run, asked(go, "sample")
    scoring, drawing = go.ready.exam is not None and owed(prepare.every(run), step, run), owed(run.sample_every, step, run)
    if not (scoring or drawing or wanted):  # most steps: the metrics grow with the run and are not read at each
        return
    done = {row["event"] for row in run_folder.each_row(go.folder) if row.get("step") == step}
    if go.ready.exam and scoring and "validated" not in done:
        with speaking(go.mover, go.trainable, go.average):
            scores = validation.score(go.ready.base, go.ready.exam, batch=max(run.batch, LOOK_BATCH))
        yield noted(go, Validated(step, **asdict(scores)))
    if wanted or (drawing and "sampled" not in done):
        words, heard = samples.prompts(run, go.ready.data), go.ready.speech.states is None
        with speaking(go.mover, go.trainable, go.average):
            sampled = samples.draw(go.ready.base, words, go.folder, seed=run.seed, step=step, keep_text=heard)
        run_folder.forget(go.folder, "sample")
        yield noted(go, sampled)


def owed(every: int, step: int, run: Config) -> bool:
    """Whether a look that is taken every so many steps is taken at this one; the first and the last always are."""
    return every > 0 and (step % every == 0 or step == run.steps)


def kept(go: Course, step: int) -> Iterator[Event]:
    """Saves: the LoRA as a file, then the state to go on from, and only then are older states deleted."""
    if not processes.is_first():
        return
    run, states, told = go.run, run_folder.states_path(go.folder), list[Event]()
    scaler = {"scaler": go.accelerator.scaler.state_dict()} if go.accelerator.scaler else {}
    state = resuming.snapshot(go.ready.base, go.mover, go.average, step=step, facts=go.facts | scaler)  # first: it refuses broken numbers
    if step < run.steps:
        path = run_folder.checkpoint_path(go.folder, run.name, step)
        with speaking(go.mover, go.trainable, go.average):
            result.save(go.ready.base, run, path, step=step, data=go.ready.data)
        told.append(noted(go, Saved(step, path), peak_bytes=memory.peak_bytes(go.ready.base.device)))
    checkpoint.write(states, state)  # last: whoever goes on from it finds the LoRA file of its step
    yield from told
    for words in checkpoint.tidy(states, keep_last=run.keep_last, keep_every=run.keep_every):
        yield noted(go, Alarm(step, words))
    run_folder.forget(go.folder, "save")


def waited(go: Course, step: int) -> Iterator[Event]:
    """Frees the device and waits until nobody wants the run to pause any more."""
    with pausing.away(go.ready, go.trained, go.average):
        yield noted(go, Paused(step))
        while run_folder.is_asked(go.folder, "pause") and not run_folder.is_asked(go.folder, "stop"):
            run_lock.beat(go.folder)
            run_folder.forget(go.folder, "save")  # everything was saved before it waited
            time.sleep(pausing.LOOK_S)
    if not run_folder.is_asked(go.folder, "stop"):
        yield noted(go, Continued(step))


def is_stopping(go: Course) -> bool:
    """Whether a run of one process is asked to end; several hear of it with the next step, together."""
    return processes.count() == 1 and run_folder.is_asked(go.folder, "stop")


def stopped(go: Course, step: int) -> Iterator[Event]:
    """The end before the end; all is saved, and the same command goes on, after the last step to the report."""
    yield noted(go, Stopped(step, run_folder.lora_path(go.folder, go.run, step)))
    run_folder.forget(go.folder, "stop")


def finished(go: Course, began: float) -> Iterator[Event]:
    """The LoRA file, its sidecars, and what the run proves."""
    run, path = go.run, run_folder.result_path(go.folder, go.run.name)
    if processes.is_first():
        with speaking(go.mover, go.trainable, go.average):
            result.save(go.ready.base, run, path, step=run.steps, data=go.ready.data)
        if run.output.sidecars:
            result.write_sidecars(go.ready.base, run, path, preview=run_folder.newest_sample(go.folder))
        yield noted(go, Saved(run.steps, path), peak_bytes=memory.peak_bytes(go.ready.base.device))
        if run.report:
            for event in proof.proof(run, go.folder, go.ready):
                yield event if isinstance(event, Proving) else noted(go, event)
                if not isinstance(event, Reported) and run_folder.is_asked(go.folder, "stop"):
                    processes.wait()
                    yield from stopped(go, run.steps)
                    return
    processes.wait()
    yield noted(go, Done(path, time.monotonic() - began))


@contextmanager
def speaking(mover: torch.optim.Optimizer, weights: Sequence[Tensor], average: Sequence[Tensor]) -> Iterator[None]:
    """While it lasts the adapters hold what is drawn with and saved: the average, if one is kept, and a settled optimizer's weights."""
    with optimizer.settled(mover), averaging.swapped(weights, average) if average else nullcontext():
        yield
