"""Every choice of the recipe trains, is exact, and does what it says to what is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora import adapters, events, lora_file, run_folder, train
from sdlora.errors import UserError
from tests.test_train import run_config

OBJECTIVES: list[dict[str, Any]] = [
    {"loss": "l1"}, {"loss": "huber"}, {"loss": "huber", "huber_schedule": "exponential"}, {"weighting": "soft_min_snr"},
    {"weighting": "debiased"}, {"weighting": "none"}, {"noise_offset": 0.1}, {"pyramid_discount": 0.4}, {"input_perturbation": 0.1},
    {"timesteps": "logit_normal", "timestep_mean": 0.5}, {"timestep_low": 100, "timestep_high": 300}, {"stratified": True},
]  # fmt: skip
OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "adafactor"}, {"name": "lion", "schedule": "rex"}, {"name": "schedule_free", "schedule": "constant"},
    {"name": "prodigy", "learning_rate": 1.0, "text_encoder_learning_rate": 1.0}, {"lora_plus_ratio": 16.0}, {"ema": 0.9},
    {"max_norm": 0.001},
    {"schedule": "cosine_with_restarts", "cycles": 2}, {"schedule": "linear"}, {"schedule": "polynomial", "power": 2.0},
    {"schedule": "warmup_stable_decay"},
]  # fmt: skip


def trained(base: Path, pictures: Path, folder: Path, **changes: Any) -> bytes:
    *_, done = train.train(run_config(base, pictures, steps=3, sample_every=0, save_every=0, **changes), folder)
    assert isinstance(done, events.Done)
    return done.path.read_bytes()[-8192:]  # weights, not the header that names the settings


@pytest.fixture(scope="session")
def plain(tiny_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the run without any of it."""
    return trained(tiny_base, pictures, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_each_objective_trains_otherwise_and_the_same_each_time(
    tiny_base: Path, pictures: Path, tmp_path: Path, plain: bytes, objective: dict[str, Any]
) -> None:
    first, second = (trained(tiny_base, pictures, tmp_path / name, objective=objective) for name in "ab")
    assert first == second != plain


@pytest.mark.parametrize("how", OPTIMIZERS, ids=str)
def test_each_optimizer_and_schedule_trains_otherwise_and_the_same_each_time(
    tiny_base: Path, pictures: Path, tmp_path: Path, plain: bytes, how: dict[str, Any]
) -> None:
    module = {"lion": "lion_pytorch", "schedule_free": "schedulefree", "prodigy": "prodigyopt"}.get(how.get("name", ""))
    if module:
        pytest.importorskip(module)
    first, second = (trained(tiny_base, pictures, tmp_path / name, optimizer=how) for name in "ab")
    assert first == second != plain


def test_the_average_is_what_is_saved_and_training_goes_on_from_the_weights_themselves(
    tiny_base: Path, pictures: Path, tmp_path: Path
) -> None:
    for name, ema, save_every in (("average", 0.9, 1), ("seldom", 0.9, 0), ("plain", 0.0, 1)):
        run = run_config(
            tiny_base, pictures, steps=3, sample_every=0, save_every=save_every, optimizer={"ema": ema}, output={"dtype": "fp32"}
        )
        list(train.train(run, tmp_path / name))
    results = {name: lora_file.read(tmp_path / name / "tiny.safetensors").modules for name in ("average", "seldom", "plain")}
    stem = next(iter(results["plain"]))
    assert torch.equal(results["average"][stem].change.up, results["seldom"][stem].change.up), "saving changes nothing"
    assert results["average"][stem].change.up.norm() < results["plain"][stem].change.up.norm(), "the average lags behind"


def test_no_update_grows_beyond_the_norm(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    run = run_config(
        tiny_base, pictures, steps=4, sample_every=0, output={"dtype": "fp32"}, optimizer={"learning_rate": 0.1, "max_norm": 0.05}
    )
    list(train.train(run, tmp_path / "run"))
    for update in lora_file.read(run_folder.result_path(tmp_path / "run", "tiny")).modules.values():
        change = update.change
        assert (change.alpha / change.rank * change.up.flatten(1) @ change.down.flatten(1)).norm() <= 0.0501


def test_the_rate_follows_the_schedule_of_the_run(tiny_base: Path, pictures: Path) -> None:
    run = run_config(tiny_base, pictures, steps=10, optimizer={"schedule": "linear", "warmup": 0.0})
    assert [adapters.rate_factor(run, step) for step in (0, 5)] == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer": {"name": "schedule_free", "schedule": "cosine"}}, "does not go with optimizer 'schedule_free'"),
        ({"optimizer": {"max_norm": 1.0}, "lora": {"rank": 2, "init": "pissa"}}, "max_norm goes with plain LoRA only"),
        ({"objective": {"weighting": "soft_min_snr"}, "min_snr_gamma": 0.0}, "needs min_snr_gamma above 0"),
        ({"objective": {"timestep_low": 500, "timestep_high": 400}}, "from 500 to below 400"),
    ],
)
def test_what_does_not_go_together_is_said(tiny_base: Path, pictures: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        list(train.train(run_config(tiny_base, pictures, sample_every=0, **changes), tmp_path / "run"))
