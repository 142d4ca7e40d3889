"""A LoRA file as it stands on the shelf: what its header and the files beside it tell.

A list of 500 files is made from headers alone: no weight is read. What a file does not show that way (alphas, whether its numbers are
sound, its hash) is `lora_file.facts`'s, which reads it whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from sdlora import lora_formats, lora_notes, run_folder, runs, weights_file
from sdlora.errors import UserError
from sdlora.lora_file import FAMILIES, LoRAFile
from sdlora.weights_file import Entry

MOST_TAGS = 200
_CONTEXT = re.compile(
    r"attn2[._](?:processor[._])?to_[kv](?:_lora)?\.(?:lora_down|lora_A|lora\.down|down|lora_linear_layer\.down)\b.*weight"
)
_RANKED = re.compile(r"(?:lora_down|lora_A(?:\.[^.]+)?|lora(?:_linear_layer)?\.down|_lora\.down)\.weight|hada_w1_b|lokr_w[12]_b")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Facts:
    """What a list shows of a LoRA file.

    Args:
        written_s: unix time.
        family: "mini", "sd1", "sd2", "sdxl" or "other".
        ranks: the different ranks, ascending.
        trigger: words that call it.
        strength: to begin with.
        base: the name of what it was trained on, as it says; "" if it does not.
        hash, legacy_hash: A1111's two, as the file states them; "" if it does not.
        trouble: why it cannot be used, in a sentence; "" if the header shows nothing wrong.
    """

    path: Path
    size_bytes: int = 0
    written_s: float = 0.0
    family: str = "other"
    ranks: tuple[int, ...] = ()
    trigger: str = ""
    strength: float = 1.0
    base: str = ""
    hash: str = ""
    legacy_hash: str = ""
    notes: str = ""
    trouble: str = ""


def facts(path: Path) -> Facts:
    """What the header and the sidecars tell; remembered as long as none of them is written anew."""
    try:
        stat = path.stat()
    except OSError as problem:
        return Facts(path, trouble=f"{path.name} cannot be read ({problem.strerror}).")
    return _facts(path, stat.st_size, stat.st_mtime_ns, _stamp(path, ".json"), _stamp(path, ".sdlora.json"))


def _stamp(path: Path, ending: str) -> int:
    try:
        return path.with_name(path.stem + ending).stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=4096)
def _facts(path: Path, size: int, written_ns: int, *_: int) -> Facts:
    beside = lora_notes.read(path)
    try:
        header = weights_file.header(path, limit_bytes=weights_file.LORA_HEADER_BYTES)
        family = _family(path, header.tensors, header.metadata)
    except UserError as problem:
        return Facts(path, size, written_ns / 1e9, notes=beside.notes, trouble=str(problem).replace(str(path), path.name))
    ranks = {entry.shape[0] for key, entry in header.tensors.items() if entry.shape and _RANKED.search(key)}
    told = header.metadata
    return Facts(
        path, size, written_ns / 1e9, family, tuple(sorted(ranks)),
        trigger=told.get("modelspec.trigger_phrase", "")[:500] or beside.trigger[:500],
        strength=_stated_strength(told) if beside.strength is None else beside.strength,
        base=told.get("ss_sd_model_name", "")[:200], hash=told.get("sshs_model_hash", "")[:64],
        legacy_hash=told.get("sshs_legacy_hash", "")[:64], notes=beside.notes,
    )  # fmt: skip


def _stated_strength(metadata: Mapping[str, str]) -> float:
    """What `share` writes of the best strength."""
    found = re.fullmatch(r"strength (-?[0-9]+(?:\.[0-9]+)?)", metadata.get("modelspec.usage_hint", ""))
    return float(found[1]) if found and 0 < abs(float(found[1])) <= 2 else 1.0


def _family(path: Path, tensors: Mapping[str, Entry], metadata: Mapping[str, str]) -> str:
    """As `LoRAFile.family`; one look at the cross-attention tells it of most files, the others' names are read all."""
    widths = {entry.shape[1] for key, entry in tensors.items() if len(entry.shape) > 1 and _CONTEXT.search(key)}
    if len(widths) == 1 and widths <= set(FAMILIES):
        return FAMILIES[widths.pop()]
    hollow = {key: torch.ones((), dtype=_DTYPES.get(entry.dtype, torch.float32)).expand(entry.shape) for key, entry in tensors.items()}
    parsed = lora_formats.parse(path, hollow, metadata)
    return LoRAFile(parsed.modules, dict(metadata)).family


def tags(path: Path) -> list[tuple[str, int]]:
    """How often each tag stood in the captions that a file was trained on, the most frequent first; nothing if it does not say.

    Raises:
        UserError: if the header cannot be read.
    """
    told = weights_file.header(path, limit_bytes=weights_file.LORA_HEADER_BYTES).metadata.get("ss_tag_frequency", "")
    try:
        folders = json.loads(told) if told else {}
    except (ValueError, RecursionError):
        return []
    counts: Counter[str] = Counter()
    for one in folders.values() if isinstance(folders, dict) else ():
        for tag, count in one.items() if isinstance(one, dict) else ():
            counts[tag.strip()] += count if isinstance(count, int) and 0 < count < 1 << 40 else 0
    return [(tag, count) for tag, count in counts.most_common(MOST_TAGS) if tag and count]


def legacy_hash(path: Path) -> str:
    """A1111's old hash of a file's weights: 8 hex digits of the SHA-256 of 64 KiB at 0x100000 of all that follows the header.

    Raises:
        UserError: if the header cannot be read.
    """
    start = weights_file.header(path, limit_bytes=weights_file.LORA_HEADER_BYTES).data_start
    with path.open("rb") as file:
        file.seek(start + 0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def run_of(path: Path) -> Path | None:
    """The run folder that a LoRA file is of, if it is of one."""
    return run_of_folder(path.parent)


def run_of_folder(folder: Path) -> Path | None:
    """The run folder that the LoRA files in a folder are of: itself, or the one whose checkpoints it holds."""
    places = (folder, folder.parent) if folder.name == "checkpoints" else (folder,)
    return next((place for place in places if runs.is_run(place)), None)


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's name says; None if it is none."""
    found = re.fullmatch(r".+-(\d{6,})", path.stem) if path.parent.name == "checkpoints" else None
    return int(found[1]) if found else None


def preview(path: Path) -> Path | None:
    """The picture that shows a LoRA file: one beside it, else the sample that its run drew at its step, else the run's newest."""
    if beside := lora_notes.picture(path):
        return beside
    folder, step = run_of(path), step_of(path)
    if folder is None:
        return None
    own = None if step is None else run_folder.sample_path(folder, step, 0)
    return own if own and own.is_file() else run_folder.newest_sample(folder)
