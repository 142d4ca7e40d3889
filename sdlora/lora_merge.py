"""A LoRA file in another layout, `convert`, or one from several, `merge`.

Merging is a true sum of what the files do, Σ wᵢ ΔWᵢ, as if all were set side by side; adding up their factors instead would add products
of one file's A with another's B, which nobody trained. TIES and DARE are sums too, of matrices that were thinned out first. The file is
written in kohya's layout, which every tool loads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load as load_bytes
from torch import Tensor

from sdlora import devices, lora_file, lora_formats, lora_layouts, lora_metadata, lora_tools
from sdlora.deltas import Full, Kronecker, LowRank, Update
from sdlora.errors import UserError
from sdlora.lora_file import LoRAFile
from sdlora.lora_metadata import Story
from sdlora.lora_tools import Change, Limit, Made, Weights

WHOLE = Limit(energy=1 - 1e-9)  # what an exact merge keeps of a ΔW that has no factors: all but 3e-5 of its norm
METHODS = ("sum", "svd", "ties", "dare")
_COMMON = ("ss_sd_model_name", "ss_new_sd_model_hash")
_JOINED = ("modelspec.trigger_phrase", "modelspec.author", "modelspec.license", "modelspec.tags")


def convert(path: Path, *, to: str, name: str | None = None, family: str = "auto") -> Made:
    """The same LoRA in the other layout, its numbers in the format they are stored in and its metadata kept.

    From kohya's layout to diffusers' and back gives the same tensors; where alphas differ between modules, kohya's gets one alpha, and
    the difference is folded into `lora_up`.

    Args:
        to: "kohya" or "diffusers".
        name: the stem of the file to be written, if it is to be called so in prompts.
        family: "sd1", "sd2" or "sdxl", if neither shapes nor metadata tell it.

    Raises:
        UserError: if the file cannot be read, or the layout cannot carry what it holds.
    """
    if to not in lora_layouts.LAYOUTS:
        raise UserError(f"Layout '{to}' is unknown; there are {' and '.join(lora_layouts.LAYOUTS)}.")
    file = lora_file.read(path)
    kind = lora_tools.family_of(file) if family == "auto" else family
    content = lora_file.to_bytes(file.modules, lora_tools.renamed(file.metadata, name), family=kind, layout=to, dtype=None)
    again = lora_formats.parse(path, load_bytes(content), _written_metadata(content)).modules
    errors = {stem: _distance(again[stem], update) for stem, update in file.modules.items()}
    notes = list(lora_tools.notes_of(path, file))
    if kind == "other" and to == "kohya":
        notes.append(f"{path.name}: its family cannot be told, so diffusers' names are written; for SDXL give the family.")
    return Made(content, lora_tools.errors_of(errors), tuple(notes))


def merge(
    parts: Sequence[tuple[Path, float]],
    *,
    name: str,
    method: str = "sum",
    rank: int | None = None,
    exact: bool = False,
    density: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
) -> Iterator[tuple[int, int] | Made]:
    """One LoRA that does what several do together, Σ wᵢ ΔWᵢ: yields (done, total), and last the file in kohya's layout.

    "sum" sets plain factors side by side, so ranks add up and nothing is lost; a module that only one file has keeps its form. "svd" cuts
    the sum to the largest rank among the parts. For `ties` and `dare` see there; their sums are cut to the parts' ranks together, as is
    a "sum" with forms that have no factors. Norms and biases are summed by every method.

    Args:
        parts: files with their weights wᵢ, not 0.
        name: the stem of the file to be written.
        method: "sum", "svd", "ties" or "dare".
        rank: cut every module to this rank instead.
        exact: cut nothing: all but 3e-5 of the norm of every ΔW is kept, whatever rank it takes.
        density: the share of numbers that "ties" and "dare" keep, above 0 and at most 1.
        seed: of what "dare" keeps.
        dtype: what the numbers are stored in; by default the widest format of the parts.
        weights: the base's weights by stem, needed for DoRA alone.

    Raises:
        UserError: if a file cannot be read, the files do not fit each other, or the settings are out of range.
    """
    recipe = _checked(parts, _Recipe(method, rank, exact, density, seed))
    files = [lora_file.read(path) for path, _ in parts]
    family, alpha, stored = _one_family(parts, files), lora_tools.common_alpha(files), dtype or lora_tools.dtype_of(files)
    stems = sorted({stem for file in files for stem in file.modules})
    modules: dict[str, Update] = {}
    errors: dict[str, float] = {}
    for done, stem in enumerate(stems, start=1):
        terms = [_Term(path, weight, file.modules[stem]) for (path, weight), file in zip(parts, files, strict=True) if stem in file.modules]
        wanted, kept = _merged(stem, terms, replace(recipe, seed=devices.key(seed, done)), weights, alpha=alpha)
        modules[stem], errors[stem] = lora_tools.finished(kept, wanted, bias=_bias(stem, terms), dtype=stored)
        yield done, len(stems)
    metadata = _metadata_of(parts, files, name=name, family=family) | lora_tools.network(modules, alpha)
    content = lora_file.to_bytes(modules, metadata, family=family, dtype=stored)
    yield Made(content, lora_tools.errors_of(errors), tuple(_notes(parts, files, stems)))


# --- the methods --------------------------------------------------------------------------------------------------------------


def ties(changes: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """TIES (Yadav et al. 2023, arXiv 2306.01708, algorithm 1): trim, elect a sign for each number, average those that have it.

    The sign is that of the sum of what is left after trimming; the average is of wᵢ ΔWᵢ over the changes that agree, as PEFT takes it.

    Args:
        changes: ΔWᵢ, all of one shape.
        weights: wᵢ.
        density: the share of each ΔWᵢ that is kept, its largest numbers.
    """
    trimmed = torch.stack([_largest(change, density) for change in changes])
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agrees = trimmed.sign() == elected
    total = (trimmed * _column(weights, changes[0].ndim) * agrees).sum(0)
    return total / agrees.sum(0).clamp_min(1)


def dare(changes: Sequence[Tensor], weights: Sequence[float], *, density: float, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al. 2023, arXiv 2311.03099, equation 1): drop numbers by chance, rescale those that stay by 1 / density, sum wᵢ ΔWᵢ.

    Args:
        changes: ΔWᵢ, all of one shape.
        weights: wᵢ.
        density: the share that is kept, 1 - p.
        generator: draws what is kept, of one change after the other.
    """
    kept = [change * torch.bernoulli(torch.full_like(change, density), generator=generator) / density for change in changes]
    stacked = torch.stack(kept)
    return (stacked * _column(weights, changes[0].ndim)).sum(0)


def _largest(change: Tensor, density: float) -> Tensor:
    """A change with all but its largest numbers set to 0; of 13 million `kthvalue` takes 0.27 s and `topk` 1.1 s."""
    sizes = change.abs()
    count = int(density * change.numel())
    least = sizes.flatten().kthvalue(change.numel() - count + 1).values if count else torch.tensor(torch.inf)
    return torch.where(sizes >= least, change, 0.0)


# --- one module ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """How modules are merged, as `merge` is told."""

    method: str
    rank: int | None
    exact: bool
    density: float
    seed: int


@dataclass(frozen=True)
class _Term:
    """What one file, at its weight, does to a module."""

    path: Path
    weight: float
    update: Update


def _merged(
    stem: str, terms: list[_Term], recipe: _Recipe, weights: Weights | None, *, alpha: float
) -> tuple[Change | None, Change | None]:
    """What a module is to be, and what is written of it; nothing if only its bias changes."""
    if len(terms) == 1 and recipe.method == "sum" and recipe.rank is None and terms[0].update.magnitude is None:
        scaled = _scaled(terms[0].update.change, terms[0].weight)
        return scaled, lora_tools.with_alpha(scaled, alpha) if isinstance(scaled, LowRank) else scaled
    pairs = [(one, lora_tools.change_of(stem, one.update, weights, where=str(one.path))) for one in terms]
    found = [(one, change) for one, change in pairs if change is not None]
    if not found:
        return None, None
    _check_shapes(stem, [(one.path, lora_tools.shape_of(change)) for one, change in found])
    wanted = _wanted(stem, [(one.weight, change) for one, change in found], recipe, alpha)
    return wanted, lora_tools.cut(wanted, _limit(stem, [one for one, _ in found], wanted, recipe), alpha=alpha)


def _wanted(stem: str, changes: list[tuple[float, LowRank | Full]], recipe: _Recipe, alpha: float) -> LowRank | Full:
    """What a module is to be before anything is cut: factors if all are, else ΔW."""
    plain = [(weight, change) for weight, change in changes if isinstance(change, LowRank)]
    if recipe.method in ("sum", "svd") and len(plain) == len(changes):
        return lora_tools.summed(plain, alpha=alpha)
    factors, matrices = [weight for weight, _ in changes], [lora_tools.dense(stem, change) for _, change in changes]
    matrices = [matrix.reshape(matrices[0].shape) for matrix in matrices]
    if recipe.method == "ties" and matrices[0].ndim > 1:
        return Full(ties(matrices, factors, density=recipe.density))
    if recipe.method == "dare" and matrices[0].ndim > 1:
        return Full(dare(matrices, factors, density=recipe.density, generator=devices.generator(recipe.seed)))
    return Full((torch.stack(matrices) * _column(factors, matrices[0].ndim)).sum(0))


def _scaled(change: Change | None, weight: float) -> Change | None:
    """w ΔW in the form that it has."""
    if isinstance(change, Full):
        return Full(change.weight.float() * weight)
    if isinstance(change, Kronecker) and change.rank is None:
        assert isinstance(change.first, Tensor)
        return replace(change, first=change.first.float() * weight)
    return None if change is None else replace(change, alpha=change.alpha * weight)


def _limit(stem: str, terms: list[_Term], wanted: LowRank | Full, recipe: _Recipe) -> Limit:
    """Where a module's sum is cut."""
    if recipe.rank is not None:
        return Limit(recipe.rank)
    if recipe.exact or (recipe.method == "sum" and isinstance(wanted, LowRank)):
        return Limit() if isinstance(wanted, LowRank) else WHOLE
    if isinstance(wanted, Full) and wanted.weight.ndim < 2:
        return Limit()
    ranks = [_rank(stem, one) for one in terms]
    return Limit(max(ranks) if recipe.method == "svd" else sum(ranks))


def _rank(stem: str, term: _Term) -> int:
    rank = None if isinstance(term.update.change, Full | None) else term.update.change.rank
    if rank is None:
        raise UserError(f"{term.path} holds {stem} in a form without a rank, so none can be chosen by itself; give a rank, or exact.")
    return rank


def _bias(stem: str, terms: list[_Term]) -> Tensor | None:
    """Σ wᵢ Δbᵢ."""
    found = [(one, one.update.bias) for one in terms if one.update.bias is not None]
    _check_shapes(stem, [(one.path, tuple(bias.shape)) for one, bias in found])
    return torch.stack([bias.float() * one.weight for one, bias in found]).sum(0) if found else None


def _column(weights: Sequence[float], axes: int) -> Tensor:
    """Weights [n, 1, …] beside stacked tensors of so many axes each."""
    return torch.tensor(weights).view(-1, *[1] * axes)


# --- what is refused ----------------------------------------------------------------------------------------------------------


def _checked(parts: Sequence[tuple[Path, float]], recipe: _Recipe) -> _Recipe:
    """The recipe, if it and the weights are in range."""
    method = recipe.method
    if not parts:
        raise UserError("There is nothing to merge; give at least one LoRA file.")
    for path, weight in parts:
        if weight == 0 or not math.isfinite(weight):
            raise UserError(f"{path} has weight {weight:g}; give a number other than 0, or leave the file out.")
    if method not in METHODS:
        raise UserError(f"Merge method '{method}' is unknown; there are {', '.join(METHODS)}.")
    if recipe.exact and (recipe.rank is not None or method == "svd"):
        what = "a rank" if recipe.rank is not None else "the method svd"
        raise UserError(f"exact keeps all ranks and {what} cuts them; give one of the two.")
    if recipe.rank is not None and recipe.rank < 1:
        raise UserError(f"rank {recipe.rank} is out of range; give at least 1.")
    if not 0 < recipe.density <= 1:
        raise UserError(f"density {recipe.density:g} is out of range; give the share to keep, above 0 and at most 1.")
    return recipe


def _one_family(parts: Sequence[tuple[Path, float]], files: Sequence[LoRAFile]) -> str:
    """The family of all; a file that does not show its own is taken for one of it, and its shapes are compared later."""
    told = {lora_tools.family_of(file): path for file, (path, _) in zip(files, parts, strict=True)}
    told.pop("other", None)
    if len(told) > 1:
        which = " and ".join(f"{path} is for {family}" for family, path in told.items())
        raise UserError(f"{which}; only LoRAs of one family can be merged.")
    return next(iter(told), "other")


def _check_shapes(stem: str, shapes: Sequence[tuple[Path, tuple[int, ...]]]) -> None:
    """Whether all are one module's; a linear fits a 1×1 convolution, and a flat convolution one that is not."""
    sizes = {(shape[0], math.prod(shape[1:])): (path, shape) for path, shape in shapes}
    if len(sizes) > 1:
        (one, shape), (other, another) = list(sizes.values())[:2]
        raise UserError(f"{stem} is {list(shape)} in {one} and {list(another)} in {other}; only LoRAs for one kind of base can be merged.")


# --- what is said -------------------------------------------------------------------------------------------------------------


def _metadata_of(parts: Sequence[tuple[Path, float]], files: Sequence[LoRAFile], *, name: str, family: str) -> dict[str, str]:
    """What a merged file says of itself: what its parts agree on, and their words joined."""
    told = {key: ", ".join(dict.fromkeys(file.metadata[key] for file in files if file.metadata.get(key))) for key in _JOINED}
    common = {key: files[0].metadata.get(key, "") for key in _COMMON if len({file.metadata.get(key) for file in files}) == 1}
    story = Story(
        name, family, prediction=_prediction(files[0]), base=common.get("ss_sd_model_name", ""),
        base_hash=common.get("ss_new_sd_model_hash", ""), merged_from=tuple(path.stem for path, _ in parts),
    )  # fmt: skip
    metadata = lora_metadata.build(story) | {key: words for key, words in told.items() if words}
    silent = ("ss_base_model_version", "ss_v2", "modelspec.architecture") if family == "other" else ()
    return {key: value for key, value in metadata.items() if key not in silent}


def _prediction(file: LoRAFile) -> str:
    """What the base predicts that a file was made for; noise, if it does not say."""
    stated = file.metadata.get("modelspec.prediction_type", "epsilon")
    is_v = stated == "v" or file.metadata.get("ss_base_model_version", "").endswith("_v")
    return "v_prediction" if is_v else stated


def _notes(parts: Sequence[tuple[Path, float]], files: Sequence[LoRAFile], stems: Sequence[str]) -> Iterator[str]:
    for (path, _), file in zip(parts, files, strict=True):
        yield from lora_tools.notes_of(path, file)
    if single := sum(any(stem not in file.modules for file in files) for stem in stems):
        yield f"{single} of {len(stems)} modules are not in all of the files; they are kept."
    if len({_prediction(file) for file in files}) > 1:
        yield "The files were made for bases that predict different things (noise and v), so they may not go together."


# --- what was written ---------------------------------------------------------------------------------------------------------


def _written_metadata(content: bytes) -> dict[str, str]:
    metadata: dict[str, str] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return metadata


def _distance(again: Update, update: Update) -> float:
    """The relative error of an update that was written and read again; a bias or magnitude is written number by number."""
    return 0.0 if again.change is None or update.change is None else lora_tools.relative_error(again.change, update.change)
