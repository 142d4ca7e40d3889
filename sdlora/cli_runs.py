"""The commands around many runs: the list of runs, what is given away of one, and the queue or sweep that `train` becomes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from sdlora.errors import UserError
from sdlora.progress import console, progress

if TYPE_CHECKING:
    from sdlora.comparison import Outcome
    from sdlora.config import Config
    from sdlora.many import Job
    from sdlora.runs import Best, Run

several = typer.Typer()
WIDE = 200  # characters of a table that goes into a file or a pipe, where nothing is to be broken
RUNS = Path("runs")


@several.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="the folder of runs")] = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Lists runs: state, steps, the checkpoint that you have marked or that each recommends, size."""
    from sdlora import chosen
    from sdlora import runs as room

    if not folder.is_dir() and folder != RUNS:
        raise UserError(f"Folder {folder} does not exist; give the folder that holds the runs.")
    found = room.find(folder)
    if as_json:
        told = [asdict(replace(run, best=chosen.best(run))) | {"recommended": run.best and asdict(run.best)} for run in found]
        print(json.dumps(told, indent=2, ensure_ascii=False, default=str))
        return
    if not found:
        console.print(f"No runs in {folder}; sdlora train CONFIG begins one.", soft_wrap=True)
        return
    heads = ["run", "state", "step", "best", "size", "base", "kind", "trigger", "last sign"]
    show(heads, [_row(run, chosen.marked(run)) for run in found])
    for run in found:
        if run.trouble:
            console.print(f"{run.folder}: {run.trouble}", highlight=False, soft_wrap=True)


@several.command()
def share(
    run: Annotated[Path, typer.Argument(help="a run folder, or the name of one in runs/")],
    out: Annotated[Path | None, typer.Option(help="the new folder, with a .zip beside it; shared/<name> if not given")] = None,
    checkpoint: Annotated[int | None, typer.Option(metavar="STEP", min=1, help="which step; what the run recommends if not given")] = None,
    keep_prompts: Annotated[
        bool,
        typer.Option(
            "--keep-prompts/--strip-prompts", help="prompts in pictures and card, tags of captions and names of folders in the file"
        ),
    ] = False,
    licence: Annotated[str, typer.Option("--license", help="such as cc-by-4.0; the config's output.license if not given")] = "",
    base_model: Annotated[str, typer.Option(metavar="OWNER/NAME", help="the base on the Hugging Face hub, if yours is a file")] = "",
    push_to_hub: Annotated[str, typer.Option(metavar="OWNER/NAME", help="also upload it to a new repository of the Hugging Face hub")] = "",
    private: Annotated[bool, typer.Option("--private", help="a private repository")] = False,
) -> None:
    """Makes a folder and a zip of a run to give away: LoRA, sidecar, preview, model card, samples; no path of this machine is inside."""
    from sdlora import share as story

    wishes = story.Wishes(checkpoint, keep_prompts, licence, base_model, push_to_hub)
    named = Path("runs") / run
    made = story.share(named if not run.exists() and named.is_dir() else run, out, wishes=wishes)
    said = [
        f"Shared: step {made.choice.step}, to be used at strength {made.choice.strength:g}",
        *([made.choice.reason] if made.choice.reason else []),
        "Prompts, captions' tags and names of folders are inside, for all to read."
        if keep_prompts
        else "Prompts, captions' tags and names of folders were left out; --keep-prompts puts them in.",
        f"{made.pictures} sample pictures",
        f"The folder: {made.folder}",
        f"The zip:    {made.archive}",
    ]
    for line in said:
        console.print(line, highlight=False, soft_wrap=True)
    if push_to_hub:
        console.print(f"On the hub: {story.push(made.folder, push_to_hub, private=private)}", highlight=False, soft_wrap=True)


# --- for `train` --------------------------------------------------------------------------------------------------------------


def parted(words: Sequence[Path], sweep: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Configs and words of a sweep: `--sweep a=1,2 b=3,4` gives the command line's reader only the first of them as its value.

    Args:
        words: the positional ones.
    """
    behind = [str(one) for one in words if sweep and "=" in str(one) and not one.exists()]
    return [one for one in words if str(one) not in behind], [*sweep, *behind]


def train_many(
    configs: Sequence[Path],
    *,
    changes: Sequence[str],
    sweep: Sequence[str],
    out: Path | None,
    train_one: Callable[[Config, Path], Path],
    dry_run: bool = False,
) -> NoReturn:
    """Trains several configs, or each with all combinations of a sweep's values, and compares what came of them.

    Args:
        configs, sweep: as `parted` gives them.
        out: the folder that the runs' folders are made in.
        train_one: trains a config in a folder, goes on with an unfinished run that is there, and returns the LoRA file.

    Raises:
        UserError: if a config or the sweep is not allowed, pictures or base of a run cannot be used, or the folder holds other runs'
            comparison.
        typer.Exit: always; 0 if all are done or only shown, 130 or 143 if the user ended the queue, 1 if a run crashed, 2 if one failed.
    """
    from sdlora import config, many

    leads = is_first()
    jobs = many.expand(configs, changes, sweep)
    folder = out or many.default_folder(jobs, first_name=config.load(configs[0], changes=list(changes)).name)
    many.refuse_unready(jobs, folder)
    if dry_run:
        _show_jobs(jobs, folder)
        raise typer.Exit()
    ended: list[Outcome] = []
    for event in many.run(jobs, folder, lambda run, place: _without_exit(train_one, run, place), writes=leads):
        if isinstance(event, many.Begun):
            _say(f"Run {event.place} of {event.total}: {event.job.config.name}", leads)
        else:
            ended.append(event)
            _say_ending(event, leads)
    if leads:
        _compare(jobs, ended, folder, swept=bool(sweep))
    raise typer.Exit(many.exit_code(ended))


def is_first() -> bool:
    """Whether this is the process that speaks; a launcher numbers those that it starts."""
    return int(os.environ.get("RANK", "0")) == 0


def show(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; words in it are never taken for markup."""
    table = Table(*(Column(head, overflow="fold") for head in heads), box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*row)
    wide = console if console.is_terminal else Console(file=console.file, width=WIDE, markup=False)
    wide.print(table, highlight=False)


def _without_exit(train_one: Callable[[Config, Path], Path], run: Config, folder: Path) -> Path:
    """The same; an exit that the command line's library would take for an error of the program is one of the process."""
    try:
        return train_one(run, folder)
    except typer.Exit as ending:
        raise SystemExit(ending.exit_code) from ending


def _say(words: str, leads: bool) -> None:
    if leads:
        console.print(words, highlight=False, soft_wrap=True)


def _say_ending(one: Outcome, leads: bool) -> None:
    if one.words and one.state != "not begun":
        _say(f"{one.name} {one.state}: {one.words}", leads)
    if one.trace:
        print(one.trace, file=sys.stderr)


def _compare(jobs: Sequence[Job], ended: Sequence[Outcome], folder: Path, *, swept: bool) -> None:
    """Prints the table, and draws the sheet of a sweep that nobody has ended."""
    from sdlora import comparison, files, images

    heads, *rows = comparison.table(ended, beside=folder, reasons=False)
    show(heads, rows)
    if words := comparison.best_sentence(ended):
        _say(words, True)
    _say(f"The comparison: {folder / 'comparison.md'}", True)
    configs = [job.config for job in jobs]
    if not swept or any(one.state in ("stopped", "not begun") for one in ended):
        return
    if why := comparison.no_sheet(configs, ended):
        _say(why, True)
        return
    with progress() as bar:
        sheet = bar.run("drawing the sheet", comparison.sheet(configs, ended))
    files.write(folder / "comparison.png", images.png_bytes(sheet))
    _say(f"The sheet:      {folder / 'comparison.png'}", True)


def _show_jobs(jobs: Sequence[Job], folder: Path) -> None:
    keys = list(jobs[0].settings)
    show(
        ["run", *keys, "steps", "folder"],
        [
            [job.config.name, *(job.settings[key] for key in keys), str(job.config.steps), str(folder / job.config.name)]
            for job in jobs
        ],
    )  # fmt: skip
    console.print(f"{len(jobs)} runs, {sum(job.config.steps for job in jobs):,} steps in all", highlight=False)


def _row(run: Run, marked: Best | None) -> list[str]:
    shown = marked or run.best
    best = f"{shown.step} at {shown.strength:g}{' (marked)' if marked else ''}" if shown else ""
    when = time.strftime("%F %H:%M", time.localtime(run.when_s)) if run.when_s else ""
    state = f"{run.state} (!)" if run.trouble else run.state
    return [
        str(run.folder),
        state,
        f"{run.step}/{run.steps}",
        best,
        decimal(run.size_bytes),
        Path(run.base).name,
        run.kind,
        run.trigger,
        when,
    ]
