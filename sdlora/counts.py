"""What a training step costs, counted on the `meta` device: operations, weights, and what is kept for the way back.

A base is built from its configs alone, and the run's own step is taken with tensors that have a shape and no content, so SDXL is counted
in seconds on a machine that could not hold it. Counts say nothing of time, and nothing of what libraries and kernels take beside the
tensors: those are measured (`trial`). Attention counts as the fused kernels do it, which never hold the matrix of all pairs; the plain
form that `meta` would take by itself keeps 2 GiB for one layer of SD 1.5 at 512 px and batch 4.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sdlora import base_files, base_kinds, base_parts, base_sources, checkpoint_configs, tokenizer_files, weights_file
from sdlora.base_kinds import Identity
from sdlora.base_model import Base

META = torch.device("meta")
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the one fused kernel that works on `meta`
_FUSED_BACK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# --- a step -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepCost:
    """What one forward and backward pass takes.

    Args:
        flops: floating-point operations, two per multiplication and addition.
        saved_bytes: what the forward pass keeps for the backward pass, each storage once, weights not counted.
        peak_bytes: the most that is there at once beside what was there before, gradients among it.
        launches: operations that compute something, views left out; on a GPU each costs a few microseconds of the CPU's time.
    """

    flops: int
    saved_bytes: int
    peak_bytes: int
    launches: int = 0


def of_step(loss: Callable[[], Tensor], *, weights: Iterable[Tensor] = ()) -> StepCost:
    """Counts a step on whatever device its tensors are.

    Args:
        loss: the forward pass.
        weights: what is there before, such as the base's weights.
    """
    known = {weight.untyped_storage()._cdata for weight in weights}
    saved: dict[int, int] = {}

    def kept(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known and storage._cdata not in saved:
            saved[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, saved.pop, storage._cdata, None)  # what dies before the way back was not kept
        return tensor

    rules = {_FUSED: _attention_flops, _FUSED_BACK: _attention_back_flops, torch.ops.aten.addmm_: _product_flops}
    live, flops = _Live(known), FlopCounterMode(display=False, custom_mapping=rules)
    # its own tracker asks tensors to call back, which keeps what checkpointing computes again until the end
    flops.mod_tracker = _Nowhere()  # type: ignore[assignment]
    with _fused(), flops, live:  # the counter takes operations apart that a device does at once
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            answer = loss()
        saved_bytes = sum(saved.values())
        answer.backward()  # type: ignore[no-untyped-call]
    return StepCost(flops.get_total_flops(), saved_bytes, live.most, live.launches)


@torch.no_grad()
def of_answer(ask: Callable[[], object], *, weights: Iterable[Tensor] = ()) -> int:
    """The most bytes that are there at once beside what was there before, where nothing is learned.

    Args:
        ask: what is computed.
        weights: as for `of_step`.
    """
    live = _Live({weight.untyped_storage()._cdata for weight in weights})
    with _fused(), live:
        ask()
    return live.most


class _Nowhere:
    """In the place of a tracker of modules, for a counter that is asked for the sum alone."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *problem: object) -> None:
        pass


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of all storages that operations make, until each is gone."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.alive = known, set[int]()
        self.now = self.most = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.launches += computes(func)
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self._follow(one.untyped_storage())
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def computes(operation: Any) -> bool:
    """Whether an operation of torch does more than to see the same numbers in another way or to make room."""
    space, _, name = operation._schema.name.partition("::")
    return space == "aten" and not (
        operation.is_view or name in ("_unsafe_view", "detach", "set_", "lift_fresh", "is_same_size") or "empty" in name
    )


@contextmanager
def _fused() -> Iterator[None]:
    """While it lasts attention on `meta` is what the fused kernels do, which every device has.

    By name, since a function mode is out of force within `backward`, where checkpointing calls it again.
    """
    own = F.scaled_dot_product_attention

    def attention(query: Tensor, *more: Any, **rest: Any) -> Tensor:
        return (_attention if query.is_meta else own)(query, *more, **rest)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, **more: Any
) -> Tensor:
    answer: Tensor = _FUSED(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=more.get("scale"))[0]
    return answer


Shape = tuple[int, int, int, int]


def _product_flops(goal: tuple[int, int], one: tuple[int, int], other: tuple[int, int], *more: Any, **rest: Any) -> int:
    """2 · n · k · m, as for a product that is not added up in place, the only one that FlopCounterMode knows."""
    return 2 * one[0] * one[1] * other[1]


def _attention_flops(query: Shape, key: Shape, value: Shape, *more: Any, **rest: Any) -> int:
    """Q Kᵀ and the weights times V, 2 · B · H · L · S · (D + E); FlopCounterMode knows the GPU's kernels alone."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _attention_back_flops(gradient: Shape, query: Shape, key: Shape, value: Shape, *more: Any, **rest: Any) -> int:
    """Five products instead of two: Q Kᵀ once more, and the gradients of V, of the weights, of Q and of K."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (3 * width + 2 * value[3])


# --- a base without weights ---------------------------------------------------------------------------------------------------


def shell(
    name: str,
    *,
    dtype: torch.dtype,
    family: str = "auto",
    prediction: str = "auto",
    tokenizer: str | None = None,
    clip_skip: int | None = None,
) -> Base:
    """A base on the `meta` device, from its configs or its header: what can be asked of a base, with answers that are shapes.

    Args:
        name: as for `base_files.load`; of a hub id that is not in the cache only the configs are fetched.
        dtype: the number format of UNet and text encoders.
        family: overrides what is detected, as are the others.

    Raises:
        UserError: if there is no such base, it is none that is known, or its configs make no model.
    """
    identity = base_files.identify(name, dtype=dtype, family=family, prediction=prediction)
    part, schedule, folders, pads = _source(name, identity, tokenizer)
    texts = ("text_encoder", "text_encoder_2") if identity.family == "sdxl" else ("text_encoder",)
    encoders = tuple(_frozen(part(one), dtype) for one in texts)
    tokenizers = tuple(
        tokenizer_files.load(folder, words=encoder.config.vocab_size, pad=pad)
        for encoder, folder, pad in zip(encoders, folders, pads, strict=False)
    )
    told = "epsilon" if identity.prediction == base_kinds.UNSTATED else identity.prediction  # the costs are the same
    skip = (2 if identity.family == "sdxl" else 1) if clip_skip is None else clip_skip
    unet, vae = _frozen(part("unet"), dtype), _frozen(part("vae"), torch.float32)
    return Base(name, identity.family, unet, vae, encoders, tokenizers, told, schedule, (), skip)


def _source(
    name: str, identity: Identity, tokenizer: str | None
) -> tuple[Callable[[str], Any], dict[str, Any], tuple[Path, ...], tuple[str | None, ...]]:
    """How to build a part without weights, the schedule, and each text encoder's tokenizer with its padding."""
    if identity.form == "single file":
        configs = "sd2-v" if identity.family == "sd2" and identity.prediction != "epsilon" else identity.family
        header = weights_file.header(Path(name))
        source = base_sources.of_file(Path(name), header, family=identity.family, configs=configs, tokenizer=tokenizer, device=META)
        return source.shell, checkpoint_configs.of_family(configs, "scheduler"), source.tokenizers, source.pads
    half = identity.variant == "fp16"
    folder = base_sources.hub_folder(name, half=half, weights=False) if identity.form == "hub" else base_files.folder_of(name)
    schedule = base_parts.schedule(base_parts.config(folder / "scheduler" / "scheduler_config.json"), where=f"Base '{name}'")
    given = tokenizer_files.named(tokenizer) if tokenizer else None
    pads = tokenizer_files.PADDING.get(identity.family, (None,)) if given else (None, None)
    folders = (given, given) if given else (folder / "tokenizer", folder / "tokenizer_2")

    def part(kind: str) -> Any:
        return base_parts.empty(base_parts.config(folder / kind / "config.json"), part=kind, where=f"Base '{name}'")

    return part, schedule, folders, pads


def _frozen(module: Any, dtype: torch.dtype) -> Any:
    return nn.Module.to(module, dtype).eval().requires_grad_(False)  # diffusers' own `to` warns about modules that SD does not have


# --- weights ------------------------------------------------------------------------------------------------------------------


def weights_bytes(modules: Iterable[nn.Module]) -> int:
    """What the frozen weights and the buffers of some modules weigh in their number formats, adapters not counted."""
    every = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum(_bytes(tensor) for tensor in every if not tensor.requires_grad)


def trained_bytes(weights: Iterable[Tensor], *, state: float, average: bool) -> int:
    """What trained weights weigh with all that lies beside them between steps, in fp32.

    4 bytes · numbers · (1 + state + [average]); gradients are made in the step and counted there.

    Args:
        state: numbers that the optimizer keeps per trained number, see `optimizer.Kind`.
        average: whether a running average is kept.
    """
    return round(sum(_bytes(weight) for weight in weights) * (1 + state + average))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
