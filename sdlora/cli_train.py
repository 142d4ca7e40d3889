"""The commands that train: they choose the run folder, follow the run with a progress bar, and turn signals into requests.

The same command again goes on with a run that has not come to its end. Of several processes that a launcher starts only the first speaks.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdlora import cli_runs
from sdlora.cli_runs import is_first
from sdlora.errors import UserError
from sdlora.progress import Bars, console, progress

if TYPE_CHECKING:
    from types import FrameType

    from sdlora.config import Config
    from sdlora.forecast import Forecast

training = typer.Typer()
STOPPING = "\nStopping after this step, and saving; once more ends at once, without what was learned since the last save\n"
RunFolder = Annotated[Path | None, typer.Option("--out", help="the run folder; one below runs/ if not given")]
Changes = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="change a key, e.g. lora.rank=8")]


@training.command()
def train(
    config: Annotated[list[Path] | None, typer.Argument(help="the run's TOML file; several are trained one after the other")] = None,
    changes: Changes = [],  # noqa: B006
    out: RunFolder = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="go on with the run in this folder")] = None,
    allow_changes: Annotated[bool, typer.Option("--allow-changes", help="go on although settings or pictures have changed")] = False,
    sweep: Annotated[list[str], typer.Option("--sweep", metavar="KEY=A,B", help="a run for each value, and a comparison")] = [],  # noqa: B006
    plan_first: Annotated[bool, typer.Option("--plan", help="forecast the run first, and begin it only if it fits")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be done, and stop")] = False,
) -> None:
    """Trains a LoRA as a TOML file says; the same command again goes on with a run that was interrupted."""
    from sdlora import config as configs

    paths, axes = cli_runs.parted(config or [], sweep)
    if not paths and not resume:
        raise UserError("Name the run's TOML file, or a run folder with --resume.")
    if len(paths) > 1 or axes:
        if resume:
            raise UserError("--resume is for one run; the same command again goes on with a queue or a sweep.")
        one = partial(train_one, allow_changes=allow_changes)
        cli_runs.train_many(paths, changes=changes, sweep=axes, out=out, train_one=one, dry_run=dry_run)
    if not paths and resume and not (resume / "config.toml").is_file():
        raise UserError(f"--resume {resume}: there is no run; name the folder that a run was written to, with its config.toml.")
    paths = paths or [(resume or Path()) / "config.toml"]
    run = configs.load(paths[0], changes=changes)
    if dry_run:
        show_plan(run)
        if resume:
            print(f"# goes on with the run in {resume}, whose config.toml holds every value, so that all count as set")
        return
    wanted, given = Path("runs") / run.name, resume or out
    folder, goes_on = folder_for(wanted, given)
    if not goes_on and folder not in (wanted, given):
        leave_if_done(earlier(wanted), run)
    if resume and not goes_on:
        refuse_unless_longer(resume, run)
        goes_on = True
    told = forecast(run, measure=True) if plan_first else None
    if told and told.changes:
        raise UserError("The run does not fit as it is; give the words above, and it does.")
    path = follow(run, folder, resume=goes_on, allow_changes=allow_changes, forecast=told)
    if is_first():
        console.print(f"The LoRA after the last step: {path}", soft_wrap=True)


@training.command()
def plan(
    config: Annotated[Path, typer.Argument(help="the run's TOML file")],
    changes: Changes = [],  # noqa: B006
    measure: Annotated[bool, typer.Option("--measure/--count-only", help="try some steps on the device, or only count")] = True,
) -> None:
    """Forecasts a run: memory, time per step, time in all, disk; and with which settings it fits if it does not."""
    from sdlora import config as configs

    forecast(configs.load(config, changes=changes), measure=measure)


def forecast(run: Config, *, measure: bool) -> Forecast:
    """Plans a run with a progress bar and says what it will take."""
    from sdlora import plan as story
    from sdlora import prepare

    with progress(quiet=not is_first()) as bar:
        made: Forecast = bar.run("trying some steps", story.plan(prepare.linked_run(run).run, measure=measure))
        for line in made.lines():
            bar.print(line)
    return made


def train_one(run: Config, folder: Path, *, allow_changes: bool) -> Path:
    """One run of several: begun in its folder, or gone on with there."""
    from sdlora import run_folder

    return follow(run, folder, resume=run_folder.is_unfinished(folder), allow_changes=allow_changes)


def folder_for(wanted: Path, given: Path | None) -> tuple[Path, bool]:
    """The run folder, and whether a run in it is gone on with.

    Args:
        wanted: the folder of the first run of that name; later ones have a number behind it.
        given: by the user; taken as it is.
    """
    from sdlora import run_folder

    if given is not None:
        return given, run_folder.is_unfinished(given)
    before = earlier(wanted)
    if before and run_folder.is_unfinished(before[-1]):
        return before[-1], True
    return numbered(wanted, len(before) + 1), False


def numbered(first: Path, number: int) -> Path:
    """The folder of a run of a name, by how many of that name there are with it."""
    return first if number == 1 else first.with_name(f"{first.name}-{number}")


def earlier(first: Path) -> list[Path]:
    """The folders of the runs of a name that have begun, in order."""
    return list(takewhile(lambda one: (one / "metrics.jsonl").exists(), (numbered(first, number) for number in count(1))))


def leave_if_done(before: Sequence[Path], run: Config) -> None:
    """Says what earlier runs of a name have come to; the same settings and pictures are not trained a second time unless asked for.

    Args:
        before: folders of the runs of that name, at least one.

    Raises:
        UserError: if the base is none that is known.
        typer.Exit: with 0 if one of them is what is asked for.
    """
    from sdlora import many, prepare, run_folder

    linked = prepare.linked_run(run).run
    if same := next((folder for folder in before if many.has_been(folder, linked)), None):
        more = f"sdlora train --resume {same} {run_folder.longer_by(linked.steps)}"
        words = f"This was done already, with the same settings and pictures: {same}. To train on from its end: {more}. "
        if is_first():
            console.print(f"{words}To do it all again: --out FOLDER.", soft_wrap=True)
            console.print(f"The LoRA after the last step: {run_folder.result_path(same, run.name)}", soft_wrap=True)
        raise typer.Exit
    if is_first():
        words = f"Earlier runs of this name have come to their end, the last in {before[-1]}, so this is a new one, from the beginning"
        console.print(f"{words}; `--resume {before[-1]}` with more steps and --allow-changes trains on from an end.", soft_wrap=True)


def refuse_unless_longer(folder: Path, run: Config) -> None:
    """Of runs that are not unfinished only one that shall take more steps than it has goes on.

    Raises:
        UserError: if it is not one.
    """
    from sdlora import run_folder

    if 0 < (ended := run_folder.ended_at(folder)) < run.steps:
        return
    said = "no run has begun there"
    if ended:
        fewer = f", not {run.steps}" if run.steps < ended else ""
        said = f"the run has come to its end after {ended} steps{fewer}; for more of them give {run_folder.longer_by(ended)}"
    raise UserError(f"--resume {folder}: {said}.")


def follow(run: Config, folder: Path, *, resume: bool = False, allow_changes: bool = False, forecast: Forecast | None = None) -> Path:
    """Runs the training with a progress bar.

    Returns:
        The LoRA file.

    Raises:
        UserError: as `train.train`.
        typer.Exit: with 130 or 143 if a signal has ended it; a second signal ends at once.
    """
    from sdlora import events, run_folder, run_lock

    quiet = not is_first()
    if not quiet:
        run_lock.refuse_held(folder)
        if not resume:
            run_folder.check_free(folder)
    from sdlora import train as story  # takes seconds: what can be refused has been

    with progress(quiet=quiet) as bar, signals_ask_to_stop(folder, quiet=quiet) as signals:
        told = forecast.row() if forecast else None
        for i, event in enumerate(story.train(run, folder, resume=resume, allow_changes=allow_changes, forecast=told)):
            if not i:  # nothing was refused
                bar.print(f"{'Going on with run' if resume else 'Run'} folder {folder}")
            signals.begun = signals.begun or isinstance(event, events.Started)
            path = show(event, run, bar)
            if path:
                return path
    raise typer.Exit(128 + signals.caught[0] if signals.caught else 130)


def show(event: object, run: Config, bar: Bars) -> Path | None:
    """One event as a bar or a line; the path of the LoRA file with the last."""
    from sdlora import events

    match event:
        case events.Checking(done, total):
            bar.show("looking at pictures", done, total)
        case events.Checked():
            for line in event.lines:
                if line.startswith(("warns", "notes")):
                    bar.print(line)
        case events.Drawing(done, total):
            bar.show("drawing regularisation pictures", done, total)
        case events.Encoding(done, total):
            bar.show("encoding pictures", done, total)
        case events.Started():
            bar.print(
                f"{event.base}; {event.pictures} pictures; LoRA of rank {run.lora.rank} in {event.modules} modules, "
                f"{event.parameters:,} parameters; {event.steps} steps of {run.batch}"
            )
            for limit in event.limits:
                bar.print(f"Note: {limit}")
        case events.Continued(step, notes):
            bar.print(f"Going on after step {step}" if step else "No state was saved yet: from the beginning")
            for note in notes:
                bar.print(f"Note: {note}")
        case events.Validated(step, held_out, seen, _, drift):
            held = "" if held_out is None else f"held-out loss {held_out:.4f}, "
            bar.print(f"Step {step}{'' if step else ', the base'}: {held}seen {seen:.4f}, drift {100 * drift:.1f} %")
        case events.Step():
            bar.show("training", event.step, run.steps, f"loss {event.loss:.4f}")
        case events.Paused(step):
            bar.print(f"Paused after step {step}; delete the file 'pause' in the run folder to go on")
        case events.Alarm(_, words):
            bar.print(f"Warning: {words}")
        case events.Stopped(step, path):
            bar.print(f"Stopped after step {step}; the LoRA so far is {path}, and the same command goes on")
        case events.Proving(done, total):
            bar.show("drawing the comparison", done, total)
        case events.Reported(path, verdict, best, strength):
            bar.print(f"{verdict}\nThe report: {path}".strip())
            if best:
                bar.print(f"Use {best} at strength {strength:g}")
        case events.Done(path):
            return path
    return None


@dataclass
class Signals:
    """What the process was sent, and whether there is something to save yet."""

    caught: list[int]
    begun: bool = False


@contextmanager
def signals_ask_to_stop(folder: Path, *, quiet: bool = False) -> Iterator[Signals]:
    """While it lasts, the first SIGINT or SIGTERM asks the run to save and end, and the second ends at once.

    A launcher passes a Ctrl-C on as SIGTERM to processes that have had it already; for these only a second of the same kind counts.
    """
    from sdlora import run_folder

    signals, launched = Signals([]), "RANK" in os.environ

    def ask(number: int, frame: FrameType | None) -> None:
        again = number in signals.caught if launched else bool(signals.caught)
        signals.caught.append(number)
        if again or not signals.begun:
            raise SystemExit(128 + number)
        run_folder.ask(folder, "stop")
        if not quiet:
            os.write(2, STOPPING.encode())  # at any moment: `print` may be at work just now, and cannot be called inside itself

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_plan(run: Config) -> None:
    """The resolved config with the reasons, and what it would train on; everything that can be checked without training is."""
    from sdlora import base_files, base_model, linked, material, prepare
    from sdlora import config as configs

    found = prepare.linked_run(run)
    run = found.run
    pictures = material.find_or_refuse(run)
    samples = pictures.samples
    what = base_files.identify(run.base, family=run.family, prediction=run.prediction)
    base_model.targets(run.lora.targets)
    print(configs.to_toml(run))
    for key, description in configs.unset(run).items():
        print(f"# {key} is not set: {description}")
    print("# Linked to each other, and why:")
    for line in linked.lines(found):
        print(f"#   {line}")
    visits = run.steps * run.batch * run.optimizer.accumulation
    sides = len(run.resolution_px) if isinstance(run.resolution_px, list) else 1
    epoch = sum(sample.repeats for sample in samples) * sides
    held_out = len(pictures.held_out)
    print(f"# {len(samples)} pictures to learn from and {held_out} held out; {epoch} visits are an epoch")
    print(f"# {visits} visits in {run.steps} steps = {visits / epoch:.1f} epochs")
    if not run.trigger:
        print('# No trigger word: the LoRA will change every prompt; trigger = "a-made-up-word" lets it be called.')
    print(f"# base: {what.sentence}")
