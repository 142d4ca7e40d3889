"""Tables that say what pictures show: `metadata.jsonl` and `.csv` (file_name; text or caption) and sd-scripts' JSON by path.

A name in a table only selects among the pictures that were found, so a table never makes anything else be opened. Rows are judged one by
one: a row that cannot be read is a finding with its line, and the others still count. Of two rows for one picture neither is guessed to
be the better one: if they differ, that stops.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

from sdlora.dataset import Finding

NAMES = frozenset({"metadata.jsonl", "metadata.csv", "metadata.json"})
_SHOWN = 5  # names in a finding about many


def same(name: str) -> str:
    """One spelling for accents: macOS stores "é" as two characters, others as one (Unicode annex 15, form C)."""
    return unicodedata.normalize("NFC", name)


def listed(names: Sequence[object]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(str(name) for name in names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def read(
    tables: Sequence[Path], *, folder: Path, pictures: Sequence[Path], alternatives: bool
) -> tuple[dict[Path, tuple[str, ...]], list[Finding]]:
    """The captions that tables give to the pictures of a folder.

    Args:
        folder: the data folder; names are relative to the table's own folder if that lies in it, else to this.
        pictures: all that a table may speak of.
        alternatives: whether the lines of a caption are alternatives; a list of texts always is.

    Returns:
        Picture → captions (none if its text is empty), and what is wrong with the tables.
    """
    rows: dict[Path, tuple[str, ...]] = {}
    findings: list[Finding] = []
    for table in tables:
        base = table.parent if table.parent.is_relative_to(folder) else folder
        find = _finder(pictures, base, loose=table.suffix.lower() == ".json")
        for place, row in _rows(table):
            try:
                name, texts = _name_and_texts(row, alternatives)
            except ValueError as problem:
                advice = "Mend it, or take the table out of the folder."
                findings.append(Finding("stops", "metadata", f"{place} {problem}.", advice, table))
                continue
            picture = find(name)
            if picture is None:
                what = f"{place} names {name!r}, and there is no such picture."
                findings.append(Finding("warns", "row-without-picture", what, "Correct the name or delete the row.", table))
            elif picture in rows:
                findings.append(_twice(place, name, table, is_equal=rows[picture] == texts))
            else:
                rows[picture] = texts
    return rows, findings


def _twice(place: str, name: str, table: Path, *, is_equal: bool) -> Finding:
    severity: Literal["stops", "warns"] = "warns" if is_equal else "stops"
    what = f"{place} names {name!r} again" + ("." if is_equal else ", with another caption.")
    return Finding(severity, "row-twice", what, "Delete one of the rows.", table)


def _finder(pictures: Sequence[Path], base: Path, *, loose: bool) -> Callable[[str], Path | None]:
    """From a name in a table to the one picture that it means.

    Args:
        loose: sd-scripts' names may lack their ending, or be absolute paths, perhaps of another machine.
    """
    spellings: list[Callable[[Path], str]] = [lambda path: path.as_posix(), lambda path: same(path.as_posix())]
    if loose:
        spellings += [lambda path: same(path.with_suffix("").as_posix()), lambda path: same(path.name), lambda path: same(path.stem)]
    known: list[dict[str, list[Path]]] = []
    for spelling in spellings:
        known.append(defaultdict(list))
        for picture in pictures:
            if picture.is_relative_to(base):
                known[-1][spelling(picture.relative_to(base))].append(picture)

    def find(name: str) -> Path | None:
        path = PureWindowsPath(same(name))  # knows both kinds of slashes
        asked = [PurePosixPath(name).as_posix(), path.as_posix(), path.as_posix(), path.name, path.name]
        hits = (way.get(one, []) for way, one in zip(known, asked, strict=False))
        return next((found[0] for found in hits if len(found) == 1), None)

    return find


def _name_and_texts(row: object, alternatives: bool) -> tuple[str, tuple[str, ...]]:
    """A row's file name and captions; a ValueError says in words what is wrong with it."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError("is not an object with file_name and text")
    if None in row:
        raise ValueError("has more columns than the first line; a text with commas needs quotes around it")
    name = row.get("file_name")
    text = row.get("caption") if row.get("text") is None else row["text"]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"has no file_name (found: {listed(list(row)) or 'nothing'})")
    given = text if isinstance(text, list) else [text]
    parts = [part for part in given if isinstance(part, str)]
    if len(parts) < len(given):
        raise ValueError(f"has neither text nor caption (found: {listed([key for key in row if row[key] is not None])})")
    lines = [line for part in parts for line in (part.splitlines() if alternatives else [part])]
    texts = tuple(dict.fromkeys(" ".join(line.split()) for line in lines if line.split()))
    if re.search("[\0\ud800-\udfff]", "".join((name, *texts))):
        raise ValueError("holds half a character or a NUL")
    return name, texts


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """(where it stands, row) for each row of a table; a ValueError stands for a row that cannot be read."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        yield "Its name", ValueError(f"ends in '{path.suffix}'; {', '.join(_READERS)} are read")
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        yield "The table", ValueError("is not UTF-8")
    except OSError as problem:
        yield "The table", ValueError(f"cannot be opened ({problem.strerror})")
    else:
        yield from reader(text)


def _jsonl(text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): U+2028 may stand in a caption
        if line.strip():
            yield f"Line {number}", _parsed(line)


def _csv(text: str) -> Iterator[tuple[str, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        columns = reader.fieldnames or []
        if "file_name" not in columns:
            yield "Line 1", ValueError(f"has no column file_name (found: {listed(columns) or 'nothing'})")
            return
        for row in reader:
            yield f"Line {reader.line_num}", row
    except csv.Error as problem:
        yield f"Line {reader.reader.line_num}", ValueError(f"is not CSV ({problem})")


def _json(text: str) -> Iterator[tuple[str, object]]:
    """sd-scripts' {path: {"caption": …, "tags": …}}. Objects are parsed to tuples of pairs, so that a path that stands twice shows."""
    entries = _parsed(text, object_pairs_hook=tuple)
    if not isinstance(entries, tuple):
        yield "The table", entries if isinstance(entries, ValueError) else ValueError("is not an object of paths")
        return
    for name, entry in entries:
        fields = dict(entry) if isinstance(entry, tuple) else {}
        tags = fields.get("tags")
        parts = [fields.get("caption"), ", ".join(map(str, tags)) if isinstance(tags, list) else tags]
        texts = [part.strip() for part in parts if isinstance(part, str)]
        known = {"text": ", ".join(filter(None, texts))} if texts else {}
        yield f"Entry {name!r}", fields | {"file_name": name} | known


def _parsed(text: str, *, object_pairs_hook: Callable[[list[tuple[str, object]]], object] = dict) -> object:
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except json.JSONDecodeError as problem:
        return ValueError(f"is not JSON ({problem.msg} at column {problem.colno})")
    except (ValueError, RecursionError):
        return ValueError("is not JSON that can be read")


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".json": _json}
