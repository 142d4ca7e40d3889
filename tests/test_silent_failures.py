"""What other trainers get wrong without a word, one test each that shows ours is right."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdlora import (
    adapters,
    base_files,
    buckets,
    cache,
    captions,
    config,
    data_folders,
    dataset,
    images,
    latents,
    lora,
    material,
    train,
    views,
)
from sdlora.captions import CaptionRules
from sdlora.errors import UserError
from tests import tiny_families
from tests.test_cache import WHITE, noisy, view_of
from tests.test_train import run_config


def with_caption(folder: Path, name: str, caption: str | None, *, ending: str = ".txt") -> Path:
    folder.mkdir(exist_ok=True)
    path = noisy(folder / f"{name}.png")
    if caption is not None:
        path.with_suffix(ending).write_text(caption)
    return path


def test_forty_pictures_are_forty_pictures_in_every_epoch() -> None:
    for epoch in range(5):
        batches = dataset.epoch_batches(["a"] * 40, [1] * 40, batch=3, seed=0, epoch=epoch)
        for processes in (1, 8):
            shares = [dataset.share(batch, process=i, processes=processes) for batch in batches for i in range(processes)]
            assert Counter(visit.sample for part in shares for visit in part) == Counter(range(40))


def test_caption_shuffles_and_flips_do_not_repeat_from_batch_to_batch() -> None:
    rules = CaptionRules(shuffle=True)
    tags = "a, b, c, d, e, f, g, h"
    orders = [captions.caption_at([tags], rules, seed=0, epoch=epoch, index=index) for epoch in range(4) for index in range(40)]
    assert len(set(orders)) > 150, "160 visits, 40,320 orders"
    view = views.View(Path("a.png"), (64, 64), buckets.fit((64, 64), (64, 64)))
    item = views.Item(0, 1, (view, view))
    flips = [views.chosen(item, dataset.Visit(sample, 0), seed=0, epoch=0) for sample in range(64)]
    assert len({tuple(flips[i : i + 8]) for i in range(0, 64, 8)}) == 8


def test_no_validation_picture_is_trained_on(tmp_path: Path) -> None:
    keys = [f"{i:064x}" for i in range(40)]
    kept, out = dataset.split(keys, share=0.2)
    assert (len(kept), len(out), set(kept) & set(out)) == (32, 8, set())
    assert dataset.split(keys, share=0.2) == (kept, out), "without any seed"


def test_latents_of_another_size_are_not_taken_from_the_cache(tiny_base: Path, tmp_path: Path) -> None:
    base = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    path = noisy(tmp_path / "a.png", size=(128, 128))
    shapes = [
        one.mean.shape[-1]
        for size in (32, 64)
        for one in cache.latents(base, [view_of(path, (size, size))], folder=tmp_path / "cache", background=WHITE)
    ]
    assert shapes == [16, 32]


def test_an_edited_picture_and_an_edited_caption_are_never_stale(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path / "cache"))
    picture = with_caption(tmp_path / "data", "a", "a cup")
    made = []
    for change in (lambda: None, lambda: noisy(picture, 7), lambda: picture.with_suffix(".txt").write_text("a red star")):
        change()
        run = run_config(tiny_base, tmp_path / "data", steps=1, sample_every=0)
        list(train.train(run, tmp_path / f"run{len(made)}"))
        made.append((tmp_path / f"run{len(made)}" / "tiny.safetensors").read_bytes()[-4096:])
    assert len(set(made)) == 3


def test_a_latent_that_is_not_finite_stops_the_run_naming_the_picture_and_is_not_kept(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path / "cache"))
    with_caption(tmp_path / "data", "bad", "a cup")
    monkeypatch.setattr(latents.base_model, "encode", lambda base, pixels: (torch.full((1, 4, 16, 16), float("nan")),) * 2)
    with pytest.raises(UserError, match=r"bad\.png gives latents that are not finite"):
        list(train.train(run_config(tiny_base, tmp_path / "data", sample_every=0), tmp_path / "run"))
    assert cache.info(tmp_path / "cache").entries == 0


def test_an_unknown_key_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"unknown key 'captions\.shufle'; the nearest valid key is 'shuffle'"):
        config.parse({"base": "mini", "data": "x", "kind": "style", "name": "x", "captions": {"shufle": True}}, where="test")


def test_a_caption_does_not_end_at_its_first_line(tmp_path: Path) -> None:
    path = with_caption(tmp_path, "a", "a red star\non a blue\n\nbackground\n").with_suffix(".txt")
    assert captions.read_caption_file(path) == ("a red star on a blue background",)


def test_an_empty_caption_is_named_before_training(tiny_base: Path, tmp_path: Path) -> None:
    with_caption(tmp_path / "data", "a", "  \n")
    with pytest.raises(UserError, match=r"a\.png: The picture's caption is empty"):
        list(train.train(run_config(tiny_base, tmp_path / "data"), tmp_path / "run"))


@pytest.mark.parametrize("ending", [".txt", ".caption"])
def test_captions_are_found_whatever_tool_wrote_them(tmp_path: Path, ending: str) -> None:
    with_caption(tmp_path / "data", "a", "a cup", ending=ending)
    assert [sample.caption for sample in data_folders.scan(tmp_path / "data").samples] == ["a cup"]


def test_hidden_pixels_of_transparent_pictures_do_not_leak(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.save(tmp_path / "a.png")
    assert images.open_picture(tmp_path / "a.png", background=(0, 0, 255)).image.getcolors() == [(64, (0, 0, 255))]


def test_a_small_mask_weighs_no_less_than_a_large_one() -> None:
    from sdlora import loss

    error = torch.full((2, 4, 8, 8), 2.0)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :2, :2] = 1
    mask[1] = 1
    assert loss.squared_error(error, torch.zeros_like(error), mask=mask).tolist() == [4.0, 4.0]


def test_sdxls_two_text_encoders_have_a_rate_each_and_no_rate_is_lost(tmp_path: Path) -> None:
    folder = tiny_families.make_folder("sdxl", tmp_path / "xl")
    values = {
        "base": str(folder),
        "data": str(tmp_path),
        "kind": "character",
        "name": "x",
        "lora": {"rank": 2, "text_encoder": True, "text_targets": "attn"},
    }
    values["optimizer"] = {"learning_rate": 1e-4, "text_encoder_learning_rate": 2e-5, "text_encoder_2_learning_rate": 3e-5}
    run = config.parse(values, where="test")
    base = base_files.load(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    adapters.add_lora(base, run)
    rates = {id(weight): rate for weights, rate in adapters.groups(base, run) for weight in weights}
    for part, rate in (("unet", 1e-4), ("text_encoder", 2e-5), ("text_encoder_2", 3e-5)):
        assert {rates[id(weight)] for weight in lora.parameters(base.parts[part])} == {rate}
    assert len(rates) == len(adapters.parameters(base))


def test_long_pictures_keep_the_area_of_their_resolution() -> None:
    for size in ((4000, 1000), (1000, 4000), (3000, 2000)):
        width, height = buckets.choose(size, buckets.table(side_px=1024, most_aspect=4.0))
        assert width * height == pytest.approx(1024**2, rel=0.05)


def test_the_default_scale_is_one_and_the_default_rate_learns() -> None:
    run = config.parse({"base": "mini", "data": "x", "kind": "style", "name": "x"}, where="test")
    assert run.lora.alpha / run.lora.rank == 1
    assert run.optimizer.learning_rate >= 1e-4


def test_gradients_are_clipped_and_lora_weights_are_fp32(
    tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    honest = torch.nn.utils.clip_grad_norm_

    def clipping(weights: Any, most: float, *rest: Any, **more: Any) -> torch.Tensor:
        weights = list(weights)
        before = honest(weights, most, *rest, **more)
        norms.append(torch.stack([weight.grad.square().sum() for weight in weights]).sum().sqrt().item())
        assert {weight.dtype for weight in weights} == {torch.float32}
        return before

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipping)
    run = run_config(tiny_base, pictures, steps=3, sample_every=0, optimizer={"clip_norm": 1e-3})
    list(train.train(run, tmp_path / "run"))
    assert len(norms) == 3
    assert max(norms) <= 1.001e-3


def test_a_trained_text_encoder_really_moves(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    from sdlora import lora_file

    run = run_config(tiny_base, pictures, kind="character", steps=2, sample_every=0)
    list(train.train(run, tmp_path / "run"))
    modules = lora_file.read(tmp_path / "run/tiny.safetensors").modules
    moved = [update.change.up.abs().max().item() for stem, update in modules.items() if stem.startswith("lora_te1_")]
    assert len(moved) == 8
    assert min(moved) > 0


def test_repeats_are_what_the_folders_name_says(tmp_path: Path, tiny_base: Path) -> None:
    with_caption(tmp_path, "0", "one")
    with_caption(tmp_path / "4_pip dragon", "1", None)
    data = material.material(
        run_config(tiny_base, tmp_path), material.find_or_refuse(run_config(tiny_base, tmp_path)).samples, grain_px=4, resolution_px=32
    )
    assert [(sample.caption, item.repeats) for sample, item in zip(data.samples, data.items, strict=True)] == [
        ("one", 1),
        ("pip dragon", 4),
    ]
