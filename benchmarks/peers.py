"""What a training step of ours is held against: the usual way to train a LoRA, other people's scripts, and what the device can do at most.

The peer is written anew from what diffusers' example scripts do (`train_text_to_image_lora.py` and its form for SDXL): PEFT's layers in
fp32 beside a frozen base, autocast where the base is in 16 bits, torch's AdamW over all matrices, clipping over all of them, the loss
read at every step. It shares no code with `sdlora`; where a real checkout is given, its script runs too, in a process of its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image, ImageOps
from torch import Tensor, nn

from sdlora.errors import UserError

LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 1e-2, 1.0  # the script's own

# --- PEFT in diffusers, as the example script does it -------------------------------------------------------------------------


@dataclass
class Peer:
    """A base with PEFT's adapters, its optimizer and its pictures.

    Args:
        said: each picture's caption.
        moments: mean and deviation [4, h, w] of each picture's latents, if they are kept; else pictures are read and encoded at each step.
        states: what the UNet listens to for each picture, likewise.
    """

    unet: Any
    vae: Any
    texts: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler: Any
    weights: list[nn.Parameter]
    mover: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype
    side_px: int
    paths: Sequence[Path]
    said: Sequence[str]
    moments: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    states: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)


def open_peer(
    folder: Path, adapters: Mapping[str, Tensor], *, alpha: float, pictures: Path, side_px: int, device: torch.device, dtype: torch.dtype
) -> Peer:
    """The base of a diffusers folder with adapters whose numbers are given; it encodes at each step, as the script does, see `keep`.

    Args:
        adapters: A [r, in] and B [out, r] by "<module>.down" and "<module>.up".
        alpha: the update is scaled by alpha / r.
        side_px: pictures are cut to squares of this side.
    """
    index = json.loads((folder / "model_index.json").read_text())
    parts = [part for part in ("text_encoder", "text_encoder_2") if part in index]
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).to(device).requires_grad_(False)
    vae_dtype = torch.float32 if len(parts) == 2 else dtype  # SDXL's overflows in fp16
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=vae_dtype).to(device).requires_grad_(False)
    texts = tuple(
        getattr(transformers, index[part][1]).from_pretrained(folder / part, dtype=dtype).to(device).requires_grad_(False) for part in parts
    )
    tokenizers = tuple(
        transformers.CLIPTokenizer.from_pretrained(folder / part.replace("text_encoder", "tokenizer"), model_max_length=77)
        for part in parts
    )
    names = [name.removesuffix(".down") for name in adapters if name.endswith(".down")]
    rank = len(adapters[f"{names[0]}.down"])
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=names))
    for name in names:
        layer = unet.get_submodule(name)
        for matrix, place in ((layer.lora_A, "down"), (layer.lora_B, "up")):
            matrix["default"].weight.data.copy_(adapters[f"{name}.{place}"].view_as(matrix["default"].weight))
    cast_training_params(unet, dtype=torch.float32)
    unet.train()
    weights = [one for one in unet.parameters() if one.requires_grad]
    mover = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    paths = sorted(pictures.glob("*.png"))
    said = [path.with_suffix(".txt").read_text() for path in paths]
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    return Peer(unet, vae, texts, tokenizers, scheduler, weights, mover, device, dtype, side_px, paths, said)


def keep(peer: Peer) -> None:
    """Encodes all latents and text once, so that its steps do not."""
    made = [seen(peer, [i]) for i in range(len(peer.paths))]
    peer.moments = [(one.mean[0], one.std[0]) for one in made]
    peer.states = [heard(peer, [words]) for words in peer.said]


@torch.no_grad()
def seen(peer: Peer, which: Sequence[int]) -> Any:
    """The autoencoder's answer to some pictures, read from their files."""
    every = []
    for i in which:
        with Image.open(peer.paths[i]) as opened:
            cut = ImageOps.fit(opened.convert("RGB"), (peer.side_px, peer.side_px), Image.Resampling.BILINEAR)
        every.append(torch.from_numpy(np.asarray(cut, np.float32) / 127.5 - 1).permute(2, 0, 1))
    return peer.vae.encode(torch.stack(every).to(peer.device, peer.vae.dtype)).latent_dist


@torch.no_grad()
def heard(peer: Peer, said: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """What the UNet listens to: states [B, 77, D] and SDXL's pooled sentences [B, P]."""
    ids = [
        one(list(said), padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids.to(peer.device)
        for one in peer.tokenizers
    ]
    if len(peer.texts) == 1:
        return peer.texts[0](ids[0])[0], None
    told = [encoder(one, output_hidden_states=True) for encoder, one in zip(peer.texts, ids, strict=True)]
    return torch.cat([one.hidden_states[-2] for one in told], dim=-1), told[-1][0]


def loss(peer: Peer, clean: Tensor, drawn: Tensor, timesteps: Tensor, states: tuple[Tensor, Tensor | None]) -> Tensor:
    """The mean squared error of a batch []."""
    context, pooled = states
    noisy = peer.scheduler.add_noise(clean, drawn, timesteps)
    more = None
    if pooled is not None:
        side = float(peer.side_px)
        ids = torch.tensor([[side, side, 0, 0, side, side]], device=peer.device, dtype=peer.dtype).repeat(len(clean), 1)
        more = {"text_embeds": pooled, "time_ids": ids}
    half = peer.dtype != torch.float32
    with torch.autocast(peer.device.type, dtype=peer.dtype) if half else nullcontext():
        predicted = peer.unet(noisy.to(peer.dtype), timesteps, context, added_cond_kwargs=more, return_dict=False)[0]
    is_velocity = peer.scheduler.config.prediction_type == "v_prediction"
    wanted = peer.scheduler.get_velocity(clean, drawn, timesteps) if is_velocity else drawn
    return F.mse_loss(predicted.float(), wanted.float(), reduction="mean")


def loss_at(peer: Peer, step: int, batch: int) -> Tensor:
    """The loss of a step's batch, with noise and timesteps drawn as the script does."""
    which = [(step * batch + i) % len(peer.paths) for i in range(batch)]
    if peer.moments:
        mean, deviation = (torch.stack([peer.moments[i][part] for i in which]) for part in (0, 1))
        clean = mean + deviation * torch.randn_like(mean)
        pooled = [one for i in which if (one := peer.states[i][1]) is not None]
        states = torch.cat([peer.states[i][0] for i in which]), torch.cat(pooled) if pooled else None
    else:
        clean, states = seen(peer, which).sample(), heard(peer, [peer.said[i] for i in which])
    clean = clean * peer.vae.config.scaling_factor
    timesteps = torch.randint(0, peer.scheduler.config.num_train_timesteps, (batch,), device=peer.device)
    return loss(peer, clean, torch.randn_like(clean), timesteps, states)


def take_step(peer: Peer, step: int, batch: int) -> float:
    """One optimizer step as the script takes it; its loss."""
    value = loss_at(peer, step, batch)
    read = value.detach().repeat(batch).mean().item()  # the script gathers it here, and reads it
    value.backward()
    move(peer)
    return read


def move(peer: Peer) -> None:
    """Clips, moves and forgets."""
    nn.utils.clip_grad_norm_(peer.weights, CLIP_NORM)
    peer.mover.step()
    peer.mover.zero_grad()


# --- scripts in a checkout ----------------------------------------------------------------------------------------------------


def script_command(script: Path, base: Path, pictures: Path, options: Any, out: Path) -> tuple[list[str], Callable[[int], list[str]]]:
    """The command of diffusers' own example script with equal settings, and how to ask it for a number of steps.

    Raises:
        UserError: if it is not there, or the package that it reads pictures with is not.
    """
    if not script.is_file():
        raise UserError(f"--script {script} is no file; give train_text_to_image_lora.py (SDXL: ..._sdxl.py) of a diffusers checkout.")
    looked = subprocess.run([sys.executable, "-c", "import datasets, torchvision"], check=False, capture_output=True, cwd=out)
    if looked.returncode:
        raise UserError(f"--script {script} reads pictures with the packages datasets and torchvision, which are not both installed here.")
    rows = [{"file_name": path.name, "text": path.with_suffix(".txt").read_text()} for path in sorted(pictures.glob("*.png"))]
    (pictures / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    precision = "bf16" if torch.cuda.is_available() else "no"
    command = [
        sys.executable, str(script.resolve()), f"--pretrained_model_name_or_path={base.resolve()}",
        f"--train_data_dir={pictures.resolve()}",
        "--caption_column=text", f"--resolution={options.resolution}", f"--train_batch_size={options.batch}", f"--rank={options.rank}",
        f"--learning_rate={LEARNING_RATE}", "--checkpointing_steps=1000000", f"--output_dir={out / 'script'}",
        f"--mixed_precision={precision}",
    ]  # fmt: skip
    return command, lambda steps: [f"--max_train_steps={steps}"]


def kohya_command(checkout: Path, base: Path, pictures: Path, options: Any, out: Path) -> tuple[list[str], Callable[[int], list[str]]]:
    """The command of sd-scripts with equal settings, run by the Python of its own environment.

    Raises:
        UserError: if the checkout or its environment is not there.
    """
    script = checkout / ("sdxl_train_network.py" if options.family == "sdxl" else "train_network.py")
    pythons = [one for name in ("venv", ".venv") if (one := checkout / name / "bin" / "python").is_file()]
    if not script.is_file() or not pythons:
        raise UserError(
            f"kohya={checkout} cannot be run here: it needs {script.name} of sd-scripts, its own environment in venv/ beside it (diffusers "
            "0.32.1, transformers 4.54.1), and CLIP's tokenizers in the hub's cache."
        )
    folder = out / "kohya" / "1_noise"  # its layout: repeats and class in the folder's name
    folder.mkdir(parents=True, exist_ok=True)
    for path in pictures.glob("*.*"):
        if path.suffix in (".png", ".txt"):
            (folder / path.name).write_bytes(path.read_bytes())
    precision = "bf16" if torch.cuda.is_available() else "no"
    command = [
        str(pythons[0].absolute()), str(script.resolve()), f"--pretrained_model_name_or_path={base.resolve()}",
        f"--train_data_dir={folder.parent.resolve()}", "--caption_extension=.txt", f"--resolution={options.resolution}",
        f"--train_batch_size={options.batch}", "--network_module=networks.lora", f"--network_dim={options.rank}",
        f"--network_alpha={options.rank}", "--network_train_unet_only", "--cache_latents", "--optimizer_type=AdamW", "--sdpa",
        f"--learning_rate={LEARNING_RATE}", f"--mixed_precision={precision}", f"--output_dir={out / 'kohya-out'}", "--output_name=kohya",
    ]  # fmt: skip
    return command, lambda steps: [f"--max_train_steps={steps}"]


def seconds_per_step(command: list[str], asked: Callable[[int], list[str]], *, steps: int, out: Path) -> tuple[float, float]:
    """Process CPU and wall seconds per step of a script: a run of 3 n steps less one of n, over 2 n, so that its start does not count.

    Raises:
        UserError: if it fails; what it said last is in the sentence.
    """
    took = []
    for count in (steps, 3 * steps):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [*command, *asked(count)], check=False, capture_output=True, text=True, cwd=out, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"{command[1]} ended with code {done.returncode} ({last[:200]}); run it by hand to see why.")
        took.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - began))
    return (took[1][0] - took[0][0]) / (2 * steps), (took[1][1] - took[0][1]) / (2 * steps)


# --- what the device can do ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Measured: floating-point operations of a matrix product, and bytes read and written by a copy, each per second."""

    flops: float
    bytes: float


def ceilings(device: torch.device, dtype: torch.dtype, *, side: int | None = None, rounds: int = 5) -> Ceilings:
    """The best of some rounds, on the clock that steps are measured with too.

    Args:
        side: of the matrices; the copy is of 16 times as many numbers.
    """
    side = side or (8192 if device.type == "cuda" else 1024)
    one = torch.randn(side, side, device=device).to(dtype)
    many = torch.randn(16, side, side, device=device).to(dtype)
    goal, copied = torch.empty_like(one), torch.empty_like(many)
    product = min(seconds(lambda: torch.mm(one, one, out=goal), device) for _ in range(rounds + 1))
    copy = min(seconds(lambda: copied.copy_(many), device) for _ in range(rounds + 1))
    return Ceilings(2 * side**3 / product, 2 * many.nbytes / copy)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long something takes: by the device's own events on a GPU, in process CPU time on a CPU, which other processes do not stretch."""
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / 1000
    began = time.process_time()
    work()
    return time.process_time() - began


def clock_name(device: torch.device) -> str:
    """What `seconds` are of, in words."""
    return "process CPU time" if device.type == "cpu" else "time"
