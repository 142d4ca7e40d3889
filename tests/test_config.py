"""Configs: what is written counts, what is misspelt is named."""

from pathlib import Path

import pytest

from sdlora import config
from sdlora.errors import UserError

RUN = """
base = "mini"
data = "pictures"
kind = "character"
trigger = "pip"
name = "pip-v1"
steps = 60
[lora]
rank = 8
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_a_config_reads_and_writes_back_the_same(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    run = config.load(written(tmp_path, RUN))
    assert (run.name, run.steps, run.lora.rank) == ("pip-v1", 60, 8)
    assert config.load(written(tmp_path, config.to_toml(run))) == run


def test_a_run_without_a_name_has_that_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "my cat (2).toml"
    path.write_text(RUN.replace('name = "pip-v1"\n', ""))
    assert config.load(path).name == "my cat -2"
    assert config.load(path, changes=["name=pip"]).name == "pip"


def test_a_data_folder_is_found_beside_the_config_and_first_where_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    assert config.load(written(tmp_path, RUN)).data[0].folder == tmp_path / "pictures"
    (tmp_path / "here" / "pictures").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert config.load(written(tmp_path, RUN)).data[0].folder == tmp_path / "here" / "pictures"


def test_changes_from_the_command_line_win(tmp_path: Path) -> None:
    run = config.load(written(tmp_path, RUN), changes=["lora.rank=4", "trigger=zog", "optimizer.learning_rate=2e-3"])
    assert (run.lora.rank, run.trigger, run.optimizer.learning_rate) == (4, "zog", 2e-3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (RUN + "aplha = 3\n", r"unknown key 'lora.aplha'; the nearest valid key is 'alpha'"),
        ("learning_rate = 1e-4\n" + RUN, r"unknown key 'learning_rate'; it belongs into a table: optimizer.learning_rate\."),
        ("step = 3\n" + RUN, r"unknown key 'step'; the nearest valid key is 'steps'"),
        ("foo = 3\n" + RUN, r"unknown key 'foo'; no valid key is like it\. Valid here: base, .*steps, "),
        (RUN.replace("60", '"sixty"'), r"'steps' is 'sixty' \(str\); input should be a valid integer"),
        (RUN.replace("60", "0"), r"'steps' is 0 \(int\); input should be greater than or equal to 1"),
        (RUN.replace('"character"', '"person"'), r"'kind' is 'person' .* 'style' or 'character'"),
        (RUN.replace("base =", "# base ="), r"key 'base' is missing"),
        (RUN.replace("pip-v1", "../pip"), r"'name' is '../pip'"),
        ("base = ", r"is not valid TOML"),
        ("base = mini", r"line 1, column 8\); words stand in quotes, as in base = \"mini\"\."),
        ('data = "C:\\Users\\me"', r"a path with .* stands in single quotes, as in data = 'C:.pictures'"),
        ('data = "C:\\pics"', r"a path with .* stands in single quotes"),
        ("rate = 1,5", r"one key to a line, and a point in numbers"),
    ],
    ids=[
        "unknown in table",
        "of a table",
        "unknown",
        "like none",
        "type",
        "range",
        "choice",
        "missing",
        "traversal",
        "toml",
        "no quotes",
        "hex",
        "backslash",
        "comma",
    ],
)
def test_a_mistake_gets_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config.load(written(tmp_path, text))


def test_several_mistakes_are_told_together_and_a_key_once(tmp_path: Path) -> None:
    text = 'resolution_px = "large"\nstep = 3\n' + RUN.replace("60", "0") + "aplha = 3\n"
    with pytest.raises(UserError) as told:
        config.load(written(tmp_path, text))
    said = str(told.value)
    once = ("'resolution_px' is 'large'", "'steps' is 0", "key 'step';", "key 'lora.aplha';")
    assert [words for words in once if said.count(words) != 1] == []
    assert "Valid here" not in said
    assert "unknown key 'lora.aplha'; the nearest valid key is 'alpha'. Unknown key 'step'; " in said
    many = "".join(f"wrong_{i} = 1\n" for i in range(16)) + RUN
    with pytest.raises(UserError, match=r"'wrong_11'.* And 4 more\.$"):
        config.load(written(tmp_path, many))


def test_what_was_found_is_said_as_toml_says_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'batch' is true; "):
        config.load(written(tmp_path, "batch = true\n" + RUN))


def test_a_missing_config_and_a_bad_change_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        config.load(tmp_path / "none.toml")
    for change, sentence in (("rank", "expected key=value"), ("steps.x=1", "'steps' is a value")):
        with pytest.raises(UserError, match=sentence):
            config.load(written(tmp_path, RUN), changes=[change])
