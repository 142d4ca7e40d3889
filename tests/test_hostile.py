"""Hostile strings in every field of every endpoint, hidden ones included, and hostile uploads: nothing leaves, runs or is rendered.

Endpoints, fields and their kinds are read from the page's own config, so an endpoint that comes later is tested without a change here.
Values are read and checked by gradio as those of a post; some calls go gradio's whole way (`process_api`), and each endpoint is
posted to over HTTP too.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import json
import re
import time
import traceback
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import orjson
import pytest
from gradio.helpers import special_args
from gradio.route_utils import Request
from gradio.state_holder import SessionState
from PIL import Image

from sdlora import generate, lora_file, lora_moves, sheets, weights_file
from sdlora.errors import UserError
from sdlora.ui import lora_shelf, page
from sdlora.ui.roots import Roots
from tests import hostile
from tests.shelf import FOREIGN, free_port, make_roots

pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning", "ignore::UserWarning:gradio", "ignore::RuntimeWarning")
TEXTS = {"textbox", "dropdown", "radio", "code", "checkboxgroup", "json", "html", "markdown", "multimodaltextbox", "dataframe"}
FILES = {"file", "image", "imageeditor", "gallery", "uploadbutton", "audio", "video", "downloadbutton", "model3d"}
RENDERED = {"html", "markdown", "chatbot", "label", "highlightedtext", "dataframe", "dataset"}  # kinds whose text can become HTML
FORBIDDEN = {"script", "iframe", "object", "embed", "math", "body", "base", "meta", "link", "style", "form"}
QUIET_S = 60
USUAL = "usual"
Fn = Any


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the roots, a working folder, and what must not be touched."""
    place = tmp_path_factory.mktemp("hostile")
    for name in ("outside", "cwd", "outside/deep"):
        (place / name).mkdir()
    (place / "outside/secret.txt").write_text(hostile.SECRET)
    (place / "secret.txt").write_text(hostile.SECRET)
    return place


@pytest.fixture(scope="module")
def roots(place: Path, tiny_base: Path) -> Roots:
    """Roots with LoRAs and a run, among them one that is hostile in all that it says."""
    roots = make_roots(tiny_base, place / "roots")
    words = {key: f"<script>alert('{key}')</script><img src=x onerror=alert(1)>" for key in (
        "modelspec.trigger_phrase", "ss_sd_model_name", "modelspec.title", "ss_output_name", "sshs_model_hash", "sshs_legacy_hash",
        "<script>x",
    )}  # fmt: skip
    tags = json.dumps({"<svg onload=x>": {"<script>tag</script>": 3, "x": "many", "y": -1}, "z": ["no"]})
    content = lora_file.to_bytes(FOREIGN, words | {"ss_tag_frequency": tags}, family="sd1")
    (roots.loras / "<img src=x onerror=alert(1)>.safetensors").write_bytes(content)
    (roots.loras / "<img src=x onerror=alert(1)>.json").write_text(json.dumps({"activation text": "<script>", "preferred weight": "<b>x"}))
    return roots


@pytest.fixture(scope="module")
def demo(roots: Roots, place: Path) -> Iterator[gr.Blocks]:
    """The whole page, at work in a folder of its own; drawing itself is left out, as it never sees a path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place / "cwd")
        patch.setattr(generate, "picture", lambda *_, **__: iter([Image.new("RGB", (32, 32))]))
        patch.setattr(generate, "set_loras", lambda *_, **__: None)
        patch.setattr(sheets, "draw", lambda base, sheet, stopped: iter(()))
        demo = page.launch(roots, port=free_port(), wait=False)
        yield demo
        demo.close(verbose=False)


# --- the page as an attacker reads it ------------------------------------------------------------------------------------------


def components(demo: gr.Blocks) -> dict[int, dict[str, Any]]:
    return {one["id"]: one for one in demo.config["components"]}


def functions(demo: gr.Blocks) -> list[Fn]:
    """Every function of the page that a post can reach, each once with the same fields."""
    found: dict[Any, Fn] = {}
    for fn in demo.fns.values():
        if fn.fn is not None:
            found.setdefault((getattr(fn.fn, "__code__", fn.fn), tuple(one._id for one in fn.inputs)), fn)
    return list(found.values())


def usual(component: Mapping[str, Any], roots: Roots) -> Any:
    """A value of a component that lets the function go on to the next field."""
    props, kind = component["props"], component["type"]
    value = props.get("value")
    if kind == "dropdown" and props.get("allow_custom_value"):
        offered = [one[1] for one in props.get("choices") or [] if one[1]] or [next(iter(lora_shelf.paths(roots)))]
        chosen = "mini" if "mini" in offered else offered[0]
        return [chosen] if props.get("multiselect") else value or chosen
    if kind in FILES or kind == "state":
        return None
    return USUAL if kind == "textbox" and not value else value


def hostile_value(component: Mapping[str, Any], word: str) -> Any:
    """The word as a value of a component's kind."""
    if component["type"] in FILES:
        return {"path": word, "orig_name": word, "meta": {"_type": "gradio.FileData"}}
    return [word] if component["props"].get("multiselect") or component["type"] == "checkboxgroup" else word


@functools.cache
def session_of(demo: gr.Blocks) -> SessionState:
    """The attacker's session; making one anew for each call would take ten times as long as the call."""
    return SessionState(demo)


async def call(demo: gr.Blocks, fn: Fn, values: list[Any], event: Any = None) -> list[Any]:
    """All that a function answers, as it goes to the browser; what gradio itself refuses is an answer too."""
    request, session = Request(session_hash="me", headers={"accept-language": "en"}), session_of(demo)
    answers: list[Any] = []
    iterator = None
    data = gr.EventData(None, event)  # as gradio's routes make it of a post
    try:
        while True:
            output = await demo.process_api(
                fn, values, state=session, request=request, iterator=iterator, session_hash="me", event_data=data
            )  # fmt: skip
            answers.append(output["data"])
            iterator = output["iterator"]
            if iterator is None or not output["is_generating"]:
                return answers
    except Exception as problem:  # gradio's own checks of a value; none of the page's functions may raise
        ours = [frame.filename for frame in traceback.extract_tb(problem.__traceback__) if "/sdlora/" in frame.filename]
        if ours:
            raise
        return [*answers, str(problem)]


async def call_directly(demo: gr.Blocks, fn: Fn, values: list[Any]) -> list[Any]:
    """The same without what gradio does to the answers, which takes most of the time."""
    try:
        inputs = await demo.preprocess_data(fn, values, session_of(demo))
    except Exception as problem:
        return [str(problem)]
    inputs, *_ = special_args(fn.fn, inputs, Request(session_hash="me", headers={"accept-language": "en"}), None)
    found = fn.fn(*inputs)
    return [_listed(fn, one) for one in (found if inspect.isgenerator(found) else [found])]


def _listed(fn: Fn, answer: Any) -> list[Any]:
    """An answer as one value for each output."""
    if isinstance(answer, dict) and any(isinstance(key, gr.blocks.Block) for key in answer):
        return [answer.get(one) for one in fn.outputs]
    return list(answer) if isinstance(answer, tuple | list) and len(fn.outputs) > 1 else [answer]


class Rendered(HTMLParser):
    """What a browser would run of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in FORBIDDEN:
            self.found.append(tag)
        for name, value in attrs:
            address = re.sub(r"\s", "", value or "").lower()
            if name.startswith("on") or address.startswith(("javascript:", "data:text", "http", "//")):
                self.found.append(f"{tag} {name}={value}")


def check_answer(demo: gr.Blocks, fn: Fn, answers: list[Any], word: str) -> None:
    """Nothing raw in what is rendered, nothing from outside, and all of it can be sent."""
    kinds = [components(demo)[one._id]["type"] for one in fn.outputs]
    for answer in answers:
        sent = [value for kind, value in zip(kinds, answer, strict=False) if kind != "state"] if isinstance(answer, list) else answer
        text = json.dumps(sent, default=str, ensure_ascii=False)
        assert not re.search("[\ud800-\udfff]", text), (fn.api_name, "half characters, which no answer can carry")
        assert hostile.SECRET not in text, (fn.api_name, word)
        for kind, value in zip(kinds, answer if isinstance(answer, list) else [], strict=False):
            if kind in RENDERED:
                shown = value.get("value") if isinstance(value, dict) else value
                assert not Rendered(str(shown)).found, (fn.api_name, word, str(shown)[:500])
            elif isinstance(value, dict):
                assert not Rendered(str(value.get("info", ""))).found, (fn.api_name, word)


def snapshot(folder: Path, *, but: Path) -> dict[str, str]:
    """Every file and folder with its content's hash, except what lies in one of them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_relative_to(but):
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def loras(roots: Roots) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in roots.loras.rglob("*.safetensors")} | {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in roots.runs.rglob("*.safetensors")
    }


# --- strings --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [5, pytest.param(1, marks=pytest.mark.huge)], ids=["each word in some fields", "each in all"])
def test_two_hundred_strings_in_every_field_of_every_function_neither_leave_nor_run_nor_are_rendered(
    demo: gr.Blocks, roots: Roots, place: Path, part: int
) -> None:
    words, known = hostile.strings(place / "outside"), components(demo)
    before, files = snapshot(place, but=roots.loras.parent), loras(roots)
    calls, fields = 0, set[tuple[int, str]]()

    async def attack() -> None:
        nonlocal calls
        for fn in functions(demo):
            kinds = [known[one._id] for one in fn.inputs]
            plain = [usual(one, roots) for one in kinds]
            for at, one in enumerate(kinds):
                if one["type"] not in TEXTS | FILES:
                    continue
                fields.add((fn._id, one["props"].get("elem_id")))
                turn = 50 // part
                for number, word in islice(enumerate(words), len(fields) % part, None, part):
                    values = [*plain[:at], hostile_value(one, word), *plain[at + 1 :]]
                    whole = number // part % turn == len(fields) // part % turn  # every word goes the whole way in some fields
                    check_answer(demo, fn, await (call if whole else call_directly)(demo, fn, values), word)
                    calls += 1

    asyncio.run(attack())
    assert len(words) >= 200
    assert calls == sum(len(words[number % part :: part]) for number in range(1, len(fields) + 1))
    assert len(fields) > 30
    assert snapshot(place, but=roots.loras.parent) == before
    now = loras(roots)
    assert {path: now.get(path) for path in files} == files, "no file went, changed, or got another name"
    assert {Path(path).name for path in set(now) - set(files)} <= {f"{USUAL}.safetensors"}, "no hostile word became a file's name"
    assert not (place / "outside/canary").exists()


def test_words_in_events_and_numbers_do_no_harm(demo: gr.Blocks, roots: Roots, place: Path) -> None:
    before, known = snapshot(place, but=roots.loras.parent), components(demo)
    words: list[Any] = [*hostile.strings(place / "outside")[::40], None, [], {}, float("nan"), -(2**70), 1e308]

    async def attack() -> None:
        for fn in functions(demo):
            plain = [usual(known[one._id], roots) for one in fn.inputs]
            for word in words:
                for event in ({"key": word, "index": word, "value": word}, word):
                    check_answer(demo, fn, await call(demo, fn, plain, event), str(word))
                if any(known[one._id]["type"] in ("number", "slider", "checkbox") for one in fn.inputs):
                    numbers = [word if known[one._id]["type"] in ("number", "slider", "checkbox") else value for one, value in
                               zip(fn.inputs, plain, strict=True)]  # fmt: skip
                    check_answer(demo, fn, await call(demo, fn, numbers), str(word))

    files = {path: content for path, content in loras(roots).items() if Path(path).is_relative_to(roots.runs)}
    asyncio.run(attack())
    assert snapshot(place, but=roots.loras.parent) == before
    assert {path: content for path, content in loras(roots).items() if Path(path).is_relative_to(roots.runs)} == files
    assert not (place / "outside/canary").exists()


def test_any_prompt_can_stand_on_a_sheet(place: Path) -> None:
    for word in hostile.strings(place / "outside"):
        sheet = sheets.plan(generate.Request(""), [word, "x"], [sheets.Voice(Path("a"), word)], [1.0], rows="prompt")
        assert sheets.picture(sheet, {}, size_px=(32, 32)).size == sheets.frame(sheet, (32, 32)).corner(2, 2)


def test_no_hostile_string_is_a_files_name(place: Path) -> None:
    for word in hostile.strings(place / "outside"):
        with pytest.raises(UserError, match="cannot be a file's here") as refused:
            lora_moves.checked_name(word)
        assert str(refused.value).isprintable()


# --- posts ----------------------------------------------------------------------------------------------------------------------


def posted(demo: gr.Blocks, bodies: list[dict[str, Any]], session: str) -> dict[str, dict[str, Any]]:
    """What each event came to, after all were posted at once to the queue of one session."""
    with httpx.Client(base_url=f"{str(demo.local_url).rstrip('/')}/gradio_api", timeout=QUIET_S) as browser:
        waiting = set()
        for body in bodies:
            content = orjson.dumps(body | {"session_hash": session})
            answer = browser.post("/queue/join", content=content, headers={"content-type": "application/json"})
            assert answer.status_code in (200, 422), answer.text
            if answer.status_code == 200:
                waiting.add(answer.json()["event_id"])
        done = {}
        with browser.stream("GET", "/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[6:]) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    done[message["event_id"]] = message
                    waiting.discard(message["event_id"])
                if not waiting:
                    return done
    raise AssertionError(f"{len(waiting)} events were never answered")


def test_direct_posts_to_every_endpoint_hidden_ones_too(demo: gr.Blocks, roots: Roots, place: Path) -> None:
    known, before, files = components(demo), snapshot(place, but=roots.loras.parent), loras(roots)
    words = [word for word in hostile.strings(place / "outside") if not re.search("[\ud800-\udfff]", word) and len(word) < 1000]
    bodies, at = [], 0
    for fn in functions(demo):
        plain = [usual(known[one._id], roots) for one in fn.inputs]
        places = [i for i, one in enumerate(fn.inputs) if known[one._id]["type"] in TEXTS | FILES]
        for i in places or [None]:
            at += 37
            word = words[at % len(words)]
            values = plain if i is None else [*plain[:i], hostile_value(known[fn.inputs[i]._id], word), *plain[i + 1 :]]
            bodies.append({"fn_index": fn._id, "data": values, "event_data": {"key": word, "index": [word]}, "trigger_id": None})
    started_s = time.monotonic()
    done = posted(demo, bodies, "attacker")
    assert time.monotonic() - started_s < QUIET_S
    assert len(done) >= len(functions(demo))
    for message in done.values():
        assert hostile.SECRET not in json.dumps(message)
        for value in (message["output"].get("data") or []) if isinstance(message["output"], dict) else []:
            assert not (isinstance(value, str) and value.lstrip().startswith("<div") and Rendered(value).found), value[:300]
    assert snapshot(place, but=roots.loras.parent) == before
    assert {path: content for path, content in loras(roots).items() if path in files} == files
    assert not (place / "outside/canary").exists()


def test_files_outside_are_neither_served_nor_taken_for_uploads(demo: gr.Blocks, roots: Roots, place: Path) -> None:
    with httpx.Client(base_url=str(demo.local_url)) as browser:
        for path in (place / "outside/secret.txt", place / "secret.txt", *(roots.loras.glob("*.safetensors")), *roots.runs.rglob("*.toml")):
            for way in (
                f"/gradio_api/file={path}",
                f"/gradio_api/file={roots.outputs}/../../secret.txt",
                f"/gradio_api/file=../{path.name}",
            ):
                answer = browser.get(way)
                assert answer.status_code in (403, 404), way
                assert hostile.SECRET not in answer.text
    imports = next(fn for fn in functions(demo) if fn.api_name == "library_import")
    for path in (roots.runs / "cups/cups.safetensors", place / "outside/secret.txt"):
        answer = asyncio.run(call(demo, imports, [{"path": str(path), "meta": {"_type": "gradio.FileData"}}, "taken"]))
        assert "Cannot move" in str(answer) or "not allowed" in str(answer), answer
    assert not (roots.loras / "taken.safetensors").exists()


# --- uploads --------------------------------------------------------------------------------------------------------------------


def test_fifty_hostile_uploads_are_refused_or_kept_under_a_plain_name(demo: gr.Blocks, roots: Roots, place: Path) -> None:
    files = hostile.uploads(place / "outside", (roots.loras / "calm.safetensors").read_bytes())
    before, had, known = snapshot(place, but=roots.loras.parent), loras(roots), components(demo)
    taking = [(fn, at) for fn in functions(demo) for at, one in enumerate(fn.inputs) if known[one._id]["type"] in FILES]
    assert any(fn.api_name == "library_import" for fn, _ in taking)
    said: dict[str, str] = {}
    with httpx.Client(base_url=str(demo.local_url), timeout=QUIET_S) as browser:
        for name, content in files:
            answer = browser.post("/gradio_api/upload", files={"files": (name, content)})
            if answer.status_code != 200:
                said[name] = answer.text
                continue
            (path,) = answer.json()
            for fn, at in taking:
                plain = ["" if known[one._id]["type"] == "textbox" else usual(known[one._id], roots) for one in fn.inputs]
                value: Any = {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
                value = [value] if known[fn.inputs[at]._id]["props"].get("file_count") == "multiple" else value
                answers = asyncio.run(call(demo, fn, [*plain[:at], value, *plain[at + 1 :]]))
                check_answer(demo, fn, answers, name)
                said[name] = str(answers)
    assert len(said) >= 50
    assert snapshot(place, but=roots.loras.parent) == before
    assert not (place / "outside/canary").exists()
    now = loras(roots)
    assert {path: now[path] for path in had} == had, "nothing was written over"
    for path in map(Path, set(now) - set(had)):
        assert path.parent == roots.loras
        assert lora_moves.checked_name(path.stem) == path.stem
        assert path.read_bytes() == (roots.loras / "calm.safetensors").read_bytes(), "only sound files are kept"
    for name, answer in said.items():
        sound = files[[one for one, _ in files].index(name)][1] == (roots.loras / "calm.safetensors").read_bytes()
        assert sound or "message bad" in answer or "Invalid file type" in answer or "Error" in answer, (name, answer)
        assert str(place) not in answer.replace(str(name), ""), "no path of the machine is told"


def test_a_file_that_is_hostile_in_all_that_it_says_is_shown_as_text(demo: gr.Blocks, roots: Roots) -> None:
    by_name = {fn.api_name: fn for fn in functions(demo)}
    key = next(key for key, path in lora_shelf.paths(roots).items() if path.stem.startswith("<img"))
    cards = asyncio.run(call(demo, by_name["library_list"], ["loras", "onerror", "", "newest", 1]))
    looked = asyncio.run(call(demo, by_name["library_look"], [key]))
    inside = asyncio.run(call(demo, by_name["library_inspect"], [key, "mini"]))
    for fn, answer in (("library_list", cards), ("library_look", looked), ("library_inspect", inside)):
        check_answer(demo, by_name[fn], answer, key)
        assert "&lt;script&gt;" in str(answer) or "&lt;img" in str(answer), fn
    assert "&lt;script&gt;tag&lt;/script&gt;<b>3</b>" in str(looked)
    assert "alert(&#x27;ss_sd_model_name&#x27;)" in str(looked).replace("\\", "")
    assert len(weights_file.header(lora_shelf.paths(roots)[key]).metadata) >= 8
