"""The embedded base is a real Stable Diffusion: small, open to plain diffusers, understands what it was never shown, learns a style."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from sdlora import base_files, cli, demo, generate
from sdlora.base_model import Base
from sdlora.generate import LoRA, Request
from sdlora.mini import evaluate

STEPS = 300
REQUEST = Request("vitrail, a blue star on a yellow background", seed=4)


@pytest.fixture(scope="session")
def mini() -> Base:
    return base_files.load("mini", device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="session")
def style_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `sdlora demo` leaves, the whole main job, but after a third of its steps, as all of them take a sixth of all tests' time."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    short = demo.style_config().model_copy(update={"steps": STEPS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "style_config", lambda: short)
        cli.demo(folder)
    assert (folder / "sheet.png").stat().st_size > 10_000
    return folder / "vitrail-v1.safetensors"


def test_it_is_small() -> None:
    sizes = [path.stat().st_size for path in base_files.MINI.rglob("*") if path.is_file()]
    assert max(sizes) <= 16e6
    assert sum(sizes) <= 30e6


def test_plain_diffusers_opens_it_and_draws_the_same(mini: Base) -> None:
    assert difference(mini, pipeline()) <= 2


def test_it_understands_combinations_that_it_was_never_shown(mini: Base) -> None:
    scores = evaluate.measure_base(mini, [], Request("", seed=1), 30)[0].scores
    assert scores.background >= 0.9
    assert scores.colour >= 0.85
    assert scores.kind >= 0.8


@pytest.mark.slow
def test_the_demo_makes_a_style_that_was_not_there(mini: Base, style_lora: Path) -> None:
    asked = evaluate.held_out(25, seed=Request.seed)
    without, with_style = evaluate.style_pictures(mini, [LoRA(style_lora)], asked, Request(""))
    assert evaluate.style_share(with_style, asked) >= 0.4
    assert evaluate.style_share(without, asked) == 0


@pytest.mark.huge
def test_the_demo_as_it_stands_makes_nothing_but_the_style(mini: Base, tmp_path: Path) -> None:
    cli.demo(tmp_path / "run")
    assert evaluate.measure_style(mini, [LoRA(tmp_path / "run/vitrail-v1.safetensors")], Request(""), 25)[0].style_with >= 0.9


@pytest.mark.slow
def test_the_demos_file_gives_the_same_picture_in_plain_diffusers_with_peft(mini: Base, style_lora: Path) -> None:
    generate.set_loras(mini, [LoRA(style_lora)])
    plain = pipeline()
    plain.load_lora_weights(style_lora.parent, weight_name=style_lora.name)
    assert difference(mini, plain) <= 2
    generate.set_loras(mini, [])


def pipeline() -> diffusers.StableDiffusionPipeline:
    opened = diffusers.StableDiffusionPipeline.from_pretrained(
        base_files.MINI, dtype=torch.float32, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    opened.set_progress_bar_config(disable=True)
    return opened


def difference(base: Base, plain: diffusers.StableDiffusionPipeline) -> int:
    plain.scheduler = generate.scheduler(base, REQUEST.sampler)
    theirs = plain(
        REQUEST.prompt, negative_prompt="", num_inference_steps=REQUEST.steps, guidance_scale=REQUEST.guidance,
        generator=torch.Generator().manual_seed(REQUEST.seed),
    ).images[0]  # fmt: skip
    ((_, ours),) = generate.pictures(base, REQUEST)
    return int(np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max())
