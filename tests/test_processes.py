"""Several processes train what one process trains: the same samples, losses and weights; one of them gone is said, and nothing is lost."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sdlora import checkpoint, lora_file, processes
from tests.test_cli import TOML

SETTINGS = """
steps = 6
batch = 4
save_every = 2
keep_last = 10
sample_every = 0
report = false
[validation]
every = 0
[optimizer]
accumulation = 2
text_encoder_learning_rate = 1e-3
[lora]
rank = 2
targets = "attn"
text_encoder = true
rank_dropout = 0.2
"""


@pytest.fixture(scope="session")
def shared_config(tiny_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared") / "run.toml"
    path.write_text(TOML.format(base=tiny_base, data=pictures).partition("steps")[0] + SETTINGS)
    return path


def launched(configs: list[Path], out: Path) -> list[subprocess.Popen[str]]:
    """The processes of a run, one for each config, with the environment that a launcher would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(configs)), "ACCELERATE_USE_CPU": "true"}
    children = []
    for i, config in enumerate(configs):
        own = meeting | {"RANK": str(i), "LOCAL_RANK": str(i)} if len(configs) > 1 else {}
        command = [sys.executable, "-m", "sdlora", "train", str(config), "--out", str(out)]
        children.append(subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return children


def ended(children: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit codes, and what each said and complained."""
    try:
        said = [child.communicate(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, out, err) for child, (out, err) in zip(children, said, strict=True)]


@pytest.fixture(scope="session")
def runs(shared_config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run by 1, 2 and 4 processes."""
    root, done = tmp_path_factory.mktemp("processes"), {}
    for count in (1, 2, 4):
        done[count] = root / str(count)
        results = ended(launched([shared_config] * count, done[count]))
        assert [code for code, _, _ in results] == [0] * count, results
        assert [out for _, out, _ in results[1:]] == [""] * (count - 1), "only the first speaks"
    return done


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] == "step"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    state, _ = checkpoint.newest(run / "state")
    assert state is not None
    return state.weights


@pytest.mark.parametrize("count", [2, 4])
def test_more_processes_see_the_same_and_learn_the_same(runs: dict[int, Path], count: int) -> None:
    assert len(losses(runs[count])) == 6
    assert losses(runs[count]) == pytest.approx(losses(runs[1]), rel=1e-5, abs=1e-5)
    one, more = weights(runs[1]), weights(runs[count])
    assert max(float((one[name] - more[name]).abs().max()) for name in one) < 1e-4
    assert lora_file.read(runs[count] / "tiny.safetensors").ranks == [2]


def test_a_run_goes_on_with_another_number_of_processes(runs: dict[int, Path], shared_config: Path, tmp_path: Path) -> None:
    """Stopped by two processes after step 4 and gone on with by one: what one would have come to from the start."""
    out = tmp_path / "run"
    children = launched([shared_config] * 2, out)
    wait_for(out, step=2)
    (out / "stop").touch()
    codes = [code for code, _, _ in ended(children)]
    stopped = checkpoint.steps(out / "state")[-1]
    assert codes == [130, 130]
    assert 2 <= stopped < 6
    ((code, said, _),) = ended(launched([shared_config], out))
    assert (code, f"Going on after step {stopped}" in said) == (0, True)
    one, resumed = weights(runs[1]), weights(out)
    assert max(float((one[name] - resumed[name]).abs().max()) for name in one) < 1e-4


def test_a_lost_process_is_said_at_once_and_the_run_goes_on_exactly(runs: dict[int, Path], shared_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, second = launched([shared_config] * 2, out)
    wait_for(out, step=2)
    (out / "pause").touch()  # it stays between two steps while the other is killed
    wait_for(out, event="paused")
    second.kill()
    (out / "pause").unlink()
    began = time.monotonic()
    code, _, problem = ended([first])[0]
    second.communicate()
    assert time.monotonic() - began < 60
    assert code == 2
    assert "Process 1 of 2 has lost the others" in problem
    assert "Traceback" not in problem
    assert [code for code, _, _ in ended(launched([shared_config] * 2, out))] == [0, 0]
    assert (out / "tiny.safetensors").read_bytes() == (runs[2] / "tiny.safetensors").read_bytes()


def test_processes_that_were_given_different_runs_are_refused(shared_config: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(shared_config.read_text().replace("rank = 2\n", "rank = 2\nalpha = 3.0\n"))
    results = ended(launched([shared_config, other], tmp_path / "run"))
    assert [code for code, _, _ in results] == [2, 2]
    assert "Process 2 of 2 has another config, base or set of pictures than the first" in results[0][2]


def wait_for(run: Path, *, step: int = 0, event: str = "step") -> None:
    """Until the run has noted a step or an event."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists():
            lines = (run / "metrics.jsonl").read_text().splitlines()
            if any(f'"{event}"' in line and (event != "step" or json.loads(line)["step"] >= step) for line in lines):
                return
        time.sleep(0.02)
    raise AssertionError(f"no {event} in {run}")


def test_gradients_of_one_process_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    numbers = torch.tensor([1.0, 2.0])
    assert processes.add_up([weight], numbers) is numbers
    assert weight.grad is None
