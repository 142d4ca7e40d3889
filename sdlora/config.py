"""What one run is: a TOML file with strict keys, which `config_tables` lists.

An unknown key or a wrong type is an error that names the nearest valid key: a misspelt setting that is quietly ignored costs a night.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sdlora import kohya_toml
from sdlora.config_tables import TABLES
from sdlora.config_tables import Config as Config
from sdlora.config_tables import FolderConfig as FolderConfig
from sdlora.errors import UserError

TOLD = 12  # mistakes at a time


def load(path: Path, *, changes: list[str] | None = None) -> Config:
    """Reads a run's TOML file; relative data folders are looked for from where the command runs and then from the file's folder.

    A run without a name has that of its file.

    Args:
        changes: "key=value" or "table.key=value", with the value in TOML.

    Raises:
        UserError: if the file is missing or not TOML, a key is unknown, a type is wrong, or a value is not allowed.
    """
    if path.is_dir():
        raise UserError(f"Config {path} is a folder; a run is a TOML file, and the folder of pictures stands in it as data.")
    if not path.is_file():
        raise UserError(f"Config {path} does not exist.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise UserError(f"{path} is not valid TOML: {toml_fault(problem)}.") from problem
    for change in changes or []:
        _apply(values, change)
    values.setdefault("name", re.sub(r"[^\w. -]", "-", path.stem).strip(" .-_") or "run")
    run = parse(values, where=str(path))
    return run.model_copy(update={"data": [_found(one, path.parent) for one in run.data]})


_PATHS = "a path with \\ stands in single quotes, as in data = 'C:\\pictures'"
_HINTS = {  # by how tomllib's sentence begins
    "Invalid hex value": _PATHS,
    "Unescaped '\\' in a string": _PATHS,
    "Invalid value": 'words stand in quotes, as in base = "mini"',
    "Expected newline or end of document after a statement": "one key to a line, and a point in numbers, as in 0.5",
}


def toml_fault(problem: Exception) -> str:
    """What is wrong with a TOML text, in words for those who have not read the format's rules."""
    said = " ".join(str(problem).split())
    twice = re.match(r"(?:Cannot overwrite a value|Cannot declare .* twice|Duplicate inline table key.*) \(at (?:line (\d+)|end)", said)
    if twice:
        return f"{f'line {twice[1]}' if twice[1] else 'the last line'} sets what another line sets too, so keep one of both"
    return said + next((f"; {hint}" for start, hint in _HINTS.items() if said.startswith(start)), "")


def is_run(path: Path) -> bool:
    """Whether a TOML file is a run rather than a dataset of sd-scripts; what is no TOML is left to `load` to say."""
    try:
        return not {"datasets", "general"} & set(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError):
        return True


def parse(values: dict[str, Any], *, where: str) -> Config:
    """A config from plain values.

    Args:
        where: names the source in error messages.

    Raises:
        UserError: as `load` does.
    """
    values, untranslated = _with_data(values)
    try:
        run = Config.model_validate(values)
    except ValidationError as problem:
        raise UserError(f"{where}: {_sentences(problem)}") from None
    if run.lora.dora and run.output.format == "diffusers":
        raise UserError(
            f'{where}: output.format = "diffusers" cannot carry lora.dora, whose magnitudes are per input here; '
            'set output.format = "kohya" or lora.dora = false.'
        )
    if reason := _contradiction(run):
        raise UserError(f"{where}: {reason}")
    if run.regularisation != "none" and not run.class_word:
        raise UserError(f'{where}: regularisation needs class_word, what the subject is, such as "dog" or "person".')
    return run.model_copy(update={"untranslated": untranslated})


def _contradiction(run: Config) -> str | None:
    """Settings that cannot be meant together, in a sentence."""
    folders = [folder.folder for folder in run.data]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    sides = run.resolution_px if isinstance(run.resolution_px, list) else []
    checks = {
        f"data names {twice} twice; name it once, and give repeats if it should count for more.": twice is not None,
        "every data folder is regularisation, so nothing is learned; add the folder of your own pictures.": all(
            folder.regularisation for folder in run.data
        ),
        "a data folder has both masks and alpha_masks; choose one.": any(folder.masks and folder.alpha_masks for folder in run.data),
        "validation has both share and folder; choose one.": bool(run.validation.share and run.validation.folder),
        'optimizer.max_norm goes with plain LoRA only; set lora.init = "gaussian" and lora.dora = false.': bool(
            run.optimizer.max_norm and (run.lora.init == "pissa" or run.lora.dora)
        ),
        'objective.weighting = "soft_min_snr" needs min_snr_gamma above 0; 4 is its paper\'s.': run.objective.weighting == "soft_min_snr"
        and run.min_snr_gamma == 0,
        "resolution_px names a side twice; name each once.": len(set(sides)) < len(sides),
        "class_word is the trigger word; it is what the subject is, such as dog.": bool(
            run.class_word and run.class_word.strip().lower() == run.trigger.strip().lower()
        ),
        "regularisation needs a trigger word, in whose place the class word stands; set trigger.": run.regularisation != "none"
        and not run.trigger.strip(),
        f"trigger is {run.trigger!r}; it is one word or phrase without commas or blanks around it.": run.trigger != run.trigger.strip()
        or "," in run.trigger,
    }
    return next((sentence for sentence, wrong in checks.items() if wrong), None)


def _with_data(values: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`data` as a list of tables: a name is a folder, or a dataset TOML of sd-scripts, whose settings hold where the run says nothing."""
    data = values.get("data")
    if isinstance(data, list):  # names alone are folders too
        return values | {"data": [{"folder": one} if isinstance(one, str) else one for one in data]}, ()
    if not isinstance(data, str):
        return values, ()
    if not data.endswith(".toml"):
        return values | {"data": [{"folder": data}]}, ()
    theirs = kohya_toml.read_kohya(Path(data))
    tables = {key: value | values.get(key, {}) for key, value in theirs.settings.items() if isinstance(value, dict)}
    return theirs.settings | values | tables | {"data": list(theirs.folders)}, theirs.unsupported


def to_toml(config: Config) -> str:
    """The resolved config as TOML: written into the run folder, it repeats the run."""
    return tomlkit.dumps(config.model_dump(mode="json", exclude_none=True))


def unset(run: BaseModel, *, inside: str = "") -> dict[str, str]:
    """The keys that have no value, with what they are for."""
    found: dict[str, str] = {}
    for key, field in type(run).model_fields.items():
        value = getattr(run, key)
        if isinstance(value, BaseModel):
            found |= unset(value, inside=f"{inside}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            found |= unset(value[0], inside=f"{inside}{key}.")
        elif value is None:
            found[f"{inside}{key}"] = field.description or ""
    return found


def _found(data: FolderConfig, beside: Path) -> FolderConfig:
    """The folder as an absolute path, so that the config in the run folder repeats the run from anywhere."""
    places = [data.folder, beside / data.folder]
    return data.model_copy(update={"folder": next((one for one in places if one.is_dir()), data.folder).absolute()})


def _apply(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals:
        raise UserError(f"--set {change}: expected key=value, for example lora.rank=8.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {change}: '{table}' is a value and has no keys of its own.")
    values[last] = value


def _sentences(problem: ValidationError) -> str:
    """Each mistake in words, unknown keys first, `TOLD` of them at most: where, what was found, what is allowed."""
    errors: dict[str, ErrorDetails] = {}
    for error in sorted(problem.errors(), key=lambda one: one["type"] != "extra_forbidden"):
        errors.setdefault(_name(error), error)  # a union tells of each of its branches
    told = [_sentence(name, error, alone=len(errors) == 1) for name, error in errors.items()]
    more = f" And {len(told) - TOLD} more." if len(told) > TOLD else ""
    return " ".join([told[0], *(one[0].upper() + one[1:] for one in told[1:TOLD])]) + more


def _name(error: ErrorDetails) -> str:
    """The dotted key; pydantic names the branch of a union after it."""
    kinds = re.compile(r"int|str|list\[.*|constrained-.*")
    return ".".join(str(part) for part in error["loc"] if not kinds.fullmatch(str(part)) or isinstance(part, int))


def _sentence(name: str, error: ErrorDetails, *, alone: bool) -> str:
    if error["type"] == "extra_forbidden":
        valid = _keys_beside(error["loc"])
        last = str(error["loc"][-1])
        tables = [table for table, inner in TABLES.items() if table in Config.model_fields and last in inner.model_fields]
        if elsewhere := [f"{table}.{last}" for table in tables if last not in valid]:
            return f"unknown key '{name}'; it belongs into a table: {' or '.join(elsewhere)}."
        near = difflib.get_close_matches(last, valid, n=1)
        like = f"the nearest valid key is '{near[0]}'" if near else "no valid key is like it"
        return f"unknown key '{name}'; {like}." + (f" Valid here: {', '.join(valid)}." if alone else "")
    if error["type"] == "missing":
        return f"key '{name}' is missing; it is needed."
    wrong = error["input"]
    found = str(wrong).lower() if isinstance(wrong, bool) else f"{wrong!r} ({type(wrong).__name__})"  # as TOML says it
    if error["type"] == "string_pattern_mismatch":
        return f"'{name}' is {found}; letters, digits, spaces, dots, dashes and underscores are allowed, with a letter or digit first."
    if error["type"] in ("model_type", "dict_type"):
        return f"'{name}' is {found}; it is a table of keys."
    return f"'{name}' is {found}; {error['msg'][0].lower()}{error['msg'][1:]}."


def _keys_beside(place: tuple[int | str, ...]) -> list[str]:
    inner = [str(part) for part in place[:-1] if isinstance(part, str)]
    fields = TABLES[inner[-1]].model_fields if inner and inner[-1] in TABLES else Config.model_fields
    return [key for key, field in fields.items() if not field.exclude]
