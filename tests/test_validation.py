"""A look at held-out pictures: the same each time, true to an independent scheduler, and it leaves the base as it was."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from sdlora import adapters, base_files, base_model, cache, config, devices, lora, material, text, validation
from sdlora.base_model import Base
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.latents import Latents
from sdlora.material import Material
from sdlora.validation import Exam, Subject


@pytest.fixture(scope="module")
def run(tiny_base: Path, pictures: Path) -> Config:
    values = {"base": str(tiny_base), "data": str(pictures), "kind": "style", "trigger": "vitrail", "name": "tiny"}
    values |= {"validation": {"share": 0.4}, "lora": {"rank": 2, "alpha": 2.0, "text_encoder": True, "text_targets": "attn"}}
    return config.parse(values, where="test")


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)


def learned(base: Base, run: Config) -> Base:
    """The base with adapters that say something."""
    adapters.add_lora(base, run)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in adapters.parameters(base):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return base


def encoded(base: Base, run: Config, samples: tuple[Any, ...]) -> tuple[Material, list[tuple[Latents, ...]]]:
    data = material.material(run, samples, grain_px=base.grain_px, resolution_px=base.resolution_px)
    views = [view for item in data.items for view in item.views]
    return data, [(one,) for one in cache.latents(base, views, folder=None, background=(255, 255, 255))]


def all_subjects(base: Base, run: Config) -> tuple[Subject, ...]:
    found = material.find(run)
    out = validation.subjects(*encoded(base, run, found.held_out), most=8, held_out=True)
    return (*out, *validation.subjects(*encoded(base, run, found.samples), most=len(out), held_out=False))


def strengths(part: torch.nn.Module) -> set[float]:
    return {voice.strength for layer in lora.layers(part).values() for voice in layer.voices()}


def exam(base: Base, asked: Sequence[Subject], **changes: Any) -> Exam:
    options = {"seed": 0, "draws": 8, "trigger": "vitrail", "class_word": "", "trains_text": True} | changes
    return validation.exam(base, asked, **options)


def test_equally_many_pictures_of_both_kinds_are_scored_and_none_is_both(base: Base, run: Config) -> None:
    asked = all_subjects(base, run)
    assert [one.held_out for one in asked] == [True, True, False, False]
    assert len({one.key for one in asked}) == 4
    assert all(one.caption.startswith("vitrail, a") for one in asked)


def test_a_picture_seen_at_two_sizes_or_mirrored_is_scored_once_and_regularisation_never(base: Base, run: Config) -> None:
    twice = run.model_copy(update={"resolution_px": [32, 64]})
    samples = material.find(run).samples
    data, seen = encoded(base, twice, samples)
    assert len(data.items) == 2 * len(samples)
    asked = validation.subjects(data, seen, most=100, held_out=False)
    assert len(asked) == len(samples)
    assert {tuple(one.seen.mean.shape) for one in asked} == {tuple(seen[0][0].mean.shape)}
    assert validation.subjects(data, seen, most=100, held_out=False, without={0}) == ()


def test_each_picture_keeps_its_timesteps_whoever_else_is_scored(base: Base, run: Config) -> None:
    asked = all_subjects(base, run)
    of_all, alone = exam(base, asked), exam(base, asked[2:3])
    assert [pair.timestep for pair in of_all.pairs if pair.subject == 2] == [pair.timestep for pair in alone.pairs]
    assert torch.equal(
        validation.noisy(base, of_all, [pair for pair in of_all.pairs if pair.subject == 2]).latents,
        validation.noisy(base, alone, alone.pairs).latents,
    )
    for i in range(len(asked)):
        quarters = [pair.timestep * 4 // 1000 for pair in of_all.pairs if pair.subject == i]
        assert quarters == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [pair.timestep for pair in exam(base, asked, seed=1).pairs] != [pair.timestep for pair in of_all.pairs]


def test_before_the_first_step_nothing_has_drifted_and_the_base_is_scored(base: Base, run: Config) -> None:
    asked = all_subjects(base, run)
    plain = validation.score(base, exam(base, asked), batch=4)
    adapters.add_lora(base, run)
    fresh = validation.score(base, exam(base, asked), batch=4)
    assert fresh.drift == 0
    assert fresh == plain


def test_two_looks_are_equal_and_leave_dropout_strengths_and_gradients_as_they_were(base: Base, run: Config) -> None:
    lively = run.model_copy(update={"lora": run.lora.model_copy(update={"rank_dropout": 0.5, "module_dropout": 0.3})})
    asked = exam(learned(base, lively), all_subjects(base, run))
    base_model.set_training(base, True)
    lora.set_strength(base.text_encoders[0], 0.5)
    before, chance = [weight.clone() for weight in adapters.parameters(base)], torch.get_rng_state()
    first, second = (validation.score(base, asked, batch=4) for _ in range(2))
    assert first == second
    assert first.drift > 1e-3
    assert all(module.training for part in base.parts.values() for module in part.modules())
    strengths = {
        part: {voice.strength for layer in lora.layers(one).values() for voice in layer.voices()} for part, one in base.parts.items()
    }
    assert strengths == {"unet": {1.0}, "text_encoder": {0.5}}
    assert all(torch.equal(*pair) for pair in zip(before, adapters.parameters(base), strict=True))
    assert torch.equal(chance, torch.get_rng_state())


def test_all_is_as_it_was_even_if_a_look_fails(base: Base, run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = exam(learned(base, run), all_subjects(base, run))
    base_model.set_training(base, True)
    monkeypatch.setattr(base_model, "predict", lambda *values: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        validation.losses_at_strengths(base, asked, (0.5,), batch=4)
    assert base.unet.training
    assert strengths(base.unet) == {1.0}


def test_the_batch_does_not_change_the_numbers(base: Base, run: Config) -> None:
    asked = exam(learned(base, run), all_subjects(base, run))
    alone, together = (validation.score(base, asked, batch=size) for size in (1, 32))
    for name in ("loss", "seen_loss", "bands", "drift"):
        assert getattr(alone, name) == pytest.approx(getattr(together, name), rel=1e-5)


def test_pictures_of_several_sizes_are_scored_together(base: Base, run: Config) -> None:
    asked = all_subjects(base, run)
    wide = [replace(one, seen=Latents(one.seen.mean[:, :8], one.seen.deviation[:, :8])) for one in asked[::2]]
    mixed = validation.score(learned(base, run), exam(base, [wide[0], asked[1], wide[1], asked[3]]), batch=64)
    parts = [validation.score(base, exam(base, [one, wide[1]]), batch=1).loss for one in (wide[0], asked[1])]
    assert mixed.loss == pytest.approx(sum(one for one in parts if one) / 2, rel=1e-5)


@pytest.mark.parametrize("trains_text", [True, False])
def test_texts_are_encoded_anew_only_if_their_encoder_is_trained(base: Base, run: Config, trains_text: bool) -> None:
    asked = exam(base, all_subjects(base, run), trains_text=trains_text)
    before = validation.score(base, asked, batch=8)
    learned(base, run)
    lora.set_strength(base.unet, 0.0)  # only the text encoder has learned
    after = validation.score(base, asked, batch=8)
    assert (after == before) == (not trains_text)
    assert (after.drift > 0) == trains_text


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_that_of_an_independent_scheduler(base: Base, run: Config, prediction: str) -> None:
    learned(base, run).prediction = prediction
    asked = exam(base, all_subjects(base, run))
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction)
    base_model.set_training(base, False)
    errors: dict[bool, list[tuple[int, float]]] = {True: [], False: []}
    for pair in asked.pairs:
        one, when = asked.subjects[pair.subject], torch.tensor([pair.timestep])
        clean = one.seen.mean[None]
        drawn = torch.randn(clean.shape, generator=devices.generator(0, one.key, pair.draw, 37))
        with torch.no_grad():
            states = text.encode(base, text.tokens(base, [one.caption]))
            answer = base.unet(scheduler.add_noise(clean, drawn, when), when, states.context).sample
        wanted = {"epsilon": drawn, "v_prediction": scheduler.get_velocity(clean, drawn, when), "sample": clean}[prediction]
        errors[one.held_out].append((pair.timestep // 250, ((answer - wanted) ** 2).mean().item()))
    found = validation.score(base, asked, batch=16)
    means = {out: sum(error for _, error in some) / len(some) for out, some in errors.items()}
    assert (found.loss, found.seen_loss) == (pytest.approx(means[True], rel=1e-5), pytest.approx(means[False], rel=1e-5))
    for i, band in enumerate(found.bands):
        here = [error for quarter, error in errors[True] if quarter == i]
        assert band == pytest.approx(sum(here) / len(here), rel=1e-5)


def test_drift_is_the_moved_share_of_the_answers_to_captions_without_the_trigger(base: Base, run: Config) -> None:
    asked = exam(learned(base, run), all_subjects(base, run), class_word="window")
    base_model.set_training(base, False)
    moved = untouched = 0.0
    for pair in asked.pairs:
        one = asked.subjects[pair.subject]
        if one.held_out or pair.draw % 2:
            continue
        said, answers = text.tokens(base, [one.caption.replace("vitrail", "window")]), []
        for strength in (1.0, 0.0):
            for part in base.parts.values():
                lora.set_strength(part, strength)
            with torch.no_grad():
                noisy = validation.noisy(base, asked, [pair])
                answers.append(base_model.predict(base, noisy.latents, noisy.timesteps, text.encode(base, said)))
        for part in base.parts.values():
            lora.set_strength(part, 1.0)
        moved += ((answers[0] - answers[1]) ** 2).sum().item()
        untouched += (answers[1] ** 2).sum().item()
    assert validation.score(base, asked, batch=3).drift == pytest.approx(moved / untouched, rel=1e-4)


def test_without_held_out_pictures_there_is_no_loss_but_all_else(base: Base, run: Config) -> None:
    seen = [one for one in all_subjects(base, run) if not one.held_out]
    found = validation.score(learned(base, run), exam(base, seen), batch=8)
    assert found.loss is None
    assert found.seen_loss == pytest.approx(sum(found.bands) / 4, rel=1e-6)
    found_at = dict(validation.losses_at_strengths(base, exam(base, seen), (0.0, 1.0), batch=8))
    assert found_at[1.0] == pytest.approx(found.seen_loss, rel=1e-5)


def test_strengths_are_scored_from_the_base_to_beyond_what_was_trained(base: Base, run: Config) -> None:
    asked = all_subjects(base, run)
    of_base = validation.score(base, exam(base, asked), batch=8).loss
    fixed = exam(learned(base, run), asked)
    found = dict(validation.losses_at_strengths(base, fixed, (0.0, 0.5, 1.0, 1.2), batch=8))
    assert found[0.0] == pytest.approx(of_base, rel=1e-5)
    assert found[1.0] == pytest.approx(validation.score(base, fixed, batch=8).loss, rel=1e-5)
    assert len(set(found.values())) == 4


def test_a_mask_says_where_the_error_counts(base: Base, run: Config) -> None:
    one = all_subjects(learned(base, run), run)[2]
    mask = torch.zeros(one.seen.mean.shape[1:])
    mask[:4] = 1
    masked = replace(one, seen=replace(one.seen, mask=mask))
    asked = exam(base, [masked])
    noisy = validation.noisy(base, asked, asked.pairs)
    with torch.no_grad(), validation.answering(base):
        states = text.encode(base, text.tokens(base, [one.caption] * 8))
        errors = (base_model.predict(base, noisy.latents, noisy.timesteps, states) - noisy.wanted) ** 2
    assert validation.score(base, asked, batch=8).seen_loss == pytest.approx(errors[:, :, :4].mean().item(), rel=1e-5)


@pytest.mark.parametrize("draws", [0, 2, 6])
def test_as_many_pairs_for_each_quarter_of_the_timesteps(base: Base, run: Config, draws: int) -> None:
    with pytest.raises(UserError, match=rf"validation.draws is {draws}; give a multiple of 4"):
        exam(base, all_subjects(base, run), draws=draws)
