"""The one command that says whether the project is well: lint, format, types, tests. CI runs the same."""

import subprocess
import sys

STEPS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["pytest", "-q"])


def main() -> int:
    """Runs every step, also after a failure, and returns 1 if any failed."""
    failed = [" ".join(step) for step in STEPS if subprocess.run([sys.executable, "-m", *step], check=False).returncode]
    for step in failed:
        print(f"failed: {step}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
