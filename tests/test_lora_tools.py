"""Files from files: converted without loss, resized as well as can be, merged as if all were set; and each says how far it is off."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft.utils import merge_utils
from torch import Tensor

from sdlora import base_files, base_model, deltas, files, generate, lora_extract, lora_file, lora_merge, lora_tools, text
from sdlora.base_model import Base
from sdlora.deltas import Full, Hadamard, Kronecker, LowRank, Update
from sdlora.errors import UserError
from sdlora.generate import LoRA, Request
from sdlora.lora_tools import Limit, Made

BLOCK = "lora_unet_down_blocks_1_attentions_0"
QUERY, KEY = f"{BLOCK}_transformer_blocks_0_attn1_to_q", f"{BLOCK}_transformer_blocks_0_attn2_to_k"
PROJECTION = f"{BLOCK}_proj_in"
CONV, CONV_2 = "lora_unet_down_blocks_1_resnets_0_conv1", "lora_unet_down_blocks_1_resnets_0_conv2"
NORM, TEXT = "lora_unet_conv_norm_out", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(seed: int = 0, *, rank: int = 4, alpha: float = 2.0, width: int = 12, out: int = 20) -> Update:
    return Update(LowRank(drawn(rank, width, seed=seed), drawn(out, rank, seed=seed + 100), alpha))


def conv(seed: int = 0, *, rank: int = 4, alpha: float = 2.0, side: int = 3) -> Update:
    return Update(LowRank(drawn(rank, 6, side, side, seed=seed), drawn(10, rank, 1, 1, seed=seed + 100), alpha))


def loha(seed: int = 0, *, width: int = 12, out: int = 20) -> Update:
    return Update(
        Hadamard(
            drawn(out, 2, seed=seed), drawn(2, width, seed=seed + 1), drawn(out, 2, seed=seed + 2), drawn(2, width, seed=seed + 3), 1.0
        )
    )


def some(family: str, seed: int = 0, **more: Any) -> dict[str, Update]:
    return {
        QUERY: linear(seed, **more), KEY: linear(seed + 1, width=WIDTHS[family], **more), PROJECTION: conv(seed + 2, side=1, **more),
        CONV: conv(seed + 3, **more), TEXT: linear(seed + 4, width=1024 if family == "sd2" else 768, **more),
    }  # fmt: skip


def written(
    path: Path,
    modules: dict[str, Update],
    *,
    family: str = "sd1",
    dtype: torch.dtype = torch.float32,
    layout: str = "kohya",
    **metadata: str,
) -> Path:
    files.write(path, lora_file.to_bytes(modules, metadata, family=family, dtype=dtype, layout=layout))
    return path


def last(work: Iterator[tuple[int, int] | Made]) -> Made:
    *steps, made = work
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))  # type: ignore[misc]
    assert isinstance(made, Made)
    return made


def read_again(made: Made, folder: Path) -> lora_file.LoRAFile:
    files.write(folder / "made.safetensors", made.content)
    return lora_file.read(folder / "made.safetensors")


def whole(update: Update, *shape: int) -> Tensor:
    change = deltas.delta(update, torch.zeros(shape))
    assert change is not None
    return change


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# --- convert ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(WIDTHS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_there_and_back_is_the_same_file_bit_for_bit(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    path = written(tmp_path / "a.safetensors", some(family), family=family, dtype=dtype, ss_steps="9", ss_output_name="a")
    there = lora_merge.convert(path, to="diffusers")
    files.write(tmp_path / "b.safetensors", there.content)
    assert lora_file.read(tmp_path / "b.safetensors").layout == "PEFT"
    assert b"lora_down" not in there.content
    back = lora_merge.convert(tmp_path / "b.safetensors", to="kohya")
    assert back.content == path.read_bytes()
    assert (there.errors.worst, back.errors.worst, there.errors.modules, there.notes) == (0, 0, 5, ())


def test_alphas_that_differ_become_one_and_the_weights_stay(tmp_path: Path) -> None:
    modules = {QUERY: linear(1, alpha=3.0), KEY: linear(2, width=768, alpha=2.0)}
    path = written(tmp_path / "a.safetensors", modules, layout="diffusers", dtype=torch.float16)
    assert lora_file.read(path).alphas == [2.0, 3.0]
    made = lora_merge.convert(path, to="kohya", name="other")
    found = read_again(made, tmp_path)
    assert (found.alphas, found.metadata["ss_output_name"]) == ([2.0], "other")
    assert 0 < made.errors.worst < 5e-4
    assert made.errors.worst_module == QUERY
    assert off(whole(found.modules[QUERY], 20, 12), whole(modules[QUERY], 20, 12)) < 1e-3


def test_what_the_other_layout_cannot_carry_is_refused_and_what_nobody_knows_is_said(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {QUERY: loha(), KEY: linear(width=768)})
    with pytest.raises(UserError, match=r"diffusers' layout cannot carry .*LoHa"):
        lora_merge.convert(path, to="diffusers")
    with pytest.raises(UserError, match=r"Layout 'peft' is unknown; there are kohya and diffusers\."):
        lora_merge.convert(path, to="peft")
    tensors = {f"{QUERY}.lora_down.weight": drawn(2, 6), f"{QUERY}.lora_up.weight": drawn(5, 2), "lora_unet_other_thing.alpha": drawn(1)}
    safetensors.torch.save_file(tensors, tmp_path / "b.safetensors")
    notes = lora_merge.convert(tmp_path / "b.safetensors", to="kohya").notes
    assert notes[0] == "b.safetensors: 1 keys belong to no known module and are left out, such as lora_unet_other_thing.alpha."
    assert "its family cannot be told" in notes[1]
    assert (
        b"input_blocks_4_1_transformer_blocks_0_attn1_to_q"
        in lora_merge.convert(tmp_path / "b.safetensors", to="kohya", family="sdxl").content
    )


# --- resize -------------------------------------------------------------------------------------------------------------------


def test_the_same_rank_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", some("sd1") | {NORM: Update(Full(drawn(5)), bias=drawn(5))}, dtype=torch.float16)
    made = last(lora_extract.resize(path, rank=4))
    assert safetensors.torch.load(made.content).keys() == safetensors.torch.load_file(path).keys()
    for key, tensor in safetensors.torch.load_file(path).items():
        assert torch.equal(safetensors.torch.load(made.content)[key], tensor), key
    assert (made.errors.worst, made.errors.modules) == (0, 6)


def test_ranks_that_hold_nothing_go_without_loss_to_fp16(tmp_path: Path) -> None:
    modules = {}
    for stem, update in some("sd1").items():
        assert isinstance(update.change, LowRank)
        twice = LowRank(torch.cat([update.change.down] * 2), torch.cat([update.change.up] * 2, 1) / 2, 4.0)
        modules[stem] = Update(twice)
    made = last(lora_extract.resize(written(tmp_path / "a.safetensors", modules, dtype=torch.float16), rank=4))
    found = read_again(made, tmp_path)
    assert found.ranks == [4]
    assert 0 < made.errors.worst < 6e-4  # fp16 rounds by up to 4.9e-4
    assert off(whole(found.modules[CONV], 10, 6, 3, 3), whole(modules[CONV], 10, 6, 3, 3)) < 1e-3


@pytest.mark.parametrize("stem", [QUERY, KEY, CONV])
@pytest.mark.parametrize("limit", [{"rank": 2}, {"energy": 0.9}, {"max_error": 0.4}])
def test_no_lora_of_that_rank_is_nearer(tmp_path: Path, stem: str, limit: dict[str, Any]) -> None:
    modules = some("sd1", rank=8)
    path = written(tmp_path / "a.safetensors", modules, ss_network_dim="8", ss_network_alpha="2")
    made = last(lora_extract.resize(path, **limit))
    found = read_again(made, tmp_path)
    shape = {QUERY: (20, 12), KEY: (20, 768), CONV: (10, 6, 3, 3)}[stem]
    wanted = whole(modules[stem], *shape)
    change = found.modules[stem].change
    assert isinstance(change, LowRank)
    energies = torch.linalg.svdvals(wanted.flatten(1)).square()
    kept = energies.cumsum(0) / energies.sum()
    if "rank" in limit:
        assert change.rank == 2
    else:
        goal = limit.get("energy", 1 - 0.4**2)
        assert kept[change.rank - 1] >= goal > kept[change.rank - 2]
    assert off(whole(found.modules[stem], *shape), wanted) == pytest.approx(float((1 - kept[change.rank - 1]).sqrt()), rel=1e-3)
    assert (found.metadata["ss_network_dim"], found.alphas) == (str(max(found.ranks)), [2.0])
    assert made.errors.worst >= off(whole(found.modules[stem], *shape), wanted) - 1e-6


def test_every_form_is_resized_to_plain_lora(tmp_path: Path) -> None:
    tucker = LowRank(drawn(3, 6, 1, 1), drawn(10, 3, 1, 1), 1.5, drawn(3, 3, 3, 3))
    kronecker = Kronecker(drawn(4, 2, seed=5), drawn(5, 384, seed=6), 1.0)
    modules = {
        QUERY: loha(1), KEY: Update(kronecker), CONV: loha(8, width=54, out=10), CONV_2: Update(tucker),
        TEXT: Update(Full(drawn(6, 768, seed=7))), NORM: Update(Full(drawn(5))),
    }  # fmt: skip
    path = written(tmp_path / "a.safetensors", modules)
    made = last(lora_extract.resize(path, rank=20))
    found = read_again(made, tmp_path)
    assert {type(update.change) for stem, update in found.modules.items() if stem != NORM} == {LowRank}
    assert torch.equal(whole(found.modules[NORM], 5), whole(modules[NORM], 5))
    assert made.errors.worst < 1e-5  # 20 directions are all that any of them has
    for stem, shape in {QUERY: (20, 12), KEY: (20, 768), CONV: (10, 6, 3, 3), TEXT: (6, 768), CONV_2: (10, 6, 3, 3)}.items():
        assert off(whole(found.modules[stem], *shape), whole(modules[stem], *shape)) < 1e-5
    assert found.metadata["ss_network_module"] == "lycoris.kohya"  # a norm's ΔW is there


def test_dora_needs_the_base_and_becomes_plain_lora_with_it(tmp_path: Path) -> None:
    base, update = drawn(20, 12, seed=9), Update(linear().change, magnitude=drawn(1, 12, seed=3).abs())
    path = written(tmp_path / "a.safetensors", {QUERY: update})
    with pytest.raises(UserError, match=r"holds DoRA in .*attn1_to_q, whose ΔW depends on the base's weights; give the base too"):
        last(lora_extract.resize(path, rank=12))
    with pytest.raises(UserError, match=r"does not fit the base: .*attn1_to_q is \[20, 12\] in the file and \[20, 13\] in the base"):
        last(lora_extract.resize(path, rank=12, weights=lambda stem: drawn(20, 13)))
    found = read_again(last(lora_extract.resize(path, rank=12, weights=lambda stem: base)), tmp_path).modules[QUERY]
    wanted = deltas.delta(update, base)
    assert wanted is not None
    assert found.magnitude is None
    assert off(whole(found, 20, 12), wanted) < 1e-5


def test_a_large_matrix_is_cut_as_well_by_chance_as_exactly() -> None:
    matrix = drawn(640, 4) @ drawn(4, 600, seed=1) + 0.05 * drawn(640, 600, seed=2)
    energies = torch.linalg.svdvals(matrix).square()
    for limit, rank in ((Limit(rank=4), 4), (Limit(energy=0.9), None)):
        first, second = (lora_tools.cut(Full(matrix), limit, alpha=1.0) for _ in range(2))
        assert isinstance(first, LowRank)
        assert isinstance(second, LowRank)
        assert torch.equal(first.down, second.down)
        assert first.rank == (rank or first.rank) <= 4
        best = float((energies[first.rank :].sum() / energies.sum()).sqrt())
        assert lora_tools.relative_error(first, Full(matrix)) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({}, r"0 of rank, energy and max_error are given \(none\); give exactly one\."),
        ({"rank": 2, "energy": 0.5}, r"2 of rank, energy and max_error are given \(rank, energy\)"),
        ({"rank": 0}, r"rank 0 is out of range; give at least 1\."),
        ({"energy": 1.5}, r"energy 1\.5 is out of range"),
        ({"energy": 0.0}, r"energy 0 is out of range"),
        ({"max_error": 1.0}, r"max_error 1 is out of range"),
        ({"max_error": float("nan")}, r"max_error nan is out of range"),
    ],
)
def test_limits_out_of_range_get_one_sentence(tmp_path: Path, limits: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        last(lora_extract.resize(written(tmp_path / "a.safetensors", some("sd1")), **limits))


# --- merge --------------------------------------------------------------------------------------------------------------------

SHAPES = {QUERY: (20, 12), KEY: (20, 768), PROJECTION: (10, 6, 1, 1), CONV: (10, 6, 3, 3), TEXT: (20, 768)}


def test_a_merge_is_the_sum_of_what_the_files_do_with_no_cross_terms(tmp_path: Path) -> None:
    one, other = some("sd1", 1, rank=3, alpha=6.0), some("sd1", 20, rank=5, alpha=1.0)
    paths = [written(tmp_path / "one.safetensors", one), written(tmp_path / "other.safetensors", other)]
    made = last(lora_merge.merge([(paths[0], 0.6), (paths[1], -0.3)], name="both", exact=True))
    found = read_again(made, tmp_path)
    assert (found.ranks, found.alphas) == ([8], [1.0])
    for stem, shape in SHAPES.items():
        wanted = 0.6 * whole(one[stem], *shape) - 0.3 * whole(other[stem], *shape)
        assert off(whole(found.modules[stem], *shape), wanted) < 1e-6
    assert made.errors.worst < 1e-6
    half = last(lora_merge.merge([(paths[0], 0.6), (paths[1], -0.3)], name="both", dtype=torch.float16))
    assert 1e-5 < half.errors.worst < 1e-3


def test_a_merge_cut_to_a_rank_is_the_best_of_that_rank(tmp_path: Path) -> None:
    one, other = some("sd1", 1), some("sd1", 20)
    parts = [(written(tmp_path / "one.safetensors", one), 1.0), (written(tmp_path / "other.safetensors", other), 0.5)]
    for options, rank in (({"rank": 3}, 3), ({"method": "svd"}, 4)):
        made = last(lora_merge.merge(parts, name="both", **options))
        found = read_again(made, tmp_path)
        assert found.ranks == [rank]
        wanted = whole(one[CONV], *SHAPES[CONV]) + 0.5 * whole(other[CONV], *SHAPES[CONV])
        energies = torch.linalg.svdvals(wanted.flatten(1)).square()
        best = float((energies[rank:].sum() / energies.sum()).sqrt())
        assert off(whole(found.modules[CONV], *SHAPES[CONV]), wanted) == pytest.approx(best, rel=1e-4)
        assert made.errors.worst > 0.1


def test_mixed_forms_are_summed_and_modules_of_one_file_keep_their_form(tmp_path: Path) -> None:
    tucker = Update(LowRank(drawn(3, 6, 1, 1), drawn(10, 3, 1, 1), 1.5, drawn(3, 3, 3, 3)))
    one = {QUERY: loha(1), CONV: conv(2), KEY: loha(3, width=768), NORM: Update(Full(drawn(5)), bias=drawn(5, seed=1))}
    other = {QUERY: linear(4), CONV: tucker, TEXT: linear(5, width=768), NORM: Update(None, bias=drawn(5, seed=2))}
    parts = [(written(tmp_path / "one.safetensors", one), 0.5), (written(tmp_path / "other.safetensors", other), 2.0)]
    made = last(lora_merge.merge(parts, name="both", exact=True))
    found = read_again(made, tmp_path).modules
    assert off(whole(found[QUERY], 20, 12), 0.5 * whole(one[QUERY], 20, 12) + 2 * whole(other[QUERY], 20, 12)) < 3e-5
    assert off(whole(found[CONV], 10, 6, 3, 3), 0.5 * whole(one[CONV], 10, 6, 3, 3) + 2 * whole(tucker, 10, 6, 3, 3)) < 1e-5
    assert isinstance(found[KEY].change, Hadamard)
    assert off(whole(found[KEY], 20, 768), 0.5 * whole(one[KEY], 20, 768)) < 1e-6
    assert off(whole(found[TEXT], 20, 768), 2 * whole(other[TEXT], 20, 768)) < 1e-6
    assert off(whole(found[NORM], 5), 0.5 * whole(one[NORM], 5)) < 1e-6
    assert found[NORM].bias is not None
    torch.testing.assert_close(found[NORM].bias, 0.5 * drawn(5, seed=1) + 2 * drawn(5, seed=2))
    assert made.errors.worst < 3e-5
    assert "2 of 5 modules are not in all of the files; they are kept." in made.notes
    cut = read_again(last(lora_merge.merge(parts, name="both")), tmp_path).modules
    assert isinstance(cut[QUERY].change, LowRank)
    assert cut[QUERY].change.rank == 6  # those of the two together, where a sum has no factors


@pytest.mark.parametrize("shape", [(20, 12), (10, 6, 3, 3)])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.93])
def test_ties_and_dare_are_pefts(shape: tuple[int, ...], density: float) -> None:
    changes, weights = [drawn(*shape, seed=seed) for seed in range(3)], [0.7, -0.4, 1.2]
    found = lora_merge.ties(changes, weights, density=density)
    torch.testing.assert_close(found, merge_utils.ties(changes, torch.tensor(weights), density))
    found = lora_merge.dare(changes, weights, density=density, generator=torch.Generator().manual_seed(3))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.testing.assert_close(found, merge_utils.dare_linear(changes, torch.tensor(weights), density))


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_ties_and_dare_work_on_what_the_files_do(tmp_path: Path, method: str) -> None:
    one, other = some("sd1", 1), some("sd1", 20)
    parts = [(written(tmp_path / "one.safetensors", one), 0.7), (written(tmp_path / "other.safetensors", other), 0.5)]
    first, again, another = (
        last(lora_merge.merge(parts, name="both", method=method, exact=True, seed=seed, density=0.4)) for seed in (0, 0, 1)
    )
    assert first.content == again.content
    assert (first.content != another.content) == (method == "dare")
    assert first.errors.worst < 5e-5
    found = read_again(first, tmp_path).modules
    if method == "ties":
        for stem, shape in SHAPES.items():
            changes = [whole(one[stem], *shape), whole(other[stem], *shape)]
            assert off(whole(found[stem], *shape), merge_utils.ties(changes, torch.tensor([0.7, 0.5]), 0.4)) < 5e-5
    cut = last(lora_merge.merge(parts, name="both", method=method, density=0.4))
    assert read_again(cut, tmp_path).ranks == [6, 8]  # [10, 6] has 6 directions
    assert cut.errors.worst > 0.1


def test_dare_keeps_the_sum_on_average() -> None:
    change = drawn(300, 300)
    mean = torch.stack(
        [lora_merge.dare([change], [1.0], density=0.5, generator=torch.Generator().manual_seed(i)) for i in range(100)]
    ).mean(0)
    assert off(mean, change) == pytest.approx(0.1, rel=0.05)  # √((1 - p) / p / 100) of it is left to chance


def test_a_merged_file_says_what_it_was_made_of(tmp_path: Path) -> None:
    told = {"modelspec.trigger_phrase": "vitrail", "ss_new_sd_model_hash": "abc", "ss_sd_model_name": "base"}
    one = written(tmp_path / "one.safetensors", some("sdxl"), family="sdxl", **told)
    other = written(tmp_path / "other.safetensors", some("sdxl", 9), family="sdxl", **told | {"modelspec.trigger_phrase": "pip"})
    found = read_again(last(lora_merge.merge([(one, 1.0), (other, 1.0)], name="both")), tmp_path)
    assert found.metadata["modelspec.trigger_phrase"] == "vitrail, pip"
    assert found.metadata["modelspec.merged_from"] == "one, other"
    assert (found.metadata["ss_output_name"], found.metadata["ss_network_dim"], found.metadata["ss_network_alpha"]) == ("both", "8", "2")
    assert found.metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (found.metadata["ss_new_sd_model_hash"], found.metadata["ss_sd_model_name"]) == ("abc", "base")
    assert lora_file.facts(tmp_path / "made.safetensors")["stated_hash"] == "the same"
    assert found.layout == "kohya with SGM names"


def test_files_that_cancel_each_other_leave_nothing_and_no_error(tmp_path: Path) -> None:
    path = written(tmp_path / "one.safetensors", some("sd1"))
    made = last(lora_merge.merge([(path, 1.0), (path, -1.0)], name="nothing"))
    found = read_again(made, tmp_path).modules
    assert max(float(whole(found[stem], *shape).abs().max()) for stem, shape in SHAPES.items()) < 1e-5
    assert made.errors.worst < 0.01


def test_what_does_not_go_together_is_not_merged(tmp_path: Path) -> None:
    one = written(tmp_path / "one.safetensors", some("sd1"))
    xl = written(tmp_path / "xl.safetensors", some("sdxl"), family="sdxl")
    wide = written(tmp_path / "wide.safetensors", {CONV: conv(), QUERY: linear(width=16), KEY: linear(width=768)})
    v = written(tmp_path / "v.safetensors", some("sd1"), **{"modelspec.prediction_type": "v"})

    def merged(*parts: tuple[Path, float], **options: Any) -> Made:
        return last(lora_merge.merge(parts, name="both", **options))

    with pytest.raises(UserError, match=r"one\.safetensors is for sd1 and .*xl\.safetensors is for sdxl; only LoRAs of one family"):
        merged((one, 1.0), (xl, 1.0))
    with pytest.raises(UserError, match=r"attn1_to_q is \[20, 12\] in .*one.* and \[20, 16\] in .*wide.*; only LoRAs for one kind of base"):
        merged((one, 1.0), (wide, 1.0))
    assert "predict different things" in merged((one, 1.0), (v, 1.0)).notes[0]
    for options, sentence in (
        ({"method": "slerp"}, r"Merge method 'slerp' is unknown; there are sum, svd, ties, dare\."),
        ({"exact": True, "rank": 3}, r"exact keeps all ranks and a rank cuts them"),
        ({"exact": True, "method": "svd"}, r"exact keeps all ranks and the method svd cuts them"),
        ({"rank": 0}, r"rank 0 is out of range"),
        ({"density": 0.0}, r"density 0 is out of range"),
    ):
        with pytest.raises(UserError, match=sentence):
            merged((one, 1.0), (one, 1.0), **options)
    with pytest.raises(UserError, match=r"one\.safetensors has weight 0; give a number other than 0, or leave the file out\."):
        merged((one, 0.0))
    with pytest.raises(UserError, match=r"nothing to merge"):
        merged()
    full = written(tmp_path / "full.safetensors", {QUERY: Update(Full(drawn(20, 12)))})
    with pytest.raises(UserError, match=r"full.safetensors holds .*attn1_to_q in a form without a rank.*give a rank, or exact"):
        merged((one, 1.0), (full, 1.0))


# --- pictures -----------------------------------------------------------------------------------------------------------------


def latents(base: Base, loras: list[LoRA]) -> Tensor:
    generate.set_loras(base, loras)
    request = Request("a red star", seed=3, steps=4, guidance=3.0)
    states = text.encode(base, text.tokens(base, ["", request.prompt]))
    *_, final = generate.denoise(base, drawn(1, 4, 16, 16, seed=4), states, request)
    return final


def test_latents_with_a_merge_are_those_with_both(tiny_base: Path, tmp_path: Path) -> None:
    base = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    shapes = {stem: base.parts[part].get_submodule(name).weight.shape for stem, (part, name) in base_model.stems(base).items()}
    paths = []
    for number in (1, 2):
        modules = {}
        for seed, (stem, shape) in enumerate(shapes.items()):
            if len(shape) > 1 and seed % 3 != number:  # each leaves out other modules
                down, up = drawn(2, *shape[1:], seed=seed * number), drawn(shape[0], 2, *[1] * (len(shape) - 2), seed=seed + number)
                modules[stem] = Update(LowRank(down * 0.1, up * 0.1, 1.0 + number))
        paths.append(written(tmp_path / f"{number}.safetensors", modules, family="other"))
    made = last(lora_merge.merge([(paths[0], 0.6), (paths[1], -0.3)], name="both"))
    files.write(tmp_path / "both.safetensors", made.content)
    plain, both = latents(base, []), latents(base, [LoRA(paths[0], 0.6), LoRA(paths[1], -0.3)])
    merged = latents(base, [LoRA(tmp_path / "both.safetensors")])
    torch.testing.assert_close(merged, both, rtol=0, atol=1e-4)
    assert float((both - plain).abs().max()) > 0.05
