"""A device that is too small for a whole base: its parts are there one after the other, and nothing else changes."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sdlora import base_files, base_model, config, generate, lora, plan, prepare, train
from sdlora.base_model import Base
from sdlora.generate import LoRA, Request
from sdlora.memory import GIB
from sdlora.mini.tokens import build_tokenizer
from tests.shelf import write_lora
from tests.test_train import run_config

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
FAMILIES = Path(base_files.__file__).parent / "families"
TAKEN_BYTES = 600_000_000  # what the driver and a screen have of a card before anybody asks


@dataclass
class Small:
    """A device as `base_model` sees it; weights that wait elsewhere are no numbers, so that whoever uses them is found out."""

    here: set[int] = field(default_factory=set)
    waiting: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    most_parts: int = 0
    honest_add: Callable[..., list[str]] = lora.add

    def carry(self, module: nn.Module, where: torch.device) -> None:
        frozen = [one for one in base_model._frozen(module) if one.is_floating_point()]
        if where is base_model.AWAY and id(module) not in self.waiting:
            self.waiting[id(module)] = [(one, one.detach().clone()) for one in frozen]
            for one in frozen:
                one.data.fill_(torch.nan)
            self.here.discard(id(module))
        elif where is not base_model.AWAY:
            for one, numbers in self.waiting.pop(id(module), []):
                one.data.copy_(numbers)
            self.here.add(id(module))
            self.most_parts = max(self.most_parts, len(self.here))

    def add(self, module: nn.Module, **options: Any) -> list[str]:
        """Adapters are made where they are trained, and stay there."""
        assert id(module) in self.here
        return self.honest_add(module, **options)

    def is_at(self, module: nn.Module, where: torch.device) -> bool:
        return id(module) in self.here


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Small:
    """Bases are opened on a device that holds one part."""
    device, opened = Small(), base_files.load

    def load(*values: Any, **options: Any) -> Base:
        base = opened(*values, **options)
        base.home = CPU
        for part in (base.unet, *base.text_encoders):
            device.carry(part, base_model.AWAY)
        return base

    monkeypatch.setattr(base_files, "load", load)
    monkeypatch.setattr(base_model, "_carry", device.carry)
    monkeypatch.setattr(base_model, "_is_at", device.is_at)
    monkeypatch.setattr(lora, "add", device.add)
    return device


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for end in ("safetensors", "png") for path in sorted(folder.rglob(f"*.{end}"))}


@pytest.mark.parametrize("kind", ["style", "character"])
def test_a_run_in_turns_ends_in_the_same_bytes(
    tiny_base: Path, pictures: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    often = {"steps": 2, "save_every": 1, "sample_every": 1}
    run = run_config(tiny_base, pictures, kind=kind, cache="memory", report=True, validation={"share": 0.2}, **often)
    list(train.train(run, tmp_path / "whole"))
    device = request.getfixturevalue("small")
    list(train.train(run, tmp_path / "turns"))
    whole, turns = files_of(tmp_path / "whole"), files_of(tmp_path / "turns")
    assert len(whole) > 6
    assert whole.keys() == turns.keys()
    assert [name for name, content in whole.items() if turns[name] != content] == []
    assert device.most_parts == {"style": 1, "character": 2}[kind]  # a character's text encoder learns beside the UNet


def test_pictures_with_a_folded_lora_are_the_same_in_turns(tiny_base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    write_lora(tiny_base, tmp_path / "a.safetensors", seed=1)

    def drawn() -> list[bytes]:
        base = base_files.load(str(tiny_base), device=CPU, dtype=torch.float32)
        found = []
        for strength in (1.0, 0.5, 0.0):
            generate.set_loras(base, [LoRA(tmp_path / "a.safetensors", strength)])
            (picture,) = (image for _, image in generate.pictures(base, Request("a cup", steps=2)))
            found.append(picture.tobytes())
        return found

    whole = drawn()
    device = request.getfixturevalue("small")
    assert drawn() == whole
    assert len(set(whole)) == 3
    assert device.most_parts == 1


@pytest.mark.parametrize(
    ("weights_gib", "free_gib", "turns"),
    [(2.1, 3.6, True), (2.1, 7.4, False), (6.6, 7.4, True), (6.6, 11.4, False)],  # SD 1.5 on 4 and 8 GB, SDXL on 8 and 12
)
def test_parts_take_turns_where_they_and_a_picture_do_not_fit_together(weights_gib: float, free_gib: float, turns: bool) -> None:
    assert base_model.take_turns(int(weights_gib * GIB), int(free_gib * GIB)) is turns


@pytest.mark.parametrize(("family", "preset", "card_gb"), [("sd1", "sd15-low-memory", 4), ("sdxl", "sdxl-low-memory", 8)])
def test_the_presets_for_small_cards_fit_there(family: str, preset: str, card_gb: int, tmp_path: Path) -> None:
    base, side = write_shell(tmp_path / family, family), {"sd1": 512, "sdxl": 1024}[family]
    data = tmp_path / "pictures"
    data.mkdir()
    for i in range(4):
        Image.new("RGB", (side, side), (i, 0, 0)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"a plain picture, number {i}")
    text = (ROOT / f"configs/{preset}.toml").read_text(encoding="utf-8")
    values = tomllib.loads(text) | {"base": str(base), "data": str(data), "precision": "bf16"}
    run = prepare.linked_run(config.parse(values, where=preset)).run
    free = int(card_gb * 1e9 - TAKEN_BYTES)
    said = re.findall(r"Counted are ([\d.]+) GB", text) + re.findall(r'quantise = "int8" +# ([\d.]+) GB', text)
    for quantise, stated in zip(("none", "int8"), said, strict=family == "sdxl"):
        counted = plan.count(run.model_copy(update={"quantise": quantise}), torch.device("cuda"), free_bytes=free)[1]
        assert counted.takes_turns
        assert counted.memory_bytes <= free
        assert float(stated) == pytest.approx(counted.memory_bytes / 1e9, abs=0.06)


def write_shell(folder: Path, family: str) -> Path:
    """A pipeline of full size in a diffusers folder, without its weights."""
    index = json.loads((FAMILIES / family / "model_index.json").read_text())
    for part in ("unet", "vae", "scheduler", "text_encoder", "text_encoder_2"):
        if part in index:
            shutil.copytree(FAMILIES / family / part, folder / part)
    for part in ("tokenizer", "tokenizer_2"):
        if part in index:
            build_tokenizer(folder / part)
    shutil.copy(FAMILIES / family / "model_index.json", folder)
    return folder
