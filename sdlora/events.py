"""What a run tells while it goes: the command line draws bars from these, a test lists them, `metrics.jsonl` holds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Checking:
    """The doctor has looked at a picture."""

    done: int
    total: int


@dataclass(frozen=True)
class Checked:
    """What the doctor found, in sentences, the worst first; nothing of it stops the run."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """A regularisation picture was drawn, or found from an earlier run."""

    done: int
    total: int


@dataclass(frozen=True)
class Encoding:
    """A picture was encoded."""

    done: int
    total: int


@dataclass(frozen=True)
class Started:
    """Everything is in memory and the first step is next; `limits` says where the file will not work."""

    pictures: int
    modules: int
    parameters: int
    steps: int
    base: str = ""
    limits: tuple[str, ...] = ()
    held_out: int = 0


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
class Validated:
    """Held-out pictures were scored at their fixed timesteps and noise; step 0 is the base.

    Args:
        loss: mean over the held-out pairs; None if no picture is held out.
        seen_loss: the same for as many pictures that are trained on.
        bands: held-out loss by timestep, the least noisy quarter first.
        drift: how far the LoRA moves the base's prediction on captions without the trigger, as a share of the prediction's square.
    """

    step: int
    loss: float | None
    seen_loss: float
    bands: tuple[float, ...]
    drift: float


@dataclass(frozen=True)
class Continued:
    """The run goes on after a step, from what an earlier start left; `notes` says what is worth knowing."""

    step: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Paused:
    """Somebody asked the run to wait after a step; the GPU is free meanwhile."""

    step: int


@dataclass(frozen=True)
class Alarm:
    """Something is not as it was forecast, in a sentence; the run goes on."""

    step: int
    words: str


@dataclass(frozen=True)
class Proving:
    """A picture of the comparison sheet was drawn."""

    done: int
    total: int


@dataclass(frozen=True)
class Reported:
    """The report was written; `verdict` says which checkpoint to use, in a sentence.

    Args:
        best: the recommended file, or None; and `strength` to draw with.
    """

    path: Path
    verdict: str
    best: Path | None = None
    strength: float = 1.0


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


Event = (
    Checking
    | Checked
    | Drawing
    | Encoding
    | Started
    | Continued
    | Step
    | Validated
    | Saved
    | Sampled
    | Paused
    | Alarm
    | Stopped
    | Proving
    | Reported
    | Done
)
