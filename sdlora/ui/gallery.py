"""The pictures that a browser has drawn, on the disk and therefore after a reload too: newest first, a page at a time.

Whose they are is a folder's name: the hash of a token that the browser made at its first visit and keeps in its own storage. Whoever has
the token sees the pictures, and nobody can get the token from the folder's name; without one (a call of the API) they are the session's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image

from sdlora import picture_settings, png_settings
from sdlora.errors import UserError
from sdlora.picture_settings import Restored
from sdlora.png_settings import Settings
from sdlora.ui.roots import Roots

PAGE = 24
LEAST_TOKEN = 16
_LIMIT_PX = 100_000_000


def owner_of(token: object, session: str) -> str:
    """The folder of a browser's pictures; a session's own if the browser sent no token."""
    told = f"token {token}" if isinstance(token, str) and LEAST_TOKEN <= len(token) <= 200 else f"session {session}"
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def pictures(roots: Roots, owner: str, page: int) -> tuple[list[Path], int]:
    """One page of an owner's pictures, newest first, and how many pages there are (at least 1).

    Args:
        page: from 0; one that is not there is the last.
    """
    folder = roots.outputs.resolve() / "drawn" / owner
    found = sorted((path for path in folder.glob("*/*.png") if path.is_file()), reverse=True)
    pages = max(1, -(-len(found) // PAGE))
    first = min(max(0, page), pages - 1) * PAGE
    return found[first : first + PAGE], pages


def is_ours(roots: Roots, path: Path) -> bool:
    """Whether a path lies among the drawn pictures."""
    folder = (roots.outputs / "drawn").resolve()
    return path.resolve().is_relative_to(folder) and path.is_file()


def text_of(path: Path) -> str:
    """The `parameters` text of a picture; "" if it carries none.

    Raises:
        UserError: if it is no picture.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > _LIMIT_PX:
                raise UserError(f"The picture has {image.width}x{image.height} pixels; up to {_LIMIT_PX:,} are read.")
            told = image.info.get("parameters", "")
    except UserError:
        raise
    except Exception as problem:  # whatever Pillow makes of bytes that are no picture
        raise UserError("That file cannot be read as a picture; drop a PNG that a Stable Diffusion tool has written.") from problem
    return told if isinstance(told, str) else ""


def restored(path: Path) -> Restored:
    """What a picture was made from.

    Raises:
        UserError: if it is no picture, or does not say.
    """
    told: Settings | None = png_settings.read(text_of(path))
    if told is None:
        raise UserError("That picture carries no settings; A1111, Forge and this program write them into PNG files.")
    return picture_settings.restored(told)
