"""What a run's config means for a base: which modules get adapters, of which kind, at which rates, and what the file will not carry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from sdlora import averaging, base_model, deltas, devices, lora, lora_attention, lora_file, lora_flat, optimizer, recorded, winograd
from sdlora.base_model import Base
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.lora_flat import Flat


def add_lora(base: Base, run: Config) -> dict[str, list[str]]:
    """Puts adapters into the UNet and, if asked for, the text encoders.

    Returns:
        The wrapped modules' names by part of the base; no entry for parts that are not trained.

    Raises:
        UserError: if a pattern matches nothing, or the LoRA to start from does not fit.
    """
    generator = devices.generator(run.seed, 2**31)
    start = starting_point(base, run)
    variant = lora.Variant(
        rank_stabilised=run.lora.rank_stabilised, dora=run.lora.dora, init=run.lora.init, network_dropout=run.lora.network_dropout,
        rank_dropout=run.lora.rank_dropout, module_dropout=run.lora.module_dropout,
    )  # fmt: skip
    targets = {"unet": base_model.targets(run.lora.targets)}
    if run.lora.text_encoder:
        assert run.lora.text_targets is not None  # `linked.resolve` says which
        targets |= {part: base_model.targets(run.lora.text_targets, part=part) for part in base.parts if part != "unet"}
    chosen = {part: lora.matching(base.parts[part], patterns) for part, patterns in targets.items()}
    overrides = overrides_by_part(run, chosen)
    added = {}
    for part, patterns in targets.items():
        base_model.bring(base, part)  # what is trained stays where the part is now
        added[part] = lora.add(
            base.parts[part], rank=run.lora.rank, alpha=run.lora.alpha, targets=patterns, generator=generator, variant=variant,
            overrides=overrides[part], start_from=start.get(part),
        )  # fmt: skip
    return added


def overrides_by_part(run: Config, chosen: Mapping[str, Sequence[str]]) -> dict[str, list[lora.Override]]:
    """The config's overrides for each part that they concern.

    Raises:
        UserError: if one concerns no part.
    """
    found: dict[str, list[lora.Override]] = {part: [] for part in chosen}
    for one in run.lora.overrides:
        parts = [part for part, names in chosen.items() if any(fnmatchcase(name, one.pattern) for name in names)]
        if not parts:
            raise UserError(f"lora.overrides: '{one.pattern}' matches no trained module; they are named like '{chosen['unet'][0]}'.")
        for part in parts:
            found[part].append(lora.Override(one.pattern, one.rank, one.alpha))
    return found


def starting_point(base: Base, run: Config) -> dict[str, dict[str, deltas.Update]]:
    """The updates of the LoRA file that the run goes on from, by part and module name; empty if it starts anew."""
    if run.lora.start_from is None:
        return {}
    places = base_model.stems(base)
    found: dict[str, dict[str, deltas.Update]] = {}
    for stem, update in lora_file.read(run.lora.start_from).modules.items():
        if stem not in places:
            raise UserError(f"lora.start_from: {run.lora.start_from} does not fit base '{base.name}', which has no module {stem}.")
        part, name = places[stem]
        found.setdefault(part, {})[name] = update
    return found


def parameters(base: Base) -> list[nn.Parameter]:
    """All weights that are trained, in a fixed order."""
    return [weight for part in base.parts.values() for weight in lora.parameters(part)]


def groups(base: Base, run: Config) -> list[tuple[list[nn.Parameter], float]]:
    """The trained weights with their peak learning rates, one group per rate, those of text encoders apart."""
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for part, module in base.parts.items():
        for name, layer in lora.layers(module).items():
            own = [one.learning_rate for one in run.lora.overrides if one.learning_rate is not None and fnmatchcase(name, one.pattern)]
            place = (part != "unet", own[-1] if own else rate_of(part, run))
            found.setdefault(place, []).extend(layer.adapters["default"].parameters())
    return [(weights, rate) for (_, rate), weights in found.items()]


def rate_of(part: str, run: Config) -> float:
    """The peak learning rate of a part of the base."""
    rates = run.optimizer
    if part == "unet":
        return rates.learning_rate
    second = rates.text_encoder_2_learning_rate
    return second if part == "text_encoder_2" and second is not None else rates.text_encoder_learning_rate


def each(base: Base) -> list[lora.Adapter]:
    """The adapters of all parts."""
    return [adapter for part in base.parts.values() for layer in lora.layers(part).values() for adapter in layer.each_adapter()]


@dataclass(frozen=True)
class Trained:
    """What is trained, and by what.

    Args:
        mover: the optimizer.
        weights: what it moves.
        flats: the same with their parts, or none if the optimizer wants matrices.
        adapters: those whose weights they are.
    """

    mover: torch.optim.Optimizer
    weights: list[nn.Parameter]
    flats: list[Flat]
    adapters: list[lora.Adapter]


def trained(base: Base, run: Config) -> Trained:
    """The run's optimizer over all that is trained; from then on the base answers in the shortest way.

    Raises:
        UserError: if the optimizer's package is not installed, or it cannot give parts rates of their own.
    """
    every = each(base)
    split = optimizer.with_ratio(groups(base, run), ups=[adapter.up for adapter in every], ratio=run.optimizer.lora_plus_ratio)
    unet = {id(weight) for weight in lora.parameters(base.unet)}
    flats: list[Flat] = []
    if optimizer.OPTIMIZERS[run.optimizer.name].shapeless:
        flats = [lora_flat.pack(weights) for weights, _ in split]
        unet = {id(flat.whole) for flat in flats if id(flat.parts[0]) in unet}
        split = [([flat.whole], rate) for flat, (_, rate) in zip(flats, split, strict=True)]
    made = optimizer.make(run.optimizer.name, split, weight_decay=run.optimizer.weight_decay)
    for group in made.param_groups:
        group["text"] = id(group["params"][0]) not in unet
    lora_attention.share_inputs(base.unet)
    winograd.use(base.unet)
    for part in base.parts.values():
        own = [adapter for layer in lora.layers(part).values() for adapter in layer.each_adapter()]
        weights = {id(weight) for one in own for weight in one.parameters()}
        recorded.record(part, [flat for flat in flats if any(id(one) in weights for one in flat.parts)], own, base.dtype)
    return Trained(made, [weight for weights, _ in split for weight in weights], flats, every)


def rate_factor(run: Config, step: int) -> float:
    """The share of the peak rates at a step, 0 for the first."""
    how = run.optimizer
    shape = optimizer.Shape(cycles=how.cycles, power=how.power, decay=how.decay)
    return optimizer.rate_factor(step, steps=run.steps, warmup=how.warmup, schedule=how.schedule, shape=shape)


def set_rates(mover: torch.optim.Optimizer, run: Config, step: int) -> float:
    """Sets the rates of a step, 0 for the first, and returns the UNet's."""
    factor = rate_factor(run, step)
    optimizer.set_rates(mover, factor, text=float(step < round(run.optimizer.text_encoder_until * run.steps)))
    return run.optimizer.learning_rate * factor


def limit_norms(base: Base, limit: float) -> None:
    """Scales down every module's update that has grown beyond a norm."""
    for adapter in each(base):
        averaging.limit_norm(adapter.down, adapter.up, scale=adapter.scale, limit=limit)


def limits(base: Base, run: Config) -> Iterator[str]:
    """What the run's file cannot carry everywhere, said before anything is trained."""
    if run.lora.dora:
        yield "DoRA: A1111, Forge, ComfyUI and SD.Next read the magnitudes; diffusers leaves them out and shows another picture."
    if run.output.format == "diffusers":
        yield 'format = "diffusers": diffusers, ComfyUI and Forge read it; A1111, SD.Next and InvokeAI do not.'
    if run.output.sidecars and not run.sample_every:
        yield "output.sidecars: without samples (sample_every = 0) there is no preview picture."
    if run.lora.init == "pissa":
        yield f"PiSSA: the file is an ordinary LoRA of rank {2 * run.lora.rank}, which every tool loads."
    flat = [name for name in lora.layers(base.unet) if name.endswith(("proj_in", "proj_out"))]
    if base.family == "sd2" and flat and run.output.format == "kohya":
        yield (
            f"SD 2.x: the {len(flat)} proj_in and proj_out layers are written as convolutions, as A1111, Forge and ComfyUI want them; "
            'diffusers cannot load such a file. For diffusers choose targets "attn" or format = "diffusers".'
        )
    names = [name for part in base.parts.values() for name in lora.layers(part)]
    if base.family != "mini" and not any(name.endswith(("attn2.to_k", "attn2.to_v")) or "encoder.layers" in name for name in names):
        yield "Targets without attn2.to_k, attn2.to_v and text encoder: InvokeAI cannot tell which base the file is for."
