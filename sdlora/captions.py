"""What is said about a picture: read beside it, and varied from visit to visit as the user asked.

Every choice has a stream of random numbers of its own, keyed by (seed, epoch, index, purpose). So a run that goes on hears what it
would have heard, switching one kind of choice on leaves the others as they were, and no two visits share a draw. What is done
follows one order: an alternative is chosen, wildcards are filled in, tags are shuffled, tags are left out, prefix and suffix are
added, the trigger word is put first, and now and then the whole caption is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdlora.errors import UserError

_ENDINGS = (".txt", ".caption")
_LIMIT_BYTES = 100_000  # a caption of 77 tokens has about 400
_BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# The last word of each stream's key. Never 0: numpy pads short keys with zeros, so [7, 0, 5] and [7, 0, 5, 0] are one stream.
_ALTERNATIVE, _WILDCARDS, _ORDER, _TAG_DROPOUT, _CAPTION_DROPOUT = 101, 102, 103, 104, 105


@dataclass(frozen=True)
class CaptionRules:
    """What is done to a caption at each visit.

    Args:
        trigger: put first, unless it is in the caption as a word of its own.
        shuffle: tags in a new order at each visit.
        keep_first: how many tags stay at the beginning, in their order. The trigger word is one of them, written or added.
        tag_dropout: share of the other tags left out, 0 to 1.
        caption_dropout: share of visits whose caption is left out, 0 to 1.
        wildcards: `{a|b}` means one of them.
        prefix, suffix: put before and after the caption as they are, with a space between: "a photo of", "anime style,", ", at night".
        separator: what stands between two tags.
    """

    trigger: str = ""
    shuffle: bool = False
    keep_first: int = 0
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0
    wildcards: bool = False
    prefix: str = ""
    suffix: str = ""
    separator: str = ","


def caption_path(picture: Path) -> Path | None:
    """The file beside a picture that has its caption: `.txt`, else `.caption`."""
    found = (picture.with_suffix(ending) for ending in _ENDINGS)
    return next((path for path in found if path.is_file()), None)


def read_caption_file(path: Path, *, alternatives: bool = False) -> tuple[str, ...]:
    """The captions in a file of UTF-8 text, runs of white space made one space.

    Args:
        alternatives: whether each line that is not empty is a caption of its own. Else all lines are one: people wrap long captions.

    Returns:
        At least one caption, none of them empty, no two the same.

    Raises:
        UserError: if it cannot be read, is in another encoding, is not text, or is empty.
    """
    text = _text(path)
    lines = [" ".join(line.split()) for line in (text.splitlines() if alternatives else [text])]
    found = tuple(dict.fromkeys(line for line in lines if line))
    if not found:
        raise UserError(f"Caption {path} is empty; write what the picture shows into it.")
    return found


def tags(caption: str, *, separator: str = ",") -> list[str]:
    """The parts of a caption between separators, white space around them and empty ones left out."""
    return [part.strip() for part in caption.split(separator) if part.strip()]


def with_trigger(caption: str, trigger: str, *, separator: str = ",") -> str:
    """The caption, with the trigger word put first unless it is already in it as a word of its own."""
    if not trigger or _says(caption, trigger):
        return caption
    return f"{trigger}{separator} {caption}" if caption else trigger


def caption_at(alternatives: Sequence[str], rules: CaptionRules, *, seed: int, epoch: int, index: int) -> str:
    """What is said at one visit.

    Args:
        alternatives: at least one caption.
        index: a number of this visit's own in its epoch, so that a picture's repeats differ too; 0 to 2³² - 1.

    Returns:
        The caption; "" if it is left out.
    """

    def stream(purpose: int) -> np.random.Generator:
        return np.random.default_rng([seed, epoch, index, purpose])

    if rules.caption_dropout and stream(_CAPTION_DROPOUT).random() < rules.caption_dropout:
        return ""
    caption = alternatives[int(stream(_ALTERNATIVE).integers(len(alternatives)))] if len(alternatives) > 1 else alternatives[0]
    if rules.wildcards and "{" in caption:
        caption = _joined(tags(_filled(caption, stream(_WILDCARDS)), separator=rules.separator), rules)  # an empty option leaves no comma
    if rules.shuffle or rules.tag_dropout:
        kept, others = _kept_and_others(caption, rules)
        if rules.shuffle:
            others = [others[i] for i in stream(_ORDER).permutation(len(others))]
        stays = stream(_TAG_DROPOUT).random(len(others)) >= rules.tag_dropout
        caption = _joined([*kept, *(tag for tag, stay in zip(others, stays, strict=True) if stay)], rules)
    return with_trigger(_between(rules.prefix, caption, rules.suffix), rules.trigger, separator=rules.separator)


def varies(alternatives: Sequence[str], rules: CaptionRules) -> bool:
    """Whether a picture's caption may differ between visits; if not, it is encoded once and the text encoder can go.

    A caption that the rules leave alone never varies. One that they may change counts as varying, even where the change would not
    show, as in `{a|a}`.
    """
    if 0 < rules.caption_dropout < 1 or len(set(alternatives)) > 1:
        return True
    if rules.wildcards and re.search(r"\{.*\|", alternatives[0]):
        return True
    others = _kept_and_others(alternatives[0], rules)[1]
    return (rules.shuffle and len(set(others)) > 1) or (0 < rules.tag_dropout < 1 and bool(others))


def variants(
    alternatives: Sequence[str], rules: CaptionRules, *, seed: int, epochs: Iterable[int], indices: Iterable[int]
) -> tuple[str, ...]:
    """All that is said about one picture in these epochs, each caption once, in the order of its first visit.

    Args:
        indices: of the picture's visits in an epoch, as `caption_at` has them.
    """
    visits = [*indices]
    if not varies(alternatives, rules):
        return (caption_at(alternatives, rules, seed=seed, epoch=0, index=0),)
    said = (caption_at(alternatives, rules, seed=seed, epoch=epoch, index=index) for epoch in epochs for index in visits)
    return tuple(dict.fromkeys(said))


def _says(text: str, trigger: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE) is not None


def _joined(parts: Iterable[str], rules: CaptionRules) -> str:
    return f"{rules.separator} ".join(parts)


def _between(prefix: str, caption: str, suffix: str) -> str:
    before = " ".join(part for part in (prefix.strip(), caption) if part)
    after = suffix.strip() if before else suffix.lstrip(",.;: ").rstrip()
    return f"{before}{' ' if before and after and after[0] not in ',.;:' else ''}{after}"


def _kept_and_others(caption: str, rules: CaptionRules) -> tuple[list[str], list[str]]:
    """Tags that stay at the beginning, the one with the trigger word before all, and the others."""
    every = tags(caption, separator=rules.separator)
    named = [tag for tag in every if rules.trigger and _says(tag, rules.trigger)]
    plain = [tag for tag in every if tag not in named]
    kept = max(0, rules.keep_first - bool(rules.trigger))
    return named + plain[:kept], plain[kept:]


def _filled(caption: str, random: np.random.Generator) -> str:
    """The caption with one option of each `{a|b}`, which may lie in one another; `\\{`, `\\|` and `\\}` are the plain signs.

    One pass with a stack of open braces, each a list of options. A brace without its partner is a plain sign.
    """
    stack: list[list[str]] = [[""]]
    for token in re.split(r"(\\[{|}]|[{|}])", caption):
        if token == "{":
            stack.append([""])
        elif token == "|" and len(stack) > 1:
            stack[-1].append("")
        elif token == "}" and len(stack) > 1:
            options = stack.pop()
            stack[-1][-1] += options[int(random.integers(len(options)))]
        else:
            stack[-1][-1] += token.removeprefix("\\") if len(token) == 2 and token[1] in "{|}" else token
    while len(stack) > 1:
        options = stack.pop()
        stack[-1][-1] += "{" + "|".join(options)
    return " ".join(stack[0][0].split())


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= _LIMIT_BYTES else b""
    except OSError as problem:
        raise UserError(f"Caption {path} cannot be read ({problem.strerror}); see that the file is there and may be read.") from problem
    if size > _LIMIT_BYTES:
        raise UserError(f"Caption {path} has {size:,} bytes, at most {_LIMIT_BYTES:,} are read; it should hold one picture's caption.")
    marked = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), None)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        where = f", byte {problem.start + 1} is 0x{content[problem.start]:02X}"
        raise UserError(f"Caption {path} is not UTF-8 but {marked or _likely(content) + where}; save it anew as UTF-8 text.") from problem
    if "\0" in text:
        raise UserError(f"Caption {path} is not text, it holds zero bytes (or is UTF-16 without a mark); save it anew as UTF-8 text.")
    return text


def _likely(content: bytes) -> str:
    """The name of the encoding that bytes are probably in, judged by Japanese syllables and Chinese signs."""
    for encoding, name, signs in (("shift_jis", "Shift-JIS", r"[\u3040-\u30ff]"), ("gb18030", "GB 18030", r"[\u4e00-\u9fff]{2}")):
        try:
            if re.search(signs, content.decode(encoding)):
                return f"probably {name}"
        except UnicodeDecodeError:
            continue
    return "probably Windows-1252"
