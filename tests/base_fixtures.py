"""Fixtures of the tests of bases: every family in both forms, made once, and a machine without network."""

import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tests import tiny_families
from tests.bases import Made


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The folder and the single file of a family, made once; what a single file may state is stated where it must be."""
    root, done = tmp_path_factory.mktemp("families"), {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in done:
            folder = tiny_families.make_folder(family, root / family)
            stated = {"sd2": {"modelspec.prediction_type": "epsilon"}, "sd2-v": {"modelspec.architecture": "stable-diffusion-v2-768-v"}}
            done[family] = (
                folder,
                tiny_families.make_single_file(family, folder, root / f"{family}.safetensors", metadata=stated.get(family)),
            )
        return done[family]

    return make


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """No network, an empty hub cache, and a record of every attempt to connect."""
    tried: list[str] = []

    def refuse(*values: Any, **options: Any) -> None:
        tried.append(str(values[-1]))
        raise OSError("no network in this test")

    for place, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo"), (socket, "create_connection")):
        monkeypatch.setattr(place, name, refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tried
