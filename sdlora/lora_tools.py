"""The arithmetic that merging, resizing, extracting and baking share: updates summed, cut to a rank, and compared.

What an update means is its ΔW, so every tool states how far the ΔW that it writes is from the one that was asked for, rounding to the
file's number format included. Plain LoRA stays in its factors: a product of [out, r] and [r, in] is cut through QR of the two, without
ever forming [out, in]. Other forms (LoHa, LoKr, DoRA, whole ΔW) become the matrix, and that is cut. What is made has one alpha in the
whole file, so that every loader scales it alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdlora import deltas, lora_names
from sdlora.deltas import Full, Hadamard, Kronecker, LowRank, Update
from sdlora.errors import UserError
from sdlora.lora_file import LoRAFile

Change = LowRank | Hadamard | Kronecker | Full
Weights = Callable[[str], Tensor]  # a base's weight by canonical stem

_EXACT = 512  # below this width an exact SVD takes less than 0.1 s
_MORE = 16  # directions that a randomised SVD looks for beyond those that are kept
_CANCELLED = 1e-6  # a sum that is smaller than this share of what its factors could make has cancelled itself out
_TINY = 1e-30
_WIDE = ("conv1", "conv2", "conv", "conv_in", "conv_out")  # 3×3 in every Stable Diffusion


@dataclass(frozen=True)
class Errors:
    """How far what is written is from what was asked for: ‖ΔW' - ΔW‖ / ‖ΔW‖ in the Frobenius norm, module by module.

    Args:
        worst: the largest, at `worst_module` (a canonical stem).
        mean: over all `modules`.
    """

    worst: float
    worst_module: str
    mean: float
    modules: int

    @property
    def sentence(self) -> str:
        """ "relative error: worst 3.1e-04 (lora_unet_…), mean 2.0e-04 over 264 modules"."""
        return f"relative error: worst {self.worst:.1e} ({self.worst_module}), mean {self.mean:.1e} over {self.modules} modules"


@dataclass(frozen=True)
class Made:
    """A LoRA file that was made: its bytes, the errors made, and one sentence for each thing that its user should know."""

    content: bytes
    errors: Errors
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limit:
    """Where a decomposition is cut: at a rank, or where a share of the energy Σ σ² is kept; at nothing if both are None."""

    rank: int | None = None
    energy: float | None = None


def limit_of(*, rank: int | None = None, energy: float | None = None, max_error: float | None = None) -> Limit:
    """A limit from the one of three that is given; keeping all but e of ‖ΔW‖ keeps 1 - e² of its energy.

    Args:
        rank: at least 1.
        energy: above 0, at most 1.
        max_error: from 0 to less than 1.

    Raises:
        UserError: if not exactly one is given, or it is out of range.
    """
    given = {name: value for name, value in (("rank", rank), ("energy", energy), ("max_error", max_error)) if value is not None}
    if len(given) != 1:
        raise UserError(f"{len(given)} of rank, energy and max_error are given ({', '.join(given) or 'none'}); give exactly one.")
    if rank is not None and rank < 1:
        raise UserError(f"rank {rank} is out of range; give at least 1.")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy {energy:g} is out of range; give the share to keep, above 0 and at most 1.")
    if max_error is not None and not 0 <= max_error < 1:
        raise UserError(f"max_error {max_error:g} is out of range; give a share from 0 to less than 1.")
    return Limit(rank, energy if max_error is None else 1 - max_error**2)


# --- files --------------------------------------------------------------------------------------------------------------------


def family_of(file: LoRAFile) -> str:
    """A file's family; where shapes and metadata are silent, SGM names still mean SDXL."""
    return "sdxl" if file.family == "other" and "SGM" in file.layout else file.family


def dtype_of(files: Iterable[LoRAFile]) -> torch.dtype:
    """The widest number format of some files' tensors; fp16 for those of 8 bits, which nobody reads LoRAs in."""
    found = {tensor.dtype for file in files for update in file.modules.values() for tensor in deltas.tensors(update)}
    return functools.reduce(torch.promote_types, {dtype if dtype.itemsize > 1 else torch.float16 for dtype in found})


def common_alpha(files: Iterable[LoRAFile]) -> float:
    """The smallest alpha above 0 among plain LoRA, which is the only one in most files; 1 if there is none."""
    changes = [update.change for file in files for update in file.modules.values()]
    return min((change.alpha for change in changes if isinstance(change, LowRank) and change.alpha > 0), default=1.0)


def renamed(metadata: Mapping[str, str], name: str | None) -> dict[str, str]:
    """Metadata under another name; hashes are those of other weights, and `lora_file.to_bytes` adds the new ones."""
    return dict(metadata) if name is None else {**metadata, "ss_output_name": name, "modelspec.title": name}


def network(modules: Mapping[str, Update], alpha: float) -> dict[str, str]:
    """What the metadata says of ranks and forms; of several ranks the largest, as readers expect one number."""
    ranks = LoRAFile(dict(modules)).ranks
    plain = all(isinstance(update.change, LowRank | None) for update in modules.values())
    told = {"ss_network_module": "networks.lora" if plain else "lycoris.kohya", "ss_network_args": "{}"}
    return told | ({"ss_network_dim": str(max(ranks)), "ss_network_alpha": f"{alpha:g}"} if ranks else {})


def notes_of(path: Path, file: LoRAFile) -> tuple[str, ...]:
    """What the user of a file should know when something is made of it: its warnings, and the keys that are left out."""
    unknown = file.unknown
    left_out = (f"{path.name}: {len(unknown)} keys belong to no known module and are left out, such as {unknown[0]}.",) if unknown else ()
    return (*file.warnings, *left_out)


# --- updates ------------------------------------------------------------------------------------------------------------------


def change_of(stem: str, update: Update, weights: Weights | None, *, where: str) -> LowRank | Full | None:
    """What an update does to the weight, as factors if they are plain, else as ΔW [out, in, …] in fp32; None if only the bias changes.

    A Tucker core C is taken into A: (B C) A is a LoRA of the same rank whose A is Σ_j C_ij A_j.

    Args:
        weights: the base's weights by stem, needed for DoRA alone.
        where: the file, for the error.

    Raises:
        UserError: if it is DoRA and there are no weights.
    """
    change = update.change
    if update.magnitude is not None:
        if weights is None:
            raise UserError(f"{where} holds DoRA in {stem}, whose ΔW depends on the base's weights; give the base too (--base).")
        weight = weights(stem)
        if reason := deltas.misfit(update, weight, bias=update.bias):
            raise UserError(f"{where} does not fit the base: {stem} {reason}; give the base that it was made for.")
        whole = deltas.delta(update, weight)
        assert whole is not None
        return Full(whole)
    if isinstance(change, LowRank) and change.core is not None:
        down = torch.einsum("ijhw,jc->ichw", change.core.float(), change.down.float().flatten(1))
        return LowRank(down, change.up.float(), change.alpha)
    return change if change is None or isinstance(change, LowRank) else Full(dense(stem, change))


def dense(stem: str, change: Change) -> Tensor:
    """ΔW [out, in, …] in fp32, a flat one of a 3×3 convolution unfolded."""
    whole = _matrix(change)
    is_wide = lora_names.dotted(stem)[1].rpartition(".")[2] in _WIDE
    return whole.reshape(len(whole), -1, 3, 3) if is_wide and whole.ndim == 2 and whole.shape[1] % 9 == 0 else whole


def shape_of(change: Change) -> tuple[int, ...]:
    """The shape of ΔW as the factors have it."""
    if isinstance(change, Full):
        return tuple(change.weight.shape)
    if isinstance(change, LowRank):
        return len(change.up), *(change.down.shape[1:] if change.core is None else (change.down.shape[1], *change.core.shape[2:]))
    if isinstance(change, Hadamard):
        cored = change.core1 is not None
        kernel = () if change.core1 is None else tuple(change.core1.shape[2:])
        return change.up1.shape[1 if cored else 0], change.down1.shape[1], *kernel
    rows, columns, *_ = _factor_shape(change.first, None)
    more_rows, more_columns, *kernel_sides = _factor_shape(change.second, change.core)
    return rows * more_rows, columns * more_columns, *kernel_sides


def _factor_shape(factor: Tensor | tuple[Tensor, Tensor], core: Tensor | None) -> tuple[int, ...]:
    if isinstance(factor, Tensor):
        return tuple(factor.shape)
    left, right = factor
    return (left.shape[0], *right.shape[1:]) if core is None else (left.shape[1], right.shape[1], *core.shape[2:])


def finished(kept: Change | None, wanted: Change | None, *, bias: Tensor | None, dtype: torch.dtype) -> tuple[Update, float]:
    """An update as it is stored, and its relative error; of a bias alone, none."""
    stored = deltas.mapped(Update(kept, bias=bias), lambda tensor: tensor.to(dtype))
    return stored, 0.0 if stored.change is None or wanted is None else relative_error(stored.change, wanted)


def with_alpha(change: LowRank, alpha: float) -> LowRank:
    """The same ΔW with another alpha, not 0: the difference goes into B."""
    return change if change.alpha == alpha else LowRank(change.down, change.up.float() * (change.alpha / alpha), alpha, change.core)


def summed(terms: Iterable[tuple[float, LowRank]], *, alpha: float) -> LowRank:
    """Σ wᵢ ΔWᵢ without cross terms, [f₁B₁ f₂B₂ …] [f₁A₁; f₂A₂; …] with ranks that add up.

    Each product's factor wᵢ (αᵢ / rᵢ) / (α / Σ rᵢ) is shared evenly, f = √|…|, with its sign in B.

    Args:
        terms: weights and plain updates of one module; all of one shape, a 1×1 convolution's being that of a linear.
        alpha: of the sum, above 0.
    """
    pairs = list(terms)
    rank = sum(change.rank for _, change in pairs)
    first = pairs[0][1]
    downs, ups = [], []
    for weight, change in pairs:
        factor = weight * (change.alpha / change.rank) * (rank / alpha)
        root = math.sqrt(abs(factor))
        downs.append(change.down.float().flatten(1) * root)
        ups.append(change.up.float().flatten(1) * math.copysign(root, factor))
    down = torch.cat(downs).reshape(rank, *first.down.shape[1:])
    return LowRank(down, torch.cat(ups, dim=1).reshape(len(first.up), rank, *first.up.shape[2:]), alpha)


def cut(change: LowRank | Full, limit: Limit, *, alpha: float) -> LowRank | Full:
    """The best update within a limit: σ₁u₁v₁ᵀ + … + σ_r u_r v_rᵀ; a plain one that is within it keeps its factors, a norm its numbers.

    Args:
        alpha: of the result, above 0. Each factor takes √(σ r / α).
    """
    if isinstance(change, Full) and change.weight.ndim < 2:
        return change
    if isinstance(change, LowRank) and (limit == Limit() or change.rank <= (limit.rank or 0)):
        return with_alpha(change, alpha)
    left, values, right, energy = _decomposed(change, limit)
    rank = _rank_within(values, energy, limit)
    if isinstance(change, LowRank) and change.rank <= rank:
        return with_alpha(change, alpha)
    root = (values[:rank] * (rank / alpha)).sqrt()
    shape = shape_of(change)
    down = (root[:, None] * right[:rank]).float().reshape(rank, *shape[1:])
    return LowRank(down, (left[:, :rank] * root).float().reshape(len(left), rank, *[1] * (len(shape) - 2)), alpha)


def _rank_within(values: Tensor, energy: float, limit: Limit) -> int:
    """How many of the largest singular values a limit keeps, at least one."""
    if limit.rank is not None:
        return min(limit.rank, len(values))
    if limit.energy is None:
        return len(values)
    kept = values.double().square().cumsum(0)
    return min(int((kept < limit.energy * energy).sum()) + 1, len(values))


def _decomposed(change: LowRank | Full, limit: Limit) -> tuple[Tensor, Tensor, Tensor, float]:
    """Left vectors [out, q], singular values [q] falling, right vectors [q, in·…], and the energy Σ σ² of all, also those beyond q."""
    if isinstance(change, Full):
        return _svd(change.weight.float().flatten(1), limit)
    left, upper = torch.linalg.qr(change.up.double().flatten(1))
    right, lower = torch.linalg.qr(change.down.double().flatten(1).T)
    inner, values, outer = torch.linalg.svd(upper @ lower.T * (change.alpha / change.rank), full_matrices=False)
    return left @ inner, values, outer @ right.T, float(values.square().sum())


def _svd(matrix: Tensor, limit: Limit) -> tuple[Tensor, Tensor, Tensor, float]:
    """The SVD of a matrix as far as a limit needs it: exact, or of a large one randomised (Halko et al. 2011, arXiv 0909.4061).

    [1280, 1280] takes 0.52 s exactly on one core and 0.03 s to 40 directions. Four power iterations are taken; the errors that are
    stated are measured on the result, so they hold whichever way it came.
    """
    short, wanted = min(matrix.shape), (limit.rank or 64) + _MORE
    energy = float(matrix.double().square().sum())
    while short > _EXACT and wanted <= short // 4:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, q=wanted, niter=4)
        if limit.energy is None or float(values.double().square().sum()) >= limit.energy * energy:
            return left, values, right.T, energy
        wanted *= 2
    tall = matrix.shape[0] >= matrix.shape[1]  # [1280, 11520] takes 9.6 s, its transpose 2.1
    left, values, right = torch.linalg.svd(matrix if tall else matrix.T, full_matrices=False)
    energy = float(values.double().square().sum())  # of these numbers and not of the matrix, which differ by 1e-7
    return (left, values, right, energy) if tall else (right.T, values, left.T, energy)


# --- errors -------------------------------------------------------------------------------------------------------------------


def errors_of(by_module: Mapping[str, float]) -> Errors:
    """The worst and the mean of the errors of some modules, at least one."""
    worst = max(by_module, key=lambda stem: by_module[stem])
    return Errors(by_module[worst], worst, sum(by_module.values()) / len(by_module), len(by_module))


def relative_error(found: Change, wanted: Change) -> float:
    """‖ΔW' - ΔW‖ / ‖ΔW‖ in the Frobenius norm; of two plain updates without forming a ΔW.

    A sum that cancels itself out is measured against what its factors could make, as nothing is left of it to compare with.
    """
    if type(found) is type(wanted) and same(found, wanted):
        return 0.0
    if isinstance(found, LowRank) and isinstance(wanted, LowRank) and found.core is None and wanted.core is None:
        size = wanted.alpha / wanted.rank * float(wanted.up.double().norm() * wanted.down.double().norm())
        return _norm([(1.0, found), (-1.0, wanted)]) / max(_norm([(1.0, wanted)]), abs(size) * _CANCELLED, _TINY)
    one, other = (_matrix(change) for change in (found, wanted))
    return float((one.reshape(other.shape) - other).norm()) / max(float(other.norm()), _TINY)


def _matrix(change: Change) -> Tensor:
    return deltas.product(change, torch.Size(shape_of(change)))


def _norm(terms: list[tuple[float, LowRank]]) -> float:
    """‖Σ wᵢ (αᵢ / rᵢ) Bᵢ Aᵢ‖ = √tr((BᵀB)(A Aᵀ)) of the factors in a row, in fp64: exact to 1e-8 of the largest term."""
    ups = torch.cat([one.up.double().flatten(1) * (weight * one.alpha / one.rank) for weight, one in terms], dim=1)
    downs = torch.cat([one.down.double().flatten(1) for _, one in terms])
    return math.sqrt(max(float(((ups.T @ ups) * (downs @ downs.T)).sum()), 0.0))


def same(one: object, other: object) -> bool:
    """Whether two changes of one form hold the same numbers, whatever number format they are stored in."""
    pairs = list(zip(deltas.tensors(one), deltas.tensors(other), strict=False))
    equal = all(torch.equal(a.float().flatten(), b.float().flatten()) for a, b in pairs)
    return equal and getattr(one, "alpha", None) == getattr(other, "alpha", None)
