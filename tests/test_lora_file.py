"""LoRA files: names and numbers as diffusers reads them, equal bytes, whole or not at all, one sentence for what cannot be read."""

import errno
import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft

from sdlora import files, lora, lora_file
from sdlora.errors import UserError
from sdlora.lora_file import LoRAModule


def module(seed: int = 0, *, rank: int = 4, alpha: float = 2.0) -> LoRAModule:
    generator = torch.Generator().manual_seed(seed)
    return LoRAModule(torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator), alpha)


def sd15_unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)


def test_every_attention_linear_of_sd15_has_the_stem_that_diffusers_expects() -> None:
    unet = sd15_unet()
    places = lora.matching(unet, ["*.attn?.to_q", "*.attn?.to_k", "*.attn?.to_v", "*.attn?.to_out.0"])
    assert len(places) == 128
    tensors = {}
    for name in places:
        weight = lora.base_weight(unet.get_submodule(name))
        pair = LoRAModule(torch.zeros(4, weight.shape[1]), torch.zeros(weight.shape[0], 4), 4.0)
        tensors |= lora_file.tensors_of({lora_file.unet_stem(name): pair})
    converted = convert_unet_state_dict_to_peft(StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=unet.config)[0])
    expected = {f"unet.{name}.lora_{side}.weight" for name in places for side in "AB"}
    assert set(converted) == expected


def test_text_encoder_stems_are_fixed_text_with_and_without_the_old_prefix() -> None:
    stem = "lora_te_text_model_encoder_layers_3_self_attn_out_proj"
    assert lora_file.text_stem("encoder.layers.3.self_attn.out_proj") == stem
    assert lora_file.text_stem("text_model.encoder.layers.3.self_attn.out_proj") == stem
    assert lora_file.text_stem("encoder.layers.11.mlp.fc2") == "lora_te_text_model_encoder_layers_11_mlp_fc2"
    with pytest.raises(ValueError, match="no LoRA file stem"):
        lora_file.text_stem("embeddings.token_embedding")


def test_round_trip_is_exact_in_fp16_and_bytes_are_equal(tmp_path: Path) -> None:
    modules = {"lora_unet_b": module(1), "lora_unet_a": module(2)}
    metadata = {"ss_output_name": "x", "modelspec.title": "Ü"} | {f"k{i}": str(i) for i in range(30)}
    first, second = (lora_file.to_bytes(modules, metadata) for _ in range(2))
    assert first == second
    files.write(tmp_path / "x.safetensors", first)
    back = lora_file.read(tmp_path / "x.safetensors")
    assert back.metadata.items() >= metadata.items()
    assert (back.ranks, back.alphas) == ([4], [2.0])
    for stem, one in modules.items():
        assert torch.equal(back.modules[stem].down, one.down.half())
        assert torch.equal(back.modules[stem].up, one.up.half())


def test_hashes_are_those_of_the_bytes_after_the_header(tmp_path: Path) -> None:
    content = lora_file.to_bytes({"lora_unet_a": module()}, {})
    (length,) = struct.unpack("<Q", content[:8])
    assert content[8:10] == b'{"'
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[8 + length :]).hexdigest()
    assert length < 1 << 20


def test_mixed_ranks_and_alphas_become_one_alpha_with_the_same_update() -> None:
    modules = {
        "lora_unet_a": module(1, rank=4, alpha=2),
        "lora_unet_b": module(2, rank=8, alpha=8),
        "lora_unet_c": module(3, rank=2, alpha=6),
    }
    tensors = lora_file.tensors_of(modules, dtype=torch.float32)
    assert len({tensors[f"{stem}.alpha"].item() for stem in modules}) == 1
    for stem, one in modules.items():
        wanted = one.alpha / one.down.shape[0] * one.up @ one.down
        down, up, alpha = (tensors[f"{stem}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        torch.testing.assert_close(alpha / down.shape[0] * up @ down, wanted, atol=1e-5, rtol=1e-5)


def test_weights_that_are_not_finite_are_never_written() -> None:
    broken = LoRAModule(torch.full((2, 3), 1e6), torch.zeros(3, 2), 1.0)
    with pytest.raises(ValueError, match="not finite"):
        lora_file.to_bytes({"lora_unet_a": broken}, {})


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
        ("x.pt", b"PK", "is not a .safetensors file"),
        ("x.safetensors", b"\x80\x04pickle", "is damaged"),
        ("x.safetensors", lora_file.to_bytes({"lora_unet_a": module()}, {})[:-20], "is damaged"),
        ("x.safetensors", struct.pack("<Q", 1 << 63) + b"{}", "is damaged"),
        ("x.safetensors", safetensors.torch.save({"weight": torch.zeros(2)}), "without a matching pair"),
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
