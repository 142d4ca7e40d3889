"""A run on each family and with each variant of LoRA: what is written loads in diffusers with PEFT and says the same there."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from sdlora import base_files, base_model, config, events, generate, images, latents, lora, lora_file, run_folder, text, train
from sdlora.base_model import Base
from sdlora.generate import LoRA
from tests import tiny_families

PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random pipeline of each family."""
    folder = tmp_path_factory.mktemp("families")
    return {family: tiny_families.make_folder(family, folder / family) for family in PIPELINES}


@pytest.fixture(scope="session")
def two_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide and a tall picture."""
    folder = tmp_path_factory.mktemp("two")
    for i, size in enumerate(((160, 96), (96, 170))):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red star on a blue background")
    return folder


def opened(folder: Path) -> Base:
    return base_files.load(str(folder), device=torch.device("cpu"), dtype=torch.float32)


def run_of(base: Path, pictures: Path, **changes: Any) -> config.Config:
    values = {
        "base": str(base), "data": str(pictures), "kind": "character", "trigger": "pip", "name": "tiny", "steps": 2, "batch": 2,
        "sample_every": 0, "report": False, "validation": {"every": 0},
        "resolution_px": 128, "sizes": {"step_px": 32}, "cache": "memory", "min_snr_gamma": 0.0,
        "optimizer": {"learning_rate": 0.05, "text_encoder_learning_rate": 0.05, "warmup": 0.0},
        "lora": {"rank": 2, "alpha": 1.0, "targets": "attn-mlp-conv", "text_encoder": True},
    }  # fmt: skip
    return config.parse(values | changes, where="test")


def trained(base: Path, pictures: Path, folder: Path, **changes: Any) -> Path:
    """Trains and returns the LoRA file."""
    *_, done = train.train(run_of(base, pictures, **changes), folder)
    assert isinstance(done, events.Done)
    return done.path


def answers(base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """The text states of a prompt and the UNet's answer to fixed noise."""
    generator = torch.Generator().manual_seed(5)
    noisy = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        states = text.encode(base, text.tokens(base, ["a red star"]))
        return states.context, base_model.predict(base, noisy, torch.tensor([500]), states)


def loaded_elsewhere(folder: Path, family: str, file: Path) -> Base:
    """A base whose modules are those of a diffusers pipeline that has loaded the file through PEFT."""
    pipeline = getattr(diffusers, PIPELINES[family]).from_pretrained(folder, dtype=torch.float32)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2) if family == "sdxl" else (pipeline.text_encoder,)
    base = opened(folder)
    base.unet, base.text_encoders = pipeline.unet.eval(), tuple(encoder.eval() for encoder in encoders)
    return base


@pytest.mark.parametrize(("family", "layout"), [("sd1", "kohya"), ("sd2", "diffusers"), ("sdxl", "kohya"), ("sdxl", "diffusers")])
def test_a_trained_file_says_the_same_here_and_in_diffusers_with_peft(
    bases: dict[str, Path], two_pictures: Path, tmp_path: Path, family: str, layout: str
) -> None:
    file = trained(bases[family], two_pictures, tmp_path / "run", output={"format": layout, "dtype": "fp32"})
    ours = opened(bases[family])
    plain = answers(ours)
    generate.set_loras(ours, [LoRA(file)])
    mine, theirs = answers(ours), answers(loaded_elsewhere(bases[family], family, file))
    for before, here, there in zip(plain, mine, theirs, strict=True):
        torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
        assert (here - before).abs().max() > 1e-3  # it does something


def test_sd2s_attention_file_in_kohyas_layout_loads_in_diffusers_and_says_what_does_not(
    bases: dict[str, Path], two_pictures: Path, tmp_path: Path
) -> None:
    file = trained(
        bases["sd2"], two_pictures, tmp_path / "run", lora={"rank": 2, "alpha": 1.0, "targets": "attn"}, output={"dtype": "fp32"}
    )
    ours = opened(bases["sd2"])
    generate.set_loras(ours, [LoRA(file)])
    for here, there in zip(answers(ours), answers(loaded_elsewhere(bases["sd2"], "sd2", file)), strict=True):
        torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
    started = next(one for one in train.train(run_of(bases["sd2"], two_pictures), tmp_path / "more") if isinstance(one, events.Started))
    assert any("diffusers" in limit and "proj_in" in limit for limit in started.limits)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"rank_stabilised": True},
    "pissa": {"init": "pissa"},
    "dora": {"dora": True},
    "overrides": {
        "overrides": [{"pattern": "mid_block.*", "rank": 4, "alpha": 3.0, "learning_rate": 0.01}, {"pattern": "*.mlp.fc1", "rank": 1}]
    },
    "dropouts": {"rank_dropout": 0.3, "module_dropout": 0.3, "network_dropout": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_trained_is_what_the_file_says(bases: dict[str, Path], two_pictures: Path, tmp_path: Path, variant: str) -> None:
    run = run_of(
        bases["sd1"], two_pictures, lora={"rank": 2, "alpha": 1.0, "targets": "attn-mlp-conv"} | VARIANTS[variant], output={"dtype": "fp32"}
    )
    contents = []
    for name in ("a", "b"):
        list(train.train(run, tmp_path / name))
        contents.append(run_folder.result_path(tmp_path / name, "tiny").read_bytes())
    assert contents[0] == contents[1], "equal runs are equal bytes"
    again = opened(bases["sd1"])
    generate.set_loras(again, [LoRA(tmp_path / "a/tiny.safetensors")])
    unfolded = opened(bases["sd1"])
    generate.set_loras(unfolded, [LoRA(tmp_path / "a/tiny.safetensors")])
    for part in unfolded.parts.values():
        lora.unfold(part)
    for folded, beside in zip(answers(again), answers(unfolded), strict=True):
        torch.testing.assert_close(folded, beside, atol=1e-4, rtol=1e-4)


def test_training_goes_on_from_a_file(bases: dict[str, Path], two_pictures: Path, tmp_path: Path) -> None:
    first = trained(bases["sd1"], two_pictures, tmp_path / "first", output={"dtype": "fp32"})
    still = {"rank": 8, "alpha": 8.0, "targets": "attn-mlp-conv", "start_from": str(first)}
    second = trained(
        bases["sd1"], two_pictures, tmp_path / "second", lora=still, output={"dtype": "fp32"}, steps=1,
        optimizer={"learning_rate": 1e-9, "text_encoder_learning_rate": 0.0, "warmup": 0.0, "weight_decay": 0.0},
    )  # fmt: skip
    before, after = lora_file.read(first), lora_file.read(second)
    assert (after.ranks, after.alphas) == (before.ranks, before.alphas) == ([2], [1.0])
    for stem, update in before.modules.items():
        torch.testing.assert_close(after.modules[stem].change.up, update.change.up, atol=1e-6, rtol=1e-4)


def test_checkpointing_changes_memory_and_nothing_else(bases: dict[str, Path], two_pictures: Path, tmp_path: Path) -> None:
    dropped = {"rank": 2, "alpha": 1.0, "rank_dropout": 0.3, "network_dropout": 0.3}
    updates = []
    for name, checkpointing in (("with", True), ("without", False)):
        file = trained(
            bases["sd1"], two_pictures, tmp_path / name, gradient_checkpointing=checkpointing, lora=dropped, output={"dtype": "fp32"}
        )
        updates.append(lora_file.read(file).modules)
    for stem, update in updates[0].items():
        torch.testing.assert_close(update.change.up, updates[1][stem].change.up, atol=1e-6, rtol=1e-4)


def test_sdxl_hears_the_size_and_crop_that_were_really_taken(
    bases: dict[str, Path], two_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, seen = set(), []
    predict, pixels = base_model.predict, latents.pixels

    def listening(base: Base, noisy: torch.Tensor, timesteps: torch.Tensor, states: Any, sizes: torch.Tensor) -> torch.Tensor:
        heard.update(tuple(int(number) for number in row) for row in sizes)
        return predict(base, noisy, timesteps, states, sizes)

    def looking(*args: Any, **options: Any) -> latents.Pixels:
        seen.append(pixels(*args, **options))
        return seen[-1]

    monkeypatch.setattr(base_model, "predict", listening)
    monkeypatch.setattr(latents, "pixels", looking)
    trained(bases["sdxl"], two_pictures, tmp_path / "run", batch=1, sizes={"step_px": 32, "crop": "top"})
    assert heard == {(96, 160, 0, 0, 96, 160), (170, 96, 1, 0, 160, 96)}  # of the 10 rows that go, a tenth is cut at the top
    with Image.open(two_pictures / "1.png") as picture:
        tall = images.to_tensor(picture.crop((0, 1, 96, 161)))
    assert any(torch.equal(one.picture, tall) for one in seen), "the numbers are those of the crop"


def test_a_run_names_its_base_and_where_its_file_does_not_load(bases: dict[str, Path], two_pictures: Path, tmp_path: Path) -> None:
    run = run_of(bases["sdxl"], two_pictures, lora={"rank": 2, "alpha": 1.0, "dora": True})
    started = next(one for one in train.train(run, tmp_path / "run") if isinstance(one, events.Started))
    assert started.base == "Stable Diffusion XL, epsilon prediction"
    assert any(limit.startswith("DoRA") for limit in started.limits)


def test_sidecars_carry_the_trigger_word(bases: dict[str, Path], two_pictures: Path, tmp_path: Path) -> None:
    file = trained(bases["sd1"], two_pictures, tmp_path / "run", output={"sidecars": True}, sample_every=2, sample_prompts=["a cup"])
    told = json.loads(file.with_suffix(".json").read_text())
    assert (told["activation text"], told["sd version"]) == ("pip", "SD1")
    assert file.with_suffix(".png").read_bytes() == run_folder.newest_sample(file.parent).read_bytes()
