"""Pictures from a browser: what is kept is a sound picture under a plain name, what is not is refused in a sentence; originals stay."""

import io
import re
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from sdlora.errors import UserError
from sdlora.ui import uploads
from sdlora.ui.roots import Roots
from tests import hostile


def picture(kind: str = "PNG", *, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    return Roots(**{name: tmp_path / name for name in ("runs", "loras", "data", "bases", "outputs", "trash")})


def drop(roots: Roots, tmp_path: Path, *files: tuple[str, bytes], key: str | None = None) -> tuple[str, int, list[str]]:
    key = key or uploads.make_set(roots)
    (tmp_path / "came").mkdir(exist_ok=True)
    for name, content in files:
        (tmp_path / "came" / name).write_bytes(content)
    return (key, *uploads.add(roots, key, [tmp_path / "came" / name for name, _ in files]))


def test_pictures_of_all_kinds_are_kept_byte_for_byte_with_the_captions_of_their_names(roots: Roots, tmp_path: Path) -> None:
    kinds = {"a.png": "PNG", "b.jpeg": "JPEG", "c.webp": "WEBP", "d.gif": "GIF", "e.bmp": "BMP", "f.tiff": "TIFF"}
    came = [(name, picture(kind)) for name, kind in kinds.items()]
    key, kept, refused = drop(roots, tmp_path, *came, ("a.txt", b"a red\n star"), ("lonely.txt", b"x"))
    folder = uploads.set_folder(roots, key)
    assert (kept, len(refused)) == (6, 1)
    assert "lonely.txt" in refused[0]
    assert [path.suffix for path in uploads.pictures(folder)] == [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"]
    assert [path.read_bytes() for path in uploads.pictures(folder)] == [content for _, content in came]
    assert uploads.caption_of(folder / "a.png") == "a red star"


def test_a_caption_that_is_empty_is_none_and_one_that_cannot_be_read_keeps_its_picture(roots: Roots, tmp_path: Path) -> None:
    texts = {"a": b"", "b": b"\xff\xfe\x00", "c": b" \n"}
    files = [one for name, text in texts.items() for one in ((f"{name}.png", picture()), (f"{name}.txt", text))]
    _, kept, refused = drop(roots, tmp_path, *files)
    assert kept == 3
    assert [re.findall(r"Caption '([abc])\.txt", one) for one in refused] == [["b"], ["c"]]
    assert str(tmp_path) not in "".join(refused)


def test_names_become_plain_and_no_two_share_a_caption(roots: Roots, tmp_path: Path) -> None:
    names = ["x y.png", "x-y.jpg", ".hidden.png", "NUL.png", "...png", "가나.png", "<b>'.png", "-rf.png", "a" * 200 + ".png"]
    key, kept, refused = drop(roots, tmp_path, *((name, picture("JPEG" if name.endswith("jpg") else "PNG")) for name in names))
    found = uploads.pictures(uploads.set_folder(roots, key))
    assert (kept, refused) == (len(names), [])
    stems = [path.stem for path in found]
    assert len({stem.lower() for stem in stems}) == len(names)
    assert all(stem[0].isalnum() and len(stem) <= 70 and stem.replace("-", "").isalnum() for stem in stems), stems
    assert {"x-y", "x-y-2", "picture-NUL", "가나"} <= set(stems)


def test_what_is_no_picture_or_more_than_one_is_refused(roots: Roots, tmp_path: Path) -> None:
    whole = picture()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.txt", "x")
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'
    came = [
        ("svg.png", svg), ("page.png", b"<html><script>alert(1)</script>"), ("zip.png", buffer.getvalue()),
        ("both.png", whole + buffer.getvalue()),
        ("script.png", whole + b"<script>alert(1)</script>"), ("gif.gif", picture("GIF") + b"<?php x"),
        ("pdf.png", whole[:60] + b"%PDF-1.4" + whole[60:]),
        ("torn.png", whole[: len(whole) // 2]), ("empty.png", b""), ("bomb.png", hostile.png(30_000, 30_000)), ("text.png", b"hello"),
        ("exe.png", b"MZ" + bytes(99)), ("jpeg.jpg", picture("JPEG") + buffer.getvalue()),
    ]  # fmt: skip
    key, kept, refused = drop(roots, tmp_path, *came)
    assert kept == 0
    assert len(refused) == len(came)
    assert uploads.pictures(uploads.set_folder(roots, key)) == []
    assert list(uploads.set_folder(roots, key).iterdir()) == []
    assert not any(str(tmp_path) in sentence for sentence in refused)
    assert "something else in one file" in refused[3]
    assert "something else in one file" in refused[12]


def test_uploads_are_limited_in_number_size_and_sum(roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST_PICTURES", 3)
    key, kept, _ = drop(roots, tmp_path, ("1.png", picture()), ("2.png", picture()))
    assert kept == 2
    with pytest.raises(UserError, match="may have 3 pictures"):
        drop(roots, tmp_path, ("3.png", picture()), ("4.png", picture()), key=key)
    assert len(uploads.pictures(uploads.set_folder(roots, key))) == 2
    monkeypatch.setattr(uploads, "LARGEST_BYTES", 1000)
    _, kept, refused = drop(roots, tmp_path, ("5.png", picture()), key=key)
    assert kept == 0
    assert "are allowed" in refused[0]
    monkeypatch.setattr(uploads, "LARGEST_BYTES", 1 << 20)
    monkeypatch.setattr(uploads, "MOST_BYTES", 5000)
    assert "too much" in drop(roots, tmp_path, ("6.png", picture()), key=key)[2][0]


def test_a_set_is_found_by_its_own_id_and_nothing_else(roots: Roots, tmp_path: Path) -> None:
    key = uploads.make_set(roots)
    assert uploads.set_folder(roots, key).name == key
    (roots.data / "uploads/20200101-000000-0123456789abcdef").symlink_to(tmp_path)
    for wrong in ("", None, 3, ".", "..", "../x", f"{key}/..", f"{key}\0", "20200101-000000-0123456789abcdef", *hostile.strings(tmp_path)):
        with pytest.raises(UserError, match="no pictures yet"):
            uploads.set_folder(roots, wrong)


def test_a_folder_is_copied_with_its_sub_folders_and_captions_and_stays_as_it_is(roots: Roots, tmp_path: Path) -> None:
    source = roots.data / "mine"
    for name in ("1.png", "10_sks dog/2.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(picture())
    (source / "1.txt").write_text("a star")
    (source / "notes.pdf").write_bytes(b"x")
    (tmp_path / "secret.png").write_bytes(picture())
    (source / "link.png").symlink_to(tmp_path / "secret.png")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    offered = uploads.folders(roots)
    assert [path.name for path in offered.values()] == ["mine", "10_sks dog"]
    key, count = uploads.copy_in(roots, source)
    folder = uploads.set_folder(roots, key)
    assert count == 2
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "1.png",
        "1.txt",
        "10_sks dog/2.png",
    ]
    uploads.write_caption(folder / "1.png", "another")
    uploads.write_caption(folder / "10_sks dog/2.png", "more")
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert uploads.folders(roots).keys() == offered.keys()  # a set is not offered to others


def test_a_frozen_copy_does_not_change_with_the_set(roots: Roots, tmp_path: Path) -> None:
    key, *_ = drop(roots, tmp_path, ("1.png", picture()), ("1.txt", b"a star"))
    folder = uploads.set_folder(roots, key)
    uploads.freeze(folder, tmp_path / "frozen")
    uploads.write_caption(folder / "1.png", "another")
    (folder / "1.png").unlink()
    assert uploads.caption_of(tmp_path / "frozen/1.png") == "a star"
    with Image.open(tmp_path / "frozen/1.png") as image:
        assert image.size == (40, 30)


def test_a_caption_is_one_line_of_text(roots: Roots, tmp_path: Path) -> None:
    key, *_ = drop(roots, tmp_path, ("1.png", picture()))
    path = uploads.set_folder(roots, key) / "1.png"
    uploads.write_caption(path, " a\n\tred\0 \u2028star <b> ")
    assert path.with_suffix(".txt").read_text() == "a red star <b>"
    uploads.write_caption(path, "  ")
    assert not path.with_suffix(".txt").exists()
    for wrong in (None, 3, "x" * 5001):
        with pytest.raises(UserError, match="caption is a text"):
            uploads.write_caption(path, wrong)
