"""The one command that says whether the project is well: lint, format, types, tests. CI runs the same."""

import os
import subprocess
import sys

# two workers of one thread each: most tests are too small to keep two threads busy, and threads of two processes wait for each other
PYTEST = ["pytest", "-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]  # the long files are not the last
STEPS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], PYTEST)


def main() -> int:
    """Runs every step, also after a failure, and returns 1 if any failed."""
    threads = {"OMP_NUM_THREADS": "1"}
    failed = [
        " ".join(step) for step in STEPS if subprocess.run([sys.executable, "-m", *step], check=False, env=os.environ | threads).returncode
    ]
    for step in failed:
        print(f"failed: {step}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
