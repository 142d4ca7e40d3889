"""The commands that compare us with others work at tiny size, and print no speed of a thing that learns something else."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image

from benchmarks import forecast, full_finetune, generate, peers, train_step
from sdlora import config, lora, lora_attention, optimizer, recorded, train, winograd
from sdlora.forecast import Forecast

Turn = Callable[[int], dict[str, float]]


@pytest.fixture(scope="module")
def words(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command at tiny size, its adapters drawn."""
    out = tmp_path_factory.mktemp("benchmarks")
    asked = {"base": tiny_base, "rank": 2, "batch": 2, "resolution": 64, "steps": 1, "pairs": 2, "warmup": 1, "out": out}
    command = [part for key, value in asked.items() for part in (f"--{key}", str(value))]
    assert train_step.gate(train_step.arguments(command)) <= 1e-5
    return command


@pytest.fixture(scope="module")
def whole(words: list[str]) -> dict[str, float]:
    """What is exact about our step with all its pieces."""
    return train_step.turns_of(train_step.arguments([*words, "--child", "ours"]))(0)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Contenders work in this process, one after the other, and what they leave out is there again afterwards; who was asked."""
    asked: list[str] = []
    for place, name in (
        (lora.LoRALayer, "_plain"), (lora_attention, "share_inputs"), (train, "gather"), (optimizer, "OPTIMIZERS"),
        (recorded, "record"), (winograd, "use"),
    ):  # fmt: skip
        kept = getattr(place, name)
        monkeypatch.setattr(place, name, dict(kept) if isinstance(kept, dict) else kept)

    @contextmanager
    def contender(words: list[str], name: str) -> Iterator[Turn]:
        asked.append(name)
        options = train_step.arguments([*words, "--child", name])
        if name == "gate":
            distance = train_step.gate(options)
            yield lambda steps: {"distance": distance}
        else:
            yield train_step.turns_of(options)

    monkeypatch.setattr(train_step, "contender", contender)
    return asked


def test_the_tables_hold_both_and_the_last_line_is_the_ratio(
    words: list[str], here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_step.main([*words, "--json", str(tmp_path / "step.json")]) == 0
    said = capsys.readouterr().out
    assert here == ["gate", "ours", "peer, cached", "ours", "peer"]
    found = json.loads((tmp_path / "step.json").read_text())
    assert found["gate"] <= 1e-5
    like, box = found["tables"]["Like for like"], found["tables"]["Out of the box"]
    assert like["ours"]["launches"] < 0.9 * like["peer, cached"]["launches"]
    assert like["ours"]["optimizer_launches"] <= 12 < like["peer, cached"]["optimizer_launches"]
    assert like["ours"]["flops"] == pytest.approx(like["peer, cached"]["flops"], rel=0.01)
    assert box["peer"]["flops"] > 1.04 * like["peer, cached"]["flops"]  # pictures and texts at each step
    assert all(len(one["turns"]) == 2 for table in (like, box) for one in table.values())
    assert said.count("| ours |") == 2
    last = said.strip().splitlines()[-1]
    assert last.startswith("ours / theirs, ")
    assert last.endswith("2 pairs.")
    with Image.open(tmp_path / "step.png") as plot:
        assert len(plot.convert("RGB").getcolors(1 << 20) or []) > 3


def test_no_speed_is_printed_of_what_learns_something_else(
    words: list[str], here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = peers.loss
    monkeypatch.setattr(peers, "loss", lambda *given: loss(*given) * 1.0001)
    assert train_step.main(words) == 1
    said = capsys.readouterr().out
    assert here == ["gate"]
    assert "no speed is printed" in said
    assert "img/s" not in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("piece", sorted({*train_step.PIECES} - {"recorded", "winograd"}))
def test_a_piece_that_is_left_out_is_not_there(words: list[str], whole: dict[str, float], here: list[str], piece: str) -> None:
    with train_step.contender(words, f"ours without {piece}") as turn:
        less = turn(0)
        assert turn(1)["step_s"] > 0
    assert less != whole
    if piece == "cached":
        assert less["flops"] > 1.04 * whole["flops"]
    elif piece == "flat":
        assert less["traffic_bytes"] != whole["traffic_bytes"]
    else:
        assert less["launches"] > whole["launches"]


@pytest.mark.parametrize(("piece", "place", "work"), [("recorded", recorded, "played"), ("winograd", winograd, "convolved")])
def test_how_operations_are_done_can_be_left_out(
    words: list[str], here: list[str], monkeypatch: pytest.MonkeyPatch, piece: str, place: Any, work: str
) -> None:
    real, kept, calls = getattr(place, work), (recorded.record, winograd.use), list[str]()
    monkeypatch.setattr(place, work, lambda *given, **named: calls.append(work) or real(*given, **named))
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 8)
    for name in (f"ours without {piece}", "ours"):
        assert not calls
        with train_step.contender(words, name) as turn:
            assert turn(1)["step_s"] > 0
        recorded.record, winograd.use = kept
    assert calls


def test_a_contender_in_a_process_of_its_own_answers(words: list[str]) -> None:
    numbers = train_step.adapters_of(train_step.arguments(words))
    numbers.unlink()
    with train_step.contender(words, "gate") as turn:
        assert turn(0)["distance"] <= 1e-5
    assert numbers.is_file()


def test_turns_are_asked_for_line_by_line(
    words: list[str], here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n"))
    assert train_step.main([*words, "--child", "peer, cached"]) == 0
    ready, *turns = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert ready["saved_bytes"] > 0
    assert [set(turn) >= {"step_s", "cpu_s", "wall_s", "process_bytes"} for turn in turns] == [True, True]


def test_the_peers_caching_is_its_encoding_without_the_opening(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0.0]

    def taking(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def worked(*given: Any, **named: Any) -> Any:
            passed[0] += seconds
            return work(*given, **named)

        return worked

    monkeypatch.setattr(train_step, "clock", lambda device: passed[0])
    monkeypatch.setattr(peers, "open_peer", taking(100, peers.open_peer))
    monkeypatch.setattr(peers, "keep", taking(1, peers.keep))
    options = train_step.arguments(words)
    assert [train_step.theirs(options, caches=caches).caching_s for caches in (True, False)] == [1, 0]


@pytest.mark.parametrize("work", [False, True])
def test_what_happens_has_the_names_of_what_is_forecast(tiny_base: Path, pictures: Path, tmp_path: Path, work: bool) -> None:
    values = {"base": str(tiny_base), "data": str(pictures), "kind": "style", "name": "tiny", "steps": 3, "batch": 1, "report": False}
    run = config.parse(values | {"sample_every": 0, "validation": {"every": 0}, "lora": {"rank": 2}}, where="test")
    found = forecast.happened(run, tmp_path / "run", work=work)
    names = Forecast.row(cast(Forecast, SimpleNamespace(**dict.fromkeys(found))))
    assert set(found) == set(names)
    assert 0 < found["step_s"] < found["course_s"] < found["total_s"]


REFUSED = {
    "kohya": (["--against", "diffusers,kohya=/nowhere"], "cannot be run here"),
    "script": (["--script", "/nowhere/train.py"], "is no file"),
    "unknown": (["--against", "onetrainer"], "is unknown"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_others_that_cannot_be_run_are_refused_in_one_sentence(
    words: list[str], here: list[str], which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more, sentence = REFUSED[which]
    assert train_step.main([*words, *more]) == 2
    told = capsys.readouterr()
    assert here == []
    assert told.out == ""
    assert sentence in told.err
    assert len(told.err.strip().splitlines()) == 1


def test_the_start_of_a_script_does_not_count(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, time\ntime.sleep(0.5)\ntime.sleep(0.1 * int(sys.argv[1]))\n")
    _, wall_s = peers.seconds_per_step([sys.executable, str(script)], lambda steps: [str(steps)], steps=3, out=tmp_path)
    assert 0.05 < wall_s < 0.4


def test_a_script_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no such picture')\n")
    with pytest.raises(train_step.UserError, match=r"code 1 .no such picture"):
        peers.seconds_per_step([sys.executable, str(script)], lambda steps: [], steps=1, out=tmp_path)


@pytest.mark.parametrize("targets", ["attn", "attn-mlp"])
def test_drawing_with_loras_and_another_strength(targets: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--base", str(tiny_base), "--rounds", "1", "--steps", "2", "--out", str(tmp_path), "--json", str(tmp_path / "draw.json")]
    command += ["--targets", targets] + ["--parts", "strength"] * (targets != "attn")
    assert generate.main(command) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "draw.json").read_text())
    if targets == "attn":
        assert set(found["latency"]) == set(found["ten"]) == {"base", "folded", "beside"}
    assert set(found["strength"]) == {"ours", "folding", "between steps", "diffusers", "left"}
    left = found["strength"]["left"]
    assert left["modules"] > {"attn": 30, "attn-mlp": 45}[targets]
    assert left["load_s"] > 0
    assert left["ours_changed"] == 0
    assert len(list(tmp_path.glob("*-random-*.safetensors"))) == {"attn": 10, "attn-mlp": 1}[targets]
    assert f"Taken out again, 0 of {left['modules']} weights differ" in said
    assert "of diffusers' unfuse and fuse" in said.strip().splitlines()[-1]


def test_an_unknown_part_is_refused(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--base", str(tiny_base), "--parts", "speed", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "--parts speed is unknown; there are latency, ten, strength.\n"


def test_the_papers_claims_hold_for_sd15_at_full_size() -> None:
    found = full_finetune.counted("sd1", 16)
    assert found["parameters"] >= 265
    assert 4 * found["parameters"] >= 1000  # a quarter of the rank is a quarter of the numbers
    assert found["state, base in fp32"] >= 3
    assert found["state, base in bf16"] >= 3
    assert found["file, fp16"] >= 250
    assert found["operations"] >= 1.33


def test_a_step_of_full_fine_tuning_is_timed_beside_one_of_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert full_finetune.main(["--speed", "mini", "--pairs", "1", "--out", str(tmp_path)]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("LoRA's throughput is ")
    assert 0.3 < float(last.split()[3]) < 5


def test_ceilings_are_what_a_machine_can_do() -> None:
    top = peers.ceilings(torch.device("cpu"), torch.float32, side=256, rounds=2)
    assert 1e8 < top.flops < 1e13
    assert 1e8 < top.bytes < 1e12


def options_of(**values: Any) -> Any:
    return train_step.arguments([part for key, value in values.items() for part in (f"--{key}", str(value))])


def test_each_family_has_its_own_resolution() -> None:
    assert [options_of(family=family).resolution for family in train_step.FAMILIES] == [64, 256, 512, 1024]
