"""What the tests of bases share: comparing and drawing, folders with a flaw, and how a refusal sounds."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora import base_files, generate
from sdlora.base_model import Base
from sdlora.errors import UserError

CPU = torch.device("cpu")
FULL = {"device": CPU, "dtype": torch.float32}
REQUEST = generate.Request("a red star", seed=3, steps=2, width_px=64, height_px=128)
Made = Callable[[str], tuple[Path, Path]]


def states(base: Base) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    yield "vae", base.vae.state_dict()
    for name, module in base.parts.items():
        yield name, module.state_dict()


def assert_same_weights(one: Base, other: Base) -> None:
    for (name, here), (_, there) in zip(states(one), states(other), strict=True):
        assert here.keys() == there.keys(), name
        assert [key for key in here if not torch.equal(here[key], there[key])] == [], name


def drawn(base: Base) -> bytes:
    ((_, image),) = generate.pictures(base, REQUEST)
    return image.tobytes()


def refusal(name: Path | str, **options: Any) -> str:
    """The one sentence with which opening is refused."""
    with pytest.raises(UserError) as refused:
        base_files.load(str(name), **FULL, **options)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def edited(folder: Path, target: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a pipeline (weights linked) with one of its JSON files changed."""
    shutil.copytree(folder, target, copy_function=lambda source, goal: Path(goal).symlink_to(source))
    values = json.loads((target / file).read_text())
    values = change(values) or values
    (target / file).unlink()
    (target / file).write_text(values if isinstance(values, str) else json.dumps(values))
    return target
