"""A trial in a process of its own: what counts on a CPU is the memory of the whole process, libraries and all, and a trial that does not
fit takes nobody with it.

The config goes in as TOML, progress and what was found come out as lines of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from typing import Any

from sdlora import config
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.trial import BatchTime, Measured, Progress, TooLargeError, measure

KILLED = -9  # how a process ends that the system takes when memory is short
LOOK_S = 0.2  # between looks whether the answer is still wanted


class UnwantedError(Exception):
    """Nobody waits for the answer any more."""


def tried(
    run: Config, *, memory_limit_bytes: int | None = None, work: bool = False, wanted: Callable[[], bool] | None = None
) -> Iterator[Progress | Measured]:
    """`trial.measure` in a fresh process; the other arguments are the same.

    Args:
        wanted: asked now and then; once it says no, the process is ended.

    Raises:
        UserError, TooLargeError: as `trial.measure`; a process that the system ended was too large.
        UnwantedError: if the answer is not wanted any more.
    """
    if wanted and not wanted():
        raise UnwantedError
    asked = json.dumps({"config": config.to_toml(run), "memory_limit_bytes": memory_limit_bytes, "work": work})
    command = [sys.executable, "-m", "sdlora.trial_process"]
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True) as child:
            answer = yield from _followed(child, asked, wanted)
        if wanted and not wanted():
            raise UnwantedError
        said.seek(0)
        yield understood(answer, child.returncode, said.read())


def _end_when_unwanted(child: subprocess.Popen[str], wanted: Callable[[], bool]) -> None:
    """Opening a large base tells nothing for a long time, so the process is not left to be ended between two lines."""
    while child.poll() is None:
        if not wanted():
            child.kill()
        time.sleep(LOOK_S)


def _followed(child: subprocess.Popen[str], asked: str, wanted: Callable[[], bool] | None) -> Generator[Progress, None, dict[str, Any]]:
    """Asks a child, passes its progress on, and returns its answer; it ends with whoever asked."""
    assert child.stdin
    assert child.stdout
    answer: dict[str, Any] = {}
    try:
        child.stdin.write(asked)
        child.stdin.close()
        if wanted:
            threading.Thread(target=_end_when_unwanted, args=(child, wanted), daemon=True).start()
        for line in child.stdout:
            answer = json.loads(line)
            if "done" in answer:
                yield answer["done"], answer["total"]
    except GeneratorExit:
        child.kill()
        raise
    return answer


def understood(answer: dict[str, Any], code: int, said: str) -> Measured:
    """What a child found.

    Args:
        answer: its last line.
        code: with which it ended, negative for a signal.
        said: on its standard error.

    Raises:
        UserError, TooLargeError: if the child says so, or the system ended it.
    """
    if "refused" in answer:
        raise UserError(answer["refused"])
    if answer.get("too_large") or code == KILLED:
        raise TooLargeError
    if "measured" not in answer:
        raise RuntimeError(f"the trial ended with code {code} and said: {said[-2000:]}")
    values = answer["measured"]
    batches = tuple(BatchTime(**one | {"shape_px": tuple(one["shape_px"])}) for one in values["batches"])
    return Measured(**values | {"batches": batches})


def main() -> None:
    """Reads a config from the standard input and writes one line of JSON for each thing that `trial.measure` yields."""
    asked = json.loads(sys.stdin.read())
    try:
        run = config.parse(tomllib.loads(asked["config"]), where="plan")
        for one in measure(run, memory_limit_bytes=asked["memory_limit_bytes"], work=asked["work"]):
            print(json.dumps({"measured": asdict(one)} if isinstance(one, Measured) else {"done": one[0], "total": one[1]}), flush=True)
    except UserError as problem:
        print(json.dumps({"refused": str(problem)}), flush=True)
    except TooLargeError:
        print(json.dumps({"too_large": True}), flush=True)


if __name__ == "__main__":
    main()
