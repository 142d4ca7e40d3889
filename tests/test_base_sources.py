"""Variants, shards, another VAE, tokenizers and the hub: what is read, what is fetched, and what is said when it is not there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from sdlora import base_files, base_model, base_parts, base_sources, hub, tokenizer_files
from tests import tiny_families
from tests.bases import CPU, FULL, Made, assert_same_weights, edited, refusal

pytest_plugins = ("tests.base_fixtures",)


# --- variants and shards ------------------------------------------------------------------------------------------------------


def halved(folder: Path, *, keep_full: bool) -> None:
    """Every part gets an fp16 variant, a little different from the full weights so that one sees which was read."""
    for path in list(folder.rglob("*.safetensors")):
        tensors = {key: (tensor * 1.5).half() for key, tensor in load_file(path).items()}
        save_file(tensors, path.with_suffix(".fp16.safetensors"))
        if not keep_full:
            path.unlink()


@pytest.mark.parametrize(
    ("keep_full", "dtype", "expected"), [(True, torch.bfloat16, "fp16"), (True, torch.float32, ""), (False, torch.float32, "fp16")]
)
def test_the_fp16_variant_is_read_where_16_bits_are_enough_or_nothing_else_is_there(
    keep_full: bool, dtype: torch.dtype, expected: str, made: Made, tmp_path: Path
) -> None:
    folder = edited(made("sd1")[0], tmp_path / "base", "model_index.json", lambda _: None)
    halved(folder, keep_full=keep_full)
    base = base_files.load(str(folder), device=CPU, dtype=dtype)
    full = base_files.load(str(made("sd1")[0]), device=CPU, dtype=dtype)
    factor = (base.unet.conv_in.weight / full.unet.conv_in.weight).median().item()
    assert factor == pytest.approx(1.5 if expected else 1, rel=0.01)
    identity = base_files.identify(str(folder), dtype=dtype)
    assert identity.variant == expected
    assert ("fp16" in identity.sentence) == bool(expected)
    assert [path.name for path in base.weights] == [f"diffusion_pytorch_model{'.fp16' if expected else ''}.safetensors"]


@pytest.mark.parametrize("index", ["diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.fp16.json"])
def test_weights_in_several_files_are_one_base_and_a_missing_one_is_named(index: str, made: Made, tmp_path: Path) -> None:
    folder = edited(made("sd1")[0], tmp_path / "base", "model_index.json", lambda _: None)
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = {key: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({key: tensor for key, tensor in tensors.items() if names[key] == name}, whole.with_name(name))
    whole.with_name(index).write_text(json.dumps({"weight_map": names}))
    base = base_files.load(str(folder), **FULL)
    assert_same_weights(base, base_files.load(str(made("sd1")[0]), **FULL))
    assert len(base.weights) == 2
    base.weights[1].unlink()
    assert "'diffusion_pytorch_model-00002-of-00002.safetensors', which is not there" in refusal(folder)
    whole.with_name(index).write_text(json.dumps({"weight_map": {"x": "../../elsewhere.safetensors"}}))
    assert "which is not there" in refusal(folder)


# --- another VAE --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_vae(made: Made, tmp_path: Path) -> dict[str, Path]:
    """One VAE in every form: folders, and files in diffusers' layout of today and before, the original's, and a whole checkpoint."""
    pipeline = tiny_families.make_folder("sd1", tmp_path / "pipeline", seed=5)
    weights = load_file(pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    files = {
        "diffusers": weights,
        "old": {_renamed(key, old): tensor for key, tensor in weights.items()},
        "original": tiny_families.original_vae(weights),
        "prefixed": tiny_families.prefixed("first_stage_model.", tiny_families.original_vae(weights)),
    }
    for name, tensors in files.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
    forms = {name: tmp_path / f"{name}.safetensors" for name in files} | {"folder": pipeline / "vae", "pipeline": pipeline}
    return forms | {"checkpoint": tiny_families.make_single_file("sd1", pipeline, tmp_path / "checkpoint.safetensors")}


def _renamed(key: str, names: dict[str, str]) -> str:
    for here, there in names.items():
        key = key.replace(f"attentions.0.{here}.", f"attentions.0.{there}.")
    return key


def test_another_vae_is_taken_from_every_form(other_vae: dict[str, Path], made: Made) -> None:
    folder, path = made("sd1")
    expected = AutoencoderKL.from_pretrained(other_vae["folder"]).state_dict()
    for form, vae in other_vae.items():
        base = base_files.load(str(path if form == "old" else folder), vae=str(vae), tokenizer=str(folder), **FULL)
        assert all(torch.equal(expected[key], tensor) for key, tensor in base.vae.state_dict().items()), form
        assert base.scaling == 0.18215
    own = base_files.load(str(folder), **FULL).vae.state_dict()
    assert not torch.equal(own["encoder.conv_in.weight"], expected["encoder.conv_in.weight"])


def test_a_checkpoint_without_vae_opens_with_one_given(other_vae: dict[str, Path], made: Made, tmp_path: Path) -> None:
    folder, _ = made("sd1")
    path = tiny_families.make_single_file("sd1", folder, tmp_path / "bare.safetensors", without="first_stage_model.")
    assert "brings no vae; give one as the VAE beside it" in refusal(path, tokenizer=str(folder))
    base = base_files.load(str(path), vae=str(other_vae["original"]), tokenizer=str(folder), **FULL)
    assert base_model.decode(base, torch.zeros(1, 4, 8, 8)).shape == (1, 3, 64, 64)


def test_a_vae_for_other_latents_is_refused(other_vae: dict[str, Path], made: Made, tmp_path: Path) -> None:
    folder, _ = made("sdxl")
    assert "scales latents by 0.18215 and the base's by 0.13025" in refusal(folder, vae=str(other_vae["folder"]))
    wide = load_file(other_vae["original"])
    wide["decoder.conv_in.weight"] = wide["decoder.conv_in.weight"].repeat(1, 4, 1, 1)
    save_file(wide, tmp_path / "wide.safetensors")
    assert "wide.safetensors" in refusal(folder, vae=str(tmp_path / "wide.safetensors"))
    assert "which Stable Diffusion's VAE does not have" in refusal(folder, vae=str(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    assert "VAE 'nowhere' is unknown" in refusal(folder, vae="nowhere")


# --- tokenizers ---------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_nowhere_is_asked_for_once_and_then_the_sentence_says_what_to_do(
    made: Made, tmp_path: Path, attempts: list[str]
) -> None:
    _, path = made("sd1")
    lonely = tmp_path / "alone" / "base.safetensors"
    lonely.parent.mkdir()
    lonely.symlink_to(path)
    sentence = refusal(lonely)
    assert f"put vocab.json and merges.txt of openai/clip-vit-large-patch14 into {lonely.parent / 'tokenizer'}" in sentence
    assert attempts


@pytest.mark.parametrize("place", ["tokenizer", ".", "base"])
def test_a_tokenizer_beside_the_file_is_found_and_padded_as_the_family_was_trained(
    place: str, made: Made, tmp_path: Path, attempts: list[str]
) -> None:
    _, path = made("sd2")
    (tmp_path / "base.safetensors").symlink_to(path)
    tiny_families.build_tokenizer(tmp_path / place)  # vocab.json and merges.txt, which say nothing of padding
    base = base_files.load(str(tmp_path / "base.safetensors"), **FULL)
    assert [one.pad_token for one in base.tokenizers] == ["!"]
    assert base.tokenizers[0].model_max_length == 77
    assert attempts == []


def test_a_tokenizer_of_another_vocabulary_is_refused(made: Made, tmp_path: Path) -> None:
    _, path = made("sd1")
    words = tiny_families.tokenizer(tmp_path / "more", pad="!")
    words.add_tokens([f"word{i}" for i in range(40)])
    words.save_pretrained(tmp_path / "more")
    assert "has 671 words, but the text encoder knows 631" in refusal(path, tokenizer=str(tmp_path / "more"))
    assert "is no folder with vocab.json" in refusal(path, tokenizer=str(tmp_path))
    (tmp_path / "more" / "tokenizer.json").write_text("{")
    assert "cannot be opened" in refusal(path, tokenizer=str(tmp_path / "more"))


# --- the hub ------------------------------------------------------------------------------------------------------------------


def in_cache(cache: Path, name: str, folder: Path) -> Path:
    """A repository as the hub's client leaves it in its cache."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40), copy_function=lambda source, goal: Path(goal).symlink_to(source))
    return place


def test_a_hub_base_in_the_cache_opens_without_any_request(made: Made, tmp_path: Path, attempts: list[str]) -> None:
    folder, path = made("sdxl")
    in_cache(tmp_path / "cache", "someone/some-xl", folder)
    assert base_files.identify("someone/some-xl").form == "hub"
    base = base_files.load("someone/some-xl", **FULL)
    assert_same_weights(base, base_files.load(str(folder), **FULL))
    in_cache(tmp_path / "cache", tokenizer_files.SOURCE, folder / "tokenizer")
    assert base_files.load(str(path), **FULL).tokenizers[1].pad_token == "!"
    assert base_files.load(str(path), vae="someone/some-xl", tokenizer="someone/some-xl", **FULL).scaling == 0.13025
    assert attempts == []


def test_a_hub_base_that_cannot_be_had_is_one_sentence(attempts: list[str]) -> None:
    sentence = refusal("someone/unknown")
    assert "'someone/unknown' is neither a folder here nor in the Hugging Face cache" in sentence
    assert attempts


def test_only_what_is_needed_is_fetched(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: list[str]) -> None:
    folder, _ = made("sd1")
    parts = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "safety_checker": "model"}
    weights = [f"{part}/{stem}{end}" for part, stem in parts.items() for end in (".safetensors", ".fp16.safetensors", ".bin")]
    configs = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
    configs += [f"{part}/config.json" for part in parts]
    asked: list[list[str]] = []
    monkeypatch.setattr(hub, "listing", lambda name: [*weights, *configs, "v1-5.safetensors", "README.md"])
    monkeypatch.setattr(hub, "fetch", lambda name, files: asked.append(list(files)) or folder)
    base_files.load("someone/sd", device=CPU, dtype=torch.bfloat16)
    taken = {name for name in asked[0] if name.endswith(("safetensors", "bin"))}
    assert taken == {
        "unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert set(configs) - {"safety_checker/config.json"} == set(asked[0]) - taken
    base_files.identify("someone/sd")
    assert not [name for name in asked[1] if name.endswith("safetensors")]


def test_shards_of_a_hub_base_are_fetched_in_the_variant_that_is_read() -> None:
    inside = [f"unet/diffusion_pytorch_model{half}-0000{i}-of-00002.safetensors" for half in ("", ".fp16") for i in (1, 2)]
    indices = ["unet/diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model.fp16.safetensors.index.json"]
    wanted = base_sources.wanted([*inside, *indices], half=True, weights=True)
    assert wanted == [indices[1], *inside[2:]]
    assert base_sources.wanted([*inside, *indices], half=False, weights=True) == [indices[0], *inside[:2]]


def test_a_repository_without_a_pipeline_is_refused(monkeypatch: pytest.MonkeyPatch, attempts: list[str]) -> None:
    monkeypatch.setattr(hub, "listing", lambda name: ["model.safetensors"])
    assert "no diffusers pipeline" in refusal("someone/file")


def test_a_part_is_chosen_from_the_names_alone() -> None:
    assert base_parts.chosen(["model.safetensors", "model.fp16.safetensors"], part="text_encoder", half=False) == (
        "",
        ["model.safetensors"],
    )
    assert base_parts.chosen(["model.bin"], part="text_encoder", half=True) == ("", [])
