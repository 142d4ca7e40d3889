"""New bases: what a fine-tune learned comes out as a LoRA and goes in again, and nothing but what a LoRA says is changed."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora import bake, base_files, base_model, base_tensors, files, generate, lora_extract, lora_file, lora_tools, weights_file
from sdlora.bake import Baked
from sdlora.base_model import Base
from sdlora.deltas import Full, Hadamard, LowRank, Update
from sdlora.errors import UserError
from sdlora.generate import LoRA
from sdlora.lora_tools import Made
from tests import tiny_families

FAMILIES = ("sd1", "sd2", "sdxl")
PARTS = ("unet", "text_encoder", "text_encoder_2")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def last(work: Iterator[Any]) -> Any:
    *steps, made = work
    assert [step[0] for step in steps] == list(range(1, steps[-1][1] + 1))
    return made


def weights(folder: Path, part: str) -> dict[str, Tensor]:
    (path,) = (folder / part).glob("*.safetensors")
    return load_file(path)


def opened(base: Path, words: Path) -> Base:
    tokenizer = str(words) if base.is_file() else None
    return base_files.load(str(base), device=torch.device("cpu"), dtype=torch.float32, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random pipeline of each family."""
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_families.make_folder(family, folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def checkpoints(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same as single files in the original layout."""
    folder = tmp_path_factory.mktemp("checkpoints")
    told = {"modelspec.hash_sha256": "0xabc", "modelspec.title": "Ü", "modelspec.prediction_type": "epsilon"}
    return {
        family: tiny_families.make_single_file(family, path, folder / f"{family}.safetensors", metadata=told)
        for family, path in bases.items()
    }


@pytest.fixture(scope="module")
def loras(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA over every module of each family: linears, convolutions, norms, biases, a LoHa and a DoRA."""
    folder = tmp_path_factory.mktemp("loras")
    for family, base in bases.items():
        files.write(folder / f"{family}.safetensors", lora_file.to_bytes(everything(base), {}, family=family, dtype=torch.float32))
    return {family: folder / f"{family}.safetensors" for family in bases}


def everything(base: Path) -> dict[str, Update]:
    spots, modules = base_tensors.tensors_of(str(base)).spots, {}
    for seed, stem in enumerate(base_model.stems(opened(base, base))):
        shape = spots[base_tensors.parameter_of(stem)].shape
        bias = drawn(shape[0], seed=seed) * 0.01 if base_tensors.parameter_of(stem, "bias") in spots and seed % 5 == 0 else None
        if len(shape) == 1:
            modules[stem] = Update(Full(drawn(*shape, seed=seed) * 0.01), bias=bias)
        elif stem.endswith("to_k"):
            ups, downs = (
                [drawn(shape[0], 2, seed=seed + i) * 0.1 for i in (0, 1)],
                [drawn(2, shape[1], seed=seed + i) * 0.3 for i in (2, 3)],
            )
            modules[stem] = Update(Hadamard(ups[0], downs[0], ups[1], downs[1], 1.0), bias=bias)
        else:
            down, up = drawn(2, *shape[1:], seed=seed) * 0.1, drawn(shape[0], 2, *[1] * (len(shape) - 2), seed=seed + 1) * 0.1
            magnitude = drawn(1, shape[1], seed=seed).abs() if stem.endswith("ff_net_2") else None
            modules[stem] = Update(LowRank(down, up, 1.0), magnitude, bias)
    return modules


def tuned(base: Path, goal: Path, *, dtype: torch.dtype, parts: tuple[str, ...] = PARTS, only: str = "") -> Path:
    """A fine-tune: every weight whose name holds `only` moved a little."""
    shutil.copytree(base, goal)
    for part in [part for part in PARTS if (base / part).is_dir()]:
        (path,) = (goal / part).glob("*.safetensors")
        state = {}
        for seed, (key, tensor) in enumerate(load_file(path).items()):
            moves = part in parts and only in key
            state[key] = (tensor + 0.02 * drawn(*tensor.shape, seed=seed) if moves else tensor).to(dtype)
        save_file(state, path, metadata={"format": "pt"})
    return goal


# --- extract, and bake again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype"), [("sd1", torch.float32), ("sd2", torch.float16)])
def test_a_fine_tune_comes_back_from_its_lora_of_full_rank(bases: dict[str, Path], tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    base = tuned(bases[family], tmp_path / "base", dtype=dtype, parts=())
    goal = tuned(bases[family], tmp_path / "tuned", dtype=dtype)
    made = last(lora_extract.extract(str(base), str(goal), name="x", rank=10_000, norms=True, dtype=torch.float32))
    assert isinstance(made, Made)
    assert made.errors.worst < 1e-5
    files.write(tmp_path / "x.safetensors", made.content)
    baked = last(bake.bake(str(base), [LoRA(tmp_path / "x.safetensors")], tmp_path / "out"))
    assert isinstance(baked, Baked)
    left = []
    for part in [part for part in PARTS if (base / part).is_dir()]:
        found, wanted, before = (weights(folder, part) for folder in (tmp_path / "out", goal, base))
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].dtype == dtype
            if torch.equal(found[key], before[key]):
                left.append(key)
            else:  # fp16 to the last bit, but where a number is so near to 0 that fp32 factors round to its neighbour
                torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-6)
                assert dtype == torch.float32 or int((found[key] != tensor).sum()) <= 0.01 * tensor.numel()
    assert all("embeddings" in key or "text_projection" in key for key in left)
    assert made.notes == (
        f"{len(left)} changed weights are not carried (norms, biases, embeddings, and what was not asked for), such as {named(left)}.",
    )


def named(left: list[str]) -> str:
    first = next(key for key in left if "token" in key or "position" in key)
    return f"text_encoder.{first if first.startswith('text_model.') else f'text_model.{first}'}"


def test_what_is_not_asked_for_is_not_extracted_and_said(bases: dict[str, Path], tmp_path: Path) -> None:
    goal = tuned(bases["sd1"], tmp_path / "tuned", dtype=torch.float32)
    made = last(lora_extract.extract(str(bases["sd1"]), str(goal), name="x", rank=4, conv=False, text_encoder=False))
    files.write(tmp_path / "x.safetensors", made.content)
    found = lora_file.read(tmp_path / "x.safetensors")
    assert found.ranks == [4]
    assert found.alphas == [4.0]
    assert all(stem.startswith("lora_unet_") and update.bias is None for stem, update in found.modules.items())
    assert not any("conv1" in stem or "norm" in stem for stem in found.modules)
    assert any(stem.endswith("attn2_to_v") for stem in found.modules)
    assert "changed weights are not carried" in made.notes[0]
    assert 0.1 < made.errors.mean < made.errors.worst < 1  # noise has no small rank
    assert (found.metadata["ss_sd_model_name"], found.metadata["modelspec.description"]) == ("sd1", "tuned minus sd1")
    assert (found.metadata["ss_network_dim"], found.metadata["ss_base_model_version"]) == ("4", "sd_v1")


def test_energy_and_unchanged_modules(bases: dict[str, Path], tmp_path: Path) -> None:
    goal = tuned(bases["sd1"], tmp_path / "tuned", dtype=torch.float16, only="attn2.to_k")
    made = last(lora_extract.extract(str(bases["sd1"]), str(goal), name="x", energy=0.5))
    files.write(tmp_path / "x.safetensors", made.content)
    found = lora_file.read(tmp_path / "x.safetensors")
    assert all(stem.endswith("attn2_to_k") for stem in found.modules)  # what fp16 alone has rounded is no change
    assert len(found.modules) == 16
    assert made.errors.worst < 0.5**0.5 + 1e-3
    assert made.notes == ()


def test_bases_that_cannot_be_compared_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    def extracted(base: Path, goal: Path, **options: Any) -> None:
        last(lora_extract.extract(str(base), str(goal), name="x", **{"rank": 4, "text_encoder": False} | options))

    sd1 = bases["sd1"]
    with pytest.raises(UserError, match=r"sd1' is Stable Diffusion 1\.x and '.*sdxl' Stable Diffusion XL; give two bases of one family"):
        extracted(sd1, bases["sdxl"])
    with pytest.raises(UserError, match=r"are the same in all \d+ modules, so there is nothing to extract"):
        extracted(sd1, sd1)
    with pytest.raises(UserError, match=r"differ only in \d+ weights that were not asked for .*embeddings\.position_embedding"):
        extracted(sd1, tuned(sd1, tmp_path / "words", dtype=torch.float32, only="position_embedding"), text_encoder=True)
    with pytest.raises(UserError, match=r"2 of rank, energy and max_error are given"):
        extracted(sd1, sd1, energy=0.5)
    other = tuned(sd1, tmp_path / "other", dtype=torch.float32)
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({**state, "conv_in.weight": torch.zeros(32, 5, 3, 3)}, path)
    with pytest.raises(UserError, match=r"unet\.conv_in\.weight is \[32, 4, 3, 3\] in .* and \[32, 5, 3, 3\] in .*one kind"):
        extracted(sd1, other)
    save_file({**state, "conv_in.weight": torch.full((32, 4, 3, 3), torch.nan)}, path)
    with pytest.raises(UserError, match=r"other' holds NaN or infinity in unet\.conv_in\.weight"):
        extracted(sd1, other)
    save_file({key: tensor for key, tensor in state.items() if key != "conv_in.weight"}, path)
    with pytest.raises(UserError, match=r"other' has no unet\.conv_in\.weight, which '.*sd1' has"):
        extracted(sd1, other)


# --- bake ---------------------------------------------------------------------------------------------------------------------


def folded(base: Path, words: Path, loras: list[LoRA]) -> Base:
    one = opened(base, words)
    generate.set_loras(one, loras)
    return one


def check_same(found: Base, wanted: Base) -> None:
    """Weights as the modules hold them; those of `wanted` may have LoRA layers around them."""
    for part, module in wanted.parts.items():
        state = {key.replace(".base.", "."): tensor for key, tensor in module.state_dict().items() if ".adapters." not in key}
        answer = found.parts[part].state_dict()
        assert answer.keys() == state.keys()
        for key, tensor in state.items():
            torch.testing.assert_close(answer[key], tensor, rtol=0, atol=1e-6, msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_baked_base_is_the_base_with_its_lora_in_folder_and_checkpoint(
    bases: dict[str, Path], checkpoints: dict[str, Path], loras: dict[str, Path], tmp_path: Path, family: str
) -> None:
    spoken = [LoRA(loras[family], 0.7, 0.4), LoRA(loras[family], -0.2)]
    wanted = folded(bases[family], bases[family], [LoRA(loras[family], 0.5, 0.2)])
    made = last(bake.bake(str(bases[family]), spoken, tmp_path / "folder"))
    assert made.path == tmp_path / "folder"
    assert made.errors.worst < 1e-4
    check_same(opened(tmp_path / "folder", bases[family]), wanted)
    again = last(bake.bake(str(checkpoints[family]), spoken, tmp_path / "one.safetensors"))
    assert again.errors.modules == made.errors.modules
    check_same(opened(tmp_path / "one.safetensors", bases[family]), wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "one.safetensors"]


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_checkpoint_keeps_its_layout_and_all_that_no_lora_changes(checkpoints: dict[str, Path], tmp_path: Path, family: str) -> None:
    stem = (
        "lora_te1_text_model_encoder_layers_1_self_attn_k_proj"
        if family == "sd2"
        else "lora_te2_text_model_encoder_layers_1_self_attn_k_proj"
    )
    files.write(
        tmp_path / "k.safetensors", lora_file.to_bytes({stem: Update(LowRank(drawn(2, 256), drawn(256, 2), 2.0))}, {}, family=family)
    )
    half = tmp_path / "half.safetensors"
    state = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in load_file(checkpoints[family]).items()}
    save_file(state, half, metadata={"modelspec.hash_sha256": "0xabc", "modelspec.title": "Ü"})
    out = tmp_path / "out.safetensors"
    made = last(bake.bake(str(half), [LoRA(tmp_path / "k.safetensors", 0.5)], out))
    before, after = weights_file.header(half), weights_file.header(out)
    assert after.tensors == before.tensors
    assert after.metadata == {"modelspec.title": "Ü", "modelspec.merged_from": "half, k"}
    found, start = load_file(out), "cond_stage_model" if family == "sd2" else "conditioner.embedders.1"
    changed = f"{start}.model.transformer.resblocks.1.attn.in_proj_weight"
    for key, tensor in state.items():
        if key != changed:
            assert found[key].numpy().tobytes() == tensor.numpy().tobytes(), key
    query, key_, value = found[changed].chunk(3)
    assert torch.equal(query, state[changed][:256])
    assert torch.equal(value, state[changed][512:])
    wanted = state[changed][256:512].float() + 0.5 * drawn(256, 2).half().float() @ drawn(2, 256).half().float()
    assert torch.equal(key_, wanted.half())
    assert 0 < made.errors.worst < 1e-3
    assert (made.errors.worst_module, made.errors.modules) == (stem, 1)
    assert made.notes == ("half.safetensors holds 2 averaged weights (model_ema) too; they are copied without the LoRAs.",)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_folder_becomes_a_checkpoint_in_the_original_layout(
    bases: dict[str, Path], loras: dict[str, Path], tmp_path: Path, family: str
) -> None:
    last(bake.bake(str(bases[family]), [LoRA(loras[family])], tmp_path / "folder"))
    last(bake.bake(str(bases[family]), [LoRA(loras[family])], tmp_path / "one.safetensors"))
    wanted = load_file(tiny_families.make_single_file(family, tmp_path / "folder", tmp_path / "wanted.safetensors"))
    found = load_file(tmp_path / "one.safetensors")
    beside = set(wanted) - set(found)
    assert set(found) <= set(wanted)
    assert all(key.startswith(("betas", "model_ema")) or key.endswith(("position_ids", "logit_scale")) for key in beside), beside
    for key, tensor in found.items():
        assert torch.equal(tensor, wanted[key]), key
    metadata = weights_file.header(tmp_path / "one.safetensors").metadata
    assert metadata["modelspec.prediction_type"] == "epsilon"
    if family == "sdxl":
        check_same(opened(tmp_path / "one.safetensors", bases[family]), opened(tmp_path / "folder", bases[family]))


def test_a_checkpoint_of_a_folder_says_what_it_predicts(bases: dict[str, Path], loras: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["sdxl"], tmp_path / "v")
    config = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}))
    last(bake.bake(str(tmp_path / "v"), [LoRA(loras["sdxl"])], tmp_path / "one.safetensors"))
    base = opened(tmp_path / "one.safetensors", bases["sdxl"])
    assert base.prediction == "v_prediction"
    assert base.schedule["rescale_betas_zero_snr"]
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        assert {"v_pred", "ztsnr"} <= set(file.keys())


def test_a_folder_is_copied_whole_and_its_pickles_are_not(bases: dict[str, Path], loras: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["sd1"], tmp_path / "base")
    unet = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(unet).items()}, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "base" / "v1-5-pruned.safetensors").write_bytes(b"checkpoint")
    (tmp_path / "base" / "README.md").write_text("licence")
    modules = {stem: update for stem, update in everything(bases["sd1"]).items() if stem.endswith("attn2_to_v")}
    files.write(tmp_path / "v.safetensors", lora_file.to_bytes(modules, {}, family="sd1"))
    made = last(bake.bake(str(tmp_path / "base"), [LoRA(tmp_path / "v.safetensors")], tmp_path / "out"))
    relative = {path.relative_to(tmp_path / "base") for path in (tmp_path / "base").rglob("*") if path.is_file()}
    copied = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert relative - copied == {Path("unet/diffusion_pytorch_model.bin"), Path("v1-5-pruned.safetensors")}
    for path in copied:
        is_same = (tmp_path / "out" / path).read_bytes() == (tmp_path / "base" / path).read_bytes()
        assert is_same == (path.parent.name != "unet" or path.name == "config.json"), path
    half = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for key, tensor in weights_of_unet(tmp_path / "out").items():
        torch.testing.assert_close(half[key].float(), tensor, rtol=1e-3, atol=5e-5)  # fp16 of numbers up to 0.1
    assert "2 files of" in made.notes[0]
    assert "v1-5-pruned.safetensors" in made.notes[0]


def weights_of_unet(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_coarse_numbers_lose_a_stated_part_of_the_change(bases: dict[str, Path], loras: dict[str, Path], tmp_path: Path) -> None:
    coarse = tuned(bases["sd1"], tmp_path / "base", dtype=torch.bfloat16, parts=())
    made = last(bake.bake(str(coarse), [LoRA(loras["sd1"], 0.05)], tmp_path / "out"))
    assert made.errors.worst > 0.02  # bf16 has 8 bits
    assert made.errors.worst_module in lora_file.read(loras["sd1"]).modules


def test_the_bases_weights_by_stem_let_dora_be_resized(
    bases: dict[str, Path], checkpoints: dict[str, Path], loras: dict[str, Path]
) -> None:
    files_ = [base_tensors.weights_of(str(base["sdxl"])) for base in (bases, checkpoints)]
    results = [last(lora_extract.resize(loras["sdxl"], rank=8, weights=one)) for one in files_]
    assert results[0].content == results[1].content
    assert isinstance(results[0].errors, lora_tools.Errors)
    with pytest.raises(UserError, match=r"has no unet\.down_blocks\.7"):
        files_[0]("lora_unet_down_blocks_7_resnets_0_conv1")


# --- what is refused ----------------------------------------------------------------------------------------------------------


def test_nothing_is_written_over_and_what_cannot_be_written_is_said(
    bases: dict[str, Path], checkpoints: dict[str, Path], loras: dict[str, Path], tmp_path: Path
) -> None:
    def baked(base: str, out: Path, *spoken: LoRA) -> None:
        last(bake.bake(base, spoken or [LoRA(loras["sd1"])], out))

    (tmp_path / "there").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link.safetensors"):
        with pytest.raises(UserError, match=r"exists already; give another name, or move it away"):
            baked(str(bases["sd1"]), tmp_path / name)
    with pytest.raises(UserError, match=r"would be a folder, and base '.*sd1\.safetensors' brings no tokenizer; give a name that ends in"):
        baked(str(checkpoints["sd1"]), tmp_path / "out")
    with pytest.raises(UserError, match=r"cannot be written as one: its text encoder lacks the last layer that checkpoints hold"):
        baked(str(bases["sd2"]), tmp_path / "out.safetensors", LoRA(loras["sd2"]))
    with pytest.raises(
        UserError, match=r"sdxl\.safetensors does not fit base '.*sd1': \d+ of its \d+ modules are not in it \(such as .*\) and \d+"
    ):
        baked(str(bases["sd1"]), tmp_path / "out", LoRA(loras["sdxl"]))
    mini = {"lora_unet_mid_block_resnets_0_conv1": Update(LowRank(drawn(2, 144, 3, 3), drawn(144, 2, 1, 1), 2.0))}
    files.write(tmp_path / "mini.safetensors", lora_file.to_bytes(mini, {}, family="mini"))
    with pytest.raises(UserError, match=r"cannot be written as one: it has no checkpoint layout; give a name for a folder"):
        baked("mini", tmp_path / "out.safetensors", LoRA(tmp_path / "mini.safetensors"))
    baked("mini", tmp_path / "baked-mini", LoRA(tmp_path / "mini.safetensors"))
    with pytest.raises(UserError, match=r"has strength 0; give a number other than 0"):
        baked(str(bases["sd1"]), tmp_path / "out", LoRA(loras["sd1"], 0.0))
    half = tuned(bases["sd1"], tmp_path / "half", dtype=torch.float16, parts=())
    with pytest.raises(UserError, match=r"becomes infinite in float16; give lower strengths"):
        baked(str(half), tmp_path / "out", LoRA(loras["sd1"], 1e9))
    whole = tuned(bases["sd1"], tmp_path / "whole", dtype=torch.int8, parts=())
    with pytest.raises(UserError, match=r"holds weights as I8; quantised weights are not read"):
        baked(str(whole), tmp_path / "out")
    with pytest.raises(UserError, match=r"nothing to bake in"):
        last(bake.bake(str(bases["sd1"]), [], tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "baked-mini",
        "half",
        "link.safetensors",
        "mini.safetensors",
        "there",
        "whole",
    ]


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_full_disk_or_an_end_before_the_end_leaves_nothing(
    bases: dict[str, Path], loras: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    work = bake.bake(str(bases["sd1"]), [LoRA(loras["sd1"])], tmp_path / out)
    next(work)
    work.close()
    assert list(tmp_path.iterdir()) == []

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"could not be written \(No space left on device\)"):
        last(bake.bake(str(bases["sd1"]), [LoRA(loras["sd1"])], tmp_path / out))
    assert list(tmp_path.iterdir()) == []
