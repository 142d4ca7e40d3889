"""The page's texts: every one in both languages, with the same values, and without anything that a browser would run."""

import re
import string
from pathlib import Path

import pytest

from sdlora.ui import words

SOURCES = Path(words.__file__).parent


def values_of(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_text_is_in_both_languages_with_the_same_values() -> None:
    for key, texts in words.tables().items():
        assert set(texts) == set(words.LANGUAGES), key
        assert all(text.strip() for text in texts.values()), key
        assert len({frozenset(values_of(text)) for text in texts.values()}) == 1, key
        assert not any(re.search(r"<\s*(?:script|iframe|img|svg|style|a)\b|\son\w+=", text) for text in texts.values()), key


def test_korean_texts_are_korean_unless_they_are_names() -> None:
    same = {key for key, texts in words.tables().items() if texts["en"] == texts["ko"]}
    foreign = {key for key in same if not re.fullmatch(r"[\w .+-]{1,12}", words.tables()[key]["en"])}
    assert not foreign, "these were not translated"


@pytest.mark.parametrize("page", ["compare", "library"])
def test_every_key_that_a_page_asks_for_is_there_and_every_text_is_asked_for(page: str) -> None:
    code = "".join(path.read_text() for path in SOURCES.glob("*.py"))
    asked = set(re.findall(rf'"({page}\.\w+)"', code))
    own = {key for key in words.tables() if key.startswith(f"{page}.")}
    assert asked <= own
    composed = tuple(re.findall(rf'"{page}\.(\w+_)\{{', code))  # such as f"library.fact_{key}"
    for key in own - asked:
        name = key.removeprefix(f"{page}.").removesuffix("_info")
        assert name.startswith(composed) or f'"{name}"' in code, key


def test_a_sentence_takes_the_browsers_first_language_that_is_there() -> None:
    assert words.language_of({"accept-language": "fr-FR,ko-KR;q=0.9,en;q=0.8"}) == "ko"
    assert words.language_of({"accept-language": "EN-us,ko"}) == "en"
    assert words.language_of({}) == words.language_of({"accept-language": ";;,\0"}) == "en"


def test_values_are_put_in_as_they_are_and_never_read_as_a_pattern() -> None:
    assert "{0.__class__}" in words.say("library.imported", name="{0.__class__}")
    assert words.say("library.imported", "ko", name="가") != words.say("library.imported", "en", name="가")
