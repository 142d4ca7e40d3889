"""LoRA files and runs for the tests of the page: small ones that fit the tiny base, and one that does not."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import gradio as gr
import torch

from sdlora import base_files, base_model, files, lora, lora_file
from sdlora.deltas import LowRank, Update
from sdlora.ui import words
from sdlora.ui.roots import Roots
from sdlora.ui.studio import Studio

FOREIGN = {"lora_unet_down_blocks_7_attentions_0_proj_in": Update(LowRank(torch.zeros(2, 5), torch.zeros(5, 2), 2.0))}


def write_lora(base: Path, path: Path, *, seed: int, rank: int = 2, metadata: Mapping[str, str] | None = None) -> None:
    """A LoRA with random weights over the UNet's attention."""
    opened, generator = base_files.load(str(base), device=torch.device("cpu"), dtype=torch.float32), torch.Generator().manual_seed(seed)
    modules = {}
    for stem, (part, name) in base_model.stems(opened).items():
        if part == "unet" and "attn" in name:
            rows, columns = lora.base_weight(opened.parts[part].get_submodule(name)).shape
            factors = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
            modules[stem] = Update(LowRank(*factors, 0.5))
    files.write(path, lora_file.to_bytes(modules, metadata or {}, family="sd1"))


def make_roots(base: Path, place: Path) -> Roots:
    """Roots with a run of two checkpoints and a result, two LoRAs from elsewhere, a broken one, and the tiny base."""
    roots = Roots(**{name: place / name for name in ("runs", "loras", "data", "bases", "outputs", "trash")})
    run = roots.runs / "cups"
    for step in (10, 20):
        write_lora(base, run / f"checkpoints/cups-{step:06d}.safetensors", seed=step)
    told = {"modelspec.trigger_phrase": "zup", "ss_tag_frequency": json.dumps({"d": {"cup": 3, "<b>red": 2}, "e": {"cup": 1}})}
    write_lora(base, run / "cups.safetensors", seed=30, metadata=told)
    started = {"event": "started", "steps": 30, "pictures": 5, "time_s": 1.0}
    files.write(
        run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in (started, {"event": "done", "step": 30, "time_s": 2.0})).encode()
    )
    files.write(run / "config.toml", b'name = "cups"\nbase = "mini"\ntrigger = "zup"\nkind = "style"\nsteps = 30\n')
    write_lora(base, roots.loras / "calm.safetensors", seed=1)
    write_lora(base, roots.loras / "deep/wild.safetensors", seed=2, rank=4)
    files.write(roots.loras / "torn.safetensors", (roots.loras / "calm.safetensors").read_bytes()[:900])
    files.write(roots.loras / "foreign.safetensors", lora_file.to_bytes(FOREIGN, {}, family="sd1"))
    roots.bases.mkdir(parents=True)
    copy_base(base, roots.bases / "tiny")
    return roots


def copy_base(base: Path, goal: Path) -> None:
    """The base with its files linked hard: a link to a folder elsewhere would be none of the root's."""
    for path in base.rglob("*"):
        if path.is_file():
            target = goal / path.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(path)


def make_studio(roots: Roots) -> Studio:
    """The page's workplace over these roots."""
    return Studio(roots)


def free_port() -> int:
    """A port of this computer that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def served(roots: Roots, studio: Studio, *pages: ModuleType) -> Iterator[gr.Blocks]:
    """Some pages listening on a free port of this computer, as `page.launch` serves them."""
    with gr.Blocks(analytics_enabled=False) as demo, gr.Tabs():
        for one in pages:
            with gr.Tab(one.__name__):
                one.wire(roots, studio, one.layout(roots, studio), demo)
    demo.launch(
        server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, quiet=True, ssr_mode=False, i18n=words.i18n(),
        allowed_paths=[str(roots.outputs.resolve())],
    )  # fmt: skip
    try:
        yield demo
    finally:
        demo.close(verbose=False)
