"""Every tensor of an original checkpoint has one place and every parameter one key, at full size, and both ways are exact."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdlora import base_parts, checkpoint_configs, checkpoint_keys
from tests import tiny_families
from tests.bases import Made

pytest_plugins = ("tests.base_fixtures",)

PARTS = {"sd1": ["text_encoder"], "sd2": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}
TENSORS = {"sd1": (686, 248, 196), "sd2": (686, 248, 280), "sdxl": (1680, 248, 196 + 389)}  # OpenCLIP: 12 per layer, qkv being one


def full_size(family: str) -> dict[str, dict[str, torch.Tensor]]:
    """The parameters of each part of a full-size base, without memory."""
    configs = {part: checkpoint_configs.of_family(family, part) for part in ("unet", "vae", *PARTS[family])}
    return {part: base_parts.empty(config, part=part, where=family).state_dict() for part, config in configs.items()}


@pytest.mark.parametrize("family", PARTS)
def test_every_parameter_of_a_full_size_base_has_its_key_in_the_original_layout(family: str) -> None:
    parts = full_size(family)
    keys = {part: checkpoint_keys.places(part, names, family=family) for part, names in parts.items()}
    texts = sum(len(keys[part]) for part in PARTS[family])
    assert (len(keys["unet"]), len(keys["vae"]), texts) == TENSORS[family]
    assert set(keys["unet"]) == set(tiny_families.prefixed(checkpoint_keys.UNET, tiny_families.original_unet(parts["unet"])))
    assert set(keys["vae"]) == set(tiny_families.prefixed(checkpoint_keys.VAE, tiny_families.original_vae(parts["vae"])))
    for part, names in parts.items():
        reached = Counter(name for at in keys[part].values() for name in at.parameters)
        spelled = {name if part in ("unet", "vae") else checkpoint_keys.text_name(name) for name in names}
        assert reached == Counter(spelled)
        assert {at.part for at in keys[part].values()} == {part}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sd2-v", "sdxl"])
def test_shapes_of_the_full_size_give_the_familys_own_config(family: str) -> None:
    kind = family.removesuffix("-v")
    for part, weights in full_size(kind).items():
        shapes = {name if part in ("unet", "vae") else checkpoint_keys.text_name(name): tuple(one.shape) for name, one in weights.items()}
        if (kind, part) == ("sd2", "text_encoder"):  # the original has one layer more, which is never asked
            shapes |= {name.replace("layers.22.", "layers.23."): shape for name, shape in shapes.items()}
        config = checkpoint_configs.of_family(family, part)
        assert checkpoint_configs.fitted(config, shapes, part=part) == config


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_taking_a_checkpoint_apart_and_joining_it_again_is_exact(family: str, made: Made) -> None:
    kind, tensors = family.removesuffix("-v"), load_file(made(family)[1])
    passed_over = []
    for key, tensor in tensors.items():
        at = checkpoint_keys.place(key, family=kind)
        if at is None:
            passed_over.append(key)
            continue
        joined = checkpoint_keys.joined(checkpoint_keys.parts_of(tensor, at), at)
        assert torch.equal(joined, tensor), key
        assert joined.is_contiguous()
        assert checkpoint_keys.places(at.part, at.parameters, family=kind) == {key: at}
    expected = {"betas", "model_ema.decay", "model_ema.diffusion_modelout2bias"}
    assert {key for key in passed_over if not key.endswith(("position_ids", "logit_scale"))} == expected


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.1.0.in_layers.9.weight", "model.diffusion_model.output_blocks.0.3.conv.weight",
        "first_stage_model.encoder.down.0.attn.0.q.weight", "cond_stage_model.model.transformer.resblocks.0.ln_9.weight",
        "model.diffusion_model.out.2.scale",
    ],
)  # fmt: skip
def test_a_key_that_stable_diffusion_does_not_have_is_an_error(key: str) -> None:
    with pytest.raises(ValueError, match=r"in_layers\.9|output_blocks\.0\.3|attn\.0|ln_9|scale"):
        checkpoint_keys.place(key, family="sd2")


def test_a_parameter_that_the_family_does_not_have_is_an_error() -> None:
    for part, name in (("text_encoder_2", "text_projection.weight"), ("unet", "conv_in.scale"), ("vae", "encoder.strange.weight")):
        with pytest.raises(ValueError, match=r"no text_encoder_2|conv_in\.scale|strange"):
            checkpoint_keys.places(part, [name], family="sd1")


def test_configs_of_the_package_are_small_and_hold_nothing_but_json() -> None:
    files = [path for path in checkpoint_configs.FAMILIES.rglob("*") if path.is_file()]
    assert len(files) == 21
    assert all(isinstance(json.loads(path.read_text()), dict) and path.stat().st_size < 2048 for path in files)
    assert {Path(path).suffix for path in files} == {".json"}
