"""What Generate needs to draw with a LoRA that stands elsewhere on the page: plain values, as `compare_cells.setting_of` gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdlora import chosen, generate, run_folder, runs, shelf
from sdlora.errors import UserError
from sdlora.ui import lora_shelf, watch_actions
from sdlora.ui import roots as places
from sdlora.ui.roots import Roots

_OF_REQUEST = ("prompt", "negative", "seed", "steps", "guidance", "sampler", "width_px", "height_px")


def of_run(roots: Roots, folder: Path) -> dict[str, Any]:
    """The best checkpoint of a run, at its strength, with its base and the prompt of its first sample.

    Raises:
        UserError: if it has saved no LoRA yet.
    """
    best = chosen.best(lora_shelf.look(folder))
    name = str(watch_actions.settings_of(folder).get("name") or folder.name)
    result = run_folder.result_path(folder, name)
    saved = run_folder.checkpoints(folder, name)
    path = (best.path if best else None) or (result if result.is_file() else next(reversed(saved.values()), None))
    if path is None:
        raise UserError(f"Run {folder.name} has saved no LoRA yet; press Save now, or wait until it has.")
    return _of(roots, path, folder, strength=best.strength if best else 1.0, base="mini", trigger="")


def of_file(roots: Roots, path: Path, *, base: str) -> dict[str, Any]:
    """A LoRA file at the strength to begin with; one of a run with the run's base and prompt.

    Args:
        base: for files that are of no run, as the page's controls say it.
    """
    facts = shelf.facts(path)
    return _of(roots, path, shelf.run_of(path), strength=facts.strength, base=base, trigger=facts.trigger)


def _of(roots: Roots, path: Path, run: Path | None, *, strength: float, base: str, trigger: str) -> dict[str, Any]:
    settings = watch_actions.settings_of(run) if run else {}
    drawn = [one for one in runs.pictures(run) if one.number == 0] if run else []
    plain = generate.Request(drawn[-1].prompt if drawn else str(settings.get("trigger") or trigger))
    own = str(settings.get("base") or base)
    offered = {**places.bases(roots), roots.first: Path(roots.first)}
    word = next((one for one, place in offered.items() if place.resolve() == Path(own).resolve()), own)
    root = roots.runs if path.resolve().is_relative_to(roots.runs.resolve()) else roots.loras
    told = {"base": word, "lora": places.key_of(root, path), "strength": strength}
    return told | {one: getattr(plain, one) for one in _OF_REQUEST}
