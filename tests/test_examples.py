"""The example datasets are what the world draws, and the example configs can be run on them."""

from pathlib import Path

import pytest

from sdlora import config, dataset, train
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
    samples = train.find_samples(run)
    assert (run.kind, run.trigger, len(samples)) == (name, trigger, 30)
    assert all(trigger in one.caption.replace(",", " ").split() for one in samples)
    assert [one.caption for one in samples] == [one.caption for one in dataset.scan(ROOT / "datasets" / name, trigger="")]
