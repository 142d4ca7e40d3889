"""A run's settings on the page: the form's few words, and all the rest as TOML that can be read and written.

The text shows every setting with the reason for those that follow from others. What a person changes in it is kept as changes beside the
form, so that a new word in the form moves what follows from it and nothing else. Paths cannot be set here: a page reaches only what is
listed on it.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from sdlora import config, jobs, prepare
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.linked import Linked
from sdlora.ui import roots as places
from sdlora.ui.roots import Roots

FORM = ("name", "trigger", "kind", "base")
PATHS = ("data", "vae", "tokenizer", "lora.start_from", "validation.folder")  # only a shell may name files
LONGEST = 40_000
Flat = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """The words of the form, as they come from a browser."""

    name: str = ""
    trigger: str = ""
    kind: str = "style"
    base: str = "mini"


def form_of(name: object, trigger: object, kind: object, base: object) -> Form:
    """The form from what a post may send: anything.

    Raises:
        UserError: if a word is none.
    """
    told = {"name": name, "trigger": trigger, "kind": kind, "base": base}
    for what, value in told.items():
        if value is not None and not isinstance(value, str):
            raise UserError(f"{what} is {places.shown(str(value))}; give a word.")
        if value and len(value) > 500:
            raise UserError(f"{what} has {len(value):,} characters; shorten it.")
    return Form(*(" ".join(str(value or "").encode("utf-8", "replace").decode().split()) for value in told.values()))


def run_of(roots: Roots, form: Form, changes: Flat, folder: Path, *, named: bool = True) -> Config:
    """The run that form and changes mean, before anything follows from anything.

    Args:
        folder: of the pictures.
        named: whether the name and the trigger word must be given; else a stand-in is taken.

    Raises:
        UserError: if a word is missing or a setting is not allowed.
    """
    name = jobs.checked_name(form.name) if named or form.name else "unnamed"
    if named and not form.trigger:
        raise UserError("The trigger word is empty; give a word that the base does not know, such as zup, which will call the LoRA.")
    values: dict[str, Any] = {}
    for key, value in changes.items():
        _put(values, key, value)
    told = {
        "name": name,
        "trigger": form.trigger,
        "kind": form.kind,
        "base": places.base_name(roots, form.base),
        "data": data_of(folder, form.trigger),
    }
    return config.parse(values | told, where="The settings")


def data_of(folder: Path, trigger: str) -> list[dict[str, Any]]:
    """The run's only folder; a picture without a caption of its own is called by the trigger word alone."""
    return [{"folder": str(folder), "caption": trigger or "a picture"}]


def linked(roots: Roots, form: Form, changes: Flat, folder: Path, *, named: bool = True) -> Linked:
    """The same with all that follows.

    Raises:
        UserError: as `run_of`, and if the base cannot be looked at.
    """
    return prepare.linked_run(run_of(roots, form, changes, folder, named=named))


def text_of(roots: Roots, form: Form, changes: Flat, folder: Path) -> str:
    """All settings as TOML, with reasons behind those that follow from others.

    Raises:
        UserError: as `linked`.
    """
    found = linked(roots, form, changes, folder, named=False)
    document = tomlkit.parse(config.to_toml(found.run))
    for key in PATHS:
        _take(document, key)
    for key, value in {"name": form.name, "trigger": form.trigger, "kind": form.kind, "base": form.base}.items():
        document[key] = value
    for key, reason in found.reasons.items():
        table, _, last = key.rpartition(".")
        place: Any = document.item(table).value if table else document
        if last in place:
            place.item(last).comment(reason)
    return tomlkit.dumps(document)


def read(text: object) -> Flat:
    """A TOML text as dotted keys with values.

    Raises:
        UserError: if it is none, or sets a path.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise UserError(f"The settings are no text of up to {LONGEST:,} characters.")
    try:
        found = _flat(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as problem:
        reason = config.toml_fault(problem)
        raise UserError(f"The settings are not valid TOML: {reason}; your text stays as it is, mend it and go on.") from None
    for key in found:
        if key in PATHS or key.split(".")[0] == "data":
            raise UserError(f"Setting '{key}' names a file, and the page reaches only what is listed on it; leave it out, or use a shell.")
    return found


def absorbed(text: str, shown: str, form: Form, changes: Flat) -> tuple[Form, Flat]:
    """Form and changes after a person has edited the text.

    Args:
        shown: the text as it was before they did; empty if there was none.

    Raises:
        UserError: if the text is no TOML, or sets a path.
    """
    if not text.strip() or text == shown:
        return form, changes
    new, old = read(text), read(shown)
    edited = {key: value for key, value in new.items() if key not in old or old[key] != value}
    words = {key: edited.pop(key) for key in FORM if key in edited}
    kept = {key: value for key, value in changes.items() if key in new or key not in old}
    own = form_of(**({key: getattr(form, key) for key in FORM} | words))
    return own, kept | edited


def changes_of(told: object) -> Flat:
    """Changes from their TOML, as the page keeps them and a program gives them.

    Raises:
        UserError: as `read`, and for words of the form, which have places of their own.
    """
    found = read(told or "")
    if word := next((key for key in FORM if key in found), None):
        raise UserError(f"'{word}' stands among the changed settings; it has a field of its own.")
    return found


def changes_text(changes: Flat) -> str:
    """Changes as TOML."""
    values: dict[str, Any] = {}
    for key, value in changes.items():
        _put(values, key, value)
    return tomlkit.dumps(values)


def _flat(values: dict[str, Any], inside: str = "") -> Flat:
    found: Flat = {}
    for key, value in values.items():
        found |= _flat(value, f"{inside}{key}.") if isinstance(value, dict) else {f"{inside}{key}": value}
    return found


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for table in tables:
        inner = values.setdefault(table, {})
        if not isinstance(inner, dict):
            raise UserError(f"The settings: '{table}' is a value and has no keys of its own.")
        values = inner
    values[last] = value


def _take(document: Any, key: str) -> None:
    *tables, last = key.split(".")
    for table in tables:
        document = document.get(table, {})
    if last in document:
        del document[last]
