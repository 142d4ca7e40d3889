"""A sheet over LoRAs, checkpoints, strengths and prompts: which picture stands in which cell, and drawing them one by one.

One axis is the rows, the others nest in the columns, and an axis with one value is said once in the title. Before the columns of each
prompt stands the base alone. All cells have the same seed and settings, so what differs is what the labels say. Cells are drawn LoRA by
LoRA, because changing one costs a fold, and equal cells once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from sdlora import compare, generate
from sdlora.base_model import Base
from sdlora.errors import UserError
from sdlora.generate import LoRA, Request

AXES = ("prompt", "lora", "checkpoint", "strength")
MOST_CELLS = 240
ALONE = "no LoRA"


@dataclass(frozen=True)
class Voice:
    """A LoRA file that is compared; a checkpoint carries its run's name, its step and its run's folder."""

    path: Path
    name: str
    step: int | None = None
    run: Path | None = None


@dataclass(frozen=True)
class Cell:
    """What one picture is drawn from; without a LoRA the base alone."""

    request: Request
    lora: LoRA | None = None


@dataclass(frozen=True)
class Sheet:
    """What stands where.

    Args:
        cells: by row.
        rows, columns, groups: labels, as `compare.arrange` takes them.
        title: what the axes are, and what all cells have in common.
    """

    cells: tuple[tuple[Cell, ...], ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    groups: tuple[str, ...]
    title: str

    @property
    def pictures(self) -> int:
        """How many different pictures there are."""
        return len({cell for row in self.cells for cell in row})


@dataclass(frozen=True)
class _Value:
    """One value of an axis, by its key and in words."""

    key: object
    words: str


def plan(request: Request, prompts: Sequence[str], voices: Sequence[Voice], strengths: Sequence[float], *, rows: str) -> Sheet:
    """Lays a sheet out.

    LoRAs and checkpoints are two axes if every run has the same steps; else each file is a value of the one axis "lora".

    Args:
        request: seed and settings of every cell.
        prompts: at least one.
        voices: at least one.
        strengths: a 0 is left out, being the column without a LoRA.
        rows: which of `AXES` goes down the side.

    Raises:
        UserError: if something is missing, named twice, or there would be more than `MOST_CELLS` cells.
    """
    if rows not in AXES:
        raise UserError(f"Axis {rows!r} is unknown; there are {', '.join(AXES)}.")
    _check(prompts, voices, strengths)
    names, steps = {one.run: one.name for one in voices}, sorted({one.step or 0 for one in voices})
    whole = len(names) * len(steps) == len(voices) and 0 not in steps and None not in names
    by_key: dict[object, Path] = {(one.run, one.step) if whole else one.path: one.path for one in voices}
    axes: dict[str, list[_Value]] = {
        "prompt": [_Value(words, words) for words in prompts],
        "lora": [_Value(run, name) for run, name in names.items()] if whole else [_Value(one.path, _words(one)) for one in voices],
        "checkpoint": [_Value(step, f"step {step}") for step in steps] if whole else [_Value(None, "")],
        "strength": [_Value(value, f"strength {value:g}") for value in dict.fromkeys(strengths) if value != 0],
    }
    if len(axes[rows]) == 1:  # one row would be all of it: the first axis that has several takes its place
        rows = next((name for name in AXES if len(axes[name]) > 1), rows)
    across = [name for name in AXES if name != rows and (len(axes[name]) > 1 or name == "prompt")]
    columns = list(_columns(axes, across))
    if (count := len(columns) * len(axes[rows])) > MOST_CELLS:
        raise UserError(f"This sheet would have {count} cells, and {MOST_CELLS} are allowed; take fewer values on an axis.")
    first = {name: values[0].key for name, values in axes.items()}

    def cell(at: Mapping[str, object], alone: bool) -> Cell:
        key = (at["lora"], at["checkpoint"]) if whole else at["lora"]
        wanted = replace(request, prompt=str(at["prompt"]))
        return Cell(wanted) if alone else Cell(wanted, LoRA(by_key[key], float(str(at["strength"]))))

    cells = tuple(tuple(cell(first | {rows: value.key} | at, alone) for at, _, _, alone in columns) for value in axes[rows])
    return Sheet(
        cells, tuple(value.words for value in axes[rows]), tuple(words for _, words, _, _ in columns),
        tuple(group for _, _, group, _ in columns), _title(request, axes, rows, across),
    )  # fmt: skip


def _columns(axes: Mapping[str, list[_Value]], across: Sequence[str]) -> Iterator[tuple[dict[str, object], str, str, bool]]:
    """For each column the values in it, its label, its group's, and whether it is the base alone."""
    inner = [name for name in across if name != "prompt"]
    for prompt in axes["prompt"] if "prompt" in across else [None]:
        outer = [prompt.words] if prompt and len(axes["prompt"]) > 1 else []
        at = {"prompt": prompt.key} if prompt else {}
        yield dict(at), ALONE, " · ".join(outer), True
        for values in itertools.product(*(axes[name] for name in inner)):
            words = [value.words for value in values]
            label = words[-1] if words else "with it"
            yield at | {name: value.key for name, value in zip(inner, values, strict=True)}, label, " · ".join(outer + words[:-1]), False


def _words(voice: Voice) -> str:
    return voice.name if voice.step is None else f"{voice.name} {voice.step}"


def _check(prompts: Sequence[str], voices: Sequence[Voice], strengths: Sequence[float]) -> None:
    if not prompts:
        raise UserError("There is no prompt; write at least one line.")
    if not voices:
        raise UserError("No LoRA is chosen; choose at least one, so that there is something to compare.")
    if len({one.path for one in voices}) < len(voices):
        raise UserError("A LoRA is chosen twice; choose each once.")
    if not any(strengths):
        raise UserError("There is no strength other than 0; give at least one from -2 to 2, such as 0.5, 1.")


def _title(request: Request, axes: Mapping[str, list[_Value]], rows: str, across: Sequence[str]) -> str:
    plural = {"prompt": "prompts", "lora": "LoRAs", "checkpoint": "checkpoints", "strength": "strengths"}
    down, right = ([plural[name] for name in names if len(axes[name]) > 1] for names in ([rows], across))
    said = [f"{way}: {', '.join(names)}" for way, names in (("down", down), ("across", right)) if names]
    single = [values[0].words for name, values in axes.items() if name != "prompt" and len(values) == 1 and values[0].words]
    settings = [f"seed {request.seed}", request.sampler, f"{request.steps} steps", f"guidance {request.guidance:g}"]
    return " · ".join([*said, *single, *settings])


def draw(base: Base, sheet: Sheet, *, stopped: Callable[[], bool]) -> Iterator[tuple[int, int, Image.Image] | None]:
    """Draws a sheet: yields None after each step of the sampler, and (row, column, picture) for each cell that is done.

    Args:
        stopped: asked after each step; nothing more is drawn once it is true.

    Raises:
        UserError: if a LoRA does not fit the base, or a request cannot be drawn.
    """
    places: dict[Cell, list[tuple[int, int]]] = {}
    for row, cells in enumerate(sheet.cells):
        for column, cell in enumerate(cells):
            places.setdefault(cell, []).append((row, column))
    for lora in dict.fromkeys(cell.lora for cell in places):
        generate.set_loras(base, [lora] if lora else [])
        for cell in [one for one in places if one.lora == lora]:
            drawn: object = None
            for item in generate.picture(base, cell.request):
                drawn = item  # the last one is the picture
                yield None
                if stopped():
                    return
            assert isinstance(drawn, Image.Image)
            for row, column in places[cell]:
                yield row, column, drawn


def picture(sheet: Sheet, done: Mapping[tuple[int, int], Image.Image], *, size_px: tuple[int, int]) -> Image.Image:
    """A sheet as it looks so far.

    Args:
        done: what is drawn, by row and column.
        size_px: of one picture.
    """
    cells = [[done.get((row, column)) for column in range(len(sheet.columns))] for row in range(len(sheet.rows))]
    return compare.arrange(
        cells, sheet.rows, sheet.columns, groups=sheet.groups, title=sheet.title, size_px=size_px
    )  # fmt: skip


def frame(sheet: Sheet, size_px: tuple[int, int]) -> compare.Frame:
    """Where the cells of `picture` lie."""
    return compare.frame(size_px, len(sheet.rows), len(sheet.columns), groups=any(sheet.groups), title=bool(sheet.title))
