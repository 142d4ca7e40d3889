"""A few batches of a run, with all that its steps need for them: enough to count and to try it.

A batch is what the run's own order says it is, so what is tried is what will be trained. Views and captions that no chosen batch shows are
tensors without content: they cost nothing, and asking one of them for a number is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora import base_model, prepare, text, train
from sdlora import material as materials
from sdlora.base_model import Base
from sdlora.config import Config
from sdlora.latents import Latents
from sdlora.material import Material
from sdlora.prepare import Prepared, Speech


@dataclass(frozen=True)
class Kind:
    """Batches of one size and number of pictures.

    Args:
        shape_px: width and height.
        index: of the first of them, counted from the run's first batch.
        share: of all batches.
    """

    shape_px: tuple[int, int]
    pictures: int
    index: int
    share: float


# --- which batches there are --------------------------------------------------------------------------------------------------


def kinds(data: Material, *, batch: int, seed: int) -> list[Kind]:
    """All kinds of batches of an epoch; every epoch has the same."""
    count = materials.batches_per_epoch(data, batch=batch)
    found: dict[tuple[tuple[int, int], int], list[int]] = {}
    for index in range(count):
        _, visits = materials.batch_at(data, batch=batch, seed=seed, batch_index=index)
        found.setdefault((data.shapes[visits[0].sample], len(visits)), []).append(index)
    return [Kind(shape, pictures, where[0], len(where) / count) for (shape, pictures), where in found.items()]


def fullest(found: Sequence[Kind]) -> list[Kind]:
    """Of each training size the kind with the most pictures, the heaviest first: what does not fit shows at once."""
    best: dict[tuple[int, int], Kind] = {}
    for kind in found:
        if kind.shape_px not in best or kind.pictures > best[kind.shape_px].pictures:
            best[kind.shape_px] = kind
    return sorted(best.values(), key=lambda kind: math.prod(kind.shape_px) * kind.pictures, reverse=True)


# --- what the steps need, for some batches ------------------------------------------------------------------------------------


def wanted(run: Config, data: Material, chosen: Sequence[Kind]) -> tuple[list[tuple[int, int]], list[str]]:
    """The (item, view) pairs that some batches show, and the captions that they say."""
    places: dict[tuple[int, int], None] = {}
    said: dict[str, None] = {}
    for kind in chosen:
        epoch, visits = materials.batch_at(data, batch=run.batch, seed=run.seed, batch_index=kind.index)
        for visit in visits:
            places[visit.sample, materials.view_at(data, visit, seed=run.seed, epoch=epoch)] = None
            said[materials.caption_at(data, visit, seed=run.seed, epoch=epoch)] = None
    return list(places), list(said)


def heard(run: Config, data: Material) -> list[str]:
    """All that the run will hear, in the order of its batches."""
    return materials.everything_said(data, batch=run.batch, batches=run.steps * run.optimizer.accumulation, seed=run.seed)


def placeholders(data: Material, reduction: int) -> dict[tuple[int, int], Latents]:
    """Latents with a shape and no content for every (item, view)."""

    def blank(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    found = {}
    for i, item in enumerate(data.items):
        sides = item.shape_px[1] // reduction, item.shape_px[0] // reduction
        for j, view in enumerate(item.views):
            found[i, j] = Latents(blank(4, *sides), blank(4, *sides), blank(*sides) if view.mask else None)
    return found


def ready(base: Base, data: Material, seen: Mapping[tuple[int, int], Latents], speech: Speech) -> Prepared:
    """What `train` needs for the batches whose views and captions are there."""
    views = tuple(tuple(seen[i, j] for j in range(len(item.views))) for i, item in enumerate(data.items))
    return Prepared(base, data, views, speech, 0)


@torch.no_grad()
def speech_of(base: Base, run: Config, said: Sequence[str], *, chunks: int, ahead: bool) -> Speech:
    """What `prepare.listen` makes of all captions, for some.

    Args:
        chunks: of 75 tokens, as many as the longest caption of the run has.
        ahead: whether the states are made before the first step.
    """
    prior = run.regularisation == "prediction"
    every = prepare.with_prior(run, said)
    tokens = text.tokens(base, every, chunks=chunks)
    states = base_model.joined([text.encode(base, tokens[[row]]) for row in range(len(every))]) if ahead or prior else None
    return Speech({words: row for row, words in enumerate(every)}, tokens, states if ahead else None, states if prior else None)


def loss(run: Config, steps: Prepared, kind: Kind, alphas: Tensor) -> Tensor:
    """The loss [] of a batch, as the run itself computes it.

    Args:
        alphas: ᾱ [T].
    """
    batch = train.gather(run, steps, batch_index=kind.index)
    assert batch is not None  # one process alone has rows of every batch
    return train.loss_of_batch(steps.base, batch, alphas, run=run, batch_index=kind.index)
