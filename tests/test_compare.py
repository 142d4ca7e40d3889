"""The comparison sheet: every cell where its labels say, the first column always without a LoRA."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora import base_files, compare, generate
from sdlora.generate import Request


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
