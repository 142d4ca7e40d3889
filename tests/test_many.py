"""Many runs from one command: what a sweep becomes, that one failure stops nothing, that nothing is done twice, and what compares them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from sdlora import (
    checkpoint,
    cli_runs,
    comparison,
    config,
    files,
    lora_file,
    many,
    material,
    prepare,
    resuming,
    run_folder,
    runs,
    train,
)
from sdlora.checkpoint import State
from sdlora.comparison import Outcome
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.many import Begun, Job

TOML = 'base = "mini"\ndata = "x"\nkind = "style"\nname = "{name}"\nsteps = 6\n'


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """The TOML files of two runs."""
    for name in ("pip-v1", "vit"):
        (tmp_path / f"{name}.toml").write_text(TOML.format(name=name))
    return [tmp_path / "pip-v1.toml", tmp_path / "vit.toml"]


# --- what is to be done -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("8,16,32", ["8", "16", "32"]),
        ("1e-4, 3e-4", ["1e-4", "3e-4"]),
        ("[512, 768],[512],512", ["[512, 768]", "[512]", "512"]),
        ("""["a,b", 'c]'],"d,e",'f"g'""", ["""["a,b", 'c]']""", '"d,e"', "'f\"g'"]),
        ("{rank = 4, alpha = 2},{rank = 8}", ["{rank = 4, alpha = 2}", "{rank = 8}"]),
        ("adamw", ["adamw"]),
        ("", [""]),
    ],
)
def test_values_are_parted_at_commas_outside_of_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert many.split_values(text) == values


def test_a_sweep_is_the_product_of_its_words_each_with_a_name_and_its_settings(paths: list[Path]) -> None:
    jobs = many.expand(paths[:1], ["steps=9"], ["lora.rank=8,16", "optimizer.learning_rate=1e-4,3e-4"])
    assert [job.config.name for job in jobs] == [
        "pip-v1-rank-8-learning_rate-0.0001", "pip-v1-rank-8-learning_rate-0.0003",
        "pip-v1-rank-16-learning_rate-0.0001", "pip-v1-rank-16-learning_rate-0.0003",
    ]  # fmt: skip
    assert [(job.config.lora.rank, job.config.optimizer.learning_rate) for job in jobs] == [(8, 1e-4), (8, 3e-4), (16, 1e-4), (16, 3e-4)]
    assert jobs[1].settings == {"lora.rank": "8", "optimizer.learning_rate": "3e-4"}
    assert {job.config.steps for job in jobs} == {9}


@pytest.mark.parametrize(
    ("sweep", "names"),
    [
        (["captions.shuffle=true,false"], ["shuffle-true", "shuffle-false"]),
        (["resolution_px=[512, 768],512"], ["resolution_px-512-768", "resolution_px-512"]),
        (["optimizer.name=adamw,lion"], ["name-adamw", "name-lion"]),
        (["""lora.targets=["*.attn1.*"],'attn'"""], ["targets-attn1", "targets-attn"]),
        (["base=/home/odile/a.safetensors,mini"], ["base-a.safetensors", "base-mini"]),
        (["captions.prefix=a!,a?"], ["prefix-a", "prefix-a-2"]),
        (["captions.dropout=0.0,1e-5"], ["dropout-0", "dropout-1e-05"]),
        (
            ["lora.targets=attn,attn-mlp", "lora.text_targets=attn"],
            ["targets-attn-text_targets-attn", "targets-attn-mlp-text_targets-attn"],
        ),
        (["validation.folder=a", "lora.start_from=b"], ["folder-a-start_from-b"]),
        ([f'captions.prefix="{"long " * 60}"'], [("prefix-" + "long-" * 60)[:93].rstrip("-")]),
    ],
)
def test_names_are_those_of_files_and_told_apart(paths: list[Path], sweep: list[str], names: list[str]) -> None:
    jobs = many.expand(paths[:1], [], sweep)
    assert [job.config.name for job in jobs] == [f"pip-v1-{name}" for name in names]
    for job in jobs:
        assert config.parse(job.config.model_dump(mode="json", exclude_none=True), where="again").name == job.config.name


def test_a_queue_of_configs_of_one_name_and_a_sweep_over_names(paths: list[Path]) -> None:
    assert [job.config.name for job in many.expand([*paths, paths[0]], [], [])] == ["pip-v1", "vit", "pip-v1-2"]
    assert [job.config.name for job in many.expand(paths[:1], [], ["name=one,two"])] == ["one", "two"]


def test_the_folder_of_a_command_is_always_the_same(paths: list[Path]) -> None:
    assert many.default_folder(many.expand(paths, [], []), first_name="pip-v1") == Path("runs/pip-v1-and-1-more")
    assert many.default_folder(many.expand(paths, [], ["steps=1,2"]), first_name="pip-v1") == Path("runs/pip-v1-sweep")


@pytest.mark.parametrize(
    ("changes", "sweep", "sentence"),
    [
        ([], ["lora.rank"], "--sweep lora.rank: expected key=value,value,"),
        ([], ["lora.rank=8,,16"], "expected key=value,value,"),
        ([], ["=8"], "expected key=value,value,"),
        ([], ["lora.rank=8,8"], "8 stands there twice; name each value once"),
        ([], ["lora.rank=8", "lora.rank=16"], "--sweep names lora.rank twice"),
        ([], ["lora.rank=8,0"], "'lora.rank' is 0"),
        ([], ["lora.rnak=8"], "the nearest valid key is 'rank'"),
        (["lora.rank=many"], [], "'lora.rank' is 'many'"),
    ],
)
def test_a_mistake_in_the_last_of_them_is_said_before_the_first_begins(
    paths: list[Path], changes: list[str], sweep: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        many.expand(paths, changes, sweep)


def test_words_of_a_sweep_behind_the_first_are_no_configs(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.toml"
    odd.touch()
    words = [Path("a.toml"), Path("optimizer.learning_rate=1e-4,3e-4"), odd]
    assert cli_runs.parted(words, ["lora.rank=8"]) == ([Path("a.toml"), odd], ["lora.rank=8", "optimizer.learning_rate=1e-4,3e-4"])
    assert cli_runs.parted(words, []) == (words, [])


# --- doing it -----------------------------------------------------------------------------------------------------------------


def pretended(run: Config, folder: Path, *, loss: float = 0.1, drift: float = 0.02) -> Path:
    """Leaves what a finished run leaves."""
    files.write(folder / "config.toml", config.to_toml(prepare.linked_run(run).run).encode())
    rows = [
        {"event": "started", "steps": 6, "time_s": 0.0},
        {"event": "validated", "step": 0, "loss": 9.0, "drift": 0.0},
        {"event": "validated", "step": 3, "loss": loss, "drift": drift / 2},
        {"event": "validated", "step": 6, "loss": loss * 2, "drift": drift},
        {"event": "done", "elapsed_s": 90.0, "time_s": 90.0},
    ]  # fmt: skip
    files.write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    files.write(folder / f"{run.name}.safetensors", b"x")
    files.write(folder / "verdict.json", json.dumps({"step": 3, "strength": 0.8, "path": f"{run.name}.safetensors"}).encode())
    return folder / f"{run.name}.safetensors"


def outcomes(jobs: list[Job], folder: Path, train_one: Callable[[Config, Path], Path]) -> list[Outcome]:
    return [one for one in many.run(jobs, folder, train_one) if isinstance(one, Outcome)]


def failing(name: str, problem: BaseException) -> Callable[[Config, Path], Path]:
    def train_one(run: Config, folder: Path) -> Path:
        if run.name == name:
            raise problem
        return pretended(run, folder)

    return train_one


def test_each_run_gets_a_folder_of_its_name_and_its_place_is_told(paths: list[Path], tmp_path: Path) -> None:
    told = list(many.run(many.expand(paths, [], []), tmp_path / "queue", pretended))
    assert [(one.place, one.total) for one in told if isinstance(one, Begun)] == [(1, 2), (2, 2)]
    first = told[1]
    assert first == Outcome(
        "pip-v1", {}, tmp_path / "queue/pip-v1", "done", loss=0.2, best_loss=0.1, drift=0.02, step=3, strength=0.8, minutes=1.5,
        file=tmp_path / "queue/pip-v1/pip-v1.safetensors",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("problem", "state", "words", "code"),
    [
        (UserError("The disk is full."), "failed", "The disk is full.", 2),
        (RuntimeError("out of memory"), "crashed", "RuntimeError: out of memory", 1),
        (AssertionError(), "crashed", "AssertionError", 1),
    ],
)
def test_one_that_fails_does_not_stop_the_next(
    paths: list[Path], tmp_path: Path, problem: Exception, state: str, words: str, code: int
) -> None:
    found = outcomes(many.expand(paths, [], []), tmp_path, failing("pip-v1", problem))
    assert [one.state for one in found] == [state, "done"]
    assert (found[0].words, found[0].code, bool(found[0].trace)) == (words, code, code == 1)
    assert many.exit_code(found) == code
    assert f"{state}: {words}" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("ending", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (SystemExit(), 130), (SystemExit("?"), 130)]
)
def test_the_user_ends_the_queue_and_what_was_not_begun_is_said(
    paths: list[Path], tmp_path: Path, ending: BaseException, code: int
) -> None:
    found = outcomes(many.expand(paths, [], []), tmp_path, failing("pip-v1", ending))
    assert [one.state for one in found] == ["stopped", "not begun"]
    assert many.exit_code(found) == code
    assert [one["state"] for one in json.loads((tmp_path / "comparison.json").read_text())["runs"]] == ["stopped", "not begun"]


def test_a_wish_to_stop_that_comes_after_a_runs_last_step_ends_the_queue(paths: list[Path], tmp_path: Path) -> None:
    def asked(run: Config, folder: Path) -> Path:
        path = pretended(run, folder)
        run_folder.ask(folder, "stop")
        return path

    jobs = many.expand(paths, [], [])
    found = outcomes(jobs, tmp_path, asked)
    assert [one.state for one in found] == ["done", "not begun"]
    assert many.exit_code(found) == 130
    again = outcomes(jobs, tmp_path, pretended)
    assert [one.state for one in again] == ["done", "done"]
    assert many.exit_code(again) == 0


def test_the_same_command_again_does_only_what_is_not_done(paths: list[Path], tmp_path: Path) -> None:
    jobs = many.expand(paths, [], [])
    outcomes(jobs, tmp_path, failing("vit", UserError("later")))
    begun: list[str] = []
    found = outcomes(jobs, tmp_path, lambda run, folder: (begun.append(run.name), pretended(run, folder))[1])
    assert begun == ["vit"]
    assert [(one.state, one.words) for one in found] == [("done", "It was done already."), ("done", "")]
    assert found[0].best_loss == 0.1


def test_a_finished_run_with_other_settings_is_found_before_the_first_begins(paths: list[Path], tmp_path: Path) -> None:
    outcomes(many.expand(paths, [], []), tmp_path, failing("pip-v1", UserError("later")))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"vit holds a finished run with other settings; choose another with --out"):
        outcomes(many.expand(paths, ["lora.rank=3"], []), tmp_path, pretended)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_finished_run_with_other_pictures_is_found_too(paths: list[Path], pictures: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (job,) = many.expand(paths[:1], [f"data='{data}'"], [])
    folder = pretended(job.config, tmp_path / "out/pip-v1").parent
    found = material.find(job.config)
    told = resuming.pictures(found.samples, found.held_out)
    checkpoint.write(run_folder.states_path(folder), State(6, {}, [], {}, told))
    assert [one.words for one in outcomes([job], tmp_path / "out", pretended)] == ["It was done already."]
    next(data.glob("*.txt")).write_text("something else")
    with pytest.raises(UserError, match="pip-v1 holds a finished run with other pictures; choose another with --out"):
        outcomes([job], tmp_path / "out", pretended)


def test_pictures_and_bases_are_looked_at_before_the_first_begins(paths: list[Path], pictures: Path, tmp_path: Path) -> None:
    paths[0].write_text(paths[0].read_text().replace('"x"', f"'{pictures}'"))
    jobs = many.expand(paths, [], [])
    with pytest.raises(UserError, match=r"(?s)^vit: .*There is no such folder.*No run was begun") as told:
        many.refuse_unready(jobs, tmp_path)
    assert "pip-v1" not in str(told.value)
    many.refuse_unready(jobs[:1], tmp_path)
    pretended(jobs[1].config, tmp_path / "vit")
    many.refuse_unready(jobs, tmp_path)  # what is done needs no pictures any more


def test_the_comparison_of_other_runs_is_not_written_over(paths: list[Path], tmp_path: Path) -> None:
    outcomes(many.expand(paths[:1], [], ["lora.rank=1,2"]), tmp_path, pretended)
    before = (tmp_path / "comparison.md").read_bytes()
    with pytest.raises(UserError, match="holds the comparison of other runs"):
        outcomes(many.expand(paths[:1], [], ["lora.rank=1,3"]), tmp_path, pretended)
    assert (tmp_path / "comparison.md").read_bytes() == before
    (tmp_path / "comparison.json").write_text("torn")
    with pytest.raises(UserError, match="holds the comparison of other runs"):
        outcomes(many.expand(paths[:1], [], ["lora.rank=1,2"]), tmp_path, pretended)


def test_of_several_processes_one_writes(paths: list[Path], tmp_path: Path) -> None:
    list(many.run(many.expand(paths, [], []), tmp_path, pretended, writes=False))
    assert not (tmp_path / "comparison.md").exists()


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({"done": 0}, 0),
        ({"done": 0, "failed": 2}, 2),
        ({"failed": 2, "crashed": 1}, 1),
        ({"failed": 2, "crashed": 1, "stopped": 143}, 143),
        ({"failed": 2, "done": 130}, 130),
        ({"not begun": 0}, 0),
    ],
)
def test_the_exit_code_is_the_gravest(codes: dict[str, int], expected: int) -> None:
    assert many.exit_code([Outcome("x", {}, Path(), state, code=code) for state, code in codes.items()]) == expected


# --- comparing ----------------------------------------------------------------------------------------------------------------


def test_the_table_has_a_column_for_each_setting_and_files_beside_it(paths: list[Path], tmp_path: Path) -> None:
    losses = iter((0.3, 0.1))
    jobs = many.expand(paths[:1], [], ["lora.rank=8,16"])
    found = outcomes(jobs, tmp_path, lambda run, folder: pretended(run, folder, loss=next(losses)))
    rows = comparison.table(found, beside=tmp_path)
    assert rows[0][2:5] == [f"{key} (linked)" for key in ("lora.alpha", "optimizer.learning_rate", "optimizer.text_encoder_learning_rate")]
    assert [[*row[:2], *row[5:]] for row in rows] == [
        ["run", "lora.rank", "held-out loss", "lowest", "drift", "step", "strength", "minutes", "file"],
        ["pip-v1-rank-8", "8", "0.6000", "0.3000", "2.0%", "3", "0.8", "1.5", "pip-v1-rank-8/pip-v1-rank-8.safetensors"],
        ["pip-v1-rank-16", "16", "0.2000", "0.1000", "2.0%", "3", "0.8", "1.5", "pip-v1-rank-16/pip-v1-rank-16.safetensors"],
    ]
    text = (tmp_path / "comparison.md").read_text()
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 4
    assert "The lowest held-out loss is 0.1000, that of pip-v1-rank-16" in text


def test_settings_that_a_sweep_moves_by_a_link_are_columns_too(tmp_path: Path) -> None:
    for name, rate in (("a", 1e-3), ("b", 2e-3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(f'name = "{name}"\nsteps = 9\n[lora]\nrank = 4\n[optimizer]\nlearning_rate = {rate}\n')
    found = [Outcome(name, {"lora.rank": rank}, tmp_path / name, "done") for name, rank in (("a", "16"), ("b", "4"))]
    found.append(Outcome("c", {"lora.rank": "2"}, tmp_path / "c", "not begun"))
    heads, *rows = comparison.table(found, beside=tmp_path)
    assert heads[:4] == ["run", "lora.rank", "optimizer.learning_rate (linked)", "held-out loss"]
    assert [row[:3] for row in rows] == [["a", "16", "0.001"], ["b", "4", "0.002"], ["c", "2", ""]]


@pytest.mark.parametrize("key", ["objective.loss", "base", "validation.share", "data", "resolution_px"])
def test_losses_that_do_not_measure_the_same_are_not_ranked(key: str) -> None:
    found = [Outcome(name, {key: name}, Path(), "done", best_loss=0.1) for name in "ab"]
    assert comparison.best_sentence(found) == ""
    assert comparison.best_sentence([Outcome(name, {"lora.rank": name}, Path(), "done", best_loss=0.1) for name in "ab"]) != ""
    assert comparison.best_sentence([Outcome(name, {"lora.rank": name}, Path(), "done") for name in "ab"]) == ""


def test_a_run_without_held_out_pictures_or_recommendation_has_dashes(paths: list[Path], tmp_path: Path) -> None:
    def bare(run: Config, folder: Path) -> Path:
        path = pretended(run, folder)
        (folder / "verdict.json").unlink()
        files.write(folder / "metrics.jsonl", b'{"event": "started", "time_s": 0}\n{"event": "done", "time_s": 60}\n')
        return path

    (one,) = outcomes(many.expand(paths[:1], [], []), tmp_path, bare)
    assert comparison.table([one], beside=tmp_path)[1] == ["pip-v1", "-", "-", "-", "-", "-", "1.0", "pip-v1/pip-v1.safetensors"]
    assert comparison.column(one).loras[0].strength == 1.0


def test_words_with_pipes_and_lines_stay_in_their_cell(tmp_path: Path) -> None:
    comparison.write(tmp_path, [Outcome("x", {"a": "b|c"}, tmp_path / "x", "failed", "one\ntwo | three", 2)])
    rows = [line for line in (tmp_path / "comparison.md").read_text().splitlines() if line]
    assert len(rows) == 3
    assert rows[2].replace("\\|", "").count("|") == rows[0].count("|")


def test_different_bases_and_no_file_get_no_sheet_and_a_sentence(paths: list[Path], tmp_path: Path) -> None:
    jobs = many.expand(paths[:1], [], ["base=mini,other"])
    found = outcomes(jobs, tmp_path, pretended)
    assert comparison.no_sheet([job.config for job in jobs], found) == "No comparison sheet: the runs have different bases."
    assert "no run has come to a LoRA file" in comparison.no_sheet([jobs[0].config], [Outcome("x", {}, tmp_path, "failed")])
    assert comparison.no_sheet([jobs[0].config], found[:1]) == ""


@pytest.fixture(scope="session")
def swept(tiny_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep of two runs of 6 steps, really trained, by the function that `train` calls; and what it printed."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "tiny.toml").write_text(
        f'base = "{tiny_base}"\ndata = "{pictures}"\nkind = "style"\ntrigger = "vitrail"\nname = "tiny"\nsteps = 6\nbatch = 2\n'
        'save_every = 3\nsample_every = 6\nsample_prompts = ["a red star"]\nreport = false\n[validation]\nshare = 0.2\ndraws = 4\n'
    )

    def train_one(run: Config, place: Path) -> Path:
        *_, done = train.train(run, place)
        return Path(done.path)

    app = typer.Typer()

    @app.command()
    def go() -> None:
        cli_runs.train_many(
            [folder / "tiny.toml"], changes=["lora.alpha=2.0"], sweep=["lora.rank=1,2"], out=folder / "out", train_one=train_one
        )

    result = CliRunner().invoke(app)
    assert result.exit_code == 0, result.output
    return folder / "out", result.output


def test_a_sweep_ends_with_a_table_and_a_sheet_whose_columns_are_the_runs(swept: tuple[Path, str]) -> None:
    folder, said = swept
    assert "Run 1 of 2: tiny-rank-1" in said
    assert "Run 2 of 2: tiny-rank-2" in said
    told = json.loads((folder / "comparison.json").read_text())["runs"]
    assert [(one["name"], one["state"], one["settings"]) for one in told] == [
        ("tiny-rank-1", "done", {"lora.rank": "1"}), ("tiny-rank-2", "done", {"lora.rank": "2"}),
    ]  # fmt: skip
    assert all(one["loss"] > 0 and one["minutes"] > 0 for one in told)
    assert [lora_file.read(Path(one["file"])).ranks for one in told] == [[1], [2]]
    with Image.open(folder / "comparison.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[1] > 3 * 160  # the base and two runs
    assert str(folder / "comparison.png") in said


def test_the_sheets_prompts_are_those_that_the_runs_drew(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    run = config.load(folder / "tiny-rank-1/config.toml")
    assert comparison.prompts(run, folder / "tiny-rank-1") == ["a red star"]
    without = run.model_copy(update={"sample_prompts": []})
    assert comparison.prompts(without, folder / "tiny-rank-1") == ["a red star"]
    assert comparison.prompts(without, folder / "nowhere") == ["vitrail"]


# --- the commands -------------------------------------------------------------------------------------------------------------


def command(*words: str) -> tuple[int, str, BaseException | None]:
    result = CliRunner().invoke(cli_runs.several, list(words))
    return result.exit_code, result.output, result.exception


def test_runs_lists_a_sweep_as_a_table_and_as_json(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    code, said, _ = command("runs", str(folder))
    assert code == 0
    for name in ("tiny-rank-1", "tiny-rank-2"):
        (line,) = [line for line in said.splitlines() if name in line]
        assert "done" in line
        assert "6/6" in line
        assert "vitrail" in line
    told = json.loads(command("runs", str(folder), "--json")[1])
    assert {(one["name"], one["state"], one["step"]) for one in told} == {("tiny-rank-1", "done", 6), ("tiny-rank-2", "done", 6)}
    assert all(one["size_bytes"] > 1000 for one in told)


def test_runs_says_what_is_broken_and_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x/checkpoints").mkdir(parents=True)
    (tmp_path / "x/config.toml").write_text("x = [bold]")
    code, said, _ = command("runs", str(tmp_path))
    assert code == 0
    assert "broken (!)" in said
    assert "config.toml is not valid TOML" in said
    monkeypatch.chdir(tmp_path / "x/checkpoints")
    assert command("runs")[1].startswith("No runs in runs; ")
    assert isinstance(command("runs", "nowhere")[2], UserError)


def test_share_says_what_was_left_out_and_where_the_folder_is(swept: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = swept
    code, said, _ = command("share", str(folder / "tiny-rank-2"), "--out", str(tmp_path / "gift"), "--license", "cc0-1.0")
    assert code == 0
    assert "were left out; --keep-prompts puts them in" in said
    assert f"{tmp_path / 'gift'}.zip" in said
    assert "license: cc0-1.0" in (tmp_path / "gift/README.md").read_text()
    assert lora_file.read(tmp_path / "gift/tiny-rank-2.safetensors").metadata["modelspec.license"] == "cc0-1.0"


def test_a_dry_run_lists_the_runs_and_makes_nothing(paths: list[Path], pictures: Path, tmp_path: Path) -> None:
    app = typer.Typer()

    @app.command()
    def go() -> None:
        cli_runs.train_many(
            paths[:1], changes=[f"data='{pictures}'"], sweep=["lora.rank=1,2"], out=tmp_path / "out", train_one=pretended, dry_run=True
        )

    result = CliRunner().invoke(app)
    assert result.exit_code == 0
    assert "2 runs, 12 steps in all" in result.output
    assert not (tmp_path / "out").exists()


def test_a_stop_through_typer_ends_the_queue_with_its_code(paths: list[Path], pictures: Path, tmp_path: Path) -> None:
    def stopped(run: Config, folder: Path) -> Path:
        raise typer.Exit(143)

    app = typer.Typer()

    @app.command()
    def go() -> None:
        cli_runs.train_many(paths, changes=[f"data='{pictures}'"], sweep=[], out=tmp_path / "out", train_one=stopped)

    result = CliRunner().invoke(app)
    assert result.exit_code == 143
    assert [run.state for run in runs.find(tmp_path / "out")] == []
    assert "not begun" in result.output
    assert not run_folder.is_unfinished(tmp_path / "out/vit")
