"""LoRAs folded into a base for good, W' = W + Σ strength · ΔW, and written as a new base.

Nothing is opened as a model: tensors go from file to file, one in memory at a time, each in the number format it had. A checkpoint keeps
its own layout and every byte that no LoRA changes. A folder is written as a folder, or, of SD 1.x and XL, as a checkpoint. A checkpoint
is not written as a folder: it brings no tokenizer. Nothing is ever written over.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdlora import base_parts, base_tensors, checkpoint_keys, deltas, lora_file, lora_tools, weights_file
from sdlora.base_tensors import BaseTensors, Parameter
from sdlora.checkpoint_keys import Place
from sdlora.deltas import Update
from sdlora.errors import UserError
from sdlora.generate import LoRA
from sdlora.lora_tools import Errors
from sdlora.weights_file import Entry

_TEXTS = (".json", ".txt", ".md", ".model")  # of a pipeline's small files
_BLOCK_BYTES = 1 << 24
_ALIGNED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes; wider numbers go first, so that each stands at a multiple of its size
_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}  # of checkpoints, as in modelspec


@dataclass(frozen=True)
class Baked:
    """A base that was written, how much of the LoRAs' ΔW was lost in rounding to its number format, and what its user should know."""

    path: Path
    errors: Errors
    notes: tuple[str, ...] = ()


def bake(name: str, loras: Sequence[LoRA], out: Path) -> Iterator[tuple[int, int] | Baked]:
    """Folds LoRAs into a base and writes it as a new one: yields (done, total) in tensors and files, and last what was made.

    Args:
        name: the base, as for `base_files.load`.
        loras: at least one, each with a strength for the UNet and one for the text encoders.
        out: what does not exist yet: a name that ends in `.safetensors` for a checkpoint, else a folder.

    Raises:
        UserError: if `out` exists or is of a form that this base cannot take, a LoRA does not fit, or the disk is full.
    """
    if not loras:
        raise UserError("There is nothing to bake in; give at least one LoRA file.")
    if out.suffix.lower() in (".ckpt", ".pt", ".bin"):
        raise UserError(f"{out}: pickles are not written; give a name that ends in .safetensors, or a folder.")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already; give another name, or move it away.")
    base = base_tensors.tensors_of(name)
    work = _Work(_shifts(base, loras), {}, [note for one in loras for note in lora_tools.notes_of(one.path, lora_file.read(one.path))])
    if out.suffix.lower() != ".safetensors":
        yield from _to_folder(base, work, out)
    else:
        planned, metadata = _of_checkpoint(base, work) if base.folder is None else _of_folder(base, work, out)
        merged = ", ".join([Path(name).stem, *(one.path.stem for one in loras)])
        for done, _ in enumerate(_write(out, planned, metadata | {"modelspec.merged_from": merged}), start=1):
            yield done, len(planned)
    yield Baked(out, lora_tools.errors_of(work.errors), tuple(work.notes))


# --- what changes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shift:
    """What one LoRA does to a parameter, at its strength."""

    stem: str
    update: Update
    strength: float

    def change(self, parameter: Tensor, *, is_bias: bool) -> Tensor:
        """strength · ΔW or strength · Δb in fp32."""
        change = self.update.bias if is_bias else deltas.delta(self.update, parameter)
        assert change is not None
        return change.float() * self.strength


@dataclass(frozen=True)
class _Work:
    """What is to be done, and what was found on the way: errors by stem, and notes."""

    shifts: Mapping[Parameter, Sequence[_Shift]]
    errors: dict[str, float]
    notes: list[str]


def _shifts(base: BaseTensors, loras: Sequence[LoRA]) -> dict[Parameter, list[_Shift]]:
    """What changes in each parameter.

    Raises:
        UserError: if a LoRA does not fit the base, or has no strength.
    """
    found: dict[Parameter, list[_Shift]] = {}
    for one in loras:
        text_strength = one.strength if one.text_strength is None else one.text_strength
        if not any((one.strength, text_strength)) or not all(map(math.isfinite, (one.strength, text_strength))):
            raise UserError(f"{one.path} has strength {one.strength:g}; give a number other than 0, or leave the file out.")
        modules = lora_file.read(one.path).modules
        _check_fit(base, one.path, modules)
        for stem, update in modules.items():
            weight, bias = (base_tensors.parameter_of(stem, ending) for ending in ("weight", "bias"))
            shift = _Shift(stem, update, one.strength if weight[0] == "unet" else text_strength)
            if shift.strength and (update.change is not None or update.magnitude is not None):
                found.setdefault(weight, []).append(shift)
            if shift.strength and update.bias is not None:
                found.setdefault(bias, []).append(shift)
    if not found:
        raise UserError("The LoRAs change nothing at these strengths; give other strengths.")
    return found


def _check_fit(base: BaseTensors, path: Path, modules: Mapping[str, Update]) -> None:
    """Whether every module of a LoRA has a place of its shape in the base."""
    fit = base_tensors.fit(base, modules)
    homeless, misshapen = fit.homeless, fit.misshapen
    words = [f"{len(homeless)} of its {len(modules)} modules are not in it (such as {homeless[0]})"] if homeless else []
    words += [f"{len(misshapen)} of its {len(modules)} modules have another shape (such as {misshapen[0]})"] if misshapen else []
    if words:
        raise UserError(f"{path} does not fit base '{base.name}': {' and '.join(words)}; it was made for another kind of model.")


def _shifted(tensor: Tensor, parameter: Parameter, work: _Work) -> Tensor:
    """W' in the dtype of W; the share of ΔW that rounding loses is noted.

    Raises:
        UserError: if a number is too large for the dtype.
    """
    shifts = work.shifts.get(parameter, ())
    if not shifts:
        return tensor
    before = tensor.float()
    change = torch.stack([shift.change(tensor, is_bias=parameter[1].endswith(".bias")).reshape(tensor.shape) for shift in shifts]).sum(0)
    after = (before + change).to(tensor.dtype)
    if not torch.isfinite(after.float()).all():
        raise UserError(f"{'.'.join(parameter)} becomes infinite in {str(tensor.dtype).removeprefix('torch.')}; give lower strengths.")
    lost = float((after.float() - before - change).norm()) / max(float(change.norm()), 1e-30)
    for shift in shifts:
        work.errors[shift.stem] = max(lost, work.errors.get(shift.stem, 0.0))
    return after


# --- what is written ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Planned:
    """A tensor of a file that is to be written: the format's word for its dtype, its shape, size, and where its bytes come from."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    blocks: Callable[[], Iterable[bytes]]


def _of_file(path: Path, places: Mapping[str, Place], work: _Work) -> list[_Planned]:
    """A file's tensors in their order: bytes as they are, but where a LoRA speaks."""
    header = weights_file.header(path)
    planned = []
    for key, entry in sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        at = places.get(key)
        changes = at is not None and any((at.part, name) in work.shifts for name in at.parameters)
        start, size = header.data_start + entry.start, entry.end - entry.start
        copied = functools.partial(_copied, path, start, start + size)
        blocks = functools.partial(_baked, path, entry, start, at, work) if at is not None and changes else copied
        planned.append(_Planned(key, entry.dtype, entry.shape, size, blocks))
    return planned


def _of_checkpoint(base: BaseTensors, work: _Work) -> tuple[list[_Planned], dict[str, str]]:
    """A checkpoint in its own layout, and its metadata without the hash of the weights that it had."""
    path, family = Path(base.name), base.identity.family
    header = weights_file.header(path)
    if averaged := sum(key.startswith("model_ema.") for key in header.tensors):
        work.notes.append(f"{path.name} holds {averaged} averaged weights (model_ema) too; they are copied without the LoRAs.")
    places = base_tensors.places(path, header, lambda key: checkpoint_keys.place(key, family=family))
    return _of_file(path, places, work), {key: value for key, value in header.metadata.items() if key != "modelspec.hash_sha256"}


def _of_folder(base: BaseTensors, work: _Work, out: Path) -> tuple[list[_Planned], dict[str, str]]:
    """A folder's pipeline as a checkpoint."""
    family, folder = base.identity.family, base.folder
    assert folder is not None
    if family not in _ARCHITECTURES:
        why = "its text encoder lacks the last layer that checkpoints hold" if family == "sd2" else "it has no checkpoint layout"
        raise UserError(f"{out} would be a checkpoint, and base '{base.name}' cannot be written as one: {why}; give a name for a folder.")
    planned = []
    for part in base_tensors.parts_of_family(family):
        names = [name for where, name in base.spots if where == part]
        try:
            places = checkpoint_keys.places(part, names, family=family)
        except ValueError as problem:
            raise UserError(f"Base '{base.name}' has weights that no checkpoint has ({problem}); give a name for a folder.") from problem
        planned += [_joined(base, key, at, work) for key, at in places.items()]
    schedule = base_parts.config(folder / "scheduler" / "scheduler_config.json")
    is_v = base.identity.prediction == "v_prediction"
    marks = [mark for mark, there in (("v_pred", is_v), ("ztsnr", bool(schedule.get("rescale_betas_zero_snr")))) if there]
    planned += [_Planned(mark, "F32", (0,), 0, tuple) for mark in marks]  # empty tensors, by which loaders know such fine-tunes
    metadata = {
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": _ARCHITECTURES[family], "modelspec.title": out.stem,
        "modelspec.prediction_type": "v" if is_v else base.identity.prediction,
    }  # fmt: skip
    return sorted(planned, key=lambda one: (-_ALIGNED.get(one.dtype, 1), one.key)), metadata


def _joined(base: BaseTensors, key: str, at: Place, work: _Work) -> _Planned:
    """A checkpoint's tensor of one or several parameters."""
    spots = [base.spots[at.part, name] for name in at.parameters]
    shape = checkpoint_keys.joined([torch.empty(spot.shape, device="meta") for spot in spots], at).shape

    def blocks() -> Iterator[bytes]:
        pieces = [_shifted(base_tensors.read(base, (at.part, name)), (at.part, name), work) for name in at.parameters]
        yield _bytes(checkpoint_keys.joined(pieces, at))

    return _Planned(key, spots[0].entry.dtype, tuple(shape), sum(spot.size for spot in spots), blocks)


def _baked(path: Path, entry: Entry, start: int, at: Place, work: _Work) -> Iterator[bytes]:
    tensor = base_tensors.tensor_at(path, entry, start)
    pieces = zip(checkpoint_keys.parts_of(tensor, at), at.parameters, strict=True)
    yield _bytes(checkpoint_keys.joined([_shifted(piece, (at.part, name), work) for piece, name in pieces], at))


def _copied(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (block := file.read(min(_BLOCK_BYTES, end - start))):
            start += len(block)
            yield block


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _write(path: Path, planned: Sequence[_Planned], metadata: Mapping[str, str]) -> Iterator[None]:
    """Writes a .safetensors file tensor by tensor, whole or not at all, as `files.write` does; yields after each.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(_header(planned, metadata))
            for one in planned:
                file.writelines(one.blocks())
                yield
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as problem:
        raise UserError(f"{path} could not be written ({problem.strerror}); free space or choose another folder.") from problem
    finally:
        temporary.unlink(missing_ok=True)


def _header(planned: Sequence[_Planned], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    here = 0
    for one in planned:
        fields[one.key] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [here, here + one.size]}
        here += one.size
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# --- folders ------------------------------------------------------------------------------------------------------------------


def _to_folder(base: BaseTensors, work: _Work, out: Path) -> Iterator[tuple[int, int]]:
    """A folder's pipeline as another: the files of it, with every variant of the weights that a LoRA changes baked."""
    if base.folder is None:
        raise UserError(f"{out} would be a folder, and base '{base.name}' brings no tokenizer; give a name that ends in .safetensors.")
    copied, baked = _files_of(base.folder, {part for part, _ in work.shifts}, work)
    total, done = len(copied) + sum(len(weights_file.header(path).tensors) for path in baked), 0
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        for path in [*copied, *baked]:
            goal = temporary / path.relative_to(base.folder)
            goal.parent.mkdir(parents=True, exist_ok=True)
            if path in baked:
                belongs = functools.partial(base_tensors.folder_place, part=path.parent.name)
                header = weights_file.header(path)
                steps = _write(goal, _of_file(path, base_tensors.places(path, header, belongs), work), header.metadata)
            else:
                shutil.copyfile(path, goal)
                steps = iter((None,))
            for _ in steps:
                done += 1
                yield done, total
        temporary.rename(out)
    except OSError as problem:
        raise UserError(f"{out} could not be written ({problem.strerror}); free space or choose another folder.") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _files_of(folder: Path, changed: set[str], work: _Work) -> tuple[list[Path], list[Path]]:
    """A pipeline's files to copy and to bake; what is left out (pickles, checkpoints beside the pipeline) is noted."""
    index = base_parts.config(folder / "model_index.json")
    parts = [key for key, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1] and (folder / key).is_dir()]
    inside = [path for part in parts for path in sorted((folder / part).iterdir()) if path.is_file()]
    beside = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    kept = [path for path in beside if path.suffix in _TEXTS or path.name.startswith("LICENSE")]
    kept += [path for path in inside if path.suffix in (*_TEXTS, ".safetensors")]
    if left := [path for path in [*beside, *inside] if path not in kept]:
        work.notes.append(f"{len(left)} files of {folder} are not copied (pickles, or not the pipeline's), such as {left[0].name}.")
    baked = [path for path in kept if path.suffix == ".safetensors" and path.parent.name in changed]
    return [path for path in kept if path not in baked], baked
