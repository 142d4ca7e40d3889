"""What lies in a folder of pictures: which are trained on, with which captions, and what is wrong, file by file.

People keep their pictures as other tools want them, so all of these are read as they lie: .txt or .caption files beside the pictures,
`10_sks dog` folders (10 repeats, "sks dog" where no caption is found), and tables of captions. A caption is looked for beside the picture,
then in a table, then, if asked for, in the file's name, then in the folder's name, then in the default. A defect never ends the scan:
each becomes a finding with its file, since nobody wants to mend a folder one error at a time. The order is that of the names, numbers by
value, whatever the file system says. Nothing is opened for writing.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdlora import caption_tables
from sdlora.caption_tables import listed, same
from sdlora.captions import read_caption_file
from sdlora.dataset import Finding, Sample
from sdlora.errors import UserError
from sdlora.images import SUFFIXES

CAPTION_SUFFIXES = (".txt", ".caption")
_OTHER_PICTURES = frozenset({
    ".heic", ".heif", ".psd", ".svg", ".jxl", ".jp2", ".jpe", ".tif", ".tiff", ".avif", ".gif", ".apng", ".tga", ".exr", ".hdr", ".ico",
    ".icns", ".pdf", ".eps", ".ai", ".xcf", ".kra", ".clip", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".raw", ".dds",
    ".ppm", ".pgm", ".pbm", ".qoi", ".mp4", ".webm", ".mov", ".avi", ".mkv",
})  # fmt: skip
_NOT_THE_USERS = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information"})
_REGULARISATION = frozenset({"reg", "regs", "regularisation", "regularization", "reg_images"})
_MOST_LEVELS = 64  # of sub-folders: real trees have about 5, and paths end at 4,096 bytes
_MASK_LABEL = "-masklabel"  # behind a picture's name: its mask, as OneTrainer writes it
_MOST_REPEATS = 999  # a larger number before a folder's name is a year or a date

_Identity = tuple[int, int] | Path  # device and number, the same for all names of one file
_Beside = Mapping[tuple[Path, str], tuple[Path, ...]]  # (folder, stem) → files, the one that counts first


@dataclass(frozen=True)
class Scan:
    """The samples of a folder in the order of their names, and what was found, the worst first."""

    samples: tuple[Sample, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class _File:
    path: Path
    bytes: int
    identity: _Identity
    may_be_alias: bool


@dataclass(frozen=True)
class _Captions:
    """Where the captions of a folder come from."""

    beside: _Beside
    rows: Mapping[Path, tuple[str, ...]] | None  # None if there is no table
    classes: Mapping[Path, tuple[int, str]]  # folder → repeats and caption that its name says
    alternatives: bool
    from_names: bool
    default: str | None


def scan(
    folder: Path,
    *,
    repeats: int = 1,
    default_caption: str | None = None,
    captions_from_names: bool = False,
    caption_lines: Literal["joined", "alternatives"] = "joined",
    caption_suffixes: tuple[str, ...] = CAPTION_SUFFIXES,
    folder_names: bool = True,
    sub_folders: bool = True,
    metadata: Path | None = None,
    masks: Path | None = None,
    source: int = 0,
) -> Scan:
    """Everything in a folder that can be trained on, and everything that cannot, with the reason.

    Args:
        repeats: how often each picture is seen per epoch, ≥ 1; what an `N_token class` folder says is multiplied by it.
        default_caption: for pictures that have none.
        captions_from_names: "red_star 01.png" has the caption "red star".
        caption_lines: "joined", or each line of a caption is an alternative.
        caption_suffixes: those of caption files, lower case with the dot; if a picture has several files, the first suffix counts.
        folder_names: whether `N_token class` says anything.
        sub_folders: whether they are looked into.
        metadata: table of captions (.jsonl, .csv or .json); without it, those in `caption_tables.NAMES` are found by themselves.
        masks: folder of greyscale pictures named like the pictures; it may lie in the folder.
        source: number of the data entry in the config.

    Returns:
        Samples and findings; the samples should be trained on only if no finding stops.
    """
    if not _is_folder(folder):
        what = "There is no such folder that can be opened."
        return Scan((), (Finding("stops", "folder-missing", what, "Name a folder of pictures.", folder),))
    findings: list[Finding] = []
    files = _walk(folder, masks=masks, sub_folders=sub_folders, findings=findings)
    found_tables = [file.path for file in files if file.path.name.lower() in caption_tables.NAMES]
    tables = found_tables if metadata is None else [metadata]
    _note_leftovers(folder, [file for file in files if file.path not in {*found_tables, *tables}], caption_suffixes, findings)
    all_pictures = _pictures(folder, files, findings)
    labels = {(path.parent, path.stem): path for path in all_pictures if path.stem.endswith(_MASK_LABEL)}
    pictures = [path for path in all_pictures if (path.parent, path.stem) not in labels]
    captions = _Captions(
        beside=_beside(files, caption_suffixes),
        rows=_rows(tables, folder, pictures, caption_lines == "alternatives", findings) if tables else None,
        classes=_classes(folder, pictures, findings) if folder_names else {},
        alternatives=caption_lines == "alternatives",
        from_names=captions_from_names,
        default=default_caption,
    )
    _note_clashes(pictures, captions.beside, findings)
    beside = lambda picture: labels.get((picture.parent, picture.stem + _MASK_LABEL))  # noqa: E731
    mask_of = beside if masks is None else _masks(folder, masks, findings)
    samples = []
    for picture in pictures:
        times = repeats * captions.classes.get(picture.parent, (1, ""))[0]
        if times and (texts := _captions_of(picture, captions, findings)):
            samples.append(Sample(picture, texts, repeats=times, mask=mask_of(picture), source=source))
    return Scan(tuple(samples), tuple(sorted(findings, key=_worst_first)))


def _worst_first(finding: Finding) -> tuple[Any, ...]:
    return ("stops", "warns", "notes").index(finding.severity), _place(finding.path or Path()), finding.code


def _place(path: Path) -> tuple[Any, ...]:
    """Where a path stands in the order: folder by folder, numbers by value, whatever the capitals and the spelling of accents.

    Every second part of a split name is a number, so that texts are compared with texts and numbers with numbers.
    """
    names = [re.split(r"([0-9]+)", same(part).casefold()) for part in (*path.parent.parts, path.stem)]
    return tuple(tuple(int(one) if i % 2 else one for i, one in enumerate(name)) for name in names), path.parts


# --- files ---


def _walk(folder: Path, *, masks: Path | None, sub_folders: bool, findings: list[Finding]) -> list[_File]:
    """The user's files of the whole tree, in order; linked folders come last, so that a link never takes its goal's place."""
    files: list[_File] = []
    hidden: list[Path] = []
    seen: set[_Identity] = set()
    left_out = _identity(masks, masks.stat()) if masks is not None and _is_folder(masks) else None
    waiting, linked = [folder], list[Path]()
    while waiting or linked:
        here = waiting.pop() if waiting else linked.pop(0)
        if refusal := _refusal(here, folder, seen):
            findings.append(refusal)
            continue
        seen.add(_identity(here, here.stat()))
        for path, state in _entries(here, findings):
            if path.name.startswith(".") or path.name.casefold() in _NOT_THE_USERS:
                hidden.append(path.relative_to(folder))
            elif stat.S_ISREG(state.st_mode):
                files.append(_File(path, state.st_size, _identity(path, state), path.is_symlink() or state.st_nlink > 1))
            elif not stat.S_ISDIR(state.st_mode):
                what, advice = "This is neither a file nor a folder, and is left out.", "Take it out of the folder."
                findings.append(Finding("warns", "not-a-file", what, advice, path))
            elif sub_folders and _identity(path, state) != left_out:
                (linked if path.is_symlink() else waiting).append(path)
    if hidden:
        what = f"Hidden files and those of the system are left out: {listed([path.as_posix() for path in sorted(hidden, key=_place)])}."
        findings.append(Finding("notes", "hidden", what, "There is nothing to do.", folder))
    return sorted(files, key=lambda file: _place(file.path))


def _entries(here: Path, findings: list[Finding]) -> Iterator[tuple[Path, os.stat_result]]:
    """What a folder holds, in order, with its status; what has none is a finding."""
    try:
        paths = sorted(here.iterdir(), key=_place)
    except OSError as problem:
        what = f"The folder cannot be opened ({problem.strerror})."
        findings.append(Finding("stops", "folder-unreadable", what, "Give yourself the right to read it.", here))
        return
    for path in paths:
        try:
            path.name.encode()
            yield path, path.stat()
        except UnicodeEncodeError:
            what = f"The name {path.name!a} in this folder is not UTF-8."
            findings.append(Finding("stops", "name-not-utf8", what, "Give it another name or take it out.", here))
        except OSError as problem:
            what = f"This cannot be opened ({problem.strerror}), and is left out."
            findings.append(Finding("warns", "unreadable", what, "Mend the link or take it out of the folder.", path))


def _refusal(here: Path, folder: Path, seen: set[_Identity]) -> Finding | None:
    """Why a sub-folder is not looked into, if so."""
    if here == folder:
        return None
    if here.name.casefold() in _REGULARISATION:
        what = "The folder is left out, since its name says that it holds regularisation pictures."
        advice = "Name it in the config as a data folder with regularisation = true, or rename it if its pictures should be learned."
        return Finding("warns", "regularisation", what, advice, here)
    if len(here.relative_to(folder).parts) > _MOST_LEVELS:
        what = f"The folder is left out, since it lies more than {_MOST_LEVELS} folders deep."
        return Finding("warns", "too-deep", what, "Move its pictures further up.", here)
    advice = "Take the link out of the folder."
    if here.is_symlink() and here.parent.resolve().is_relative_to(here.resolve()):
        return Finding("warns", "link-loop", "The folder is left out, since it links to one that it lies in.", advice, here)
    if _identity(here, here.stat()) in seen:
        return Finding("warns", "reached-twice", "The folder is left out, since it is also reached by another path.", advice, here)
    return None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # of names that are too long, and below folders that may not be read
        return False


def _identity(path: Path, state: os.stat_result) -> _Identity:
    return (state.st_dev, state.st_ino) if state.st_ino else path  # 0 on file systems without numbers


def _pictures(folder: Path, files: list[_File], findings: list[Finding]) -> list[Path]:
    """The pictures among the files, each file once, in order."""
    pictures: dict[_Identity, Path] = {}
    ours = [file for file in files if file.path.suffix.lower() in SUFFIXES]
    for file in sorted(ours, key=lambda file: file.may_be_alias):  # after what it may stand for; the sort is stable
        if not file.bytes:
            findings.append(Finding("stops", "empty-file", "The picture has 0 bytes.", "Copy it anew or take it out.", file.path))
        elif file.identity in pictures:
            what = f"The picture is left out, since it is the same file as {pictures[file.identity].relative_to(folder)}."
            advice = "Take one of them out; repeats say how often a picture is seen."
            findings.append(Finding("warns", "reached-twice", what, advice, file.path))
        else:
            pictures[file.identity] = file.path
    if not pictures:
        advice = f"Put pictures into it; {', '.join(sorted(SUFFIXES))} are read."
        findings.append(Finding("stops", "no-pictures", "The data folder holds no picture that can be used.", advice, folder))
    return sorted(pictures.values(), key=_place)


def _note_leftovers(folder: Path, files: list[_File], caption_suffixes: tuple[str, ...], findings: list[Finding]) -> None:
    """Says of each file that is neither a picture nor the caption of one why it is not used."""
    stems = {(file.path.parent, same(file.path.stem)) for file in files if file.path.suffix.lower() in SUFFIXES | _OTHER_PICTURES}
    other = []
    for path in (file.path for file in files if file.path.suffix.lower() not in SUFFIXES):
        suffix = path.suffix.lower()
        if suffix in caption_suffixes:
            if (path.parent, same(path.stem)) not in stems:
                what, advice = "There is no picture for this caption.", "Give it the name of its picture, or take it out."
                findings.append(Finding("warns", "caption-without-picture", what, advice, path))
        elif suffix in _OTHER_PICTURES:
            what = f"The file is left out, since {suffix} is not read."
            findings.append(Finding("warns", "unsupported", what, "Save it as PNG or JPEG, or take it out.", path))
        else:
            other.append(path.relative_to(folder).as_posix())
    if other:
        what = f"Files that are neither pictures nor captions are left out: {listed(other)}."
        findings.append(Finding("notes", "other-files", what, "There is nothing to do.", folder))


def _note_clashes(pictures: list[Path], beside: _Beside, findings: list[Finding]) -> None:
    """Pictures that cannot be told apart: by systems without capitals, or by the one caption file that they share."""
    spelled: dict[str, Path] = {}
    sharing: dict[tuple[Path, str], Path] = {}
    for picture in pictures:
        first = spelled.setdefault(same(picture.as_posix()).casefold(), picture)
        if first != picture:
            what = f"The path differs from that of {first.name} only in capitals or in how accents are stored."
            findings.append(Finding("warns", "same-name", what, "Rename one, since other systems keep only one of them.", picture))
        first = sharing.setdefault((picture.parent, same(picture.stem)), picture)
        if first.suffix != picture.suffix and (files := _called(picture.stem, picture.parent, beside)):
            what = f"The caption {files[0].name} is also that of {first.name}."
            findings.append(Finding("warns", "shared-caption", what, "Rename one, or take it out if it is a copy.", picture))


def _masks(folder: Path, masks: Path, findings: list[Finding]) -> Callable[[Path], Path | None]:
    """From a picture to its mask: in the same sub-folder of the masks, else at their top."""
    if not _is_folder(masks):
        what = "There is no such folder of masks that can be opened."
        findings.append(Finding("stops", "masks-missing", what, "Name a folder of pictures.", masks))
        return lambda _: None
    beside = _beside(_walk(masks, masks=None, sub_folders=True, findings=findings), tuple(sorted(SUFFIXES)))

    def mask_of(picture: Path) -> Path | None:
        """The picture's mask from the same place below the folder of masks or from its top; a finding if none is there, or several."""
        places = (masks / picture.parent.relative_to(folder), masks)
        found = next((found for place in places if (found := _called(picture.stem, place, beside))), ())
        if not found:
            what, advice = "The picture has no mask, so all of it is learned.", f"Put one into {masks.name}."
            findings.append(Finding("warns", "mask-missing", what, advice, picture))
        if len(found) > 1:
            what = f"The picture has several masks: {listed([path.name for path in found])}."
            findings.append(Finding("stops", "mask-ambiguous", what, "Leave one of them.", picture))
        return found[0] if found else None

    return mask_of


# --- captions ---


def _beside(files: list[_File], suffixes: tuple[str, ...]) -> _Beside:
    """(folder, stem) → the files with one of the suffixes, in the order of the suffixes; also under the stem's common spelling."""
    found: dict[tuple[Path, str], tuple[Path, ...]] = {}
    paths = [file.path for file in files if file.path.suffix.lower() in suffixes]
    for path in sorted(paths, key=lambda path: suffixes.index(path.suffix.lower())):
        found[path.parent, path.stem] = (*found.get((path.parent, path.stem), ()), path)
    return {(folder, same(stem)): paths for (folder, stem), paths in found.items()} | found


def _called(stem: str, folder: Path, beside: _Beside) -> tuple[Path, ...]:
    return beside.get((folder, stem)) or beside.get((folder, same(stem)), ())


def _captions_of(picture: Path, captions: _Captions, findings: list[Finding]) -> tuple[str, ...]:
    """The alternatives for one picture from the nearest place that has any; none if the file beside it cannot be read."""
    files = _called(picture.stem, picture.parent, captions.beside)
    row = (captions.rows or {}).get(picture)
    beside = _read(files[0], captions.alternatives, findings) if files else ()
    if beside is None:
        return ()
    if len(files) > 1 or (beside and row and beside != row):
        rival = files[1].name if len(files) > 1 else "the table of captions"
        what = f"Both {files[0].name} and {rival} have a caption for this picture; that of {files[0].name} is used."
        findings.append(Finding("warns", "two-captions", what, "Take one of them out.", picture))
    if beside or row:
        return beside or row or ()
    named = _from_name(picture.stem) if captions.from_names else ""
    fallback = named or captions.classes.get(picture.parent, (1, ""))[1] or captions.default or ""
    code = "caption-empty" if files or row is not None else "not-listed" if captions.rows is not None else "caption-missing"
    findings.append(_without_caption(picture, code, fallback))
    return (fallback,) if fallback else ()


def _without_caption(picture: Path, code: str, fallback: str) -> Finding:
    found = {
        "caption-empty": "The picture's caption is empty",
        "not-listed": "The picture is neither in the table of captions nor has it a caption beside it",
        "caption-missing": "The picture has no caption",
    }
    severity: Literal["stops", "warns", "notes"] = "stops" if not fallback else "notes" if code == "caption-missing" else "warns"
    what = found[code] + (f"; '{fallback}' is used." if fallback else ".")
    for_all = "" if fallback else ", or one caption for all such pictures into [[data]]"
    return Finding(severity, code, what, f"Write what it shows into {picture.stem}.txt beside it{for_all}.", picture)


def _read(path: Path, alternatives: bool, findings: list[Finding]) -> tuple[str, ...] | None:
    """A caption file's alternatives, none if it is empty; None if it cannot be read."""
    try:
        if path.stat().st_size < 1024 and not path.read_bytes().removeprefix(b"\xef\xbb\xbf").strip():
            return ()
        return read_caption_file(path, alternatives=alternatives)
    except UserError as problem:
        what, _, advice = str(problem).partition("; ")
        what, advice = f"{what.removesuffix('.')}.", f"{advice[:1].upper()}{advice[1:]}" or "Write it anew as UTF-8 text."
    except OSError as problem:
        what, advice = f"The caption cannot be opened ({problem.strerror}).", "Give yourself the right to read it."
    findings.append(Finding("stops", "caption-unreadable", what, advice, path))
    return None


def _from_name(stem: str) -> str:
    """What a file name says: underscores are spaces, and a number at the end is a count."""
    return " ".join(re.sub(r"[\s_.-]*\(?[0-9]+\)?$", "", stem).replace("_", " ").split())


def _rows(
    tables: list[Path], folder: Path, pictures: list[Path], alternatives: bool, findings: list[Finding]
) -> dict[Path, tuple[str, ...]]:
    rows, found = caption_tables.read(tables, folder=folder, pictures=pictures, alternatives=alternatives)
    findings += found
    return rows


def _classes(folder: Path, pictures: list[Path], findings: list[Finding]) -> dict[Path, tuple[int, str]]:
    """What the nearest `N_token class` folder says: (repeats, caption) for each folder that holds pictures."""
    classes: dict[Path, tuple[int, str]] = {}
    said: dict[Path, Finding] = {}
    for here in dict.fromkeys(picture.parent for picture in pictures):
        lineage = [here, *here.parents][: len(here.relative_to(folder).parts) + 1]
        for place in lineage:
            if parts := re.fullmatch(r"([0-9]{1,20})_(.*\S.*)", place.absolute().name):
                times, caption = int(parts[1]), parts[2].strip()
                said[place] = _class_finding(place, times, caption)
                if times <= _MOST_REPEATS:
                    classes[here] = times, caption
                break
    findings += said.values()
    return classes


def _class_finding(place: Path, times: int, caption: str) -> Finding:
    if times > _MOST_REPEATS:
        what = f"The number {times} in the folder's name is not taken as repeats, since it is more than {_MOST_REPEATS}."
        return Finding("notes", "folder-name", what, "Give repeats in the config if that is meant.", place)
    if not times:
        what = "The folder is left out, since its name asks for 0 repeats."
        return Finding("warns", "folder-name", what, "Rename it if its pictures should be learned.", place)
    what = f"The folder's name asks for {times} repeats, and for '{caption}' where there is no caption."
    return Finding("notes", "folder-name", what, "Rename it if that is not meant.", place)
