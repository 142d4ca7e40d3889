"""What a run trains on, and the order in which it is seen.

The order is a function of (seed, epoch): no state to save, so a run that goes on sees what it would have seen. Each epoch shows each
sample exactly `repeats` times, whatever the batch size and the number of processes: a batch holds one shape, the last batch of a shape
is smaller instead of dropped or filled twice, and processes share out batches that do not depend on how many they are. Held-out
pictures are chosen by their content alone, so neither a new name nor a new neighbour brings a seen picture into the validation.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from sdlora import recipes
from sdlora.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One picture with what is said about it, seen `repeats` times per epoch.

    Args:
        captions: at least one; if more, they are alternatives of which each visit takes one.
        repeats: at least 1.
        mask: greyscale picture of the same size that says where the loss counts.
        source: number of the data entry in the config that it comes from.
        alpha_mask: whether the picture's own alpha channel is the mask, if no other is given.
    """

    picture: Path
    captions: tuple[str, ...]
    repeats: int = 1
    mask: Path | None = None
    source: int = 0
    alpha_mask: bool = False

    @property
    def caption(self) -> str:
        """The first of its captions."""
        return self.captions[0]


@dataclass(frozen=True)
class Finding:
    """Something that a person should know about their data: what it is, and what to do.

    Args:
        severity: "stops": nothing is trained before it is mended; "warns": the LoRA is worse for it; "notes": good to know.
        code: short name of the kind, such as "caption-missing"; findings of one kind are counted together.
        what: what was found, one sentence.
        advice: what to do, one sentence.
        path: the file or folder, if it is about one.
    """

    severity: Literal["stops", "warns", "notes"]
    code: str
    what: str
    advice: str
    path: Path | None = None


class Visit(NamedTuple):
    """One showing of a sample: all chance of a visit is drawn from (seed, epoch, sample, repeat), so no two share a stream."""

    sample: int
    repeat: int


def epoch_batches(shapes: Sequence[Hashable], repeats: Sequence[int], *, batch: int, seed: int, epoch: int) -> list[list[Visit]]:
    """The batches of one epoch in their order: each sample exactly `repeats` times, each batch of one shape, none left out.

    Visits are shuffled, cut into batches shape by shape, and the batches shuffled, all by (seed, epoch). The last batch of a shape
    holds what is left, from 1 to `batch` visits.

    Args:
        shapes: of each sample; samples with equal shapes may share a batch.
        repeats: of each sample, at least 1.
        batch: the most visits in a batch, at least 1.
        epoch: 0 for the first.
    """
    return [list(one) for one in _epoch(tuple(shapes), tuple(repeats), batch, seed, epoch)]


def steps_per_epoch(shapes: Sequence[Hashable], repeats: Sequence[int], *, batch: int) -> int:
    """The number of batches in an epoch, Σ over shapes ⌈visits of the shape / batch⌉; the same in every epoch."""
    visits: dict[Hashable, int] = defaultdict(int)
    for shape, times in zip(shapes, repeats, strict=True):
        visits[shape] += times
    return sum(math.ceil(count / batch) for count in visits.values())


def batch_of_step(shapes: Sequence[Hashable], repeats: Sequence[int], *, batch: int, seed: int, index: int) -> tuple[int, list[Visit]]:
    """The epoch and the visits of one batch, counted from the run's first; the arguments are those of `epoch_batches`.

    Args:
        index: number of the batch, 0 for the run's first, counted through all epochs.
    """
    epoch, place = divmod(index, steps_per_epoch(shapes, repeats, batch=batch))
    return epoch, list(_epoch(tuple(shapes), tuple(repeats), batch, seed, epoch)[place])


@lru_cache(maxsize=4)  # a run asks for one epoch again and again: 20,000 visits take 30 ms to shuffle
def _epoch(shapes: tuple[Hashable, ...], repeats: tuple[int, ...], batch: int, seed: int, epoch: int) -> tuple[tuple[Visit, ...], ...]:
    visits = [Visit(sample, repeat) for sample, times in enumerate(repeats) for repeat in range(times)]
    chance = np.random.default_rng([seed, epoch, 13])
    of_shape: dict[Hashable, list[Visit]] = {shape: [] for shape in shapes}
    for i in chance.permutation(len(visits)).tolist():
        of_shape[shapes[visits[i].sample]].append(visits[i])
    batches = [tuple(group[start : start + batch]) for group in of_shape.values() for start in range(0, len(group), batch)]
    return tuple(batches[i] for i in chance.permutation(len(batches)).tolist())


def share(batch: Sequence[T], *, process: int, processes: int) -> list[T]:
    """What one of several processes takes of a batch: together they take all of it, each once, and their sizes differ by at most 1.

    Args:
        process: 0 to processes - 1; those of a high number take nothing where the batch is smaller than they are many.
    """
    return list(batch[process::processes])


def split(keys: Sequence[str], *, share: float, groups: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Which pictures are trained on and which are held out, by the rank of SHA-256(content), never by name or order.

    Duplicates go together: pictures of one key or of one group, directly or through others. The first in rank are held out up to the
    share, rounded to whole pictures and at least one; a set of duplicates that would exceed it is trained on. If every set would,
    the smallest is held out. Where no picture has a duplicate, a new file makes at most one held-out picture a training picture.

    Args:
        keys: hash of each picture's content.
        share: 0 to below 1; 0 holds nothing out.
        groups: a number for each picture, the same for near duplicates.

    Returns:
        Indices for training and indices held out, both ascending.

    Raises:
        UserError: if a share is asked for and there is nothing that could be held out.
    """
    if share == 0:
        return list(range(len(keys))), []
    ranked = sorted(_duplicates(keys, groups), key=lambda one: min(_rank(keys[i]) for i in one))
    if len(ranked) < 2:
        found = "are all duplicates of each other" if len(keys) > 1 else "are too few to hold one out"
        raise UserError(f"The validation share is {share}, but the pictures ({len(keys)}) {found}; add others, or set the share to 0.")
    goal, held = recipes.held_out(len(keys), share=share), list[int]()
    for one in ranked:
        if len(held) + len(one) <= min(goal, len(keys) - 1):
            held += one
    if not held:
        held = min(ranked, key=lambda one: len(one))
    return sorted(set(range(len(keys))) - set(held)), sorted(held)


def _rank(key: str) -> str:
    return hashlib.sha256(f"held out: {key}".encode()).hexdigest()  # a hash of its own, as keys could be ordered in some other way


def _duplicates(keys: Sequence[str], groups: Sequence[int] | None) -> list[list[int]]:
    """Indices by connected sets: two are connected if they share their key or their group."""
    root = list(range(len(keys)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]  # halves the way for the next who asks
            i = root[i]
        return i

    for labels in (keys, groups or range(len(keys))):
        first: dict[Hashable, int] = {}
        for i, label in enumerate(labels):
            root[find(i)] = find(first.setdefault(label, i))
    sets: dict[int, list[int]] = defaultdict(list)
    for i in range(len(keys)):
        sets[find(i)].append(i)
    return list(sets.values())
