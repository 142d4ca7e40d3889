"""What a run leaves beside its LoRA: the recommendation, the sheet, the report, what a tracker is told, and its forecast."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdlora import checkpoint, config, events, lora_file, proof, run_folder, train, verdict
from sdlora.errors import UserError
from tests.test_cli import assert_one_sentence
from tests.test_cli import run as command
from tests.test_train import run_config


def proven(base: Path, pictures: Path, **changes: Any) -> config.Config:
    values = {"report": True, "validation": {"share": 0.3, "draws": 4}, "steps": 4, "save_every": 2}
    return run_config(base, pictures, **values | changes)


@pytest.fixture(scope="session")
def told(tiny_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[events.Event]]:
    """A run with everything, and its events."""
    folder = tmp_path_factory.mktemp("proof") / "run"
    return folder, list(train.train(proven(tiny_base, pictures), folder, forecast={"step_s": 0.5, "course_s": 10.0}))


def test_a_run_ends_with_a_recommendation_that_names_a_file(told: tuple[Path, list[events.Event]]) -> None:
    folder, happened = told
    found = json.loads((folder / "verdict.json").read_text())
    assert found["step"] in (2, 4)
    assert 0.4 <= found["strength"] <= 1.2
    assert lora_file.read(folder / found["path"]).ranks == [2]
    (reported,) = [event for event in happened if isinstance(event, events.Reported)]
    assert reported.verdict.startswith(found["reason"])
    looks = [event for event in happened if isinstance(event, events.Validated)]
    assert [look.step for look in looks] == [0, 2, 4]
    assert looks[0].drift == 0
    assert len({look.loss for look in looks}) == 3


def test_the_sheet_shows_the_base_beside_checkpoints_and_the_report_holds_it(told: tuple[Path, list[events.Event]]) -> None:
    folder, happened = told
    drawn = [event for event in happened if isinstance(event, events.Proving)]
    assert drawn[-1].done == drawn[-1].total >= 5
    with Image.open(folder / "compare.png") as sheet:
        assert sheet.width > 5 * 160
    page = (folder / "report.html").read_text()
    assert json.loads((folder / "verdict.json").read_text())["path"].rpartition("/")[2] in page
    assert "forecast" in page.lower()
    assert (folder / "report.md").is_file()


def test_the_proof_leaves_the_result_as_it_was_trained(
    told: tuple[Path, list[events.Event]], tiny_base: Path, pictures: Path, tmp_path: Path
) -> None:
    list(train.train(proven(tiny_base, pictures, report=False, sample_every=0, validation={"share": 0.3, "every": 0}), tmp_path / "run"))
    assert (tmp_path / "run/tiny.safetensors").read_bytes() == (told[0] / "tiny.safetensors").read_bytes()


def test_the_recommendation_is_made_only_of_what_was_looked_at(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    list(train.train(proven(tiny_base, pictures, validation={"every": 0}, sample_every=0), tmp_path / "run"))
    assert not (tmp_path / "run/verdict.json").exists()
    assert not (tmp_path / "run/compare.png").exists()
    assert (tmp_path / "run/report.html").is_file()


def test_the_columns_are_the_base_the_recommended_checkpoint_and_the_first_and_last(told: tuple[Path, list[events.Event]]) -> None:
    folder, _ = told
    run = config.load(folder / "config.toml")
    across = proof.columns(run, folder, None)
    assert across[0].loras == ()
    assert [column.label.replace("\n", ", ") for column in across[1:]] == [
        "step 2, strength 1", "step 4, strength 0.6", "step 4, strength 0.8", "step 4, strength 1",
    ]  # fmt: skip
    assert all(column.loras[0].path.is_file() for column in across[1:])
    best = verdict.Verdict(step=2, strength=0.8, reason="", overfitting=False, warning="")
    assert [column.label for column in proof.columns(run, folder, best) if "best" in column.label] == ["step 2, best\nstrength 0.8"]


def test_a_text_encoder_that_stops_early_stays_as_it_was(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    """Its weights of half the steps are those of the end, while the UNet's go on."""
    lora = {"rank": 2, "alpha": 2.0, "text_encoder": True, "text_targets": "attn"}
    run = run_config(tiny_base, pictures, steps=4, save_every=2, sample_every=0, lora=lora, optimizer={"text_encoder_until": 0.5})
    list(train.train(run, tmp_path / "run"))
    half, end = (checkpoint.read(checkpoint.path_of(tmp_path / "run/state", step)) for step in (2, 4))
    moved = {
        part: any(not half.weights[name].equal(end.weights[name]) for name in end.weights if name.startswith(f"{part}.")) for part in PARTS
    }
    assert moved == {"unet": True, "text_encoder": False}


PARTS = ("unet", "text_encoder")


def test_a_tracker_is_told_each_loss(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    run = run_config(tiny_base, pictures, trackers=["tensorboard"], steps=3, sample_every=0, validation={"every": 3, "draws": 4})
    steps = [event for event in train.train(run, tmp_path / "run") if isinstance(event, events.Step)]
    files = [path for path in (tmp_path / "run/tiny").rglob("events.out.tfevents*")]
    seen: Iterator[Any] = (event for path in files for event in loading.LegacyEventFileLoader(str(path)).Load())
    values = {
        (value.tag, event.step): value.simple_value for event in seen for value in event.summary.value if value.HasField("simple_value")
    }
    assert [values["train/loss", step.step] for step in steps] == pytest.approx([step.loss for step in steps], rel=1e-6)
    assert ("held_out/drift", 3) in values


def test_a_tracker_that_is_not_installed_is_named(tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdlora.processes.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb"):
        list(train.train(run_config(tiny_base, pictures, trackers=["wandb"]), tmp_path / "run"))


def test_a_forecast_is_counted_from_the_command_line(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'base = "{tiny_base}"\ndata = "{pictures}"\nkind = "style"\nname = "x"\n')
    code, said, problem = command("plan", str(path), "--count-only")
    assert (code, problem) == (0, "")
    assert all(word in said for word in ("Memory: ", "Disk: ", "TFLOP"))
    code, _, problem = command("plan", str(path), "--set", "base=nowhere")
    assert code == 2
    assert_one_sentence(problem, "Base 'nowhere' is unknown")


def test_failures_are_noted_in_the_folder(tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise UserError("The disk is full.")

    monkeypatch.setattr("sdlora.course.checkpoint.write", broken)
    with pytest.raises(UserError, match="full"):
        list(train.train(run_config(tiny_base, pictures, sample_every=0), tmp_path / "run"))
    assert run_folder.rows(tmp_path / "run")[-1]["words"] == "The disk is full."


def test_a_stop_while_the_sheet_is_drawn_ends_at_once_and_the_same_run_goes_on_to_its_report(
    tiny_base: Path, pictures: Path, tmp_path: Path
) -> None:
    run, seen = proven(tiny_base, pictures, steps=2), []
    for event in train.train(run, tmp_path / "run"):
        seen.append(event)
        if isinstance(event, events.Proving):
            run_folder.ask(tmp_path / "run", "stop")
    assert isinstance(seen[-1], events.Stopped)
    assert sum(isinstance(event, events.Proving) for event in seen) == 1
    assert lora_file.read(seen[-1].path).ranks == [2]
    assert run_folder.is_unfinished(tmp_path / "run")
    told = [type(event).__name__ for event in train.train(run, tmp_path / "run", resume=True)]
    assert "Step" not in told
    assert told[-2:] == ["Reported", "Done"]
