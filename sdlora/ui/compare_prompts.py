"""Prompts that the page of sheets proposes for what is chosen: a run's own samples, else a plain picture with the trigger word.

Without its trigger word a LoRA may draw what the base draws, and the sheet would say that it does nothing. What a person has written is
never replaced: that is looked at in the browser, at the very moment (`KEEP_JS`), as an answer that comes late could write over a word.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from sdlora import captions, runs, shelf
from sdlora.ui import lora_shelf
from sdlora.ui.roots import Roots

MOST = 4  # lines that are proposed
PLAIN = ("a red star on a blue background", "a big teal cat on an orange background")
PLACES = ("on a blue background", "on an orange background")  # for a subject, which is what the picture shows
_LONGEST = 300
# of what stands there, what the page has put there, and what it would put there now: the first two as they are to be
KEEP_JS = "(now, put, proposed) => (now || '').trim() === (put || '').trim() ? [proposed, proposed] : [now, put]"


def proposed(roots: Roots, keys: object) -> str:
    """Prompts for the LoRAs of some ids, one on each line; those of different runs take turns.

    Args:
        keys: a list of ids, as the control has them; what is none is passed over.
    """
    offered = lora_shelf.paths(roots)
    chosen = [offered[key] for key in (keys if isinstance(keys, list) else []) if isinstance(key, str) and key in offered]
    sources = {shelf.run_of(path) or path: path for path in chosen}
    each = [_of_run(place) if place != path else _of_file(path) for place, path in sources.items()]
    turns = (line for turn in itertools.zip_longest(*each) for line in turn if line)
    return "\n".join(list(dict.fromkeys(turns))[:MOST] or PLAIN)


def _of_run(folder: Path) -> list[str]:
    run = lora_shelf.look(folder)
    own = [_line(words) for words in runs.sample_prompts(folder)]
    return [words for words in own if words] or _called(_line(run.trigger), subject=run.kind == "character")


def _of_file(path: Path) -> list[str]:
    return _called(_line(shelf.facts(path).trigger), subject=False)


def _called(trigger: str, *, subject: bool) -> list[str]:
    if trigger and subject:
        return [f"{trigger} {place}" for place in PLACES]
    return [captions.with_trigger(words, trigger) for words in PLAIN]


def _line(words: str) -> str:
    """Words on one line, cut where one of them ends."""
    line = " ".join(words.encode("utf-8", "replace").decode().split())
    return line if len(line) <= _LONGEST else line[:_LONGEST].rpartition(" ")[0] or line[:_LONGEST]
