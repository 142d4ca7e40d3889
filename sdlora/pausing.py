"""A run that waits: its base, latents, texts and optimizer leave the GPU, so that somebody can draw there, and come back unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sdlora import lora_flat
from sdlora.adapters import Trained
from sdlora.prepare import Prepared

LOOK_S = 0.5  # between looks whether the pause is over


@contextmanager
def away(ready: Prepared, trained: Trained, average: Sequence[Tensor]) -> Iterator[None]:
    """While it lasts everything of the run is in the CPU's memory; afterwards it is where it was, bit for bit."""
    device = ready.base.device
    texts = device if any(next(one.parameters()).device == device for one in ready.base.text_encoders) else torch.device("cpu")
    _move(ready, trained, average, torch.device("cpu"), texts=torch.device("cpu"))
    try:
        yield
    finally:
        _move(ready, trained, average, device, texts=texts)


def _move(ready: Prepared, trained: Trained, average: Sequence[Tensor], where: torch.device, *, texts: torch.device) -> None:
    base, speech = ready.base, ready.speech
    base.unet.to(where)  # the adapters with it; a module's parameters stay the objects that the optimizer knows
    for encoder in base.text_encoders:
        encoder.to(texts)
    held = [value for state in trained.mover.state.values() for value in state.values() if isinstance(value, Tensor) and value.ndim]
    seen = [part for views in ready.seen for one in views for part in (one.mean, one.deviation, one.mask) if part is not None]
    spoken = [
        part for states in (speech.states, speech.base_states) if states for part in (states.context, states.pooled) if part is not None
    ]
    for tensor in (*held, *average, *seen, *spoken, *(flat.whole for flat in trained.flats)):
        tensor.data = tensor.data.to(where)
    for flat in trained.flats:
        lora_flat.tie(flat)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
