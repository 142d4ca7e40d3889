"""Drafts of captions: by weights that lie here and no others, in the page's own copies alone."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration

from sdlora import captioner
from sdlora.errors import UserError
from sdlora.ui import captions_actions, uploads
from sdlora.ui.roots import Roots

pytest_plugins = ("tests.base_fixtures",)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest BLIP, with random weights and a vocabulary of a few words."""
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "star", "[DEC]"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16}
    text = small | {
        "vocab_size": len(words),
        "encoder_hidden_size": 16,
        "bos_token_id": 8,
        "sep_token_id": 3,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    config = BlipConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=16)
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def roots(tmp_path: Path, pictures: Path) -> Roots:
    roots = Roots(**{name: tmp_path / name for name in ("runs", "loras", "data", "bases", "outputs", "trash")})
    shutil.copytree(pictures, roots.data / "cups")
    return roots


def test_only_pictures_without_a_caption_get_a_draft(roots: Roots, blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(captioner.VARIABLE, str(blip))
    monkeypatch.setattr(captioner, "captions", lambda paths: (f"draft of {path.name}" for path in paths))
    key, _ = uploads.copy_in(roots, roots.data / "cups")
    folder = uploads.set_folder(roots, key)
    (folder / "3.txt").unlink()
    before = uploads.caption_of(folder / "0.png")
    assert list(captions_actions.draft(roots, key)) == [(1, 1)]
    assert uploads.caption_of(folder / "3.png") == "draft of 3.png"
    assert uploads.caption_of(folder / "0.png") == before
    assert (roots.data / "cups/3.txt").read_text() != "draft of 3.png"


def test_weights_that_lie_here_say_the_same_of_the_same_picture(pictures: Path, blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(captioner.VARIABLE, str(blip))
    paths = sorted(pictures.glob("*.png"))[:2]
    first = list(captioner.captions(paths))
    assert len(first) == 2
    assert any(first)
    assert all(set(said.split()) <= {"a", "red", "star", "[DEC]"} for said in first), first
    assert list(captioner.captions(paths)) == first


def test_without_weights_there_is_one_sentence_and_nothing_is_fetched(
    roots: Roots, monkeypatch: pytest.MonkeyPatch, attempts: list[str], tmp_path: Path
) -> None:
    monkeypatch.setenv(captioner.VARIABLE, str(tmp_path / "nowhere"))
    assert captioner.folder() is None
    with pytest.raises(UserError, match="There is no captioner on this machine"):
        list(captioner.captions([roots.data / "cups/0.png"]))
    (tmp_path / "nowhere").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "nowhere" / name).write_text("{}")
    with pytest.raises(UserError, match="cannot be opened"):
        list(captioner.captions([roots.data / "cups/0.png"]))
    assert attempts == []
