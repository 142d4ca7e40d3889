"""The comparison sheet: every cell where its labels say, the first column always without a LoRA."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora import base_files, compare, fonts, generate, sheets
from sdlora.errors import UserError
from sdlora.generate import Request
from sdlora.sheets import Voice
from tests.shelf import write_lora


def test_columns_begin_without_lora_and_leave_strength_zero_out() -> None:
    across = compare.columns([Path("a.safetensors"), Path("b.safetensors")], [0.0, 0.5, 1.0])
    assert [column.label for column in across] == [
        "no LoRA", "a\nstrength 0.5", "a\nstrength 1", "b\nstrength 0.5", "b\nstrength 1",
    ]  # fmt: skip
    assert across[0].loras == ()
    assert across[3].loras[0].strength == 0.5


def test_each_cell_is_the_picture_of_its_row_and_column() -> None:
    shades = [[Image.new("RGB", (64, 64), (50 * row, 40 * column, 9)) for column in range(3)] for row in range(2)]
    sheet = np.asarray(compare.arrange(shades, ["a red star " * 20, "x"], ["no LoRA", "one\nstrength 1", "an-endless-name-" * 9]))
    for row in range(2):
        for column in range(3):
            hits = (sheet == (50 * row, 40 * column, 9)).all(axis=2)
            assert hits.sum() == 192 * 192
            rows, columns = np.nonzero(hits)
            assert rows.min() >= 192 * row
            assert columns.min() >= compare.LABEL_PX + 192 * column


def test_the_first_column_is_the_bases_own_picture(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    requests = [Request("a red star", seed=1, steps=2), Request("a cup", seed=2, steps=2)]
    kept: list[list[list[Image.Image]]] = []
    honest = compare.arrange
    monkeypatch.setattr(compare, "arrange", lambda cells, rows, across: (kept.append(cells), honest(cells, rows, across))[1])
    *counts, sheet = compare.draw(base, requests, compare.columns([], []))
    assert counts == [(1, 2), (2, 2)]
    assert isinstance(sheet, Image.Image)
    for request, (cell,) in zip(requests, kept[0], strict=True):
        ((_, alone),) = generate.pictures(base, request)
        assert cell.tobytes() == alone.tobytes()


def test_cells_lie_where_the_frame_says_under_titles_and_groups_and_empty_ones_are_grey() -> None:
    red = Image.new("RGB", (64, 64), (200, 10, 10))
    cells = [[red, None, None], [None, None, red]]
    sheet = compare.arrange(cells, ["a", "b"], ["no LoRA", "x", "y"], groups=["", "g", "g"], title="seed 3")
    frame = compare.frame((64, 64), 2, 3, groups=True, title=True)
    for row in range(2):
        for column in range(3):
            left, top = frame.corner(row, column)
            assert frame.cell_at(left + 1, top + 1) == frame.cell_at(left + frame.width - 1, top + frame.height - 1) == (row, column)
            colour = (200, 10, 10) if cells[row][column] else compare.EMPTY
            assert sheet.crop((left, top, left + frame.width, top + frame.height)).getcolors() == [(192 * 192, colour)]
    assert sheet.size == (frame.corner(0, 3)[0], frame.corner(2, 0)[1])
    assert frame.cell_at(5, top) is frame.cell_at(left, 5) is frame.cell_at(left + 9999, top) is None
    plain = compare.arrange(cells, ["a", "b"], ["no LoRA", "x", "y"])
    assert sheet.height == plain.height + compare.GROUP_PX + compare.TITLE_PX


# --- which picture stands in which cell ------------------------------------------------------------------------------------------

VOICES = [Voice(Path(f"{run}-{step}"), run, step, Path(run)) for run in ("one", "two") for step in (100, 200)]
PLAIN = Request("", seed=7, steps=2)


def said(cell: sheets.Cell) -> tuple[str, str, float]:
    return cell.request.prompt, str(cell.lora.path) if cell.lora else "", cell.lora.strength if cell.lora else 0.0


def test_four_axes_nest_in_the_columns_beside_the_base_alone_and_every_cell_has_the_seed() -> None:
    sheet = sheets.plan(PLAIN, ["a cup", "a cat"], VOICES, [0.5, 0, 1, 0.5], rows="prompt")
    assert sheet.rows == ("a cup", "a cat")
    assert sheet.columns == ("no LoRA", *("strength 0.5", "strength 1") * 4)
    assert sheet.groups == ("", *(f"{run} · step {step}" for run in ("one", "two") for step in (100, 200) for _ in range(2)))
    assert said(sheet.cells[1][0]) == ("a cat", "", 0.0)
    assert said(sheet.cells[1][7]) == ("a cat", "two-200", 0.5)
    assert {cell.request.seed for row in sheet.cells for cell in row} == {7}
    assert sheet.title.startswith("down: prompts · across: LoRAs, checkpoints, strengths · seed 7")
    assert sheet.pictures == 18


@pytest.mark.parametrize("rows", sheets.AXES)
def test_whatever_goes_down_the_side_the_same_pictures_are_on_the_sheet(rows: str) -> None:
    sheet = sheets.plan(PLAIN, ["a cup", "a cat"], VOICES, [0.5, 1], rows=rows)
    assert len({cell for row in sheet.cells for cell in row}) == 2 * (1 + 4 * 2)
    assert len(sheet.rows) == 2
    for row, words in zip(sheet.cells, sheet.rows, strict=True):
        for cell, group, label in zip(row, sheet.groups, sheet.columns, strict=True):
            prompt, path, strength = said(cell)
            told = f"{words} {group} {label}"
            assert prompt in told
            assert ("no LoRA" in told) == (path == "")
            if path:
                assert path.partition("-")[0] in told
                assert f"step {path.partition('-')[2]}" in told
                assert f"strength {strength:g}" in told


def test_files_that_are_no_full_grid_are_one_axis_and_runs_of_one_name_stay_apart() -> None:
    odd = sheets.plan(PLAIN, ["a cup"], [*VOICES[:3], Voice(Path("x"), "plain")], [1], rows="prompt")
    assert odd.rows == ("one 100", "one 200", "two 100", "plain"), "one prompt is no axis: the LoRAs go down the side"
    assert [said(row[1])[1] for row in odd.cells] == ["one-100", "one-200", "two-100", "x"]
    assert "strength 1" in odd.title
    twins = [Voice(Path(f"{place}/r"), "same", 100, Path(place)) for place in ("here", "there")]
    assert [said(row[1])[1] for row in sheets.plan(PLAIN, ["a cup"], twins, [1], rows="prompt").cells] == ["here/r", "there/r"]
    single = sheets.plan(PLAIN, ["a cup"], VOICES[:1], [1], rows="strength")
    assert [said(cell)[1] for cell in single.cells[0]] == ["", "one-100"]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"prompts": []}, "no prompt"),
        ({"voices": []}, "No LoRA is chosen"),
        ({"voices": [VOICES[0], VOICES[0]]}, "chosen twice"),
        ({"strengths": [0.0]}, "no strength other than 0"),
        ({"rows": "colour"}, "Axis 'colour' is unknown"),
        ({"prompts": [str(i) for i in range(40)]}, "would have 360 cells, and 240 are allowed"),
    ],
)
def test_a_sheet_that_cannot_be_is_one_sentence(changed: dict[str, Any], sentence: str) -> None:
    values = {"prompts": ["a cup"], "voices": VOICES, "strengths": [0.5, 1.0], "rows": "prompt"} | changed
    with pytest.raises(UserError, match=sentence):
        sheets.plan(PLAIN, values["prompts"], values["voices"], values["strengths"], rows=values["rows"])


def test_a_label_of_a_script_without_spaces_goes_over_lines_and_none_is_wider_than_its_place() -> None:
    font = fonts.plain(15)
    for words in ("x" * 60, "a b " + "long" * 12 + " c", "", "i", "W"):
        lines = compare._wrapped(words, 100, font).split("\n")
        assert "".join(lines).replace(" ", "") == words.replace(" ", "")
        assert all(font.getlength(line) <= 100 for line in lines)
    assert compare._wrapped("W", 1, font) == "W"


def test_every_cell_is_the_picture_that_generate_draws_and_equal_cells_are_drawn_once(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    path = tmp_path / "wild.safetensors"
    write_lora(tiny_base, path, seed=0)
    sheet = sheets.plan(PLAIN, ["a cup"], [Voice(path, "wild")], [0.5, 1], rows="strength")
    drawn: list[Request] = []
    honest = generate.picture
    monkeypatch.setattr(generate, "picture", lambda *values, **options: (drawn.append(values[1]), honest(*values, **options))[1])
    done = {(row, column): image for row, column, image in filter(None, sheets.draw(base, sheet, stopped=lambda: False))}
    assert len(drawn) == sheet.pictures == 3, "the base alone stands in both rows"
    assert sorted(done) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for (row, column), image in done.items():
        cell = sheet.cells[row][column]
        generate.set_loras(base, [cell.lora] if cell.lora else [])
        ((_, alone),) = generate.pictures(base, cell.request)
        assert image.tobytes() == alone.tobytes()
    assert len({image.tobytes() for image in done.values()}) == 3


def test_a_stop_ends_the_sheet_after_the_step_that_it_is_in(tiny_base: Path) -> None:
    base = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    sheet = sheets.Sheet(((sheets.Cell(Request("a cup", steps=50)),),), ("a",), ("b",), ("",), "")
    assert list(sheets.draw(base, sheet, stopped=lambda: True)) == [None]
