"""LoRA files: exact in fp16, equal bytes, true hashes, whole or not at all, one sentence for what cannot be read."""

import errno
import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sdlora import files, lora_file
from sdlora.deltas import Full, Hadamard, Kronecker, LowRank, Update
from sdlora.errors import UserError
from sdlora.lora_file import LoRAFile

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
QUERY, KEY, VALUE = f"{ATTENTION}_attn1_to_q", f"{ATTENTION}_attn2_to_k", f"{ATTENTION}_attn2_to_v"
CONV, NORM = "lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_conv_norm_out"
TEXT = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
TEXT_2 = TEXT.replace("te1", "te2")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def update(seed: int = 0, *, rank: int = 4, alpha: float = 2.0, width: int = 6) -> Update:
    return Update(LowRank(drawn(rank, width, seed=seed), drawn(5, rank, seed=seed + 1), alpha))


def header_of(content: bytes) -> tuple[dict[str, str], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])["__metadata__"], content[8 + length :]


def test_round_trip_is_exact_in_fp16_and_bytes_are_equal(tmp_path: Path) -> None:
    modules = {KEY: update(1), QUERY: update(2), TEXT: update(3)}
    metadata = {"ss_output_name": "x", "modelspec.title": "Ü"} | {f"k{i}": str(i) for i in range(30)}
    first, second = (lora_file.to_bytes(modules, metadata, family="sd1") for _ in range(2))
    assert first == second
    files.write(tmp_path / "x.safetensors", first)
    back = lora_file.read(tmp_path / "x.safetensors")
    assert back.metadata.items() >= metadata.items()
    assert (back.ranks, back.alphas, back.layout, back.unknown, back.warnings) == ([4], [2.0], "kohya", (), ())
    assert set(back.modules) == set(modules)
    for stem, one in modules.items():
        found = back.modules[stem].change
        assert isinstance(found, LowRank)
        assert isinstance(one.change, LowRank)
        assert torch.equal(found.down, one.change.down.half())
        assert torch.equal(found.up, one.change.up.half())


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_hashes_are_those_of_the_bytes_after_the_header(layout: str) -> None:
    modules = {QUERY: Update(LowRank(drawn(8, 40_000), drawn(40_000, 8), 8.0))}  # 1.3 MB, so that there is something at 0x100000
    content = lora_file.to_bytes(modules, {}, family="sd1", layout=layout)
    assert content[8:10] == b'{"'
    metadata, data = header_of(content)
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert list(metadata) == sorted(metadata)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_as_asked_and_kept_if_none_is_asked(dtype: torch.dtype, tmp_path: Path) -> None:
    files.write(tmp_path / "x.safetensors", lora_file.to_bytes({QUERY: update()}, {}, family="sd1", dtype=dtype))
    assert {tensor.dtype for tensor in safetensors.torch.load_file(tmp_path / "x.safetensors").values()} == {dtype}
    again = lora_file.to_bytes(lora_file.read(tmp_path / "x.safetensors").modules, {}, family="sd1", dtype=None)
    assert again == (tmp_path / "x.safetensors").read_bytes()


def test_diffusers_scales_never_stand_beside_kohya_alphas() -> None:
    metadata, _ = header_of(lora_file.to_bytes({QUERY: update()}, {"lora_adapter_metadata": "{}", "a": "b"}, family="sd1"))
    assert "lora_adapter_metadata" not in metadata
    assert metadata["a"] == "b"


def test_a_header_that_tools_would_not_read_is_refused() -> None:
    with pytest.raises(UserError, match=r"header would have 1,\d{3},\d{3} bytes.*minimal metadata"):
        lora_file.to_bytes({QUERY: update()}, {"ss_tag_frequency": "x" * (1 << 20)}, family="sd1")


def text(width: int) -> dict[str, Update]:
    return {TEXT: update(width=width), TEXT.replace("q_proj", "k_proj"): update(width=width)}


@pytest.mark.parametrize(
    ("modules", "metadata", "family"),
    [
        *(({KEY: update(width=width)}, {}, family) for width, family in lora_file.FAMILIES.items()),
        ({KEY: update(width=2048), **text(768)}, {"ss_base_model_version": "sd_v1"}, "sdxl"),
        ({KEY: Update(Hadamard(drawn(5, 2), drawn(2, 1024), drawn(5, 2), drawn(2, 1024), 1.0))}, {}, "sd2"),
        ({KEY: Update(Kronecker(drawn(2, 8), (drawn(4, 2), drawn(2, 96)), 1.0))}, {}, "sd1"),
        ({VALUE: Update(Full(drawn(5, 768)))}, {}, "sd1"),
        (text(768), {}, "sd1"),
        (text(768) | {TEXT_2: update(width=1280)}, {}, "sdxl"),
        ({TEXT_2: update(width=1280)}, {}, "sdxl"),
        (text(1024), {}, "sd2"),
        ({QUERY: update(width=320)}, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({QUERY: update(width=320)}, {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2"),
        ({QUERY: update(width=320)}, {"modelspec.architecture": "flux-1-dev/lora"}, "other"),
        ({KEY: update(width=96)}, {}, "other"),
        ({QUERY: update(width=320)}, {}, "other"),
    ],
)
def test_the_family_is_told_by_shapes_and_only_then_by_words(modules: dict[str, Update], metadata: dict[str, str], family: str) -> None:
    assert LoRAFile(modules, metadata).family == family


def test_facts_say_what_a_file_holds_form_by_form(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    low_rank = LowRank(drawn(4, 2048), drawn(5, 4), 2.0)
    modules = {
        QUERY: update(rank=4),
        KEY: Update(low_rank, magnitude=drawn(1, 2048)),
        VALUE: Update(Hadamard(drawn(5, 2), drawn(2, 2048), drawn(5, 2), drawn(2, 2048), 1.0)),
        CONV: Update(LowRank(drawn(8, 6, 3, 3), drawn(5, 8, 1, 1), 2.0)),
        NORM: Update(Full(drawn(5)), bias=drawn(5)),
        TEXT: Update(Kronecker(drawn(2, 2), drawn(3, 3), 1.0)),
        TEXT_2: Update(Full(drawn(5, 6))),
    }
    files.write(path, lora_file.to_bytes(modules, {"modelspec.trigger_phrase": "vitrail", "ss_steps": "9"}, family="sdxl"))
    told = lora_file.facts(path)
    assert told["forms"] == {"LoRA": 1, "DoRA": 1, "LoHa": 1, "LoCon": 1, "norm": 1, "LoKr": 1, "full": 1}
    assert told["modules"] == {"unet": 5, "text_encoder": 1, "text_encoder_2": 1}
    assert (told["family"], told["rank"], told["alpha"], told["dtype"]) == ("sdxl", [2, 4, 8], [1.0, 2.0], "float16")
    assert (told["trigger_words"], told["steps"], told["stated_hash"]) == ("vitrail", "9", "the same")
    assert (told["unknown_keys"], told["unknown_examples"], told["warnings"]) == (0, [], [])
    assert told["parameters"] == sum(tensor.numel() for tensor in safetensors.torch.load_file(path).values()) - 5  # less the alphas


def test_facts_name_what_is_unknown_and_a_hash_that_is_not_the_weights(tmp_path: Path) -> None:
    tensors = {f"{QUERY}.lora_down.weight": drawn(2, 6), f"{QUERY}.lora_up.weight": drawn(5, 2), "lora_unet_other_thing.alpha": drawn(1)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"sshs_model_hash": "abc"})
    told = lora_file.facts(tmp_path / "x.safetensors")
    assert (told["unknown_keys"], told["unknown_examples"]) == (1, ["lora_unet_other_thing.alpha"])
    assert told["stated_hash"] == "abc (not that of these weights)"
    assert (told["rank"], told["alpha"], told["forms"]) == (2, 2.0, {"LoRA": 1})


def test_a_full_disk_leaves_the_earlier_file_and_no_stray_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    files.write(path, b"earlier")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"x\.safetensors could not be written \(No space left on device\).*untouched"):
        files.write(path, b"later")
    assert path.read_bytes() == b"earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.pt", b"PK", "is a pickle"),
        ("x.safetensors", b"\x80\x04pickle!!", "is a pickle"),
        ("x.safetensors", lora_file.to_bytes({QUERY: update()}, {}, family="sd1")[:-20], "is damaged"),
        ("x.safetensors", struct.pack("<Q", 1 << 63) + b"{}", "is damaged"),
        ("x.safetensors", safetensors.torch.save({"weight": torch.zeros(2)}), "holds no LoRA weights"),
        ("x.safetensors", safetensors.torch.save({}), "holds no LoRA weights"),
    ],
    ids=["pickle", "renamed pickle", "truncated", "absurd header", "something else", "empty"],
)
def test_what_cannot_be_read_gets_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        lora_file.read(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        lora_file.read(tmp_path / "missing.safetensors")
