"""From what was counted and measured of a run's parts to the whole of it: memory, time, disk, each with what it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdlora import prepare, proof, validation
from sdlora.amounts import duration, size
from sdlora.config import Config
from sdlora.counts import StepCost
from sdlora.excerpt import Kind
from sdlora.memory import GIB
from sdlora.trial import Measured

COURSE = ("training", "samples", "validation", "saving")  # parts of `seconds` that lie between a run's beginning and its last save


@dataclass(frozen=True)
class Scope:
    """How much a run does, whatever it takes.

    Args:
        kinds: of its batches.
        views: that are encoded, and `texts` that are heard.
        held_out: pictures that are never trained on, and `drawn` those that the base draws for regularisation.
    """

    kinds: tuple[Kind, ...]
    pictures: int
    held_out: int
    drawn: int
    views: int
    texts: int


@dataclass(frozen=True)
class Counted:
    """What is known without a device.

    Args:
        flops: of an optimizer step, in the mean over the run.
        parameters: numbers that are trained.
        weights_bytes: of the frozen base, as far as it stays on the device.
        trained_bytes: of the LoRA, the optimizer's state and the average.
        data_bytes: of latents and text states.
        heaviest: one batch of the kind that needs most.
        coding_bytes: all weights that are there while pictures are encoded or decoded, and what that takes.
        takes_turns: whether the parts of the base are on the device one after the other, see `base_model.bring`.
    """

    flops: float
    parameters: int
    weights_bytes: int
    trained_bytes: int
    data_bytes: int
    heaviest: StepCost
    coding_bytes: int = 0
    takes_turns: bool = False

    @property
    def step_bytes(self) -> int:
        """The base and the heaviest batch."""
        return self.weights_bytes + self.heaviest.peak_bytes

    @property
    def memory_bytes(self) -> int:
        """All of it at the worst moment; what libraries and kernels take comes on top."""
        return self.trained_bytes + self.data_bytes + max(self.step_bytes, self.coding_bytes)


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Args:
        changes: settings with which it fits, as words for `--set`; none if it fits as it is.
        reasons: why they were looked for, a sentence for each attempt that did not fit.
        limit_bytes: the memory that is free.
        seconds: of the whole run, by what they are spent on; empty if nothing was measured.
        run_bytes: of the run folder at its end, by what they are; `cache_bytes` of the cache.
    """

    counted: Counted
    measured: Measured | None
    limit_bytes: int
    changes: tuple[str, ...]
    reasons: tuple[str, ...]
    step_s: float | None
    seconds: dict[str, float]
    run_bytes: dict[str, int]
    cache_bytes: int

    @property
    def total_s(self) -> float | None:
        """From the command to the end."""
        return sum(self.seconds.values()) if self.seconds else None

    @property
    def peak_bytes(self) -> int:
        """As measured, or at least as counted."""
        return self.measured.peak_bytes if self.measured else self.counted.memory_bytes

    @property
    def disk_bytes(self) -> int:
        """Of the run folder."""
        return sum(self.run_bytes.values())

    @property
    def course_s(self) -> float | None:
        """From the first step to the last save: what a report can compare, which is written after it and says nothing of before it."""
        return sum(self.seconds[part] for part in COURSE) if self.seconds else None

    def row(self) -> dict[str, Any]:
        """What stands in `metrics.jsonl`."""
        times = {"step_s": self.step_s, "course_s": self.course_s, "total_s": self.total_s}
        return times | {"peak_bytes": self.peak_bytes, "disk_bytes": self.disk_bytes}

    def lines(self) -> list[str]:
        """In sentences, for the terminal."""
        count, kept = self.counted, self.counted.heaviest.saved_bytes
        where = f"On {self.measured.device}" if self.measured else "Counted, not measured"
        said = [
            f"{where}: a step is {count.flops / 1e12:.3g} TFLOP and trains {count.parameters:,} parameters.",
            f"Memory: {self.peak_bytes / GIB:.2f} GiB of {self.limit_bytes / GIB:.1f} GiB that are free. Counted of this are: the base "
            f"{size(count.weights_bytes)}, what is trained {size(count.trained_bytes)}, pictures and captions {size(count.data_bytes)}, "
            f"a step {size(count.heaviest.peak_bytes)}, of which {size(kept)} are kept for the way back; or, while pictures are encoded or "
            f"drawn, {size(count.coding_bytes)} in place of base and step.",
        ]
        if count.takes_turns:
            said.append("All parts of the base do not fit there together, so each is there when it is used; only drawing takes longer.")
        if count.coding_bytes > count.step_bytes:
            said.append("Most is needed while pictures are encoded or drawn, so a smaller step or base would change nothing here.")
        if self.step_s is not None and self.total_s is not None:
            said.append(f"Time: {duration(self.step_s)} per step, {duration(self.total_s)} in all ({_parts(self.seconds, duration)}).")
        said.append(
            f"Disk: {size(self.disk_bytes)} in the run folder ({_parts(self.run_bytes, size)}), {size(self.cache_bytes)} in the cache."
        )
        if self.changes:
            said += ["The run does not fit as it is:", *self.reasons]
            said.append("It fits with: " + " ".join(f"--set {change}" for change in self.changes))
        return said


def _parts(values: dict[str, Any], say: Callable[[Any], str]) -> str:
    """The shares of a sum, the largest first, without those below a hundredth."""
    total = sum(values.values())
    return ", ".join(f"{name} {say(value)}" for name, value in sorted(values.items(), key=lambda one: -one[1]) if value > total / 100)


# --- sums ---------------------------------------------------------------------------------------------------------------------


def forecast(
    run: Config, scope: Scope, counted: Counted, measured: Measured | None, *, limit: int, changes: Sequence[str], reasons: Sequence[str]
) -> Forecast:
    """The whole run's memory, time and disk from what was counted and measured of its parts."""
    batch_s = None if measured is None else mean_batch_s(scope.kinds, measured)
    step_s = None if measured is None or batch_s is None else batch_s * run.optimizer.accumulation + measured.step_s
    spent = {} if measured is None or step_s is None else seconds(run, scope, counted, measured, step_s=step_s)
    return Forecast(
        counted, measured, limit, tuple(changes), tuple(reasons), step_s, spent, run_bytes(run, scope, counted, measured),
        0 if run.cache == "memory" else counted.data_bytes,
    )  # fmt: skip


def mean_batch_s(kinds: Sequence[Kind], measured: Measured) -> float:
    """Seconds of a batch, in the mean over the run; one with fewer pictures than was measured of its size takes less in proportion."""
    per_picture = {one.shape_px: one.batch_s / one.pictures for one in measured.batches}
    return sum(kind.share * kind.pictures * per_picture[kind.shape_px] for kind in kinds)


def seconds(run: Config, scope: Scope, counted: Counted, measured: Measured, *, step_s: float) -> dict[str, float]:
    """How long each thing takes in the whole run."""
    save_s = measured.save_s * (1 + counted.trained_bytes / measured.lora_bytes)  # the file, and the state at the same speed
    return {
        "start": measured.start_s,
        "looking at pictures": measured.check_s * (scope.pictures + scope.held_out),
        "class pictures": measured.picture_s * scope.drawn,
        "encoding": measured.encode_s * (scope.views + scope.held_out) + (measured.speak_s * scope.texts if measured.missing else 0.0),
        "training": step_s * run.steps + sum(max(0.0, one.first_s - one.batch_s) for one in measured.batches),
        "samples": measured.picture_s * looks(run.steps, run.sample_every) * sample_count(run),
        "validation": measured.forward_s * forwards(run, scope),
        "saving": save_s * saves(run),
        "report": measured.picture_s * sheet_count(run) + measured.forward_s * strengths(run, scope),
    }


def looks(steps: int, every: int) -> int:
    """How often something is done that is done at step 0, every so many steps, and at the end."""
    return 1 + math.ceil(steps / every) if every else 0


def saves(run: Config) -> int:
    """How often the run is saved, the end among them."""
    return math.ceil(run.steps / run.save_every) if run.save_every else 1


def sample_count(run: Config) -> int:
    """Pictures each time samples are drawn: two of the captions if there are no prompts."""
    return len(run.sample_prompts) or 2


def forwards(run: Config, scope: Scope) -> int:
    """Forward passes of one picture for all looks: each pair once, and for drift every other that is trained on with and without LoRA."""
    held, seen = subjects(run, scope)
    return looks(run.steps, prepare.every(run)) * run.validation.draws * (held + 2 * seen)


def subjects(run: Config, scope: Scope) -> tuple[int, int]:
    """Pictures that are looked at: held out, and trained on."""
    held = min(scope.held_out, run.validation.most_pictures)
    return held, min(scope.pictures, held or prepare.ASKED)


def sheet_count(run: Config) -> int:
    """Pictures of the report's sheet: without LoRA, the best file at four strengths, and if it is not alone another file."""
    if not (run.report and run.sample_every):
        return 0
    return min(sample_count(run), proof.PROMPTS) * (1 + len(proof.BESIDE) + 1 + (saves(run) > 1))


def strengths(run: Config, scope: Scope) -> int:
    """Forward passes of one picture by which the report chooses a strength."""
    held, seen = subjects(run, scope)
    return len(validation.STRENGTHS) * run.validation.draws * (held or seen) if run.report and prepare.every(run) else 0


def run_bytes(run: Config, scope: Scope, counted: Counted, measured: Measured | None) -> dict[str, int]:
    """What the run folder holds at its end."""
    halves = 4 if run.output.dtype == "fp32" else 2
    lora_bytes = measured.lora_bytes if measured else counted.parameters * halves
    states = min(saves(run), run.keep_last) + (run.steps // run.keep_every if run.keep_every else 0)
    each = measured.picture_bytes if measured else 0
    drawn, sheet = looks(run.steps, run.sample_every) * sample_count(run), sheet_count(run)
    return {
        "LoRA files": lora_bytes * saves(run),
        "states": counted.trained_bytes * states,
        "samples": each * drawn,
        "report": each * (sheet + (sheet + drawn) * 4 // 3) if run.report else 0,  # the sheet, and a page that holds all pictures in base64
    }
