"""LoRA files: the one layout that every tool loads, and reading it back.

Written are kohya's names (`lora_unet_…`, `lora_te_…`) with `.lora_down.weight`, `.lora_up.weight` and a one-element float `.alpha`
per module, in fp16. A1111, Forge, ComfyUI, InvokeAI, SD.Next and diffusers all read it for SD 1.x and 2.x. Text-encoder stems are
fixed text, not derived from what transformers calls its modules today: that has changed before and broke files silently.
One alpha per file: where ranks or alphas differ, diffusers would scale some modules wrongly.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from sdlora.errors import UserError

_TEXT_PARTS = {
    "self_attn.q_proj": "self_attn_q_proj", "self_attn.k_proj": "self_attn_k_proj", "self_attn.v_proj": "self_attn_v_proj",
    "self_attn.out_proj": "self_attn_out_proj", "mlp.fc1": "mlp_fc1", "mlp.fc2": "mlp_fc2",
}  # fmt: skip

FAMILIES = {128: "mini", 768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by the width of the text states


@dataclass(frozen=True)
class LoRAModule:
    """One module's update: A [r, in, …], B [out, r, …] and alpha."""

    down: Tensor
    up: Tensor
    alpha: float


@dataclass(frozen=True)
class LoRAFile:
    """What a file holds: modules by kohya stem, and the header's metadata."""

    modules: dict[str, LoRAModule]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> list[int]:
        """The different ranks, ascending."""
        return sorted({module.down.shape[0] for module in self.modules.values()})

    @property
    def alphas(self) -> list[float]:
        """The different alphas, ascending."""
        return sorted({module.alpha for module in self.modules.values()})

    @property
    def family(self) -> str:
        """`mini`, `sd1`, `sd2` or `sdxl` by what the cross-attention's keys read; "other" if the file does not say."""
        widths = {module.down.shape[1] for stem, module in self.modules.items() if stem.endswith("attn2_to_k")}
        return FAMILIES.get(widths.pop(), "other") if len(widths) == 1 else "other"


def unet_stem(module_name: str) -> str:
    """`down_blocks.0.….attn1.to_q` → `lora_unet_down_blocks_0_…_attn1_to_q`."""
    return "lora_unet_" + module_name.replace(".", "_")


def text_stem(module_name: str) -> str:
    """`[text_model.]encoder.layers.3.self_attn.q_proj` → `lora_te_text_model_encoder_layers_3_self_attn_q_proj`."""
    found = re.fullmatch(r"(?:text_model\.)?encoder\.layers\.(\d+)\.(.+)", module_name)
    if not found or found[2] not in _TEXT_PARTS:
        raise ValueError(f"no LoRA file stem is known for text-encoder module {module_name}")
    return f"lora_te_text_model_encoder_layers_{found[1]}_{_TEXT_PARTS[found[2]]}"


def tensors_of(modules: Mapping[str, LoRAModule], *, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The file's tensors by key; with one alpha for all, a module's own alpha being folded into its B where it differs.

    Raises:
        ValueError: if there is no module, or a weight is not finite in `dtype`.
    """
    if not modules:
        raise ValueError("a LoRA file needs at least one module")
    ranks = {module.down.shape[0] for module in modules.values()}
    alphas = {module.alpha for module in modules.values()}
    uniform = len(ranks) == 1 and len(alphas) == 1
    alpha = next(iter(alphas)) if uniform else float(max(ranks))
    tensors = {}
    for stem, module in modules.items():
        rank = module.down.shape[0]
        up = module.up if uniform else module.up * (module.alpha / rank) / (alpha / rank)
        tensors[f"{stem}.lora_down.weight"] = module.down.detach().to("cpu", dtype).contiguous()
        tensors[f"{stem}.lora_up.weight"] = up.detach().to("cpu", dtype).contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
    broken = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"weights that are not finite in {dtype}: {', '.join(broken[:3])}")
    return tensors


def to_bytes(modules: Mapping[str, LoRAModule], metadata: Mapping[str, str], *, dtype: torch.dtype = torch.float16) -> bytes:
    """The whole file, with the hashes of its own weights added to the metadata.

    `sshs_model_hash` is the SHA-256 of all that follows the header; `sshs_legacy_hash` the first 8 hex digits of that of 64 KiB at
    0x100000 of the same, as A1111 reads them.
    """
    tensors = tensors_of(modules, dtype=dtype)
    data = weights_of(save(tensors))
    hashes = {
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
        "modelspec.hash_sha256": "0x" + hashlib.sha256(data).hexdigest(),
    }
    return with_sorted_header(save(tensors, metadata=dict(metadata) | hashes))


def weights_of(content: bytes) -> bytes:
    """All bytes of a safetensors file after its header."""
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 + length :]


def with_sorted_header(content: bytes) -> bytes:
    """The same file with its header's keys in order: the library writes metadata in random order, and equal runs give equal bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items()))}
    text = json.dumps(metadata | header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def read(path: Path) -> LoRAFile:
    """Opens a kohya-layout LoRA file.

    Raises:
        UserError: if there is no such file, it is a pickle, it is damaged, or it holds no LoRA in this layout.
    """
    if not path.is_file():
        raise UserError(f"LoRA file {path} does not exist.")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file; pickles can run code when opened, so convert it with a tool that you trust.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as problem:
        raise UserError(f"{path} is damaged or not a safetensors file ({problem}); fetch or train it again.") from problem
    return LoRAFile(_modules(path, tensors), metadata)


def _modules(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, LoRAModule]:
    modules = {}
    for stem in sorted({key.partition(".")[0] for key in tensors}):
        down, up = tensors.get(f"{stem}.lora_down.weight"), tensors.get(f"{stem}.lora_up.weight")
        if down is None or up is None or down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1]:
            raise UserError(
                f"{path} holds '{stem}' without a matching pair of lora_down and lora_up; it is not a LoRA that can be read here."
            )
        alpha = tensors.get(f"{stem}.alpha", torch.tensor(float(down.shape[0])))
        modules[stem] = LoRAModule(down, up, alpha.item())
    if not modules:
        raise UserError(f"{path} holds no LoRA weights.")
    return modules


def facts(path: Path) -> dict[str, Any]:
    """What a person wants to know of a LoRA file, in the order in which it is shown.

    Raises:
        UserError: as `read` does.
    """
    file = read(path)
    text = sum(stem.startswith("lora_te") for stem in file.modules)
    actual = hashlib.sha256(weights_of(path.read_bytes())).hexdigest()
    stated = file.metadata.get("sshs_model_hash")
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "family": file.family,
        "rank": _one_or_all(file.ranks),
        "alpha": _one_or_all(file.alphas),
        "modules": {"unet": len(file.modules) - text, "text_encoder": text},
        "parameters": sum(module.down.numel() + module.up.numel() for module in file.modules.values()),
        "dtype": _one_or_all(sorted({str(module.up.dtype).removeprefix("torch.") for module in file.modules.values()})),
        "trigger_words": file.metadata.get("modelspec.trigger_phrase", ""),
        "base": file.metadata.get("ss_sd_model_name", "not stated"),
        "base_hash": file.metadata.get("ss_new_sd_model_hash", "not stated"),
        "steps": file.metadata.get("ss_steps", "not stated"),
        "weights_hash": actual,
        "stated_hash": "not stated" if stated is None else "the same" if stated == actual else f"{stated} (not that of these weights)",
    }


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
