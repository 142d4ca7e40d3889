"""What is seen of a training while it lasts and after it.

All of it comes from the run folder and the line on the disk, so every browser sees the same, and a page that was started anew too. Texts
from files are escaped; pictures travel inside the page's text, so that nothing of a run folder is served.
"""

from __future__ import annotations

import html
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdlora import charts, job_line, job_states, jobs, run_folder, runs
from sdlora.amounts import duration, number, size
from sdlora.charts import Series
from sdlora.jobs import Job, Jobs
from sdlora.ui import lora_shelf, words
from sdlora.ui import roots as places
from sdlora.ui import watch_reading as readings
from sdlora.ui.roots import Roots

MOST_LISTED = 40
LIST_S = 5.0  # between walks through the folder of runs
MOST_PAIRS = 4
COLOURS = {"failed": "bad", "interrupted": "bad", "done": "good", "running": "busy", "starting": "busy", "paused": "busy"}
ENDED = ("failed", "interrupted", "stopped")


@dataclass(frozen=True)
class View:
    """A training as the page shows it: HTML, and which buttons can be pressed."""

    head: str
    curves: str
    pictures: str
    buttons: tuple[str, ...]


# --- which one ------------------------------------------------------------------------------------------------------------------


def known(roots: Roots, line: Jobs) -> list[Job]:
    """The trainings that can be watched: what is at work first, then the line, then the newest others."""
    every = jobs.listed(line)
    elsewhere = jobs.at_work(line)
    if elsewhere and elsewhere not in [job.folder for job in every]:
        every.append(jobs.look(line, elsewhere))
    rank = {"running": 0, "paused": 0, "starting": 0, "waiting": 1}
    return sorted(every, key=lambda job: (rank.get(job.state, 2), job.added_s if job.state == "waiting" else -job.added_s))[:MOST_LISTED]


def choices(roots: Roots, line: Jobs, language: str) -> list[tuple[str, str]]:
    """What the list of trainings offers: name with state, and the run folder's id; runs of a shell stand last."""
    found = {places.key_of(roots.runs, job.folder): _label(job, language) for job in known(roots, line)}
    found |= {key: name for key, name in _folders(roots, int(time.time() / LIST_S)) if key not in found}
    return [(label, key) for key, label in list(found.items())[:MOST_LISTED]]


@lru_cache(maxsize=4)
def _folders(roots: Roots, _: int) -> list[tuple[str, str]]:
    """The run folders by id, newest first; looked for now and then, as it takes a walk through all files."""
    every = sorted(lora_shelf.run_folders(roots).items(), key=lambda pair: -(lora_shelf.look(pair[1]).when_s or 0.0))
    return [(key, lora_shelf.name_of(roots, folder)) for key, folder in every[:MOST_LISTED]]


def current(roots: Roots, line: Jobs) -> str:
    """The id of the training that matters most now, the newest of a shell if none was started here; "" if there was never one."""
    keys = [places.key_of(roots.runs, job.folder) for job in known(roots, line)]
    return next(iter(keys or [key for key, _ in _folders(roots, int(time.time() / LIST_S))]), "")


def job_of(roots: Roots, line: Jobs, key: str) -> Job:
    """The training of an id.

    Raises:
        UserError: if there is none.
    """
    for _, ticket in (*job_line.tickets(line.runs, "started"), *job_line.tickets(line.runs, "waiting")):
        folder = roots.runs / ticket.folder
        if folder.is_dir() and places.key_of(roots.runs, folder) == key:
            return jobs.look(line, folder)
    elsewhere = jobs.at_work(line)
    if elsewhere and places.key_of(roots.runs, elsewhere) == key:
        return jobs.look(line, elsewhere)
    return jobs.look(line, places.find(key, lora_shelf.run_folders(roots), what="training"))


def _label(job: Job, language: str) -> str:
    return f"{clean(job.folder.name)} · {words.say(f'watch.state_{job.state}', language)}"


def rows(roots: Roots, line: Jobs) -> list[dict[str, Any]]:
    """The trainings that are known as plain values."""
    return [
        {"id": places.key_of(roots.runs, job.folder), "name": clean(job.folder.name), "state": job.state, "words": clean(job.words)}
        for job in known(roots, line)
    ]


def row(roots: Roots, line: Jobs, key: str) -> dict[str, Any]:
    """One training as plain values: how far it is, and what can be pressed.

    Raises:
        UserError: if there is none of that id.
    """
    job = job_of(roots, line, key)
    course = readings.course(readings.rows(job.folder), pictures_per_step=_per_step(settings_of(job.folder)))
    told = {"id": key, "name": clean(job.folder.name), "state": job.state, "words": clean(job.words), "buttons": list(buttons(job))}
    return told | asdict(course)


# --- looking --------------------------------------------------------------------------------------------------------------------


def view(roots: Roots, line: Jobs, key: str, language: str) -> View:
    """All that is seen of a training.

    Raises:
        UserError: if there is none of that id.
    """
    job = job_of(roots, line, key)
    told = readings.rows(job.folder)
    settings = settings_of(job.folder)
    course = readings.course(told, pictures_per_step=_per_step(settings))
    head = _head(job, course, told, settings, language) + _line(line, job, language)
    if job.state == "done":
        head += _verdict(job.folder, language)
    return View(head, curves(told, language), pictures(job.folder, language, ended=job.state == "done"), buttons(job))


def buttons(job: Job) -> tuple[str, ...]:
    """Which buttons make sense for a training as it is."""
    offered = {
        "waiting": ("stop",), "starting": ("stop",), "running": ("pause", "stop", "save", "sample"), "paused": ("resume", "stop"),
        "done": ("use", "report", "longer"),
    }  # fmt: skip
    could_not_be_longer = job.state == "failed" and job_states.has_ended(job.folder)
    found = offered.get("done" if could_not_be_longer else job.state, ("go_on", "use"))
    if job.state not in offered or job.state == "done":
        found += ("put_away",) if job.added_s else ()  # one of a shell is on no list of ours
    there = {"report": (job.folder / "report.html").is_file(), "use": run_folder.has_lora(job.folder)}
    return tuple(one for one in found if there.get(one, True))


def _head(job: Job, course: readings.Course, told: Sequence[dict[str, Any]], settings: dict[str, Any], language: str) -> str:
    """The name, the state, what it means, and the numbers."""
    state = words.say(f"watch.state_{job.state}", language)
    base = Path(str(settings.get("base") or "")).name
    values = {"step": f"{course.step:,}", "steps": f"{course.steps:,}", "words": job.words}
    ends = job.state == "running" and course.step >= course.steps > 0
    said = words.say("watch.says_finishing" if ends else f"watch.says_{job.state}", language, **values)
    alarm = next((str(row.get("words")) for row in reversed(told) if row["event"] == "alarm"), "")
    share = course.step / course.steps if course.steps else 0.0
    bar = f'<div class="bar"><div style="width:{100 * min(1.0, share):.1f}%"></div></div>' if job.state != "waiting" else ""
    colour = COLOURS.get(job.state, "calm")
    title = f'<h2>{_html(job.folder.name)} <span class="badge {colour}">{_html(state)}</span></h2>'
    about = " · ".join(_html(str(one)) for one in (settings.get("trigger"), base) if one)
    warned = f'<p class="watch-alarm">{_html(alarm)}</p>' if alarm and job.state in ("running", "paused") else ""
    return (
        f'<div class="watch-head {colour}">{title}<p class="watch-about">{about}</p>{bar}'
        f'<p class="watch-said" role="status">{_html(said)}</p>{warned}{_facts(job, course, language)}</div>'
    )


def _facts(job: Job, course: readings.Course, language: str) -> str:
    """The numbers, each with its word."""
    live = job.state == "running"
    rows = {
        "step": f"{course.step:,} / {course.steps:,}" if course.steps else "",
        "left": duration(course.left_s) if live and course.left_s is not None else "",
        "total": duration(course.total_s) if course.total_s else "",
        "loss": number(course.loss, digits=3) if course.loss is not None else "",
        "speed": words.say("watch.per_step", language, time=duration(course.step_s)) if course.step_s else "",
        "pictures": number(course.pictures_per_step / course.step_s, digits=2) if course.step_s else "",
        "memory": size(course.peak_bytes) if course.peak_bytes else "",
    }  # fmt: skip
    pairs = [
        f"<div><dt>{_html(words.say(f'watch.fact_{key}', language))}</dt><dd>{_html(value)}</dd></div>"
        for key, value in rows.items()
        if value
    ]
    return f'<dl class="watch-facts">{"".join(pairs)}</dl>' if pairs else ""


def _line(line: Jobs, shown: Job, language: str) -> str:
    """Who waits, in order."""
    waiting = [ticket.folder for _, ticket in job_line.tickets(line.runs, "waiting")]
    if not waiting:
        return ""
    names = ", ".join(_html(clean(name)) for name in waiting[:8]) + (" …" if len(waiting) > 8 else "")
    return f'<p class="watch-line">{_html(words.say("watch.line", language, count=len(waiting)))} {names}</p>'


def _verdict(folder: Path, language: str) -> str:
    """What the run recommends of itself."""
    best = lora_shelf.look(folder).best
    if best is None:
        return ""
    lead = words.say("watch.recommends", language, step=f"{best.step:,}", strength=f"{best.strength:g}")
    warning = f'<p class="watch-alarm">{_html(best.warning)}</p>' if best.warning else ""
    return f'<div class="watch-verdict"><strong>{_html(lead)}</strong> {_html(best.reason)}{warning}</div>'


def curves(told: Sequence[dict[str, Any]], language: str) -> str:
    """The course of the loss, and of held-out pictures if any were looked at."""
    found = list[tuple[str, list[Series], str]]()

    def say(key: str) -> str:
        return words.say(f"watch.curve_{key}", language)

    steps = [row for row in told if row["event"] == "step" and isinstance(row.get("loss"), int | float)]
    if len(steps) > 1:
        x, y = [row["step"] for row in steps], [row["loss"] for row in steps]
        mean = Series(say("mean"), x, charts.smoothed(y, window=max(5, len(y) // 20)))
        found.append((say("loss"), [mean, Series(say("each"), x, y, faint=True)], say("loss_how")))
    looks = [row for row in told if row["event"] == "validated" and isinstance(row.get("seen_loss"), int | float)]
    if len(looks) > 1:
        lines = [Series(say("seen"), [row["step"] for row in looks], [row["seen_loss"] for row in looks])]
        held = [row for row in looks if isinstance(row.get("loss"), int | float)]
        if held:
            lines.append(Series(say("held"), [row["step"] for row in held], [row["loss"] for row in held], colour=1))
        found.append((say("looks"), lines, say("looks_how" if held else "seen_how")))
    drawn = [_figure(title, lines, how, say("step")) for title, lines, how in found]
    return f'<div class="watch-curves">{"".join(drawn)}</div>' if drawn else ""


def _figure(title: str, lines: list[Series], how: str, x_label: str) -> str:
    svg = charts.line_chart(lines, title=title, x_label=x_label, y_label=title).replace(' xmlns="http://www.w3.org/2000/svg"', "")
    return f"<figure><figcaption><strong>{_html(title)}</strong> {_html(how)}</figcaption>{svg}</figure>"


def pictures(folder: Path, language: str, *, ended: bool) -> str:
    """The newest samples beside the base's own, pair by pair; of a run that has ended those of the checkpoint that it recommends."""
    drawn = runs.pictures(folder)
    if not drawn:
        return ""
    best = lora_shelf.look(folder).best if ended else None
    last = best.step if best and any(one.step == best.step for one in drawn) else max(one.step for one in drawn)
    first = {one.number: one for one in drawn if one.step == 0}
    newest = [one for one in drawn if one.step == last][:MOST_PAIRS]
    if last == 0:
        newest = list(first.values())[:MOST_PAIRS]
    after = words.say("watch.with" if ended else "watch.step", language, step=f"{last:,}")
    rows = []
    for one in newest:
        pair = [(words.say("watch.without", language), first.get(one.number)), *([(after, one)] if last else [])]
        shown = "".join(_picture(label, sample.path, sample.prompt) for label, sample in pair if sample)
        rows.append(f'<div class="watch-pair"><div class="watch-two">{shown}</div><p>{_html(one.prompt)}</p></div>')
    title = words.say("watch.pairs_done" if ended else "watch.pairs", language)
    return f'<h3 class="watch-title">{_html(title)}</h3><div class="watch-pairs">{"".join(rows)}</div>'


def _picture(label: str, path: Path, prompt: str) -> str:
    address = lora_shelf.small_picture(path)
    image = f'<img src="{address}" alt="{_html(f"{label}: {prompt}")}">' if address else '<div class="blank"></div>'
    return f"<figure>{image}<figcaption>{_html(label)}</figcaption></figure>"


def settings_of(folder: Path) -> dict[str, Any]:
    """A run's config as plain values; none if it cannot be read."""
    try:
        return tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}


def _per_step(settings: dict[str, Any]) -> int:
    how = settings.get("optimizer")
    parts = how.get("accumulation", 1) if isinstance(how, dict) else 1
    batch = settings.get("batch", 4)
    return batch * parts if isinstance(batch, int) and isinstance(parts, int) else 1


def clean(told: str) -> str:
    """A text without half characters, which no answer can carry."""
    return told.encode("utf-8", "replace").decode()


def _html(told: str) -> str:
    return html.escape(clean(told))
