"""The dataset TOML of kohya's sd-scripts in the words of our config, so that a finished setup need not be typed again.

Their keys stand at three levels, and the nearest counts: subset, then dataset, then [general]. Each key is either translated, or asks for
nothing (a switch that is off), or is named as unsupported with the reason; none is dropped in silence, misspelt ones neither. Values of
theirs that are ours per run (batch, captions, sizes) must agree between the subsets; where they do not, the first is taken and the others
are named. What the TOML does not say is left to our defaults.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from sdlora.errors import UserError


@dataclass(frozen=True)
class Translated:
    """What a dataset TOML says, in our words.

    Args:
        folders: one table for each data folder, as `[[data]]` takes it.
        settings: other keys of a run: `batch`, `resolution_px`, and the tables `captions` and `sizes`.
        unsupported: what is not done as the TOML asks, one sentence each.
    """

    folders: tuple[dict[str, Any], ...]
    settings: dict[str, Any]
    unsupported: tuple[str, ...]


@dataclass(frozen=True)
class _Level:
    """One table of the TOML: the words for its place, and its keys with those of the levels above."""

    where: str
    values: dict[str, Any]


_FOLDER_KEYS = {
    "num_repeats": "repeats",
    "class_tokens": "caption",
    "alpha_mask": "alpha_masks",
    "is_reg": "regularisation",
}
_RUN_KEYS = {
    "batch_size": "batch",
    "shuffle_caption": "captions.shuffle",
    "keep_tokens": "captions.keep_first",
    "caption_dropout_rate": "captions.dropout",
    "caption_tag_dropout_rate": "captions.tag_dropout",
    "enable_wildcard": "captions.wildcards",
    "caption_prefix": "captions.prefix",
    "caption_suffix": "captions.suffix",
    "bucket_reso_steps": "sizes.step_px",
    "flip_aug": "sizes.flip",
}
_KINDS: dict[str, tuple[type, ...]] = {
    "image_dir": (str,), "metadata_file": (str,), "conditioning_data_dir": (str,), "caption_extension": (str,), "class_tokens": (str,),
    "caption_prefix": (str,), "caption_suffix": (str,), "caption_separator": (str,),
    "num_repeats": (int,), "batch_size": (int,), "keep_tokens": (int,), "bucket_reso_steps": (int,), "resolution": (int, list),
    "caption_dropout_rate": (int, float), "caption_tag_dropout_rate": (int, float),
    "alpha_mask": (bool,), "is_reg": (bool,), "shuffle_caption": (bool,), "enable_wildcard": (bool,), "flip_aug": (bool,),
    "random_crop": (bool,), "enable_bucket": (bool,), "bucket_no_upscale": (bool,),
}  # fmt: skip
_POSITIVE = frozenset({"num_repeats", "batch_size", "bucket_reso_steps"})
_UNSUPPORTED = {
    "color_aug": "colours are never changed",
    "face_crop_aug_range": "there is no crop around faces; sizes.crop = 'top' keeps faces of portraits",
    "min_bucket_reso": "sizes follow from the resolution and sizes.most_aspect",
    "max_bucket_reso": "sizes follow from the resolution and sizes.most_aspect",
    "skip_image_resolution": "no picture is left out for its size",
    "resize_interpolation": "pictures are resized with Lanczos",
    "keep_tokens_separator": "captions.keep_first says how many tags stay",
    "secondary_separator": "tags are separated by commas alone",
    "caption_dropout_every_n_epochs": "captions.dropout leaves captions out at random",
    "token_warmup_min": "captions are whole from the first step",
    "token_warmup_step": "captions are whole from the first step",
    "cache_info": "nothing is written into the data folder",
    "network_multiplier": "the strength of the LoRA in training is 1",
    "validation_split": "validation.share says it for the whole run",
    "validation_seed": "which pictures are held out follows from their content",
}
_ASKS_FOR_NOTHING: dict[str, Any] = {"token_warmup_min": 1, "network_multiplier": 1.0}


def read_kohya(path: Path) -> Translated:
    """A dataset TOML of sd-scripts, translated. Relative folders are looked for from where the command runs, then from the file's folder.

    Raises:
        UserError: if the file is missing or no dataset TOML, a value has the wrong type, or a subset names no folder.
    """
    values = _toml(path)
    datasets = values.get("datasets")
    if not _is_tables(datasets):
        raise UserError(f"{path} has no [[datasets]]; a dataset TOML of sd-scripts has at least one, with [[datasets.subsets]] below it.")
    general = _Level("[general]", values.get("general", {}))
    said = [f"[{key}]: unknown here." for key in values if key not in ("general", "datasets")]
    said += _checked(general, path)
    per_dataset: list[list[_Level]] = []
    for i, dataset in enumerate(datasets, 1):
        level = _Level(f"dataset {i}", {key: value for key, value in dataset.items() if key != "subsets"})
        said += _checked(level, path)
        subsets = dataset.get("subsets")
        if not _is_tables(subsets):
            raise UserError(f"{path}, dataset {i} has no [[datasets.subsets]]; add one with image_dir.")
        levels = [_Level(f"dataset {i}, subset {j}", subset) for j, subset in enumerate(subsets, 1)]
        said += [one for subset in levels for one in _checked(subset, path)]
        per_dataset.append([replace(subset, values=general.values | level.values | subset.values) for subset in levels])
    every = [subset for subsets in per_dataset for subset in subsets]
    folders, twice = _folders(every, path)
    settings, differing = _settings(every)
    resolution, notes = _resolution(every, path)
    return Translated(folders, settings | resolution, tuple(dict.fromkeys([*said, *twice, *differing, *notes])))


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as problem:
        raise UserError(f"{path} cannot be opened ({problem.strerror}); name a dataset TOML of sd-scripts.") from problem
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise UserError(f"{path} is not valid TOML ({problem}); mend it there.") from problem


def _is_tables(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _checked(level: _Level, path: Path) -> list[str]:
    """What one table asks for that is not done here.

    Raises:
        UserError: if a value has the wrong type, or is 0 where that means nothing.
    """
    if not isinstance(level.values, dict):
        raise UserError(f"{path}, {level.where} is no table; write its keys below a line with that name.")
    said = []
    for key, value in level.values.items():
        if key in _KINDS:
            _check(key, value, f"{path}, {level.where}")
        if key in _UNSUPPORTED and value and value != _ASKS_FOR_NOTHING.get(key):
            said.append(f"{level.where}, {key} = {value!r}: {_UNSUPPORTED[key]}.")
        elif key == "caption_separator" and value.strip() != ",":
            said.append(f"{level.where}, {key} = {value!r}: tags are separated by commas alone.")
        elif key not in _KINDS and key not in _UNSUPPORTED:
            near = difflib.get_close_matches(key, [*_KINDS, *_UNSUPPORTED], n=1)
            said.append(f"{level.where}, {key} = {value!r}: unknown" + (f"; the nearest known key is {near[0]}." if near else "."))
    return said


def _check(key: str, value: object, where: str) -> None:
    kinds = _KINDS[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        allowed = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{where}: {key} is {value!r} ({type(value).__name__}); it must be {allowed}.")
    if key in _POSITIVE and isinstance(value, int) and value < 1:
        raise UserError(f"{where}: {key} is {value}; it must be at least 1.")


def _folders(subsets: list[_Level], path: Path) -> tuple[tuple[dict[str, Any], ...], list[str]]:
    """Each subset as a data folder. One that stands there at several resolutions is one folder, since all are trained at all of them."""
    folders: list[dict[str, Any]] = []
    seen: list[tuple[dict[str, Any], object]] = []
    said = []
    for subset in subsets:
        if "image_dir" not in subset.values:
            raise UserError(f"{path}, {subset.where} has no image_dir; name its folder of pictures.")
        folder, resolution = _folder(subset.values, path.parent), subset.values.get("resolution")
        if (folder, resolution) in seen:
            said.append(f"{subset.where}, image_dir = {subset.values['image_dir']!r}: stands there before, and is taken once.")
        seen.append((folder, resolution))
        if folder not in folders:
            folders.append(folder)
    return tuple(folders), said


def _folder(values: dict[str, Any], beside: Path) -> dict[str, Any]:
    # sd-scripts looks neither into sub-folders nor at folder names once there is a dataset TOML
    folder: dict[str, Any] = {"folder": _found(values["image_dir"], beside), "folder_names": False, "sub_folders": False}
    folder |= {ours: values[theirs] for theirs, ours in _FOLDER_KEYS.items() if theirs in values}
    for theirs, ours in (("metadata_file", "metadata"), ("conditioning_data_dir", "masks")):
        if theirs in values:
            folder[ours] = _found(values[theirs], beside)
    if "caption_extension" in values:
        folder["caption_suffixes"] = [f".{values['caption_extension'].lower().removeprefix('.')}"]
    if values.get("enable_wildcard"):
        folder["caption_lines"] = "alternatives"  # theirs takes one line of several then
    return folder


def _found(name: str, beside: Path) -> str:
    try:
        is_beside = not Path(name).exists() and (beside / name).exists()
    except OSError:  # of names that are too long: the scan says that there is no such folder
        is_beside = False
    return str((beside / name if is_beside else Path(name)).absolute())


def _settings(subsets: list[_Level]) -> tuple[dict[str, Any], list[str]]:
    """What is ours per run, taken from the first subset that says it; regularisation says nothing about it."""
    settings: dict[str, Any] = {}
    said = []
    for subset in sorted(subsets, key=lambda subset: bool(subset.values.get("is_reg"))):
        for key, value in _run_values(subset.values).items():
            *table, last = key.split(".")
            place = settings.setdefault(table[0], {}) if table else settings
            if place.setdefault(last, value) != value:
                said.append(f"{subset.where}, {key} = {value!r}: is the same for the whole run here, and {place[last]!r} is taken.")
    learned = [_run_values(subset.values) for subset in subsets if not subset.values.get("is_reg")]
    for key in sorted({key for values in learned for key in values}):
        if not all(key in values for values in learned):
            said.append(f"{key} stands in some subsets only, and counts for the whole run here.")
    return settings, said


def _run_values(values: dict[str, Any]) -> dict[str, Any]:
    ours = {ours: values[theirs] for theirs, ours in _RUN_KEYS.items() if theirs in values}
    if "enable_bucket" in values and not values["enable_bucket"]:
        ours["sizes.most_aspect"] = 1.0  # squares alone
    if "bucket_no_upscale" in values:
        ours["sizes.upscale"] = not values["bucket_no_upscale"]
    if "random_crop" in values:
        ours["sizes.crop"] = "random" if values["random_crop"] else "centre"
    return ours


def _resolution(subsets: list[_Level], path: Path) -> tuple[dict[str, Any], list[str]]:
    """The sides of squares with the areas that are asked for; one, or a list that all pictures are trained at."""
    sides: dict[int, set[str]] = {}
    said = []
    for subset in (one for one in subsets if "resolution" in one.values):
        given = subset.values["resolution"]
        pair = given if isinstance(given, list) else [given, given]
        if len(pair) not in (1, 2) or not all(type(one) is int and one >= 64 for one in pair):
            raise UserError(f"{path}, {subset.where}: resolution is {given!r}; it must be a number or [width, height], in pixels from 64.")
        side = round(math.sqrt(pair[0] * pair[-1]) / 8) * 8
        sides.setdefault(side, set()).add(subset.values["image_dir"])
        if {pair[0], pair[-1]} != {side}:
            said.append(f"{subset.where}, resolution = {given!r}: pictures keep their shape at about the area of a {side} px square.")
    if any(folders != next(iter(sides.values())) for folders in sides.values()):
        said.append(f"resolution differs between datasets ({', '.join(map(str, sides))} px): all pictures are trained at each of them.")
    return ({"resolution_px": list(sides) if len(sides) > 1 else next(iter(sides))} if sides else {}), said
