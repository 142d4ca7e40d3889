"""What the buttons of a training do: pause, resume, stop, save, draw, go on, train longer, and hand over what came of it."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from sdlora import jobs
from sdlora.errors import UserError
from sdlora.jobs import Jobs
from sdlora.ui import hand_over, watch_actions, words
from sdlora.ui.generate_actions import message
from sdlora.ui.roots import Roots

REQUESTS = ("pause", "resume", "stop", "save", "sample", "go_on", "longer")


def press(roots: Roots, line: Jobs, key: str, request: str, owner: str, confirmed: str | None, language: str) -> tuple[str, str]:
    """A button was pressed; to end or to pause what somebody else has started asks once more.

    Args:
        owner: as for `jobs.submit`.
        confirmed: what the last press gave back.

    Returns:
        The status line, and what a second press of the same has to bring with it; "" if it is done.

    Raises:
        UserError: if there is no such training, or it cannot do that now.
    """
    job = watch_actions.job_of(roots, line, key)
    question = f"{request} {key}"
    if request in ("stop", "pause") and job.owner != owner and confirmed != question:
        said = words.say(f"watch.confirm_{request}", language, name=job.folder.name)
        return message(watch_actions.clean(said), kind="busy"), question
    steps = 0
    if request == "go_on":
        jobs.go_on(line, job.folder, owner=owner)
    elif request == "longer":
        steps = jobs.lengthen(line, job.folder, owner=owner)
    else:
        jobs.ask(line, job.folder, request)
    told = request if job.state != "waiting" else "taken_back"
    said = words.say(f"watch.asked_{told}", language, name=job.folder.name, steps=f"{steps:,}")
    return message(watch_actions.clean(said), kind="good"), ""


def put_away(roots: Roots, line: Jobs, key: str, language: str) -> str:
    """Takes a training that has ended off the list; the status line.

    Raises:
        UserError: if there is no such training, or it has not ended.
    """
    folder = watch_actions.job_of(roots, line, key).folder
    jobs.put_away(line, folder)
    return message(watch_actions.clean(words.say("watch.put_away_done", language, name=folder.name)), kind="good")


def report_of(roots: Roots, line: Jobs, key: str) -> Path:
    """The report of a training that has come to its end.

    Raises:
        UserError: if there is none.
    """
    path = watch_actions.job_of(roots, line, key).folder / "report.html"
    if not path.is_file() or not path.resolve().is_relative_to(roots.runs.resolve()):
        raise UserError("There is no report of this training; it is written at the end, unless report = false.")
    return path


def paper(report: Path, title: str) -> str:
    """A report inside the page, in a frame in which nothing runs and from which nothing of the page is reached."""
    told = report.read_text(encoding="utf-8", errors="replace")
    return f'<iframe class="watch-paper" sandbox title="{html.escape(title)}" srcdoc="{html.escape(told)}"></iframe>'


def setting_of(roots: Roots, line: Jobs, key: str) -> dict[str, Any]:
    """What Generate needs to draw with the LoRA of a training, see `hand_over`.

    Raises:
        UserError: if there is no LoRA file of it yet.
    """
    return hand_over.of_run(roots, watch_actions.job_of(roots, line, key).folder)
