"""Several runs from one command: a queue of configs, or a sweep over settings; `comparison` says at the end what each came to.

All configs, bases and folders are looked at before the first run begins: a slip of the pen in the last of them costs a second, not a
night. One run that fails does not stop the next. Each run has a folder of its own below the queue's, named after what is different in
it, so the same command again finds what is done and goes on with the rest.
"""

from __future__ import annotations

import gc
import itertools
import re
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sdlora import checkpoint, comparison, config, material, prepare, resuming, run_folder, runs
from sdlora.comparison import Outcome
from sdlora.config import Config
from sdlora.errors import UserError

ENDED = 130  # the exit code of a program that Ctrl-C has ended
LONGEST_NAME = 100  # file systems allow 255 bytes, and checkpoints' names are longer
_BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}


@dataclass(frozen=True)
class Job:
    """One run to be done.

    Args:
        config: with a name of its own among the jobs.
        settings: what the sweep changes in it, as it was typed.
    """

    config: Config
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Begun:
    """A run begins, the `place`-th of `total`."""

    place: int
    total: int
    job: Job
    folder: Path


# What is to be done


def expand(paths: Sequence[Path], changes: Sequence[str], sweep: Sequence[str]) -> list[Job]:
    """Each config with each combination of the sweep's values, the last word's value changing fastest.

    Args:
        paths: TOML files of runs.
        changes: "key=value" for all of them.
        sweep: "key=value,value,…", the values in TOML; commas in brackets or quotes do not part them.

    Raises:
        UserError: if a config or a value is not allowed, or a word of the sweep is malformed.
    """
    axes = [_axis(word) for word in sweep]
    keys = [key for key, _ in axes]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"--sweep names {twice} twice; name it once, with all its values: {twice}=1,2,3.")
    jobs: list[Job] = []
    for path in paths:
        for values in itertools.product(*(values for _, values in axes)):
            settings = dict(zip(keys, values, strict=True))
            run = config.load(path, changes=[*changes, *(f"{key}={value}" for key, value in settings.items())])
            name = _free(_name(run.name, settings), {job.config.name for job in jobs})
            jobs.append(Job(run.model_copy(update={"name": name}), settings))
    return jobs


def default_folder(jobs: Sequence[Job], *, first_name: str) -> Path:
    """Where the runs of a command lie if nobody says otherwise; the same for the same command, so that it goes on there.

    Args:
        first_name: the first config's own name, without what a sweep adds to it.
    """
    swept = any(job.settings for job in jobs)
    return Path("runs") / (f"{first_name}-sweep" if swept else f"{first_name}-and-{len(jobs) - 1}-more")


def split_values(text: str) -> list[str]:
    """The values of a sweep, parted at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        depth += 0 if quote else _BRACKETS.get(char, 0)
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _axis(word: str) -> tuple[str, list[str]]:
    key, equals, text = word.partition("=")
    values = split_values(text)
    if not equals or not key.strip() or not all(values):
        raise UserError(f"--sweep {word}: expected key=value,value,…, for example lora.rank=8,16,32.")
    if twice := next((value for value in values if values.count(value) > 1), None):
        raise UserError(f"--sweep {word}: {twice} stands there twice; name each value once.")
    return key.strip(), values


def _name(name: str, settings: Mapping[str, str]) -> str:
    """The run's name with what is different in it, in letters that names of runs may have."""
    last = [key.rpartition(".")[2] for key in settings]
    parts = [
        f"{key.replace('.', '_') if last.count(short) > 1 else short}-{_shown(value)}"
        for (key, value), short in zip(settings.items(), last, strict=True)
        if key != "name"
    ]
    return "-".join([name, *parts])[:LONGEST_NAME].rstrip("-. ")


def _shown(value: str) -> str:
    """A value as part of a name: 1e-4 as 0.0001, a path as its last part."""
    try:
        read = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        read = value
    if isinstance(read, float):
        return f"{read:g}"
    if isinstance(read, str):
        read = PurePosixPath(read.replace("\\", "/")).name
    return re.sub(r"[^\w.]+", "-", str(read).lower() if isinstance(read, bool) else str(read)).strip("-.") or "empty"


def _free(name: str, taken: set[str]) -> str:
    return next(one for one in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2))) if one not in taken)


# Doing it


def run(jobs: Sequence[Job], folder: Path, train_one: Callable[[Config, Path], Path], *, writes: bool = True) -> Iterator[Begun | Outcome]:
    """Does one job after the other; after each, the comparison of all is written anew.

    Args:
        folder: the queue's; each run has a folder of its name in it.
        train_one: trains a config in a folder, going on with an unfinished run that is there, and returns the LoRA file. UserError and
            any other exception end this run alone; KeyboardInterrupt and SystemExit end the queue.
        writes: whether this process writes the comparison; of several that a launcher starts, one does.

    Yields:
        Begun before each run and its Outcome after it; at the end an Outcome for each that was not begun.

    Raises:
        UserError: if the folder holds the comparison of other runs, or one of these that is done with other settings or pictures, or
            cannot be written.
    """
    if writes:
        comparison.check_own(folder, [job.config.name for job in jobs])
    finished = [_is_done(job, folder / job.config.name) for job in jobs]
    waiting = [Outcome(job.config.name, job.settings, folder / job.config.name, "not begun") for job in jobs]
    ended: list[Outcome] = []
    for place, (job, is_done) in enumerate(zip(jobs, finished, strict=True), start=1):
        yield Begun(place, len(jobs), job, folder / job.config.name)
        ended.append(_outcome(job, folder / job.config.name, None if is_done else train_one))
        if writes:
            comparison.write(folder, [*ended, *waiting[place:]])
        yield ended[-1]
        if ended[-1].state == "stopped" or ended[-1].code == ENDED:
            yield from waiting[place:]
            return
        gc.collect()  # a base that a failed run leaves in a circle is gone before the next is loaded


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 if all are done; that of the signal if the user ended the queue; 1 if a run crashed, which is our bug; else 2."""
    codes = {one.state: one.code for one in outcomes if one.code}
    return next((codes[state] for state in ("stopped", "done", "crashed", "failed") if state in codes), 0)


def _outcome(job: Job, folder: Path, train_one: Callable[[Config, Path], Path] | None) -> Outcome:
    """Trains one job, unless it is done already, and says what has become of it."""
    state, words, code, trace = "done", "" if train_one else "It was done already.", 0, ""
    try:
        if train_one:
            train_one(job.config, folder)
            if run_folder.is_asked(folder, "stop"):  # too late for this run, which had taken its last step, but not for the queue
                code = ENDED
    except UserError as problem:
        state, words, code = "failed", str(problem), 2
    except (KeyboardInterrupt, SystemExit) as ending:
        given = ending.code if isinstance(ending, SystemExit) else ENDED
        state, words, code = "stopped", "The user ended it; the same command goes on.", given if isinstance(given, int) and given else ENDED
    except Exception as problem:
        state, words, code = "crashed", f"{type(problem).__name__}: {problem}".rstrip(": "), 1
        trace = traceback.format_exc()
    measured = comparison.measured(folder) if state == "done" else {}
    return Outcome(job.config.name, job.settings, folder, state, words, code, trace=trace, **measured)


def _is_done(job: Job, folder: Path) -> bool:
    if runs.look(folder).state != "done":
        return False
    if others := differs(folder, prepare.linked_run(job.config).run):
        raise UserError(f"Run folder {folder} holds a finished run with other {others}; choose another with --out, or move it away.")
    return True


def differs(folder: Path, run: Config) -> str:
    """What of a run is not as in a run folder, "settings" or "pictures"; "" if the same would come out again.

    Args:
        run: resolved (see `prepare.linked_run`).
    """
    if config.to_toml(config.load(folder / "config.toml")) != config.to_toml(run):
        return "settings"
    facts, found = checkpoint.newest_facts(run_folder.states_path(folder)), material.find(run)
    return "" if facts is None or resuming.pictures(found.samples, found.held_out).items() <= facts.items() else "pictures"


def has_been(folder: Path, run: Config) -> bool:
    """Whether a run folder holds a whole run with these settings and pictures; one that cannot be read does not.

    Args:
        run: resolved, as for `differs`.
    """
    try:
        return run_folder.ended_at(folder) > 0 and run_folder.result_path(folder, run.name).is_file() and not differs(folder, run)
    except UserError:
        return False


def refuse_unready(jobs: Sequence[Job], folder: Path) -> None:
    """What can be seen without training is said before the first run begins, not when a run's turn comes at night.

    Args:
        folder: the queue's, with the runs that are done already.

    Raises:
        UserError: if a base or the pictures of a run that is still to be done cannot be used.
    """
    wrong = []
    for job in jobs:
        if runs.look(folder / job.config.name).state == "done":
            continue
        try:
            material.find_or_refuse(prepare.linked_run(job.config).run)
        except UserError as problem:
            wrong.append(f"{job.config.name}: {problem}")
    if wrong:
        raise UserError("\n".join([*wrong, "No run was begun; mend this, or leave it out."]))
