"""The promise to small machines: one training step of a full-size Stable Diffusion 1.5 on a CPU fits into 12 GiB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.huge
def test_a_full_size_sd15_step_on_the_cpu_needs_less_than_12_gib(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.full_size_step", "--family", "sd1", "--out", str(tmp_path), "--json"]
    figures = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert figures["modules"] == 192
    assert figures["steps"] == 1
    assert figures["peak_process_GiB"] < 12
