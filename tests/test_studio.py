"""Generate: what its presses do, called directly; the line in which drawings wait; and twenty clients at once."""

import asyncio
import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gradio_client
import pytest
import torch
from PIL import Image

from sdlora import base_files, devices, files, generate, lora_file, run_lock
from sdlora.errors import UserError
from sdlora.generate import LoRA, Request
from sdlora.prompts import Tag
from sdlora.ui import gallery, generate_actions, generate_cards, generate_form, generate_page, studio_line
from sdlora.ui import studio as studios
from sdlora.ui.generate_form import Form
from sdlora.ui.generate_parts import Parts
from sdlora.ui.studio import Drawn, Order, Studio
from tests import shelf

# gradio counts its events with what pandas is about to drop
pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]
TOKEN = "t" * 32
FORM = Form("a red star on a blue background", "a cup", seed=3, steps=2, guidance=3.0, token=TOKEN)


@pytest.fixture(scope="module")
def filled(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """A studio whose shelf no test changes; `key` finds a LoRA of it."""
    return Studio(shelf.make_roots(tiny_base, tmp_path_factory.mktemp("place")))


@pytest.fixture
def place(filled: Studio, tmp_path: Path) -> Studio:
    """The same shelf with empty outputs and nothing drawn yet."""
    return Studio(replace(filled.roots, outputs=tmp_path / "outputs"), base=filled.base)


@pytest.fixture
def form(place: Studio) -> Form:
    """What is asked for when a test changes nothing: the tiny base."""
    key = next(key for shown, key in generate_actions.lora_shelf.bases_of(place.roots) if shown == "tiny")
    return replace(FORM, base=key)


def row(lora: str, strength: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"lora": lora, "strength": strength} | more


def press(place: Studio, form: Form, session: str = "me") -> dict[str, Any]:
    """All changes of one press of Generate, later ones over earlier ones."""

    async def all_changes() -> dict[str, Any]:
        final: dict[str, Any] = {}
        async for changes in generate_actions.generate_pictures(place, session, "en", form):
            final |= changes
        return final

    return asyncio.run(all_changes())


def drawn_files(changes: dict[str, Any], which: str) -> list[Path]:
    assert "bad" not in changes["status"], changes["status"]
    return [Path(path) for path, _ in changes[which]["value"]]


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


# --- pictures -----------------------------------------------------------------------------------------------------------------


def test_a_changed_strength_draws_anew_beside_the_same_plain_picture_and_loads_nothing(
    place: Studio, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = press(place, replace(form, loras=[row("wild")], count=2))
    monkeypatch.setattr(base_files, "load", lambda *_, **__: pytest.fail("base loaded again"))
    monkeypatch.setattr(lora_file, "read", lambda path: pytest.fail("LoRA read again"))
    second = press(place, replace(form, loras=[row("wild", -0.5)], count=2))
    assert len(drawn_files(first, "with_lora")) == len(drawn_files(first, "without")) == 2
    for one, other in zip(drawn_files(first, "with_lora"), drawn_files(second, "with_lora"), strict=True):
        assert pixels(one) != pixels(other)
    assert drawn_files(first, "without") == drawn_files(second, "without")
    plain = press(place, replace(form, count=2))
    assert drawn_files(plain, "with_lora") == drawn_files(first, "without")
    assert plain["with_lora"]["label"] == "Without LoRA"
    assert not plain["without"]["visible"]


def test_the_picture_is_the_one_that_generate_draws_and_keeps_its_settings(place: Studio, tiny_base: Path, form: Form) -> None:
    asked = replace(form, prompt="a (red:1.3) star <lora:calm:0.2:0.3>", loras=[row("wild", 0.8)], beside=False)
    changes = press(place, asked)
    base = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    loras = [LoRA(place.roots.loras / "deep/wild.safetensors", 0.8), LoRA(place.roots.loras / "calm.safetensors", 0.3, 0.2)]
    generate.set_loras(base, loras)
    ((_, expected),) = generate.pictures(base, Request("a (red:1.3) star", "a cup", 3, 2, 3.0, weighted=True))
    (path,) = drawn_files(changes, "with_lora")
    assert pixels(path) == expected.tobytes()
    assert gallery.text_of(path).startswith(
        "a (red:1.3) star <lora:wild:0.8> <lora:calm:0.2:0.3>\nNegative prompt: a cup\nSteps: 2, Sampler: "
    )
    assert path.is_relative_to(place.roots.outputs)


def test_cards_carry_every_strength(place: Studio) -> None:
    path = place.roots.loras / "calm.safetensors"
    value = {"chosen": [
        row("calm", -0.5, text=0.25, course="0.2@0, 1@0.5", on=True), row("wild", 1, on=False), row("CUPS", 2, text=None, course=""),
    ]}  # fmt: skip
    expected = [LoRA(path, -0.5, 0.25, course=((0.0, 0.2), (0.5, 1.0))), LoRA(place.roots.runs / "cups/cups.safetensors", 2.0)]
    assert generate_cards.chosen(place, value) == expected
    assert generate_cards.chosen(place, '[{"lora": "calm"}]') == [LoRA(path)]
    assert generate_cards.chosen(place, None) == generate_cards.chosen(place, "") == []


def test_a_course_over_the_steps_is_heard_and_written_down(place: Studio, form: Form) -> None:
    seen = {}
    for course in ("", "0@0, 1@0.5", "1@0, 0@0.5"):
        (path,) = drawn_files(press(place, replace(form, steps=4, beside=False, loras=[row("wild", 1, course=course)])), "with_lora")
        seen[course] = pixels(path)
    assert "<lora:wild:1:1@0,0@0.5>" in gallery.text_of(path)  # the text encoder has the card's strength
    assert len(set(seen.values())) == 3


def test_random_takes_another_seed_and_says_which(place: Studio, form: Form) -> None:
    seeds = {press(place, replace(form, random=True))["seed"]["value"] for _ in range(3)}
    assert len(seeds) == 3


def painted(side: int = 32) -> dict[str, Any]:
    """An editor's value: a green picture with its left half painted over."""
    layer = Image.new("RGBA", (side, side))
    layer.paste((255, 255, 255, 255), (0, 0, side // 2, side))
    return {"background": Image.new("RGBA", (side, side), (0, 160, 0, 255)), "layers": [layer], "composite": None}


def test_what_is_painted_over_is_drawn_anew_and_the_rest_stays(place: Studio, form: Form) -> None:
    changes = press(place, replace(form, picture=painted(), loras=[row("wild")], denoise=1.0))
    (path,), (without,) = drawn_files(changes, "with_lora"), drawn_files(changes, "without")
    with Image.open(path) as image:
        assert image.crop((16, 0, 32, 32)).getcolors() == [(512, (0, 160, 0))]
        assert len(image.crop((0, 0, 16, 32)).getcolors(4096) or ()) > 50
    assert pixels(path) != pixels(without)
    whole = replace(form, picture=painted() | {"layers": []})
    with Image.open(drawn_files(press(place, whole), "with_lora")[0]) as image:
        assert len(image.crop((16, 0, 32, 32)).getcolors(4096) or ()) > 50


def test_a_second_pass_is_larger(place: Studio, form: Form) -> None:
    with Image.open(drawn_files(press(place, replace(form, hires_scale=1.5)), "with_lora")[0]) as image:
        assert image.size == (48, 48)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"seed": None}, "The seed is &#x27;None&#x27;; give a whole number"),
        ({"seed": -1}, "The seed is &#x27;-1&#x27;"),
        ({"seed": 4294967295, "count": 2}, "Seed 4294967295 is out of range"),
        ({"count": 1000}, "The number of pictures is &#x27;1000&#x27;; give a whole number from 1 to 8"),
        ({"steps": float("nan")}, "The number of steps is &#x27;nan&#x27;"),
        ({"steps": True}, "The number of steps is &#x27;True&#x27;"),
        ({"guidance": "7"}, "Guidance is &#x27;7&#x27;; give a number from 1 to 30"),
        ({"size": "big"}, "Size &#x27;big&#x27; is not understood"),
        ({"size": "31x32"}, "multiples of 2 px"),
        ({"size": "99999x32"}, "too large"),
        ({"size": "1024x1024", "hires_scale": 4}, "Size 4096x4096 is too large"),
        ({"sampler": "Eular"}, "&#x27;Eular&#x27; is unknown"),
        ({"sampler": "DDIM", "schedule": "Karras"}, "cannot be drawn with schedule type Karras"),
        ({"clip_skip": 9}, "Clip skip 9 is not one of the layers"),
        ({"base": ""}, "Base &#x27;&#x27; is not offered"),
        ({"base": "/<script>"}, "Base &#x27;/&lt;script&gt;&#x27; is not offered"),
        ({"base": "../../etc"}, "is not offered"),
        ({"prompt": ["a"]}, "The prompt is no text"),
        ({"prompt": "a" * 20_001}, "The prompt is no text of up to 20,000 characters"),
        ({"prompt": "a <lora:kalm:1>"}, "No LoRA is called &#x27;kalm&#x27;; did you mean &#x27;calm&#x27;?"),
        ({"prompt": "a <lora:zzzzzz:1>"}, "none is near"),
        ({"prompt": "a <lora:calm:9>"}, "give a number from -2 to 2"),
        ({"prompt": "a <hypernet:calm:1>"}, "&lt;hypernet:calm:1&gt;&#x27; in the prompt is not understood"),
        ({"loras": [{"lora": "../../secret", "strength": 1}]}, "No LoRA is called &#x27;../../secret&#x27;"),
        ({"loras": [{"lora": ["calm"]}]}, "give its name or its id"),
        ({"loras": ["calm"]}, "give {&quot;lora&quot;: its name or id"),
        ({"loras": "{"}, "which is no JSON"),
        ({"loras": [{"lora": "calm", "strength": "1"}]}, "strength of LoRA &#x27;calm&#x27;"),
        ({"loras": [{"lora": "calm", "course": "1@2"}]}, "The course &#x27;1@2&#x27; of LoRA &#x27;calm&#x27; is not understood"),
        ({"loras": [row("calm"), row("calm")]}, "chosen twice"),
        ({"loras": [row("calm")], "prompt": "<lora:calm:1>"}, "chosen twice"),
        ({"loras": [row("foreign")]}, "does not fit base"),
        ({"loras": [row("torn")]}, "torn.safetensors is damaged"),
        ({"picture": painted(), "hires_scale": 2}, "take the picture away"),
        ({"picture": painted(), "denoise": 0.1}, "leaves no step"),
        ({"picture": {"background": Image.new("RGBA", (32, 32)), "layers": []}}, "came as nothing but white"),
    ],
)
def test_bad_input_is_one_escaped_sentence(place: Studio, form: Form, changed: dict[str, Any], sentence: str) -> None:
    changes = press(place, replace(form, **changed))
    assert sentence in changes["status"]
    assert "bad" in changes["status"]
    assert not place.busy.locked()
    assert place.line == []
    assert not list(place.roots.outputs.rglob("*"))


def test_after_a_mistake_the_next_picture_is_drawn(place: Studio, form: Form) -> None:
    assert "does not fit" in press(place, replace(form, loras=[row("wild"), row("foreign")]))["status"]
    plain = drawn_files(press(place, form), "with_lora")[0]
    place.plain.clear()
    assert pixels(drawn_files(press(place, form), "with_lora")[0]) == pixels(plain)


# --- cards --------------------------------------------------------------------------------------------------------------------


def test_a_lora_that_does_not_fit_is_offered_and_its_card_says_why(place: Studio, form: Form) -> None:
    offered = {one["name"]: one for one in generate_cards.found(place, "", form.base)["loras"]}
    assert {"calm", "wild", "foreign", "torn", "cups"} <= set(offered)
    assert "torn.safetensors is damaged" in offered["torn"]["reason"]
    foreign = generate_cards.card(place, offered["foreign"]["key"], form.base)
    assert "none of its 1 modules is there" in foreign["reason"]
    assert foreign["fit"].startswith("0 of 1 modules match; not in the base: lora_unet_down_blocks_7")
    wild = generate_cards.card(place, offered["wild"]["key"], form.base)
    assert (wild["fit"], wild["reason"], wild["rank"]) == ("56 of 56 modules match", "", "4")
    cups = generate_cards.card(place, offered["cups"]["key"], form.base)
    assert cups["trigger"] == ["zup"]
    assert generate_cards.card(place, "../../etc/passwd", form.base)["gone"]
    assert [one["name"] for one in generate_cards.found(place, "zup")["loras"]] == ["cups"]


def test_a_lora_of_another_family_has_the_reason_on_its_card(place: Studio, tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "loras/wide.safetensors"
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    update = shelf.Update(shelf.LowRank(torch.zeros(2, 2048), torch.zeros(640, 2), 2.0))
    files.write(path, lora_file.to_bytes({stem: update}, {}, family="sdxl"))
    (one,) = generate_cards.found(Studio(replace(place.roots, loras=path.parent, runs=tmp_path / "none")), "wide", "mini")["loras"]
    assert (one["family"], one["reason"]) == ("SDXL", "made for SDXL, and the base is mini")


def test_two_files_of_one_name_are_told_apart(place: Studio, tiny_base: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        shelf.write_lora(tiny_base, tmp_path / f"two/{folder}/same.safetensors", seed=1)
    roots = replace(place.roots, loras=tmp_path / "two", runs=tmp_path / "none")
    with pytest.raises(UserError, match="2 LoRA files are called 'same'; choose one"):
        generate_cards.path_of(roots, "same")
    assert generate_cards.path_of(roots, "a/same") == tmp_path / "two/a/same.safetensors"


def test_five_hundred_files_are_searched_in_seconds(tmp_path: Path) -> None:
    """Files with the names and widths of an SD 1.x LoRA; their weights are never read."""
    folder = tmp_path / "loras"
    ends = [f"{attention}_{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out_0")]
    places = [("down", i, j) for i in range(3) for j in range(2)] + [("up", i, j) for i in range(1, 4) for j in range(3)]
    blocks = [f"lora_unet_{side}_blocks_{i}_attentions_{j}_transformer_blocks_0" for side, i, j in places]
    update = shelf.Update(shelf.LowRank(torch.ones(1, 768), torch.ones(1, 1), 1.0))
    modules = {f"{block}_{end}": update for block in blocks for end in ends}
    files.write(folder / "0.safetensors", lora_file.to_bytes(modules, {}, family="sd1"))
    for number in range(1, 500):
        (folder / f"{number}.safetensors").hardlink_to(folder / "0.safetensors")
    many = Studio(studios.Roots(runs=tmp_path / "runs", loras=folder, bases=tmp_path / "bases"))
    laps = []
    for words, count in (("", 500), ("499", 1), ("498", 1)):
        began = time.thread_time()
        found = generate_cards.found(many, words)
        laps.append(time.thread_time() - began)
        assert found["count"] == count
        assert len(found["loras"]) == min(count, generate_cards.FOUND)
    assert found["loras"][0]["family"] == "SD 1.x"
    assert max(laps) < 4  # a second on a free core; a slow and busy one needs more for the same
    assert laps[2] < 0.5  # the headers are remembered


# --- the line -----------------------------------------------------------------------------------------------------------------


def long_order(form: Form, place: Studio, count: int = 8) -> Order:
    return replace(generate_form.order_of(place, form, "me"), request=Request("a cup", steps=1000), count=count)


def wait_for(what: Any, patience_s: float = 60.0) -> None:
    until = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < until, "took too long"
        time.sleep(0.01)


def test_stop_ends_the_drawing_within_one_step_and_only_for_its_session(place: Studio, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    predict = generate.base_model.predict

    def counted(*values: Any) -> Any:
        steps.append(time.monotonic())
        return predict(*values)

    monkeypatch.setattr(generate.base_model, "predict", counted)
    job = studio_line.begin(place, "me", long_order(form, place))
    wait_for(lambda: job.state.done > 2)
    assert studio_line.stop(place, "somebody else") == 0
    before = len(steps)
    assert studio_line.stop(place, "me") == 1
    assert job.ended.wait(30)
    assert len(steps) <= before + 2  # the step that it was in, and one that began between the count and the stop
    assert job.state.ended == "stopped"
    assert job.state.done < job.state.steps == 8000
    assert (place.line, place.busy.locked()) == ([], False)
    assert "Stopped. 0 of 8" in generate_actions.progress_of(job.state, job.order)


def test_a_closed_tab_stops_its_drawing_and_frees_the_base(place: Studio, form: Form) -> None:
    states = studio_line.follow(studio_line.begin(place, "me", long_order(form, place)))
    next(states)
    states.close()  # type: ignore[attr-defined]
    wait_for(lambda: not place.line and not place.busy.locked())


def test_overlapping_orders_are_drawn_one_at_a_time_in_their_order(place: Studio, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, most, begun = [0], [0], []
    drawing = generate.drawing

    def watched(base: Any, request: Request, **more: Any) -> Iterator[Any]:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        begun.append(request.seed)
        try:
            yield from drawing(base, request, **more)
        finally:
            at_work[0] -= 1

    monkeypatch.setattr(generate, "drawing", watched)
    jobs = [
        studio_line.begin(place, f"session {seed}", generate_form.order_of(place, replace(form, seed=seed), f"{seed}"))
        for seed in range(20)
    ]
    places = [job.state.place for job in jobs[1:]]
    assert places == sorted(places, key=lambda one: -1 if one is None else one)
    for job in jobs:
        assert job.ended.wait(60)
    assert [job.problem for job in jobs] == [None] * 20
    assert (begun, most) == (list(range(20)), [1])
    assert all(len(job.state.with_lora) == 1 for job in jobs)


def test_who_waits_sees_the_place_and_can_leave(place: Studio, form: Form) -> None:
    first = studio_line.begin(place, "first", long_order(form, place))
    second = studio_line.begin(place, "second", long_order(form, place))
    third = studio_line.begin(place, "third", long_order(form, place))
    wait_for(lambda: first.state.done > 0)
    assert (second.state.place, third.state.place) == (1, 2)
    assert "Waiting in line: 2 before you" in generate_actions.progress_of(third.state, third.order)
    studio_line.stop(place, "second")
    wait_for(lambda: third.state.place == 1)
    assert (second.state.ended, second.state.steps) == ("stopped", 0)
    for session in ("first", "third"):
        studio_line.stop(place, session)
    wait_for(lambda: not place.line)


@pytest.fixture
def training(place: Studio) -> Iterator[Path]:
    """A run that is at work, as its lock says."""
    run = place.roots.runs / "cups"
    with run_lock.held(run):
        yield run
    (run / "pause").unlink(missing_ok=True)


def test_on_a_gpu_a_drawing_waits_for_a_training_run_until_it_pauses(
    place: Studio, form: Form, training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = generate_form.order_of(place, form, "me")
    studios.look_at_base(place, order.base)
    monkeypatch.setattr(devices, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(studio_line, "TRAINING_S", 0.1)
    job = studio_line.begin(place, "me", order)
    wait_for(lambda: job.state.training == "cups")
    assert "The run &#x27;cups&#x27; is training on this graphics card" in generate_actions.progress_of(job.state, order)
    assert not job.ended.wait(0.5)
    (training / "pause").touch()
    assert job.ended.wait(60)
    assert job.state.ended == "done"


def test_who_waits_for_a_training_run_can_leave(place: Studio, form: Form, training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "best_device", lambda: torch.device("cuda"))
    job = studio_line.begin(place, "me", generate_form.order_of(place, form, "me"))
    wait_for(lambda: job.state.training)
    studio_line.stop(place, "me")
    assert job.ended.wait(30)
    assert job.state.ended == "stopped"


def test_on_the_cpu_a_drawing_goes_on_beside_a_training_run_and_says_so(place: Studio, form: Form, training: Path) -> None:
    job = studio_line.begin(place, "me", generate_form.order_of(place, replace(form, steps=20), "me"))
    assert job.ended.wait(60)
    assert (job.state.ended, job.state.training) == ("done", "cups")
    middle = replace(job.state, ended="", done=1)
    assert "slower, because the run &#x27;cups&#x27; is training" in generate_actions.progress_of(middle, job.order)


def test_progress_says_which_picture_and_how_long() -> None:
    order = Order("mini", Request("a cup"), count=2, loras=(LoRA(Path("a.safetensors")),), beside=True)
    text = generate_actions.progress_of(Drawn(done=20, steps=80, elapsed_s=10.0, with_lora=((Path("x.png"), 0),)), order)
    assert "Drawing picture 2 of 4 · 30 s left" in text
    assert "width:25.0%" in text
    assert "그림 2/4 그리는 중" in generate_actions.progress_of(Drawn(steps=8, with_lora=((Path("x.png"), 0),)), order, "ko")


def test_a_sampler_that_asks_twice_per_step_ends_at_all_steps(place: Studio, form: Form) -> None:
    order = generate_form.order_of(place, replace(form, steps=3, sampler="Heun"), "me")
    *_, last = studio_line.draw(place, order, lambda: False)
    assert last.done == last.steps == 5


def test_a_long_drawing_shows_the_unfinished_picture_and_only_the_newest(
    place: Studio, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio_line, "PREVIEW_S", 0.0)
    order = generate_form.order_of(place, replace(form, steps=3), "me")
    states = list(studio_line.draw(place, order, lambda: False))
    looks = [state.preview for state in states if state.preview]
    assert len(looks) == 3
    assert looks[0].tobytes() != looks[-1].tobytes()
    assert states[-1].preview is None
    assert "data:image/jpeg;base64," in generate_actions.look_of(next(state for state in states if state.preview))["preview"]["value"]


# --- settings and history -----------------------------------------------------------------------------------------------------


def restored_form(place: Studio, path: Path, form: Form) -> Form:
    """The form after a picture was dropped on an empty one."""
    changes = generate_actions.restore(place, path)
    values = {name: change["value"] for name, change in changes.items() if name in {one.name for one in fields(Form)}}
    return replace(Form(token=form.token), **values)


def test_a_dropped_picture_restores_the_form_and_draws_itself_again(place: Studio, form: Form) -> None:
    asked = replace(
        form, prompt="a (red:1.3) star, BREAK [x]", loras=[row("calm", 0.6, text=-0.2), row("wild", 1, course="0.2@0, 1@0.5")], steps=4,
        seed=4294967295, guidance=2.7, sampler="DPM++ 2M SDE", schedule="Exponential", clip_skip=2, hires_scale=1.5, hires_denoise=0.55,
        size="48x32",
    )  # fmt: skip
    changes = press(place, asked)
    for which in ("with_lora", "without"):
        (path,) = drawn_files(changes, which)
        again = restored_form(place, path, form)
        assert (again.prompt, again.negative, again.seed, again.size) == (asked.prompt, asked.negative, asked.seed, asked.size)
        place.plain.clear()
        (second,) = drawn_files(press(place, replace(again, beside=False)), "with_lora")
        assert pixels(second) == pixels(path)
        assert gallery.text_of(second) == gallery.text_of(path)


def png(text: str, path: Path) -> Path:
    path.write_bytes(generate.png_bytes(Image.new("RGB", (8, 8)), text))
    return path


def test_a_picture_of_another_tool_restores_what_is_here_and_says_what_is_not(place: Studio, tmp_path: Path) -> None:
    text = (
        "a (cat:1.2) <lora:calm:0.8> <lora:lost:1>\nNegative prompt: grey\nSteps: 28, Sampler: DPM++ SDE, Schedule type: Karras, "
        "CFG scale: 6.5, Seed: 12, Size: 512x768, Model: <b>dream, Version: v1.10.1"
    )
    changes = generate_actions.restore(place, png(text, tmp_path / "x.png"))
    assert [changes[name]["value"] for name in ("prompt", "negative", "seed", "steps", "guidance", "size")] == [
        "a (cat:1.2)", "grey", 12, 28, 6.5, "512x768",
    ]  # fmt: skip
    (only,) = changes["loras"]["value"]["chosen"]
    assert (only["strength"], generate_cards.path_of(place.roots, only["lora"]).stem) == (0.8, "calm")
    for said in (
        "No LoRA is called &#x27;lost&#x27;",
        "Sampler &#x27;DPM++ SDE&#x27; is unknown",
        "base &#x27;&lt;b&gt;dream&#x27;, which is not",
    ):
        assert said in changes["status"]
    assert "base" not in changes


def test_a_plain_prompt_is_restored_as_one_that_says_the_same(place: Studio, tmp_path: Path) -> None:
    text = "saber (fate)\nSteps: 2, Sampler: Euler, CFG scale: 3, Seed: 1, Sdlora syntax: plain, Version: sdlora 0.1.0"
    changes = generate_actions.restore(place, png(text, tmp_path / "x.png"))
    assert changes["prompt"]["value"] == r"saber \(fate\)"


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"%PDF-1.4"])
def test_what_is_no_picture_gets_one_sentence(content: bytes, place: Studio, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a picture"):
        generate_actions.restore(place, tmp_path / "x.png")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="carries no settings"):
        generate_actions.restore(place, tmp_path / "x.png")


def test_everyone_sees_only_their_own_pictures_newest_first_after_a_restart_too(place: Studio, form: Form) -> None:
    mine = [drawn_files(press(place, replace(form, seed=seed)), "with_lora")[0] for seed in range(3)]
    other = replace(form, token="o" * 32, prompt="a secret")
    theirs = drawn_files(press(place, other), "with_lora")
    plain_again = drawn_files(press(place, replace(other, prompt=form.prompt, seed=0)), "with_lora")
    assert plain_again[0] not in mine
    again = Studio(place.roots)
    assert generate_actions.history(again, TOKEN, "new session", 1)[1] == [str(path) for path in reversed(mine)]
    assert generate_actions.history(again, "o" * 32, "x", 1)[1] == [str(path) for path in (*plain_again, *theirs)]
    for token in ("", None, "short", "p" * 32):
        assert generate_actions.history(again, token, "new session", 1)[1] == []
    assert TOKEN not in str(mine[0])


def test_the_history_has_pages(place: Studio) -> None:
    folder = place.roots.outputs / "drawn" / gallery.owner_of(TOKEN, "") / "2026-01-01"
    folder.mkdir(parents=True)
    for number in range(gallery.PAGE + 3):
        png("x", folder / f"{number:06d}-0-seed{number}-abcd.png")
    shown, listed, page, said = generate_actions.history(place, TOKEN, "", 2)
    assert ([path.rpartition("seed")[2] for path in listed], page, said) == (["2-abcd.png", "1-abcd.png", "0-abcd.png"], 2, "of 2")
    assert [caption for _, caption in shown["value"]] == ["2", "1", "0"]
    assert generate_actions.history(place, TOKEN, "", 99)[2] == 2
    assert generate_actions.history(place, TOKEN, "", "x")[2] == 1


def test_a_cell_of_a_sheet_becomes_the_form(place: Studio) -> None:
    key = generate_cards.found(place, "calm")["loras"][0]["key"]
    setting = {
        "base": "mini", "lora": key, "strength": 0.5, "prompt": "saber (fate)", "negative": "", "seed": 4, "steps": 9, "guidance": 2.0,
        "sampler": "Euler", "width_px": 48, "height_px": 32,
    }  # fmt: skip
    changes = generate_actions.take(place, setting)
    assert changes["prompt"]["value"] == r"saber \(fate\)"
    assert changes["size"]["value"] == "48x32"
    assert generate_cards.chosen(place, changes["loras"]["value"]) == [LoRA(place.roots.loras / "calm.safetensors", 0.5)]
    assert generate_actions.take(place, None) == {}


def test_tags_become_cards(place: Studio) -> None:
    rows, missed = generate_cards.rows_of(place, [Tag("calm", 0.5, 0.5), Tag("wild", 1.0, 0.2, ((0.0, 0.2), (0.5, 1.0))), Tag("gone")])
    assert [one["text"] for one in rows] == [None, 0.2]
    assert [one["course"] for one in rows] == ["", "0.2@0,1@0.5"]
    assert len(missed) == 1


# --- from programs ------------------------------------------------------------------------------------------------------------


def test_twenty_programs_at_once_are_all_answered(place: Studio, form: Form, tmp_path: Path) -> None:
    def ask(number: int) -> str:
        client = gradio_client.Client(address, verbose=False, download_files=str(tmp_path / f"got{number}"))
        answer = client.predict(
            prompt="a cup", loras=[row("wild", number / 10)], seed=number, steps=2, count=1, base=form.base, api_name="/generate"
        )
        return str(answer[0])

    with shelf.served(place.roots, place, generate_page) as demo:
        address = str(demo.local_url)
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(ask, range(20)))
        client = gradio_client.Client(address, verbose=False, download_files=str(tmp_path / "got"))
        assert client.predict(search="cal", base=form.base, api_name="/generate_loras")["loras"][0]["name"] == "calm"
        assert client.predict(token="", page=1, api_name="/generate_history")[0]["value"] == []
        assert "Nothing of yours" in client.predict(api_name="/generate_stop")
    assert [answer for answer in answers if "Done in" not in answer] == []
    texts = [gallery.text_of(path) for path in (place.roots.outputs / "drawn").rglob("*.png")]
    seeds = sorted(int(text.partition("Seed: ")[2].partition(",")[0]) for text in texts if "<lora:wild" in text)
    assert seeds == list(range(20))


def test_every_control_of_the_form_is_on_the_page() -> None:
    assert {one.name for one in fields(Form)} <= {one.name for one in fields(Parts)}


def test_on_a_gpu_a_training_gets_the_room_of_the_base_once_no_drawing_is_at_work(
    place: Studio, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    press(place, form)
    assert studios.make_room(place)
    assert place.base is not None  # on the CPU both go on side by side
    assert studios.is_free(place)
    monkeypatch.setattr(devices, "best_device", lambda: torch.device("cuda"))
    assert not studios.is_free(place)
    with place.busy:
        assert not studios.make_room(place)
    assert place.base is not None
    assert studios.make_room(place)
    assert place.base is None
    assert studios.is_free(place)
