r"""What a prompt says beside its words: weights, chunk breaks, and LoRA tags, in A1111's syntax.

`(x)` speaks 1.1 times as loud, `(x:1.3)` 1.3 times, `[x]` 1/1.1 times, and brackets in brackets multiply. `\(`, `\)`, `\[`, `\]` and `\\`
are the characters themselves. `BREAK`, a word of its own, ends a chunk of 75 tokens. `<lora:NAME>`, `<lora:NAME:W>`,
`<lora:NAME:TE:UNET>` and the words `te=` and `unet=` ask for a LoRA file; `0.2@0, 1@0.5` in the place of a number is a strength that
goes from 0.2 at the first step to 1 at half of the steps and stays there.

Nothing is refused: what is malformed is read as A1111 reads it, a bracket without its partner to the end, a weight that is no number as
words. There is one difference: A1111 speaks a `BREAK` inside of brackets as a word, here it breaks there too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

LOUDER = 1.1
_NUMBER = r"[+-]?(?:\d{1,4}(?:\.\d*)?|\.\d+)"
_TOKEN = re.compile(rf"\\[()\[\]\\]|\\|\(|\[|:\s*({_NUMBER})\s*\)|\)|\]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_TAG = re.compile(r"[ \t]?<(\w+):([^>]+)>")
_LORA_WORDS = ("lora", "lyco")
_SPECIAL = re.compile(r"[()\[\]\\]")
Course = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Piece:
    """Words and how loud they are."""

    words: str
    weight: float = 1.0


@dataclass(frozen=True)
class Tag:
    """A LoRA that a prompt asks for.

    Args:
        strength: on the UNet; with a course its last value.
        text_strength: on the text encoder.
        course: the UNet's strength over the steps as (share of the steps, strength), ascending; empty if it stays.
    """

    name: str
    strength: float = 1.0
    text_strength: float = 1.0
    course: Course = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt without its tags, the LoRAs that they ask for, and the tags that say nothing here, such as <hypernet:x:1>."""

    words: str
    tags: tuple[Tag, ...] = ()
    unread: tuple[str, ...] = ()


def read(prompt: str) -> Prompt:
    """Takes the tags out of a prompt; A1111 takes out unknown ones too."""
    tags, unread = [], []
    for found in _TAG.finditer(prompt):
        tag = _tag(found[2]) if found[1] in _LORA_WORDS else None
        if tag:
            tags.append(tag)
        else:
            unread.append(found[0].strip())
    return Prompt(_TAG.sub("", prompt), tuple(tags), tuple(unread))


def _tag(inside: str) -> Tag | None:
    """NAME:TE:UNET with te= and unet= anywhere after the name; None if a value is no number and no course."""
    name, *values = inside.split(":")
    given: dict[str, str] = {}
    positional = []
    for value in values:
        key, equals, rest = value.partition("=")
        if equals:
            given[key.strip()] = rest
        else:
            positional.append(value)
    first = course_of(positional[0]) if positional else ((0.0, 1.0),)
    text = course_of(given["te"]) if "te" in given else first
    second = course_of(positional[1]) if len(positional) > 1 else text
    unet = course_of(given["unet"]) if "unet" in given else second
    if not name.strip() or not text or not unet:
        return None
    return Tag(name.strip(), unet[-1][1], text[-1][1], unet if len(unet) > 1 else ())


def course_of(text: str) -> Course:
    """The strength over the steps that a text such as "0.8" or "0.2@0, 1@0.5" says; empty if it says none.

    Returns:
        (share, strength) by ascending share; a plain number is one point.
    """
    points = []
    for part in text.split(","):
        found = re.fullmatch(rf"\s*({_NUMBER})\s*(?:@\s*({_NUMBER})\s*)?", part)
        if not found or (found[2] is None and "," in text):
            return ()
        points.append((float(found[2] or 0), float(found[1])))
    shares = [share for share, _ in points]
    return tuple(sorted(points)) if len(set(shares)) == len(shares) and min(shares) >= 0 and max(shares) <= 1 else ()


def strength_at(course: Course, share: float) -> float:
    """A course's value when a share of the steps is done: straight lines between its points, level before the first and after the last."""
    if share <= course[0][0]:
        return course[0][1]
    for (left, low), (right, high) in pairwise(course):
        if share <= right:
            return low + (high - low) * (share - left) / (right - left)
    return course[-1][1]


def number(value: float) -> str:
    """A number as people write it, and exact: 1 and not 1.0, 0.1 and not 0.10000000000000001."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


def course_text(course: Course) -> str:
    """A course as it is written in a prompt."""
    return ",".join(f"{number(strength)}@{number(share)}" for share, strength in course)


def tag_text(tag: Tag) -> str:
    """A tag as it is written in a prompt, as short as it can be."""
    unet = course_text(tag.course) or number(tag.strength)
    both = number(tag.text_strength)
    return f"<lora:{tag.name}:{unet if unet == both else f'{both}:{unet}'}>"


def pieces(words: str) -> tuple[tuple[Piece, ...], ...]:
    """The weighted pieces of a prompt between its BREAKs; one empty piece for a part that says nothing.

    A1111's reading: a closing bracket multiplies everything since its opening one, and what is left open at the end is closed there.
    """
    found: list[tuple[str, float] | None] = []  # None is a break
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        found[start:] = [one and (one[0], one[1] * factor) for one in found[start:]]

    for token in _TOKEN.finditer(words):
        text, weight = token[0], token[1]
        if text in opened:
            opened[text].append(len(found))
        elif opened["("] and (weight is not None or text == ")"):
            close("(", LOUDER if weight is None else float(weight))
        elif opened["["] and text == "]":
            close("[", 1 / LOUDER)
        else:
            found.extend(_spoken(text))
    for bracket, factor in (("(", LOUDER), ("[", 1 / LOUDER)):
        while opened[bracket]:
            close(bracket, factor)
    return tuple(_parts(found))


def _spoken(text: str) -> Iterator[tuple[str, float] | None]:
    """A token's own words, and None where it breaks."""
    if text.startswith("\\"):
        yield text[1:] or text, 1.0
        return
    for i, part in enumerate(_BREAK.split(text)):
        if i:
            yield None
        yield part, 1.0


def _parts(found: Sequence[tuple[str, float] | None]) -> Iterator[tuple[Piece, ...]]:
    """Cut at the breaks; neighbours of one weight are one piece, so that a word that an escape divides stays a word."""
    part: list[Piece] = []
    for one in [*found, None]:
        if one is None:
            yield tuple(part) or (Piece(""),)
            part = []
        elif one[0] and part and math.isclose(part[-1].weight, one[1], rel_tol=1e-12):
            part[-1] = Piece(part[-1].words + one[0], part[-1].weight)
        elif one[0]:
            part.append(Piece(*one))


def is_plain(words: str) -> bool:
    """Whether a text says the same read as a prompt and read as it stands."""
    return pieces(words) == ((Piece(words),),)


def escaped(words: str) -> str:
    """A text as a prompt that says it as it stands: its brackets and backslashes are marked."""
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", words)
