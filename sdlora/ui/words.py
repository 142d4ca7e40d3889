"""Every text of the page in a table, so that translating it means adding a column and no code.

The tables are `words/*.toml`, one per page: `[key]` with `en` and `ko`. Labels of controls are looked up in the browser, in its language
(gradio's i18n). Sentences that are composed here, with numbers and names in them, take the language that the browser sent.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

LANGUAGES = ("en", "ko")
TABLES = Path(__file__).parent / "words"


@cache
def tables() -> dict[str, dict[str, str]]:
    """All texts: by key, and then by language.

    Raises:
        ValueError: if two tables have the same key.
    """
    found: dict[str, dict[str, str]] = {}
    for path in sorted(TABLES.glob("*.toml")):
        for key, texts in tomllib.loads(path.read_text(encoding="utf-8")).items():
            if key in found:
                raise ValueError(f"Text '{key}' of {path.name} is in another table already.")
            found[key] = texts
    return found


@cache
def i18n() -> gr.I18n:
    """What gradio needs to translate labels in the browser; to be handed to `launch`."""
    return gr.I18n(**{language: {key: texts[language] for key, texts in tables().items()} for language in LANGUAGES})


def label(key: str) -> Any:
    """A control's text, translated in the browser.

    Raises:
        KeyError: if no table has the key.
    """
    assert key in tables(), key
    return i18n()(key)


def say(key: str, language: str = "en", **values: object) -> str:
    """A sentence with values in it, in a language.

    Raises:
        KeyError: if no table has the key.
    """
    return tables()[key][language].format_map(values)


def for_script(*prefixes: str, without: str) -> str:
    """A line of JavaScript that has the texts of some keys, in the browser's language, as `texts`.

    Written into a script and not handed to it as a property: in a tab that was not open yet an event that changes nothing takes gradio's
    own properties away.

    Args:
        prefixes: what the keys begin with.
        without: what they lose there, such as "train.".
    """
    told = {key.removeprefix(without): words for key, words in tables().items() if key.startswith(prefixes)}
    every = {language: {key: words[language] for key, words in told.items()} for language in LANGUAGES}
    return f'const allTexts = {json.dumps(every)}, texts = allTexts[(navigator.language || "en").slice(0, 2)] || allTexts.en;\n'


def language_of(headers: Mapping[str, str]) -> str:
    """The first language of a browser's Accept-Language that the tables have; English if there is none."""
    wanted = (word.split(";")[0].strip().lower().partition("-")[0] for word in headers.get("accept-language", "").split(","))
    return next((one for one in wanted if one in LANGUAGES), "en")
