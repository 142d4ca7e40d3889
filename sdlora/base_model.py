"""Base models: what a base is, what differs between families, and how its UNet and autoencoder are asked.

SD 1.x, SD 2.x and SDXL differ in their text encoders, in what the UNet listens to, and in what it predicts. All of that ends here
and in `text`: the trainer and the generator call `predict`, `encode` and `decode` and never ask which family they have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdlora import files, lora, lora_names, noise
from sdlora.deltas import Update
from sdlora.errors import UserError

ATTENTION = ("*.attn?.to_q", "*.attn?.to_k", "*.attn?.to_v", "*.attn?.to_out.0")
MLP = ("*.ff.net.0.proj", "*.ff.net.2", "*.proj_in", "*.proj_out")
CONV = ("*.resnets.?.conv1", "*.resnets.?.conv2", "*.resnets.?.conv_shortcut", "*.resnets.?.time_emb_proj", "*samplers.0.conv")
PRESETS: dict[str, tuple[str, ...]] = {"attn": ATTENTION, "attn-mlp": ATTENTION + MLP, "attn-mlp-conv": ATTENTION + MLP + CONV}
TEXT_ATTENTION = ("*.self_attn.?_proj", "*.self_attn.out_proj")
TEXT_MLP = ("*.mlp.fc?",)
TEXT_PRESETS: dict[str, tuple[str, ...]] = {
    "attn": TEXT_ATTENTION, "attn-mlp": TEXT_ATTENTION + TEXT_MLP, "attn-mlp-conv": TEXT_ATTENTION + TEXT_MLP,
}  # fmt: skip
PARTS = ("unet", "text_encoder", "text_encoder_2")
AWAY = torch.device("cpu")  # where parts wait
ROOM_BYTES = 7 << 29  # beside all parts: decoding a picture of 1,024 px takes 3.0 GiB of tensors, counted, and libraries take some
TITLES = {"mini": "the embedded base", "sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}


@dataclass(frozen=True)
class TextStates:
    """What the UNet listens to: states [B, L, D] and, for SDXL, the pooled sentence [B, P]."""

    context: Tensor
    pooled: Tensor | None = None

    def __getitem__(self, rows: Sequence[int]) -> TextStates:
        """The states of some rows, in that order."""
        chosen = list(rows)
        return TextStates(self.context[chosen], None if self.pooled is None else self.pooled[chosen])

    def to(self, where: torch.device) -> TextStates:
        """The same states on a device."""
        return TextStates(self.context.to(where), None if self.pooled is None else self.pooled.to(where))


def joined(states: Sequence[TextStates]) -> TextStates:
    """Several states as one batch."""
    pooled = [one.pooled for one in states if one.pooled is not None]
    return TextStates(torch.cat([one.context for one in states]), torch.cat(pooled) if pooled else None)


@dataclass
class Base:
    """A loaded base: frozen modules, in evaluation mode, on one device.

    Args:
        name: what the user called it.
        family: "mini", "sd1", "sd2" or "sdxl".
        autoencoder: the VAE, or its shell without weights until somebody asks for `vae`: a run whose pictures are all cached never does.
        text_encoders: one, SDXL has two; each with the tokenizer of the same place.
        prediction: "epsilon", "v_prediction" or "sample", diffusers' words.
        schedule: the scheduler's config, diffusers' words.
        weights: the files that the UNet was read from.
        clip_skip: which of the text encoder's layers is listened to, counted from the last as A1111 does; 1 is the last.
    """

    name: str
    family: str
    unet: Any
    autoencoder: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    prediction: str
    schedule: dict[str, Any]
    weights: tuple[Path, ...]
    clip_skip: int = 1
    open_vae: Callable[[], Any] | None = None
    home: torch.device | None = None  # where the parts work one after the other, if they do not fit there together, see `bring`
    measured: bool = False  # whether the prediction was found out by asking the UNet, because nothing states it
    digest: Callable[[str], str] = lambda part: "unknown"  # SHA-256 of a part's tensors as they lie on the disk

    @property
    def vae(self) -> Any:
        """The autoencoder with its weights."""
        if self.open_vae is not None:
            self.autoencoder, self.open_vae = self.open_vae(), None
        return self.autoencoder

    @cached_property
    def vae_hash(self) -> str:
        """Says which autoencoder encodes, for names of cache entries."""
        return self.digest("vae")

    @cached_property
    def text_hash(self) -> str:
        """Says which text encoders speak, likewise."""
        return "".join(self.digest(part) for part in PARTS[1 : 1 + len(self.text_encoders)])

    @property
    def device(self) -> torch.device:
        """Where it works: where the UNet is, unless the parts take turns."""
        device: torch.device = self.home or next(self.unet.parameters()).device
        return device

    @property
    def title(self) -> str:
        """What it is, in words."""
        how = " (measured, since nothing states it; `prediction` overrides)" if self.measured else ""
        return f"{TITLES[self.family]}, {self.prediction.removesuffix('_prediction')} prediction{how}"

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's number format: that of its first weight, the base's own also with a LoRA; diffusers walks all modules for it."""
        dtype: torch.dtype = next(self.unet.parameters()).dtype
        return dtype

    @property
    def reduction(self) -> int:
        """Pixels per latent in each direction: 8 for Stable Diffusion."""
        return int(2 ** (len(self.autoencoder.config.block_out_channels) - 1))

    @property
    def grain_px(self) -> int:
        """The least side of a picture, and the step of sizes that no level of the UNet has to round."""
        return self.reduction * int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def resolution_px(self) -> int:
        """The side of the square that the base was trained on."""
        return int(self.unet.config.sample_size) * self.reduction

    @property
    def scaling(self) -> float:
        """Latents are multiplied by this after encoding, so that their deviation is about 1."""
        return float(self.autoencoder.config.scaling_factor)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules that a LoRA may change."""
        return dict(zip(PARTS, (self.unet, *self.text_encoders), strict=False))

    @property
    def alphas(self) -> Tensor:
        """ᾱ [T] of the base's noise schedule, on its device."""
        return noise.alphas(self.schedule).to(self.device)


def targets(preset: str | list[str], *, part: str = "unet") -> tuple[str, ...]:
    """The name patterns of a preset for one part of the base, or the patterns themselves.

    Raises:
        UserError: if a preset's name is unknown.
    """
    if isinstance(preset, list):
        return tuple(preset)
    presets = PRESETS if part == "unet" else TEXT_PRESETS
    if preset not in presets:
        raise UserError(f"LoRA targets '{preset}' are unknown; presets are {', '.join(presets)}, or give a list of patterns.")
    return presets[preset]


def stems(base: Base) -> dict[str, tuple[str, str]]:
    """Where each canonical stem of a LoRA file belongs: the part of the base and the module's name in it, norms included."""
    places = {}
    for part, module in base.parts.items():
        for name in lora.places(module, norms=True):
            places[lora_names.stem_of(part, name)] = (part, name)
    return places


@dataclass(frozen=True)
class LoRAFit:
    """How a LoRA file sits in a base: where its modules belong, which have no place, and which have another shape there."""

    places: dict[str, tuple[str, str]]
    homeless: tuple[str, ...]
    misshapen: tuple[str, ...]

    @property
    def why_not(self) -> str | None:
        """Why nothing of it can be used, in words that go on after "does not fit"; None if it can."""
        every = len(self.places) + len(self.homeless)
        if self.misshapen:
            return f"{len(self.misshapen)} of its {every} modules have another shape there (such as {self.misshapen[0]}); {_ELSEWHERE}"
        if not self.places:
            return f"none of its {every} modules is there (such as {self.homeless[0]}); {_ELSEWHERE}"
        return None

    @property
    def sentence(self) -> str:
        """How many modules matched, and which did not."""
        every = len(self.places) + len(self.homeless)
        said = f"{len(self.places) - len(self.misshapen)} of {every} modules match"
        return said + (f"; not in the base: {_some(self.homeless)}" if self.homeless else "")


_ELSEWHERE = "it was made for another family or another kind of model"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def fit(base: Base, modules: Mapping[str, Update]) -> LoRAFit:
    """Matches a LoRA's modules with those of a base, by name and shape.

    Args:
        modules: updates by canonical stem.
    """
    known = stems(base)
    places = {stem: known[stem] for stem in modules if stem in known}
    words = {stem: lora.misfit(base.parts[part], name, modules[stem]) for stem, (part, name) in places.items()}
    misshapen = tuple(f"{stem} {why}" for stem, why in words.items() if why)
    return LoRAFit(places, tuple(sorted(set(modules) - set(places))), misshapen)


def weights_hash(base: Base) -> str:
    """SHA-256 over the files that hold the UNet: says which base a LoRA was made for."""
    hashes = [files.sha256(path) for path in base.weights]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def predict(base: Base, noisy: Tensor, timesteps: Tensor, text: TextStates, sizes: Tensor | None = None) -> Tensor:
    """The UNet's answer [B, 4, h, w].

    Args:
        noisy: latents [B, 4, h, w].
        timesteps: [B], or one for all.
        text: the states of the prompts [B, …].
        sizes: SDXL's original size, crop and target size [B, 6] in px, see `buckets.time_ids`; by default those of an uncropped picture
            of the latents' size. Other families have no ear for it.
    """
    bring(base, "unet")
    added = None
    if text.pooled is not None:
        ids = uncropped(base, noisy) if sizes is None else sizes.to(noisy.device)
        added = {"text_embeds": text.pooled.to(base.dtype), "time_ids": ids.to(base.dtype)}
    answer: Tensor = base.unet(noisy.to(base.dtype), timesteps, text.context.to(base.dtype), added_cond_kwargs=added).sample
    return answer


def uncropped(base: Base, noisy: Tensor) -> Tensor:
    """SDXL's size ids [B, 6] of pictures that were never larger than they are: (h, w, 0, 0, h, w) in px."""
    height, width = (side * base.reduction for side in noisy.shape[-2:])
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=noisy.device).repeat(len(noisy), 1)


def take_turns(weights_bytes: int, free_bytes: int) -> bool:
    """Whether a device is too small for all parts of a base and a picture that is decoded, so that one part after the other is there."""
    return weights_bytes + ROOM_BYTES > free_bytes


def bring(base: Base, part: str) -> None:
    """Puts the part that is asked next where it works; where parts take turns the others leave first, except what is trained.

    Args:
        part: one of `PARTS`, where any text encoder means all, or "vae".
    """
    if part == "unet" and base.home is None:
        return  # all others come to where it is
    if part == "vae":
        _ = base.vae  # opened, so that it can be put anywhere
    wanted = _modules(base, part)
    if all(_is_at(one, base.device) for one in wanted):
        return
    if base.home is not None and not base.unet.training:  # in a step text encoders that are trained stand beside the UNet
        for one in (*_modules(base, "unet"), *_modules(base, "text_encoder"), *_modules(base, "vae")):
            if one not in wanted:
                _carry(one, AWAY)
        if base.home.type == "cuda":
            torch.cuda.empty_cache()
    for one in wanted:
        _carry(one, base.device)


def send_away(base: Base, *, text: bool) -> None:
    """Takes what training does not need off the GPU: the autoencoder and, if asked for, the text encoders; they come back when used."""
    for part in ("vae", "text_encoder") if text else ("vae",):
        for one in _modules(base, part):
            _carry(one, AWAY)


def _modules(base: Base, part: str) -> tuple[Any, ...]:
    if part == "vae":
        return () if base.open_vae is not None else (base.autoencoder,)  # a shell is nowhere
    return (base.unet,) if part == "unet" else base.text_encoders


def _is_at(module: nn.Module, where: torch.device) -> bool:
    there: torch.device = next(module.parameters()).device  # a layer's own weight comes before its adapters'
    return there.type == where.type and where.index in (None, there.index)


def _carry(module: nn.Module, where: torch.device) -> None:
    for tensor in _frozen(module):
        tensor.data = tensor.data.to(where)


def _frozen(module: nn.Module) -> Iterator[Tensor]:
    """All weights but those of adapters, whose place the optimizer and the tensor that holds all of them know."""
    adapters = {id(weight) for one in module.modules() if isinstance(one, lora.Adapter) for weight in (*one.parameters(), *one.buffers())}
    return (one for one in (*module.parameters(), *module.buffers()) if id(one) not in adapters)


def set_training(base: Base, training: bool) -> None:
    """Switches all parts between training, in which dropout speaks and checkpointing works, and drawing."""
    for part in base.parts.values():
        part.train(training)


@torch.no_grad()
def encode(base: Base, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [B, 4, H/8, W/8] of the latents of pictures [B, 3, H, W] from -1 to 1, scaled, fp32."""
    bring(base, "vae")
    posterior = base.vae.encode(images.to(base.device, torch.float32)).latent_dist
    return posterior.mean * base.scaling, posterior.std * base.scaling


@torch.no_grad()
def decode(base: Base, latents: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] from about -1 to 1 of scaled latents."""
    bring(base, "vae")
    pictures: Tensor = base.vae.decode(latents.float() / base.scaling).sample
    return pictures
