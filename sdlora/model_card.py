"""The page that goes with a shared LoRA: `README.md` with the front matter that the Hugging Face hub reads, from plain values.

Whoever finds the file wants to know four things: which word calls it, how strong, on which base, and what it looks like. They come first.
Words of other people (prompts, trigger words) stand in code, so that nothing in them is taken for markup.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCardData

_PIPELINES = {"sdxl": "StableDiffusionXLPipeline"}
_NAMES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL", "mini": "sdlora's embedded base"}


@dataclass(frozen=True)
class Sample:
    """A sample picture, by its place beside the card.

    Args:
        path: relative, with "/".
        without: the same prompt and seed drawn by the base alone; "" if there is no such picture.
        prompt: "" if it is not to be shown.
    """

    path: str
    without: str = ""
    prompt: str = ""


@dataclass(frozen=True)
class Card:
    """What a card says.

    Args:
        file: name of the LoRA file beside the card.
        strength, reason: the best strength, and why, in a sentence ("" if nobody has measured).
        base: the base's public name, without any path.
        hub_base: the base's id on the hub, "owner/name"; "" if it has none.
        license: as the hub spells it, such as "cc-by-4.0", or any words; "" if none is stated.
        settings: what it was trained with, in the order in which it is shown.
        notes: sentences on where it will not work.
        no_diffusers: why diffusers cannot load it; "" if it can.
        hub_id: where the folder will be on the hub, "owner/name"; "" if nowhere.
        sheet: path of a comparison sheet; "" for none.
    """

    name: str
    file: str
    family: str
    kind: str = ""
    trigger: str = ""
    strength: float = 1.0
    reason: str = ""
    base: str = ""
    hub_base: str = ""
    license: str = ""
    author: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()
    no_diffusers: str = ""
    hub_id: str = ""
    sheet: str = ""


def text(card: Card) -> str:
    """The whole `README.md`."""
    parts = (_head(card), _use(card), _pictures(card), _training(card))
    return f"---\n{front_matter(card)}\n---\n\n" + "\n".join(line for part in parts for line in part) + "\n"


def front_matter(card: Card) -> str:
    """The YAML that the hub reads: tags, base, licence, trigger and the pictures of the widget."""
    known = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", card.license)
    own = re.sub(r"[^a-z0-9.]+", "-", card.license.lower()).strip("-")
    other: dict[str, Any] = {} if known or not card.license else {"license_name": own or "own"}
    kin = ["stable-diffusion-xl"] if card.family == "sdxl" else []
    data = ModelCardData(
        license=card.license if known else "other" if card.license else None,
        tags=["text-to-image", "stable-diffusion", *kin, "lora", "diffusers", "template:sd-lora"],
        base_model=card.hub_base or None,
        pipeline_tag="text-to-image",
        library_name="diffusers",
        instance_prompt=card.trigger or None,
        widget=[{"text": one.prompt or "-", "output": {"url": one.path}} for one in card.samples] or None,
        **other,
    )
    return str(data.to_yaml())


def example_prompt(card: Card) -> str:
    """A prompt to begin with: that of the first picture, else the trigger word."""
    return next((one.prompt for one in card.samples if one.prompt), card.trigger or "your prompt")


def snippet(card: Card) -> str:
    """Python that draws a picture with the LoRA through diffusers, run in the card's folder or anywhere if it is on the hub."""
    pipeline = _PIPELINES.get(card.family, "StableDiffusionPipeline")
    lines = ["import torch", f"from diffusers import {pipeline}"]
    if card.hub_base:
        opened = f"from_pretrained({_string(card.hub_base)})"
    elif card.base == "mini":
        lines.append("from sdlora.base_files import MINI")
        opened = "from_pretrained(MINI)"
    elif card.base.endswith(".safetensors"):
        opened = f"from_single_file({_string(card.base)})  # the base: a file of yours"
    else:
        opened = f"from_pretrained({_string(card.base)})  # the base: a folder of yours"
    return "\n".join([
        *lines, "",
        f"pipe = {pipeline}.{opened}",
        'pipe.to("cuda", torch.float16) if torch.cuda.is_available() else pipe.to("cpu", torch.float32)',
        f'pipe.load_lora_weights({_string(card.hub_id or ".")}, weight_name={_string(card.file)}, adapter_name="lora")',
        f'pipe.set_adapters("lora", {card.strength:g})',
        f"image = pipe({_string(example_prompt(card))}).images[0]",
        'image.save("picture.png")',
    ])  # fmt: skip


def _head(card: Card) -> Iterator[str]:
    on = f"[{card.hub_base}](https://huggingface.co/{card.hub_base})" if card.hub_base else _code(card.base) if card.base else "its base"
    yield f"# {card.name}"
    yield ""
    yield f"A LoRA{f' of a {card.kind}' if card.kind else ''} for {_NAMES.get(card.family, 'Stable Diffusion')}, trained on {on}."
    yield ""
    yield "| | |"
    yield "| --- | --- |"
    yield f"| Trigger word | {_cell(card.trigger) if card.trigger else 'none: it speaks always'} |"
    yield f"| Best strength | {card.strength:g} |"
    yield f"| Base | {_cell(card.hub_base or card.base)} |"
    yield f"| File | {_cell(card.file)} |"
    yield f"| Licence | {_cell(card.license) if card.license else 'none is stated: ask before you use it'}; that of the base holds too |"
    if card.author:
        yield f"| Author | {_cell(card.author)} |"
    yield ""
    for words in (*([card.reason] if card.reason else []), *(f"Note: {note}" for note in card.notes)):
        yield _plain(words)
        yield ""


def _use(card: Card) -> Iterator[str]:
    yield "## How to use it"
    yield ""
    yield from _web_uis(card) if card.family != "mini" else _here(card)
    if card.no_diffusers:
        yield f"- **diffusers**: {_plain(card.no_diffusers)}"
        yield ""
        return
    yield "- **diffusers** (`pip install diffusers transformers accelerate peft`):"
    yield ""
    yield "```python"
    yield snippet(card)
    yield "```"
    yield ""


def _here(card: Card) -> Iterator[str]:
    """The embedded base is in no other program."""
    words = f"sdlora generate --base mini --lora {shlex.quote(card.file)}:{card.strength:g} --prompt {shlex.quote(example_prompt(card))}"
    yield f"- **sdlora**: {_code(words)}"


def _web_uis(card: Card) -> Iterator[str]:
    call = f" {card.trigger}" if card.trigger else ""
    yield f"- **A1111, Forge, SD.Next**: put {_code(card.file)} into `models/Lora` (with the `.json` and `.png` beside it, which hold the"
    yield f"  trigger word and the preview) and write {_code(f'<lora:{card.name}:{card.strength:g}>{call}')} in the prompt."
    yield f"- **ComfyUI**: put it into `models/loras`; a *Load LoRA* node with both strengths at {card.strength:g}"
    yield f"  and {_code(card.trigger)} in the prompt." if card.trigger else "  and any prompt."
    yield "- **InvokeAI**: add the file with the model manager."


def _pictures(card: Card) -> Iterator[str]:
    if not card.samples:
        return
    yield "## Samples"
    yield ""
    yield "| prompt | without | with |"
    yield "| --- | --- | --- |"
    for one in card.samples:
        without = f"![without]({one.without})" if one.without else ""
        yield f"| {_cell(one.prompt) if one.prompt else '(left out)'} | {without} | ![with]({one.path}) |"
    yield ""
    if card.sheet:
        yield f"![Checkpoints and strengths side by side]({card.sheet})"
        yield ""


def _training(card: Card) -> Iterator[str]:
    yield "## How it was trained"
    yield ""
    yield "With sdlora; the settings stand in `config.toml`, without the paths of the machine."
    yield ""
    yield "| | |"
    yield "| --- | --- |"
    for key, value in card.settings.items():
        yield f"| {key} | {_cell(value)} |"


def _string(words: str) -> str:
    """A string of Python's."""
    return json.dumps(words, ensure_ascii=False)


def _code(words: str) -> str:
    """Words that are shown as they are: neither Markdown nor HTML nor a new line can begin in them."""
    shown = " ".join("".join(char if char.isprintable() else " " for char in words).split()).replace("`", "'")
    return f"`{shown}`" if shown else ""


def _cell(words: str) -> str:
    return _code(words).replace("|", "\\|")


def _plain(words: str) -> str:
    """A sentence of ours in a table or a list; what could be markup in a name in it is taken out of its force."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(words.split()))
