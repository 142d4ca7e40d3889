"""A run from pictures to file on a tiny base: events, bytes, learning, and what happens when it cannot go on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora import checkpoint, config, events, lora_file, prepare, run_folder, train
from sdlora.errors import UserError


def run_config(tiny: Path, pictures: Path, **changes: Any) -> config.Config:
    values = {"base": str(tiny), "data": str(pictures), "kind": "style", "trigger": "vitrail", "name": "tiny", "steps": 6, "batch": 2}
    values |= {"save_every": 3, "sample_every": 3, "sample_prompts": ["a cup"], "lora": {"rank": 2, "alpha": 2.0}}
    values |= {"validation": {"every": 0}, "report": False}
    values |= changes
    values["lora"] = {"targets": "attn"} | values["lora"]
    return config.parse(values, where="test")


def test_a_run_tells_its_story_and_leaves_its_files(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    run = run_config(tiny_base, pictures, validation={})
    told = list(train.train(run, tmp_path / "run"))
    assert [type(event).__name__ for event in told] == [
        *["Checking"] * 5, "Checked", *["Encoding"] * 5,
        "Started", "Validated", "Sampled", *["Step"] * 3, "Saved", "Validated", "Sampled", *["Step"] * 3,
        "Validated", "Sampled", "Saved", "Done",
    ]  # fmt: skip
    started = next(one for one in told if isinstance(one, events.Started))
    assert (started.pictures, started.modules, started.steps) == (5, 7 * 8, 6)
    names = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {name for name in names if not name.startswith("state/")} == {
        "config.toml", "metrics.jsonl", "checkpoints/tiny-000003.safetensors", "tiny.safetensors",
        "samples/000000-0.png", "samples/000003-0.png", "samples/000006-0.png",
    }  # fmt: skip
    assert checkpoint.steps(tmp_path / "run/state") == [3, 6]
    assert config.load(tmp_path / "run/config.toml") == prepare.linked_run(run).run
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    file = lora_file.read(tmp_path / "run/tiny.safetensors")
    assert (len(file.modules), file.ranks, file.alphas) == (started.modules, [2], [2.0])
    assert file.metadata["modelspec.trigger_phrase"] == "vitrail"
    assert any(update.change.up.abs().max() > 0 for update in file.modules.values())


@pytest.mark.parametrize("text_encoder", [True, False])
def test_one_seed_gives_the_same_bytes_and_another_seed_others(tiny_base: Path, pictures: Path, tmp_path: Path, text_encoder: bool) -> None:
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = run_config(tiny_base, pictures, seed=seed, steps=3, lora={"rank": 2, "alpha": 2.0, "text_encoder": text_encoder})
        list(train.train(run, tmp_path / name))
        contents.append((tmp_path / name / "tiny.safetensors").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_a_character_trains_the_text_encoder_too(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    run = run_config(tiny_base, pictures, kind="character", steps=1, sample_every=0)
    started = next(event for event in train.train(run, tmp_path / "run") if isinstance(event, events.Started))
    assert started.modules == 7 * 8 + 2 * 4


def test_a_run_that_is_asked_to_stop_saves_and_ends(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    going = train.train(run_config(tiny_base, pictures, steps=50, save_every=50), tmp_path / "run")
    seen = []
    for event in going:
        seen.append(event)
        if isinstance(event, events.Step) and event.step == 2:
            run_folder.ask(tmp_path / "run", "stop")
    assert isinstance(seen[-1], events.Stopped)
    assert seen[-1].step == 2
    assert lora_file.read(seen[-1].path).ranks == [2]
    assert not run_folder.result_path(tmp_path / "run", "tiny").exists()
    assert not run_folder.is_asked(tmp_path / "run", "stop")


def test_samples_do_not_change_what_is_learned(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    contents = []
    for name, sample_every in (("with", 1), ("without", 0)):
        list(train.train(run_config(tiny_base, pictures, steps=3, sample_every=sample_every), tmp_path / name))
        contents.append((tmp_path / name / "tiny.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_accumulation_takes_steps_over_several_batches(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    run = run_config(tiny_base, pictures, optimizer={"accumulation": 3}, steps=2)
    steps = [event for event in train.train(run, tmp_path / "run") if isinstance(event, events.Step)]
    assert [step.step for step in steps] == [1, 2]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = train.loss_of_batch, []

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return honest(*args, **kwargs) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(train, "loss_of_batch", broken)
    with pytest.raises(UserError, match=r"step 5 is not finite \(\d\.png at timestep \d+; \d\.png at timestep \d+\).*saved before stand"):
        list(train.train(run_config(tiny_base, pictures), tmp_path / "run"))
    assert lora_file.read(run_folder.checkpoint_path(tmp_path / "run", "tiny", 3)).ranks == [2]
    assert not run_folder.result_path(tmp_path / "run", "tiny").exists()


def test_a_run_folder_is_never_written_over(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    run = run_config(tiny_base, pictures, steps=1)
    list(train.train(run, tmp_path / "run"))
    with pytest.raises(UserError, match="holds a run already"):
        list(train.train(run, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"base": "sd9"}, "Base 'sd9' is unknown"),
        ({"data": "nowhere"}, "nowhere: There is no such folder"),
        ({"lora": {"targets": "everything"}}, "'everything' are unknown; presets are attn"),
        ({"lora": {"targets": ["*.foo"]}}, r"'\*\.foo' matches none"),
    ],
)
def test_a_mistake_gets_one_sentence(tiny_base: Path, pictures: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        list(train.train(run_config(tiny_base, pictures, **changes), tmp_path / "run"))
