"""The judge of looks is right on true drawings and not fooled; batches draw what single requests draw; the command writes figures."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from sdlora import base_files, base_model, files, generate, lora, lora_file
from sdlora.deltas import LowRank, Update
from sdlora.errors import UserError
from sdlora.generate import Request
from sdlora.mini import evaluate, lead, world

COMBINATIONS = world.held_out_prompts(50, seed=5)
GREY = Image.new("RGB", (64, 64), (128, 128, 128))


def drawings(style: str, *, blur: float = 0.0) -> list[Image.Image]:
    rng = np.random.default_rng(17)
    scenes = [world.scene(*one, rng=rng, size_word="") for one in COMBINATIONS]
    return [world.draw(one, style=style).filter(ImageFilter.GaussianBlur(blur)) for one in scenes]


@pytest.fixture(scope="session")
def style_lora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA over the UNet's attention with random weights and a trigger word."""
    base, generator, modules = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32), torch.Generator(), {}
    for stem, (part, name) in base_model.stems(base).items():
        if part == "unet" and "attn" in name:
            width, depth = lora.base_weight(base.parts[part].get_submodule(name)).shape[:2]
            down, up = (torch.randn(*shape, generator=generator) for shape in ((2, depth), (width, 2)))
            modules[stem] = Update(LowRank(down, up, 0.5))
    path = tmp_path_factory.mktemp("loras") / "wild.safetensors"
    files.write(path, lora_file.to_bytes(modules, {"modelspec.trigger_phrase": "glass"}, family="mini"))
    return path


@pytest.mark.parametrize("blur", [0.0, 0.7, 1.3])
def test_true_drawings_of_both_looks_are_told_apart(blur: float) -> None:
    assert evaluate.style_share(drawings(lead.STYLE, blur=blur), COMBINATIONS) >= 0.98
    assert evaluate.style_share(drawings("plain", blur=blur), COMBINATIONS) <= 0.02


def test_the_look_is_told_at_other_sizes_too() -> None:
    large = [picture.resize((128, 128), Image.Resampling.BICUBIC) for picture in drawings(lead.STYLE)]
    assert evaluate.style_share(large, COMBINATIONS) >= 0.98


def test_darkness_smears_and_noise_are_not_the_style() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8))
    fooling = {
        "grey": GREY, "ink": Image.new("RGB", (64, 64), world.INK), "noise": noise, "soft noise": noise.filter(ImageFilter.GaussianBlur(1)),
        "smear": Image.fromarray(np.linspace(30, 220, 64 * 64).reshape(64, 64).astype(np.uint8)).convert("RGB"),
    }  # fmt: skip
    for name, picture in fooling.items():
        assert evaluate.style_share([picture] * len(COMBINATIONS), COMBINATIONS) == 0, name
    dark = [picture.point(lambda value: value // 3) for picture in drawings("plain")]
    noisy = [Image.fromarray((np.asarray(one) + rng.normal(0, 20, (64, 64, 3))).clip(0, 255).astype(np.uint8)) for one in drawings("plain")]
    for pictures in (dark, noisy):
        assert evaluate.style_share(pictures, COMBINATIONS) <= 0.02


def test_a_dark_frame_and_an_outline_alone_are_not_the_style() -> None:
    rng, half_done = np.random.default_rng(17), []
    for one in COMBINATIONS:
        scene = world.scene(*one, rng=rng, size_word="")
        large = world.draw(scene, width_px=256)
        pen, parts = ImageDraw.Draw(large), world._placed(scene.things[0], 256)
        for _, points in parts:
            world._stroke(pen, points, 16)
        for tone, points in parts:
            world._fill(pen, points, world._tone(tone, world.COLOURS[one[1]]))
        small = large.resize((64, 64), Image.Resampling.BOX)
        half_done.append(ImageOps.expand(small.crop((3, 3, 61, 61)), 3, world.INK))
    assert evaluate.style_share(half_done, COMBINATIONS) <= 0.1


def test_a_report_counts_what_the_style_has_changed() -> None:
    report = evaluate.style_report(drawings("plain")[:20], [*drawings(lead.STYLE)[:10], *[GREY] * 10], COMBINATIONS[:20])
    assert (report.style_with, report.style_without) == (0.5, 0.0)
    assert report.scores_without.all_three >= 0.95
    assert report.scores_with.kind <= 0.6
    assert report.fall_points["kind"] == pytest.approx(100 * (report.scores_without.kind - report.scores_with.kind), abs=0.05)


def test_the_character_is_called_alone_and_in_company() -> None:
    chosen = [("star", "red", "blue"), ("cup", "orange", "olive")]
    assert evaluate.pip_prompts(chosen, company=False) == ["pip on a blue background", "pip on an olive background"]
    assert evaluate.pip_prompts(chosen, company=True)[1] == "pip and an orange cup on an olive background"


def test_a_batch_draws_what_single_requests_draw(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "BATCH", 3)
    base = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    prompts = [evaluate.prompt_of(one) for one in COMBINATIONS[:5]]
    together = list(evaluate.draw(base, prompts, Request("", negative="a cup", seed=11, steps=4)))
    assert len(together) == 5
    for i, prompt in enumerate(prompts):
        ((_, alone),) = generate.pictures(base, Request(prompt, negative="a cup", seed=11 + i, steps=4))
        assert np.abs(np.asarray(together[i]).astype(int) - np.asarray(alone)).max() <= 1
    assert together[0].tobytes() != together[1].tobytes()


@pytest.mark.parametrize("measure", ["base", "style", "character"])
def test_the_command_writes_figures_and_a_sheet(
    measure: str, tiny_base: Path, style_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, sheet = tmp_path / "new" / "figures.json", tmp_path / "sheet.png"
    where = ["--base", str(tiny_base), "--lora", str(style_lora), "--sheet", str(sheet), "--json", str(figures)]
    assert evaluate.main([measure, *where, "--count", "5", "--steps", "2", "--seed", "3"]) == 0
    found = json.loads(figures.read_text())
    assert found["pictures"] == 5
    assert found["settings"]["seed"] == 3
    names = {
        "base": ["scores"], "style": ["style_with", "style_without", "scores_with", "scores_without"],
        "character": ["shown_when_called", "absent_when_not_called"],
    }  # fmt: skip
    shares = [found[name] for name in names[measure]]
    every = [share for one in shares for share in (one.values() if isinstance(one, dict) else [one])]
    assert all(0 <= share <= 1 for share in every)
    assert f"{every[0]:.1%}" in capsys.readouterr().out
    with Image.open(sheet) as image:
        assert image.width > 4 * 64


def test_the_trigger_word_is_only_used_with_the_lora(tiny_base: Path, style_lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(evaluate, "drawn", lambda base, prompts, settings, name: asked.append(prompts) or [GREY] * len(prompts))
    base = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    evaluate.measure_style(base, [generate.LoRA(style_lora)], Request(""), 2)
    assert asked[1] == [f"glass, {prompt}" for prompt in asked[0]]


def test_mistakes_get_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["base", "--base", str(tmp_path)]) == 2
    assert "is unknown" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["style"])
    assert "needs --lora" in capsys.readouterr().err
    for count in (0, 9999):
        with pytest.raises(UserError, match="give --count from 1 to"):
            evaluate.held_out(count, seed=0)


def test_a_perfect_base_scores_near_one() -> None:
    assert min(asdict(evaluate.scores(drawings("plain"), COMBINATIONS)).values()) >= 0.95
