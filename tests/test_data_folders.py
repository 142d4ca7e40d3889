"""Folders as people have them: every layout is read as it lies, every defect is named with its file, and nothing is touched."""

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdlora import caption_tables, data_folders, kohya_toml
from sdlora.data_folders import Scan
from sdlora.errors import UserError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def put(folder: Path, name: str, caption: str | bytes | None = "a red star", *, ending: str = ".txt") -> Path:
    """A small picture, with a caption file beside it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), "red").save(path, format="PNG")
    if caption is not None:
        path.with_suffix(ending).write_bytes(caption.encode() if isinstance(caption, str) else caption)
    return path


def everything(folder: Path) -> dict[str, object]:
    """All that a scan could have changed: names, bytes, times of change."""
    below = [Path(place) / name for place, folders, files in os.walk(folder) for name in [*folders, *files]]
    return {os.fsencode(one).hex(): (one.read_bytes() if one.is_file() else None, one.lstat().st_mtime_ns) for one in [folder, *below]}


def scan(folder: Path, **options: Any) -> Scan:
    """The scan itself, and that it leaves the folder as it was."""
    before = everything(folder)
    found = data_folders.scan(folder, **options)
    assert everything(folder) == before
    return found


def said(found: Scan) -> dict[str, str]:
    """Picture → caption, for pictures with one."""
    return {sample.picture.name: " | ".join(sample.captions) for sample in found.samples}


def named(found: Scan) -> list[tuple[str, str, str]]:
    """What was found, but for notes: severity, kind, file."""
    return [(one.severity, one.code, one.path.name if one.path else "") for one in found.findings if one.severity != "notes"]


def notes(found: Scan) -> str:
    return "\n".join(f"{one.code}: {one.what}" for one in found.findings if one.severity == "notes")


# --- order and names ---


def test_pictures_of_all_sub_folders_are_found_and_a_clean_folder_has_no_findings(tmp_path: Path) -> None:
    put(tmp_path, "b.PNG", "waves")
    put(tmp_path, "a/deep/er/c.jpg", "\ufeffa star\nat night")
    found = scan(tmp_path, repeats=2, source=3)
    assert [(one.picture, one.captions, one.repeats, one.source) for one in found.samples] == [
        (tmp_path / "a/deep/er/c.jpg", ("a star at night",), 2, 3),
        (tmp_path / "b.PNG", ("waves",), 2, 3),
    ]
    assert found.findings == ()


def test_the_order_is_that_of_people_and_the_same_however_the_file_system_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["2.png", "10.png", "a.png", "a2b.png", "a10b.png", "B.png", "B c/1.png", f"{COMPOSED}.png", "caff.png", "z/01.png", "z/1.png"]
    for name in reversed(names):
        put(tmp_path, name)
    real = Path.iterdir
    orders = []
    for turn in (sorted, lambda paths: sorted(paths, reverse=True)):
        monkeypatch.setattr(Path, "iterdir", lambda path, turn=turn: iter(turn(real(path))))
        orders.append([one.picture.relative_to(tmp_path).as_posix() for one in scan(tmp_path).samples])
    assert orders[0] == orders[1]
    expected = ["2.png", "10.png", "a.png", "a2b.png", "a10b.png", "B.png", "B c/1.png", "caff.png", f"{COMPOSED}.png"]
    assert orders[0] == [*expected, "z/01.png", "z/1.png"]


@pytest.mark.parametrize(
    "stem", ["two words", "-rf", "新しい", "🦊 fox", "line\nbreak", "a.b.c", "%s{x}", "'\"", COMPOSED, DECOMPOSED, " "]
)
def test_odd_names_are_names_like_others(tmp_path: Path, stem: str) -> None:
    path = put(tmp_path, f"{stem}.png", "a fox")
    found = scan(tmp_path)
    assert [(one.picture, one.captions) for one in found.samples] == [(path, ("a fox",))]
    assert found.findings == ()


@pytest.mark.parametrize(("picture", "caption"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_caption_belongs_to_its_picture_however_accents_are_stored(tmp_path: Path, picture: str, caption: str) -> None:
    put(tmp_path, f"{picture}.png", None)
    (tmp_path / f"{caption}.txt").write_text("a cup")
    found = scan(tmp_path)
    assert said(found) == {f"{picture}.png": "a cup"}
    assert found.findings == ()


def test_both_spellings_of_an_accent_side_by_side_keep_their_own_captions_and_are_warned_of(tmp_path: Path) -> None:
    for name in (COMPOSED, DECOMPOSED):
        put(tmp_path, f"{name}.png", f"{len(name)} characters")
    found = scan(tmp_path)
    assert said(found) == {f"{COMPOSED}.png": "4 characters", f"{DECOMPOSED}.png": "5 characters"}
    assert [one[:2] for one in named(found)] == [("warns", "same-name")]


def test_names_that_differ_in_capitals_alone_are_warned_of(tmp_path: Path) -> None:
    put(tmp_path, "Fox.png")
    put(tmp_path, "fox.png")
    if len(list(tmp_path.iterdir())) < 4:
        pytest.skip("this file system does not tell capitals apart")
    found = scan(tmp_path)
    assert len(found.samples) == 2
    assert [one[:2] for one in named(found)] == [("warns", "same-name")]


def test_a_name_that_is_not_utf8_stops_and_can_be_printed(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe4.png")).write_bytes((tmp_path / "a.png").read_bytes())
    except OSError:
        pytest.skip("this file system knows UTF-8 names only")
    found = scan(tmp_path)
    assert named(found) == [("stops", "name-not-utf8", tmp_path.name)]
    assert r"\udce4.png" in found.findings[0].what
    assert list(said(found)) == ["a.png"]
    str(found).encode()


# --- captions beside the pictures ---


def test_lines_of_a_caption_are_joined_or_alternatives(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "a star\r\n\r\n a  moon \n")
    assert said(scan(tmp_path)) == {"a.png": "a star a moon"}
    assert said(scan(tmp_path, caption_lines="alternatives")) == {"a.png": "a star | a moon"}


def test_caption_files_may_end_in_caption_and_txt_wins(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "from caption", ending=".caption")
    put(tmp_path, "b.png", "from TXT", ending=".TXT")
    put(tmp_path, "c.png", "from caption", ending=".caption")
    put(tmp_path, "c.png", "from txt")
    found = scan(tmp_path)
    assert said(found) == {"a.png": "from caption", "b.png": "from TXT", "c.png": "from txt"}
    assert named(found) == [("warns", "two-captions", "c.png")]
    assert said(scan(tmp_path, caption_suffixes=(".caption",)))["c.png"] == "from caption"


def test_a_picture_without_caption_stops_unless_there_is_something_to_say(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    put(tmp_path, "red_star-moon (2).png", None)
    put(tmp_path, "0001.png", None)
    found = scan(tmp_path)
    assert said(found) == {"a.png": "a red star"}
    assert named(found) == [("stops", "caption-missing", "0001.png"), ("stops", "caption-missing", "red_star-moon (2).png")]
    assert "0001.txt" in found.findings[0].advice
    by_name = scan(tmp_path, captions_from_names=True)
    assert said(by_name) == {"a.png": "a red star", "red_star-moon (2).png": "red star-moon"}
    assert named(by_name) == [("stops", "caption-missing", "0001.png")]
    by_default = scan(tmp_path, default_caption="a picture", captions_from_names=True)
    assert said(by_default) == {"0001.png": "a picture", "a.png": "a red star", "red_star-moon (2).png": "red star-moon"}
    assert named(by_default) == []
    assert "'a picture' is used" in notes(by_default)


@pytest.mark.parametrize(
    "content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"], ids=["0 bytes", "blank", "BOM", "BOM and line"]
)
def test_an_empty_caption_stops_and_with_a_default_is_warned_of(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, "a.png", content)
    found = scan(tmp_path)
    assert (said(found), named(found)) == ({}, [("stops", "caption-empty", "a.png")])
    found = scan(tmp_path, default_caption="a picture")
    assert (said(found), named(found)) == ({"a.png": "a picture"}, [("warns", "caption-empty", "a.png")])


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32", "shift-jis"])
def test_a_caption_in_another_encoding_stops_whatever_the_default_and_the_others_count(tmp_path: Path, encoding: str) -> None:
    put(tmp_path, "a.png", ("星" if encoding == "shift-jis" else "ähre").encode(encoding))
    put(tmp_path, "b.png")
    found = scan(tmp_path, default_caption="a picture")
    assert said(found) == {"b.png": "a red star"}
    assert named(found) == [("stops", "caption-unreadable", "a.txt")]
    assert found.findings[0].what.endswith(".")
    assert found.findings[0].advice


def test_a_caption_without_picture_is_warned_of(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "b.txt").write_text("a lost star")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.caption").write_text("in the wrong folder")
    warned = [("warns", "caption-without-picture", name) for name in ("b.txt", "a.caption")]
    assert named(scan(tmp_path)) == warned


def test_pictures_that_share_one_caption_file_are_warned_of(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg")
    put(tmp_path, "a.png")
    found = scan(tmp_path)
    assert said(found) == {"a.jpg": "a red star", "a.png": "a red star"}
    assert named(found) == [("warns", "shared-caption", "a.png")]


# --- sub-folders whose names say something ---


def test_n_token_class_folders_give_repeats_and_a_caption_where_there_is_none(tmp_path: Path) -> None:
    put(tmp_path, "10_sks dog/a.png", "sks dog on grass")
    put(tmp_path, "10_sks dog/close/b.png", None)
    put(tmp_path, "10_sks dog/3_sks_cat/c.png", None)
    put(tmp_path, "d.png", "no dog")
    found = scan(tmp_path, repeats=2, default_caption="a picture")
    assert {one.picture.name: (one.captions, one.repeats) for one in found.samples} == {
        "a.png": (("sks dog on grass",), 20),
        "b.png": (("sks dog",), 20),
        "c.png": (("sks_cat",), 6),
        "d.png": (("no dog",), 2),
    }
    assert named(found) == []
    assert "asks for 10 repeats, and for 'sks dog'" in notes(found)


def test_the_data_folder_itself_may_be_named_so_and_names_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "5_fox/a.png")
    monkeypatch.chdir(tmp_path / "5_fox")
    for folder in (tmp_path / "5_fox", Path()):
        assert [one.repeats for one in scan(folder).samples] == [5]
        found = scan(folder, folder_names=False)
        assert ([one.repeats for one in found.samples], found.findings) == ([1], ())


def test_a_year_is_no_number_of_repeats_and_0_leaves_the_folder_out(tmp_path: Path) -> None:
    put(tmp_path, "2024_05_holiday/a.png")
    put(tmp_path, "0_off/b.png")
    put(tmp_path, "10_ /c.png")
    put(tmp_path, "10 fox/d.png")
    found = scan(tmp_path)
    assert {one.picture.name: one.repeats for one in found.samples} == {"a.png": 1, "c.png": 1, "d.png": 1}
    assert named(found) == [("warns", "folder-name", "0_off")]
    assert "2024 in the folder's name is not taken as repeats" in notes(found)


@pytest.mark.parametrize("name", ["reg", "REG", "regularization"])
def test_a_folder_of_regularisation_pictures_is_not_trained_on_as_data(tmp_path: Path, name: str) -> None:
    put(tmp_path, "img/10_sks dog/a.png")
    put(tmp_path, f"{name}/1_dog/b.png")
    found = scan(tmp_path)
    assert list(said(found)) == ["a.png"]
    assert named(found) == [("warns", "regularisation", name)]
    assert list(said(scan(tmp_path / name))) == ["b.png"]


def test_sub_folders_can_be_left_alone(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    put(tmp_path, "old/b.png", None)
    found = scan(tmp_path, sub_folders=False)
    assert (said(found), found.findings) == ({"a.png": "a red star"}, ())


# --- tables of captions ---


def rows(folder: Path, *lines: object, name: str = "metadata.jsonl") -> None:
    (folder / name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")


def test_metadata_jsonl_says_what_pictures_show(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png", "c.png", "d.png", f"{DECOMPOSED}.png", "sub/e.png"):
        put(tmp_path, name, None)
    rows(
        tmp_path,
        {"file_name": "a.png", "text": "a\nstar", "author": "x"},
        "",
        json.dumps({"file_name": "./sub/b.png", "caption": "a moon\u2028at night"}, ensure_ascii=False),
        {"file_name": "c.png", "text": ["a sun", "a bright sun", "a  sun"]},
        {"file_name": "sub\\e.png", "text": "from Windows"},
        {"file_name": "d.png", "text": None, "caption": "a cloud"},
        json.dumps({"file_name": f"{COMPOSED}.png", "text": "a cup"}, ensure_ascii=False),
    )
    found = scan(tmp_path)
    assert said(found) == {
        "a.png": "a star", "b.png": "a moon at night", "c.png": "a sun | a bright sun", "d.png": "a cloud", f"{DECOMPOSED}.png": "a cup",
        "e.png": "from Windows",
    }  # fmt: skip
    assert found.findings == ()
    assert said(scan(tmp_path, caption_lines="alternatives"))["a.png"] == "a | star"


def test_metadata_csv_says_the_same_with_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    put(tmp_path, "a.png", None)
    put(tmp_path, "b, c.png", None)
    (tmp_path / "metadata.csv").write_text('\ufefffile_name, text\r\na.png,"red, ""big"",\nstar"\r\n"b, c.png",moon\r\n', encoding="utf-8")
    found = scan(tmp_path)
    assert (said(found), found.findings) == ({"a.png": 'red, "big", star', "b, c.png": "moon"}, ())


def test_a_table_in_a_sub_folder_speaks_of_that_sub_folder(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "at the top")
    put(tmp_path, "sub/a.png", None)
    rows(tmp_path / "sub", {"file_name": "a.png", "text": "below"})
    assert [one.captions for one in scan(tmp_path).samples] == [("at the top",), ("below",)]


def test_metadata_of_sd_scripts_is_read_with_its_tags_and_loose_paths(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("a.png", "b.png", "c.png", "d.png", "sub/e.png"):
        put(data, name, None)
    content = {
        "a": {"caption": "a star", "tags": "red, big", "train_resolution": [512, 512]},
        str(data / "b.png"): {"tags": "blue"},
        "D:\\elsewhere\\c.png": {"caption": "a moon"},
        "d.png": {"tags": ["x", "y"]},
        "/home/other/e": {"caption": "deep"},
    }
    expected = {"a.png": "a star, red, big", "b.png": "blue", "c.png": "a moon", "d.png": "x, y", "e.png": "deep"}
    for table in (tmp_path / "meta_cap.json", data / "metadata.json"):
        table.write_text(json.dumps(content))
        found = scan(data, metadata=table if table.parent == tmp_path else None)
        assert (said(found), found.findings) == (expected, ())


def test_a_row_never_leads_out_of_the_folder_and_a_name_that_fits_two_pictures_fits_none(tmp_path: Path) -> None:
    put(tmp_path, "outside.png")
    put(tmp_path, "data/a/x.png", None)
    put(tmp_path, "data/b/x.png", None)
    rows(tmp_path / "data", {"file_name": "../outside.png", "text": "y"}, {"file_name": str(tmp_path / "outside.png"), "text": "y"})
    (tmp_path / "data/metadata.json").write_text(json.dumps({"x": {"caption": "which?"}}))
    found = scan(tmp_path / "data")
    assert found.samples == ()
    assert [one[1] for one in named(found) if one[0] == "warns"] == ["row-without-picture"] * 3
    assert [one[1] for one in named(found) if one[0] == "stops"] == ["not-listed"] * 2


def test_defects_of_a_table_are_named_with_their_line_and_the_other_rows_count(tmp_path: Path) -> None:
    for name in "abcdef":
        put(tmp_path, f"{name}.png", None)
    rows(
        tmp_path,
        {"file_name": "a.png", "text": "good"},
        '{"file_name": "b.png", "text": "cut of',
        '["b.png", "a list"]',
        {"text": "no name"},
        {"file_name": "b.png", "prompt": "no text"},
        {"file_name": "gone.png", "text": "no picture"},
        {"file_name": "c.png", "text": "said"},
        {"file_name": "c.png", "text": "said"},
        {"file_name": "d.png", "text": "one thing"},
        {"file_name": "d.png", "text": "another"},
        {"file_name": "e.png", "text": "  "},
        '{"file_name": "b.png", "text": "half \\ud800"}',
        {"file_name": 5, "text": "x"},
        {"file_name": "b.png", "text": "NUL \0"},
        {"file_name": "b.png", "text": ["x", 5]},
        "[" * 100_000,
        '{"file_name": ' + "9" * 5000,
        "NaN",
    )
    found = scan(tmp_path)
    assert said(found) == {"a.png": "good", "c.png": "said", "d.png": "one thing"}
    lines = [(one.code, int(one.what.split()[1])) for one in found.findings if one.path == tmp_path / "metadata.jsonl"]
    assert sorted(lines, key=lambda one: one[1]) == [
        ("metadata", 2), ("metadata", 3), ("metadata", 4), ("metadata", 5), ("row-without-picture", 6), ("row-twice", 8), ("row-twice", 10),
        *[("metadata", line) for line in range(12, 19)],
    ]  # fmt: skip
    severities = {one.what.split()[1]: one.severity for one in found.findings if one.path == tmp_path / "metadata.jsonl"}
    assert [severities[line] for line in ("6", "8", "10")] == ["warns", "warns", "stops"]
    rest = [("stops", "not-listed", "b.png"), ("stops", "caption-empty", "e.png"), ("stops", "not-listed", "f.png")]
    assert [one for one in named(found) if one[2] != "metadata.jsonl"] == rest
    what = "\n".join(one.what for one in found.findings)
    assert "column 32" in what
    assert "(found: text)" in what
    assert "(found: file_name, prompt)" in what


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"name,text\na.png,star", "Line 1 has no column file_name (found: name, text)."),
        (b"", "Line 1 has no column file_name (found: nothing)."),
        (b"file_name,prompt\na.png,star", "Line 2 has neither text nor caption (found: file_name, prompt)."),
        (b"file_name,text\na.png", "Line 2 has neither text nor caption (found: file_name)."),
        (b"file_name,text\na.png,red, star", "Line 2 has more columns than the first line; a text with commas needs quotes around it."),
        (b'file_name,text\na.png,"star', "Line 2 is not CSV"),
        (b"file_name,text\na.png,\xe4", "The table is not UTF-8."),
        (b"file_name,text\na.png,a\0b", "Line 2 holds half a character or a NUL."),
        (b"file_name,text\na.png," + b"x" * 200_000, "Line 2 is not CSV"),
    ],
)
def test_defects_of_a_csv_table_stop(tmp_path: Path, content: bytes, sentence: str) -> None:
    put(tmp_path, "a.png", None)
    (tmp_path / "metadata.csv").write_bytes(content)
    found = scan(tmp_path)
    stops = [one for one in found.findings if one.code == "metadata"]
    assert [one.severity for one in stops] == ["stops"]
    assert stops[0].what.startswith(sentence)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[1, 2]", "The table is not an object of paths."),
        ("{", "The table is not JSON"),
        ('{"a": "star"}', "Entry 'a' has neither text nor caption (found: file_name)."),
        ('{"a": {"caption": 5}}', "Entry 'a' has"),
        ('{"a": {"caption": "x"}, "a": {"caption": "y"}}', "Entry 'a' names 'a' again, with another caption."),
    ],
)
def test_defects_of_a_table_by_path_stop(tmp_path: Path, content: str, sentence: str) -> None:
    put(tmp_path, "a.png", None)
    (tmp_path / "metadata.json").write_text(content)
    what = [one.what for one in scan(tmp_path).findings if one.severity == "stops" and one.path == tmp_path / "metadata.json"]
    assert len(what) == 1
    assert what[0].startswith(sentence)


def test_a_table_that_is_missing_or_of_another_kind_stops(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "a star")
    (tmp_path / "rows.xml").write_text("<x/>")
    for table, sentence in ((tmp_path / "gone.json", "cannot be opened"), (tmp_path / "rows.xml", ".jsonl, .csv, .json are read")):
        (stop,) = [one for one in scan(tmp_path, metadata=table).findings if one.severity == "stops"]
        assert (stop.path, sentence in stop.what) == (table, True)


def test_a_caption_beside_the_picture_wins_over_the_table_and_a_difference_is_said(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "beside")
    put(tmp_path, "b.png", "the same")
    put(tmp_path, "c.png", "not in the table")
    put(tmp_path, "d.png", "")
    table = [{"file_name": f"{name}.png", "text": text} for name, text in (("a", "table"), ("b", "the same"), ("d", "from the table"))]
    rows(tmp_path, *table)
    found = scan(tmp_path)
    assert said(found) == {"a.png": "beside", "b.png": "the same", "c.png": "not in the table", "d.png": "from the table"}
    assert named(found) == [("warns", "two-captions", "a.png")]


# --- files that are no pictures, and pictures that are none ---


def test_what_is_not_read_is_named_and_its_caption_is_not_called_lost(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    for name in ("b.heic", "c.psd", "d.svg", "e.CR2", "f.mp4"):
        put(tmp_path, name)
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "a.npz").write_text("x")
    found = scan(tmp_path)
    assert list(said(found)) == ["a.png"]
    assert named(found) == [("warns", "unsupported", name) for name in ("b.heic", "c.psd", "d.svg", "e.CR2", "f.mp4")]
    assert "neither pictures nor captions are left out: a.npz, notes.md." in notes(found)


def test_hidden_files_and_those_of_systems_are_left_out_and_said_once(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    for name in (
        "._a.png", ".hidden/b.png", ".ipynb_checkpoints/a-checkpoint.png", "Thumbs.db", "desktop.ini", ".DS_Store", "__MACOSX/a.png",
        "sub/@eaDir/a.png",
    ):  # fmt: skip
        put(tmp_path, name, None)
    found = scan(tmp_path)
    assert list(said(found)) == ["a.png"]
    assert [one.code for one in found.findings] == ["hidden"]
    assert "and 3 more" in notes(found)


def test_a_picture_of_0_bytes_stops_and_its_caption_is_not_called_lost(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    put(tmp_path, "b.png").write_bytes(b"")
    found = scan(tmp_path)
    assert (list(said(found)), named(found)) == (["a.png"], [("stops", "empty-file", "b.png")])


def test_a_folder_that_is_missing_a_file_or_without_pictures_stops(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    long = "x" * 5000
    for name, code in (("gone", "folder-missing"), ("file", "folder-missing"), (long, "folder-missing"), ("empty", "no-pictures")):
        found = data_folders.scan(tmp_path / name)
        assert (found.samples, named(found)) == ((), [("stops", code, name)])


def test_what_may_not_be_read_is_named_and_the_rest_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a.png")
    put(tmp_path, "locked/b.png")
    put(tmp_path, "c.png")
    iterdir, read_bytes = Path.iterdir, Path.read_bytes

    def refuse(path: Path, name: str) -> None:
        if path.name == name:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", lambda path: refuse(path, "locked") or iterdir(path))
    monkeypatch.setattr(Path, "read_bytes", lambda path: refuse(path, "c.txt") or read_bytes(path))
    found = data_folders.scan(tmp_path)
    assert said(found) == {"a.png": "a red star"}
    assert named(found) == [("stops", "caption-unreadable", "c.txt"), ("stops", "folder-unreadable", "locked")]


# --- links and trees ---


def test_a_picture_that_is_reached_twice_is_seen_once_and_the_file_wins_over_the_link(tmp_path: Path) -> None:
    put(tmp_path, "real/b.png", "the file")
    put(tmp_path, "c.png", "another")
    (tmp_path / "a.png").symlink_to(tmp_path / "real/b.png")
    (tmp_path / "a.txt").write_text("the link")
    os.link(tmp_path / "c.png", tmp_path / "d.png")
    (tmp_path / "again").symlink_to(tmp_path / "real")
    found = scan(tmp_path)
    assert said(found) == {"b.png": "the file", "c.png": "another"}
    assert named(found) == [("warns", "reached-twice", name) for name in ("a.png", "again", "d.png")]


def test_file_systems_that_do_not_number_their_files_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png", "sub/c.png", "other/d.png"):
        put(tmp_path, name)
    stat = Path.stat

    def without_number(path: Path, **options: Any) -> os.stat_result:
        fields = list(stat(path, **options))
        fields[1] = 0
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "stat", without_number)
    found = data_folders.scan(tmp_path)
    assert (sorted(said(found)), found.findings) == (["a.png", "b.png", "c.png", "d.png"], ())


def test_links_to_elsewhere_are_followed(tmp_path: Path) -> None:
    put(tmp_path, "elsewhere/a.png")
    put(tmp_path, "single.png", None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/b.png").symlink_to(tmp_path / "single.png")
    (tmp_path / "data/b.txt").write_text("linked")
    found = scan(tmp_path / "data")
    assert (said(found), found.findings) == ({"a.png": "a red star", "b.png": "linked"}, ())


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    put(tmp_path, "data/sub/a.png")
    (tmp_path / "data/sub/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/out").symlink_to(tmp_path)
    (tmp_path / "data/self").symlink_to("self")
    (tmp_path / "data/b.png").symlink_to("gone.png")
    found = scan(tmp_path / "data")
    assert list(said(found)) == ["a.png"]
    loops, broken = [("warns", "link-loop", name) for name in ("out", "up")], [("warns", "unreadable", name) for name in ("b.png", "self")]
    assert sorted(named(found)) == loops + broken


def test_very_deep_trees_and_pipes_called_pictures_hang_nothing(tmp_path: Path) -> None:
    put(tmp_path, "/".join(["d"] * 64) + "/deep.png", "deep")
    put(tmp_path, "/".join(["d"] * 65) + "/too.png", "too deep")
    os.mkfifo(tmp_path / "pipe.png")
    found = scan(tmp_path)
    assert list(said(found)) == ["deep.png"]
    assert named(found) == [("warns", "too-deep", "d"), ("warns", "not-a-file", "pipe.png")]


# --- masks ---


def test_masks_have_the_names_of_their_pictures_and_are_no_pictures_themselves(tmp_path: Path) -> None:
    for name in ("a.jpg", "sub/a.png", f"{COMPOSED}.png", "no.png"):
        put(tmp_path, name)
    for name in ("a.png", "sub/a.png", f"{DECOMPOSED}.webp"):
        put(tmp_path, f"masks/{name}", None)
    found = scan(tmp_path, masks=tmp_path / "masks")
    masks = {one.picture.relative_to(tmp_path).as_posix(): one.mask and one.mask.relative_to(tmp_path).as_posix() for one in found.samples}
    assert masks == {"a.jpg": "masks/a.png", f"{COMPOSED}.png": f"masks/{DECOMPOSED}.webp", "no.png": None, "sub/a.png": "masks/sub/a.png"}
    assert named(found) == [("warns", "mask-missing", "no.png")]


def test_several_masks_for_a_picture_and_a_missing_folder_of_masks_stop(tmp_path: Path) -> None:
    put(tmp_path, "data/a.png")
    put(tmp_path, "masks/a.png", None)
    put(tmp_path, "masks/a.jpg", None)
    assert named(scan(tmp_path / "data", masks=tmp_path / "masks")) == [("stops", "mask-ambiguous", "a.png")]
    assert named(scan(tmp_path / "data", masks=tmp_path / "gone")) == [("stops", "masks-missing", "gone")]


# --- the dataset TOML of sd-scripts ---


def toml(folder: Path, text: str) -> Path:
    path = folder / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_dataset_toml_becomes_folders_and_settings(tmp_path: Path) -> None:
    (tmp_path / "10_dog").mkdir()
    path = toml(tmp_path, """
        [general]
        caption_extension = '.txt'
        shuffle_caption = true
        keep_tokens = 1
        enable_bucket = true
        color_aug = false
        [[datasets]]
        resolution = [768, 768]
        batch_size = 4
        bucket_reso_steps = 32
        bucket_no_upscale = true
        keep_tokens = 2
        [[datasets.subsets]]
        image_dir = '10_dog'
        num_repeats = 3
        class_tokens = 'sks dog'
        caption_dropout_rate = 0.1
        caption_tag_dropout_rate = 0.2
        caption_prefix = 'best, '
        caption_suffix = ', photo'
        flip_aug = true
        [[datasets.subsets]]
        image_dir = 'nowhere/reg'
        is_reg = true
        metadata_file = 'meta.json'
        conditioning_data_dir = 'masks'
        enable_wildcard = true
        """)  # fmt: skip
    found = kohya_toml.read_kohya(path)
    plain = {"folder_names": False, "sub_folders": False, "caption_suffixes": [".txt"]}
    here = Path.cwd()
    assert found.folders == (
        {"folder": str(tmp_path / "10_dog"), "repeats": 3, "caption": "sks dog"} | plain,
        {
            "folder": str(here / "nowhere/reg"), "regularisation": True, "metadata": str(here / "meta.json"),
            "masks": str(here / "masks"), "caption_lines": "alternatives",
        } | plain,
    )  # fmt: skip
    assert found.settings == {
        "batch": 4,
        "resolution_px": 768,
        "captions": {
            "shuffle": True, "keep_first": 2, "dropout": 0.1, "tag_dropout": 0.2, "wildcards": True,
            "prefix": "best, ", "suffix": ", photo",
        },
        "sizes": {"step_px": 32, "upscale": False, "flip": True},
    }  # fmt: skip
    assert found.unsupported == ()


def test_a_translated_folder_is_scanned_as_sd_scripts_would(tmp_path: Path) -> None:
    put(tmp_path, "10_dog/a.png", None)
    put(tmp_path, "10_dog/old/b.png", None)
    path = toml(tmp_path, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '10_dog'\nnum_repeats = 3\nclass_tokens = 'sks dog'")
    (table,) = kohya_toml.read_kohya(path).folders
    names = {"folder_names", "sub_folders", "repeats"}
    found = scan(Path(table["folder"]), default_caption=table["caption"], **{name: table[name] for name in names})
    assert [(one.picture.name, one.captions, one.repeats) for one in found.samples] == [("a.png", ("sks dog",), 3)]


def test_what_a_dataset_toml_asks_for_in_vain_is_named(tmp_path: Path) -> None:
    path = toml(tmp_path, """
        [extra]
        [general]
        color_aug = true
        num_repeat = 5
        token_warmup_min = 1
        caption_separator = '|'
        max_bucket_reso = 1024
        [[datasets]]
        batch_size = 1
        resolution = [512, 768]
        enable_bucket = false
        [[datasets.subsets]]
        image_dir = 'a'
        random_crop = true
        keep_tokens = 1
        [[datasets.subsets]]
        image_dir = 'a'
        random_crop = true
        keep_tokens = 1
        [[datasets]]
        batch_size = 2
        resolution = 1024
        [[datasets.subsets]]
        image_dir = 'b'
        keep_tokens = 3
        face_crop_aug_range = [1.0, 3.0]
        """)  # fmt: skip
    found = kohya_toml.read_kohya(path)
    assert [Path(one["folder"]).name for one in found.folders] == ["a", "b"]
    sizes = {"most_aspect": 1.0, "crop": "random"}
    assert found.settings == {"batch": 1, "captions": {"keep_first": 1}, "sizes": sizes, "resolution_px": [624, 1024]}
    starts = (
        "[extra]: unknown here.",
        "[general], color_aug = True: colours are never changed.",
        "[general], num_repeat = 5: unknown; the nearest known key is num_repeats.",
        "[general], caption_separator = '|'",
        "[general], max_bucket_reso = 1024",
        "dataset 2, subset 1, face_crop_aug_range = [1.0, 3.0]",
        "dataset 1, subset 2, image_dir = 'a': stands there before",
        "dataset 2, subset 1, batch = 2: is the same for the whole run here, and 1 is taken.",
        "dataset 2, subset 1, captions.keep_first = 3",
        "sizes.crop stands in some subsets only, and counts for the whole run here.",
        "sizes.most_aspect stands in some subsets only, and counts for the whole run here.",
        "dataset 1, subset 1, resolution = [512, 768]: pictures keep their shape at about the area of a 624 px square.",
        "dataset 1, subset 2, resolution = [512, 768]",
        "resolution differs between datasets (624, 1024 px)",
    )
    assert [one[: len(start)] for one, start in zip(found.unsupported, starts, strict=True)] == list(starts)


def test_one_folder_at_two_resolutions_is_one_folder_that_is_trained_at_both(tmp_path: Path) -> None:
    one = "[[datasets]]\nresolution = {}\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    found = kohya_toml.read_kohya(toml(tmp_path, one.format(512) + one.format(768)))
    assert (len(found.folders), found.settings, found.unsupported) == (1, {"resolution_px": [512, 768]}, ())


def test_regularisation_does_not_say_how_the_run_is_set(tmp_path: Path) -> None:
    one = "[[datasets.subsets]]\nimage_dir = '{}'\nis_reg = {}\nkeep_tokens = {}\n"
    found = kohya_toml.read_kohya(toml(tmp_path, "[[datasets]]\n" + one.format("reg", "true", 0) + one.format("a", "false", 2)))
    assert [Path(table["folder"]).name for table in found.folders] == ["reg", "a"]
    assert found.settings == {"captions": {"keep_first": 2}}
    assert [line[:17] for line in found.unsupported] == ["dataset 1, subset"]


SUBSET = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"has no \[\[datasets\]\]"),
        ("datasets = 5", r"has no \[\[datasets\]\]"),
        ("[[datasets]]\nbatch_size = 1", r"dataset 1 has no \[\[datasets.subsets\]\]"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 1", "dataset 1, subset 1 has no image_dir"),
        ("general = 5\n" + SUBSET, r"\[general\] is no table"),
        (SUBSET + "num_repeats = '10'", r"dataset 1, subset 1: num_repeats is '10' \(str\); it must be int"),
        (SUBSET + "num_repeats = true", r"num_repeats is True \(bool\)"),
        (SUBSET + "num_repeats = 0", "num_repeats is 0; it must be at least 1"),
        (SUBSET + "flip_aug = 1", "flip_aug is 1"),
        (SUBSET + "resolution = [512, 512, 3]", r"resolution is \[512, 512, 3\]; it must be a number or \[width, height\]"),
        (SUBSET + "resolution = 0", "resolution is 0"),
        ("[[datasets", "is not valid TOML"),
    ],
)
def test_a_dataset_toml_that_cannot_be_read_gets_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        kohya_toml.read_kohya(toml(tmp_path, text))


def test_a_dataset_toml_that_is_missing_or_not_utf8_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened"):
        kohya_toml.read_kohya(tmp_path / "gone.toml")
    (tmp_path / "x.toml").write_bytes(b"a = '\xe4'")
    with pytest.raises(UserError, match="is not valid TOML"):
        kohya_toml.read_kohya(tmp_path / "x.toml")


def test_a_folder_name_that_no_system_takes_is_left_to_the_scan(tmp_path: Path) -> None:
    (table,) = kohya_toml.read_kohya(toml(tmp_path, SUBSET.replace("'a'", f"'{'x' * 5000}'"))).folders
    assert named(data_folders.scan(Path(table["folder"])))[0][:2] == ("stops", "folder-missing")


def test_a_list_of_names_says_how_many_more_there_are() -> None:
    assert caption_tables.listed(["a", "b"]) == "a, b"
    assert caption_tables.listed(range(7)) == "0, 1, 2, 3, 4 and 2 more"
