"""Opening a base: `mini` in the package, a diffusers folder, a hub id, or one `.safetensors` checkpoint of the original layout.

All four end in the same modules, filled by `base_parts` with the files' own tensors: nothing is converted by a library, and nothing but
a hub id that is not in the cache, or a tokenizer that is nowhere on the disk, asks the network. The VAE stays in fp32, because SDXL's
overflows in fp16. `identify` says what a base is from configs and headers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from sdlora import base_kinds, base_model, base_parts, base_sources, checkpoint_configs, hub, memory, tokenizer_files, weights_file
from sdlora.base_kinds import UNSTATED, Identity
from sdlora.base_model import Base
from sdlora.base_sources import Source
from sdlora.errors import UserError
from sdlora.weights_file import Header

MINI = Path(__file__).parent / "mini" / "weights"

# --- which one ----------------------------------------------------------------------------------------------------------------


def folder_of(name: str) -> Path:
    """The folder that a base's name means, if it means one on this machine.

    Raises:
        UserError: if it is neither "mini" nor a folder with a diffusers pipeline.
    """
    folder = MINI if name == "mini" else Path(name)
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"Base '{name}' is unknown; give \"mini\", a folder with a diffusers pipeline (it holds model_index.json), a .safetensors "
            'checkpoint, or a hub id "owner/name".'
        )
    return folder


def identify(name: str, *, dtype: torch.dtype = torch.float32, family: str = "auto", prediction: str = "auto") -> Identity:
    """What a base is, from its configs or its header; of a hub id that is not in the cache only the configs are fetched.

    Args:
        name: as for `load`.
        dtype: the number format it would be opened in, which decides between a folder's variants.
        family: overrides what is detected, as for `load`.
        prediction: likewise.

    Raises:
        UserError: if there is no such base, or it is none that is known.
    """
    _check_overrides(family, prediction)
    form = form_of(name)
    if form == "single file":
        return _identity_of_file(Path(name), weights_file.header(Path(name)), family, prediction)
    folder = base_sources.hub_folder(name, half=dtype in base_sources.HALF, weights=False) if form == "hub" else folder_of(name)
    return _identity_of_folder(name, form, folder, half=dtype in base_sources.HALF, family=family, prediction=prediction)


def form_of(name: str) -> str:
    """ "embedded", "folder", "single file" or "hub": what a base's name means, a thing on the disk first.

    Raises:
        UserError: if it means none of them.
    """
    path = Path(name)
    if name == "mini":
        return "embedded"
    if path.is_dir():
        folder_of(name)
        return "folder"
    if path.is_file() or path.suffix.lower() in (".safetensors", ".ckpt", ".pt", ".bin"):
        return "single file"
    if not hub.is_name(name):
        folder_of(name)
    return "hub"


def _check_overrides(family: str, prediction: str) -> None:
    families, predictions = ("auto", *base_model.TITLES), ("auto", *base_kinds.PREDICTIONS)
    if family not in families:
        raise UserError(f"Family '{family}' is unknown; give one of {', '.join(families)}.")
    if prediction not in predictions:
        raise UserError(f"Prediction '{prediction}' is unknown; give one of {', '.join(predictions)}.")


def _identity_of_file(path: Path, header: Header, family: str, prediction: str) -> Identity:
    found = base_kinds.of_checkpoint(header, where=str(path))
    if family not in ("auto", found):
        raise UserError(f"{path} is a {base_model.TITLES[found]} by the names of its tensors and cannot be opened as {family}.")
    stated, where = base_kinds.stated_prediction(header)
    why = "by the keys of the file"
    if prediction != "auto":
        return Identity("single file", found, prediction, "", f"{why}; the prediction as you set it")
    if where:
        return Identity("single file", found, stated, "", f"{why}; the prediction by {where}")
    if found == "sd2":
        return Identity("single file", found, UNSTATED, "", f"{why}; the prediction is measured on opening")
    return Identity("single file", found, "epsilon", "", f"{why}; no prediction is stated")


def _identity_of_folder(name: str, form: str, folder: Path, *, half: bool, family: str, prediction: str) -> Identity:
    index = base_parts.config(folder / "model_index.json")
    base_kinds.check_index(index, where=f"Base '{name}'")
    found = base_kinds.of_folder(index, base_parts.config(folder / "unet" / "config.json"), where=f"Base '{name}'")
    if family not in ("auto", found) and "sdxl" in (family, found):
        raise UserError(f"Base '{name}' is a {base_model.TITLES[found]} by its configs and cannot be opened as {family}.")
    stated = base_parts.config(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if prediction == "auto" and stated not in base_kinds.PREDICTIONS:
        allowed = ", ".join(base_kinds.PREDICTIONS)
        raise UserError(f"Base '{name}' has a scheduler with prediction_type {stated!r}; set `prediction` to one of {allowed}.")
    variant, _ = base_parts.chosen(base_parts.names_in(folder / "unet"), part="unet", half=half)
    whose = "as you set it" if {family, prediction} != {"auto"} else "by its configs"
    return Identity(form, found if family == "auto" else family, stated if prediction == "auto" else prediction, variant, whose)


def sizes_of(name: str) -> tuple[int, int]:
    """The step of training sizes that suits a base, and the side of the square it was trained on, in px; from configs alone.

    Raises:
        UserError: as `identify`.
    """
    identity = identify(name)
    if identity.form == "single file":
        configs = "sd2-v" if identity.family == "sd2" and identity.prediction != "epsilon" else identity.family
        unet, vae = (checkpoint_configs.of_family(configs, part) for part in ("unet", "vae"))
    else:
        folder = base_sources.hub_folder(name, half=False, weights=False) if identity.form == "hub" else folder_of(name)
        unet, vae = (base_parts.config(folder / part / "config.json") for part in ("unet", "vae"))
    reduction = 2 ** (len(vae["block_out_channels"]) - 1)
    return int(reduction * 2 ** (len(unet["block_out_channels"]) - 1)), int(unet["sample_size"]) * reduction


# --- opening it ---------------------------------------------------------------------------------------------------------------


def load(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vae: str | None = None,
    tokenizer: str | None = None,
    family: str = "auto",
    prediction: str = "auto",
    clip_skip: int | None = None,
) -> Base:
    """Opens a base, frozen and ready.

    Args:
        name: "mini", a folder with a diffusers pipeline, a `.safetensors` checkpoint, or a hub id "owner/name".
        device: where all its parts go; a GPU that is too small for all of them gets each when it is asked, see `base_model.bring`.
        dtype: the number format of UNet and text encoders; the VAE's is fp32.
        vae: another VAE: a folder, a pipeline's folder, a `.safetensors` file in either layout, or a hub id.
        tokenizer: a folder or hub id, for single files, which bring none.
        family: "auto", or what the base is called where its structure leaves it open.
        prediction: "auto", "epsilon", "v_prediction" or "sample", if what is detected is wrong.
        clip_skip: the text encoder's layer that is listened to, from the last, 1; by default 1, SDXL's 2.

    Raises:
        UserError: if there is no such base, it is none that is known, or its files are incomplete or damaged.
    """
    _check_overrides(family, prediction)
    half, form = dtype in base_sources.HALF, form_of(name)
    if form == "single file":
        identity = _identity_of_file(Path(name), header := weights_file.header(Path(name)), family, prediction)
        configs = "sd2-v" if identity.family == "sd2" and identity.prediction != "epsilon" else identity.family
        sourced = partial(base_sources.of_file, Path(name), header, family=identity.family, configs=configs, tokenizer=tokenizer)
    else:
        folder = base_sources.hub_folder(name, half=half, weights=True) if form == "hub" else folder_of(name)
        identity = _identity_of_folder(name, form, folder, half=half, family=family, prediction=prediction)
        sourced = partial(base_sources.of_folder, folder, name=name, family=identity.family, tokenizer=tokenizer, half=half)
    home = device if device.type == "cuda" and _take_turns(sourced(device=device), identity, device, dtype) else None
    where = device if home is None else base_model.AWAY
    base = _opened(name, identity, sourced(device=where), device=where, dtype=dtype, vae=vae, clip_skip=clip_skip)
    base.home = home
    if base.prediction == UNSTATED:
        base.prediction, base.measured = measured_prediction(base), True
        configs = "sd2" if base.prediction == "epsilon" else "sd2-v"
        base.unet.register_to_config(sample_size=checkpoint_configs.of_family(configs, "unet")["sample_size"])  # 512 or 768 px
    base.schedule = base.schedule | {"prediction_type": base.prediction}
    return base


def _take_turns(source: Source, identity: Identity, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device is too small for all parts of a source at once."""
    sizes = {part: sum(one.numel() for one in source.shell(part).parameters()) for part in (*_parts(identity), "unet", "vae")}
    weights_bytes = sum(count * (4 if part == "vae" else dtype.itemsize) for part, count in sizes.items())
    return base_model.take_turns(weights_bytes, memory.free_bytes(device))


def _parts(identity: Identity) -> tuple[str, ...]:
    """The names of its text encoders."""
    return ("text_encoder", "text_encoder_2") if identity.family == "sdxl" else ("text_encoder",)


def _opened(
    name: str, identity: Identity, source: Source, *, device: torch.device, dtype: torch.dtype, vae: str | None, clip_skip: int | None
) -> Base:
    """The modules of a source as a base, once they are known to fit each other."""
    encoders = tuple(source.part(part, dtype) for part in _parts(identity))
    tokenizers = tuple(
        tokenizer_files.load(folder, words=encoder.config.vocab_size, pad=pad)
        for encoder, folder, pad in zip(encoders, source.tokenizers, source.pads, strict=False)
    )
    unet = source.part("unet", dtype)
    if vae is None:  # opened when somebody asks for it
        autoencoder, digest = source.shell("vae"), source.digest
    else:
        autoencoder = base_sources.other_vae(vae, scaling=source.scaling, device=device)
        digest = _with_vae(source.digest, base_sources.state_digest(autoencoder))
    skip = (2 if identity.family == "sdxl" else 1) if clip_skip is None else clip_skip
    base = Base(
        name, identity.family, unet, autoencoder, encoders, tokenizers, identity.prediction, source.schedule, source.weights, skip,
        open_vae=None if vae else partial(source.part, "vae", torch.float32), digest=digest,
    )  # fmt: skip
    _check_together(base)
    return base


def _with_vae(digest: Callable[[str], str], vae: str) -> Callable[[str], str]:
    return lambda part: vae if part == "vae" else digest(part)


def _check_together(base: Base) -> None:
    """Whether the parts speak the same sizes; each alone has fitted its own config.

    Raises:
        UserError: if not.
    """
    unet, vae, texts = base.unet.config, base.autoencoder.config, [encoder.config for encoder in base.text_encoders]
    where, width = f"Base '{base.name}'", sum(text.hidden_size for text in texts)
    if unet.cross_attention_dim != width:
        raise UserError(f"{where} has a UNet that listens to {unet.cross_attention_dim} numbers per token, and its text gives {width}.")
    if vae.latent_channels != unet.in_channels:
        raise UserError(
            f"{where} has a UNet for {unet.in_channels} latent channels, and the VAE has {vae.latent_channels}; give its own VAE."
        )
    if not isinstance(unet.sample_size, int) or not 1 <= unet.sample_size <= 1024:
        raise UserError(
            f"{where} has a UNet of sample_size {unet.sample_size!r}; 1 to 1,024 latents are allowed, Stable Diffusion's is 64."
        )
    if any(text.max_position_embeddings < tokenizer_files.LENGTH for text in texts):
        raise UserError(f"{where} has a text encoder for fewer than {tokenizer_files.LENGTH} tokens, which every Stable Diffusion has.")
    layers = min(text.num_hidden_layers for text in texts)
    if not 1 <= base.clip_skip <= layers:
        raise UserError(f"Clip skip {base.clip_skip} is not one of the layers 1 (the last) to {layers} of the text encoder of {where}.")
    if base.family == "sdxl":
        told, room = texts[1].projection_dim + 6 * unet.addition_time_embed_dim, unet.projection_class_embeddings_input_dim
        if told != room:
            raise UserError(f"{where} has a UNet that reads {room} numbers of size and sentence, and it would be told {told}.")


@torch.no_grad()
def measured_prediction(base: Base) -> str:
    """Whether a base answers pure noise with that noise ("epsilon") or not ("v_prediction").

    At the last timestep x ≈ ε. A model of ε answers x, correlation near 1; a model of v = √ᾱ ε - √(1 - ᾱ) x_0 (Salimans & Ho 2022, arXiv
    2202.00512, appendix D) answers minus what it expects to see, and √ᾱ is 0.07 there. SD 2.x comes in both, and its files seldom say.
    Measured on the mini base over 5 seeds: 0.999, and its answers turned into v between -0.40 and 0.20.
    """
    side = min(base.unet.config.sample_size, 32)
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(base.device)
    base_model.bring(base, "text_encoder")
    words = base.tokenizers[0]("", padding="max_length", max_length=tokenizer_files.LENGTH, return_tensors="pt").input_ids
    states = base_model.TextStates(base.text_encoders[0](words.to(base.device)).last_hidden_state)
    answer = base_model.predict(base, noise, torch.tensor([len(base.alphas) - 1], device=base.device), states)
    likeness = torch.cosine_similarity(answer.float().flatten(), noise.flatten(), dim=0)
    return "epsilon" if likeness > 0.5 else "v_prediction"
