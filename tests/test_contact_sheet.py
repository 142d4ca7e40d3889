"""The contact sheet shows what is trained on, what is cut off, and what is wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdlora import contact_sheet, data_folders, dataset_report
from sdlora.captions import CaptionRules
from sdlora.contact_sheet import COLOURS, HEAD_PX, MARGIN_PX, PAPER, PICTURE_PX
from sdlora.data_folders import Scan
from sdlora.dataset_report import Report
from tests import nasty_folder
from tests.nasty_folder import drawing
from tests.test_dataset_report import everything, put


def report(scan: Scan, **options: Any) -> Report:
    asked = {"rules": [CaptionRules("zrk")], "kind": "style", "batch": 4, "resolutions_px": [64], "step_px": 8} | options
    *_, last = dataset_report.examine(scan.samples, scan.findings, **asked)
    assert isinstance(last, Report)
    return last


def sheet(folder: Path, *, masks: Path | None = None, across: int = 5, most: int = 200, **options: Any) -> Image.Image:
    scan = data_folders.scan(folder, masks=masks)
    said = report(scan, **options)
    return contact_sheet.draw(said.items, scan.samples, [one.caption for one in scan.samples], said.findings, across=across, most=most)


def shades(page: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in page.getcolors(2**24) or [] if isinstance(colour, tuple)}


def picture_of(page: Image.Image, column: int = 0) -> np.ndarray:
    """The square of the first row that a picture stands in."""
    left = MARGIN_PX + column * (PICTURE_PX + contact_sheet.GAP_PX)
    return np.asarray(page.crop((left, HEAD_PX, left + PICTURE_PX, HEAD_PX + PICTURE_PX))).astype(int)


def test_what_is_kept_is_shown_as_it_is_and_what_is_cut_off_is_pale(tmp_path: Path) -> None:
    put(tmp_path, "a.png", Image.fromarray(np.tile(np.array([200, 0, 0], np.uint8), (96, 160, 1))))
    page = picture_of(sheet(tmp_path, most_aspect=1.0))
    height = PICTURE_PX * 96 // 160  # drawn at the foot of its square
    middle = page[PICTURE_PX - height // 2]
    kept = np.flatnonzero(np.abs(middle - [200, 0, 0]).max(axis=-1) < 4)
    assert len(kept) == pytest.approx(PICTURE_PX * 96 / 160, abs=5)  # the middle square of it, less its outline
    assert kept.mean() == pytest.approx(PICTURE_PX / 2, abs=2)
    assert middle[5].min() > 180
    assert (middle[5] != PAPER).any()


def test_the_top_crop_keeps_the_top(tmp_path: Path) -> None:
    put(tmp_path, "a.png", Image.fromarray(np.tile(np.array([0, 0, 200], np.uint8), (160, 96, 1))))
    for crop, centre in (("centre", 0.5), ("top", 0.34)):
        column = picture_of(sheet(tmp_path, most_aspect=1.0, crop=crop))[:, PICTURE_PX * 96 // 160 // 2]
        kept = np.flatnonzero(np.abs(column - [0, 0, 200]).max(axis=-1) < 4)
        assert kept.mean() / PICTURE_PX == pytest.approx(centre, abs=0.02)


def test_what_a_mask_leaves_out_is_tinted(tmp_path: Path) -> None:
    put(tmp_path / "pictures", "a.png", Image.new("RGB", (64, 64), (0, 200, 0)))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks/a.png")
    row = picture_of(sheet(tmp_path / "pictures", masks=tmp_path / "masks"))[PICTURE_PX // 2]
    assert row[PICTURE_PX // 4].tolist() == [0, 200, 0]
    assert row[3 * PICTURE_PX // 4].tolist() == [90, 116, 102]


def test_a_frame_has_the_colour_of_the_worst_finding_and_clean_pictures_have_none(tmp_path: Path) -> None:
    for i in range(5):
        put(tmp_path, f"{i}.png", drawing(i))
    assert shades(sheet(tmp_path)).isdisjoint(COLOURS.values())
    (tmp_path / "1.txt").write_text("a drawing of shapes")
    assert shades(sheet(tmp_path)) & {*COLOURS.values()} == {COLOURS["notes"]}
    put(tmp_path, "1.png", Image.new("RGB", (64, 64)), "a drawing of shapes")
    page = sheet(tmp_path)
    left = MARGIN_PX + PICTURE_PX + contact_sheet.GAP_PX
    assert page.getpixel((left - 2, HEAD_PX + PICTURE_PX // 2)) == COLOURS["warns"]


def test_an_unreadable_picture_has_a_cell_and_so_has_one_that_only_lacks_its_caption(tmp_path: Path) -> None:
    put(tmp_path, "a.png", drawing(1))
    put(tmp_path, "b.png", drawing(2))
    put(tmp_path, "c.png", drawing(3))
    (tmp_path / "b.png").write_bytes(b"not a picture")
    (tmp_path / "c.txt").unlink()
    page = sheet(tmp_path)
    assert (picture_of(page, 1)[100:120, 20:60] == contact_sheet.SHADE).all()
    assert len(shades(Image.fromarray(picture_of(page, 2).astype(np.uint8)))) > 20
    assert (picture_of(page, 3) == PAPER).all()


def test_of_too_many_pictures_those_with_findings_are_drawn_in_their_order(tmp_path: Path) -> None:
    for i in range(6):
        put(tmp_path, f"{i}.png", drawing(i))
    (tmp_path / "2.png").write_bytes(b"not a picture")
    put(tmp_path, "5.png", Image.new("RGB", (64, 64), "orange"))
    page = sheet(tmp_path, most=2)
    assert (picture_of(page, 0)[100:120, 20:60] == contact_sheet.SHADE).all()
    assert (picture_of(page, 1)[100:120, 20:60] == (255, 165, 0)).all()
    assert (picture_of(page, 2) == PAPER).all()


def test_no_text_leaves_its_column(tmp_path: Path) -> None:
    captions = ("zrk " + "word " * 100, "zrk, " + "x" * 300, "zrk\twith\ttabs", "zrk 🎨 星", "zrk, " + "many, small, tags, " * 20)
    for i, caption in enumerate(captions):
        put(tmp_path, f"{i}{'a very long name ' * 6}.png", Image.new("RGB", (64, 64), "white"), caption)
    page = np.asarray(sheet(tmp_path))[HEAD_PX + PICTURE_PX + 4 :]
    for column in range(5):
        right = MARGIN_PX + (column + 1) * PICTURE_PX + column * contact_sheet.GAP_PX
        assert (page[:, right + 3 : right + contact_sheet.GAP_PX - 3] == PAPER).all()


def test_a_nasty_folder_is_drawn_and_left_as_it_was(tmp_path: Path) -> None:
    nasty = nasty_folder.make(tmp_path / "nasty")
    before = everything(nasty.root)
    page = sheet(nasty.root / "plain", across=8)
    assert page.width == 2 * MARGIN_PX + 8 * (PICTURE_PX + contact_sheet.GAP_PX) - contact_sheet.GAP_PX
    assert {*COLOURS.values()} <= shades(page)
    assert everything(nasty.root) == before


def test_an_empty_set_is_an_empty_page() -> None:
    assert contact_sheet.draw([], [], [], []).height < 200
