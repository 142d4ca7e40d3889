"""A tiny base with random weights and a folder of pictures, made once per session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import smallest
from sdlora.mini import world


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that tests encode gets into the user's cache, nor out of it; child processes see the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline in diffusers' folder layout, for pictures of 32 px."""
    folder = tmp_path_factory.mktemp("tiny-base")
    return smallest.make_base(folder, widths=(16, 32), middle="UNetMidBlock2DCrossAttn", text_width=32, text_layers=2)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of the mini world with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(5):
        scene = world.training_scene(1, i)
        world.draw(scene, width_px=32).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(scene.caption)
    return folder
