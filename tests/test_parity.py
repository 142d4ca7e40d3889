"""A training step against one put together from others' parts: diffusers' noise and UNet, transformers' text, PEFT's LoRA, torch's AdamW.

Both sides are given the same clean latents, noise and timesteps, listened to where our step makes its noisy latents; all that follows is
computed twice, to 1e-6 in fp32. Single formulas, the weightings at ten timesteps among them, are in test_loss, test_noise and test_lora.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from sdlora import events, lora, lora_file, lora_names, noise, train
from sdlora.base_model import Base
from sdlora.config import Config
from sdlora.config_tables import ObjectiveConfig
from sdlora.prepare import Prepared
from tests.test_train import run_config

Weights = dict[str, dict[str, tuple[Tensor, Tensor]]]  # A and B by part of the base and name of the module

PREDICTIONS = ("epsilon", "v_prediction", "sample")
WEIGHTINGS = ("none", "min_snr", "soft_min_snr", "debiased")
FORMS: dict[str, dict[str, Any]] = {
    "mse": {}, "l1": {}, "huber, snr": {"huber_schedule": "snr"}, "huber, exponential": {"huber_schedule": "exponential"},
    "huber, constant": {"huber_schedule": "constant"},
}  # fmt: skip
DELTA = 0.1


# --- ours, listened to --------------------------------------------------------------------------------------------------------


@dataclass
class Fed:
    """What one forward pass of ours was given: the pictures' names, clean latents, noise, the noise that went in, timesteps."""

    pictures: tuple[str, ...]
    clean: Tensor | None = None
    drawn: Tensor | None = None
    put_in: Tensor | None = None
    timesteps: Tensor | None = None


@dataclass
class Listened:
    """A run's batches, its settings and what its steps need, and its adapters before the first step, at which they speak already."""

    fed: list[Fed]
    run: Config | None = None
    ready: Prepared | None = None
    start: Weights | None = None


def weights(base: Base) -> Weights:
    """Copies of all adapters' A and B."""
    return {
        part: {name: (one.down.detach().clone(), one.up.detach().clone()) for name, one in adapters_of(module)}
        for part, module in base.parts.items()
    }


def speaking(base: Base) -> Base:
    """The base with B drawn at random: fresh zeros would give A gradients of Adam's ε, where rounding becomes direction."""
    generator = torch.Generator().manual_seed(0)
    for module in base.parts.values():
        for _, one in adapters_of(module):
            nn.init.normal_(one.up, std=0.1, generator=generator)
    return base


def adapters_of(module: nn.Module) -> list[tuple[str, lora.Adapter]]:
    return [(name, next(layer.each_adapter())) for name, layer in lora.layers(module).items()]


def listen(patch: pytest.MonkeyPatch) -> Listened:
    """From now on every batch that is gathered is written down with what it is fed."""
    heard, gather, add_noise, target = Listened([]), train.gather, noise.add_noise, noise.target

    def gathered(run: Config, ready: Prepared, **which: Any) -> train.Batch:
        heard.run, heard.ready = run, ready
        heard.start = heard.start or weights(speaking(ready.base))
        batch = gather(run, ready, **which)
        heard.fed.append(Fed(batch.pictures))
        return batch

    def noised(clean: Tensor, put_in: Tensor, alphas: Tensor, timesteps: Tensor) -> Tensor:
        heard.fed[-1].clean, heard.fed[-1].put_in, heard.fed[-1].timesteps = clean.clone(), put_in.clone(), timesteps.clone()
        return add_noise(clean, put_in, alphas, timesteps)

    def wanted(clean: Tensor, drawn: Tensor, *rest: Tensor, **which: Any) -> Tensor:
        heard.fed[-1].drawn = drawn.clone()
        return target(clean, drawn, *rest, **which)

    for place, name, heard_by in ((train, "gather", gathered), (noise, "add_noise", noised), (noise, "target", wanted)):
        patch.setattr(place, name, heard_by)
    return heard


def run_of(tiny: Path, pictures: Path, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "steps": 3, "save_every": 0, "sample_every": 0, "captions": {"dropout": 0.0}, "min_snr_gamma": 5.0, "output": {"dtype": "fp32"},
        "lora": {"rank": 2, "alpha": 3.0, "targets": "attn"}, "optimizer": {"schedule": "constant", "warmup": 0.0},
    }  # fmt: skip
    return run_config(tiny, pictures, **values | changes)


# --- theirs -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The same base as diffusers and transformers open it, with PEFT's adapters, and a scheduler."""

    unet: Any
    text: Any
    tokenizer: Any
    scheduler: diffusers.DDPMScheduler
    captions: Path

    def loss(self, fed: Fed, *, form: str, weighting: str) -> Tensor:
        """The loss of one batch []."""
        assert fed.clean is not None
        t, prediction = fed.timesteps, self.scheduler.config.prediction_type
        noisy = self.scheduler.add_noise(fed.clean, fed.put_in, t)
        velocity = self.scheduler.get_velocity(fed.clean, fed.drawn, t)
        wanted = {"epsilon": fed.drawn, "v_prediction": velocity, "sample": fed.clean}[prediction]
        said = ["vitrail, " + (self.captions / name).with_suffix(".txt").read_text() for name in fed.pictures]
        ids = self.tokenizer(said, padding="max_length", max_length=77, return_tensors="pt").input_ids
        predicted = self.unet(noisy, t, encoder_hidden_states=self.text(ids).last_hidden_state).sample
        error = ERRORS[form.partition(",")[0]](predicted, wanted, self.delta(form, t).view(-1, 1, 1, 1))
        return (error.mean((1, 2, 3)) * weight(weighting, compute_snr(self.scheduler, t), prediction)).mean()

    def delta(self, form: str, t: Any) -> Tensor:
        """Where the Huber loss turns, as sd-scripts schedules it."""
        sigma = (1 / self.scheduler.alphas_cumprod[t] - 1).sqrt()
        schedules = {
            "exponential": DELTA ** (t / 1000),
            "snr": (1 - DELTA) / (1 + sigma) ** 2 + DELTA,
            "constant": torch.full(t.shape, DELTA),
        }
        return schedules[form.rpartition(" ")[2] if "huber" in form else "constant"]


ERRORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mse": lambda one, other, delta: F.mse_loss(one, other, reduction="none"),
    "l1": lambda one, other, delta: (one - other).abs(),
    "huber": lambda one, other, delta: 2 * delta * (((one - other) ** 2 + delta**2).sqrt() - delta),
}


def weight(weighting: str, ratio: Tensor, prediction: str, gamma: float = 5.0) -> Tensor:
    """The papers' weights on the error of x_0, over what an error of the prediction is of that."""
    on_clean = {
        "none": {"epsilon": ratio, "v_prediction": ratio + 1, "sample": torch.ones_like(ratio)}[prediction],  # 1 on what is predicted
        "min_snr": torch.minimum(ratio, torch.tensor(gamma)), "soft_min_snr": 1 / (1 / ratio + 1 / gamma), "debiased": ratio.sqrt(),
    }  # fmt: skip
    return on_clean[weighting] / {"epsilon": ratio, "v_prediction": ratio + 1, "sample": 1}[prediction]


def reference(tiny: Path, pictures: Path, run: Config, adapters: Weights) -> Reference:
    """Theirs with our adapters' numbers."""
    scheduler = diffusers.DDPMScheduler.from_pretrained(tiny, subfolder="scheduler", prediction_type=run.prediction)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    scheduler.alphas_cumprod = torch.tensor(np.cumprod(1 - betas)).float()  # its own product in fp32 is off by up to 1e-5
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny, subfolder="unet", torch_dtype=torch.float32)
    text = transformers.CLIPTextModel.from_pretrained(tiny / "text_encoder", dtype=torch.float32)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny / "tokenizer")
    for module, part in ((unet, adapters["unet"]), (text, adapters["text_encoder"])):
        module.requires_grad_(False)
        if part:
            peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(part), init_lora_weights=False), module)
        for name, (down, up) in part.items():
            module.get_submodule(name).lora_A["default"].weight.data.copy_(down)
            module.get_submodule(name).lora_B["default"].weight.data.copy_(up)
    return Reference(unet, text, tokenizer, scheduler, pictures)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [one for one in module.parameters() if one.requires_grad]


def stepped(theirs: Reference, fed: list[Fed], run: Config) -> list[float]:
    """All steps of a run, with torch's own AdamW and clipping; the loss of each."""
    how, losses = run.optimizer, []
    groups = [
        {"params": trained(theirs.unet), "lr": how.learning_rate},
        {"params": trained(theirs.text), "lr": how.text_encoder_learning_rate},
    ]
    mover = torch.optim.AdamW([one for one in groups if one["params"]], weight_decay=how.weight_decay)
    for first in range(0, len(fed), how.accumulation):
        batches, total = fed[first : first + how.accumulation], 0.0
        for one in batches:
            part = theirs.loss(one, form=run.objective.loss, weighting=run.objective.weighting) / len(batches)
            part.backward()
            total += part.item()
        nn.utils.clip_grad_norm_([*trained(theirs.unet), *trained(theirs.text)], how.clip_norm)
        mover.step()
        mover.zero_grad()
        losses.append(total)
    return losses


# --- both ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_losses_and_weights_of_three_steps_are_those_of_the_others_parts(
    tiny_base: Path, pictures: Path, tmp_path: Path, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UNet and text encoder learn at rates of their own from two batches per step, five pictures in batches of 2, 2 and 1, clipped."""
    heard = listen(monkeypatch)
    how = {"schedule": "constant", "warmup": 0.0, "accumulation": 2, "clip_norm": 0.02, "weight_decay": 0.1, "learning_rate": 1e-4}
    strange = {"noise_offset": 0.1, "pyramid_discount": 0.3, "input_perturbation": 0.1}
    run = run_of(tiny_base, pictures, kind="character", prediction=prediction, optimizer=how, objective=strange)
    told = list(train.train(run, tmp_path / "run"))
    assert [len(one.pictures) for one in heard.fed[:3]].count(1) == 1, "an epoch of five pictures has one batch of one"
    assert heard.run is not None
    assert heard.start is not None
    theirs = reference(tiny_base, pictures, heard.run, heard.start)
    losses = stepped(theirs, heard.fed, heard.run)
    assert [one.loss for one in told if isinstance(one, events.Step)] == pytest.approx(losses, rel=1e-6, abs=1e-6)
    file = lora_file.read(tmp_path / "run/tiny.safetensors")
    assert len(file.modules) == 7 * 8 + 2 * 4
    for part, module in (("unet", theirs.unet), ("text_encoder", theirs.text)):
        for name, (down, up) in heard.start[part].items():
            change, other = file.modules[lora_names.stem_of(part, name)].change, module.get_submodule(name)
            for before, ours, layer in ((down, change.down, other.lora_A), (up, change.up, other.lora_B)):
                wanted = layer["default"].weight.detach()
                torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)
                assert (ours - wanted).norm() <= 1e-3 * (wanted - before).norm(), "of what was learned, too"


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_form_of_the_loss_with_each_weighting_is_that_of_the_others_parts(
    tiny_base: Path, pictures: Path, tmp_path: Path, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five forms and four weightings for each of two batches."""
    heard = listen(monkeypatch)
    list(train.train(run_of(tiny_base, pictures, prediction=prediction), tmp_path / "run"))
    plain, ready = heard.run, heard.ready
    assert plain is not None
    assert ready is not None
    base, theirs, found = ready.base, reference(tiny_base, pictures, plain, weights(ready.base)), set()
    for form, schedule in FORMS.items():
        for weighting in WEIGHTINGS:
            objective = ObjectiveConfig(loss=form.partition(",")[0], weighting=weighting, huber_delta=DELTA, **schedule)
            run = plain.model_copy(update={"objective": objective})
            ours = []
            for batch_index in range(2):
                with torch.no_grad():
                    batch = train.gather(run, ready, batch_index=batch_index)
                    ours.append(train.loss_of_batch(base, batch, base.alphas, run=run, batch_index=batch_index).item())
                    other = theirs.loss(heard.fed[-1], form=form, weighting=weighting).item()
                assert ours[-1] == pytest.approx(other, rel=1e-6, abs=1e-6), (form, weighting, batch_index)
            found.add(tuple(round(one, 5) for one in ours))
    assert len(found) == len(FORMS) * len(WEIGHTINGS), "every choice is another loss"
