"""Progress bars with time left, for work that is a generator; on something that is not a terminal, lines instead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_S = 20  # a log says at least this often how far it is
console = Console(markup=False)  # what a person or a file says is never taken for markup


class Bars:
    """Progress bars with time left; on something that is not a terminal, a line when a piece of work begins and ends."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}
        self.said_s = 0.0

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        """Sets a bar; it appears with its first number."""
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name[:40], total=total, note="")
        self.bars.update(self.tasks[name], completed=done, total=total, note=note)
        if self.bars.console.is_terminal:
            return
        if done == total or done % max(1, total // 10) == 0 or time.monotonic() - self.said_s > QUIET_S:
            self.said_s = time.monotonic()
            self.bars.console.print(f"{name[:40]} {done}/{total} {note}", highlight=False, soft_wrap=True)

    def each(self, name: str, items: Iterator[Any], *, total: int) -> Iterator[Any]:
        """The items, with a bar that counts them."""
        self.show(name, 0, total)
        for done, item in enumerate(items, start=1):
            yield item
            self.show(name, done, total)

    def run(self, name: str, work: Iterator[Any]) -> Any:
        """Follows work that yields (done, total) and, last, its result."""
        for item in work:
            if not isinstance(item, tuple):
                return item
            self.show(name, *item)
        raise AssertionError("the work ended without a result")

    def print(self, words: str) -> None:
        """A line above the bars."""
        self.bars.console.print(words, highlight=False, soft_wrap=True)


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Bars]:
    """Bars for as long as the block lasts.

    Args:
        quiet: says nothing at all.
    """
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    where = Console(quiet=True) if quiet else console
    with Progress(*columns, console=where, disable=not where.is_terminal) as bars:
        yield Bars(bars)
