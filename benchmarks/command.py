"""How the benchmarks' commands end: as the package's own do, with one sentence for a mistake that the user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import ParamSpec

from sdlora.errors import UserError

Given = ParamSpec("Given")


def code_of(work: Callable[Given, int | None], *given: Given.args, **named: Given.kwargs) -> int:
    """Does a command's work.

    Args:
        work: answers the exit code, or nothing if all is well.

    Returns:
        The exit code; 2, and a sentence on stderr, for a mistake that the user can mend.
    """
    try:
        return work(*given, **named) or 0
    except UserError as problem:
        print(problem, file=sys.stderr)
        return 2
