"""What a picture was made from, written into it and read back: a request and its LoRAs as the text that A1111 and Forge know.

All that is needed to draw ours again bit for bit is in it. What others cannot say stands under keys of our own: that brackets were meant
as they stand, LoRA files whose names no tag can hold, and which picture an img2img began with (its fingerprint, not the picture).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sdlora
from sdlora import png_settings, prompts, samplers, weights_file
from sdlora import request as requests
from sdlora.base_model import Base
from sdlora.errors import UserError
from sdlora.png_settings import Settings
from sdlora.prompts import Tag
from sdlora.request import Request, Source
from sdlora.voices import LoRA

SYNTAX, LORAS, SOURCE = "Sdlora syntax", "Sdlora loras", "Sdlora source"
_HIRES_DENOISE = 0.7  # A1111's own default
_A1111_AUTOMATIC = {"DPM++ 2M": "Karras", "DPM++ 2M SDE": "Exponential"}  # what its "Automatic" means; elsewhere it is ours too


@dataclass(frozen=True)
class Restored:
    """What a picture's text asks for.

    Args:
        request: without the LoRA tags in its prompt.
        hashes: the first digits of LoRA files' hashes by name.
        model: the base's name; "" if it is not said.
        source: the fingerprint of the picture that it began with; "" if it began with none, or does not say.
        missed: what the text says and cannot be taken over, a few words each.
    """

    request: Request
    tags: tuple[Tag, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    source: str = ""
    missed: tuple[str, ...] = ()


def settings_text(base: Base, request: Request, loras: Sequence[LoRA], source: Source | None = None) -> str:
    """The settings as A1111 writes them into its pictures, so that other tools show them."""
    plain = not request.weighted and not (_says_itself(request.prompt) and _says_itself(request.negative))
    tags = [_tag(one) for one in loras]
    hidden = [tag for tag in tags if plain or prompts.read(prompts.tag_text(tag)).tags != (tag,)]
    shown = "".join(f" {prompts.tag_text(tag)}" for tag in tags if tag not in hidden)
    width, height = requests.size_px(base, request, source)
    sampler, schedule = samplers.named(request.sampler, request.schedule)
    values: dict[str, Any] = {
        "Steps": request.steps, "Sampler": sampler, "Schedule type": schedule, "CFG scale": prompts.number(request.guidance),
        "Seed": request.seed, "Size": f"{width}x{height}", "Model": Path(base.name).name.removesuffix(".safetensors"),
    }  # fmt: skip
    if request.clip_skip is not None:
        values["Clip skip"] = request.clip_skip
    if source:
        values |= {"Denoising strength": prompts.number(request.denoise), SOURCE: source.fingerprint}
    if request.hires_scale != 1:
        values |= {"Denoising strength": prompts.number(request.hires_denoise), "Hires upscale": prompts.number(request.hires_scale)}
        values["Hires upscaler"] = "Lanczos"
    if hashes := {one.path.stem: digest for one in loras if (digest := _hash(one.path))}:
        values["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, digest in hashes.items())
    if plain:
        values[SYNTAX] = "plain"
    if hidden:
        values[LORAS] = json.dumps([[tag.name, tag.text_strength, _course(tag)] for tag in hidden], ensure_ascii=False)
    return png_settings.write(request.prompt + shown, request.negative, values | {"Version": f"sdlora {sdlora.__version__}"})


def _says_itself(words: str) -> bool:
    return prompts.is_plain(words) and prompts.read(words) == prompts.Prompt(words)


def _tag(one: LoRA) -> Tag:
    last = one.course[-1][1] if one.course else one.strength
    return Tag(one.path.stem, last, last if one.text_strength is None else one.text_strength, one.course)


def _course(tag: Tag) -> str:
    return prompts.course_text(tag.course) or prompts.number(tag.strength)


def _hash(path: Path) -> str:
    try:
        return weights_file.header(path, limit_bytes=weights_file.LORA_HEADER_BYTES).metadata.get("sshs_model_hash", "")[:12]
    except UserError:  # it is gone since it was loaded
        return ""


def restored(told: Settings) -> Restored:
    """The request that a text describes; what it does not say is the default."""
    ours, missed = told.values.get("Version", "").startswith("sdlora "), []
    plain = told.values.get(SYNTAX) == "plain"
    read = prompts.Prompt(told.prompt) if plain else prompts.read(told.prompt)
    default = Request("")
    sampler, schedule = told.sampler or default.sampler, told.schedule or "Automatic"
    if not ours and told.schedule == "Automatic":
        schedule = _A1111_AUTOMATIC.get(sampler, schedule)
    try:
        sampler, schedule = samplers.named(sampler, schedule)
    except UserError as problem:
        missed.append(str(problem))
        sampler, schedule = default.sampler, default.schedule
    width, height = told.size_px or (None, None)
    scale, strength = told.number("Hires upscale") or 1.0, told.number("Denoising strength")
    request = Request(
        read.words, told.negative, _or(told.whole("Seed"), 0), _or(told.whole("Steps"), default.steps),
        _or(told.number("CFG scale"), default.guidance), sampler, width, height, schedule, told.whole("Clip skip"), not plain,
        denoise=default.denoise if strength is None or scale != 1 else strength, hires_scale=scale,
        hires_denoise=_or(strength, default.hires_denoise if ours else _HIRES_DENOISE) if scale != 1 else default.hires_denoise,
    )  # fmt: skip
    tags = read.tags + tuple(_hidden_tags(told.values.get(LORAS, "")))
    return Restored(
        request, tags, told.lora_hashes, told.values.get("Model", ""), told.values.get(SOURCE, ""), (*missed, *read.unread)
    )  # fmt: skip


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _hidden_tags(text: str) -> list[Tag]:
    """The LoRAs that no tag could hold; nothing if the text is not ours after all."""
    try:
        rows = json.loads(text) if text else []
    except (ValueError, RecursionError):
        return []
    found = []
    for row in rows if isinstance(rows, list) else []:
        match row:
            case [str(name), int() | float() as spoken, str(unet)] if course := prompts.course_of(unet):
                found.append(Tag(name, course[-1][1], float(spoken), course if len(course) > 1 else ()))
    return found
