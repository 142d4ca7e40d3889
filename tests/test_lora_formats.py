"""Anyone's LoRA file: every spelling and form gives the ΔW that the tool which made it computes, or one sentence that says why not."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora import deltas, lora_formats, weights_file
from sdlora.deltas import Full, Hadamard, Kronecker, LowRank
from sdlora.errors import UserError
from sdlora.lora_formats import Parsed
from tests.test_weights_file import mutated

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
NORM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1"
TEXT = "lora_te1_text_model_encoder_layers_3_self_attn_q_proj"
HERE = Path("x.safetensors")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A [r, 6] and B [4, r]."""
    return {"down": drawn(rank, 6, seed=seed), "up": drawn(4, rank, seed=seed + 100)}


def kohya(stem: str = LINEAR, **more: Tensor) -> dict[str, Tensor]:
    factors = pair()
    return {f"{stem}.lora_down.weight": factors["down"], f"{stem}.lora_up.weight": factors["up"]} | {
        f"{stem}.{name}": value for name, value in more.items()
    }


def named(shapes: Mapping[str, tuple[int, ...]], stem: str = LINEAR) -> dict[str, Tensor]:
    return {f"{stem}.{name}": drawn(*shape) for name, shape in shapes.items()}


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Parsed:
    return lora_formats.parse(HERE, tensors, metadata or {})


def refusal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    with pytest.raises(UserError) as problem:
        parse(tensors, metadata)
    said = str(problem.value)
    assert said.endswith(".")
    assert said.isprintable()
    return said


def asked(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight with which a module answers, found by asking it for each unit input; its bias is taken off."""
    units = torch.eye(weight[0].numel()).reshape(-1, *weight.shape[1:])
    with torch.no_grad():
        return (module(units) - module(torch.zeros_like(units[:1]))).flatten(1).T.reshape(weight.shape)


# LyCORIS's own modules, kohya's names

LYCORIS: dict[str, tuple[Any, dict[str, Any], type]] = {
    "LoRA": (LoConModule, {}, LowRank),
    "Tucker": (LoConModule, {"use_tucker": True}, LowRank),
    "rank-stabilised": (LoConModule, {"rs_lora": True}, LowRank),
    "DoRA per output": (LoConModule, {"weight_decompose": True}, LowRank),
    "DoRA per input": (LoConModule, {"weight_decompose": True, "wd_on_out": False}, LowRank),
    "LoHa": (LohaModule, {}, Hadamard),
    "LoHa Tucker": (LohaModule, {"use_tucker": True}, Hadamard),
    "LoHa DoRA": (LohaModule, {"weight_decompose": True}, Hadamard),
    "LoKr": (LokrModule, {"factor": 2}, Kronecker),
    "LoKr Tucker": (LokrModule, {"factor": 2, "use_tucker": True}, Kronecker),
    "LoKr of two products": (LokrModule, {"factor": 4, "decompose_both": True, "lora_dim": 1}, Kronecker),
    "LoKr direct": (LokrModule, {"factor": 2, "full_matrix": True}, Kronecker),
    "LoKr DoRA": (LokrModule, {"factor": 2, "weight_decompose": True, "wd_on_out": False}, Kronecker),
    "full": (FullModule, {}, Full),
}
BASES = {"linear": lambda: nn.Linear(12, 16), "conv": lambda: nn.Conv2d(12, 16, 3), "conv 1x1": lambda: nn.Conv2d(12, 16, 1)}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", LYCORIS)
def test_every_form_gives_the_weight_with_which_lycoris_answers(form: str, base: str) -> None:
    torch.manual_seed(3)
    builder, options, kind = LYCORIS[form]
    original = BASES[base]()
    weight, bias = original.weight.detach().clone(), original.bias.detach().clone()
    maker = builder("x", original, **{"lora_dim": 2, "alpha": 3.0} | options)
    with torch.no_grad():
        for name, parameter in maker.named_parameters():
            parameter.normal_(std=0.5)
            if name == "dora_scale":
                parameter.abs_()
    stem = LINEAR if base == "linear" else CONV
    if form == "full":
        tensors = {f"{stem}.diff": maker.weight.detach(), f"{stem}.diff_b": maker.bias.detach()}
        wanted = maker.get_merged_weight()[0].detach() - weight
    else:
        tensors = {f"{stem}.{name}": value.detach() for name, value in maker.custom_state_dict().items()}
        wanted = asked(maker, weight) - weight
    update = parse(tensors).modules[stem]
    found = deltas.delta(update, weight)
    assert isinstance(update.change, kind)
    assert found is not None
    assert wanted.abs().max() > 0.05
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    if form == "full":
        assert update.bias is not None
        torch.testing.assert_close(bias + update.bias, maker.get_merged_weight()[1])


def test_norm_deltas_are_what_lycoris_adds() -> None:
    original = nn.LayerNorm(8)
    maker = NormModule("x", original)
    with torch.no_grad():
        maker.w_norm.copy_(drawn(8))
        maker.b_norm.copy_(drawn(8, seed=1))
    update = parse({f"{NORM}.{name}": value.detach() for name, value in maker.named_parameters() if name in ("w_norm", "b_norm")}).modules[
        NORM
    ]
    weight, bias = maker.get_merged_weight()
    found = deltas.delta(update, original.weight)
    assert found is not None
    assert update.bias is not None
    torch.testing.assert_close(original.weight + found, weight)
    torch.testing.assert_close(original.bias + update.bias, bias)


# PEFT and diffusers


def small_unet() -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def small_text() -> CLIPTextModel:
    torch.manual_seed(2)
    return CLIPTextModel(CLIPTextConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2))


def put(text: CLIPTextModel, config: LoraConfig) -> None:
    """Adds PEFT's layers to a text encoder without transformers' own way in, which wants one version of PEFT."""
    inject_adapter_in_model(config, text)
    text.peft_config = {"default": config}


def shaken(model: nn.Module) -> nn.Module:
    """The model with all its adapters' weights drawn anew."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(weight.abs() * 1.3 + 0.1 if "magnitude" in name else torch.randn(weight.shape, generator=generator) * 0.3)
    return model


def merged_deltas(model: nn.Module) -> dict[str, Tensor]:
    """ΔW by module name, as PEFT's own merging makes it."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            before = layer.base_layer.weight.detach().clone()
            layer.merge()
            found[name.removeprefix("base_model.model.")] = layer.base_layer.weight.detach() - before
            layer.unmerge()
    return found


def same_deltas(parsed: Parsed, model: nn.Module, prefix: str) -> int:
    """How many modules of a model with PEFT's layers are changed alike by what was parsed."""
    wanted = merged_deltas(model)
    base = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")}
    for name, change in wanted.items():
        update = parsed.modules[prefix + name.removeprefix("text_model.").replace(".", "_")]
        weight = base[name].base_layer.weight
        found = deltas.delta(update, weight)
        assert found is not None
        assert update.magnitude is None or update.magnitude.shape == (len(weight), *[1] * (weight.ndim - 1))
        assert change.abs().max() > 0.01
        torch.testing.assert_close(found, change, atol=1e-5, rtol=1e-5)
    return len(wanted)


UNET_TARGETS = ["to_q", "to_out.0", "proj_in", "conv1", "ff.net.2", "downsamplers.0.conv"]
PEFT_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 6},
    "patterns": {
        "lora_alpha": 3,
        "rank_pattern": {"conv1": 2, "to_q": 5},
        "alpha_pattern": {"attn1.to_q": 1.5, "to_q": 9, "^down_blocks.0.resnets.0.conv1": 2},
    },
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "dora": {"lora_alpha": 3, "use_dora": True},
}


@pytest.mark.parametrize("options", PEFT_OPTIONS)
def test_a_peft_folder_means_what_peft_merges_with_the_scale_from_the_file_beside_it(tmp_path: Path, options: str) -> None:
    model = shaken(get_peft_model(small_unet(), LoraConfig(r=4, target_modules=UNET_TARGETS, **PEFT_OPTIONS[options])))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    read = weights_file.read(path)
    assert all(key.startswith("base_model.model.") for key in read.tensors)
    parsed = lora_formats.parse(path, read.tensors, read.metadata)
    assert same_deltas(parsed, model, "lora_unet_") == len(parsed.modules) > 10
    assert (parsed.layout, parsed.unknown, parsed.warnings) == ("PEFT", (), ())


def test_a_peft_file_without_its_folder_says_that_its_scale_is_a_guess(tmp_path: Path) -> None:
    parsed = lora_formats.parse(tmp_path / "x.safetensors", {f"base_model.model.{ATTENTION}.attn1.to_q.lora_A.weight": drawn(2, 6),
                                f"base_model.model.{ATTENTION}.attn1.to_q.lora_B.weight": drawn(4, 2)}, {})  # fmt: skip
    assert [update.change.alpha for update in parsed.modules.values() if isinstance(update.change, LowRank)] == [2.0]
    assert len(parsed.warnings) == 1
    assert "adapter_config.json" in parsed.warnings[0]


@pytest.mark.parametrize("options", PEFT_OPTIONS)
def test_a_file_that_diffusers_writes_means_what_peft_merges(tmp_path: Path, options: str) -> None:
    unet, text = small_unet(), small_text()
    unet.add_adapter(LoraConfig(r=4, target_modules=UNET_TARGETS, **PEFT_OPTIONS[options]))
    put(text, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "fc1"]))
    shaken(unet)
    shaken(text)
    configs = [{key: value for key, value in json.loads(json.dumps(one.peft_config["default"].to_dict(), default=list)).items() if value}
               for one in (unet, text)]  # fmt: skip
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(unet), text_encoder_lora_layers=get_peft_model_state_dict(text),
        unet_lora_adapter_metadata=configs[0], text_encoder_lora_adapter_metadata=configs[1],
    )  # fmt: skip
    path = tmp_path / "pytorch_lora_weights.safetensors"
    read = weights_file.read(path)
    parsed = lora_formats.parse(path, read.tensors, read.metadata)
    assert same_deltas(parsed, unet, "lora_unet_") + same_deltas(parsed, text, "lora_te1_text_model_") == len(parsed.modules)
    assert (parsed.layout, parsed.unknown, parsed.warnings) == ("PEFT", (), ())


def test_diffusers_own_text_encoder_spelling_with_linear_layers_is_read() -> None:
    text = small_text()
    put(text, LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "out_proj", "fc1", "fc2"]))
    shaken(text)
    state = {f"text_encoder.{key}": value for key, value in convert_state_dict_to_diffusers(get_peft_model_state_dict(text)).items()}
    assert sum("lora_linear_layer" in key for key in state) > 0
    parsed = parse(state)
    assert same_deltas(parsed, text, "lora_te1_text_model_") == 8


# Spellings

Q = f"{ATTENTION}.attn1.to_q"
OUT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
ENCODER = "text_model.encoder.layers.3.self_attn"
SPELLINGS: list[tuple[str, str, str, str]] = [
    (f"{LINEAR}.lora_down.weight", f"{LINEAR}.lora_up.weight", LINEAR, "kohya"),
    ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
     "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight",
     "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "kohya with SGM names"),
    (TEXT.replace("te1", "te") + ".lora_down.weight", TEXT.replace("te1", "te") + ".lora_up.weight", TEXT, "kohya"),
    (f"{TEXT}.lora_down.weight", f"{TEXT}.lora_up.weight", TEXT, "kohya"),
    (f"unet.{Q}.lora_A.weight", f"unet.{Q}.lora_B.weight", LINEAR, "PEFT"),
    (f"unet.{Q}.lora_A.default.weight", f"unet.{Q}.lora_B.default.weight", LINEAR, "PEFT"),
    (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", LINEAR, "PEFT"),
    (f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight", LINEAR, "PEFT"),
    (f"unet.base_model.model.{Q}.lora_A.my_style.weight", f"unet.base_model.model.{Q}.lora_B.my_style.weight", LINEAR, "PEFT"),
    (f"text_encoder.{ENCODER}.q_proj.lora_A.weight", f"text_encoder.{ENCODER}.q_proj.lora_B.weight", TEXT, "PEFT"),
    ("text_encoder.encoder.layers.3.self_attn.q_proj.lora_A.weight", "text_encoder.encoder.layers.3.self_attn.q_proj.lora_B.weight",
     TEXT, "PEFT"),
    (f"text_encoder_2.{ENCODER}.q_proj.lora_A.weight", f"text_encoder_2.{ENCODER}.q_proj.lora_B.weight",
     TEXT.replace("te1", "te2"), "PEFT"),
    (f"base_model.model.{ENCODER}.q_proj.lora_A.weight", f"base_model.model.{ENCODER}.q_proj.lora_B.weight", TEXT, "PEFT"),
    (f"unet.{Q}.lora.down.weight", f"unet.{Q}.lora.up.weight", LINEAR, "diffusers"),
    (f"text_encoder.{ENCODER}.q_proj.lora_linear_layer.down.weight", f"text_encoder.{ENCODER}.q_proj.lora_linear_layer.up.weight",
     TEXT, "diffusers"),
    (f"unet.{ATTENTION}.attn1.processor.to_q_lora.down.weight", f"unet.{ATTENTION}.attn1.processor.to_q_lora.up.weight", LINEAR,
     "diffusers attention processors"),
    (f"{ATTENTION}.attn1.processor.to_out_lora.down.weight", f"{ATTENTION}.attn1.processor.to_out_lora.up.weight", OUT,
     "diffusers attention processors"),
    (f"text_encoder.{ENCODER}.to_q_lora.down.weight", f"text_encoder.{ENCODER}.to_q_lora.up.weight",
     TEXT, "diffusers attention processors"),
    ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_down.weight",
     "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_up.weight",
     "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "diffusers"),
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling[0])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_every_spelling_of_a_module_is_known_with_and_without_alpha(spelling: tuple[str, str, str, str], alpha: float | None) -> None:
    down, up, stem, layout = spelling
    factors = pair()
    tensors = {down: factors["down"], up: factors["up"]}
    if alpha is not None:
        module = down.split(".lora")[0].replace("_lora.down.weight", "_lora")
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    parsed = parse(tensors)
    assert list(parsed.modules) == [stem]
    assert (parsed.layout, parsed.unknown) == (layout, ())
    wanted = (alpha or 2) / 2 * np.einsum("or,ri->oi", factors["up"].numpy(), factors["down"].numpy())
    found = deltas.delta(parsed.modules[stem], torch.zeros(4, 6))
    assert found is not None
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


def test_magnitudes_beside_attention_processors_belong_to_their_projections() -> None:
    processor = f"unet.{ATTENTION}.attn1.processor.to_out"
    factors = pair()
    tensors = {f"{processor}_lora.down.weight": factors["down"], f"{processor}_lora.up.weight": factors["up"],
               f"{processor}.lora_magnitude_vector": drawn(4)}  # fmt: skip
    parsed = parse(tensors)
    assert list(parsed.modules) == [OUT]
    assert torch.equal(parsed.modules[OUT].magnitude, drawn(4)[:, None])


@pytest.mark.parametrize(
    ("pattern", "wanted"), [("to_q", 7.0), ("attn1.to_q", 7.0), (r"attn1\.to_q", 7.0), (f"^{Q}", 7.0), ("^to_q", 3.0), ("o_q", 3.0)]
)
def test_a_pattern_means_what_it_means_to_peft(pattern: str, wanted: float) -> None:
    tensors = {f"unet.{Q}.lora_A.weight": drawn(2, 6), f"unet.{Q}.lora_B.weight": drawn(4, 2)}
    config = {"unet.lora_alpha": 3, "unet.alpha_pattern": {pattern: 7}}
    assert get_pattern_key([pattern], Q) == (pattern if wanted == 7 else Q)
    change = parse(tensors, {"lora_adapter_metadata": json.dumps(config)}).modules[LINEAR].change
    assert isinstance(change, LowRank)
    assert change.alpha == wanted


def test_one_file_may_mix_spellings_and_every_module_keeps_its_own_rank_and_alpha() -> None:
    tensors = {
        f"unet.{Q}.lora_A.weight": drawn(3, 6), f"unet.{Q}.lora_B.weight": drawn(4, 3), f"unet.{Q}.alpha": torch.tensor(1.5),
        f"{TEXT}.lora_down.weight": drawn(2, 6), f"{TEXT}.lora_up.weight": drawn(4, 2),
        f"{TEXT}.alpha": torch.tensor([4], dtype=torch.int64),
        f"{CONV}.lora_down.weight": drawn(5, 6, 3, 3), f"{CONV}.lora_up.weight": drawn(4, 5, 1, 1),
    }  # fmt: skip
    parsed = parse(tensors)
    ranks = {
        stem: (update.change.rank, update.change.alpha) for stem, update in parsed.modules.items() if isinstance(update.change, LowRank)
    }
    assert ranks == {LINEAR: (3, 1.5), TEXT: (2, 4.0), CONV: (5, 5.0)}
    assert parsed.layout == "kohya + PEFT"


def test_a_file_with_sgm_names_is_called_one_though_text_encoders_have_none() -> None:
    assert parse(kohya("lora_unet_middle_block_1_proj_in") | kohya(TEXT)).layout == "kohya with SGM names"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_may_have_any_dtype_and_shape_of_one_number(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    update = parse(kohya(alpha=torch.full(shape, 4.0).to(dtype))).modules[LINEAR]
    assert isinstance(update.change, LowRank)
    assert update.change.alpha == 4.0


def test_stated_scales_are_those_of_the_part_and_an_alpha_tensor_goes_before_them() -> None:
    tensors = {key.replace(LINEAR + ".lora_down", f"unet.{Q}.lora_A").replace(LINEAR + ".lora_up", f"unet.{Q}.lora_B"): value
               for key, value in kohya().items()}  # fmt: skip
    config = {"unet.r": 2, "unet.lora_alpha": 8, "text_encoder.lora_alpha": 1}
    for extra, wanted in (({}, 8.0), ({f"unet.{Q}.alpha": torch.tensor(3.0)}, 3.0)):
        change = parse(tensors | extra, {"lora_adapter_metadata": json.dumps(config)}).modules[LINEAR].change
        assert isinstance(change, LowRank)
        assert change.alpha == wanted


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "not a table"),
        ('{"lora_alpha": NaN}', "no finite number"),
        ('{"lora_alpha": 1e999}', "no finite number"),
        ('{"lora_alpha": true}', "no finite number"),
        ('{"alpha_pattern": 3}', "no finite number"),
        ('{"alpha_pattern": {"to_q": "4"}}', "no finite number"),
        ('{"alpha_pattern": {"(a+)+b": 4}}', "only names of modules are understood"),
    ],
)
def test_a_scale_that_cannot_be_read_is_refused(config: str, sentence: str) -> None:
    tensors = {f"unet.{Q}.lora_A.weight": drawn(2, 6), f"unet.{Q}.lora_B.weight": drawn(4, 2)}
    assert sentence in refusal(tensors, {"lora_adapter_metadata": config})


# What is not understood is said


def test_keys_that_belong_to_nothing_are_listed_and_the_rest_is_read() -> None:
    strangers = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": drawn(2, 6), f"{LINEAR}.oft_blocks": drawn(2),
                 "": drawn(1), ".": drawn(1), "\n.alpha": drawn(1), "emb_params": drawn(1)}  # fmt: skip
    parsed = parse(kohya() | strangers)
    assert set(parsed.unknown) == set(strangers)
    assert list(parsed.modules) == [LINEAR]


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({}, "it is empty"),
        ({"model.diffusion_model.input_blocks.0.0.weight": drawn(2)}, "give it as the base"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": drawn(2, 6)}, "it is for another model"),
        ({f"{LINEAR}.lora_down.weight": drawn(2, 6)}, "without lora_up"),
        ({f"{LINEAR}.lora_up.weight": drawn(4, 2)}, "without lora_down"),
        ({f"{LINEAR}.lora_mid.weight": drawn(2, 2, 3, 3)}, "without lora_down and lora_up"),
        ({f"{LINEAR}.hada_w1_a": drawn(2, 2)}, "without hada_w1_b and hada_w2_a and hada_w2_b"),
        ({f"{LINEAR}.lokr_w1": drawn(2, 2), f"{LINEAR}.lokr_w2_a": drawn(2, 2)}, "without lokr_w2_b"),
        ({f"{LINEAR}.lokr_w1": drawn(2, 2)}, "without lokr_w2_a and lokr_w2_b"),
        ({f"{LINEAR}.alpha": drawn()}, "nothing but alpha"),
        ({f"{LINEAR}.dora_scale": drawn(4, 1)}, "nothing but dora_scale"),
        (kohya(diff=drawn(4, 6)), "in more than one form"),
        (kohya(dora_scale=drawn(4, 1), lora_magnitude_vector=drawn(4)), "both dora_scale and lora_magnitude_vector"),
        (kohya(dora_scale=drawn(5, 1)), "shapes that do not fit"),
        (kohya(lora_magnitude_vector=drawn(6)), "shapes that do not fit"),
        (kohya(dora_scale=drawn(2, 2)), "shapes that do not fit"),
        (kohya(dora_scale=drawn(4)), "shapes that do not fit"),
        (kohya(diff_b=drawn(2, 2)), "shapes that do not fit"),
        (kohya(diff_b=drawn(4), b_norm=drawn(4)), "both diff_b and b_norm"),
        (kohya() | {f"{LINEAR}.lora_up.weight": drawn(4, 3)}, "shapes that do not fit each other (lora_down [2, 6], lora_up [4, 3])"),
        (kohya() | {f"{LINEAR}.lora_up.weight": drawn()}, "shapes that do not fit"),
        (kohya() | {f"{LINEAR}.lora_up.weight": drawn(4, 2, 3, 3)}, "shapes that do not fit"),
        (kohya() | {f"{LINEAR}.lora_down.weight": drawn(0, 6), f"{LINEAR}.lora_up.weight": drawn(4, 0)}, "of rank or width 0"),
        (kohya() | {f"{LINEAR}.lora_up.weight": torch.ones(4, 2, dtype=torch.int8)}, "a lora_up of int8"),
        (kohya(lora_mid=drawn(1)) | {f"{LINEAR}.lora_mid.weight": drawn(3, 2, 3, 3)}, "shapes that do not fit"),
        (named({"hada_w1_a": (4, 3), "hada_w1_b": (2, 6), "hada_w2_a": (4, 3), "hada_w2_b": (2, 6)}), "shapes that do not fit"),
        (named({"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 3)}), "shapes that do not fit"),
        (kohya(alpha=torch.tensor(float("nan"))), "not one finite number"),
        (kohya(alpha=torch.tensor(float("inf"))), "not one finite number"),
        (kohya(alpha=drawn(2)), "not one finite number"),
        (kohya() | {f"unet.{Q}.lora_A.weight": drawn(2, 6)}, "the same weight twice"),
        ({f"unet.{Q}.lora_A.one.weight": drawn(2, 6), f"unet.{Q}.lora_A.two.weight": drawn(2, 6)}, "the same weight twice"),
        (kohya(TEXT) | kohya(TEXT.replace("te1", "te")), "the same weight twice"),
    ],
)
def test_what_cannot_be_understood_is_refused_in_one_sentence(tensors: dict[str, Tensor], sentence: str) -> None:
    assert sentence in refusal(tensors)


def test_alpha_0_is_stated_and_is_no_error() -> None:
    parsed = parse(kohya(alpha=torch.tensor(0.0)) | kohya(TEXT, alpha=torch.tensor(0.0), dora_scale=drawn(4, 1)))
    assert parsed.warnings == (f"x.safetensors: 1 of 2 modules have alpha 0 and change nothing, such as {LINEAR}.",)


def test_alpha_of_a_direct_lokr_is_not_a_scale() -> None:
    parsed = parse(named({"lokr_w1": (2, 2), "lokr_w2": (2, 3)}) | {f"{LINEAR}.alpha": torch.tensor(0.0)})
    found = deltas.delta(parsed.modules[LINEAR], torch.zeros(4, 6))
    assert found is not None
    np.testing.assert_allclose(found.numpy(), np.kron(drawn(2, 2).numpy(), drawn(2, 3).numpy()), atol=1e-6)
    assert parsed.warnings == ()


# Damage


def every_form() -> dict[str, Tensor]:
    def stem(i: int) -> str:
        return f"lora_unet_up_blocks_1_attentions_0_transformer_blocks_{i}_attn1_to_q"

    forms: list[dict[str, tuple[int, ...]]] = [
        {"lora_down.weight": (2, 6), "lora_up.weight": (4, 2), "dora_scale": (1, 6)},
        {"lora_down.weight": (2, 6, 1, 1), "lora_up.weight": (4, 2, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "alpha": ()},
        {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6), "alpha": (1,)},
        {"hada_w1_a": (2, 4), "hada_w1_b": (2, 6), "hada_w2_a": (2, 4), "hada_w2_b": (2, 6), "hada_t1": (2, 2, 3, 3),
         "hada_t2": (2, 2, 3, 3)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 3), "diff_b": (4,)},
        {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (1, 2), "lokr_w2_b": (1, 3), "lokr_t2": (1, 1, 3, 3),
         "dora_scale": (4, 1, 1, 1)},
        {"lokr_w1": (2, 2), "lokr_w2": (2, 3, 3, 3)},
        {"diff": (4, 6), "diff_b": (4,)},
    ]  # fmt: skip
    tensors = {key: value for i, form in enumerate(forms) for key, value in named(form, stem(i)).items()}
    return tensors | {
        f"unet.{Q}.lora_A.weight": drawn(2, 6),
        f"unet.{Q}.lora_B.weight": drawn(4, 2),
        f"unet.{Q}.lora_magnitude_vector": drawn(4),
    }


def disturbed(tensors: dict[str, Tensor], chance: random.Random) -> dict[str, Tensor]:
    """The same with one to three keys lost, renamed, exchanged, or of another shape, dtype or value."""
    changed = dict(tensors)
    for _ in range(chance.randrange(1, 4)):
        key, other = chance.choice(list(changed)), chance.choice(list(changed))
        kind = chance.randrange(7)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[key], changed[other] = changed[other], changed[key]
        elif kind == 2:
            changed[key.rpartition(".")[0] + "." + other.rpartition(".")[2]] = changed.pop(key)
        elif kind == 3:
            changed[key] = torch.zeros([chance.randrange(4) for _ in range(chance.randrange(6))])
        elif kind == 4:
            changed[key] = changed[key].unsqueeze(chance.choice([0, -1]))
        elif kind == 5:
            changed[key] = changed[key].to(chance.choice([torch.int64, torch.bool, torch.float8_e5m2]))
        else:
            changed[key] = torch.full_like(changed[key], chance.choice([0.0, float("nan"), float("-inf"), 1e38]))
    return changed


def outcome(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Parsed | str:
    """What was understood, or what the person is told; any other exception fails the test."""
    try:
        return lora_formats.parse(path, tensors, metadata)
    except UserError as problem:
        return str(problem)


def test_all_forms_together_are_understood_and_their_factors_multiply() -> None:
    parsed = parse(every_form())
    assert len(parsed.modules) == 9
    assert (parsed.unknown, parsed.warnings) == ((), ())


def test_a_thousand_disturbed_files_are_understood_or_refused_and_what_is_understood_multiplies() -> None:
    sound, refused = every_form(), 0
    for seed in range(1000):
        tensors = disturbed(sound, random.Random(seed))
        found = outcome(HERE, tensors, {})
        if isinstance(found, str):
            refused += 1
            assert found.isprintable(), seed
            continue
        stems = {key for key in tensors if key not in found.unknown}
        assert stems, seed
        for stem, update in found.modules.items():
            reason = deltas.misfit(update, torch.zeros(4, 6), bias=torch.zeros(4)) or ""
            assert "factors" not in reason, (seed, stem, reason)
    assert 600 < refused < 950


def test_a_thousand_damaged_files_end_in_a_parse_or_a_sentence(tmp_path: Path) -> None:
    content = safetensors.torch.save(every_form(), metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 4}'})
    path, told = tmp_path / "x.safetensors", set()
    for seed in range(1000):
        path.write_bytes(mutated(content, random.Random(seed)))
        try:
            read = weights_file.read(path)
        except UserError:
            continue
        found = outcome(path, read.tensors, read.metadata)
        told.add("parsed" if isinstance(found, Parsed) else "refused")
    assert told == {"parsed", "refused"}
