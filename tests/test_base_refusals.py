"""What cannot be opened as a base gets one sentence that says why, and nothing that is missing is ever filled up."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora import base_files
from sdlora.errors import UserError
from tests.bases import FULL, Made, edited, refusal

pytest_plugins = ("tests.base_fixtures",)


# --- refusals -----------------------------------------------------------------------------------------------------------------

UNET = "model.diffusion_model."
KINDS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "inpainting": ({f"{UNET}input_blocks.0.0.weight": (8, 9, 3, 3), "cond_stage_model.transformer.x": (1,)}, "an inpainting model"),
    "pix2pix": ({f"{UNET}input_blocks.0.0.weight": (8, 8, 3, 3), "cond_stage_model.transformer.x": (1,)}, "an instruction model"),
    "refiner": ({f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3), "conditioner.embedders.0.model.ln_final.bias": (1,)}, "the refiner"),
    "sd3": ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (1,)}, "Stable Diffusion 3"),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": (1,)}, "Flux"),
    "lora": ({"lora_unet_mid_block.lora_down.weight": (1, 1)}, "a LoRA, not a base"),
    "peft": ({"unet.mid_block.attn1.to_q.lora_A.weight": (1, 1)}, "a LoRA, not a base"),
    "vae": ({"encoder.conv_in.weight": (1, 1)}, "a VAE alone"),
    "unet": ({f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3)}, "a UNet without text encoder"),
    "diffusers unet": ({"down_blocks.0.resnets.0.conv1.weight": (1, 1)}, "a UNet alone in diffusers' layout"),
    "controlnet": ({"control_model.input_blocks.0.0.weight": (1, 1)}, "a ControlNet"),
    "word": ({"emb_params": (1, 768)}, "a textual inversion"),
    "anything": ({"layer.weight": (1,)}, "no Stable Diffusion checkpoint"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_told_by_its_name(kind: str, tmp_path: Path) -> None:
    shapes, words = KINDS[kind]
    path = tmp_path / "it.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    sentence = refusal(path)
    assert sentence.startswith(str(path))
    assert words in sentence
    with pytest.raises(UserError, match=r"it\.safetensors"):
        base_files.identify(str(path))


def test_names_that_mean_nothing_are_refused_with_what_is_allowed(tmp_path: Path, attempts: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02")
    assert "pickle" in refusal(tmp_path / "model.ckpt")
    assert "model_index.json" in refusal(tmp_path / "empty")
    assert "is unknown" in refusal("no such base")
    assert "does not exist" in refusal(tmp_path / "gone.safetensors")
    assert attempts == []


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_incomplete_or_foreign_checkpoint_is_never_filled_up(family: str, made: Made, tmp_path: Path) -> None:
    folder, path = made(family)
    tensors = load_file(path)
    cases = {
        "lacks 1 of": {key: one for key, one in tensors.items() if not key.endswith("middle_block.0.in_layers.2.bias")},
        "no Stable Diffusion of its family has": tensors | {f"{UNET}input_blocks.3.0.strange.weight": torch.zeros(1)},
        "of shape [7]": tensors | {f"{UNET}time_embed.0.bias": torch.zeros(7)},
        "quantised": tensors | {f"{UNET}time_embed.0.bias": tensors[f"{UNET}time_embed.0.bias"].to(torch.int8)},
        "brings no vae": {key: one for key, one in tensors.items() if not key.startswith("first_stage_model.")},
        "unet that cannot be understood": {key: one for key, one in tensors.items() if "attn2.to_k" not in key},
    }
    for words, kept in cases.items():
        save_file(kept, tmp_path / "it.safetensors")
        assert words in refusal(tmp_path / "it.safetensors", tokenizer=str(folder))


def test_a_family_that_the_keys_or_configs_contradict_is_refused(made: Made) -> None:
    folder, path = made("sd1")
    assert "cannot be opened as sdxl" in refusal(path, family="sdxl")
    assert "cannot be opened as sdxl" in refusal(folder, family="sdxl")
    assert base_files.load(str(folder), family="sd2", **FULL).family == "sd2"
    assert "Family 'sd9' is unknown" in refusal(folder, family="sd9")
    assert "Prediction 'v' is unknown; give one of auto, epsilon, v_prediction, sample" in refusal(path, prediction="v")


ABSURD: list[tuple[str, dict[str, Any], str]] = [
    ("unet/config.json", {"layers_per_block": 10**9}, "1,000,000,000 layers"),
    ("unet/config.json", {"block_out_channels": []}, "cannot be built"),
    ("unet/config.json", {"block_out_channels": [10**7] * 4}, "its config asks for"),
    ("unet/config.json", {"attention_head_dim": 0}, "cannot be built"),
    ("unet/config.json", {"attention_head_dim": "eight"}, "cannot be built"),
    ("unet/config.json", {"cross_attention_dim": None}, "cross_attention_dim is None"),
    ("unet/config.json", {"cross_attention_dim": 64}, "its config asks for"),
    ("unet/config.json", {"in_channels": 9}, "inpainting"),
    ("unet/config.json", {"sample_size": None}, "sample_size None"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "without text_encoder_2"),
    ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "1,000,000,000 layers"),
    ("text_encoder/config.json", {"num_hidden_layers": 4}, "lacks 16 of"),
    ("text_encoder/config.json", {"hidden_act": "loud"}, "cannot be built"),
    ("text_encoder/config.json", {"vocab_size": 10}, "its config asks for"),
    ("vae/config.json", {"scaling_factor": 0}, "scaling_factor 0"),
    ("vae/config.json", {"scaling_factor": "much"}, "scaling_factor 'much'"),
    ("vae/config.json", {"down_block_types": ["Unheard"] * 4}, "cannot be built"),
    ("scheduler/scheduler_config.json", {"beta_start": "low"}, "beta 'low'"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "1000000000000 timesteps"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "curly"}, "noise schedule 'curly' is unknown"),
    ("scheduler/scheduler_config.json", {"beta_schedule": {}}, "form {}"),
    ("scheduler/scheduler_config.json", {"steps_offset": "x"}, "steps_offset 'x'"),
    ("vae/config.json", {"norm_num_groups": -1}, "norm_num_groups -1"),
    ("text_encoder/config.json", {"num_attention_heads": -1}, "num_attention_heads -1"),
    ("unet/config.json", {"downsample_padding": -1}, "downsample_padding -1"),
    ("unet/config.json", {"mid_block_scale_factor": None}, "mid_block_scale_factor None"),
    ("scheduler/scheduler_config.json", {"prediction_type": "fortune"}, "prediction_type 'fortune'"),
    ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "inpainting"),
    ("model_index.json", {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}, "FluxPipeline"),
    ("model_index.json", {"text_encoder": [None, None]}, "0 text encoders"),
    ("model_index.json", {"vae": None}, "no vae"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "change", "words"), ABSURD, ids=lambda value: str(value)[:40])
def test_absurd_configs_get_one_sentence(file: str, change: dict[str, Any], words: str, made: Made, tmp_path: Path) -> None:
    folder = edited(made("sd1")[0], tmp_path / "base", file, lambda values: values | change)
    assert words in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", '"text"', "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_config_that_is_no_json_object_gets_one_sentence(file: str, text: str, made: Made, tmp_path: Path) -> None:
    assert file in refusal(edited(made("sd1")[0], tmp_path / "base", file, lambda _: text))


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("text_encoder_2/config.json", "text_encoder_2/config.json is missing"),
        ("text_encoder_2/model.safetensors", "holds no model.safetensors"),
        ("unet/diffusion_pytorch_model.safetensors", "holds no diffusion_pytorch_model.safetensors"),
        ("tokenizer_2/tokenizer.json", "holds no tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused_by_the_files_name(gone: str, words: str, made: Made, tmp_path: Path) -> None:
    folder = edited(made("sdxl")[0], tmp_path / "base", "model_index.json", lambda _: None)
    (folder / gone).unlink()
    assert words in refusal(folder)


def test_a_folder_of_pickles_is_refused(made: Made, tmp_path: Path) -> None:
    folder = edited(made("sd1")[0], tmp_path / "base", "model_index.json", lambda _: None)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "pickles, which can run code" in refusal(folder)


def test_the_refiners_folder_is_called_by_its_name(made: Made, tmp_path: Path) -> None:
    folder = edited(made("sdxl")[0], tmp_path / "base", "model_index.json", lambda values: values | {"text_encoder": [None, None]})
    assert "refiner" in refusal(folder)
