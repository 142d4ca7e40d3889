"""What a run trains on: folders as they lie, views of one size, captions by the rules, held-out pictures, prior preservation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdlora import base_files, cache, config, events, generate, latents, lora_file, material, regularisation, text, train
from sdlora.errors import UserError
from sdlora.material import Material
from tests.test_train import run_config


def data_of(run: config.Config) -> Material:
    return material.material(run, material.find_or_refuse(run).samples, grain_px=8, resolution_px=32)


def put(folder: Path, name: str, caption: str, *, size: tuple[int, int] = (40, 40), mode: str = "RGB") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 80).convert(mode).save(path)
    path.with_suffix(".txt").write_text(caption)
    return path


def test_an_epoch_holds_every_picture_of_every_folder_at_every_resolution(tiny_base: Path, tmp_path: Path) -> None:
    put(tmp_path / "a", "1.png", "one")
    put(tmp_path / "a" / "3_pip dragon", "2.png", "two", size=(80, 40))
    put(tmp_path / "b", "3.png", "three", size=(40, 80))
    folders = [{"folder": str(tmp_path / "a")}, {"folder": str(tmp_path / "b"), "repeats": 2, "trigger": "other"}]
    run = run_config(tiny_base, tmp_path, data=folders, resolution_px=[64, 128], sizes={"step_px": 16}, captions={"dropout": 0.0})
    data = data_of(run)
    assert [(item.sample, item.repeats) for item in data.items] == [(0, 1), (1, 3), (2, 2)] * 2
    assert {item.shape_px for item in data.items if item.sample == 0} == {(64, 64), (128, 128)}
    heard = material.everything_said(data, batch=2, batches=material.batches_per_epoch(data, batch=2), seed=0)
    assert sorted(heard) == ["other, three", "vitrail, one", "vitrail, two"]


def test_views_are_chosen_anew_in_each_epoch_and_the_same_in_each_run(tiny_base: Path, tmp_path: Path) -> None:
    put(tmp_path, "1.png", "one", size=(90, 40))
    run = run_config(
        tiny_base, tmp_path, resolution_px=64, sizes={"step_px": 16, "crop": "random", "crops": 3, "flip": True, "most_aspect": 1.0}
    )
    data = data_of(run)
    (item,) = data.items
    assert len(item.views) == 6
    assert len({view.fit.left for view in item.views}) == 3
    shown = [
        [
            material.view_at(data, visit, seed=run.seed, epoch=epoch)
            for visit in material.batch_at(data, batch=1, seed=0, batch_index=epoch)[1]
        ]
        for epoch in range(40)
    ]
    assert {one for epoch in shown for one in epoch} == set(range(6))
    assert shown == [
        [
            material.view_at(data_of(run), visit, seed=run.seed, epoch=epoch)
            for visit in material.batch_at(data, batch=1, seed=0, batch_index=epoch)[1]
        ]
        for epoch in range(40)
    ]


def test_flips_crops_masks_and_changing_captions_train(tiny_base: Path, tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / "pictures", f"{i}.png", "red, star, blue, {big|small}", size=(60 + 20 * i, 50))
        Image.new("L", (60 + 20 * i, 50), 255 if i else 60).save(put(tmp_path / "masks", f"{i}.png", "x"))
    folder = {"folder": str(tmp_path / "pictures"), "masks": str(tmp_path / "masks")}
    sizes = {"step_px": 16, "flip": True, "crop": "random", "crops": 2}
    said = {"shuffle": True, "tag_dropout": 0.2, "wildcards": True}
    run = run_config(tiny_base, tmp_path, data=[folder], steps=4, sample_every=0, sizes=sizes, captions=said)
    files = []
    for name in ("a", "b"):
        *_, done = train.train(run, tmp_path / name)
        assert isinstance(done, events.Done)
        files.append(done.path.read_bytes())
    assert files[0] == files[1]


def test_the_loss_counts_only_where_the_mask_is_white_and_weighs_by_its_area() -> None:
    error = torch.zeros(2, 4, 8, 8)
    error[:, :, :, :4] = 3.0
    mask = torch.ones(2, 1, 8, 8)
    mask[0, :, :, 4:] = 0
    mask[1, :, :, :4] = 0
    from sdlora import loss

    assert loss.squared_error(error, torch.zeros_like(error), mask=mask).tolist() == [9.0, 0.0]
    assert loss.squared_error(error, torch.zeros_like(error)).tolist() == [4.5, 4.5]


def test_alpha_is_a_mask_when_asked_and_hidden_pixels_never_leak(tiny_base: Path, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 16, 32))
    picture.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("half")
    for alpha_masks in (True, False):
        run = run_config(
            tiny_base, tmp_path, data=[{"folder": str(tmp_path), "alpha_masks": alpha_masks}], resolution_px=64, sizes={"step_px": 16}
        )
        (item,) = data_of(run).items
        seen = latents.pixels(item.views[0], reduction=2, background=(0, 255, 0))
        assert seen.picture[0].max() < 0, "the hidden red is nowhere"
        if alpha_masks:
            assert seen.mask is not None
            assert seen.mask[:, :14].min() > 0.99
            assert seen.mask[:, 18:].max() < 0.01
        else:
            assert seen.mask is None


def test_held_out_pictures_are_not_trained_on(tiny_base: Path, tmp_path: Path) -> None:
    for i in range(6):
        put(tmp_path, f"{i}.png", "one")
    found = material.find(run_config(tiny_base, tmp_path, validation={"share": 0.3}))
    assert (len(found.samples), len(found.held_out)) == (4, 2)
    assert not {one.picture for one in found.samples} & {one.picture for one in found.held_out}


def test_a_dataset_toml_of_sd_scripts_is_read_where_a_folder_could_stand(tiny_base: Path, tmp_path: Path) -> None:
    put(tmp_path / "img", "1.png", "red, star")
    (tmp_path / "set.toml").write_text(
        """
        [general]
        shuffle_caption = true
        color_aug = true
        [[datasets]]
        resolution = 64
        batch_size = 3
        [[datasets.subsets]]
        image_dir = "img"
        num_repeats = 5
        """
    )
    values = {"base": str(tiny_base), "kind": "style", "name": "x", "data": str(tmp_path / "set.toml")}
    run = config.parse(values, where="test")
    assert (run.batch, run.resolution_px, run.captions.shuffle) == (3, 64, True)
    assert [(one.folder, one.repeats) for one in run.data] == [(tmp_path / "img", 5)]
    assert config.parse(values | {"batch": 2}, where="test").batch == 2, "what the run says counts"
    notes = [finding.what for finding in material.find(run).findings]
    assert any("color_aug" in what for what in notes)


def test_the_class_word_stands_where_the_trigger_word_stood() -> None:
    swap = regularisation.class_caption
    assert swap("pip, a blue pip on a hill", trigger="pip", class_word="dragon") == "dragon, a blue dragon on a hill"
    assert swap("pipe and PIP", trigger="pip", class_word="dragon") == "pipe and dragon"
    assert swap("pip, on a hill", trigger="pip", class_word="") == "on a hill"


def test_regularisation_pictures_are_drawn_by_the_base_from_the_captions_and_only_once(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(regularisation, "STEPS", 2)
    for i in range(2):
        put(tmp_path / "pictures", f"{i}.png", f"pip, number {i}")
    run = run_config(
        tiny_base, tmp_path / "pictures", trigger="pip", regularisation="auto", class_word="dragon", regularisation_weight=0.5, steps=1,
        sample_every=0, sizes={"step_px": 16}, resolution_px=64,
    )  # fmt: skip
    told = list(train.train(run, tmp_path / "a"))
    assert [(one.done, one.total) for one in told if isinstance(one, events.Drawing)] == [(1, 2), (2, 2)]
    assert sum(isinstance(one, events.Encoding) for one in told) == 4
    drawn = sorted((tmp_path / "cache" / cache.DRAWN).glob("*.png"))
    with Image.open(drawn[0]) as picture:
        assert picture.size == (64, 64)
        assert picture.info["parameters"].startswith("dragon, number ")
    monkeypatch.setattr(generate, "pictures", lambda *_, **__: pytest.fail("drawn again"))
    list(train.train(run, tmp_path / "b"))


def test_prior_prediction_holds_the_base_to_its_own_answer(tiny_base: Path, tmp_path: Path) -> None:
    put(tmp_path / "pictures", "0.png", "pip, a star")
    drift = []
    for name, changes in (("with", {"regularisation": "prediction", "class_word": "cup", "regularisation_weight": 20.0}), ("without", {})):
        run = run_config(
            tiny_base, tmp_path / "pictures", trigger="pip", kind="character", steps=30, sample_every=0, captions={"dropout": 0.0},
            optimizer={"learning_rate": 0.02, "text_encoder_learning_rate": 0.02}, min_snr_gamma=0.0, **changes,
        )  # fmt: skip
        *_, done = train.train(run, tmp_path / name)
        assert isinstance(done, events.Done)
        base = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
        before = answer(base)
        generate.set_loras(base, [generate.LoRA(done.path)])
        drift.append((answer(base) - before).square().mean().item())
    assert drift[0] < 0.5 * drift[1], drift


@torch.no_grad()
def answer(base: Any) -> torch.Tensor:
    """What the UNet says of fixed noise at several timesteps when it hears the class caption."""
    from sdlora import base_model

    noisy = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    states = text.encode(base, text.tokens(base, ["cup, a star"] * 4))
    return base_model.predict(base, noisy, torch.tensor([100, 300, 600, 900]), states)


def test_regularisation_needs_the_class_word(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="regularisation needs class_word"):
        run_config(tiny_base, tmp_path, regularisation="auto")


def test_a_folder_of_regularisation_pictures_gets_no_trigger_and_its_own_weight(tiny_base: Path, tmp_path: Path) -> None:
    put(tmp_path / "own", "0.png", "a star")
    put(tmp_path / "class", "1.png", "a cup")
    folders = [{"folder": str(tmp_path / "own")}, {"folder": str(tmp_path / "class"), "regularisation": True, "weight": 0.25}]
    data = data_of(run_config(tiny_base, tmp_path, data=folders, captions={"dropout": 0.0}, resolution_px=64, sizes={"step_px": 16}))
    assert [material.plain_caption(data.rules, sample) for sample in data.samples] == ["vitrail, a star", "a cup"]
    assert [data.weights[sample.source] for sample in data.samples] == [1.0, 0.25]


def test_a_warm_cache_needs_no_autoencoder(tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path / "cache"))
    run = run_config(tiny_base, pictures, steps=1, sample_every=0)
    (first, second) = (list(train.train(run, tmp_path / "cold")), None)
    opened = []
    honest = base_files.base_sources.base_parts.filled
    monkeypatch.setattr(
        base_files.base_sources.base_parts,
        "filled",
        lambda module, *rest, **more: opened.append(type(module).__name__) or honest(module, *rest, **more),
    )
    second = list(train.train(run, tmp_path / "warm"))
    assert "AutoencoderKL" not in opened
    assert [type(one) for one in second] == [type(one) for one in first]
    files = [lora_file.read(tmp_path / name / "tiny.safetensors").modules for name in ("cold", "warm")]
    for stem, update in files[0].items():
        assert torch.equal(update.change.up, files[1][stem].change.up)
