"""Pictures: the same as plain diffusers draws, exact at strength 0, and LoRAs that fit or say why not."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdlora import base_files, base_model, devices, files, generate, images, lora, lora_file, picture_settings, png_settings, samplers
from sdlora.base_model import Base
from sdlora.deltas import LowRank, Update
from sdlora.errors import UserError
from sdlora.generate import LoRA, Moment, Request, Source
from sdlora.prompts import Tag

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


def plain_picture(pipeline: Any, base: Base, request: Request, **more: Any) -> Image.Image:
    """What diffusers draws from the same noise; the noise between the steps comes from the same generator as ours."""
    pipeline.scheduler = generate.scheduler(base, request.sampler, request.schedule)
    return pipeline(
        request.prompt, negative_prompt=request.negative, num_inference_steps=request.steps, guidance_scale=request.guidance,
        generator=devices.generator(request.seed, 17), **more,
    ).images[0]  # fmt: skip


def noise(request: Request, side: int = 16) -> torch.Tensor:
    return torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(request.seed))


@pytest.mark.parametrize(
    ("sampler", "schedule"), [(name, kind) for name in generate.SAMPLERS for kind in samplers.schedules_of(name)]
)  # fmt: skip
def test_the_base_draws_what_plain_diffusers_draws(tiny_base: Path, sampler: str, schedule: str) -> None:
    base = opened(tiny_base)
    request = replace(REQUEST, sampler=sampler, schedule=schedule)
    assert difference(draw(base, request), plain_picture(plain_pipeline(tiny_base), base, request, latents=noise(request))) <= 2


@pytest.mark.parametrize("sampler", generate.SAMPLERS)
def test_a_seed_fixes_the_noise_between_the_steps_too(tiny_base: Path, sampler: str) -> None:
    base = opened(tiny_base)
    torch.manual_seed(1)
    first = draw(base, replace(REQUEST, sampler=sampler))
    torch.manual_seed(2)
    assert draw(base, replace(REQUEST, sampler=sampler)).tobytes() == first.tobytes()
    assert difference(draw(base, replace(REQUEST, sampler=sampler, seed=4)), first) > 20


@pytest.mark.parametrize(("sampler", "schedule"), [("DPM++ 2M Karras", "Automatic"), ("dpm++ 2m", "karras")])
def test_a_sampler_may_be_called_as_older_tools_call_it(tiny_base: Path, sampler: str, schedule: str) -> None:
    base = opened(tiny_base)
    asked = draw(base, replace(REQUEST, sampler=sampler, schedule=schedule))
    assert asked.tobytes() == draw(base, replace(REQUEST, sampler="DPM++ 2M", schedule="Karras")).tobytes()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"schedule": "Karras", "sampler": "DDIM"},
            "Sampler DDIM cannot be drawn with schedule type Karras; choose one of Automatic, SGM Unif",
        ),
        ({"schedule": "Beta"}, "Schedule type 'Beta' is unknown; there are Automatic, Karras"),
        ({"sampler": "LCM", "steps": 51}, "Steps 51 cannot be drawn with sampler LCM; choose from 1 to 50"),
        ({"steps": 0}, "choose from 1 to 1000"),
        ({"hires_scale": 9.0}, "cannot enlarge 9 times; choose from 1 to 4"),
        ({"hires_scale": 2.0, "hires_denoise": 0.1}, "Denoising strength 0.1 of 4 steps leaves no step; choose up to 1, and at least 0.25"),
        ({"clip_skip": 7}, "Clip skip 7 is not one of the layers 1"),
    ],
)
def test_what_cannot_be_drawn_gets_one_sentence(tiny_base: Path, changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        draw(opened(tiny_base), replace(REQUEST, **changed))


def photo(side: int = 32) -> Image.Image:
    """A picture that nobody drew."""
    return images.to_image(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(5))).resize((side, side), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("sampler", generate.SAMPLERS)
def test_img2img_is_that_of_diffusers(tiny_base: Path, sampler: str) -> None:
    base = opened(tiny_base)
    request = replace(REQUEST, sampler=sampler, steps=6, denoise=0.55)
    ((_, ours),) = generate.pictures(base, request, source=Source(photo()))
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**plain_pipeline(tiny_base).components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    clean, _ = base_model.encode(base, images.to_tensor(photo())[None])
    first = noise(request)
    with pytest.MonkeyPatch.context() as patch:  # the pipeline draws its first noise from the generator that we keep for the steps
        patch.setattr(sys.modules[type(pipeline).__module__], "randn_tensor", lambda shape, **_: first)
        theirs = plain_picture(pipeline, base, request, image=clean, strength=0.55)
    assert difference(ours, theirs) <= 2
    assert difference(ours, photo()) > 20


def test_img2img_keeps_more_of_the_picture_the_less_is_drawn_anew(tiny_base: Path) -> None:
    base = opened(tiny_base)
    seen = {}
    for share in (0.1, 1.0):
        ((_, image),) = generate.pictures(base, replace(REQUEST, steps=20, denoise=share, sampler="Euler"), source=Source(photo()))
        seen[share] = image
    again = images.to_image(base_model.decode(base, base_model.encode(base, images.to_tensor(photo())[None])[0])[0])
    assert difference(seen[0.1], again) < difference(seen[1.0], again)


@pytest.mark.parametrize("sampler", generate.SAMPLERS)
def test_inpainting_draws_only_inside_the_mask(tiny_base: Path, sampler: str) -> None:
    base, mask = opened(tiny_base), Image.new("L", (32, 32))
    mask.paste(255, (9, 5, 21, 18))
    request = replace(REQUEST, sampler=sampler, denoise=1.0)
    ((_, image),) = generate.pictures(base, request, source=Source(photo(), mask))
    changed = np.abs(np.asarray(image).astype(int) - np.asarray(photo())).max(axis=2)
    inside = np.asarray(mask) > 0
    assert changed[~inside].max() == 0
    assert (changed[inside] > 8).mean() > 0.5


def test_inpainting_knows_what_is_around_the_mask(tiny_base: Path) -> None:
    """The latents outside of the mask are put back at every step: with a mask over all it is img2img, with none the picture itself."""
    base = opened(tiny_base)
    request = replace(REQUEST, denoise=0.5, sampler="Euler")
    ((_, plain),) = generate.pictures(base, request, source=Source(photo()))
    ((_, all_over),) = generate.pictures(base, request, source=Source(photo(), Image.new("L", (32, 32), 255)))
    ((_, nowhere),) = generate.pictures(base, request, source=Source(photo(), Image.new("L", (32, 32))))
    assert all_over.tobytes() == plain.tobytes()
    assert nowhere.tobytes() == photo().tobytes()


def test_a_source_of_another_shape_is_drawn_in_its_own(tiny_base: Path) -> None:
    base = opened(tiny_base)
    ((_, image),) = generate.pictures(base, REQUEST, source=Source(photo().resize((400, 100))))
    assert image.size == (64, 16)
    ((_, image),) = generate.pictures(base, replace(REQUEST, width_px=48, height_px=32), source=Source(photo().resize((400, 100))))
    assert image.size == (48, 32)


def test_a_second_pass_enlarges_the_picture_and_keeps_what_it_shows(tiny_base: Path) -> None:
    base = opened(tiny_base)
    request = replace(REQUEST, hires_scale=1.5, hires_denoise=0.5)
    *moments, image = generate.drawing(base, request)
    assert isinstance(image, Image.Image)
    assert image.size == (48, 48)
    assert [moment.done for moment in moments if isinstance(moment, Moment)] == [1, 2, 3, 4, 5, 6]
    assert {moment.steps for moment in moments if isinstance(moment, Moment)} == {6} == {generate.step_count(base, request)}
    enlarged = draw(base).resize((48, 48), Image.Resampling.LANCZOS)
    ((_, expected),) = generate.pictures(base, replace(REQUEST, denoise=0.5, width_px=48, height_px=48), source=Source(enlarged))
    assert image.tobytes() == expected.tobytes()
    with pytest.raises(UserError, match="take the picture away"):
        list(generate.pictures(base, request, source=Source(photo())))


def test_weights_in_a_prompt_are_heard_when_it_is_read_as_one(tiny_base: Path) -> None:
    base = opened(tiny_base)
    loud = replace(REQUEST, prompt="a (red:1.8) star on a blue background")
    assert draw(base, replace(loud, weighted=True)).tobytes() != draw(base).tobytes()
    assert draw(base, replace(REQUEST, weighted=True)).tobytes() == draw(base).tobytes()
    marked = replace(REQUEST, prompt=r"a \(red\) star", weighted=True)
    assert draw(base, marked).tobytes() == draw(base, replace(REQUEST, prompt="a (red) star")).tobytes()


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "UniPC"])
def test_a_preview_ends_at_the_picture(tiny_base: Path, sampler: str) -> None:
    base = opened(tiny_base)
    *moments, image = generate.drawing(base, replace(REQUEST, sampler=sampler, steps=12))
    assert isinstance(image, Image.Image)
    guesses = [generate.preview(base, moment) for moment in moments if isinstance(moment, Moment)]
    errors = [np.abs(np.asarray(guess).astype(int) - np.asarray(image)).mean() for guess in guesses]
    assert errors[-1] < 3
    assert errors[-1] < errors[0]


def test_a_preview_without_the_autoencoder_has_a_pixel_for_each_latent(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = opened(tiny_base)
    monkeypatch.setattr(generate, "CHEAP", 0)
    monkeypatch.setattr(base_model, "decode", lambda *_: pytest.fail("decoded"))
    moment = next(iter(generate.drawing(base, REQUEST)))
    assert isinstance(moment, Moment)
    assert generate.preview(base, moment).size == (16, 16)


def test_our_file_in_plain_diffusers_with_peft_gives_the_same_picture(tiny_base: Path, lora_path: Path) -> None:
    base = opened(tiny_base)
    without = draw(base)
    generate.set_loras(base, [LoRA(lora_path, 1.0)])
    ours = draw(base)
    pipeline = plain_pipeline(tiny_base)
    pipeline.load_lora_weights(lora_path.parent, weight_name=lora_path.name)
    assert difference(ours, plain_picture(pipeline, base, REQUEST, latents=noise(REQUEST))) <= 2
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


def test_a_picture_is_drawn_again_bit_for_bit_from_what_it_says(tiny_base: Path, lora_path: Path, tmp_path: Path) -> None:
    """Settings, LoRAs and prompts are taken from the PNG alone."""
    odd = tmp_path / "a:b > c.safetensors"
    odd.write_bytes(lora_path.read_bytes())
    cases = [
        (replace(REQUEST, prompt="a (red:1.3) star\nBREAK [blue], <x", negative="(cup)", weighted=True), [LoRA(lora_path, 0.8)]),
        (replace(REQUEST, prompt="saber (fate), a<lora:b:1>"), [LoRA(lora_path, -0.1, 0.30000000000000004)]),
        (replace(REQUEST, sampler="Euler a", clip_skip=2, guidance=1.1, seed=4294967295), [LoRA(odd, 0.7), LoRA(lora_path, 1 / 3)]),
        (replace(REQUEST, sampler="DPM++ 2M SDE", schedule="Karras", hires_scale=1.5, hires_denoise=0.65), []),
        (replace(REQUEST, prompt="", steps=5), [LoRA(lora_path, 0.0, 1.0, course=((0.0, 0.2), (0.5, 1.0)))]),
        (replace(REQUEST, negative="", denoise=0.55, weighted=True, width_px=48, height_px=16), [LoRA(lora_path)]),
    ]
    for number, (request, loras) in enumerate(cases):
        base, source = opened(tiny_base), Source(photo()) if number == 5 else None
        generate.set_loras(base, loras)
        ((_, image),) = generate.pictures(base, request, loras=loras, source=source)
        path = tmp_path / "x.png"
        path.write_bytes(generate.png_bytes(image, generate.settings_text(base, request, loras, source)))
        with Image.open(path) as file:
            told = png_settings.read(file.info["parameters"])
        assert told is not None
        found = picture_settings.restored(told)
        assert (found.request.prompt, found.request.negative) == (request.prompt, request.negative)
        assert (found.missed, found.model) == ((), "pipeline")
        assert found.source == (source.fingerprint if source else "")
        by_name = {one.stem: one for one in (lora_path, odd)}
        again = [LoRA(by_name[tag.name], tag.strength, tag.text_strength, course=tag.course) for tag in found.tags]
        base = opened(tiny_base)
        generate.set_loras(base, again)
        ((_, second),) = generate.pictures(base, found.request, loras=again, source=source)
        assert second.tobytes() == image.tobytes(), number


def test_settings_of_other_tools_become_a_request() -> None:
    text = (
        "a (cat:1.2) <lora:wild:0.5:0.8> <hypernet:x:1>\nNegative prompt: grey\nSteps: 28, Sampler: DPM++ 2M, Schedule type: Automatic, "
        "CFG scale: 6.5, Seed: 12, Size: 512x768, Model: v1-5, Denoising strength: 0.35, Clip skip: 2, Hires upscale: 2, "
        "Hires upscaler: Latent, Version: v1.10.1"
    )
    told = png_settings.read(text)
    assert told is not None
    found = picture_settings.restored(told)
    assert found.request == Request(
        "a (cat:1.2)", "grey", 12, 28, 6.5, "DPM++ 2M", 512, 768, "Karras", 2, True, hires_scale=2.0, hires_denoise=0.35
    )
    assert (found.tags, found.model, found.missed) == ((Tag("wild", 0.8, 0.5),), "v1-5", ("<hypernet:x:1>",))
    older = png_settings.read("a cat\nSteps: 20, Sampler: DPM++ SDE Karras, CFG scale: 7, Seed: 1")
    assert older is not None
    assert picture_settings.restored(older).missed[0].startswith("Sampler 'DPM++ SDE' is unknown")


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
