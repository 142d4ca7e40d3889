"""What is odd about captions: too short or too long, unlike the others, not what a text encoder reads, and about the trigger word.

Captions are sentences or lists of tags, and both are right; only of tags can it be said that one stands alone. Length is counted by the
base's own tokenizer where there is one. Without it, a lower bound is stated as one, since a guess would warn of what is well.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Literal

from sdlora import captions
from sdlora.captions import CaptionRules
from sdlora.dataset import Finding, Sample

CHUNK = 75  # tokens that CLIP reads at once

_MANY = 5  # captions that are all the same are an oversight, three may be meant
_SHOWN = 5
_MOST_WORDS = 3  # of a trigger: a made-up name, perhaps with its class behind it
_TAGGED = 4  # captions of so many parts are lists of tags, those of fewer are sentences
_LATIN_ENDS = "\u024f"
_WEIGHTED = re.compile(r"<\w+:[^>]*>|\(\s*[^()]+:\s*[\d.]+\s*\)")
_WILDCARD = re.compile(r"\{[^{}]*\|[^{}]*\}")
_COMMON_WORDS = """
a an the and of in on art artwork style painting drawing sketch photo photograph picture image portrait landscape scene background
person people man woman boy girl child kid baby lady guy men women girls boys mother father king queen prince princess knight witch
wizard angel demon monster creature robot alien ghost dragon unicorn character hero face head body hair eye eyes hand hands smile
cat dog kitten puppy horse bird fish bear fox wolf lion tiger rabbit mouse cow pig sheep duck frog snake spider owl deer monkey
elephant dinosaur animal pet toy doll plush house home castle tower city street village room door window bridge church car truck
bus train boat ship plane bike rocket tree forest flower rose grass leaf plant garden mountain river lake sea ocean beach sky cloud
sun moon star stars night day rain snow fire water ice earth world space planet book cup mug bottle chair table bed lamp clock key
sword gun hat shirt dress coat shoe shoes bag ring crown umbrella ball apple banana orange cherry cake bread coffee food fruit heart
red green blue yellow black white grey gray pink purple brown gold silver dark light bright color colour big small old new young
cute pretty beautiful happy sad anime manga cartoon comic watercolor watercolour oil pencil ink pixel vintage retro modern realistic
abstract minimal fantasy logo icon poster texture pattern glass metal wood stone paper music game movie film love life magic
"""
_KNOWN = frozenset(_COMMON_WORDS.split())


def of_sample(
    sample: Sample, rules: CaptionRules, *, kind: str | None, token_count: Callable[[str], int] | None = None
) -> Iterator[Finding]:
    """What is odd about a sample's captions, each kind of oddity once.

    Args:
        rules: what is done to its captions; what is counted is what will be heard.
        kind: "style" or "character", None if that is open.
        token_count: of a text, without begin and end; a lower bound is taken if not given.
    """
    found: dict[str, Finding] = {}
    for words in sample.captions:
        for severity, code, what, advice in (*_about_trigger(words, rules, kind), *_about_words(words, rules)):
            found.setdefault(code, Finding(severity, code, what, advice, sample.picture))
    yield from found.values()
    calm = replace(rules, shuffle=False, tag_dropout=0.0, caption_dropout=0.0)
    length = max((token_count or fewest_tokens)(captions.caption_at((words,), calm, seed=0, epoch=0, index=0)) for words in sample.captions)
    if length > CHUNK:
        about = "" if token_count else "at least "
        what = f"The caption has {about}{length} tokens and is read in {math.ceil(length / CHUNK)} chunks of {CHUNK}."
        advice = "Put what matters first, or shorten it: nothing is cut off here, but other tools may do it."
        yield Finding("warns" if length > 3 * CHUNK else "notes", "caption-long", what, advice, sample.picture)


def of_set(samples: Sequence[Sample], rules: Sequence[CaptionRules], *, kind: str | None) -> Iterator[Finding]:
    """What is odd about all captions together, and about the trigger words.

    Args:
        rules: for each source.
    """
    for trigger in dict.fromkeys(rules[one.source].trigger for one in samples):
        if not trigger:
            yield Finding("warns", "trigger-missing", "There is no trigger word to call the LoRA by.", "Set trigger to a made-up word.")
        elif _KNOWN.issuperset(re.findall(r"\w+", trigger.casefold())):
            what = f"The trigger word '{trigger}' is a common word, for which the base has a picture of its own."
            yield Finding("warns", "trigger-common", what, "Choose a made-up word.")
        elif len(trigger.split()) > _MOST_WORDS:
            what = f"The trigger word '{_clipped(trigger)}' is {len(trigger.split())} words, all of which every prompt would have to hold."
            yield Finding("warns", "trigger-long", what, "Choose one made-up word; what else is to be seen belongs in the captions.")
    if len({sample.captions for sample in samples}) == 1 and len(samples) >= _MANY and len(samples[0].captions) == 1:
        what = f"All {len(samples)} captions are '{_clipped(samples[0].caption)}'."
        advice = "Say what each picture shows, so that only what they share is learned."
        yield Finding("notes" if kind == "character" else "warns", "captions-same", what, advice)
    counts = tag_counts(samples)
    if once := [tag for tag, count in counts if count == 1]:
        more = f" and {len(once) - _SHOWN} more" if len(once) > _SHOWN else ""
        what = f"{len(once)} of {len(counts)} tags appear once: {', '.join(once[:_SHOWN])}{more}."
        yield Finding("notes", "tags-once", what, "Check their spelling: a tag seen once is learned from one picture alone.")


def tag_counts(samples: Sequence[Sample]) -> tuple[tuple[str, int], ...]:
    """How many samples have each tag, the commonest first; none if most captions have fewer than four parts and so are sentences."""
    lists = [[tag.casefold() for words in sample.captions for tag in captions.tags(words)] for sample in samples]
    if not lists or median(len(one) for one in lists) < _TAGGED:
        return ()
    counts = Counter(tag for one in lists for tag in dict.fromkeys(one))
    return tuple(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def fewest_tokens(words: str) -> int:
    """A lower bound of CLIP's tokens: it splits a text into words, digits and runs of signs, and makes at least one token of each."""
    return len(re.findall(r"[^\W\d_]+|\d|(?:[^\w\s]|_)+", words))


Oddity = tuple[Literal["warns", "notes"], str, str, str]


def _about_trigger(words: str, rules: CaptionRules, kind: str | None) -> Iterator[Oddity]:
    rest = words
    if rules.trigger:
        rest, times = re.subn(rf"(?<!\w){re.escape(rules.trigger)}(?!\w)", " ", words, flags=re.IGNORECASE)
        if not times:
            what = f"The caption lacks the trigger word '{rules.trigger}', which is put first."
            yield "notes", "caption-without-trigger", what, "There is nothing to do, unless it should stand elsewhere."
    if len(re.findall(r"\w+", rest)) < 2:
        what, advice = f"The caption '{_clipped(words)}' says next to nothing.", "Say what it shows, or all of that is learned as one."
        yield "notes" if kind == "character" else "warns", "caption-short", what, advice


def _about_words(words: str, rules: CaptionRules) -> Iterator[Oddity]:
    if _WEIGHTED.search(words):
        yield "warns", "caption-syntax", f"The caption '{_clipped(words)}' holds prompt syntax.", "Leave weights and <lora:…> out of it."
    if _WILDCARD.search(words) and not rules.wildcards:
        yield "warns", "caption-wildcards", "The caption holds {a|b}, and wildcards are off.", "Set captions.wildcards, or choose one."
    letters = [one for one in words if one.isalpha()]
    if letters and 2 * sum(one > _LATIN_ENDS for one in letters) > len(letters):
        yield (
            "warns",
            "caption-script",
            f"The caption '{_clipped(words)}' is not in Latin script.",
            "Write it in English, which CLIP reads.",
        )
    counts = Counter(tag.casefold() for tag in captions.tags(words, separator=rules.separator))
    if twice := [tag for tag, count in counts.items() if count > 1]:
        yield "notes", "caption-repeats", f"The caption says twice: {', '.join(twice[:_SHOWN])}.", "Say it once."


def _clipped(words: str) -> str:
    return words if len(words) <= 40 else words[:39] + "…"
