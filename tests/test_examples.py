"""The example datasets are what the world draws, and the example configs can be run on them; presets say what they do."""

import json
import os
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora import base_model, config, linked, lora
from sdlora import material as materials
from sdlora.config_tables import Config
from sdlora.mini import examples

ROOT = Path(__file__).parent.parent
FAMILIES = {"sd15": ("sd1", "epsilon"), "sd21": ("sd2", "v_prediction"), "sdxl": ("sdxl", "epsilon")}
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("sd*.toml"))


def test_the_committed_pictures_and_captions_are_what_the_world_draws(tmp_path: Path) -> None:
    examples.write(tmp_path)
    for name in ("style", "character"):
        made, committed = ({p.name: p.read_bytes() for p in (root / name).iterdir()} for root in (tmp_path, ROOT / "datasets"))
        assert made == committed
        assert len(made) == 2 * 30


@pytest.mark.parametrize(("name", "trigger"), [("style", "vitrail"), ("character", "pip")])
def test_each_example_config_finds_its_pictures_and_every_caption_holds_the_trigger(name: str, trigger: str) -> None:
    run = config.load(ROOT / "configs" / f"mini-{name}.toml")
    samples = materials.find_or_refuse(run).samples
    assert (run.kind, run.trigger, len(samples)) == (name, trigger, 30)
    data = materials.material(run, samples, grain_px=16, resolution_px=64)
    captions = [materials.plain_caption(data.rules, sample) for sample in samples]
    assert all(trigger in caption.replace(",", " ").split() for caption in captions)
    assert captions == [sample.caption for sample in samples], "the trigger word stands in the files"
    assert {item.shape_px for item in data.items} == {(64, 64)}


# --- presets for Stable Diffusion -------------------------------------------------------------------------------------------------


def text_of(name: str) -> str:
    return (ROOT / "configs" / f"{name}.toml").read_text()


def preset(name: str, text: str | None = None) -> Config:
    """A preset as it would run on 30 pictures."""
    values: dict[str, Any] = tomllib.loads(text or text_of(name))
    run = Config.model_validate(values | {"data": [{"folder": values["data"]}]})
    family, prediction = FAMILIES[name.split("-")[0]]
    return linked.resolve(run, family=family, prediction=prediction, pictures=30).run


@cache
def parts(family: str) -> dict[str, nn.Module]:
    """UNet and first text encoder of full size, without weights."""
    folder = ROOT / "sdlora" / "families" / family
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet" / "config.json").read_text()))
        text = CLIPTextModel(CLIPTextConfig(**json.loads((folder / "text_encoder" / "config.json").read_text())))
    return {"unet": unet, "text_encoder": text}


def counted(run: Config, family: str) -> tuple[list[int], float]:
    """Trained modules of each part, and the LoRA file's size in MB."""
    assert run.lora.text_targets is not None
    targets = {"unet": run.lora.targets} | ({"text_encoder": run.lora.text_targets} if run.lora.text_encoder else {})
    shapes = []
    for part, preset in targets.items():
        module = parts(family)[part]
        names = lora.matching(module, base_model.targets(preset, part=part))
        shapes.append([module.get_submodule(name).weight.shape for name in names])
    numbers = sum(run.lora.rank * (shape[0] + shape[1:].numel()) for part in shapes for shape in part)
    return [len(part) for part in shapes], 2 * numbers / 1e6


def test_there_is_a_preset_for_each_family_and_kind_and_for_little_memory() -> None:
    kinds = {f"{family}-{kind}" for family in FAMILIES for kind in ("style", "character")}
    assert set(PRESETS) == kinds | {"sd15-low-memory", "sdxl-low-memory"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_run_that_says_what_linking_would_not(name: str) -> None:
    run = config.load(ROOT / "configs" / f"{name}.toml")
    assert name.endswith(run.kind) or name.endswith("low-memory")
    assert f"sdlora train configs/{name}.toml" in text_of(name)
    filled, values = preset(name), tomllib.loads(text_of(name))
    for key in linked.RULES:
        table, _, last = key.rpartition(".")
        if last in (values.get(table, {}) if table else values):
            without = re.sub(rf"(?m)^{last} = .*\n", "", text_of(name))
            assert preset(name, without) != filled, f"{key} is what it would be anyway"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_counts_its_modules_and_its_file_rightly(name: str) -> None:
    run, said = preset(name), re.sub(r"\s*\n#\s*", " ", text_of(name).partition("\nbase")[0])
    modules, size_mb = counted(run, FAMILIES[name.split("-")[0]][0])
    assert [int(one) for one in re.findall(r"(\d+) modules|and (\d+) of the text", said) for one in one if one] == modules
    assert re.findall(r"file of (\d+) MB", said) == [f"{size_mb:.0f}"]
    assert re.findall(r"at rank (\d+)", said) == [str(run.lora.rank)]


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_suggests_in_comments_is_allowed(name: str) -> None:
    head, _, suggested = text_of(name).partition("# What people change most:\n")
    changes = re.sub(r"(?m)^# ", "", suggested)
    assert "low-memory" in name or changes.strip()
    changed = preset(name, head + changes)
    again = config.parse(tomllib.loads(config.to_toml(changed)), where="config.toml")
    assert again == changed
    assert again != preset(name) or "low-memory" in name


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_little_memory_changes_neither_steps_nor_rate_nor_pictures_per_step(family: str) -> None:
    low, usual = preset(f"{family}-low-memory"), preset(f"{family}-character")
    assert low.batch * low.optimizer.accumulation == usual.batch * usual.optimizer.accumulation
    assert (low.batch, low.gradient_checkpointing, low.lora.text_encoder) == (1, True, False)
    assert (low.steps, low.lora.rank, low.lora.alpha) == (usual.steps, usual.lora.rank, usual.lora.alpha)
    assert low.optimizer.learning_rate == usual.optimizer.learning_rate


def test_two_machines_are_launched_as_accelerate_understands_it(tmp_path: Path) -> None:
    told = tmp_path / "accelerate"
    told.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    told.chmod(0o755)
    script = ROOT / "configs" / "two-nodes.sh"
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "GPUS": "4"}
    done = subprocess.run([script, "1", "10.0.0.1", "my run.toml", "out"], env=env, capture_output=True, text=True, check=True)
    command, *options = done.stdout.splitlines()
    asked = launch_command_parser().parse_args(options)
    assert command == "launch"
    assert (asked.num_machines, asked.num_processes, asked.machine_rank, asked.main_process_ip) == (2, 8, 1, "10.0.0.1")
    assert (asked.module, asked.training_script) == (True, "sdlora")
    assert asked.training_script_args == ["train", "my run.toml", "--out", "out"]
    assert subprocess.run([script], env=env, capture_output=True).returncode == 2
