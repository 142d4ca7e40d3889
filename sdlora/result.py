"""What a run leaves as its LoRA: the file with its metadata, and the sidecars that web UIs look for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch

from sdlora import adapters, base_model, captions, files, lora, lora_file, lora_metadata, lora_names
from sdlora import material as materials
from sdlora.base_model import Base
from sdlora.config import Config
from sdlora.lora_metadata import Folder, Story
from sdlora.material import Material

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def save(base: Base, run: Config, path: Path, *, step: int, data: Material) -> Path:
    """Writes the adapters as a LoRA file.

    Raises:
        UserError: if it cannot be written.
    """
    modules = {
        lora_names.stem_of(part, name): update for part, module in base.parts.items() for name, update in lora.exports(module).items()
    }
    told = lora_metadata.build(story(base, run, step, data), minimal=run.output.minimal_metadata)
    dtype = DTYPES[run.output.dtype]
    files.write(path, lora_file.to_bytes(modules, told, family=base.family, dtype=dtype, layout=run.output.format))
    return path


def story(base: Base, run: Config, step: int, data: Material) -> Story:
    """How the LoRA came to be; no times, so that equal runs are equal bytes."""
    text_rate = adapters.rate_of("text_encoder", run) if run.lora.text_encoder else 0
    side = run.resolution_px if isinstance(run.resolution_px, int) else max(run.resolution_px or [base.resolution_px])
    per_epoch = materials.batches_per_epoch(data, batch=run.batch)
    return Story(
        name=run.name, family=base.family, prediction=base.prediction, rank=run.lora.rank, alpha=run.lora.alpha, base=run.base,
        base_hash=base_model.weights_hash(base), steps=step, epochs=-(-step * run.optimizer.accumulation // per_epoch), seed=run.seed,
        batch=run.batch * run.optimizer.accumulation, resolution_px=(side, side), buckets=Counter(item.shape_px for item in data.items),
        folders=tuple(_folders(run, data)), unet_rate=run.optimizer.learning_rate, text_encoder_rate=text_rate,
        optimizer=run.optimizer.name, schedule=run.optimizer.schedule, clip_skip=base.clip_skip, min_snr_gamma=run.min_snr_gamma,
        trigger=run.trigger, author=run.output.author, license=run.output.license,
    )  # fmt: skip


def _folders(run: Config, data: Material) -> list[Folder]:
    found = []
    for source, folder in enumerate(run.data):
        samples = [sample for sample in data.samples if sample.source == source]
        tags = Counter(tag for sample in samples for tag in captions.tags(materials.plain_caption(data.rules, sample)))
        found.append(Folder(folder.folder.name, len(samples), folder.repeats, dict(sorted(tags.items()))))
    return found


def write_sidecars(base: Base, run: Config, path: Path, *, preview: Path | None) -> None:
    """`<stem>.json` with the trigger word, and `<stem>.png` as preview, beside the LoRA file.

    Raises:
        UserError: if they cannot be written.
    """
    told = lora_metadata.sidecar(base.family, trigger=run.trigger, description=f"{run.kind}, trained with sdlora on {base.title}")
    files.write(path.with_suffix(".json"), json.dumps(told, indent=2, ensure_ascii=False).encode())
    if preview:
        files.write(path.with_suffix(".png"), preview.read_bytes())
