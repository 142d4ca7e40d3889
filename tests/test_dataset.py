"""Pictures and captions as they lie on disk, and an order that leaves nothing out."""

import math
import time
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdlora import dataset, images
from sdlora.errors import UserError


def put(folder: Path, name: str, caption: str | None = "a red star", *, image: Image.Image | None = None) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (20, 10), "red")).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


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


def test_a_sample_speaks_by_its_first_caption() -> None:
    assert dataset.Sample(Path("a.png"), ("a red star", "a star")).caption == "a red star"


DATASETS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 4)), min_size=1, max_size=24)
NUMBERS = st.integers(0, 2**31 - 1)


def shapes_and_repeats(data: list[tuple[str, int]]) -> tuple[list[str], list[int]]:
    return [shape for shape, _ in data], [times for _, times in data]


@given(data=DATASETS, batch=st.integers(1, 9), processes=st.integers(1, 4), seed=NUMBERS, epoch=st.integers(0, 9))
def test_every_epoch_shows_each_sample_exactly_repeats_times_whatever_batch_and_processes(
    data: list[tuple[str, int]], batch: int, processes: int, seed: int, epoch: int
) -> None:
    shapes, repeats = shapes_and_repeats(data)
    batches = dataset.epoch_batches(shapes, repeats, batch=batch, seed=seed, epoch=epoch)
    shares = [[dataset.share(one, process=i, processes=processes) for i in range(processes)] for one in batches]
    seen = Counter(visit for parts in shares for part in parts for visit in part)
    assert seen == Counter((i, k) for i, times in enumerate(repeats) for k in range(times))
    for one, parts in zip(batches, shares, strict=True):
        assert sorted(visit for part in parts for visit in part) == sorted(one)
        assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1


@given(data=DATASETS, batch=st.integers(1, 9), seed=NUMBERS)
def test_a_batch_holds_one_shape_and_only_the_last_of_a_shape_is_smaller(data: list[tuple[str, int]], batch: int, seed: int) -> None:
    shapes, repeats = shapes_and_repeats(data)
    batches = dataset.epoch_batches(shapes, repeats, batch=batch, seed=seed, epoch=0)
    sizes: dict[str, list[int]] = {}
    for one in batches:
        (shape,) = {shapes[visit.sample] for visit in one}
        sizes.setdefault(shape, []).append(len(one))
    for lengths in sizes.values():
        assert sorted(lengths)[1:] == [batch] * (len(lengths) - 1)
        assert 1 <= min(lengths) <= batch
    assert dataset.steps_per_epoch(shapes, repeats, batch=batch) == len(batches)


@given(data=DATASETS, batch=st.integers(1, 9), seed=NUMBERS)
def test_the_batches_of_a_run_are_those_of_its_epochs_in_turn(data: list[tuple[str, int]], batch: int, seed: int) -> None:
    shapes, repeats = shapes_and_repeats(data)
    epochs = [dataset.epoch_batches(shapes, repeats, batch=batch, seed=seed, epoch=epoch) for epoch in range(3)]
    expected = [(epoch, one) for epoch, batches in enumerate(epochs) for one in batches]
    asked_backwards = [dataset.batch_of_step(shapes, repeats, batch=batch, seed=seed, index=i) for i in reversed(range(len(expected)))]
    assert asked_backwards[::-1] == expected


def test_the_order_is_the_same_in_every_process_and_another_in_every_epoch() -> None:
    shapes, repeats = ["wide", "tall", "wide", "wide"], [1, 2, 1, 1]
    epochs = [dataset.epoch_batches(shapes, repeats, batch=2, seed=7, epoch=epoch) for epoch in range(3)]
    assert epochs == [
        [[(3, 0)], [(1, 0), (1, 1)], [(2, 0), (0, 0)]],
        [[(0, 0)], [(1, 0), (1, 1)], [(2, 0), (3, 0)]],
        [[(2, 0)], [(0, 0), (3, 0)], [(1, 0), (1, 1)]],
    ]


@given(seed=NUMBERS, epoch=st.integers(0, 1000))
def test_epochs_and_seeds_have_orders_of_their_own(seed: int, epoch: int) -> None:
    def order(seed: int, epoch: int) -> list[list[dataset.Visit]]:
        return dataset.epoch_batches(["one"] * 40, [1] * 40, batch=4, seed=seed, epoch=epoch)

    assert order(seed, epoch) == order(seed, epoch)
    assert order(seed, epoch) != order(seed, epoch + 1)
    assert order(seed, epoch) != order(seed + 1, epoch)


def test_what_a_caller_does_to_a_batch_does_not_reach_the_next_caller() -> None:
    first = dataset.epoch_batches(["one"] * 4, [1] * 4, batch=2, seed=0, epoch=0)
    first[0].clear()
    first.pop()
    assert [len(one) for one in dataset.epoch_batches(["one"] * 4, [1] * 4, batch=2, seed=0, epoch=0)] == [2, 2]


def test_each_shape_comes_early_as_often_as_late() -> None:
    shapes = ["wide"] * 8 + ["tall"] * 8
    first = [shapes[dataset.epoch_batches(shapes, [1] * 16, batch=4, seed=0, epoch=epoch)[0][0].sample] for epoch in range(400)]
    assert first.count("wide") == pytest.approx(200, abs=40)  # 4 deviations


def test_ten_thousand_samples_cost_a_step_little() -> None:
    shapes, repeats = [("wide", "tall")[i % 2] for i in range(10_000)], [2] * 10_000
    dataset.batch_of_step(shapes, repeats, batch=4, seed=0, index=0)
    began = time.process_time()
    for index in range(1, 101):
        dataset.batch_of_step(shapes, repeats, batch=4, seed=0, index=index)
    assert time.process_time() - began < 2  # 0.2 s; an epoch shuffled anew for each step is 3 s


KEYS = st.lists(st.text("abcdef", min_size=1, max_size=2), min_size=2, max_size=30)
SHARES = st.floats(0.01, 0.95)


def connected_to_the_first(keys: list[str], groups: list[int]) -> set[int]:
    reached: set[int] = set()
    new = {0}
    while new:
        reached |= new
        labels = {keys[i] for i in reached}, {groups[i] for i in reached}
        new = {i for i in range(len(keys)) if keys[i] in labels[0] or groups[i] in labels[1]} - reached
    return reached


@given(keys=KEYS, share=SHARES, data=st.data())
def test_held_out_pictures_are_some_but_not_all_and_no_duplicate_is_on_both_sides(
    keys: list[str], share: float, data: st.DataObject
) -> None:
    groups = data.draw(st.none() | st.lists(st.integers(0, 12), min_size=len(keys), max_size=len(keys)))
    try:
        train, held = dataset.split(keys, share=share, groups=groups)
    except UserError:
        assert connected_to_the_first(keys, groups or list(range(len(keys)))) == set(range(len(keys)))
        return
    assert train
    assert held
    assert sorted(train + held) == list(range(len(keys)))
    for labels in (keys, groups or []):
        assert not {labels[i] for i in train if labels} & {labels[i] for i in held if labels}


@given(keys=st.lists(st.text(min_size=1), min_size=2, max_size=40, unique=True), share=SHARES)
def test_pictures_without_duplicates_are_held_out_at_exactly_the_share(keys: list[str], share: float) -> None:
    assert len(dataset.split(keys, share=share)[1]) == min(max(1, math.floor(share * len(keys) + 0.5)), len(keys) - 1)


def held_out(keys: list[str], share: float) -> set[str]:
    return {keys[i] for i in dataset.split(keys, share=share)[1]}


@given(keys=st.lists(st.text(min_size=1), min_size=3, max_size=40, unique=True), share=SHARES, order=st.randoms(use_true_random=False))
def test_a_new_file_or_another_order_moves_at_most_one_picture_into_training(keys: list[str], share: float, order: Random) -> None:
    shuffled = list(keys)
    order.shuffle(shuffled)
    assert held_out(shuffled, share) == held_out(keys, share)
    assert len(held_out(keys[1:], share) - held_out(keys, share)) <= 1


def test_duplicates_are_joined_through_others_and_a_large_set_of_them_stays_in_training() -> None:
    keys, groups = ["a", "b", "b", "c", "d", "e"], [0, 0, 1, 1, 2, 3]  # a ~ b = b ~ c
    for share in (0.1, 0.3):
        train, held = dataset.split(keys, share=share, groups=groups)
        assert {0, 1, 2, 3} <= set(train)
        assert held
    assert sorted(dataset.split(["a", "a", "b", "b", "b"], share=0.1)[1]) == [0, 1]  # every set is too large: the smallest


def test_nothing_is_held_out_unless_asked_and_what_cannot_be_is_said() -> None:
    assert dataset.split(["a", "b"], share=0) == ([0, 1], [])
    assert dataset.split([], share=0) == ([], [])
    with pytest.raises(UserError, match=r"share is 0\.1, but the pictures \(1\) are too few"):
        dataset.split(["a"], share=0.1)
    with pytest.raises(UserError, match=r"pictures \(3\) are all duplicates of each other; add others, or set the share to 0"):
        dataset.split(["a", "a", "b"], share=0.5, groups=[0, 1, 1])
