"""What a run will take is told before it begins, and what fits where it does not; the trial leaves no trace."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora import config, forecast, lora, material, memory, plan, prepare, run_folder, train, trial, trial_process
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.excerpt import Kind
from sdlora.forecast import Forecast, Scope
from sdlora.trial import BatchTime, Measured, Progress, TooLargeError

CPU = torch.device("cpu")
GIB = memory.GIB
FOUND = Measured(
    device="a test", peak_bytes=3 * GIB, batches=(BatchTime((32, 32), 2, 0.5, 0.25),), step_s=0.125, start_s=4.0, check_s=0.5,
    encode_s=0.25, speak_s=0.125, missing=5, forward_s=0.0625, picture_s=2.0, picture_bytes=1000, save_s=0.5, lora_bytes=2**20,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def counted_once() -> Iterator[None]:
    """Each run is counted once for all tests: 2 s that say the same."""
    own, known = plan.count, dict[str, Any]()

    def count(run: Config, device: torch.device, *, free_bytes: int) -> Any:
        key = run.model_dump_json()
        known[key] = known[key] if key in known else own(run, device, free_bytes=free_bytes)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "count", count)
        yield


def run_config(tiny: Path, pictures: Path, **changes: Any) -> Config:
    values = {"base": str(tiny), "data": str(pictures), "kind": "style", "name": "tiny", "steps": 6, "batch": 4, "save_every": 2}
    values |= {"sample_every": 3, "sample_prompts": ["a cup"], "lora": {"rank": 2}, "validation": {"every": 3}}
    return prepare.linked_run(config.parse(values | changes, where="test")).run


class Attempts:
    """Stands for the trial: needs what it is told for each number of pictures in a batch, and remembers what was tried."""

    def __init__(self, needs: Any) -> None:
        self.needs, self.tried = needs, list[Config]()

    def __call__(self, run: Config, *, memory_limit_bytes: int | None = None) -> Iterator[Progress | Measured]:
        self.tried.append(run)
        yield 1, 2
        needed = self.needs(run)
        if needed is None:
            raise TooLargeError
        yield replace(FOUND, peak_bytes=needed)


def planned(run: Config, **options: Any) -> Forecast:
    *progress, told = plan.plan(run, **options)
    assert all(isinstance(one, tuple) for one in progress)
    assert isinstance(told, Forecast)
    return told


# --- settings that fit --------------------------------------------------------------------------------------------------------


def test_what_costs_only_time_is_tried_before_what_changes_the_lora(tiny_base: Path, pictures: Path) -> None:
    run = run_config(tiny_base, pictures, lora={"rank": 2, "text_encoder": True})
    least = ("gradient_checkpointing=true", "batch=1", "optimizer.accumulation=4")
    assert [plan.words(one) for one in plan.easings(run, CPU)] == [
        ("gradient_checkpointing=true",),
        ("gradient_checkpointing=true", "batch=2", "optimizer.accumulation=2"),
        least,
        (*least, "lora.text_encoder=false"),
        (*least, "lora.text_encoder=false", "precision=bf16"),
        (*least, "lora.text_encoder=false", "precision=bf16", "quantise=int8"),
    ]


def test_what_is_saved_already_is_not_proposed_and_the_effective_batch_stays(tiny_base: Path, pictures: Path) -> None:
    run = run_config(tiny_base, pictures, gradient_checkpointing=True, precision="bf16", batch=9, optimizer={"accumulation": 2})
    assert plan.easings(run, CPU) == [
        {"batch": "3", "optimizer.accumulation": "6"},
        {"batch": "1", "optimizer.accumulation": "18"},
        {"batch": "1", "optimizer.accumulation": "18", "quantise": '"int8"'},
    ]
    assert len(plan.easings(run.model_copy(update={"quantise": "int8"}), CPU)) == 2


def test_proposed_words_are_words_that_the_command_line_takes(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    run = run_config(tiny_base, pictures, lora={"rank": 2, "text_encoder": True})
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml(run))
    for changes in plan.easings(run, CPU):
        assert config.load(path, changes=list(plan.words(changes))) == plan.changed(run, changes)
    assert plan.changed(run, {}) == run


def test_a_run_that_fits_is_tried_once_and_left_as_it_is(tiny_base: Path, pictures: Path) -> None:
    attempts = Attempts(lambda run: 3 * GIB)
    run = run_config(tiny_base, pictures)
    told = planned(run, memory_limit_bytes=4 * GIB, attempt=attempts)
    assert attempts.tried == [run]
    assert (told.changes, told.reasons, told.peak_bytes) == ((), (), 3 * GIB)
    assert not any("--set" in line for line in told.lines())


def test_where_it_does_not_fit_the_first_setting_that_does_is_proposed_with_the_reasons(tiny_base: Path, pictures: Path) -> None:
    attempts = Attempts(lambda run: None if not run.gradient_checkpointing else run.batch * GIB)
    run = run_config(tiny_base, pictures)
    told = planned(run, memory_limit_bytes=2 * GIB, attempt=attempts)
    assert [(one.gradient_checkpointing, one.batch, one.optimizer.accumulation) for one in attempts.tried] == [
        (False, 4, 1), (True, 4, 1), (True, 2, 2),
    ]  # fmt: skip
    assert told.lines()[-4:] == [
        "The run does not fit as it is:",
        "- as it is the trial ran out of memory;",
        "- with gradient_checkpointing=true it needs 4.00 GiB (measured), and 2.00 GiB are free;",
        "It fits with: --set gradient_checkpointing=true --set batch=2 --set optimizer.accumulation=2",
    ]


def test_what_counting_shows_to_be_too_large_is_never_tried(tiny_base: Path, pictures: Path) -> None:
    run = run_config(tiny_base, pictures)
    _, plain = plan.count(run, CPU, free_bytes=64 * GIB)
    _, saving = plan.count(plan.changed(run, {"gradient_checkpointing": "true"}), CPU, free_bytes=64 * GIB)
    assert saving.memory_bytes < plain.memory_bytes
    attempts = Attempts(lambda run: saving.memory_bytes)
    told = planned(run, memory_limit_bytes=(saving.memory_bytes + plain.memory_bytes) // 2, attempt=attempts)
    assert [one.gradient_checkpointing for one in attempts.tried] == [True]
    assert told.changes == ("gradient_checkpointing=true",)
    assert "(counted)" in told.reasons[0]


def test_a_limit_that_cannot_be_met_is_told_in_a_sentence(tiny_base: Path, pictures: Path) -> None:
    attempts, run = Attempts(lambda run: 3 * GIB), run_config(tiny_base, pictures, gradient_checkpointing=True, batch=1)
    with pytest.raises(UserError) as counted:
        planned(run, memory_limit_bytes=10_000, attempt=attempts)
    assert attempts.tried == []
    assert "0.00 GiB are free; lower resolution_px or lora.rank" in str(counted.value)
    with pytest.raises(UserError, match=r"needs 3.00 GiB of memory or more with every setting that saves some, and 1.00 GiB are free"):
        planned(run, memory_limit_bytes=GIB, attempt=attempts)
    assert [(one.precision, one.quantise) for one in attempts.tried] == [("auto", "none"), ("bf16", "none"), ("bf16", "int8")]


def test_counts_alone_tell_memory_and_disk_but_no_time(tiny_base: Path, pictures: Path) -> None:
    attempts = Attempts(lambda run: 3 * GIB)
    told = planned(run_config(tiny_base, pictures), measure=False, attempt=attempts)
    assert attempts.tried == []
    assert (told.step_s, told.total_s, told.peak_bytes) == (None, None, told.counted.memory_bytes)
    assert told.disk_bytes > 0
    assert told.lines()[0].startswith("Counted, not measured")
    step = told.counted.weights_bytes + told.counted.heaviest.peak_bytes
    for coding, says in ((step, False), (step + 1, True)):
        other = replace(told, counted=replace(told.counted, coding_bytes=coding))
        assert any("Most is needed while pictures are encoded" in line for line in other.lines()) == says
    assert not any(line.startswith("Time") for line in told.lines())


def test_more_pictures_per_step_are_more_operations_and_memory(tiny_base: Path, pictures: Path) -> None:
    (_, small), (scope, large) = (plan.count(run_config(tiny_base, pictures, batch=batch), CPU, free_bytes=64 * GIB) for batch in (1, 4))
    _, twice = plan.count(run_config(tiny_base, pictures, batch=4, optimizer={"accumulation": 2}), CPU, free_bytes=64 * GIB)
    assert large.heaviest.flops == pytest.approx(4 * small.heaviest.flops, rel=0.01)
    assert large.flops == pytest.approx(2.5 * small.flops, rel=0.01)  # five pictures: a batch of 4 and one of 1
    assert twice.flops == 2 * large.flops
    assert twice.memory_bytes == large.memory_bytes > small.memory_bytes
    assert (scope.pictures, scope.views, scope.held_out, scope.drawn) == (5, 5, 0, 0)
    assert sorted(scope.kinds, key=lambda kind: kind.pictures) == [Kind((32, 32), 1, 0, 0.5), Kind((32, 32), 4, 1, 0.5)]


# --- sums ---------------------------------------------------------------------------------------------------------------------


def test_the_whole_run_is_the_sum_of_its_parts(tiny_base: Path, pictures: Path) -> None:
    run = run_config(tiny_base, pictures, optimizer={"accumulation": 3})
    _, counted = plan.count(run, CPU, free_bytes=64 * GIB)
    scope = Scope((Kind((32, 32), 2, 0, 0.75), Kind((32, 32), 1, 3, 0.25)), pictures=8, held_out=2, drawn=3, views=16, texts=4)
    told = forecast.forecast(run, scope, counted, FOUND, limit=4 * GIB, changes=(), reasons=())
    batch_s = 0.75 * 0.25 + 0.25 * 0.125
    assert told.step_s == pytest.approx(3 * batch_s + 0.125)
    assert told.seconds == pytest.approx({
        "start": 4.0, "looking at pictures": 10 * 0.5, "class pictures": 3 * 2.0, "encoding": 18 * 0.25 + 4 * 0.125,
        "training": 6 * told.step_s + 0.25, "samples": 3 * 2.0, "validation": 3 * 16 * (2 + 2 * 2) * 0.0625,
        "saving": 3 * 0.5 * (1 + counted.trained_bytes / 2**20), "report": 6 * 2.0 + 9 * 16 * 2 * 0.0625,
    })  # fmt: skip
    assert told.total_s == pytest.approx(sum(told.seconds.values()))
    before_or_after = ("start", "looking at pictures", "class pictures", "encoding", "report")
    assert told.course_s == pytest.approx(told.total_s - sum(told.seconds[part] for part in before_or_after))
    assert told.run_bytes == {"LoRA files": 3 * 2**20, "states": 2 * counted.trained_bytes, "samples": 3000, "report": 6000 + 12_000}
    assert json.loads(json.dumps(told.row())) == {
        "step_s": told.step_s, "course_s": told.course_s, "total_s": told.total_s, "peak_bytes": 3 * GIB, "disk_bytes": told.disk_bytes,
    }  # fmt: skip


@pytest.mark.parametrize(("steps", "every", "times"), [(6, 0, 0), (6, 3, 3), (6, 4, 3), (6, 10, 2)])
def test_looks_are_at_the_beginning_every_so_many_steps_and_at_the_end(steps: int, every: int, times: int) -> None:
    assert forecast.looks(steps, every) == times


# --- the trial ----------------------------------------------------------------------------------------------------------------


def test_a_trial_in_a_process_of_its_own_foretells_the_run_and_leaves_no_trace(
    tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path / "cache"))
    run = run_config(tiny_base, pictures, report=False, lora={"rank": 16})
    folders = [tiny_base, pictures, tmp_path]
    before = {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    told = planned(run)
    assert {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()} == before
    assert told.measured is not None
    assert told.measured.missing == 5  # the cache was not filled
    assert [(one.shape_px, one.pictures) for one in told.measured.batches] == [((32, 32), 4)]
    assert 0.1 * GIB < told.peak_bytes < 2 * GIB
    assert all(value > 0 for name, value in told.seconds.items() if name not in ("class pictures", "report"))
    happened = list(train.train(run, tmp_path / "run"))
    rows = run_folder.rows(tmp_path / "run")
    assert forecast.looks(run.steps, run.sample_every) == sum(row["event"] == "sampled" for row in rows)
    assert forecast.saves(run) == sum(type(one).__name__ == "Saved" for one in happened)
    size = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert told.disk_bytes == pytest.approx(size, rel=0.15)


def test_a_trial_learns_nothing_and_what_is_cached_is_read(tiny_base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_config(tiny_base, pictures, sample_every=0)
    list(prepare.prepare(run, material.find_or_refuse(run), Path("unused"), device=CPU, dtype=torch.float32))
    opened = []

    def open_base(*args: Any, **options: Any) -> Any:
        opened.append(own(*args, **options))
        return opened[-1]

    own = prepare.open_base
    monkeypatch.setattr(prepare, "open_base", open_base)
    *_, measured = trial.measure(run)
    assert isinstance(measured, Measured)
    assert measured.missing == 0
    (base,) = opened
    assert base.open_vae is not None  # never asked for
    assert all(not one.up.any() for layer in lora.layers(base.unet).values() for one in layer.each_adapter())


def test_memory_that_runs_out_is_told_apart_from_other_errors(tiny_base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_config(tiny_base, pictures)
    for problem, told in (
        (torch.OutOfMemoryError("CUDA out of memory"), TooLargeError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), TooLargeError),
        (RuntimeError("shapes do not fit"), RuntimeError),
    ):
        monkeypatch.setattr(prepare, "open_base", _raiser(problem))
        with pytest.raises(told):
            list(trial.measure(run))


def _raiser(problem: Exception) -> Any:
    def fail(*args: Any, **options: Any) -> None:
        raise problem

    return fail


def test_what_a_child_says_is_understood() -> None:
    answer = json.loads(json.dumps({"measured": asdict(FOUND)}))
    assert trial_process.understood(answer, 0, "") == FOUND
    with pytest.raises(UserError, match="mend this"):
        trial_process.understood({"refused": "mend this"}, 0, "")
    for large, code in (({"too_large": True}, 0), ({"done": 1, "total": 2}, trial_process.KILLED)):
        with pytest.raises(TooLargeError):
            trial_process.understood(large, code, "")
    with pytest.raises(RuntimeError, match="ended with code 1 and said: boom"):
        trial_process.understood({}, 1, "boom")


def test_a_child_ends_when_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch, tiny_base: Path, pictures: Path) -> None:
    started = []

    class Slow(subprocess.Popen[str]):
        def __init__(self, command: list[str], **options: Any) -> None:
            words = 'import time; print(\'{"done": 1, "total": 2}\', flush=True); time.sleep(600)'
            super().__init__([command[0], "-c", words], **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Slow)
    work = trial_process.tried(run_config(tiny_base, pictures))
    assert next(iter(work)) == (1, 2)
    work.close()  # type: ignore[attr-defined]
    assert started[0].poll() == trial_process.KILLED


def test_bad_data_is_refused_before_anything_is_tried(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"hold|empty"):
        planned(run_config(tiny_base, tmp_path / "empty"), attempt=Attempts(lambda run: GIB))
