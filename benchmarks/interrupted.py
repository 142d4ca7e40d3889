"""Whether a run that is killed at any moment and goes on ends in the same bytes as one that was never killed.

    python -m benchmarks.interrupted --out FOLDER [--kills 200] [--seed 0] [--steps 16] [--resume-everywhere]

Each run is a forked process that dies of `kill -9`: before or after one of its own calls that change the disk (a write is cut in half),
at one of its statements, or when some seconds have passed. The same command then goes on, in every third run only to be killed again.
At the end every file in the run folder, the LoRA first, must be that of an unbroken run, and the metrics must tell the same story once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.smallest import STEPS, exacting, make_base, make_pictures
from sdlora import run_folder, train
from sdlora.config import Config

CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")  # of os; opened files' writes, flushes and closing besides
STORY = {"train", "course", "prepare", "resuming", "checkpoint", "result", "run_folder", "run_lock", "files"}  # whose statements count
TOLD_ONCE = {"step", "validated", "sampled", "saved", "done"}  # events; how often a run began is not one
OF_THE_MACHINE = {"time_s", "step_s", "elapsed_s", "peak_bytes"}
AGAIN = 1 / 3  # chance that a run which goes on is killed once more
CALLS_IN_SAVES, OTHER_CALLS, STATEMENTS = 0.5, 0.1, 0.2  # shares of the first kills; the rest are moments in time


@dataclass(frozen=True)
class Moment:
    """When a process is killed: at a call or a statement of this number, counted from 1, or after as many seconds."""

    kind: str
    number: float
    after: bool = False


@dataclass(frozen=True)
class Measured:
    """What an unbroken run does: its calls and statements in order, and how long it takes."""

    calls: list[str]
    statements: list[str]
    elapsed_s: float


# --- a process that dies ------------------------------------------------------------------------------------------------------


def go_on(run: Config, folder: Path) -> None:
    """The same command as before: begins, or goes on with what is there; a run that has come to its end is left alone."""
    os.environ["SDLORA_CACHE"] = str(folder.with_name(f"{folder.name}-cache"))
    unfinished = run_folder.is_unfinished(folder)
    if unfinished or not (folder / "metrics.jsonl").exists():
        for _ in train.train(run, folder, resume=unfinished):
            pass


def forked(work: Callable[[int], None], *, kill_after_s: float | None = None) -> tuple[bool, str]:
    """Does something in a process of its own.

    Args:
        work: gets a handle to which it may write what it has to say.
        kill_after_s: when it is killed from outside.

    Returns:
        Whether it came to its end, and what it said.
    """
    heard, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            work(told)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(told)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(heard, "rb") as file:
        said = file.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"A run ended with {code}, and not because it was killed; what it said stands above.")
    return code == 0, said


def counted(tell: int, moment: Moment | None, *, list_all: bool = False) -> Callable[..., bool]:
    """A function that is told of each call or statement, and kills the process at the wanted one; says where with its last breath."""
    seen = 0

    def count(place: str, *, after: bool) -> bool:
        nonlocal seen
        seen += not after
        if list_all and not after:
            os.write(tell, f"{place}\n".encode())
        if moment is None or seen != moment.number or after != moment.after:
            return False
        os.write(tell, f"{place}, {'after' if after else 'before'} it".encode())
        return True

    return count


def die() -> None:
    """As if from outside."""
    os.kill(os.getpid(), signal.SIGKILL)


def watch_calls(folder: Path, count: Callable[..., bool]) -> None:
    """From now on this process tells of every call that changes the disk; a write at which it dies is cut in half."""
    real_open = io.open

    def watched(name: str, call: Callable[..., Any], path: Any, half: Callable[..., None] | None = None) -> Callable[..., Any]:
        def calling(*args: Any, **more: Any) -> Any:
            place = f"{name} {shortened(folder, path if path is not None else args[0])}"
            if count(place, after=False):
                if half is not None:
                    half(*args)
                die()
            answer = call(*args, **more)
            if count(place, after=True):
                die()
            return answer

        return calling

    def opened(path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        if not set(mode) & {"w", "a"}:
            return real_open(path, mode, *args, **more)
        file = watched("open", real_open, path)(path, mode, *args, **more)
        return Watched(file, lambda name, call, half=None: watched(name, call, path, half))

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name), None))
    io.open = opened  # type: ignore[assignment]  # what pathlib calls


class Watched:
    """An open file whose writes, flushes and closing are told of."""

    def __init__(self, file: Any, watched: Callable[..., Any]) -> None:
        self.file, self.fileno = file, file.fileno
        self.write = watched("write", file.write, lambda content: (file.write(content[: len(content) // 2]), file.flush()))
        self.flush, self.close = watched("flush", file.flush), watched("close", file.close)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shortened(folder: Path, path: Any) -> str:
    """A path or an open file's as it is called in the run folder, without process numbers."""
    whole = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)  # noqa: PTH115
    return re.sub(r"\.\d+\.(part|gone)", r".\1", whole.replace(f"{folder}/", ""))


def watch_statements(count: Callable[..., bool]) -> None:
    """From now on this process tells of every statement of the story's files, before it is done."""

    def called(frame: Any, event: str, arg: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if path.stem not in STORY or path.parent.name != "sdlora":
            return None

        def line(frame: Any, event: str, arg: Any) -> Any:
            if event == "line" and count(f"statement {path.name}:{frame.f_lineno}", after=False):
                die()
            return line

        return line

    sys.settrace(called)


def attempt(run: Config, folder: Path, moment: Moment | None) -> tuple[bool, str]:
    """Trains in a process of its own, in an own cache beside the run folder, and kills it at a moment, if it lives so long."""

    def work(tell: int) -> None:
        count = counted(tell, moment)
        if moment and moment.kind == "call":
            watch_calls(folder, count)
        if moment and moment.kind == "statement":
            watch_statements(count)
        go_on(run, folder)

    done, place = forked(work, kill_after_s=moment.number if moment and moment.kind == "time" else None)
    return done, place or f"{moment.number:.2f} s, {reached(folder)}" if moment else ""


def reached(folder: Path) -> str:
    """How far a run came, by its metrics."""
    rows = run_folder.rows(folder)
    return f"after {rows[-1]['event']} {rows[-1].get('step', '')}".strip() if rows else "before its first row"


# --- what is compared ---------------------------------------------------------------------------------------------------------


def measured(run: Config, folder: Path) -> Measured:
    """What an unbroken run does, seen three times; its folder stays for comparison."""
    began = time.monotonic()
    forked(lambda _: go_on(run, folder))
    elapsed_s = time.monotonic() - began
    seen = []
    for name, watch in (("calls", lambda where, count: watch_calls(where, count)), ("lines", lambda _, count: watch_statements(count))):
        other = folder.with_name(name)

        def work(tell: int, other: Path = other, watch: Callable[..., None] = watch) -> None:
            watch(other, counted(tell, None, list_all=True))
            go_on(run, other)

        seen.append(forked(work)[1].splitlines())
        if found := differences(other, folder):
            raise SystemExit(f"Two unbroken runs differ: {', '.join(found)}")
    return Measured(seen[0], seen[1], elapsed_s)


def differences(folder: Path, unbroken: Path) -> list[str]:
    """The files that are not those of the unbroken run, too many or missing; nothing if all are."""
    here, there = contents(folder), contents(unbroken)
    found = [name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]
    return found + (["metrics.jsonl"] if story(folder) != story(unbroken) else [])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path; but not the metrics, which hold times, nor the lock of a run that was killed when all was done."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("metrics.jsonl", "run.lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def story(folder: Path) -> list[dict[str, Any]]:
    """What the metrics tell of the run, not of the machine."""
    rows = [row for row in run_folder.rows(folder) if row["event"] in TOLD_ONCE]
    return [{key: value for key, value in row.items() if key not in OF_THE_MACHINE} for row in rows]


def is_in_save(place: str) -> bool:
    """Whether a call belongs to a save: of a state, of a LoRA file, or of what is deleted after one."""
    return bool(re.match(r"\w+ (state|checkpoints|\.?tiny\.safetensors)", place))


def moments(seen: Measured, chance: random.Random) -> Moment:
    """A random first kill: calls in saves as often as all others."""
    draw = chance.random()
    if draw < CALLS_IN_SAVES + OTHER_CALLS:
        wanted = draw < CALLS_IN_SAVES
        numbers = [number for number, place in enumerate(seen.calls, 1) if is_in_save(place) == wanted]
        return Moment("call", chance.choice(numbers), chance.random() < 0.5)
    if draw < CALLS_IN_SAVES + OTHER_CALLS + STATEMENTS:  # any place in the code, then any time that it is passed
        place = chance.choice(sorted(set(seen.statements)))
        return Moment("statement", chance.choice([number for number, one in enumerate(seen.statements, 1) if one == place]))
    return Moment("time", chance.uniform(0, seen.elapsed_s))


def killed(run: Config, folder: Path, seen: Measured, chance: random.Random) -> list[str]:
    """Kills a run, once or more often, and brings it to its end; returns where, nothing if it was faster."""
    places = []
    while not places or chance.random() < AGAIN:
        done, place = attempt(run, folder, moments(seen, chance))
        if done:
            break
        places.append(place)
    attempt(run, folder, None)
    return places


def kill(run: Config, out: Path, *, kills: int, seed: int) -> int:
    """Kills so many runs, says where, and returns how many did not end in the same bytes."""
    seen = measured(run, out / "unbroken")
    print(f"an unbroken run makes {len(seen.calls)} calls and takes {seen.elapsed_s:.1f} s", flush=True)
    chance, number, all_places, bad = random.Random(seed), 0, [], 0
    while number < kills:
        folder = out / "killed"
        places = killed(run, folder, seen, chance)
        if places:
            number += 1
            found = differences(folder, out / "unbroken")
            bad += bool(found)
            all_places += places
            print(f"{number:4} {'; then '.join(places)}: {', '.join(found) or 'the same'}", flush=True)
            if found:
                shutil.copytree(folder, out / f"differs-{number}")
        shutil.rmtree(folder)
        shutil.rmtree(folder.with_name("killed-cache"), ignore_errors=True)
    print(
        f"{len(all_places)} kills, {sum(map(is_in_save, all_places))} of them inside a save; the same bytes: {kills - bad} of {kills} runs"
    )
    return bad


def resume_everywhere(run: Config, out: Path) -> int:
    """Goes on from every step of a run to its end; returns how often that was not the same LoRA."""
    go_on(run, out / "whole")
    wanted, bad = run_folder.result_path(out / "whole", run.name).read_bytes(), 0
    for step in range(run.steps):
        folder = begun(out / "whole", out / "again", step)
        go_on(run, folder)
        same = run_folder.result_path(folder, run.name).read_bytes() == wanted and story(folder) == story(out / "whole")
        bad += not same
        print(f"{step:4} {'the same' if same else 'differs'}", flush=True)
        shutil.rmtree(folder)
    print(f"gone on from every step to the end, the same bytes: {run.steps - bad} of {run.steps}")
    return bad


def begun(whole: Path, folder: Path, step: int) -> Path:
    """A run folder as a kill after a step would leave it, from that of a run which kept the state of every step."""
    folder.mkdir()
    shutil.copy(whole / "config.toml", folder)
    rows = run_folder.rows(whole)
    ends = (number for number, row in enumerate(rows) if row["event"] == "done" or (row["event"], row.get("step")) == ("step", step + 1))
    until = next(ends)
    torn = json.dumps(rows[until])[:-9]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:until]) + torn)
    if step:
        shutil.copytree(whole / "state" / f"{step:06d}", folder / "state" / f"{step:06d}")
    return folder


def main() -> None:
    """Reads the command, makes base and pictures, and kills or goes on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--resume-everywhere", action="store_true", help="instead go on from each of 50 steps to the end")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out = options.out.absolute()
    out.mkdir(parents=True)
    forked(lambda _: (make_base(out / "base"), make_pictures(out / "pictures"), None)[-1])  # the parent has imported and done nothing else
    run = exacting(out / "base" / "pipeline", out / "pictures", steps=options.steps)
    if options.resume_everywhere:
        run = exacting(out / "base" / "pipeline", out / "pictures", steps=50, save_every=1, keep_last=50)
        raise SystemExit(resume_everywhere(run, out) > 0)
    raise SystemExit(kill(run, out, kills=options.kills, seed=options.seed) > 0)


if __name__ == "__main__":
    main()
