"""The example datasets are what the world draws, and the example configs can be run on them."""

from pathlib import Path

import pytest

from sdlora import config, material
from sdlora.mini import examples

ROOT = Path(__file__).parent.parent


def test_the_committed_pictures_and_captions_are_what_the_world_draws(tmp_path: Path) -> None:
    examples.write(tmp_path)
    for name in ("style", "character"):
        made, committed = ({p.name: p.read_bytes() for p in (root / name).iterdir()} for root in (tmp_path, ROOT / "datasets"))
        assert made == committed
        assert len(made) == 2 * 30


@pytest.mark.parametrize(("name", "trigger"), [("style", "vitrail"), ("character", "pip")])
def test_each_example_config_finds_its_pictures_and_every_caption_holds_the_trigger(name: str, trigger: str) -> None:
    run = config.load(ROOT / "configs" / f"mini-{name}.toml")
    samples = material.find_or_refuse(run).samples
    assert (run.kind, run.trigger, len(samples)) == (name, trigger, 30)
    data = material.material(run, samples, grain_px=16, resolution_px=64)
    captions = [material.plain_caption(data.rules, sample) for sample in samples]
    assert all(trigger in caption.replace(",", " ").split() for caption in captions)
    assert captions == [sample.caption for sample in samples], "the trigger word stands in the files"
    assert {item.shape_px for item in data.items} == {(64, 64)}
