"""The LoRAs of a drawing as cards: any number of them, each with its picture, its facts and its strengths.

The cards are one control. Its value is what is chosen, as plain data: {"chosen": [{"lora": id, "strength": 1, "text": null, "on": true,
"course": ""}, …]}, so that a program can hand over the same list that the page does. Facts of files are asked for by id and
shown as text, never as HTML. No LoRA is hidden because it does not fit; its card says why it does not.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora import prompts, shelf
from sdlora.errors import UserError
from sdlora.generate import LoRA
from sdlora.prompts import Tag
from sdlora.ui import lora_shelf, words
from sdlora.ui import roots as places
from sdlora.ui import studio as studios
from sdlora.ui.generate_cards_js import CSS, HTML, SCRIPT
from sdlora.ui.generate_cards_js import TELL_BASE as TELL_BASE
from sdlora.ui.lora_shelf import Item
from sdlora.ui.roots import Roots
from sdlora.ui.studio import Studio

FOUND = 24  # LoRAs that a search shows at once
STRONGEST = 2.0


def control(studio: Studio, *, base: str) -> gr.HTML:
    """The cards, to be called inside a `gr.Blocks`."""

    def find(told: object) -> dict[str, Any]:
        return found(studio, *_pair(told))

    def look(told: object) -> dict[str, Any]:
        return card(studio, *_pair(told))

    script = words.for_script("generate.card_", without="generate.card_") + f"const BASE = {json.dumps(base)};\n{SCRIPT}"
    return gr.HTML(
        {"chosen": []}, html_template=HTML, css_template=CSS, js_on_load=script, apply_default_css=False,
        server_functions=[find, look], elem_id="loras", label="LoRA",
    )  # fmt: skip


def _pair(told: object) -> tuple[str, str]:
    """The two words that the script sends, as one list; a direct post may send anything."""
    words_sent = told if isinstance(told, list) else [told]
    return str(words_sent[0] if words_sent else "")[:200], str(words_sent[1] if len(words_sent) > 1 else "mini")[:1000]


def found(studio: Studio, search: str = "", base: str = "mini") -> dict[str, Any]:
    """The first LoRA files in which every word of a search stands, newest first, and how many there are; of each run first its best."""
    matches = lora_shelf.matching(lora_shelf.items(studio.roots), words=str(search)[:200])
    family = _family(studio, base)
    return {"count": len(matches), "loras": [_facts(one, family) for one in lora_shelf.fronts_first(matches, FOUND)]}


def card(studio: Studio, key: str, base: str = "mini") -> dict[str, Any]:
    """One LoRA file's facts, with how many of its modules match those of the base."""
    try:
        one = lora_shelf.item(studio.roots, key)
        told = _facts(one, _family(studio, base))
        matched = studios.fit(studio, studios.base_of(studio, base), one.facts.path)
    except UserError as problem:
        return {"key": str(key), "name": places.shown(str(key)), "reason": str(problem), "gone": True}
    if matched:
        told |= {"fit": matched[0], "reason": told["reason"] or matched[1]}
    return told


def _family(studio: Studio, base: str) -> str:
    """The loaded base's family; "" if another base is asked for."""
    try:
        name = studios.base_of(studio, base)
    except UserError:
        return ""
    return studio.base.family if studio.base and studio.base.name == name else "mini" if name == "mini" else ""


def _facts(one: Item, family: str) -> dict[str, Any]:
    """What a card shows; `reason` says why it does not fit, as far as the header tells."""
    facts = one.facts
    reason = facts.trouble
    if not reason and family and facts.family not in (family, "other"):
        made_for, wanted = lora_shelf.FAMILIES[facts.family], lora_shelf.FAMILIES[family]
        reason = f"made for {made_for}, and the base is {wanted}"
    return {
        "key": one.key, "name": one.shown, "family": lora_shelf.FAMILIES.get(facts.family, "?"), "reason": reason,
        "rank": ", ".join(map(str, facts.ranks)), "strength": facts.strength, "base": facts.base,
        "trigger": [word.strip() for word in facts.trigger.split(",") if word.strip()][:12],
        "picture": lora_shelf.small_picture(shelf.preview(facts.path)), "marks": lora_shelf.marks_of(one),
    }  # fmt: skip


def chosen(studio: Studio, value: object) -> list[LoRA]:
    """The LoRAs of a value of the control that are switched on.

    Args:
        value: as the control gives it, or the list in it; "lora" may be a name too.

    Raises:
        UserError: if something in it is not as it must be.
    """
    rows = _rows(value)
    loras = []
    for row in rows:
        if not isinstance(row, dict) or "lora" not in row:
            raise UserError(f'A LoRA is given as {places.shown(str(row))}; give {{"lora": its name or id, "strength": 1}}.')
        if row.get("on", True):
            path = path_of(studio.roots, row["lora"])
            strength, text = _strength(row.get("strength", 1.0), path), row.get("text")
            course = _course(str(row.get("course") or ""), path)
            text = strength if text is None and course else text  # the course is the UNet's; the card's strength stays the text encoder's
            loras.append(LoRA(path, strength, None if text is None else _strength(text, path), course=course))
    return loras


def _rows(value: object) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise UserError(f"The list of LoRAs is {places.shown(str(value))}, which is no JSON; give a list.") from None
    rows = value.get("chosen", []) if isinstance(value, dict) else value or []
    if not isinstance(rows, list) or len(rows) > 100:
        raise UserError("The list of LoRAs is no list of up to 100 of them.")
    return rows


def _strength(value: object, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > STRONGEST:
        raise UserError(f"The strength of LoRA '{path.stem}' is {places.shown(str(value))}; give a number from -2 to 2.")
    return float(value)


def _course(text: str, path: Path) -> prompts.Course:
    if not text.strip():
        return ()
    course = prompts.course_of(text)
    if not course:
        raise UserError(
            f"The course {places.shown(text)} of LoRA '{path.stem}' is not understood; write strengths at shares of the steps, "
            "such as 0.2@0, 1@0.5."
        )
    for _, strength in course:
        _strength(strength, path)
    return course


def path_of(roots: Roots, word: object) -> Path:
    """The LoRA file of an id, or of a name, however it is capitalised.

    Raises:
        UserError: if there is none, or several; it names those that are called nearly so.
    """
    if isinstance(word, str):
        offered = lora_shelf.paths(roots)
        if word in offered:
            return offered[word]
        for same in (str, str.lower):
            fitting = [path for path in offered.values() if same(path.stem) == same(word.strip())]
            shown = [one.facts.path for one in lora_shelf.items(roots) if same(one.shown) == same(word.strip())]
            if len(fitting) == 1 or len(shown) == 1:
                return shown[0] if len(shown) == 1 else fitting[0]
            if fitting:
                raise UserError(f"{len(fitting)} LoRA files are called {places.shown(word)}; choose one of them from the list.")
        near = difflib.get_close_matches(word, [path.stem for path in offered.values()], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(places.shown, near))}?" if near else f"there are {len(offered)} files, and none is near."
        raise UserError(f"No LoRA is called {places.shown(word)}; {hint}")
    raise UserError(f"A LoRA is called {places.shown(str(word))}; give its name or its id.")


def tagged(studio: Studio, tags: Sequence[Tag]) -> list[LoRA]:
    """The LoRAs that a prompt's tags ask for.

    Raises:
        UserError: as `path_of`, and if a strength is out of range.
    """
    loras = []
    for tag in tags:
        path = path_of(studio.roots, tag.name)
        for value in (tag.strength, tag.text_strength, *(strength for _, strength in tag.course)):
            _strength(value, path)
        loras.append(LoRA(path, tag.strength, tag.text_strength, course=tag.course))
    return loras


def rows_of(studio: Studio, tags: Sequence[Tag]) -> tuple[list[dict[str, Any]], list[str]]:
    """Tags as a value of the control, and for each that has no file here a sentence."""
    keys = {path: key for key, path in lora_shelf.paths(studio.roots).items()}
    rows, missed = [], []
    for tag in tags:
        try:
            path = path_of(studio.roots, tag.name)
        except UserError as problem:
            missed.append(str(problem))
            continue
        text = None if tag.text_strength == tag.strength and not tag.course else tag.text_strength
        rows.append({"lora": keys[path], "strength": tag.strength, "text": text, "on": True, "course": prompts.course_text(tag.course)})
    return rows, missed
