"""The commands as a person types them: what they print, what they leave, and one sentence with exit code 2 for a mistake."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdlora import cli, config, files, lora_file, many

TOML = """
base = '{base}'
data = '{data}'
kind = "style"
trigger = "vitrail"
name = "tiny"
steps = 4
batch = 2
sample_every = 2
save_every = 2
report = false
[lora]
rank = 2
alpha = 16.0
targets = "attn"
[validation]
every = 0
"""


def run(*words: str, cwd: Path | None = None) -> tuple[int, str, str]:
    """Runs a command in this process: exit code, what it printed, what it complained."""
    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    if cwd:
        os.chdir(cwd)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["sdlora", *words])
            cli.main()
    except SystemExit as ending:
        code = int(ending.code or 0)
    finally:
        os.chdir(before)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def config_path(tiny_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "run.toml"
    path.write_text(TOML.format(base=tiny_base, data=pictures))
    return path


@pytest.fixture(scope="session")
def run_path(config_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    code, _, problem = run("train", str(config_path), "--out", str(folder))
    assert (code, problem) == (0, "")
    return folder


def test_train_leaves_a_run_folder_with_samples_and_a_lora(run_path: Path) -> None:
    names = {str(path.relative_to(run_path)) for path in run_path.rglob("*") if path.is_file()}
    assert {name for name in names if not name.startswith("state/")} == {
        "config.toml", "metrics.jsonl", "tiny.safetensors", "checkpoints/tiny-000002.safetensors",
        *(f"samples/{step:06d}-{number}.png" for step in (0, 2, 4) for number in (0, 1)),
    }  # fmt: skip
    with Image.open(run_path / "samples/000004-0.png") as image:
        assert "Steps: 20" in image.info["parameters"]


def test_set_changes_a_key_and_dry_run_shows_it_and_trains_nothing(config_path: Path, tmp_path: Path) -> None:
    code, out, _ = run("train", str(config_path), "--set", "lora.rank=8", "--set", "name=other", "--dry-run", cwd=tmp_path)
    assert code == 0
    assert "rank = 8" in out
    assert 'name = "other"' in out
    assert "# 5 pictures to learn from and 0 held out; 5 visits are an epoch\n# 8 visits in 4 steps = 1.6 epochs" in out
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_gets_a_folder_of_its_own_and_the_same_again_is_not_trained_twice(
    config_path: Path, pictures: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    words = ["train", str(config_path), "--set", "sample_every=0", "--set", f"data='{data}'", "--set"]
    told = [" ".join(run(*words, f"steps={steps}", cwd=tmp_path)[1].split()) for steps in (1, 1, 2)]
    assert ["done already, with the same settings and pictures: runs/tiny." in one for one in told] == [False, True, False]
    assert [f"come to their end, the last in {last}, so this is a new" in told[2] for last in ("runs/tiny", "x")] == [True, False]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny", "tiny-2"]
    first = tmp_path / "runs/tiny"
    again = config.load(first / "config.toml")
    assert many.has_been(first, again)
    for name, content in (("config.toml", "base ="), ("tiny.safetensors", None), ("metrics.jsonl", "")):
        before = (first / name).read_bytes()
        (first / name).unlink() if content is None else (first / name).write_text(content)
        assert not many.has_been(first, again)
        (first / name).write_bytes(before)
    next(data.glob("*.txt")).write_text("something else")
    code, said, _ = run(*words, "steps=1", cwd=tmp_path)
    assert (code, "runs/tiny-3" in said) == (0, True)
    code, said, _ = run("share", "tiny-2", cwd=tmp_path)  # by its name alone
    assert (code, "Shared: step 2, to be used at strength 1" in said, (tmp_path / "shared").is_dir()) == (0, True, True)


def test_generate_writes_a_picture_per_prompt_and_seed_and_never_over_one(run_path: Path, tiny_base: Path, tmp_path: Path) -> None:
    words = ["generate", "--base", str(tiny_base), "--lora", f"{run_path / 'tiny.safetensors'}:0.8", "--prompt", "a red star",
             "--count", "2", "--steps", "2", "--seed", "5", "--sampler", "Euler a", "--size", "48x32", "--out", str(tmp_path)]  # fmt: skip
    assert run(*words)[0] == 0
    assert run(*words)[0] == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00001-5.png", "00002-6.png", "00003-5.png", "00004-6.png"]
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[2]).read_bytes() != (tmp_path / names[1]).read_bytes()
    with Image.open(tmp_path / names[0]) as image:
        assert image.size == (48, 32)
        assert image.info["parameters"].startswith("a red star <lora:tiny:0.8>\nSteps: 2, Sampler: Euler a,")


def test_compare_writes_a_sheet_with_a_column_without_lora(run_path: Path, tiny_base: Path, tmp_path: Path) -> None:
    code, out, problem = run(
        "compare", "--base", str(tiny_base), "--lora", str(run_path / "tiny.safetensors"), "--prompt", "a red star", "--prompt",
        "a blue cup", "--strengths", "0,0.5,1", "--steps", "2", "--out", str(tmp_path / "deep" / "sheet.png"),
    )  # fmt: skip
    assert (code, problem) == (0, "")
    with Image.open(tmp_path / "deep" / "sheet.png") as sheet:
        assert sheet.width > 3 * 160
        assert sheet.height > 2 * 160
    assert "6/6" in out
    code, _, problem = run("compare", "--lora", "a.safetensors", "--prompt", "x", "--out", str(tmp_path / "deep" / "sheet.png"))
    assert code == 2
    assert_one_sentence(problem, "sheet.png exists already; give another name")


def test_inspect_says_what_a_file_holds(run_path: Path) -> None:
    code, out, _ = run("inspect", str(run_path / "tiny.safetensors"), "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["rank"], facts["alpha"], facts["dtype"], facts["trigger_words"]) == (2, 16.0, "float16", "vitrail")
    assert facts["modules"] == {"unet": 56, "text_encoder": 0}
    assert facts["stated_hash"] == "the same"
    assert "trigger words" in run("inspect", str(run_path / "tiny.safetensors"))[1]


def test_help_is_there_without_the_heavy_libraries() -> None:
    program = "import sys; sys.argv = ['sdlora', '--help']\nfrom sdlora.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    program += "print(sorted({'torch', 'diffusers', 'gradio'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    assert all(name in done.stdout for name in ("demo", "train", "generate", "compare", "inspect", "app"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_what_is_learned_and_the_same_command_goes_on(config_path: Path, tmp_path: Path, number: int, code: int) -> None:
    command = [sys.executable, "-m", "sdlora", "train", str(config_path), "--out", str(tmp_path / "run"), "--set", "steps=100000"]
    child = subprocess.Popen(
        [*command, "--set", "sample_every=0", "--set", "save_every=100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"step"' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.1)
    child.send_signal(number)
    out, told = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Stopping after this step, and saving; once more ends at once" in told
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name in out
    assert lora_file.read(checkpoint).ranks == [2]
    step = int(checkpoint.stem.rpartition("-")[2])
    words = ("train", str(config_path), "--out", str(tmp_path / "run"), "--set", "sample_every=0", "--set", "save_every=100000")
    refused, _, problem = run(*words, "--set", f"steps={step + 1}")
    assert refused == 2
    assert_one_sentence(problem, rf"after step {step} with other settings.*steps was 100000 and is {step + 1}.*--allow-changes")
    done, out, _ = run(*words, "--set", f"steps={step + 1}", "--allow-changes")
    assert done == 0
    assert f"Going on after step {step}" in out


@pytest.fixture
def bad(tmp_path: Path, config_path: Path, pictures: Path) -> Path:
    """A folder of everything that can be wrong."""
    (tmp_path / "empty").mkdir()
    for name in ("no-caption", "unreadable"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "a.png")
    (tmp_path / "unreadable" / "a.txt").write_text("a picture")
    (tmp_path / "unreadable" / "a.png").write_bytes((tmp_path / "unreadable" / "a.png").read_bytes()[:60])
    (tmp_path / "pickle.ckpt").write_bytes(b"\x80\x02}q")
    (tmp_path / "not-toml.toml").write_text("steps = = 3")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("data=nowhere", "nowhere: There is no such folder that can be opened; name a folder"),
        ("data={bad}/empty", "empty: The data folder holds no picture that can be used; put pictures into it; .*png.* are read"),
        ("data={bad}/no-caption", "a.png: The picture has no caption; write what it shows into a.txt"),
        ("data={bad}/unreadable", "a.png: The picture cannot be read .*; save it anew"),
        ("stepz=3", "unknown key 'stepz'; the nearest valid key is 'steps'"),
        ("lora.rang=3", "unknown key 'lora.rang'; the nearest valid key is 'rank'"),
        ("steps='many'", r"'steps' is 'many' \(str\); input should be a valid integer"),
        ("lora.targets=everything", "LoRA targets 'everything' are unknown; presets are attn, attn-mlp"),
        ("base=sd9", "Base 'sd9' is unknown; give \"mini\", a folder"),
        ("kind=thing", "'kind' is 'thing'.*'style' or 'character'"),
    ],
)
def test_a_mistake_in_a_run_gets_one_sentence_and_exit_code_2(bad: Path, config_path: Path, change: str, sentence: str) -> None:
    code, _, problem = run("train", str(config_path), "--out", str(bad / "run"), "--set", change.format(bad=bad))
    assert code == 2
    assert_one_sentence(problem, sentence)
    assert not (bad / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "nowhere.toml"], "Config nowhere.toml does not exist"),
        (["train", "{bad}/not-toml.toml"], "not-toml.toml is not valid TOML"),
        (["inspect", "{bad}/pickle.ckpt"], "pickle.ckpt is a pickle, which can run code"),
        (["inspect", "{bad}/nothing.safetensors"], "nothing.safetensors does not exist"),
        (["generate", "--base", "sd9", "--prompt", "x"], "Base 'sd9' is unknown"),
        (["generate", "--base", "{tiny}", "--prompt", "x", "--lora", "{bad}/pickle.ckpt"], "is a pickle, which can run code"),
        (["generate", "--prompt", "x", "--size", "big"], "--size big: give width and height in pixels"),
        (["generate", "--base", "{tiny}", "--prompt", "x", "--size", "33x32"], "must be multiples of 2 px"),
        (["generate", "--base", "{tiny}", "--prompt", "x", "--sampler", "Eular"], "Sampler 'Eular' is unknown; there are DPM"),
        (["generate", "--prompt", "x", "--lora", "a.safetensors:9"], "9 is out of range; give a number from -2 to 2"),
        (["compare", "--prompt", "x", "--lora", "a.safetensors", "--out", "sheet.jpg"], "give a name that ends in .png"),
        (["compare", "--prompt", "x", "--lora", "a.safetensors", "--strengths", "half", "--out", "s.png"], "'half' is not a number"),
        (["app", "--host", "0.0.0.0"], "password"),
    ],
)
def test_a_mistake_in_a_command_gets_one_sentence_and_exit_code_2(bad: Path, tiny_base: Path, words: list[str], sentence: str) -> None:
    code, _, problem = run(*(word.format(bad=bad, tiny=tiny_base) for word in words), cwd=bad)
    assert code == 2
    assert_one_sentence(problem, sentence)


def test_a_truncated_lora_and_one_for_another_family_get_one_sentence(run_path: Path, tiny_base: Path, tmp_path: Path) -> None:
    whole = (run_path / "tiny.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{stem}.lora_down.weight": torch.zeros(4, 768), f"{stem}.lora_up.weight": torch.zeros(320, 4)}
    save_file(tensors, tmp_path / "sd1.safetensors")
    for name, sentence in (("cut", "damaged or not a safetensors file"), ("sd1", "does not fit base .* in the file and .* in the base")):
        code, _, problem = run("generate", "--base", str(tiny_base), "--prompt", "x", "--lora", str(tmp_path / f"{name}.safetensors"))
        assert code == 2
        assert_one_sentence(problem, sentence)


def test_a_full_disk_while_saving_leaves_the_earlier_file(config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the result is written: the checkpoint of step 2 stays whole, the run says so and exits with 2."""
    honest = files.write_through

    def full(path: Path, content: bytes) -> None:
        if "tiny.safetensors" in path.name:
            raise OSError(28, "No space left on device")
        honest(path, content)

    monkeypatch.setattr(files, "write_through", full)
    code, _, problem = run("train", str(config_path), "--out", str(tmp_path / "run"))
    assert code == 2
    assert_one_sentence(problem, r"could not be written \(No space left on device\); what stood there before is untouched")
    assert lora_file.read(tmp_path / "run/checkpoints/tiny-000002.safetensors").ranks == [2]
    assert not list((tmp_path / "run").rglob("*.part"))


def assert_one_sentence(problem: str, pattern: str) -> None:
    assert problem.startswith("sdlora: ")
    assert problem.count("\n") == 1
    assert "Traceback" not in problem
    assert re.search(pattern, problem), problem
