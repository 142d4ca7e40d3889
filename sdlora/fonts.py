"""The font that a text is drawn in: the plain one as long as it has the letters, else one of this computer's.

Pillow's own font has few letters beyond English, and none is shipped here: one with Korean, Chinese and Japanese has 20 MB. Systems bring
such fonts, so the usual folders are searched by name, once. What no font has is spelled out as [U+AC00], which can at least be told apart.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MOST_TRIED = 100
# what files of fonts with many letters are called, without spaces and dashes: of single scripts first, so that theirs are their own forms
NAMES = (
    "notosansregular", "dejavusans", "arial", "segoeui", "liberationsans", "freesans", "helvetica", "applesdgothicneo", "malgun",
    "notosanskr", "nanumgothic", "nanumbarungothic", "notosanscjk", "sourcehansans", "undotum", "baekmuk", "hiragino", "yugoth", "meiryo",
    "msgothic", "pingfang", "msyh", "wqy", "droidsansfallback", "leelaw", "nirmala", "tahoma", "notosans", "unifont",
)  # fmt: skip
_ENDINGS = {".ttf", ".ttc", ".otf", ".otc"}
_STYLED = re.compile(r"bold|italic|oblique|condensed|mono|light|thin|black|medium|narrow|display")


@lru_cache
def plain(size_px: float) -> Font:
    """Pillow's own font."""
    return ImageFont.load_default(size_px)


def written(words: str, plain: Font) -> tuple[str, Font]:
    """A text as it can be drawn, and the font that draws it.

    Args:
        plain: the font that is taken, at its size, if it has all letters.
    """
    letters = frozenset(words)
    missing = lacking(letters, plain)
    if not missing:
        return words, plain
    font = _best(letters, plain)
    missing = lacking(letters, font)
    return "".join(f"[U+{ord(letter):04X}]" if letter in missing else letter for letter in words), font


def lacking(letters: frozenset[str], font: Font) -> frozenset[str]:
    """Those of the letters that a font has no picture of."""
    return frozenset(letter for letter in letters if _lacks(letter, font))


@lru_cache(maxsize=16384)
def _lacks(letter: str, font: Font) -> bool:
    if letter.isspace() or (letter.isascii() and letter.isprintable()):
        return False
    if not isinstance(font, ImageFont.FreeTypeFont) or "\ud800" <= letter <= "\udfff":  # half a character is drawn by none
        return True
    return _drawn(letter, font) == _drawn("\U0010ffff", font)  # which is no character, so this is the box that stands for others


def _drawn(letter: str, font: ImageFont.FreeTypeFont) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


@lru_cache(maxsize=1024)
def _best(letters: frozenset[str], plain: Font) -> Font:
    """The first font that lacks none of the letters; if there is none, the one that lacks the fewest."""
    best, fewest = plain, len(lacking(letters, plain))
    for path in files():
        font = _opened(path, getattr(plain, "size", 12))
        if font and (count := len(lacking(letters, font))) < fewest:
            best, fewest = font, count
        if not fewest:
            break
    return best


@lru_cache(maxsize=256)
def _opened(path: Path, size_px: float) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(path, size_px)
    except (OSError, ImportError):  # a damaged file, one with pictures of a single size, or a Pillow without FreeType
        return None


@lru_cache(maxsize=1)
def files() -> tuple[Path, ...]:
    """The font files of this computer that are worth a try, the best first."""
    found = [(rank, path) for folder in folders() for path in _inside(folder) if (rank := _rank(path))]
    return tuple(path for _, path in sorted(found))[:MOST_TRIED]


def _inside(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names if Path(name).suffix.lower() in _ENDINGS)


def _rank(path: Path) -> tuple[int, int] | None:
    """How well a file's name promises: its place in `NAMES`, then its length, as "arial" is before "arialbd"; None if it does not."""
    name = re.sub(r"[\s_-]", "", path.stem.lower())
    place = next((number for number, known in enumerate(NAMES) if name.startswith(known)), None)
    return None if place is None or _STYLED.search(name) else (place, len(name))


def folders() -> list[Path]:
    """Where systems and persons keep fonts."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111, as Path's own fails where nobody has a home
    if sys.platform == "win32":
        own = os.environ.get("LOCALAPPDATA", str(home / "AppData/Local"))
        return [Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts", Path(own) / "Microsoft/Windows/Fonts"]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = os.environ.get("XDG_DATA_HOME") or str(home / ".local/share")
    return [*(Path(place) / "fonts" for place in [own, *shared.split(":")]), home / ".fonts"]
