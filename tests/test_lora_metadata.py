"""What a file says of itself: the exact words that loaders look for, nothing that is not known, no more than asked for."""

import json

import pytest

from sdlora import lora_metadata
from sdlora.lora_metadata import Folder, Story

FULL = Story(
    "vitrail", "sdxl", rank=8, alpha=4.0, network_args={"conv_dim": 8}, base="/home/ada/bases/sdxl.safetensors", base_hash="ab" * 32,
    base_legacy_hash="12345678", steps=600, epochs=12, seed=0, batch=4, resolution_px=(1024, 768),
    buckets={(1024, 768): 20, (768, 1024): 3},
    folders=(Folder("/home/ada/church", 20, 10, {"glass": 20, "saint": 3}), Folder("C:\\Users\\Ada\\church", 3)), unet_rate=1e-4,
    text_encoder_rate=5e-5, optimizer="adamw", schedule="cosine", precision="bf16", clip_skip=2, min_snr_gamma=5.0, noise_offset=0.05,
    started_s=1_700_000_000.0, finished_s=1_700_003_600.5, trigger="vitrail", author="Ada", description="Windows", license="CC0-1.0",
    tags=("style", "glass"), usage_hint="0.8", merged_from=("a", "b"), thumbnail="data:image/jpeg;base64,AAAA",
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "prediction", "version", "v2", "architecture", "predicts"),
    [
        ("sd1", "epsilon", "sd_v1", "False", "stable-diffusion-v1/lora", "epsilon"),
        ("sd1", "v_prediction", "sd_v1_v", "False", "stable-diffusion-v1/lora", "v"),
        ("sd2", "epsilon", "sd_v2", "True", "stable-diffusion-v2-512/lora", "epsilon"),
        ("sd2", "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "v"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "epsilon"),
        ("sdxl", "v_prediction", "sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "v"),
        ("mini", "epsilon", "mini", "False", "mini/lora", "epsilon"),
    ],
)
def test_families_are_called_as_loaders_call_them(
    family: str, prediction: str, version: str, v2: str, architecture: str, predicts: str
) -> None:
    for minimal in (False, True):
        found = lora_metadata.build(Story("x", family, prediction), minimal=minimal)
        assert (found["ss_base_model_version"], found["ss_v2"]) == (version, v2)
        assert (found["modelspec.architecture"], found["modelspec.prediction_type"]) == (architecture, predicts)
        assert (found["ss_output_name"], found["modelspec.title"], found["ss_network_module"]) == ("x", "x", "networks.lora")


def test_every_value_is_text_in_the_form_that_info_panels_read() -> None:
    found = lora_metadata.build(FULL)
    assert all(isinstance(value, str) and value for value in found.values())
    assert json.loads(found["ss_dataset_dirs"]) == {
        "church": {"n_repeats": 10, "img_count": 20},
        "church 2": {"n_repeats": 1, "img_count": 3},
    }
    assert json.loads(found["ss_tag_frequency"]) == {"church": {"glass": 20, "saint": 3}}
    assert json.loads(found["ss_bucket_info"])["buckets"]["1"] == {"resolution": [1024, 768], "count": 20}
    assert json.loads(found["ss_network_args"]) == {"conv_dim": 8}
    assert found["ss_num_train_images"] == "203"
    assert (found["ss_seed"], found["ss_steps"], found["ss_resolution"]) == ("0", "600", "(1024, 768)")
    assert (found["modelspec.resolution"], found["modelspec.date"]) == ("1024x768", "2023-11-14T23:13:20Z")
    assert (found["ss_training_started_at"], found["ss_training_finished_at"]) == ("1700000000.0", "1700003600.5")
    assert (found["ss_sd_model_name"], found["ss_new_sd_model_hash"], found["ss_sd_model_hash"]) == (
        "sdxl.safetensors", "ab" * 32, "12345678",
    )  # fmt: skip
    assert (found["modelspec.trigger_phrase"], found["modelspec.tags"], found["modelspec.merged_from"]) == (
        "vitrail", "style, glass", "a, b",
    )  # fmt: skip


def test_the_way_to_a_folder_is_never_written() -> None:
    text = json.dumps(lora_metadata.build(FULL))
    assert "home" not in text
    assert "Users" not in text


def test_minimal_metadata_holds_no_word_of_data_settings_or_author() -> None:
    found = lora_metadata.build(FULL, minimal=True)
    assert set(found) == {
        "ss_output_name", "ss_base_model_version", "ss_v2", "ss_network_module", "ss_network_dim", "ss_network_alpha",
        "modelspec.sai_model_spec", "modelspec.title", "modelspec.architecture", "modelspec.prediction_type", "modelspec.implementation",
    }  # fmt: skip


def test_what_is_not_known_is_left_out_and_equal_stories_are_equal() -> None:
    found = lora_metadata.build(Story("x", "sd1"))
    assert not {key for key in found if "date" in key or key.endswith("_at") or "tag" in key or "hash" in key}
    assert "ss_seed" not in found
    assert found == lora_metadata.build(Story("x", "sd1"))


def test_the_sidecar_puts_the_trigger_into_the_prompt_of_web_uis() -> None:
    told = lora_metadata.sidecar("sd2", trigger="vitrail", strength=0.8, negative="blurry", description="Windows", notes="made here")
    assert told == {
        "description": "Windows", "sd version": "SD2", "activation text": "vitrail", "preferred weight": 0.8, "negative text": "blurry",
        "notes": "made here",
    }  # fmt: skip
    assert [lora_metadata.sidecar(family)["sd version"] for family in ("sd1", "sdxl", "mini")] == ["SD1", "SDXL", "Unknown"]
