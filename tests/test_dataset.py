"""Pictures and captions as they lie on disk, and an order that leaves nothing out."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdlora import captions, dataset, images
from sdlora.errors import UserError


def put(folder: Path, name: str, caption: str | None = "a red star", *, image: Image.Image | None = None) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (20, 10), "red")).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def test_pictures_of_all_sub_folders_are_found_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "pip waves")
    put(tmp_path, "a/c.JPG", "\ufeffa star\nat night")
    samples = dataset.scan(tmp_path, trigger="pip", repeats=2)
    assert [(s.picture.name, s.caption, s.repeats) for s in samples] == [("c.JPG", "pip, a star at night", 2), ("b.png", "pip waves", 2)]


def test_the_trigger_word_is_added_only_where_it_is_missing_as_a_word() -> None:
    assert captions.with_trigger("a pipe on a table", "pip") == "pip, a pipe on a table"
    assert captions.with_trigger("Pip on a table", "pip") == "Pip on a table"
    assert captions.with_trigger("a table", "") == "a table"


def test_each_mistake_in_a_folder_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        dataset.scan(tmp_path / "none", trigger="")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match="holds no pictures"):
        dataset.scan(tmp_path, trigger="")
    path = put(tmp_path, "a.png", None)
    with pytest.raises(UserError, match=r"a\.png has no caption; .* a\.txt"):
        dataset.scan(tmp_path, trigger="")
    for content, sentence in ((b" \n", "is empty"), ("ä".encode("latin-1"), "is not UTF-8")):
        path.with_suffix(".txt").write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            dataset.scan(tmp_path, trigger="")


@pytest.mark.parametrize("content", [b"not a picture", b""], ids=["text", "empty"])
def test_an_unreadable_picture_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        images.open_upright(path)


def test_a_truncated_picture_is_named(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path = put(tmp_path, "a.jpg", image=noise)
    path.write_bytes(path.read_bytes()[:-800])
    with pytest.raises(UserError, match=r"a\.jpg cannot be read"):
        images.open_upright(path)


def test_pictures_are_turned_upright_and_hidden_pixels_do_not_leak(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to see it upright"
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert images.open_upright(tmp_path / "turned.jpg").size == (10, 20)
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert images.open_upright(put(tmp_path, "hidden.png", image=hidden)).getpixel((0, 0)) == (255, 255, 255)
    assert images.square(Image.new("RGB", (30, 10)), 16).size == (16, 16)


def test_pixels_survive_the_way_to_a_tensor_and_back() -> None:
    image = Image.fromarray(np.arange(256 * 3, dtype=np.uint32).reshape(16, 16, 3).astype(np.uint8))
    tensor = images.to_tensor(image)
    assert (tensor.shape, tensor.min().item(), tensor.max().item()) == (torch.Size([3, 16, 16]), -1, 1)
    assert images.to_image(tensor).tobytes() == image.tobytes()


@given(repeats=st.lists(st.integers(1, 4), min_size=1, max_size=12), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_each_epoch_holds_each_sample_exactly_repeats_times(repeats: list[int], batch: int, seed: int) -> None:
    samples = [dataset.Sample(Path(f"{i}.png"), "x", count) for i, count in enumerate(repeats)]
    length = sum(repeats)
    batches = [dataset.batch_at(samples, seed=seed, batch_index=i, batch=batch) for i in range(-(-3 * length // batch))]
    seen = [index for one in batches for index in one]
    for epoch in range(3):
        assert Counter(seen[epoch * length : (epoch + 1) * length]) == dict(enumerate(repeats))


def test_epochs_differ_and_captions_are_dropped_at_the_stated_share() -> None:
    samples = [dataset.Sample(Path(f"{i}.png"), "x") for i in range(20)]
    orders = [dataset.epoch_order(samples, seed=0, epoch=epoch) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    dropped = [captions.is_dropped(i, seed=0, share=0.1) for i in range(4000)]
    assert np.mean(dropped) == pytest.approx(0.1, abs=0.015)
