"""Whether a LoRA learns or memorises: pictures that are never trained on, scored at fixed timesteps and with fixed noise.

The training loss cannot say it: every step draws other timesteps, between which a loss differs tenfold. Here each picture keeps its
timesteps, one from each of `draws` equal bands, and its noise, both drawn from (seed, the picture's bytes), so that two looks differ in
nothing but the weights, and adding a picture changes nothing for the others. As many pictures that are trained on are scored alike:
what they gain and held-out ones do not is memory. Drift is what the LoRA does where nobody calls it. Errors are squared and not
weighted, whatever the run trains on, so that the numbers of two runs can be compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from statistics import fmean

import torch
from torch import Tensor

from sdlora import base_model, buckets, cache, devices, files, latents, lora, loss, noise, regularisation, text
from sdlora import material as materials
from sdlora.base_model import Base, TextStates
from sdlora.errors import UserError
from sdlora.latents import Latents
from sdlora.lora import Adapter
from sdlora.lora_adapters import Fixed
from sdlora.material import Material
from sdlora.text import Tokens

BANDS = 4  # quarters of the timesteps that are told apart
STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


@dataclass(frozen=True)
class Subject:
    """A picture that is scored: its latents, its caption, what SDXL is told of its size, and 32 bits of its bytes' hash."""

    seen: Latents
    caption: str
    sizes: tuple[int, ...]
    key: int
    held_out: bool


@dataclass(frozen=True)
class Pair:
    """A subject's number, and one of its noises with its timestep, 0 for the least noisy."""

    subject: int
    draw: int
    timestep: int


@dataclass(frozen=True)
class Exam:
    """All that is asked at each look.

    Args:
        draws: pairs per subject.
        tokens: the subjects' captions, and then each without the trigger word.
        states: of the same, by the text encoders as they came.
        trains_text: whether captions are to be encoded anew at each look.
    """

    subjects: tuple[Subject, ...]
    seed: int
    draws: int
    timesteps: int
    tokens: Tokens
    states: TextStates
    trains_text: bool

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """All pairs, subjects of one size beside each other."""
        numbers = sorted(range(len(self.subjects)), key=lambda i: self.subjects[i].seen.mean.shape)
        return tuple(Pair(i, draw, when) for i in numbers for draw, when in enumerate(self._timesteps_of(i)))

    def _timesteps_of(self, subject: int) -> list[int]:
        generator = devices.generator(self.seed, self.subjects[subject].key, 31)
        return sorted(noise.stratified_timesteps(self.draws, count=self.timesteps, generator=generator).tolist())


@dataclass(frozen=True)
class Scores:
    """What a look found; the fields of `events.Validated`."""

    loss: float | None
    seen_loss: float
    bands: tuple[float, ...]
    drift: float


@dataclass(frozen=True)
class Noisy:
    """A batch of pairs: noisy latents and what the UNet should answer [B, 4, h, w], timesteps [B], SDXL's sizes [B, 6], the mask."""

    latents: Tensor
    wanted: Tensor
    timesteps: Tensor
    sizes: Tensor
    mask: Tensor | None


# --- before the first step ----------------------------------------------------------------------------------------------------


def subjects(
    data: Material, seen: Sequence[Sequence[Latents]], *, most: int, held_out: bool, without: Collection[int] = ()
) -> tuple[Subject, ...]:
    """The pictures of some material that are scored: each in its first view at its first size, with its caption as it is without chance.

    Args:
        seen: the latents of each item's views.
        most: so many at most, the first by the hash of their bytes.
        held_out: whether they are never trained on.
        without: numbers of data folders that are left out, those of regularisation.
    """
    items = {item.sample: number for number, item in reversed([*enumerate(data.items)])}  # the first of each sample
    own = [i for i, sample in enumerate(data.samples) if sample.source not in without]
    chosen = sorted(own, key=lambda i: files.sha256(data.samples[i].picture))[:most]
    return tuple(_subject(data, seen, items[i], held_out) for i in chosen)


def _subject(data: Material, seen: Sequence[Sequence[Latents]], number: int, held_out: bool) -> Subject:
    item = data.items[number]
    view, sample = item.views[0], data.samples[item.sample]
    return Subject(
        seen[number][0], materials.plain_caption(data.rules, sample), buckets.time_ids(view.original_px, view.fit, flipped=view.flipped),
        int(files.sha256(sample.picture)[:8], 16), held_out,
    )  # fmt: skip


@torch.no_grad()
def exam(
    base: Base, asked: Sequence[Subject], *, seed: int, draws: int, trigger: str, class_word: str, trains_text: bool, chunks: int = 1
) -> Exam:
    """Fixes what is asked at each look; the text encoders are used, so this comes before they are sent away.

    Args:
        asked: held-out pictures, if there are any, and at least one that is trained on.
        draws: pairs of timestep and noise per picture, a multiple of 4.
        trigger, class_word: drift is asked about the captions with the second, which may be empty, in the place of the first.
        trains_text: whether the text encoders carry adapters.
        chunks: how many chunks of 75 tokens the run's captions have; a longer one here makes them more.

    Raises:
        UserError: if `draws` is not a multiple of 4.
    """
    if draws < BANDS or draws % BANDS:
        raise UserError(f"validation.draws is {draws}; give a multiple of {BANDS}, as many for each quarter of the timesteps.")
    called = [one.caption for one in asked]
    captions = called + [regularisation.class_caption(words, trigger=trigger, class_word=class_word) for words in called]
    tokens = text.tokens(base, captions, chunks=max(chunks, text.chunk_count(base, captions)))
    with answering(base, strength=0.0):
        states = base_model.joined([cache.text_states(base, tokens[[row]], folder=None) for row in range(len(captions))])
    return Exam(tuple(asked), seed, draws, len(base.alphas), tokens, states, trains_text)


# --- at each look -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(base: Base, asked: Exam, *, batch: int) -> Scores:
    """Scores the adapters as they are; the base is left as it was found.

    Drift is Σ ‖LoRA's answer - base's answer‖² / Σ ‖base's answer‖² over every other pair of the pictures that are trained on, with
    captions without the trigger word.

    Args:
        batch: pairs per forward pass; of no influence on the numbers beyond rounding.
    """
    with answering(base):
        states = _states(base, asked, batch)
        errors = [_errors(base, asked, states, pairs) for pairs in _batches(asked, asked.pairs, batch)]
        moved = [_moved(base, asked, states, pairs) for pairs in _batches(asked, _drifting(asked), batch)]
    found = torch.cat([*errors, torch.stack(moved).sum(0)]).tolist()  # the one moment in which the GPU is waited for
    return _scores(asked, found[:-2], moved=found[-2], base=found[-1])


@torch.no_grad()
def losses_at_strengths(base: Base, asked: Exam, strengths: Sequence[float] = STRENGTHS, *, batch: int) -> tuple[tuple[float, float], ...]:
    """(strength, loss) of the held-out pictures, or if there are none of those that are trained on, with the adapters as they are."""
    held = any(one.held_out for one in asked.subjects)
    pairs = [pair for pair in asked.pairs if asked.subjects[pair.subject].held_out == held]
    found = []
    for strength in strengths:
        with answering(base, strength=strength):
            states = _states(base, asked, batch)
            found.append(torch.cat([_errors(base, asked, states, some) for some in _batches(asked, pairs, batch)]).mean())
    return tuple(zip(strengths, torch.stack(found).tolist(), strict=True))


@contextmanager
def answering(base: Base, *, strength: float = 1.0) -> Iterator[None]:
    """While it lasts the base answers without dropout, its adapters at a share of their strengths; then all is as it was."""
    training = bool(base.unet.training)
    before = [(voice, voice.strength) for voice in _voices(base)]
    base_model.set_training(base, False)
    for voice, own in before:
        voice.strength = own * strength
    try:
        yield
    finally:
        for voice, own in before:
            voice.strength = own
        base_model.set_training(base, training)


def _voices(base: Base) -> list[Adapter | Fixed]:
    return [voice for part in base.parts.values() for layer in lora.layers(part).values() for voice in layer.voices()]


def _states(base: Base, asked: Exam, batch: int) -> TextStates:
    """What all texts say now."""
    if not asked.trains_text:
        return asked.states
    rows = range(len(asked.subjects) * 2)
    return base_model.joined([text.encode(base, asked.tokens[rows[start : start + batch]]) for start in rows[::batch]])


def _batches(asked: Exam, pairs: Sequence[Pair], batch: int) -> Iterator[list[Pair]]:
    """Pairs of one size, in their order, at most so many at a time."""
    for _, group in groupby(pairs, key=lambda pair: asked.subjects[pair.subject].seen.mean.shape):
        members = list(group)
        yield from (members[start : start + batch] for start in range(0, len(members), batch))


def _drifting(asked: Exam) -> list[Pair]:
    return [pair for pair in asked.pairs if pair.draw % 2 == 0 and not asked.subjects[pair.subject].held_out]


def noisy(base: Base, asked: Exam, pairs: Sequence[Pair]) -> Noisy:
    """What the UNet is shown for some pairs of one size: the latents' mean with the pair's own noise."""
    shown, alphas = [asked.subjects[pair.subject] for pair in pairs], base.alphas
    seen = [one.seen.to(base.device) for one in shown]
    clean = torch.stack([one.mean for one in seen])
    drawn = torch.stack([
        torch.randn(one.seen.mean.shape, generator=devices.generator(asked.seed, one.key, pair.draw, 37))
        for one, pair in zip(shown, pairs, strict=True)
    ]).to(base.device)  # fmt: skip
    timesteps = torch.tensor([pair.timestep for pair in pairs]).to(base.device)
    wanted = noise.target(clean, drawn, alphas, timesteps, prediction=base.prediction)
    sizes = torch.tensor([one.sizes for one in shown], dtype=torch.float32)
    return Noisy(noise.add_noise(clean, drawn, alphas, timesteps), wanted, timesteps, sizes, latents.masks(seen))


def _errors(base: Base, asked: Exam, states: TextStates, pairs: Sequence[Pair]) -> Tensor:
    """The squared error of each pair [B], with the caption as it is."""
    shown = noisy(base, asked, pairs)
    answer = base_model.predict(base, shown.latents, shown.timesteps, states[[pair.subject for pair in pairs]], shown.sizes)
    return loss.squared_error(answer, shown.wanted, mask=shown.mask)


def _moved(base: Base, asked: Exam, states: TextStates, pairs: Sequence[Pair]) -> Tensor:
    """How far the LoRA moves the answers to captions without the trigger word, and what the base answers, both squared and summed [2]."""
    shown = noisy(base, asked, pairs)
    rows = [len(asked.subjects) + pair.subject for pair in pairs]
    answer = base_model.predict(base, shown.latents, shown.timesteps, states[rows], shown.sizes).float()
    with answering(base, strength=0.0):
        untouched = base_model.predict(base, shown.latents, shown.timesteps, asked.states[rows], shown.sizes).float()
    return torch.stack([(answer - untouched).square().sum(), untouched.square().sum()])


def _scores(asked: Exam, errors: Sequence[float], *, moved: float, base: float) -> Scores:
    told = [(pair, asked.subjects[pair.subject].held_out, error) for pair, error in zip(asked.pairs, errors, strict=True)]
    held, seen = ([error for _, out, error in told if out == wanted] for wanted in (True, False))
    quarters = [[error for pair, out, error in told if out == bool(held) and pair.draw * BANDS // asked.draws == i] for i in range(BANDS)]
    return Scores(fmean(held) if held else None, fmean(seen), tuple(map(fmean, quarters)), moved / base)
