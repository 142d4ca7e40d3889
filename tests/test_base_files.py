"""Bases open alike from a folder and from one checkpoint, offline, and what each is can be told without opening it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from sdlora import base_files, base_model
from sdlora.base_model import Base
from tests import tiny_families
from tests.bases import CPU, FULL, Made, assert_same_weights, drawn, refusal, states

pytest_plugins = ("tests.base_fixtures",)


# --- single files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_a_single_file_draws_what_its_folder_draws_and_nobody_asks_the_network(family: str, made: Made, attempts: list[str]) -> None:
    folder, path = made(family)
    single = base_files.load(str(path), tokenizer=str(folder), **FULL)
    whole = base_files.load(str(folder), **FULL)
    assert_same_weights(single, whole)
    assert (single.family, single.prediction, single.clip_skip) == (whole.family, whole.prediction, whole.clip_skip)
    assert torch.equal(single.alphas, whole.alphas)
    assert single.scaling == whole.scaling
    assert [one.pad_token_id for one in single.tokenizers] == [one.pad_token_id for one in whole.tokenizers]
    assert drawn(single) == drawn(whole)
    assert attempts == []


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_single_file_means_what_diffusers_reads_in_it(family: str, made: Made, attempts: list[str]) -> None:
    folder, path = made(family)
    ours = base_files.load(str(path), tokenizer=str(folder), **FULL)
    pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    theirs = pipeline.from_single_file(str(path), config=str(folder), local_files_only=True)
    for name, weights in states(ours):
        expected = getattr(theirs, name).state_dict()
        assert expected.keys() == weights.keys(), name
        assert all(torch.equal(expected[key], weights[key]) for key in expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_come_frozen_in_the_number_format_asked_for_and_the_vae_in_fp32(dtype: torch.dtype, made: Made) -> None:
    folder, path = made("sdxl")
    for name in (folder, path):
        base = base_files.load(str(name), device=CPU, dtype=dtype, tokenizer=str(folder))
        assert {weight.dtype for part in base.parts.values() for weight in part.parameters()} == {dtype}
        assert {weight.dtype for weight in base.vae.parameters()} == {torch.float32}
        assert not any(weight.requires_grad or weight.is_meta for part in base.parts.values() for weight in part.parameters())
        assert not any(module.training for part in (base.vae, *base.parts.values()) for module in part.modules())


@pytest.mark.parametrize("form", [0, 1])
def test_changing_a_loaded_base_never_changes_its_file(form: int, made: Made) -> None:
    """Weights in the files' own number format may be the file's pages; folding a LoRA writes into them."""
    folder, _ = made("sd2")
    name = made("sd2")[form]
    weights = name if form else folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    base = base_files.load(str(name), tokenizer=str(folder), **FULL)
    with torch.no_grad():
        for part in (base.vae, *base.parts.values()):
            for weight in part.parameters():
                weight.add_(1)
    assert weights.read_bytes() == before


def test_old_names_in_checkpoints_are_understood(made: Made, tmp_path: Path) -> None:
    folder, path = made("sd1")
    bare = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in load_file(path).items()}
    save_file(bare, tmp_path / "old.safetensors")
    old = base_files.load(str(tmp_path / "old.safetensors"), tokenizer=str(folder), **FULL)
    assert_same_weights(old, base_files.load(str(folder), **FULL))


# --- which one it is ----------------------------------------------------------------------------------------------------------


def test_every_form_of_every_family_is_told_without_opening_it(made: Made) -> None:
    title = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sd2-v": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
    for family in tiny_families.FAMILIES:
        folder, path = made(family)
        for name, form in ((folder, "folder"), (path, "single file")):
            found = base_files.identify(str(name))
            assert (found.form, found.family) == (form, family.removesuffix("-v"))
            assert found.prediction == ("v_prediction" if family == "sd2-v" else "epsilon")
            assert found.sentence.startswith(f"{title[family]}, {found.prediction} (")
    mini = base_files.identify("mini")
    assert (mini.form, mini.family, mini.prediction) == ("embedded", "mini", "epsilon")


@pytest.mark.parametrize(
    ("family", "metadata", "extra", "expected"),
    [
        ("sd1", {}, [], "epsilon"),
        ("sdxl", {}, [], "epsilon"),
        ("sdxl", {}, ["v_pred", "ztsnr"], "v_prediction"),
        ("sdxl", {"modelspec.prediction_type": "v"}, [], "v_prediction"),
        ("sd2", {}, [], "unstated"),
        ("sd2", {"modelspec.prediction_type": "epsilon", "modelspec.architecture": "stable-diffusion-v2-768-v"}, [], "epsilon"),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}, [], "epsilon"),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, [], "v_prediction"),
    ],
)
def test_a_file_says_what_it_predicts_or_it_is_left_open(
    family: str, metadata: dict[str, str], extra: list[str], expected: str, made: Made, tmp_path: Path
) -> None:
    tensors = {key: torch.zeros(1) for key in load_file(made(family)[1])}
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(1, 4, 3, 3)
    path = tmp_path / "one.safetensors"
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()} | {key: torch.zeros(0) for key in extra},
        path,
        metadata=metadata or None,
    )
    assert base_files.identify(str(path)).prediction == expected
    said = base_files.identify(str(path), prediction="v_prediction")
    assert said.prediction == "v_prediction"
    assert "as you set it" in said.why


def test_a_set_prediction_and_a_schedule_without_signal_at_its_end_reach_the_base(made: Made, tmp_path: Path) -> None:
    folder, _ = made("sdxl")
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    path = tiny_families.make_single_file("sdxl", folder, tmp_path / "v.safetensors", extra=marks)
    base = base_files.load(str(path), tokenizer=str(folder), **FULL)
    assert (base.prediction, base.schedule["prediction_type"]) == ("v_prediction", "v_prediction")
    assert base.alphas[-1] == 0
    base = base_files.load(str(path), tokenizer=str(folder), prediction="epsilon", **FULL)
    assert (base.prediction, base.schedule["prediction_type"]) == ("epsilon", "epsilon")


def test_what_a_trained_base_predicts_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mini base answers with the noise; its answers turned into v = (ε - √(1 - ᾱ) x) / √ᾱ must not be taken for noise."""
    base = base_files.load("mini", **FULL)
    assert base_files.measured_prediction(base) == "epsilon"
    predict = base_model.predict

    def as_v(base: Base, noisy: torch.Tensor, timesteps: torch.Tensor, *rest: Any) -> torch.Tensor:
        signal = base.alphas[timesteps]
        return (predict(base, noisy, timesteps, *rest) - (1 - signal).sqrt() * noisy) / signal.sqrt()

    monkeypatch.setattr(base_model, "predict", as_v)
    assert base_files.measured_prediction(base) == "v_prediction"


def test_an_unstated_sd2_is_measured_on_opening_and_takes_the_size_that_goes_with_it(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = made("sd2")
    path = tiny_families.make_single_file("sd2", folder, tmp_path / "unstated.safetensors")
    base = base_files.load(str(path), tokenizer=str(folder), **FULL)
    assert (base.prediction, base.schedule["prediction_type"], base.resolution_px) == ("v_prediction", "v_prediction", 768)
    monkeypatch.setattr(base_model, "predict", lambda base, noisy, *rest: noisy)  # a model of noise, at its best
    base = base_files.load(str(path), tokenizer=str(folder), **FULL)
    assert (base.prediction, base.schedule["prediction_type"], base.resolution_px) == ("epsilon", "epsilon", 512)


def test_clip_skip_is_the_familys_own_unless_set(made: Made) -> None:
    skips = {family: base_files.load(str(made(family)[0]), **FULL).clip_skip for family in ("sd1", "sd2", "sdxl")}
    assert skips == {"sd1": 1, "sd2": 1, "sdxl": 2}
    assert base_files.load(str(made("sd1")[0]), clip_skip=3, **FULL).clip_skip == 3
    assert "Clip skip 4 is not one of the layers 1 (the last) to 3" in refusal(made("sd1")[0], clip_skip=4)
