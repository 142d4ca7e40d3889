"""The folders that the page may reach, and the only way from a browser's word to a file: an id that was listed.

A path never comes from the browser. What is offered is listed here under ids, and an id is looked up among what is there now, so a word
such as "../x", "C:\\x" or a link that points out of a root finds nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlora import hub
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
        first: the base that the program was started with; it may be a path, as whoever starts the program may name one.
    """

    runs: Path = Path("runs")
    loras: Path = Path("loras")
    data: Path = Path("datasets")
    bases: Path = Path("bases")
    outputs: Path = Path("outputs")
    trash: Path = Path("trash")
    first: str = "mini"


def key_of(root: Path, path: Path) -> str:
    """The id of a path in a root, 16 hex digits; the same as long as the file keeps its place."""
    real = root.resolve()
    return _key(real, path.resolve().relative_to(real))


def _key(real: Path, place: Path) -> str:
    return hashlib.sha256(f"{real}\0{place.as_posix()}".encode("utf-8", "surrogateescape")).hexdigest()[:16]


def listed(roots: Sequence[Path], wanted: Callable[[Path], bool]) -> dict[str, Path]:
    """What lies in some roots at any depth and is wanted, by id, in order of its place; what a link leads out of its root is left out."""
    found: dict[str, Path] = {}
    for root in roots:
        real = root.resolve()
        for path in filter(wanted, inside(root)):
            # only a link can lie elsewhere than it seems to, as linked folders are not entered
            key = key_of(root, path) if path.is_symlink() else _key(real, path.relative_to(root))
            if key not in found or found[key].is_symlink():  # a link to another file of the root is the same under a second name
                found[key] = path
    return found


def bases(roots: Roots) -> dict[str, Path]:
    """The checkpoints and diffusers folders in `roots.bases`, by id; what lies inside of a diffusers folder is part of it."""
    found = listed([roots.bases], lambda path: (path / "model_index.json").is_file() or path.suffix.lower() == ".safetensors")
    folders = [path for path in found.values() if path.is_dir()]
    return {key: path for key, path in found.items() if not any(folder in path.parents for folder in folders)}


def base_name(roots: Roots, word: str) -> str:
    """What a base is called below the roof, for a word from the browser: "mini", an id of `bases`, or a name on the Hugging Face hub.

    Raises:
        UserError: if it is none of them; a path is none.
    """
    offered = bases(roots)
    if word in offered:
        return str(offered[word])
    if word in ("mini", roots.first) or (hub.is_name(word) and not Path(word).exists()):
        return word
    raise UserError(
        f'Base {shown(word)} is not offered; choose "mini", one of those in {roots.bases}, or type a name of the hub such as "owner/name".'
    )


def shown(word: str) -> str:
    """A word from the browser as part of a sentence: quoted, short, on one line, without control characters."""
    return repr(word if len(word) <= 80 else f"{word[:40]}…{word[-39:]}").encode("utf-8", "backslashreplace").decode()


def find(key: str, offered: dict[str, Path], *, what: str) -> Path:
    """The path that an id means.

    Args:
        what: how a person calls it, such as "LoRA".

    Raises:
        UserError: if nothing of that id is there now.
    """
    if key in ("", None):
        raise UserError(f"No {what} is chosen; choose one first.")
    if not isinstance(key, str) or key not in offered:  # a direct post may send anything
        raise UserError(f"That {what} is not there (any more); look again and choose from the list.")
    return offered[key]


def inside(root: Path) -> Iterator[Path]:
    """Everything in a folder at any depth, in order of its place; hidden things and links that lead out of it are left out."""
    if root.is_dir():
        yield from _below(root, root.resolve())


def _below(folder: Path, real: Path) -> Iterator[Path]:
    """A link is looked at where it leads; what else lies in a folder of the root lies in the root."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # a folder that may not be read, or that has just gone
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith(".") or (entry.is_symlink() and not path.resolve().is_relative_to(real)):
            continue
        yield path
        if entry.is_dir(follow_symlinks=False):  # a linked folder could lead round in a circle
            yield from _below(path, real)
