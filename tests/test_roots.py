"""The folders that the page may reach: an id that was listed is the only way to a file."""

from pathlib import Path

import pytest

from sdlora.errors import UserError
from sdlora.ui import roots
from sdlora.ui.roots import Roots


@pytest.fixture
def place(tmp_path: Path) -> Roots:
    """Roots with a few files, links out of them, and a secret beside them."""
    for name in ("loras/a.bin", "loras/deep/er/b.bin", "loras/.hidden/c.bin", "loras/.d.bin", "runs/e.bin", "secret/f.bin", "secret/g.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loras/out").symlink_to(tmp_path / "secret")
    (tmp_path / "loras/out.bin").symlink_to(tmp_path / "secret/f.bin")
    (tmp_path / "loras/in.bin").symlink_to(tmp_path / "loras/a.bin")
    (tmp_path / "loras/deep/round").symlink_to(tmp_path / "loras")
    (tmp_path / "loras/gone.bin").symlink_to(tmp_path / "loras/nothing.bin")
    return Roots(**{name: tmp_path / name for name in ("runs", "loras", "data", "bases", "outputs", "trash")})


def names(found: dict[str, Path]) -> list[str]:
    return sorted(path.name for path in found.values())


def test_what_lies_inside_is_listed_and_neither_links_out_nor_hidden_things(place: Roots) -> None:
    found = roots.listed([place.loras, place.runs, place.data], lambda path: path.suffix == ".bin" and path.is_file())
    assert names(found) == ["a.bin", "b.bin", "e.bin"]  # in.bin is a.bin under another name, and has its id
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in found)


def test_an_id_is_the_same_as_long_as_the_file_keeps_its_place_and_differs_between_roots(place: Roots) -> None:
    (place.runs / "a.bin").touch()
    assert roots.key_of(place.loras, place.loras / "a.bin") == roots.key_of(place.loras, place.loras / "deep" / ".." / "a.bin")
    assert roots.key_of(place.loras, place.loras / "a.bin") != roots.key_of(place.runs, place.runs / "a.bin")
    with pytest.raises(ValueError, match="not in the subpath"):
        roots.key_of(place.loras, place.loras / "out/f.bin")


@pytest.mark.parametrize("word", ["", "../secret/f.bin", "a.bin", "/etc/passwd", "C:\\x", "\0", "0" * 16, None, ["x"], {"path": "x"}, 3])
def test_any_other_word_finds_nothing(place: Roots, word: object) -> None:
    offered = roots.listed([place.loras], Path.is_file)
    with pytest.raises(UserError, match=r"(That|No) LoRA is (not there|chosen)"):
        roots.find(word, offered, what="LoRA")  # type: ignore[arg-type]


def test_bases_are_listed_whole_and_named_by_id_or_by_the_hub(place: Roots, tmp_path: Path) -> None:
    for name in ("sd15/model_index.json", "sd15/unet/weights.safetensors", "other/tuned.safetensors"):
        (place.bases / name).parent.mkdir(parents=True, exist_ok=True)
        (place.bases / name).touch()
    found = roots.bases(place)
    assert names(found) == ["sd15", "tuned.safetensors"]
    assert {roots.base_name(place, key) for key in found} == {str(path) for path in found.values()}
    assert roots.base_name(place, "mini") == "mini"
    assert roots.base_name(place, "owner/some-model") == "owner/some-model"


@pytest.mark.parametrize(
    "word", ["", "/etc", "../x", "sdlora/mini", "a/b/c", "a\n/b", "tuned.safetensors", "<b>", "x" * 5000, "owner/na me"]
)
def test_a_path_is_no_base_and_the_refusal_stays_short(place: Roots, word: str) -> None:
    with pytest.raises(UserError, match="is not offered") as refused:
        roots.base_name(place, word)
    assert len(str(refused.value)) < 400
    assert str(refused.value).isprintable()
