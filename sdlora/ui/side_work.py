"""Work that a press begins and that goes on beside the page: in a thread of its own, and stopped by whoever began it alone.

The press's handler only looks at what is new. A closed tab ends the handler, and with it the work after its current step, so nothing
half-held is left behind. Each browser session has one piece of work at a time, under its own id.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from sdlora.errors import UserError
from sdlora.ui.studio import Studio

POLL_S = 0.1
State = TypeVar("State")


@dataclass
class Desk:
    """The stop event of each session's running work."""

    stops: dict[str, threading.Event] = field(default_factory=dict)


def run(desk: Desk, session: str, work: Callable[[threading.Event], Iterator[State]]) -> Iterator[State]:
    """Does work in a thread; yields its newest state whenever there is a newer one, and its last one at the end.

    Args:
        work: given the stop event, it looks at it and ends soon after it is set.

    Raises:
        UserError: if this session is at work already, and whatever the work raises.
    """
    if session in desk.stops:
        raise UserError("Your last press is still at work here; wait for it, or press Stop.")
    stop, ended = threading.Event(), threading.Event()
    states: list[State] = []
    problems: list[BaseException] = []

    def follow() -> None:
        try:
            for state in work(stop):
                states[:] = [state]
        except BaseException as problem:
            problems.append(problem)
        finally:
            ended.set()

    desk.stops[session] = stop
    shown: State | None = None
    try:
        threading.Thread(target=follow, name="side work", daemon=True).start()
        while not ended.wait(POLL_S):
            if states and states[0] is not shown:
                shown = states[0]
                yield shown
        if problems:
            raise problems[0]
        if states:
            yield states[0]
    finally:
        stop.set()  # the tab may have been closed
        if desk.stops.get(session) is stop:
            del desk.stops[session]


def stop(desk: Desk, session: str) -> bool:
    """Tells a session's work to end after the step that it is in; says whether there was any."""
    found = desk.stops.get(session)
    if found:
        found.set()
    return found is not None


@contextmanager
def holding(studio: Studio, stop: threading.Event) -> Iterator[bool]:
    """The page's one workplace for as long as the block lasts; false if the work was stopped while others held it."""
    while not (held := studio.busy.acquire(timeout=POLL_S)):
        if stop.is_set():
            break
    try:
        yield held and not stop.is_set()
    finally:
        if held:
            studio.busy.release()
