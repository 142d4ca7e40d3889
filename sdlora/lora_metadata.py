"""What a LoRA file says of itself: kohya's `ss_` keys and Stability's `modelspec` keys, from plain values.

A1111, Forge and SD.Next tell the family by these keys alone: one wrong word hides the file from its user. What is not known is left out
rather than guessed. Folder names can hold a person's name or project, so only their last part is written, and `minimal` writes
none of them: just what loaders need. Times are written only if given, so that equal runs give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1-base"}
_SGM = "https://github.com/Stability-AI/generative-models"  # the model specification's word for SGM names in the UNet
_PREDICTIONS = {"v_prediction": "v"}
_SIDECAR_VERSIONS = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}
_NEEDED = (
    "ss_output_name", "ss_base_model_version", "ss_v2", "ss_network_module", "ss_network_dim", "ss_network_alpha",
    "modelspec.sai_model_spec", "modelspec.title", "modelspec.architecture", "modelspec.prediction_type", "modelspec.implementation",
)  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """One folder of pictures: its path or name, how many pictures it has, how often each was seen per epoch, and its tags' counts."""

    name: str
    pictures: int
    repeats: int = 1
    tags: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Story:
    """How a LoRA came to be, as far as it is known; None and empty values are not written.

    Args:
        name: the stem of the file, which is the name in prompts.
        family: "sd1", "sd2", "sdxl" or "mini".
        prediction: what the base predicts, diffusers' word: "epsilon", "v_prediction" or "sample".
        network: `ss_network_module`: "networks.lora", or "lycoris.kohya" for forms that only LyCORIS has.
        network_args: `ss_network_args`, such as {"conv_dim": 8}.
        base: the base's name or path; only its last part is written.
        base_hash, base_legacy_hash: SHA-256 of the base's weights, and A1111's old 8 digits of it.
        resolution_px: width and height of the training square or of the buckets' area.
        buckets: pictures per size (width, height) in px.
        folders: what was trained on; their names without the path before it.
        clip_skip: text layer counted from the last, 1 for the last.
        precision: "no", "fp16" or "bf16".
        started_s, finished_s: seconds since 1970.
        merged_from: names of the files of a merge.
        thumbnail: a data URL of a small JPEG.
    """

    name: str
    family: str
    prediction: str = "epsilon"
    rank: int | None = None
    alpha: float | None = None
    network: str = "networks.lora"
    network_args: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    base_hash: str = ""
    base_legacy_hash: str = ""
    steps: int | None = None
    epochs: int | None = None
    seed: int | None = None
    batch: int | None = None
    resolution_px: tuple[int, int] | None = None
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict)
    folders: tuple[Folder, ...] = ()
    unet_rate: float | None = None
    text_encoder_rate: float | None = None
    optimizer: str = ""
    schedule: str = ""
    precision: str = ""
    clip_skip: int | None = None
    min_snr_gamma: float | None = None
    noise_offset: float | None = None
    started_s: float | None = None
    finished_s: float | None = None
    trigger: str = ""
    author: str = ""
    description: str = ""
    license: str = ""
    tags: tuple[str, ...] = ()
    usage_hint: str = ""
    merged_from: tuple[str, ...] = ()
    thumbnail: str = ""


def build(story: Story, *, minimal: bool = False) -> dict[str, str]:
    """The header's metadata; `lora_file.to_bytes` adds the hashes.

    Args:
        minimal: only what loaders need to recognise the file: no settings, names of data, tags or words of the author.
    """
    values = _recognition(story) | _training(story) | _data(story) | _page(story)
    written = {key: value if isinstance(value, str) else str(value) for key, value in values.items() if value not in (None, "")}
    return {key: written[key] for key in sorted(written) if not minimal or key in _NEEDED}


def sidecar(
    family: str, *, trigger: str = "", strength: float = 1.0, description: str = "", negative: str = "", notes: str = ""
) -> dict[str, str | float]:
    """`<stem>.json` beside the file, as A1111 and Forge read it: the only way in which trigger words come into their prompts.

    Args:
        family: "sd1", "sd2" or "sdxl"; the web UIs know no other.
        trigger: put into the prompt with the LoRA.
        strength: the weight that it is put there with.
        negative: put into the negative prompt.
    """
    return {
        "description": description,
        "sd version": _SIDECAR_VERSIONS.get(family, "Unknown"),
        "activation text": trigger,
        "preferred weight": strength,
        "negative text": negative,
        "notes": notes,
    }


def _recognition(story: Story) -> dict[str, Any]:
    """What loaders classify by; families that nobody else has are called by their own name."""
    family, v = story.family, story.prediction == "v_prediction"
    version = _VERSIONS.get(family, family) + ("_v" if v and family in ("sd1", "sd2") else "")
    architecture = "stable-diffusion-v2-768-v" if v and family == "sd2" else _ARCHITECTURES.get(family, family)
    return {
        "ss_output_name": story.name, "ss_base_model_version": version, "ss_v2": family == "sd2",
        "ss_network_module": story.network, "ss_network_dim": story.rank, "ss_network_alpha": story.alpha,
        "modelspec.sai_model_spec": "1.0.1", "modelspec.title": story.name, "modelspec.architecture": f"{architecture}/lora",
        "modelspec.prediction_type": _PREDICTIONS.get(story.prediction, story.prediction),
        "modelspec.implementation": _SGM if family == "sdxl" else "diffusers",
    }  # fmt: skip


def _training(story: Story) -> dict[str, Any]:
    return {
        "ss_network_args": _json(story.network_args), "ss_sd_model_name": _last_part(story.base),
        "ss_new_sd_model_hash": story.base_hash, "ss_sd_model_hash": story.base_legacy_hash, "ss_clip_skip": story.clip_skip,
        "ss_steps": story.steps, "ss_num_epochs": story.epochs, "ss_seed": story.seed, "ss_total_batch_size": story.batch,
        "ss_learning_rate": story.unet_rate, "ss_unet_lr": story.unet_rate, "ss_text_encoder_lr": story.text_encoder_rate,
        "ss_optimizer": story.optimizer, "ss_lr_scheduler": story.schedule, "ss_mixed_precision": story.precision,
        "ss_min_snr_gamma": story.min_snr_gamma, "ss_noise_offset": story.noise_offset,
        "ss_training_started_at": story.started_s, "ss_training_finished_at": story.finished_s,
    }  # fmt: skip


def _data(story: Story) -> dict[str, Any]:
    """Pictures, sizes and tags, in the JSON that the web UIs' info panels read; folders of one name are numbered."""
    named: dict[str, Folder] = {}
    for folder in story.folders:
        name = _last_part(folder.name)
        named[name if name not in named else f"{name} {len(named) + 1}"] = folder
    sizes = [{"resolution": list(size), "count": count} for size, count in sorted(story.buckets.items())]
    return {
        "ss_resolution": "" if story.resolution_px is None else str(story.resolution_px),
        "ss_num_train_images": sum(folder.pictures * folder.repeats for folder in story.folders) or None,
        "ss_dataset_dirs": _json({name: {"n_repeats": one.repeats, "img_count": one.pictures} for name, one in named.items()}),
        "ss_tag_frequency": _json({name: dict(one.tags) for name, one in named.items() if one.tags}),
        "ss_bucket_info": _json({"buckets": {str(i): size for i, size in enumerate(sizes)}} if sizes else {}),
    }


def _page(story: Story) -> dict[str, Any]:
    """What a model page shows."""
    finished = None if story.finished_s is None else datetime.fromtimestamp(int(story.finished_s), tz=UTC)
    return {
        "modelspec.author": story.author, "modelspec.description": story.description, "modelspec.license": story.license,
        "modelspec.date": finished and finished.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.resolution": story.resolution_px and "x".join(str(side) for side in story.resolution_px),
        "modelspec.trigger_phrase": story.trigger, "modelspec.tags": ", ".join(story.tags), "modelspec.usage_hint": story.usage_hint,
        "modelspec.encoder_layer": story.clip_skip, "modelspec.merged_from": ", ".join(story.merged_from),
        "modelspec.thumbnail": story.thumbnail,
    }  # fmt: skip


def _last_part(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) if value else ""
