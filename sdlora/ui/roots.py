"""The folders that the page may reach, and the only way from a browser's word to a file: an id that was listed.

A path never comes from the browser. What is offered is listed here under ids, and an id is looked up among what is there now, so a word
such as "../x", "C:\\x" or a link that points out of a root finds nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlora.errors import UserError


@dataclass(frozen=True)
class Roots:
    """Where everything lies.

    Args:
        runs: run folders; their LoRA files are offered too.
        loras: LoRA files from elsewhere, uploads among them.
        data: folders of pictures; uploaded ones become folders in `data / "uploads"`.
        bases: checkpoints and diffusers folders.
        outputs: pictures that were drawn; all in it can be read from the page.
        trash: where deleted things go.
    """

    runs: Path = Path("runs")
    loras: Path = Path("loras")
    data: Path = Path("datasets")
    bases: Path = Path("bases")
    outputs: Path = Path("outputs")
    trash: Path = Path("trash")


def key_of(root: Path, path: Path) -> str:
    """The id of a path in a root, 16 hex digits; the same as long as the file keeps its place."""
    place = f"{root.resolve()}\0{path.resolve().relative_to(root.resolve()).as_posix()}"
    return hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def listed(roots: Sequence[Path], wanted: Callable[[Path], bool]) -> dict[str, Path]:
    """What lies in some roots at any depth and is wanted, by id, in order of its place; what a link leads out of its root is left out."""
    return {key_of(root, path): path for root in roots for path in _inside(root) if wanted(path)}


def find(key: str, offered: dict[str, Path], *, what: str) -> Path:
    """The path that an id means.

    Args:
        what: how a person calls it, such as "LoRA".

    Raises:
        UserError: if nothing of that id is there now.
    """
    if key not in offered:
        raise UserError(f"That {what} is not there (any more); look again and choose from the list.")
    return offered[key]


def _inside(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        return
    real = root.resolve()
    for path in sorted(root.rglob("*")):
        if path.resolve().is_relative_to(real) and not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path
