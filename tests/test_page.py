"""The page: what its presses do, called directly, and once in a real browser."""

import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from sdlora import base_files, base_model, files, generate, lora, lora_file
from sdlora.deltas import LowRank, Update
from sdlora.errors import UserError
from sdlora.generate import LoRA, Request
from sdlora.ui import generate_actions, page, studio
from sdlora.ui.studio import Drawn, Order, Studio

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 120_000  # a machine with two busy cores needs it
REQUEST = Request("a red star on a blue background", seed=3, steps=2, guidance=3.0)


def write_lora(base: Path, path: Path, *, seed: int) -> None:
    """A LoRA with random weights over the UNet's attention."""
    opened, generator = base_files.load(str(base), device=torch.device("cpu"), dtype=torch.float32), torch.Generator().manual_seed(seed)
    modules = {}
    for stem, (part, name) in base_model.stems(opened).items():
        if part == "unet" and "attn" in name:
            rows, columns = lora.base_weight(opened.parts[part].get_submodule(name)).shape
            modules[stem] = Update(LowRank(torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator), 0.5))
    files.write(path, lora_file.to_bytes(modules, {}, family="sd1"))


@pytest.fixture
def place(tiny_base: Path, tmp_path: Path) -> Studio:
    """A studio with two LoRAs that fit and one that does not."""
    write_lora(tiny_base, tmp_path / "loras/run/wild.safetensors", seed=0)
    write_lora(tiny_base, tmp_path / "loras/calm.safetensors", seed=1)
    foreign = {"lora_unet_down_blocks_7_attentions_0_proj_in": Update(LowRank(torch.zeros(2, 5), torch.zeros(5, 2), 2.0))}
    files.write(tmp_path / "loras/<b>foreign.safetensors", lora_file.to_bytes(foreign, {}, family="sd1"))
    return Studio(tmp_path / "loras", tmp_path / "outputs")


def key_of(place: Studio, name: str) -> str:
    return next(key for key, shown in studio.lora_names(place).items() if shown == name)


def controls(folder: Path, /, *slots: Any, **changed: Any) -> list[Any]:
    """Values of all controls in the handler's order."""
    plain = {"prompt": REQUEST.prompt, "negative": "a cup", "seed": 3, "count": 1, "steps": 2, "guidance": 3.0, "sampler": "DPM++ 2M"}
    values = plain | {"size": generate_actions.OWN_SIZE, "base": str(folder), "beside": True} | changed
    return [*values.values(), *slots]


def press(place: Studio, *values: Any) -> dict[str, Any]:
    """All changes of one press of Generate, later ones over earlier ones."""
    final: dict[str, Any] = {}
    for changes in generate_actions.generate_pictures(place, "me", *values):
        final |= changes
    return final


def drawn_files(changes: dict[str, Any], row: str) -> list[Path]:
    return [Path(path) for path, _ in changes[row]["value"]]


def test_loras_are_listed_by_name_and_found_by_id_only_inside_the_folder(place: Studio, tmp_path: Path) -> None:
    assert list(studio.lora_names(place).values()) == ["<b>foreign", "calm", "wild"]
    assert studio.lora_path(place, key_of(place, "wild")) == (tmp_path / "loras/run/wild.safetensors").resolve()
    (tmp_path / "loras/again").mkdir()
    shutil.copy(tmp_path / "loras/calm.safetensors", tmp_path / "loras/again/calm.safetensors")
    shutil.copy(tmp_path / "loras/calm.safetensors", tmp_path / "secret.safetensors")
    (tmp_path / "loras/link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    assert list(studio.lora_names(place).values()) == ["<b>foreign", "again/calm", "calm", "wild"]
    for key in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "link"):
        with pytest.raises(UserError, match="no longer in"):
            studio.lora_path(place, key)
    assert studio.lora_names(Studio(tmp_path / "nowhere", tmp_path)) == {}


def test_a_changed_strength_draws_anew_beside_the_same_plain_picture_and_loads_nothing(
    place: Studio, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = key_of(place, "wild")
    first = press(place, *controls(tiny_base, wild, 1.0, count=2))
    monkeypatch.setattr(base_files, "load", lambda *_, **__: pytest.fail("base loaded again"))
    monkeypatch.setattr(lora_file, "read", lambda path: pytest.fail("LoRA read again"))
    second = press(place, *controls(tiny_base, wild, -0.5, count=2))
    assert len(drawn_files(first, "with_lora")) == len(drawn_files(first, "without")) == 2
    for one, other in zip(drawn_files(first, "with_lora"), drawn_files(second, "with_lora"), strict=True):
        assert Image.open(one).tobytes() != Image.open(other).tobytes()
    assert drawn_files(first, "without") == drawn_files(second, "without")
    plain = press(place, *controls(tiny_base, "", 1.0, count=2))
    assert drawn_files(plain, "with_lora") == drawn_files(first, "without")
    assert plain["with_lora"]["label"] == "Without LoRA"
    assert not plain["without"]["visible"]


def test_the_picture_is_the_one_that_generate_draws_and_keeps_its_settings(place: Studio, tiny_base: Path) -> None:
    changes = press(place, *controls(tiny_base, key_of(place, "wild"), key_of(place, "calm"), 0.8, 0.3, beside=False))
    base = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    generate.set_loras(base, [LoRA(place.loras / "run/wild.safetensors", 0.8), LoRA(place.loras / "calm.safetensors", 0.3)])
    ((_, expected),) = generate.pictures(base, Request(REQUEST.prompt, "a cup", 3, 2, 3.0))
    (path,) = drawn_files(changes, "with_lora")
    with Image.open(path) as image:
        assert image.tobytes() == expected.tobytes()
        assert image.info["parameters"].startswith(
            "a red star on a blue background <lora:wild:0.8> <lora:calm:0.3>\nNegative prompt: a cup\n"
        )
    assert path.is_relative_to(place.outputs)
    assert "Done in" in changes["status"]
    assert changes["go"]["interactive"]
    assert not changes["stop"]["interactive"]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"seed": None}, "The seed is empty"),
        ({"seed": -1}, "Seed -1 is out of range"),
        ({"size": "big"}, "Size &#x27;big&#x27; is not understood"),
        ({"size": "31x32"}, "multiples of 2 px"),
        ({"size": "99999x32"}, "too large"),
        ({"sampler": "Eular"}, "&#x27;Eular&#x27; is unknown"),
        ({"base": ""}, "base model is empty"),
        ({"base": "/<script>"}, "Base &#x27;/&lt;script&gt;&#x27; is unknown"),
    ],
)
def test_bad_input_is_one_escaped_sentence(place: Studio, tiny_base: Path, changed: dict[str, Any], sentence: str) -> None:
    changes = press(place, *controls(tiny_base, "", 1.0, **changed))
    assert sentence in changes["status"]
    assert "bad" in changes["status"]
    assert changes["go"]["interactive"]
    assert not place.busy.locked()


def test_a_lora_that_does_not_fit_is_offered_and_says_why(place: Studio, tiny_base: Path) -> None:
    foreign, wild = key_of(place, "<b>foreign"), key_of(place, "wild")
    said = generate_actions.check_loras(place, str(tiny_base), foreign, "")
    assert "&lt;b&gt;foreign.safetensors does not fit base" in said
    assert "wild: 56 of 56 modules match" in generate_actions.check_loras(place, str(tiny_base), wild, "")
    assert "does not fit base" in press(place, *controls(tiny_base, foreign, 1.0))["status"]
    assert "chosen twice" in press(place, *controls(tiny_base, wild, wild, 1.0, 0.5))["status"]
    assert "no longer in" in press(place, *controls(tiny_base, "gone", 1.0))["status"]
    assert "Done" in press(place, *controls(tiny_base, wild, 1.0))["status"]


def test_a_file_trained_anew_speaks_with_its_new_voice(place: Studio, tiny_base: Path) -> None:
    key, path = key_of(place, "wild"), place.loras / "run/wild.safetensors"
    old = drawn_files(press(place, *controls(tiny_base, key, 1.0)), "with_lora")[0]
    write_lora(tiny_base, path, seed=9)
    new = drawn_files(press(place, *controls(tiny_base, key, 1.0)), "with_lora")[0]
    assert Image.open(old).tobytes() != Image.open(new).tobytes()


def test_stop_ends_the_job_after_its_step(place: Studio, tiny_base: Path) -> None:
    order = Order(str(tiny_base), Request("a cup", steps=1000), count=8)
    states = studio.run(place, "me", order)
    assert not next(states).ended
    studio.stop(place, "somebody else")
    studio.stop(place, "me")
    *_, last = states
    assert last.ended == "stopped"
    assert last.done < last.steps == 8000
    assert place.stops == {}
    assert "Stopped. 0 of 8" in generate_actions.progress_of(last, order)


def test_a_closed_tab_stops_its_job_and_frees_the_base(place: Studio, tiny_base: Path) -> None:
    states = studio.run(place, "me", Order(str(tiny_base), Request("a cup", steps=1000), count=8))
    next(states)
    states.close()
    assert place.busy.acquire(timeout=30)
    place.busy.release()


def test_progress_says_which_picture_and_how_long() -> None:
    order = Order("mini", Request("a cup"), count=2, loras=(LoRA(Path("a.safetensors")),), beside=True)
    text = generate_actions.progress_of(Drawn(done=20, steps=80, elapsed_s=10.0, with_lora=((Path("x.png"), 0),)), order)
    assert "Drawing picture 2 of 4 · 30 s left" in text
    assert "width:25.0%" in text


def test_a_sampler_that_asks_twice_per_step_ends_at_all_steps(place: Studio, tiny_base: Path) -> None:
    *_, last = studio.draw(place, Order(str(tiny_base), Request("a cup", steps=3, sampler="Heun"), count=1), threading.Event())
    assert last.done == last.steps == 5


def test_chosen_loras_show_their_strengths_and_the_next_slot() -> None:
    changes = generate_actions.choose_loras("a", "", "", "")
    assert [change["visible"] for change in changes] == [True, True, False, False, True, False, False, False, True]
    assert [change["visible"] for change in generate_actions.choose_loras("", "", "", "")] == [True] + [False] * 8


def test_looking_again_finds_new_files_and_keeps_what_is_chosen(place: Studio) -> None:
    calm = key_of(place, "calm")
    (place.loras / "run/wild.safetensors").unlink()
    first, second, said = generate_actions.look_again(place, calm, "gone")
    assert [shown for shown, _ in first["choices"]] == ["none", "<b>foreign", "calm"]
    assert (first["value"], second["value"]) == (calm, "")
    assert said.count("2 LoRA files") == 1


def test_only_this_computer_may_connect_without_a_password(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0\.0\.0\.0 lets other computers in"):
        page.launch(host="0.0.0.0", port=free_port(), loras=tmp_path / "loras", outputs=tmp_path / "outputs")
    with pytest.raises(UserError, match="can be read from the page"):
        page.build(loras=tmp_path / "outputs/loras", outputs=tmp_path / "outputs")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="taken"):
            page.launch(port=taken.getsockname()[1], loras=tmp_path / "loras", outputs=tmp_path / "outputs", wait=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def served(place: Studio, tiny_base: Path) -> Iterator[gr.Blocks]:
    demo = page.launch(port=free_port(), loras=place.loras, outputs=place.outputs, base=str(tiny_base), wait=False)
    yield demo
    demo.close(verbose=False)


def test_a_password_is_asked_for_and_lora_files_are_never_served(place: Studio, tiny_base: Path) -> None:
    options: dict[str, Any] = {"loras": place.loras, "outputs": place.outputs, "base": str(tiny_base), "wait": False}
    demo = page.launch(port=free_port(), password="open sesame", **options)
    try:
        with httpx.Client(base_url=str(demo.local_url)) as browser:
            assert browser.get("/config").status_code == 401
            assert browser.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
            assert browser.post("/login", data={"username": "me", "password": "open sesame"}).status_code == 200
            assert browser.get("/config").status_code == 200
            (place.outputs / "x.png").parent.mkdir(parents=True, exist_ok=True)
            (place.outputs / "x.png").write_bytes(b"picture")
            assert browser.get(f"/gradio_api/file={place.outputs / 'x.png'}").content == b"picture"
            assert browser.get(f"/gradio_api/file={place.loras / 'calm.safetensors'}").status_code == 403
    finally:
        demo.close(verbose=False)


def pictures_on(browser_page: Page, gallery: str) -> list[bytes]:
    """The bytes behind each picture of a gallery, as the browser gets them."""
    sources = [image.get_attribute("src") for image in browser_page.locator(f"#{gallery} .grid-container img").all()]
    return [browser_page.request.get(str(source)).body() for source in sources]


def generate_at(browser_page: Page, strength: str) -> tuple[list[bytes], list[bytes]]:
    """Sets the strength, presses Generate; the pictures with and without LoRA."""
    browser_page.locator("#strength-0 input[type=number]").fill(strength)
    browser_page.locator("#strength-0 input[type=number]").press("Tab")
    browser_page.locator("#generate").click()
    expect(browser_page.locator("#pictures-with")).to_contain_text(f"wild × {strength}", timeout=PATIENCE_MS)  # noqa: RUF001
    expect(browser_page.locator("#status")).to_contain_text("Done in", timeout=PATIENCE_MS)
    return pictures_on(browser_page, "pictures-with"), pictures_on(browser_page, "pictures-without")


def test_two_strengths_in_a_browser_give_two_pictures_beside_the_same_plain_one(served: gr.Blocks) -> None:
    if not CHROMIUM.is_file():
        pytest.fail(f"{CHROMIUM} is missing: this test needs it (apt-get install chromium)")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS) as browser:
        browser_page = browser.new_page(viewport={"width": 1400, "height": 1000})
        browser_page.set_default_timeout(PATIENCE_MS)
        asked_for: list[str] = []
        browser_page.on("request", lambda request: asked_for.append(request.url))
        browser_page.goto(str(served.local_url))
        expect(browser_page.locator("#status")).to_contain_text("Ready", timeout=PATIENCE_MS)
        browser_page.locator("#lora-0 input").click()
        browser_page.get_by_role("option", name="wild").click()
        expect(browser_page.locator("#status")).to_contain_text("wild: 56 of 56 modules match", timeout=PATIENCE_MS)
        full, plain = generate_at(browser_page, "1")
        half, same_plain = generate_at(browser_page, "0.5")
    assert len(full) == len(half) == len(plain) == 2
    assert not set(full) & set(half)
    assert not set(full) & set(plain)
    assert plain == same_plain
    assert all(content.startswith(b"\x89PNG") and re.search(rb"tEXtparameters\0a red star", content) for content in full)
    assert [url for url in asked_for if not url.startswith((str(served.local_url), "data:", "blob:"))] == []
