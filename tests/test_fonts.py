"""Texts are drawn in a font that has their letters, wherever a computer keeps one, and spelled out where it has none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageFont

from sdlora import compare, fonts

KOREAN = "빨간 별 a star"
PX = 15


@pytest.fixture(autouse=True)
def _as_if_nothing_was_looked_for() -> Iterator[None]:
    honest = fonts.files
    honest.cache_clear()
    fonts._best.cache_clear()
    yield
    honest.cache_clear()
    fonts._best.cache_clear()  # it may hold fakes


def only(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    monkeypatch.setattr(fonts, "files", lambda: paths)


def fake(monkeypatch: pytest.MonkeyPatch, **letters: str) -> None:
    """Fonts by name that have these letters, beside all that the plain one has."""
    opened = {name: ImageFont.load_default(PX) for name in letters}
    names = {font: name for name, font in opened.items()}
    honest = fonts._lacks
    monkeypatch.setattr(fonts, "_lacks", lambda letter, font: letter not in letters.get(names.get(font, ""), "") and honest(letter, font))
    monkeypatch.setattr(fonts, "_opened", lambda path, _: opened.get(path.stem))
    only(monkeypatch, *(Path(f"{name}.ttf") for name in ("damaged", *letters)))


def test_the_plain_font_is_kept_as_long_as_it_has_the_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "files", lambda: pytest.fail("nothing had to be looked for"))
    plain = fonts.plain(PX)
    for words in ("", "a red star, (big:1.3)", "step 100\nstrength 0.5 · seed 3 …"):
        assert fonts.written(words, plain) == (words, plain)


def test_the_first_font_that_has_all_letters_is_taken_else_the_one_with_most(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, greek="δβγ", korean="빨간별", both="빨간별δ")
    plain = fonts.plain(PX)
    paths = {stem: fonts._opened(Path(f"{stem}.ttf"), PX) for stem in ("greek", "korean", "both")}
    assert fonts.written(KOREAN, plain) == (KOREAN, paths["korean"])
    assert fonts.written("별 δ", plain) == ("별 δ", paths["both"])
    assert fonts.written("별 δβ", plain) == ("[U+BCC4] δβ", paths["greek"]), "what no font has whole is drawn by the one that lacks least"


def test_without_any_font_letters_are_spelled_out_and_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    plain = fonts.plain(PX)
    assert fonts.written("별 a", plain) == ("[U+BCC4] a", plain)
    assert fonts.written("x\ud800\0", plain) == ("x[U+D800][U+0000]", plain)
    assert fonts.written("한 é", ImageFont.ImageFont())[0] == "[U+D55C] [U+00E9]", "Pillow without FreeType"
    sheets = [compare.arrange([[Image.new("RGB", (160, 160))]], [words], ["no LoRA"]) for words in ("별", "달")]
    assert sheets[0].tobytes() != sheets[1].tobytes()


def test_fonts_are_found_by_name_in_the_folders_of_each_system_and_upright_ones_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        "NotoSansCJK-Bold.ttc",
        "NotoSansCJK-Regular.ttc",
        "deep/DejaVu Sans.ttf",
        "DejaVuSansMono.ttf",
        "malgun.TTF",
        "Comic.ttf",
        "arial.txt",
    )
    for name in names:
        (tmp_path / "fonts/any" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fonts/any" / name).write_bytes(b"no font")
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.platform", "linux")
    assert [path.name for path in fonts.files()] == ["DejaVu Sans.ttf", "malgun.TTF", "NotoSansCJK-Regular.ttc"]
    assert fonts.written("별", fonts.plain(PX)) == ("[U+BCC4]", fonts.plain(PX)), "damaged files are passed over"
    monkeypatch.setattr("sys.platform", "darwin")
    assert {Path("/System/Library/Fonts"), tmp_path / "home/Library/Fonts"} <= set(fonts.folders())
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("WINDIR", "W:/")
    assert Path("W:/Fonts") in fonts.folders()
