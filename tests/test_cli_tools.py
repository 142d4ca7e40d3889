"""The commands around files and folders, as a person types them: what is written, what is said, and what a mistake gets."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdlora import files, lora_file
from sdlora.deltas import LowRank, Update
from tests.test_cli import assert_one_sentence, run


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two LoRA files of rank 2 over one linear that the tiny base has too."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for name in ("a", "b"):
        modules = {
            f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_{which}": Update(
                LowRank(torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator), 2.0)
            )
            for which in ("to_q", "to_k")
        }
        paths.append(tmp_path / f"{name}.safetensors")
        files.write(paths[-1], lora_file.to_bytes(modules, {}, family="sd1"))
    return paths[0], paths[1]


def product(path: Path, which: str = "to_q") -> torch.Tensor:
    change = lora_file.read(path).modules[f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_{which}"].change
    return change.alpha / change.rank * change.up.float() @ change.down.float()


def test_convert_goes_there_and_back_bit_for_bit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    code, said, _ = run("convert", str(pair[0]), str(there), "--to", "diffusers")
    assert (code, "relative error: worst 0.0e+00" in said.lower()) == (0, True)
    assert run("convert", str(there), str(back), "--to", "kohya")[0] == 0
    for stem, update in lora_file.read(pair[0]).modules.items():
        again = lora_file.read(back).modules[stem]
        assert torch.equal(again.change.down, update.change.down)
        assert torch.equal(again.change.up, update.change.up)


def test_merge_is_the_weighted_sum_and_resize_says_what_it_costs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merged, small = tmp_path / "merged.safetensors", tmp_path / "small.safetensors"
    code, said, _ = run("merge", f"{pair[0]}:0.6", f"{pair[1]}:-0.3", str(merged))
    assert code == 0
    assert "mean" in said
    torch.testing.assert_close(product(merged), 0.6 * product(pair[0]) - 0.3 * product(pair[1]), atol=2e-2, rtol=1e-2)
    code, said, _ = run("resize", str(merged), str(small), "--rank", "1")
    assert code == 0
    assert lora_file.read(small).ranks == [1]
    assert "worst" in said


def test_bake_and_extract_are_each_others_inverse(pair: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    assert run("bake", str(tmp_path / "baked"), "--base", str(tiny_base), "--lora", f"{pair[0]}:0.5")[0] == 0
    out = tmp_path / "out.safetensors"
    assert run("extract", str(out), "--base", str(tiny_base), "--tuned", str(tmp_path / "baked"), "--rank", "2")[0] == 0
    torch.testing.assert_close(product(out), 0.5 * product(pair[0]), atol=2e-2, rtol=2e-2)


def test_inspect_says_what_matches_a_base(pair: tuple[Path, Path], tiny_base: Path) -> None:
    code, said, _ = run("inspect", str(pair[0]), "--base", str(tiny_base), "--json")
    facts = json.loads(said)
    assert (code, facts["fits"], facts["matches"]) == (0, True, "2 of 2 modules match")


def test_check_names_what_is_wrong_exits_2_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("good", "cut"):
        Image.effect_noise((600, 600), 60).convert("RGB").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"pip, a {name} picture")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:999])
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    code, said, _ = run("check", str(folder), "--trigger", "pip", "--kind", "character", "--sheet", str(tmp_path / "sheet.png"))
    assert code == 2
    assert [line for line in said.splitlines() if line.startswith("stops: cut.png")]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 200
    code, said, _ = run("check", str(folder), "--json")
    told = json.loads(said)
    assert (code, told["counts"]["stops"], told["pictures"]) == (2, 1, 1)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_check_of_a_run_sees_it_as_training_would(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(f'base = "{tiny_base}"\ndata = "{pictures}"\nkind = "style"\nname = "x"\nbatch = 2\n')
    code, said, _ = run("check", str(toml))
    assert code == 0
    assert "5 pictures in 1 training size; an epoch shows 5 pictures in 3 steps of 2." in said
    assert "size 32 by 32" in said


def test_cache_says_what_is_kept_and_clears_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdlora import cache

    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path))
    cache.put(tmp_path, "ab" * 32, {"mean": torch.zeros(8)})
    assert "1 entries" in run("cache")[1]
    assert run("cache", "--clear")[1].startswith("Deleted 1 entries")
    assert "0 entries" in run("cache", "--info")[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["convert", "{a}", "{b}", "--to", "kohya"], "exists already; give another name"),
        (["convert", "{a}", "out.bin", "--to", "kohya"], r"must end in \.safetensors"),
        (["convert", "{a}", "{out}", "--to", "a1111"], "Layout 'a1111' is unknown"),
        (["merge", "{a}"], "merge needs at least one FILE:WEIGHT"),
        (["merge", "{a}:0.5:0.5", "{out}"], "give one weight"),
        (["merge", "{a}:x", "{out}"], "'x' is not a number"),
        (["merge", "{a}", "{out}", "--method", "magic"], "magic"),
        (["resize", "{a}", "{out}"], "rank|energy"),
        (["bake", "{dir}", "--base", "mini", "--lora", "{a}"], "exists already"),
        (["extract", "{out}", "--base", "mini", "--tuned", "nowhere", "--rank", "4"], "'nowhere' is unknown"),
        (["check", "nowhere"], ""),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_sentence(pair: tuple[Path, Path], tmp_path: Path, words: list[str], sentence: str) -> None:
    (tmp_path / "dir").mkdir()
    names = {"a": str(pair[0]), "b": str(pair[1]), "out": str(tmp_path / "out.safetensors"), "dir": str(tmp_path / "dir")}
    code, said, problem = run(*[word.format(**names) for word in words])
    assert code == 2
    if words[0] == "check":
        assert "There is no such folder" in said
    else:
        assert_one_sentence(problem, sentence)
    assert not (tmp_path / "out.safetensors").exists()
