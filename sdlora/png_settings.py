r"""The settings that stand in a picture, as A1111 and Forge write and read them: the text chunk `parameters` of a PNG.

The prompt, then a line `Negative prompt: …` if there is one, then one line `Steps: 20, Sampler: DPM++ 2M, …`, in which a value that holds
a comma, a colon or a newline is quoted as JSON. Read as A1111 reads it: the last line counts as settings if at least three are found.

What only this program knows goes under keys that begin with "Sdlora", which others skip. Prompts that the format cannot carry (spaces at
the ends of lines, a line that looks like one of the format's own) stand there once more, so that ours are read back exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

NEGATIVE = "Negative prompt:"
OWN_PROMPT, OWN_NEGATIVE = "Sdlora prompt", "Sdlora negative"
LONGEST = 200_000  # characters; a picture that carries more was not made by a prompt
_VALUE = re.compile(
    r'\s{0,9}(\w[\w \-/]{1,80}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
)  # limits, so that a hostile line takes no quadratic time
_LEAST = 3


@dataclass(frozen=True)
class Settings:
    """What a `parameters` text says; a value that is not there, or that no number can be made of, is None or "".

    Args:
        values: every key of the last line with its text, quotes taken off.
    """

    prompt: str
    negative: str = ""
    values: Mapping[str, str] = field(default_factory=dict)

    def number(self, key: str) -> float | None:
        """A value as a finite number."""
        found = re.fullmatch(r"[+-]?\d{1,15}(?:\.\d{0,20})?(?:[eE][+-]?\d{1,2})?", self.values.get(key, "").strip())
        return float(found[0]) if found else None

    def whole(self, key: str) -> int | None:
        """A value as a whole number."""
        found = re.fullmatch(r"-?\d{1,19}", self.values.get(key, "").strip())
        return int(found[0]) if found else None

    @property
    def size_px(self) -> tuple[int, int] | None:
        """Width and height."""
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", self.values.get("Size", "").strip())
        return (int(found[1]), int(found[2])) if found else None

    @property
    def sampler(self) -> str:
        """Its known name; older texts name the schedule with it, such as "DPM++ 2M Karras", and here it is taken off."""
        return self._sampler()[0]

    @property
    def schedule(self) -> str:
        """By its known name; "" if it is not said."""
        return self.values.get("Schedule type", "") or self._sampler()[1]

    def _sampler(self) -> tuple[str, str]:
        name = self.values.get("Sampler", "").strip()
        found = re.fullmatch(r"(.+) (Karras|Exponential|SGM Uniform)", name)
        return (found[1], found[2]) if found else (name, "")

    @property
    def lora_hashes(self) -> dict[str, str]:
        """The first digits of each LoRA's hash, by its name in the prompt."""
        return dict(re.findall(r"\s{0,9}([^:,]{1,250}):\s{0,9}([0-9a-fA-F]{6,64})\s{0,9}(?:,|$)", self.values.get("Lora hashes", "")))


def read(text: str) -> Settings | None:
    """Reads a `parameters` text; None if nothing in it is a setting and it has no negative prompt, which is no such text."""
    *lines, last = text[:LONGEST].strip().split("\n")
    found = _VALUE.findall(last)
    values = {key: _unquoted(value) for key, value in found} if len(found) >= _LEAST else {}
    lines = lines if values else [*lines, last]
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    prompt = "\n".join(line.strip() for line in lines[:start])
    negative = "\n".join(line.strip().removeprefix(NEGATIVE).strip() for line in lines[start:])
    if not values and start == len(lines):
        return None
    return Settings(values.get(OWN_PROMPT, prompt), values.get(OWN_NEGATIVE, negative), values)


def write(prompt: str, negative: str, values: Mapping[str, object]) -> str:
    """The text of some settings; reading it gives the same prompts and values back.

    Args:
        values: by key, in the order in which they are to stand; at least three, or they would not be read as settings.
    """
    text = _text(prompt, negative, values)
    told = read(text)
    if told and (told.prompt, told.negative) == (prompt, negative):
        return text
    return _text(prompt, negative, {**values, OWN_PROMPT: prompt, OWN_NEGATIVE: negative})


def _text(prompt: str, negative: str, values: Mapping[str, object]) -> str:
    lines = [prompt, *([f"{NEGATIVE} {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(str(value))}" for key, value in values.items())])


def _quoted(value: str) -> str:
    """A1111 quotes what would be read as several values; spaces at the ends and quotes of its own need it too."""
    plain = not re.search(r'[,:\n\r"\\]', value) and value == value.strip()
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    if len(value) < 2 or not (value.startswith('"') and value.endswith('"')):
        return value.strip()
    try:
        told = json.loads(value)
    except ValueError:
        return value
    return told if isinstance(told, str) else value
