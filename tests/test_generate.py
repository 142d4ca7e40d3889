"""Pictures: the same as plain diffusers draws, exact at strength 0, and LoRAs that fit or say why not."""

from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdlora import base_files, base_model, files, generate, lora, lora_file
from sdlora.base_model import Base
from sdlora.deltas import LowRank, Update
from sdlora.errors import UserError
from sdlora.generate import LoRA, Request

REQUEST = Request("a red star on a blue background", negative="a cup", seed=3, steps=4, guidance=3.0)


def opened(folder: Path) -> Base:
    return base_files.load(str(folder), device=torch.device("cpu"), dtype=torch.float32)


def draw(base: Base, request: Request = REQUEST) -> Image.Image:
    ((_, image),) = generate.pictures(base, request)
    return image


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


@pytest.fixture(scope="session")
def lora_path(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA over the UNet's and the text encoder's attention with random weights."""
    base, generator = opened(tiny_base), torch.Generator().manual_seed(0)
    modules = {}
    for stem, (part, name) in base_model.stems(base).items():
        if "attn" in name:
            shape = lora.base_weight(base.parts[part].get_submodule(name)).shape
            down, up = torch.randn(2, shape[1], generator=generator), torch.randn(shape[0], 2, generator=generator)
            modules[stem] = Update(LowRank(down, up, 0.5))
    path = tmp_path_factory.mktemp("loras") / "wild.safetensors"
    files.write(path, lora_file.to_bytes(modules, {}, family="sd1"))
    return path


def plain_pipeline(folder: Path) -> diffusers.StableDiffusionPipeline:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_picture(pipeline: diffusers.StableDiffusionPipeline, base: Base, request: Request) -> Image.Image:
    pipeline.scheduler = generate.scheduler(base, request.sampler)
    return pipeline(
        request.prompt, negative_prompt=request.negative, num_inference_steps=request.steps, guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]  # fmt: skip


@pytest.mark.parametrize("sampler", [name for name in generate.SAMPLERS if name != "Euler a"])
def test_the_base_draws_what_plain_diffusers_draws(tiny_base: Path, sampler: str) -> None:
    base = opened(tiny_base)
    request = Request(REQUEST.prompt, negative="a cup", seed=3, steps=4, guidance=3.0, sampler=sampler)
    assert difference(draw(base, request), plain_picture(plain_pipeline(tiny_base), base, request)) <= 2


def test_our_file_in_plain_diffusers_with_peft_gives_the_same_picture(tiny_base: Path, lora_path: Path) -> None:
    base = opened(tiny_base)
    without = draw(base)
    generate.set_loras(base, [LoRA(lora_path, 1.0)])
    ours = draw(base)
    pipeline = plain_pipeline(tiny_base)
    pipeline.load_lora_weights(lora_path.parent, weight_name=lora_path.name)
    assert difference(ours, plain_picture(pipeline, base, REQUEST)) <= 2
    assert difference(ours, without) > 20


def test_strength_zero_is_the_bases_exact_picture_and_nothing_is_loaded_twice(
    tiny_base: Path, lora_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = opened(tiny_base)
    without = draw(base)
    generate.set_loras(base, [LoRA(lora_path, 1.0)])
    full = draw(base)
    monkeypatch.setattr(lora_file, "read", lambda path: pytest.fail("read again"))
    generate.set_loras(base, [LoRA(lora_path, 0.0)])
    assert draw(base).tobytes() == without.tobytes()
    generate.set_loras(base, [LoRA(lora_path, 0.5)])
    assert difference(draw(base), full) > 0
    generate.set_loras(base, [LoRA(lora_path, 1.0)])
    assert draw(base).tobytes() == full.tobytes()
    generate.set_loras(base, [])
    assert draw(base).tobytes() == without.tobytes()


def test_a_file_that_is_written_anew_speaks_with_its_new_weights(tiny_base: Path, lora_path: Path, tmp_path: Path) -> None:
    base, path = opened(tiny_base), tmp_path / "a.safetensors"
    seen = []
    for scale in (1.0, 0.25):
        modules = {stem: Update(replace(one.change, up=one.change.up * scale)) for stem, one in lora_file.read(lora_path).modules.items()}
        files.write(path, lora_file.to_bytes(modules, {}, family="sd1"))
        generate.set_loras(base, [LoRA(path)])
        seen.append(draw(base).tobytes())
    assert seen[0] != seen[1]


def test_the_text_encoder_has_its_own_strength(tiny_base: Path, lora_path: Path) -> None:
    base = opened(tiny_base)
    seen = set()
    for text_strength in (None, 0.0, 2.0):
        generate.set_loras(base, [LoRA(lora_path, 0.5, text_strength)])
        seen.add(draw(base).tobytes())
    assert len(seen) == 3


def test_a_seed_means_the_same_picture_alone_and_in_a_row(tiny_base: Path) -> None:
    base = opened(tiny_base)
    row = list(generate.pictures(base, REQUEST, count=2))
    assert [request.seed for request, _ in row] == [3, 4]
    assert draw(base, row[1][0]).tobytes() == row[1][1].tobytes() != row[0][1].tobytes()


def test_settings_travel_in_the_picture(tiny_base: Path, lora_path: Path, tmp_path: Path) -> None:
    base = opened(tiny_base)
    settings = generate.settings_text(base, REQUEST, [LoRA(lora_path, 0.8)])
    (tmp_path / "x.png").write_bytes(generate.png_bytes(Image.new("RGB", (8, 8)), settings))
    with Image.open(tmp_path / "x.png") as image:
        lines = image.info["parameters"].split("\n")
    assert lines[0] == "a red star on a blue background <lora:wild:0.8>"
    assert lines[1] == "Negative prompt: a cup"
    assert lines[2].startswith("Steps: 4, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 3, Seed: 3, Size: 32x32, Model: pipeline")


def test_a_lora_that_does_not_fit_and_a_bad_size_get_one_sentence(tiny_base: Path, tmp_path: Path) -> None:
    base = opened(tiny_base)
    foreign = Update(LowRank(torch.zeros(2, 5), torch.zeros(5, 2), 2.0))
    fitting = next(stem for stem in base_model.stems(base) if stem.endswith("to_q"))
    for stem, sentence in (
        ("lora_unet_down_blocks_7_attentions_0_proj_in", "none of its 1 modules is there"),
        (fitting, r"is \[5, 5\] in the file"),
    ):
        path = tmp_path / "foreign.safetensors"
        files.write(path, lora_file.to_bytes({stem: foreign}, {}, family="sd1"))
        with pytest.raises(UserError, match=sentence):
            generate.set_loras(base, [LoRA(path)])
        assert lora.layers(base.unet) == {}
    with pytest.raises(UserError, match="multiples of 2 px, at least 4"):
        draw(base, Request("x", width_px=31))
    with pytest.raises(UserError, match="'Eular' is unknown"):
        draw(base, Request("x", sampler="Eular"))
