"""The mini world: the same pictures from the same seed, honest captions, a held-out share that training never sees."""

from pathlib import Path

import numpy as np
import pytest

from sdlora.mini import world
from sdlora.mini.tokens import build_tokenizer, words


def test_a_seed_means_the_same_picture() -> None:
    first, again, other = (world.draw(world.training_scene(3, i)).tobytes() for i in (5, 5, 6))
    assert first == again
    assert first != other


def test_fifteen_percent_of_all_combinations_are_held_out() -> None:
    inside, outside = world.combinations(held_out=False), world.combinations(held_out=True)
    assert len(outside) / (len(inside) + len(outside)) == pytest.approx(0.15, abs=0.01)
    assert not set(inside) & set(outside)
    assert {kind for kind, _, _ in inside} == set(world.KINDS)


def test_training_never_shows_a_held_out_combination() -> None:
    for i in range(500):
        one = world.training_scene(0, i)
        assert not any(world.is_held_out(thing.kind, thing.colour, one.background) for thing in one.things)


def test_captions_say_what_is_drawn() -> None:
    rng = np.random.default_rng(0)
    assert world.scene("star", "red", "blue", rng=rng, size_word="").caption == "a red star on a blue background"
    assert world.scene("cup", "orange", "olive", rng=rng, size_word="").caption == "an orange cup on an olive background"
    assert world.scene("cup", "orange", "red", rng=rng, size_word="small").caption == "a small orange cup on a red background"
    both = world.pair(("star", "red"), ("cup", "blue"), "green", rng=rng)
    assert both.caption == "a red star and a blue cup on a green background"
    assert world.pip_scene("pink", rng=rng, company=("key", "lime")).caption == "pip and a lime key on a pink background"


def test_a_thing_has_its_colour_and_stays_in_the_picture() -> None:
    rng = np.random.default_rng(1)
    for kind in world.KINDS:
        one = world.scene(kind, "blue", "yellow", rng=rng)
        pixels = np.asarray(world.draw(one)).reshape(-1, 3)
        assert (np.abs(pixels.astype(int) - world.COLOURS["blue"]).max(1) < 8).mean() > 0.03, kind
        edge = np.asarray(world.draw(one))[:, [0, -1]].reshape(-1, 3).astype(int)
        near_wall = np.abs(edge - world.BACKGROUNDS["yellow"]).max(1) < 25
        assert near_wall.mean() > 0.9, kind


def test_every_word_of_the_world_is_one_token_and_any_other_word_has_some(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    assert [word for word in words() if len(tokenizer.tokenize(word)) != 1] == []
    ids = tokenizer("Vitrail, ein schönes 日本").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]
