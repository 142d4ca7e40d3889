"""Pictures that come through the browser, or from a listed folder, as a set of the page's own: the originals are never touched.

A set is a folder `uploads/<when>-<random>` in the data root. Its name is its id, and cannot be guessed, so that one browser does not find
another's. Pictures are checked before they are kept: their bytes say what they are, all of it is decoded, and a file that is also something
else (an archive, a web page, a document) is refused. Captions are `.txt` files beside them, and these the page writes. Each run trains on
its own frozen copy, made when it is put in line: what is edited later does not change a run that waits or goes on.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sdlora import captions, files, images
from sdlora.errors import UserError
from sdlora.images import SUFFIXES
from sdlora.ui import roots as places
from sdlora.ui.roots import Roots

FOLDER = "uploads"
MOST_PICTURES = 1000
LARGEST_BYTES = 64 << 20  # of one picture
MOST_BYTES = 4 << 30  # of a set
LONGEST_CAPTION = 5000
_SET = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{16}")
_TEXTS = (".txt", ".caption")
_KINDS = {  # the first bytes, and the ending that goes with them
    b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif",
}  # fmt: skip
_MARKUP = re.compile(rb"<(?:script|html|!doctype|iframe|\?php|svg[\s>])", re.IGNORECASE)
_ARCHIVES = (b"Rar!\x1a\x07", b"7z\xbc\xaf\x27\x1c")


def make_set(roots: Roots) -> str:
    """A new and empty set's id.

    Raises:
        UserError: if no folder can be made.
    """
    key = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(8)}"
    files.make_folder(roots.data / FOLDER / key)
    return key


def set_folder(roots: Roots, key: object) -> Path:
    """The folder of a set.

    Raises:
        UserError: if there is none of that id.
    """
    if isinstance(key, str) and _SET.fullmatch(key):
        folder = roots.data / FOLDER / key
        if folder.is_dir() and folder.resolve().is_relative_to((roots.data / FOLDER).resolve()):
            return folder
    raise UserError("There are no pictures yet; drop some, or choose a folder.")


def pictures(folder: Path) -> list[Path]:
    """The pictures of a set by name, at any depth."""
    return sorted(path for path in places.inside(folder) if path.suffix.lower() in SUFFIXES and path.is_file())


def add(roots: Roots, key: str, sources: Sequence[Path]) -> tuple[int, list[str]]:
    """Checks uploaded files and copies them into a set; captions come with the pictures whose names they have.

    Returns:
        How many pictures were kept, and for each file that was not a sentence.

    Raises:
        UserError: if there are too many, or a file cannot be written.
    """
    folder = set_folder(roots, key)
    there = pictures(folder)
    wanted = [path for path in sources if path.suffix.lower() not in _TEXTS]
    if len(there) + len(wanted) > MOST_PICTURES:
        raise UserError(f"A set may have {MOST_PICTURES:,} pictures, and these would be {len(there) + len(wanted):,}; drop fewer.")
    kept, refused, total = 0, list[str](), sum(path.stat().st_size for path in there)
    texts = {path.stem: path for path in sources if path.suffix.lower() in _TEXTS}
    for path in wanted:
        try:
            ending, size = checked(path)
            if (total := total + size) > MOST_BYTES:
                raise UserError(f"Picture {shown(path)} is too much: a set may have {MOST_BYTES >> 30} GB in all; drop smaller pictures.")
            goal = _free(folder, plain_stem(path.stem), ending)
            _copy(path, goal)
            kept += 1
        except UserError as problem:
            refused.append(_sentence(problem, path))
            continue
        caption = texts.get(path.stem)
        if caption and caption.stat().st_size:  # one that is empty says what none says
            try:
                write_caption(goal, " ".join(captions.read_caption_file(caption)))
            except UserError as problem:
                refused.append(_sentence(problem, caption))
    lonely = [path for stem, path in texts.items() if stem not in {one.stem for one in wanted}]
    refused += [f"{shown(path)}: no picture of that name was dropped with it, so its caption is of none." for path in lonely]
    return kept, refused


def checked(path: Path) -> tuple[str, int]:
    """The ending that goes with a picture's bytes, and how many there are.

    Raises:
        UserError: if it is no sound picture, too large, or something else as well.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_BYTES:
            raise UserError(f"Picture {shown(path)} has {size >> 20} MB, and {LARGEST_BYTES >> 20} are allowed; save it smaller.")
        content = path.read_bytes()
    except OSError as problem:
        raise UserError(f"Picture {shown(path)} cannot be read ({problem.strerror}); drop it again.") from problem
    ending = _ending(content)
    if not ending:
        raise UserError(f"{shown(path)} is no picture of a kind that can be trained on; save it as PNG or JPEG.")
    if _MARKUP.search(content) or b"%PDF-" in content[:1024] or any(one in content for one in _ARCHIVES) or _holds_zip(content):
        raise UserError(f"{shown(path)} is a picture and something else in one file; save the picture anew as PNG or JPEG.")
    images.open_picture(path)
    return ending, size


def _holds_zip(content: bytes) -> bool:
    """Whether a zip's directory and its end stand in the bytes (APPNOTE 4.3.16); the four letters alone come by chance."""
    place = content.rfind(b"PK\x05\x06")
    while place >= 0:
        size = int.from_bytes(content[place + 12 : place + 16], "little")
        if content[max(0, place - size) : place][:4] == b"PK\x01\x02":
            return True
        place = content.rfind(b"PK\x05\x06", 0, place)
    return False


def _ending(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    if content[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif" if ".avif" in SUFFIXES else ""
    return next((ending for begin, ending in _KINDS.items() if content.startswith(begin)), "")


def copy_in(roots: Roots, source: Path) -> tuple[str, int]:
    """A folder of the data root as a new set, with its captions and sub-folders.

    Args:
        source: from `folders`.

    Returns:
        The set's id, and how many pictures it has.

    Raises:
        UserError: if it holds none, too many, or cannot be copied.
    """
    found = [path for path in places.inside(source) if path.is_file()]
    there = [path for path in found if path.suffix.lower() in SUFFIXES]
    if not 0 < len(there) <= MOST_PICTURES:
        raise UserError(f"Folder {shown(source)} holds {len(there):,} pictures; choose one with 1 to {MOST_PICTURES:,}.")
    if sum(path.stat().st_size for path in there) > MOST_BYTES:
        raise UserError(f"Folder {shown(source)} has more than {MOST_BYTES >> 30} GB; choose a smaller one, or train it from a shell.")
    key = make_set(roots)
    for path in found:
        if path.suffix.lower() in (*SUFFIXES, *_TEXTS, ".jsonl", ".csv", ".json"):
            _copy(path, roots.data / FOLDER / key / path.relative_to(source))
    return key, len(there)


def folders(roots: Roots) -> dict[str, Path]:
    """The folders of pictures in the data root, by id; sets are none, and what only holds folders of pictures is one too."""
    own = (roots.data / FOLDER).resolve()
    with_pictures = {
        above
        for path in places.inside(roots.data)
        if path.suffix.lower() in SUFFIXES and not path.resolve().is_relative_to(own)
        for above in path.parents
        if above != roots.data and above.is_relative_to(roots.data)
    }
    return {places.key_of(roots.data, path): path for path in sorted(with_pictures)}


def freeze(folder: Path, goal: Path) -> None:
    """A run's own copy of a set: pictures are linked where the disk can, as nobody writes into them; captions are copied.

    Raises:
        UserError: if it cannot be written.
    """
    for path in places.inside(folder):
        if path.is_file():
            target = goal / path.relative_to(folder)
            files.make_folder(target.parent)
            if path.suffix.lower() in SUFFIXES:
                with suppress(OSError):
                    target.hardlink_to(path)
                    continue
            _copy(path, target)


def caption_of(picture: Path) -> str:
    """What the page knows a picture's caption to be; "" if it has none, or one that cannot be read."""
    path = captions.caption_path(picture)
    try:
        return " ".join(captions.read_caption_file(path)) if path else ""
    except UserError:
        return ""


def write_caption(picture: Path, text: object) -> None:
    """Writes a picture's caption beside it in the set; none if the text is empty.

    Raises:
        UserError: if it is too long, no text, or cannot be written.
    """
    if not isinstance(text, str) or len(text) > LONGEST_CAPTION:
        raise UserError(f"A caption is a text of up to {LONGEST_CAPTION:,} characters; shorten that of {shown(picture)}.")
    words = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    old = captions.caption_path(picture)
    if words:
        files.write(picture.with_suffix(".txt"), words.encode())
    elif old:
        old.unlink(missing_ok=True)


@contextmanager
def hidden(folder: Path) -> Iterator[None]:
    """While it lasts a refusal says nothing of where a set lies, which nobody has chosen and nobody could find."""
    try:
        yield
    except UserError as problem:
        said = str(problem)
        for place in (str(folder.resolve()), str(folder)):
            said = said.replace(f"{place}{os.sep}", "").replace(f"'{place}'", "The set").replace(place, "The set")
        raise UserError(said.replace(folder.name, "The set")) from problem


def shown(path: Path) -> str:
    """A file's name as part of a sentence."""
    return places.shown(path.name)


def plain_stem(stem: str) -> str:
    """A file's name as a plain one: letters, digits, dashes; never empty, hidden, or a device's."""
    words = re.sub(r"[^\w-]+", "-", unicodedata.normalize("NFC", stem)).strip("-_")[:60]
    is_plain = words and not re.fullmatch(r"con|prn|aux|nul|com\d|lpt\d", words.lower())
    return words if is_plain else f"picture-{words}".rstrip("-")


def _free(folder: Path, stem: str, ending: str) -> Path:
    """A name of which neither a picture nor a caption is there."""
    taken = {path.stem.lower() for path in folder.iterdir()}
    names = (stem if number == 1 else f"{stem}-{number}" for number in range(1, 2 * MOST_PICTURES))
    return folder / (next(name for name in names if name.lower() not in taken) + ending)


def _copy(source: Path, goal: Path) -> None:
    files.make_folder(goal.parent)
    part = goal.with_name(f".{goal.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(source, part)
        part.replace(goal)
    except OSError as problem:
        raise UserError(f"{shown(source)} could not be copied ({problem.strerror}); free space, then drop it again.") from problem
    finally:
        part.unlink(missing_ok=True)


def _sentence(problem: UserError, path: Path) -> str:
    """A refusal without the place where the upload lay."""
    return str(problem).replace(str(path), shown(path))
