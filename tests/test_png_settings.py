"""The settings in a picture: twenty texts as A1111 and Forge write them are read, and ours come back exactly as they were."""

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora import png_settings

CAT = "a cat, (red:1.2)"
LINE = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512"
TEXTS: list[tuple[str, dict[str, Any]]] = [
    (f"{CAT}\nNegative prompt: blurry\n{LINE}", {"prompt": CAT, "negative": "blurry", "sampler": "Euler a", "size_px": (512, 512)}),
    (f"{CAT}\n{LINE}", {"prompt": CAT, "negative": ""}),
    (LINE, {"prompt": "", "Steps": "20"}),
    (f"Negative prompt: blurry\n{LINE}", {"prompt": "", "negative": "blurry"}),
    (f"a cat,\nred\n\nNegative prompt: blurry,\ngrey\n{LINE}", {"prompt": "a cat,\nred\n", "negative": "blurry,\ngrey"}),
    (
        f"{CAT}\nSteps: 28, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 4294967295, Size: 512x768, Model hash: 6ce01616, Model: v1-5, "
        "Clip skip: 2, ENSD: 31337",
        {"sampler": "DPM++ 2M", "schedule": "Karras", "Model": "v1-5", "Clip skip": "2", "Seed": "4294967295", "size_px": (512, 768)},
    ),
    (
        f"{CAT}\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 1024x1024, Version: v1.10.1",
        {"sampler": "DPM++ 2M", "schedule": "Karras", "Version": "v1.10.1"},
    ),
    (
        f"{CAT}\nSteps: 20, Sampler: DPM++ 2M SDE, Schedule type: SGM Uniform, CFG scale: 7, Seed: 1, Size: 64x64",
        {"sampler": "DPM++ 2M SDE", "schedule": "SGM Uniform"},
    ),
    (f"{CAT}\nSteps: 20, Sampler: DPM++ 2M SDE Exponential, CFG scale: 7, Seed: 1", {"sampler": "DPM++ 2M SDE", "schedule": "Exponential"}),
    (
        f'a cat <lora:one:0.8> <lora:two:1>\n{LINE}, Lora hashes: "one: 0123456789ab, two: ba9876543210", Version: v1.6.0',
        {"prompt": "a cat <lora:one:0.8> <lora:two:1>", "lora_hashes": {"one": "0123456789ab", "two": "ba9876543210"}},
    ),
    (
        f"{CAT}\n{LINE}, Denoising strength: 0.7, Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent (bicubic antialiased)",
        {"Denoising strength": "0.7", "Hires upscale": "2", "Hires upscaler": "Latent (bicubic antialiased)"},
    ),
    (f"{CAT}\n{LINE}, Denoising strength: 0.7, Mask blur: 4, Inpaint area: Only masked", {"Mask blur": "4", "Inpaint area": "Only masked"}),
    (
        f'{CAT}\n{LINE}, Hires prompt: "a cat, more fur: much", Hires upscaler: R-ESRGAN 4x+',
        {"Hires prompt": "a cat, more fur: much", "Hires upscaler": "R-ESRGAN 4x+"},
    ),
    (
        f'{CAT}\n{LINE}, ControlNet 0: "Module: canny, Model: control_v11p_sd15_canny [d14c016b], Weight: 1", Version: v1.5.2',
        {"ControlNet 0": "Module: canny, Model: control_v11p_sd15_canny [d14c016b], Weight: 1", "Version": "v1.5.2"},
    ),
    (
        f'{CAT}\n{LINE}, Wildcard prompt: "a __pet__,\\n\\"red\\"", Batch size: 4, Batch pos: 2',
        {"Wildcard prompt": 'a __pet__,\n"red"', "Batch pos": "2"},
    ),
    (
        f"{CAT}\n{LINE}, Variation seed: 12, Variation seed strength: 0.3, Seed resize from: 512x512, Face restoration: CodeFormer",
        {"Variation seed": "12", "Face restoration": "CodeFormer"},
    ),
    (
        f"{CAT}\nNegative prompt: blurry\nSteps: 20, Sampler: Euler, Schedule type: Beta, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 7, "
        "Size: 896x1152, Model hash: c161224931, Model: flux, Diffusion in Low Bits: Automatic (fp16 LoRA), Version: "
        "f2.0.1v1.10.1-previous-634-g37301b22, Module 1: ae, Module 2: clip_l",
        {"schedule": "Beta", "Distilled CFG Scale": "3.5", "Version": "f2.0.1v1.10.1-previous-634-g37301b22", "Module 2": "clip_l"},
    ),
    (
        f"{CAT}\n{LINE}, Hires Module 1: Use same choices, Hires CFG Scale: 5, Hires upscale: 1.5",
        {"Hires Module 1": "Use same choices", "Hires upscale": "1.5"},
    ),
    (f"{CAT}\n{LINE}, TI hashes: \"easynegative: c74b4e810b03\", Eta: 0.67, RNG: CPU", {"RNG": "CPU", "Eta": "0.67"}),
    (f"  {CAT}  \r\nNegative prompt:blurry  \r\n{LINE}\r\n", {"prompt": CAT, "negative": "blurry", "Seed": "1"}),
    (f"time: 12, place: here\n고양이, 빨강\n{LINE}", {"prompt": "time: 12, place: here\n고양이, 빨강"}),
    ("a cat\nNegative prompt: blurry", {"prompt": "a cat", "negative": "blurry", "values": {}}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_texts_of_a1111_and_forge_are_read(text: str, expected: dict[str, Any]) -> None:
    told = png_settings.read(text)
    assert told is not None
    for key, value in expected.items():
        assert (getattr(told, key) if hasattr(told, key) else told.values[key]) == value, key


def test_what_is_no_settings_text_is_none() -> None:
    for text in ("", "a comment of the photographer", "Steps: 20, Seed: 1", "a: 1\nb: 2\nc: 3"):
        assert png_settings.read(text) is None


def test_numbers_are_numbers_or_nothing() -> None:
    told = png_settings.read(f"x\n{LINE}, CFG scale: nan, Clip skip: 2.5, Denoising strength: 1e-1, Hires upscale: 1e999")
    assert told is not None
    assert (told.number("Seed"), told.whole("Seed"), told.number("Denoising strength")) == (1.0, 1, 0.1)
    assert [told.number(key) for key in ("CFG scale", "Hires upscale", "Nothing", "Sampler")] == [None] * 4
    assert told.whole("Clip skip") is None


VALUES = {"Steps": 20, "Sampler": "Euler a", "CFG scale": 7.5, "Seed": 1}


def test_a_plain_text_looks_as_others_write_it() -> None:
    assert png_settings.write("a cat", "blurry", VALUES | {"Lora hashes": "a: 0123456789ab"}) == (
        'a cat\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 1, Lora hashes: "a: 0123456789ab"'
    )


HARD = st.text(alphabet='ab,:"\\ \n\r\t()<>é猫{}[]Steps: 1', max_size=40)


@settings(max_examples=300, deadline=None)
@given(HARD, HARD, HARD)
def test_prompts_and_values_come_back_exactly(prompt: str, negative: str, value: str) -> None:
    told = png_settings.read(png_settings.write(prompt, negative, VALUES | {"Sdlora note": value}))
    assert told is not None
    assert (told.prompt, told.negative, told.values["Sdlora note"]) == (prompt, negative, value)
    assert told.whole("Steps") == 20


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a\nNegative prompt: b", ""), ("a", "b\nSteps: 1, Seed: 2, Size: 3x4"), (" a ", "b\n\n"), ("a: 1, bb: 2, cc: 3", ""),
        ("", "Negative prompt: x"),
    ],
)  # fmt: skip
def test_prompts_that_look_like_the_format_come_back_exactly(prompt: str, negative: str) -> None:
    told = png_settings.read(png_settings.write(prompt, negative, VALUES))
    assert told is not None
    assert (told.prompt, told.negative) == (prompt, negative)


def test_a_hostile_text_takes_no_time() -> None:
    began_s = time.process_time()
    for text in (
        "a" * 200_000,
        "a " * 100_000,
        ' "' * 100_000,
        'ab:"\\' * 50_000,
        " " * 200_000 + "x",
        ("ab:" * 66_000),
        "\n" * 200_000 + "x",
    ):
        told = png_settings.read(f"x\nNegative prompt: y\n{text}")
        assert told is None or told.lora_hashes is not None
        told = png_settings.read(f'x\n{LINE}, Lora hashes: "{text}"')
        assert told is None or told.lora_hashes is not None
    assert time.process_time() - began_s < 60  # hours if it grew with the square; seconds on a slow processor
