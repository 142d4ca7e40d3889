"""What is given away of a run: complete for other tools, whole or not at all, and without a word of the machine that it was made on."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from sdlora import base_files, chosen, config, files, generate, hub, lora_file, model_card, share, share_checks, train, weights_file
from sdlora.deltas import LowRank, Update
from sdlora.errors import UserError
from sdlora.model_card import Card, Sample
from sdlora.share import Wishes
from tests.test_lora_names import targeted

PROMPTS = ["vitrail, a cup of my aunt Odile", "a red star"]


@pytest.fixture(scope="session")
def finished(tiny_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 steps that recommends step 3."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = {
        "base": str(tiny_base), "data": str(pictures), "kind": "character", "trigger": "vitrail", "name": "odile v1", "steps": 6,
        "batch": 2, "save_every": 3, "sample_every": 3, "sample_prompts": PROMPTS,
        "lora": {"rank": 2, "alpha": 2.0, "targets": "attn-mlp-conv"},
        "report": False, "output": {"author": "A. Uthor", "license": "cc-by-4.0"},
    }  # fmt: skip
    for _ in train.train(config.parse(values, where="test"), folder):
        pass
    verdict = {"step": 3, "strength": 0.8, "reason": "lowest held-out loss | of all", "path": "checkpoints/odile v1-000003.safetensors"}
    (folder / "verdict.json").write_text(json.dumps(verdict))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "somebody's runs/run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_and_a_zip_hold_all_that_others_need(run: Path, tmp_path: Path) -> None:
    made = share.share(run, tmp_path / "gift")
    inside = contents(tmp_path / "gift")
    assert set(inside) == {
        "odile v1.safetensors", "odile v1.json", "odile v1.png", "README.md", "config.toml",
        "samples/1.png", "samples/1-without.png", "samples/2.png", "samples/2-without.png",
    }  # fmt: skip
    with zipfile.ZipFile(made.archive) as archive:
        assert archive.testzip() is None
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}  # not that of the day
        assert {name: archive.read(name) for name in archive.namelist()} == {f"gift/{name}": content for name, content in inside.items()}
    beside = json.loads(inside["odile v1.json"])
    assert (beside["activation text"], beside["preferred weight"]) == ("vitrail", 0.8)
    with Image.open(tmp_path / "gift/odile v1.png") as preview, Image.open(run / "samples/000003-0.png") as drawn:
        assert preview.tobytes() == drawn.tobytes()
    with Image.open(tmp_path / "gift/samples/2-without.png") as without, Image.open(run / "samples/000000-1.png") as drawn:
        assert without.tobytes() == drawn.tobytes()


def test_the_recommended_checkpoint_is_given_away_and_its_weights_are_untouched(run: Path, tmp_path: Path) -> None:
    made = share.share(run, tmp_path / "gift")
    assert (made.choice.step, made.choice.strength) == (3, 0.8)
    assert_same_weights(tmp_path / "gift/odile v1.safetensors", run / "checkpoints/odile v1-000003.safetensors")
    told = lora_file.read(tmp_path / "gift/odile v1.safetensors").metadata
    assert (told["ss_output_name"], told["modelspec.trigger_phrase"], told["ss_network_dim"]) == ("odile v1", "vitrail", "2")
    assert (told["modelspec.license"], told["modelspec.author"], told["modelspec.usage_hint"]) == ("cc-by-4.0", "A. Uthor", "strength 0.8")


def test_another_step_or_without_a_recommendation_the_result(run: Path, tmp_path: Path) -> None:
    share.share(run, tmp_path / "six", wishes=Wishes(checkpoint=6))
    chosen.mark_best(run, 6, 0.7)
    marked = share.share(run, tmp_path / "marked").choice
    assert (marked.step, marked.strength) == (6, 0.7), "a person's mark goes before the run's own word"
    (run / "chosen.json").unlink()
    (run / "verdict.json").unlink()
    made = share.share(run, tmp_path / "last")
    assert (made.choice.step, made.choice.strength) == (6, 1.0)
    for name in ("six", "last"):
        assert_same_weights(tmp_path / name / "odile v1.safetensors", run / "odile v1.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights_file.read(one).tensors, weights_file.read(other).tensors
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)


@pytest.mark.parametrize("keep", [True, False])
def test_no_path_of_this_machine_is_inside_whatever_is_kept(
    run: Path, pictures: Path, tiny_base: Path, tmp_path: Path, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share_checks, "check_private", lambda *_: None)  # left out, not only caught
    made = share.share(run, tmp_path / "gift", wishes=Wishes(keep_prompts=keep))
    for content in [*contents(tmp_path / "gift").values(), made.archive.read_bytes()]:
        for secret in (run, run.parent, pictures, pictures.parent, tiny_base.parent, Path.home() / "x", Path.cwd()):
            assert str(secret).encode() not in content


def test_settings_lose_windows_paths_and_every_other_path_too(tmp_path: Path) -> None:
    values = {
        "base": "C:\\Users\\odile\\sd.safetensors", "vae": "/home/odile/vae", "kind": "style", "name": "x",
        "data": [{"folder": "/home/odile/cats", "masks": "/home/odile/masks", "caption": "odile"}],
        "sample_prompts": ["odile"], "captions": {"prefix": "odile", "suffix": "odile"},
        "validation": {"folder": "C:\\Users\\odile\\apart"}, "lora": {"start_from": "/home/odile/first.safetensors"},
    }  # fmt: skip
    run = config.parse(values, where="test")
    kept, stripped = share.public_settings(run, keep_prompts=True), share.public_settings(run)
    assert (kept["base"], kept["vae"], kept["data"][0]["folder"], kept["data"][0]["masks"]) == ("sd.safetensors", "vae", "cats", "masks")
    assert (kept["validation"]["folder"], kept["lora"]["start_from"]) == ("apart", "first.safetensors")
    assert kept["sample_prompts"] == ["odile"]
    assert re.search(r"[/\\]", json.dumps(kept)) is None
    assert "odile" not in json.dumps(stripped)


def test_a_base_of_the_hub_keeps_its_name_and_a_folder_that_looks_like_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "cached", lambda name: tmp_path if name == "owner/sd-15" else None)
    assert share.public_name("owner/sd-15") == "owner/sd-15"
    assert share.public_name("odile/models") == "models"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/sd-15").mkdir(parents=True)
    assert share.public_name("owner/sd-15") == "sd-15"


def test_prompts_are_in_nothing_if_stripped_and_in_pictures_card_and_file_if_kept(run: Path, tmp_path: Path) -> None:
    (run / "compare.png").write_bytes(generate.png_bytes(Image.new("RGB", (9, 9)), "a sheet"))
    for keep in (False, True):
        made = share.share(run, tmp_path / str(keep), wishes=Wishes(keep_prompts=keep))
        assert made.pictures == 4
    stripped, kept = contents(tmp_path / "False"), contents(tmp_path / "True")
    for name, content in stripped.items():
        words = share_checks.words_of(name, content)
        assert "aunt" not in words, name
        assert "a red star" not in words, name
        assert "background" not in words or name == "config.toml", name  # a word of the captions
        if name.endswith(".png"):
            assert words == "{}"
    for name in ("samples/1.png", "samples/1-without.png", "odile v1.png", "README.md", "config.toml"):
        assert PROMPTS[0] in share_checks.words_of(name, kept[name]).replace('\\"', '"'), name
    assert "ss_tag_frequency" in share_checks.words_of("x.safetensors", kept["odile v1.safetensors"])
    assert set(kept) - set(stripped) == {"compare.png"}
    assert "compare.png" in kept["README.md"].decode()


def test_equal_runs_are_equal_zips_and_nothing_is_written_over(run: Path, tmp_path: Path) -> None:
    first = share.share(run, tmp_path / "a/gift").archive.read_bytes()
    os.utime(run / "odile v1.safetensors", (1, 1))
    assert share.share(run, tmp_path / "b/gift").archive.read_bytes() == first
    before = contents(tmp_path / "a")
    with pytest.raises(UserError, match=r"gift exists already, and nothing is written over"):
        share.share(run, tmp_path / "a/gift")
    shutil.rmtree(tmp_path / "b/gift")
    with pytest.raises(UserError, match=r"gift\.zip exists already"):
        share.share(run, tmp_path / "b/gift")
    assert contents(tmp_path / "a") == before


def test_the_run_itself_is_not_changed(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    share.share(run, tmp_path / "gift", wishes=Wishes(keep_prompts=True))
    assert contents(run) == before


def test_a_disk_that_fills_up_leaves_neither_folder_nor_zip(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = os.fsync, []
    for nth in range(1, 11):  # 9 files and the zip
        calls.clear()

        def full(number: int, nth: int = nth) -> None:
            calls.append(1)
            if len(calls) == nth:
                raise OSError(28, "No space left on device")
            honest(number)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            share.share(run, tmp_path / "out/gift")
        assert list((tmp_path / "out").iterdir()) == []


# --- complete -----------------------------------------------------------------------------------------------------------------


def changed(path: Path, **changes: Any) -> None:
    """The LoRA file with other modules or words, written anew."""
    file = lora_file.read(path)
    modules = {stem: changes.get("update", lambda one: one)(update) for stem, update in file.modules.items()}
    for stem in list(modules)[: changes.get("drop", 0)]:
        del modules[stem]
    files.write(path, lora_file.to_bytes(modules, file.metadata, family=file.family, dtype=None))


def test_a_file_that_lacks_a_module_is_not_shared(run: Path, tmp_path: Path) -> None:
    changed(run / "odile v1.safetensors", drop=1)
    with pytest.raises(UserError, match=r"holds (\d+) modules and 0 unknown keys, and \d+ modules were trained; it is not complete"):
        share.share(run, tmp_path / "out/gift", wishes=Wishes(checkpoint=6))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_with_a_number_that_is_not_finite_is_not_shared(run: Path, tmp_path: Path) -> None:
    path = run / "odile v1.safetensors"
    content = bytearray(path.read_bytes())
    content[-2:] = b"\x00\x7e"  # fp16's NaN
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds NaN or infinity"):
        share.share(run, tmp_path / "gift", wishes=Wishes(checkpoint=6))
    assert not (tmp_path / "gift").exists()


def test_a_file_whose_weights_are_not_those_that_were_saved_is_not_shared(run: Path, tmp_path: Path) -> None:
    path = run / "odile v1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x80  # a sign
    path.write_bytes(content)
    with pytest.raises(UserError, match="other weights than its own sshs_model_hash says"):
        share.share(run, tmp_path / "gift", wishes=Wishes(checkpoint=6))


def small(family: str, layout: str) -> bytes:
    """A file that names every module of a family, in tensors of one number."""
    modules = {stem: Update(LowRank(torch.ones(1, 1), torch.ones(1, 1), 1.0)) for stem in targeted(family, "attn")}
    version = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[family]
    return lora_file.to_bytes(modules, {"ss_base_model_version": version}, family=family, layout=layout)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_finds_all_modules_of_every_family_and_each_that_is_missing(family: str, layout: str, tmp_path: Path) -> None:
    files.write(tmp_path / "x.safetensors", small(family, layout))
    file, tensors = lora_file.read(tmp_path / "x.safetensors"), weights_file.read(tmp_path / "x.safetensors").tensors
    assert (file.family, len(file.modules) > 100) == (family, True)
    assert share_checks.missing_in_diffusers(tensors, file) == []
    key = next(key for key in tensors if key.endswith(("lora_up.weight", "lora_B.weight")))
    assert len(share_checks.missing_in_diffusers({one: tensors[one] for one in tensors if one != key}, file)) >= 1


def test_names_that_diffusers_does_not_know_are_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = share_checks.convert_unet_state_dict_to_peft
    monkeypatch.setattr(
        share_checks, "convert_unet_state_dict_to_peft",
        lambda tensors: {key: one for key, one in honest(tensors).items() if "mid_block" not in key},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"diffusers finds no weights for \d+ of \d+ modules \(mid_block\."):
        share.share(run, tmp_path / "gift")


def test_the_cards_code_runs_and_draws_with_the_lora(run: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share.share(run, tmp_path / "gift", wishes=Wishes(keep_prompts=True))
    monkeypatch.chdir(tmp_path / "gift")
    code = code_of((tmp_path / "gift/README.md").read_text())
    assert '"pipeline")  # the base: a folder of yours' in code
    run_code(code, tiny_base)
    with Image.open("picture.png") as drawn:
        assert drawn.size == (32, 32)


def run_code(code: str, base: Path) -> None:
    here = {'from_pretrained("pipeline")': f"from_pretrained({str(base)!r})", ").images": ", num_inference_steps=2).images"}
    for before, after in here.items():
        assert before in code
        code = code.replace(before, after)
    exec(code, {})


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("\n```\n")[0]


# --- the card -----------------------------------------------------------------------------------------------------------------


def card(**changes: Any) -> Card:
    values = {"name": "x", "file": "x.safetensors", "family": "sd1", "kind": "style", "trigger": "vitrail", "base": "sd.safetensors"}
    return Card(**(values | changes))


def test_the_hub_reads_base_licence_trigger_tags_and_pictures() -> None:
    samples = (Sample("samples/1.png", "samples/1-without.png", 'a "cup": - | y\n# no heading'), Sample("samples/2.png"))
    text = model_card.text(card(hub_base="owner/sd", license="cc-by-4.0", samples=samples, family="sdxl"))
    read = ModelCard(text).data
    assert (read.base_model, read.license, read.instance_prompt) == ("owner/sd", "cc-by-4.0", "vitrail")
    assert {"text-to-image", "stable-diffusion", "stable-diffusion-xl", "lora", "diffusers"} <= set(read.tags)
    assert read.widget == [
        {"text": 'a "cup": - | y\n# no heading', "output": {"url": "samples/1.png"}},
        {"text": "-", "output": {"url": "samples/2.png"}},
    ]


def test_a_licence_in_ones_own_words_and_none_at_all() -> None:
    own = ModelCard(model_card.text(card(license="For my Friends only!"))).data.to_dict()
    assert (own["license"], own["license_name"]) == ("other", "for-my-friends-only")
    assert "license" not in ModelCard(model_card.text(card())).data.to_dict()
    assert "none is stated: ask before you use it" in model_card.text(card())


@pytest.mark.parametrize("evil", ["`x` | <script>alert(1)</script>", "a\n## heading\n```\ncode", "![x](http://y)", '"; import os #'])
def test_words_of_others_are_shown_and_never_taken_for_markup_or_code(evil: str) -> None:
    text = model_card.text(card(trigger=evil, samples=(Sample("samples/1.png", prompt=evil),), license=evil, author=evil, notes=(evil,)))
    body = text.split("---\n", 2)[2]
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        "# x",
        "## How to use it",
        "## Samples",
        "## How it was trained",
    ]
    assert [line for line in body.splitlines() if line.startswith("```")] == ["```python", "```"]
    outside = re.sub(r"`[^`\n]*`", "", re.sub(r"```python.*?\n```\n", "", body, flags=re.DOTALL))
    assert re.search(r"(?<!\\)<script|(?<!\\)!\[x\]|(?<!\\)\[x\]\(http", outside) is None
    compile(code_of(text), "card", "exec")
    assert json.dumps(evil, ensure_ascii=False) in code_of(text)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"hub_base": "owner/sd"}, 'StableDiffusionPipeline.from_pretrained("owner/sd")'),
        ({}, 'StableDiffusionPipeline.from_single_file("sd.safetensors")'),
        ({"family": "sdxl", "base": "xl"}, 'StableDiffusionXLPipeline.from_pretrained("xl")'),
        ({"family": "mini", "base": "mini"}, "from_pretrained(MINI)"),
        ({"hub_id": "me/x"}, 'load_lora_weights("me/x", weight_name="x.safetensors"'),
    ],
)
def test_the_code_opens_the_base_that_there_is(changes: dict[str, Any], line: str) -> None:
    code = code_of(model_card.text(card(**changes)))
    assert line in code
    compile(code, "card", "exec")


def test_a_card_for_the_embedded_base_names_no_program_that_has_it_not() -> None:
    text = model_card.text(card(family="mini", base="mini", strength=0.8))
    assert "A1111" not in text
    assert "`sdlora generate --base mini --lora x.safetensors:0.8 --prompt vitrail`" in text
    assert "<lora:x:0.8> vitrail" in model_card.text(card(strength=0.8))
    assert base_files.MINI.is_dir()


def test_a_file_that_diffusers_cannot_load_has_no_code_and_says_why(tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    for layout, why in (("kohya", "convolutions"), ("diffusers", "")):
        content = lora_file.to_bytes({stem: Update(LowRank(torch.ones(1, 4), torch.ones(4, 1), 1.0))}, {}, family="sd2", layout=layout)
        files.write(tmp_path / "x.safetensors", content)
        file = lora_file.LoRAFile(lora_file.read(tmp_path / "x.safetensors").modules, {"ss_base_model_version": "sd_v2"})
        assert why in share_checks.no_diffusers(file)
        assert bool(share_checks.no_diffusers(file)) == bool(why)
    assert "```" not in model_card.text(card(no_diffusers="it cannot."))


# --- mistakes -----------------------------------------------------------------------------------------------------------------


def without_result(run: Path) -> None:
    (run / "odile v1.safetensors").unlink()
    (run / "verdict.json").unlink()


def stopped(run: Path) -> None:
    without_result(run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if '"done"' not in line) + "\n")


@pytest.mark.parametrize(
    ("spoil", "wishes", "sentence"),
    [
        (lambda run: None, Wishes(checkpoint=4), r"has no checkpoint of step 4; choose one with --checkpoint STEP: .* steps 3, 6\."),
        (without_result, Wishes(), r"has no LoRA file of its end; choose one with --checkpoint STEP: .* steps 3\."),
        (stopped, Wishes(), r"has not come to its end; choose one with --checkpoint STEP: .* steps 3\."),
        (lambda run: (run / "config.toml").write_text("x ="), Wishes(), "cannot be shared: config.toml is not valid TOML"),
        (lambda run: shutil.rmtree(run), Wishes(), "cannot be shared: config.toml cannot be read"),
        (lambda run: None, Wishes(hub_id="no name"), "give the name of a repository of yours"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_sentence_and_nothing_is_written(run: Path, tmp_path: Path, spoil: Any, wishes: Wishes, sentence: str) -> None:
    spoil(run)
    with pytest.raises(UserError, match=sentence):
        share.share(run, tmp_path / "gift", wishes=wishes)
    assert not (tmp_path / "gift").exists()
    assert not (tmp_path / "gift.zip").exists()


def test_a_path_in_the_users_own_words_is_found_before_it_is_given_away(run: Path, tmp_path: Path) -> None:
    toml = (run / "config.toml").read_text()
    (run / "config.toml").write_text(toml.replace('author = "A. Uthor"', f'author = "{tmp_path / "somebody" / "x"}, {run}"'))
    with pytest.raises(UserError, match=r"would tell others of .*run on this machine"):
        share.share(run, tmp_path / "gift")


# --- the hub ------------------------------------------------------------------------------------------------------------------


class Hub:
    """What `HfApi` does, without a network."""

    def __init__(self, *, held: list[str] | None = None, problem: Exception | None = None) -> None:
        self.held, self.problem, self.asked = held or [".gitattributes"], problem, []

    def create_repo(self, name: str, **options: Any) -> str:
        if self.problem:
            raise self.problem
        self.asked.append(("create", name, options))
        return f"https://hub/{name}"

    def list_repo_files(self, name: str) -> list[str]:
        return self.held

    def upload_folder(self, **options: Any) -> None:
        self.asked.append(("upload", options["repo_id"], sorted(contents(Path(options["folder_path"])))))


def test_a_folder_is_uploaded_into_a_new_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write(tmp_path / "README.md", b"x")
    api = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    assert share.push(tmp_path, "me/x", private=True) == "https://hub/me/x"
    assert api.asked == [("create", "me/x", {"private": True, "exist_ok": True}), ("upload", "me/x", ["README.md"])]


class RefusedError(Exception):
    def __init__(self, status: int) -> None:
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("api", "sentence"),
    [
        (Hub(held=["README.md", "model.safetensors"]), r"holds 2 files already, such as README\.md; give a new name"),
        (Hub(problem=huggingface_hub.errors.LocalTokenNotFoundError("none")), "knows no token of yours; sign in with `hf auth login`"),
        (Hub(problem=RefusedError(401)), "knows no token of yours"),
        (Hub(problem=RefusedError(403)), "your token may not"),
        (Hub(problem=ConnectionError("no route")), r"\(ConnectionError\); connect"),
        (Hub(problem=huggingface_hub.errors.OfflineModeIsEnabled("off")), r"\(OfflineModeIsEnabled\); connect"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_and_the_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: Hub, sentence: str
) -> None:
    files.write(tmp_path / "README.md", b"x")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    with pytest.raises(UserError, match=sentence) as caught:
        share.push(tmp_path, "me/x")
    assert "complete and stays" in str(caught.value)
    assert not any(one[0] == "upload" for one in api.asked)
    assert contents(tmp_path) == {"README.md": b"x"}


def test_an_sdxl_run_is_shared_with_its_own_names_and_pipeline(tmp_path: Path) -> None:
    run = config.parse({"base": "xl", "data": "x", "kind": "style", "name": "xl", "trigger": "pip"}, where="test")
    files.write(tmp_path / "run/config.toml", config.to_toml(run).encode())
    files.write(tmp_path / "run/metrics.jsonl", b'{"event": "started"}\n{"event": "done"}\n')
    files.write(tmp_path / "run/xl.safetensors", small("sdxl", "kohya"))
    share.share(tmp_path / "run", tmp_path / "gift")
    assert_same_weights(tmp_path / "gift/xl.safetensors", tmp_path / "run/xl.safetensors")
    assert set(contents(tmp_path / "gift")) == {"xl.safetensors", "xl.json", "README.md", "config.toml"}  # nothing was drawn
    assert any("input_blocks" in key for key in weights_file.read(tmp_path / "gift/xl.safetensors").tensors)
    assert "StableDiffusionXLPipeline" in (tmp_path / "gift/README.md").read_text()
