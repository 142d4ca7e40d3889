"""Several LoRA files into one, and how that will look: the merged LoRA drawn beside its parts, all with one prompt at one seed.

The preview draws the very file that would be kept, from a folder that vanishes with it, so what is seen is what `Merge` writes.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora import base_tensors, compare, files, generate, lora, lora_merge, lora_moves
from sdlora.errors import UserError
from sdlora.generate import LoRA, Request
from sdlora.lora_tools import Made
from sdlora.ui import library_actions as actions
from sdlora.ui import lora_shelf, side_work, words
from sdlora.ui import roots as places
from sdlora.ui import studio as studios
from sdlora.ui.compare_actions import LONGEST_PROMPT, number
from sdlora.ui.generate_actions import message
from sdlora.ui.studio import Studio

SLOTS = 4


@dataclass(frozen=True)
class Recipe:
    """What is merged and how; the base is a name for `base_files.load`."""

    parts: tuple[tuple[Path, float], ...]
    method: str
    rank: int | None
    base: str


def recipe_of(studio: Studio, method: str, rank: Any, base: str, *slots: Any) -> Recipe:
    """What the controls ask for; `slots` are the ids and then their weights.

    Raises:
        UserError: if fewer than two are chosen, one twice, or a number is out of range.
    """
    offered = lora_shelf.paths(studio.roots)
    pairs = [(key, weight) for key, weight in zip(slots[: len(slots) // 2], slots[len(slots) // 2 :], strict=True) if key]
    parts = tuple((places.find(key, offered, what="LoRA"), number(weight, "The weight", -2, 2)) for key, weight in pairs)
    if len({path for path, _ in parts}) < max(2, len(parts)):
        raise UserError(f"{len(parts)} LoRAs are chosen for the merge; choose at least two different ones, each once.")
    cut = int(number(rank or 0, "The rank", 0, 4096, whole=True))
    return Recipe(parts, str(method), cut or None, actions.base_of(studio, base))


def merged(recipe: Recipe, name: str) -> Iterator[tuple[int, int] | Made]:
    """The merge itself, see `lora_merge.merge`."""
    weights = base_tensors.weights_of(recipe.base)
    yield from lora_merge.merge(recipe.parts, name=name, method=recipe.method, rank=recipe.rank, weights=weights)


def merge(studio: Studio, name: str, language: str, *values: Any) -> Iterator[str]:
    """Merge was pressed: yields status lines; the file is kept among the LoRA files.

    Raises:
        UserError: if the recipe or the name is not as it must be, or the files do not go together.
    """
    recipe = recipe_of(studio, *values)
    stem = lora_moves.free(studio.roots.loras, actions.free_name(studio.roots, name)).stem
    yield from actions.keep(studio.roots, stem, merged(recipe, stem), language)


def preview(
    studio: Studio, recipe: Recipe, prompt: str, seed: Any, language: str, stop: threading.Event
) -> Iterator[tuple[str, Image.Image | None]]:
    """Draws the base alone, each part at its weight, and the merged LoRA: yields the status line and the row so far.

    Raises:
        UserError: if the files do not go together or do not fit the base.
    """
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"The prompt has {len(prompt):,} characters, and {LONGEST_PROMPT:,} are allowed; shorten it.")
    request = Request(prompt, seed=int(number(seed, "The seed", 0, 2**32 - 1, whole=True)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "merged.safetensors"
        for state in merged(recipe, "merged"):
            if stop.is_set():
                yield message(words.say("library.stopped", language)), None
                return
            if isinstance(state, Made):
                files.write(file, state.content)
            else:
                yield actions.working(*state, language), None
        yield message(words.say("library.waiting", language), kind="busy", share=0), None
        with side_work.holding(studio, stop) as held:
            if held:
                yield from _drawn(studio, recipe, file, request, language, stop)
        if stop.is_set():
            yield message(words.say("library.stopped", language)), None


def _drawn(
    studio: Studio, recipe: Recipe, file: Path, request: Request, language: str, stop: threading.Event
) -> Iterator[tuple[str, Image.Image | None]]:
    """The row, picture by picture; the merged weights leave the base again, as nobody can ask for them later."""
    base = studios.use_base(studio, recipe.base)
    across = [
        *compare.columns([], []),
        *(compare.Column(f"{path.stem}\nweight {weight:g}", (LoRA(path, weight),)) for path, weight in recipe.parts),
    ]
    across.append(compare.Column(f"merged\n{recipe.method}", (LoRA(file, 1.0),)))
    labels, row = [column.label for column in across], list[Image.Image]()
    try:
        for column in across:
            told = words.say("library.drawing", language, done=len(row) + 1, total=len(across))
            yield message(told, kind="busy", share=len(row) / len(across)), _row(row, labels, request) if row else None
            generate.set_loras(base, list(column.loras))
            drawn: object = None
            for item in generate.picture(base, request):
                drawn = item
                if stop.is_set():
                    return
            assert isinstance(drawn, Image.Image)
            row.append(drawn)
        yield message(words.say("library.drawn", language, seed=request.seed), kind="good"), _row(row, labels, request)
    finally:
        for part in base.parts.values():
            lora.remove(part)


def _row(row: list[Image.Image], labels: list[str], request: Request) -> Image.Image:
    cells: list[Image.Image | None] = [*row, *[None] * (len(labels) - len(row))]
    return compare.arrange([cells], [request.prompt], labels)
