"""The tab that looks at pictures: what the doctor says stands on the page, escaped, and only folders below the root can be reached."""

from pathlib import Path

import pytest
from PIL import Image

from sdlora.ui import check_page


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with two folders of pictures, one of which has a torn picture and a name that is markup."""
    for folder in ("fine", "torn <b>"):
        for i in range(3):
            path = tmp_path / "data" / folder / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((96 + 8 * i, 96), 60).convert("RGB").save(path)
            path.with_suffix(".txt").write_text(f"pip, picture number {i} of a set")
    torn = tmp_path / "data/torn <b>/0.png"
    torn.write_bytes(torn.read_bytes()[:500])
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.png").write_bytes(b"x")
    return tmp_path / "data"


def test_folders_below_the_root_are_offered_and_no_others(root: Path) -> None:
    (root / "out").symlink_to(root.parent / "secret")
    assert check_page.folders(root) == [".", "fine", "torn <b>"]
    *_, (status, findings, sheet) = check_page.look(root, "../secret", "style", "", 64)
    assert "no longer in" in status
    assert (findings, sheet) == ("", None)


def test_what_the_doctor_says_stands_on_the_page_with_the_sheet(root: Path) -> None:
    *going, (status, findings, sheet) = check_page.look(root, "torn <b>", "character", "pip", 64)
    assert any("Looking at picture" in one[0] for one in going)
    assert "must be mended before training" in status
    assert "stops: 0.png" in findings
    assert "<b>" not in findings
    assert sheet is not None
    assert sheet.width > 200
    *_, (status, findings, _) = check_page.look(root, "fine", "style", "pip", 64)
    assert "stops:" not in findings
    assert "3 pictures" in findings
