"""LoRA files: reading whatever is found, writing the one layout that every tool loads or diffusers' own, and what a file holds.

What is written stands in `lora_layouts`, what is read in `lora_formats`; here are the record that all share, the file around the tensors
(hashes, sorted header), and the family, which is told by shapes because metadata is often missing. fp16 unless stated otherwise.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from sdlora import deltas, lora_formats, lora_layouts, lora_names, weights_file
from sdlora.deltas import Full, Hadamard, Kronecker, LowRank, Update
from sdlora.errors import UserError

FAMILIES = {128: "mini", 768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by the width of what the cross-attention reads
HEADER_BYTES = 1 << 20  # some tools read no more
_STATED = {
    "sd_v1": "sd1", "sd_v2": "sd2", "sdxl": "sdxl", "mini": "mini",
    "stable-diffusion-v1": "sd1", "stable-diffusion-v2": "sd2", "stable-diffusion-xl": "sdxl",
}  # fmt: skip
_TEXT_READERS = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1")
_PEFT_KEY = "lora_adapter_metadata"


@dataclass(frozen=True)
class LoRAFile:
    """What a file holds.

    Args:
        modules: what is changed, by canonical stem.
        metadata: the header's.
        layout: how the file spells its names, in words.
        unknown: keys that belong to no module that is known here.
        warnings: one sentence for each thing that its user should know.
    """

    modules: dict[str, Update]
    metadata: dict[str, str] = field(default_factory=dict)
    layout: str = "kohya"
    unknown: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ranks(self) -> list[int]:
        """The different ranks, ascending; updates that are stored whole have none."""
        changes = [update.change for update in self.modules.values()]
        found = {change.rank for change in changes if isinstance(change, LowRank | Hadamard | Kronecker)}
        return sorted(rank for rank in found if rank is not None)

    @property
    def alphas(self) -> list[float]:
        """The different alphas, ascending; updates that are stored whole have none."""
        changes = [update.change for update in self.modules.values()]
        return sorted({change.alpha for change in changes if isinstance(change, LowRank | Hadamard | Kronecker)})

    @property
    def family(self) -> str:
        """`mini`, `sd1`, `sd2` or `sdxl` by what cross-attention and text encoders read, else by the metadata, else "other"."""
        context = _widths(self.modules, "lora_unet_", ("attn2_to_k", "attn2_to_v"))
        text = _widths(self.modules, "lora_te", _TEXT_READERS)
        if len(context) == 1 and context <= set(FAMILIES):
            return FAMILIES[context.pop()]
        if 1280 in text or any(stem.startswith("lora_te2_") for stem in self.modules):
            return "sdxl"
        if len(text) == 1 and text <= set(FAMILIES):
            return FAMILIES[text.pop()]
        stated = [self.metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture")]
        return next((family for value in stated for start, family in _STATED.items() if value.startswith(start)), "other")


def read(path: Path) -> LoRAFile:
    """Opens a LoRA file of any layout that is found in the wild, see `lora_formats`.

    Raises:
        UserError: if there is no such file, it is a pickle, it is damaged, or it holds no LoRA that is known here.
    """
    weights = weights_file.read(path)
    parsed = lora_formats.parse(path, weights.tensors, weights.metadata)
    return LoRAFile(parsed.modules, weights.metadata, parsed.layout, parsed.unknown, parsed.warnings)


def to_bytes(
    modules: Mapping[str, Update],
    metadata: Mapping[str, str],
    *,
    family: str,
    dtype: torch.dtype | None = torch.float16,
    layout: str = "kohya",
) -> bytes:
    """The whole file, with the hashes of its own weights added to the metadata; equal arguments give equal bytes.

    `sshs_model_hash` is the SHA-256 of all that follows the header; `sshs_legacy_hash` the first 8 hex digits of that of 64 KiB at
    0x100000 of the same, as A1111 reads them.

    Args:
        modules: updates by canonical stem.
        metadata: see `lora_metadata.build`.
        family: "sd1", "sd2", "sdxl" or "mini": names and the shape of projections depend on it.
        dtype: what the weights are stored in; None keeps the widest of each module's own.
        layout: "kohya" or "diffusers".

    Raises:
        UserError: if a weight is not finite in `dtype`, the layout cannot carry an update, or the metadata is too long.
        ValueError: if there is no module.
    """
    content = save(lora_layouts.tensors_of(modules, family=family, dtype=dtype, layout=layout))
    data = memoryview(content)[8 + _header_length(content) :]
    digest = hashlib.sha256(data).hexdigest()
    legacy = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    told = {key: value for key, value in metadata.items() if key != _PEFT_KEY}  # beside `.alpha` keys it makes diffusers refuse the file
    if layout == "diffusers":
        told[_PEFT_KEY] = json.dumps(lora_layouts.peft_config(modules), sort_keys=True, separators=(",", ":"))
    return _with_metadata(content, told | {"sshs_model_hash": digest, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{digest}"})


def facts(path: Path) -> dict[str, Any]:
    """What a person wants to know of a LoRA file, in the order in which it is shown.

    Raises:
        UserError: as `read` does.
    """
    file = read(path)
    parts = Counter(lora_names.dotted(stem)[0] for stem in file.modules)
    tensors = [tensor for update in file.modules.values() for tensor in deltas.tensors(update)]
    actual = _weights_hash(path)
    stated = file.metadata.get("sshs_model_hash")
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "family": file.family,
        "layout": file.layout,
        "forms": dict(Counter(lora_layouts.form_of(stem, update) for stem, update in file.modules.items())),
        "rank": _one_or_all(file.ranks),
        "alpha": _one_or_all(file.alphas),
        "modules": {"unet": 0, "text_encoder": 0} | parts,
        "unknown_keys": len(file.unknown),
        "unknown_examples": list(file.unknown[:3]),
        "warnings": list(file.warnings),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtype": _one_or_all(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        "trigger_words": file.metadata.get("modelspec.trigger_phrase", ""),
        "base": file.metadata.get("ss_sd_model_name", "not stated"),
        "base_hash": file.metadata.get("ss_new_sd_model_hash", "not stated"),
        "steps": file.metadata.get("ss_steps", "not stated"),
        "weights_hash": actual,
        "stated_hash": "not stated" if stated is None else "the same" if stated == actual else f"{stated} (not that of these weights)",
    }


# The container


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """The file with metadata in order of its keys: the library writes it in random order, and equal runs give equal bytes."""
    length = _header_length(content)
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    told = {"__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(told | header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) >= HEADER_BYTES:
        raise UserError(
            f"The LoRA file's header would have {len(text):,} bytes, and tools read fewer than {HEADER_BYTES:,}; "
            "ask for minimal metadata (output.minimal_metadata = true)."
        )
    return b"".join([struct.pack("<Q", len(text)), text, memoryview(content)[8 + length :]])


def _header_length(content: bytes) -> int:
    return int(struct.unpack("<Q", content[:8])[0])


def _weights_hash(path: Path) -> str:
    """SHA-256 of all that follows the header."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + _header_length(file.read(8)))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _widths(modules: Mapping[str, Update], start: str, ends: tuple[str, ...]) -> set[int]:
    found = [_input_width(update.change) for stem, update in modules.items() if stem.startswith(start) and stem.endswith(ends)]
    return {width for width in found if width is not None}


def _input_width(change: LowRank | Hadamard | Kronecker | Full | None) -> int | None:
    """How many numbers a linear module reads."""
    if isinstance(change, LowRank):
        return change.down.shape[1]
    if isinstance(change, Hadamard):
        return change.down1.shape[1]
    if isinstance(change, Kronecker):
        first, second = (one if isinstance(one, Tensor) else one[1] for one in (change.first, change.second))
        return first.shape[1] * second.shape[1]
    return change.weight.shape[1] if change is not None and change.weight.ndim > 1 else None


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
