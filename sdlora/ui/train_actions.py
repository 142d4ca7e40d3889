"""What the presses on the form do: pictures become a set, form and settings a run, and the run a job in line.

Every function answers a person's mistake with a `UserError`, which the page shows as its sentence.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from sdlora import config, job_states, jobs, plan, prepare, resuming, trial_process
from sdlora import material as materials
from sdlora.amounts import duration, size
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.forecast import Forecast
from sdlora.jobs import Jobs
from sdlora.linked import Linked
from sdlora.memory import GIB
from sdlora.ui import roots as places
from sdlora.ui import train_settings as settings
from sdlora.ui import uploads, words
from sdlora.ui.generate_actions import message
from sdlora.ui.roots import Roots
from sdlora.ui.train_settings import Flat, Form

PICTURES = "pictures"  # the run's own copy in its folder


def drop(roots: Roots, key: str | None, sources: Sequence[str | Path], language: str) -> tuple[str, str]:
    """Uploaded files are checked and put into a set, a new one if there is none.

    Returns:
        The set's id, and what was kept, as the status line.

    Raises:
        UserError: if nothing was dropped, or nothing of it could be kept.
    """
    paths = [Path(one) for one in sources if isinstance(one, str | Path)]
    if not paths:
        raise UserError("No files were dropped; drop pictures, 10 to 50 are usual.")
    try:
        folder, is_new = uploads.set_folder(roots, key), False
    except UserError:
        key, is_new = uploads.make_set(roots), True
        folder = uploads.set_folder(roots, key)
    assert isinstance(key, str)
    kept, refused = uploads.add(roots, key, paths)
    more = words.say("train.refused_more", language, count=len(refused) - 3) if len(refused) > 3 else ""
    why_not = " ".join([*refused[:3], more]).strip()
    if is_new and not kept:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(_clean(why_not))
    said = words.say("train.kept", language, kept=kept, count=len(uploads.pictures(folder)))
    return key, message(_clean(f"{said} {why_not}".strip()), kind="bad" if refused else "good")


def choose(roots: Roots, folder: str, language: str) -> tuple[str, str]:
    """A listed folder is copied into a new set.

    Raises:
        UserError: if it is not there, or cannot be copied.
    """
    source = places.find(folder, uploads.folders(roots), what="folder")
    key, count = uploads.copy_in(roots, source)
    return key, message(_clean(words.say("train.copied", language, name=source.name, count=count)), kind="good")


def folder_choices(roots: Roots) -> list[tuple[str, str]]:
    """What the list of folders offers, by their path in the data root."""
    found = uploads.folders(roots).items()
    return [(_clean(path.relative_to(roots.data).as_posix()), key) for key, path in found]


def remove(roots: Roots, key: str, picture: str) -> None:
    """Takes one picture, and its caption, out of a set; the original is not in it.

    Raises:
        UserError: if there is no such set or picture.
    """
    there = {places.key_of(roots.data, path): path for path in uploads.pictures(uploads.set_folder(roots, key))}
    path = places.find(picture, there, what="picture")
    uploads.write_caption(path, "")
    path.unlink(missing_ok=True)


# --- before the start ----------------------------------------------------------------------------------------------------------


def folder_of(roots: Roots, key: str | None) -> Path:
    """The folder of a set, or of none: settings can be looked at before there are pictures."""
    try:
        return uploads.set_folder(roots, key)
    except UserError:
        return roots.data / uploads.FOLDER / "none"


def counted(roots: Roots, key: str, form: Form, changes: Flat, language: str) -> str:
    """What the run will take as far as it can be counted, as HTML.

    Raises:
        UserError: if the settings, the pictures or the base cannot be used, or nothing fits.
    """
    folder = uploads.set_folder(roots, key)
    with uploads.hidden(folder):
        run = settings.run_of(roots, form, changes, folder, named=False)
        *_, made = plan.plan(run, measure=False)
        assert isinstance(made, Forecast)
        return _told(made, prepare.linked_run(run), language)


def measured(
    roots: Roots, key: str, form: Form, changes: Flat, language: str, wanted: Callable[[], bool]
) -> Iterator[tuple[int, int] | str]:
    """What the run will take, measured: (done, total) of each trial, and at the end the forecast as HTML.

    Args:
        wanted: whether somebody waits for it; once it says no, the trial ends without a forecast.

    Raises:
        UserError: as `counted`.
    """
    folder = uploads.set_folder(roots, key)
    with uploads.hidden(folder), suppress(trial_process.UnwantedError):
        run = settings.run_of(roots, form, changes, folder, named=False)
        for one in plan.plan(run, attempt=partial(trial_process.tried, wanted=wanted)):
            yield _told(one, prepare.linked_run(run), language) if isinstance(one, Forecast) else one


def _told(made: Forecast, linked: Linked, language: str) -> str:
    """A forecast in a line."""
    run = linked.run
    is_held, is_looked_at = run.validation.share > 0 or run.validation.folder is not None, run.validation.every != 0
    held = words.say(f"train.{'held_out' if is_held else 'none_held_out'}", language) if is_looked_at else ""
    values = {
        "steps": f"{run.steps:,}", "batch": run.batch * run.optimizer.accumulation, "memory": f"{made.peak_bytes / GIB:.2g}",
        "free": f"{made.limit_bytes / GIB:.3g}", "disk": size(made.disk_bytes),
        "time": duration(made.total_s) if made.total_s else "",
    }  # fmt: skip
    said = words.say("train.forecast_measured" if made.total_s else "train.forecast_counted", language, **values)
    if made.changes:
        fits = ", ".join(made.changes)
        return message(f"{said} {words.say('train.forecast_misfit', language, changes=fits)}", kind="bad")
    return message(f"{said} {held}".strip(), kind="calm")


# --- starting -------------------------------------------------------------------------------------------------------------------


def check_seen(roots: Roots, key: str, cards: object) -> None:
    """Whether the pictures of a set are those that are seen: another tab of the same browser may have added or taken some.

    Args:
        cards: the value of the control that shows them; nothing is checked where it shows no set, as for a program.

    Raises:
        UserError: if it shows fewer or more.
    """
    if isinstance(cards, dict) and key and cards.get("set") == key:
        there, seen = len(uploads.pictures(uploads.set_folder(roots, key))), cards.get("count")
        if seen != there:
            raise UserError(f"The set has {there} pictures, and {seen} were shown here; all are shown now, so look, and press Train again.")


def start(roots: Roots, line: Jobs, key: str, form: Form, changes: Flat, owner: str) -> Path:
    """Train was pressed: the run gets its folder, its own copy of the pictures and its config, and goes in line.

    Returns:
        The run folder.

    Raises:
        UserError: if something is missing or not allowed; then nothing is left behind.
    """
    source = uploads.set_folder(roots, key)
    with uploads.hidden(source):
        run = settings.run_of(roots, form, changes, source)
        found = materials.find(run)
        if stops := [one for one in found.findings if one.severity == "stops"]:
            where = f"{uploads.shown(stops[0].path)}: " if stops[0].path else ""
            raise UserError(f"{where}{stops[0].what} {stops[0].advice}")
    if not found.samples:
        raise UserError("There is no picture that can be trained on; drop some, and write captions or set a trigger word.")
    base = str(Path(run.base).resolve()) if Path(run.base).exists() and run.base != "mini" else run.base
    resolved = prepare.linked_run(run.model_copy(update={"base": base})).run  # as TOML each default would count as set
    _refuse_twin(line, resolved)
    folder = jobs.reserve(line, run.name)
    try:
        uploads.freeze(source, folder / PICTURES)
        jobs.submit(line, folder, _with_pictures(resolved, folder), owner=owner)
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)  # it is ours alone, and nothing was trained in it
        raise
    return folder


def _with_pictures(run: Config, folder: Path) -> Config:
    """A run on the copy of its pictures that lies in its folder."""
    return run.model_copy(update={"data": [run.data[0].model_copy(update={"folder": (folder / PICTURES).resolve()})]})


def _refuse_twin(line: Jobs, run: Config) -> None:
    """A second press of Train is no wish for the same LoRA twice.

    Raises:
        UserError: if a training that has not ended has the same settings and pictures.
    """
    unfinished = [job.folder for job in jobs.listed(line) if job.state in (*job_states.AT_WORK, "waiting")]
    if twin := next((folder for folder in unfinished if _is_same(folder, run)), None):
        name = uploads.shown(twin)
        raise UserError(f"{name} has these pictures and settings and has not come to its end; change something, or wait for it.")


def _is_same(folder: Path, run: Config) -> bool:
    """Whether a run folder's copy of the pictures and its settings are those of a run; both are resolved, so the same are held out."""
    try:
        there = config.load(folder / "config.toml")
    except UserError:  # taken away just now
        return False
    if config.to_toml(there) != config.to_toml(_with_pictures(run, folder)):
        return False
    copied, own = materials.find(there), materials.find(run)
    return resuming.pictures(copied.samples, copied.held_out) == resuming.pictures(own.samples, own.held_out)


def waits(line: Jobs, folder: Path) -> bool:
    """Whether another training has to end before one can start."""
    return jobs.at_work(line) not in (None, folder)


def _clean(told: str) -> str:
    return told.encode("utf-8", "replace").decode()
