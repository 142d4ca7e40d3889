"""The page as it is served: who may connect, what is never served, and drawing in a real browser."""

import re
import socket
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from sdlora.errors import UserError
from sdlora.ui import gallery, generate_page, page
from sdlora.ui.roots import Roots
from sdlora.ui.studio import Studio
from tests import shelf

# gradio counts its events with what pandas is about to drop
pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]
CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip
WEBGL = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]  # drawn by the processor, which makes every page slower
PATIENCE_MS = 240_000  # a machine with two busy cores needs it


@pytest.fixture(scope="module")
def place(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """A studio with LoRAs that fit and one that does not."""
    return Studio(shelf.make_roots(tiny_base, tmp_path_factory.mktemp("place")))


def test_only_this_computer_may_connect_without_a_password(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0\.0\.0\.0 lets other computers in"):
        page.launch(Roots(), host="0.0.0.0", port=free_port())
    for name in ("runs", "loras", "bases", "trash"):
        with pytest.raises(UserError, match="can be read from the page"):
            page.build(Roots(outputs=tmp_path, **{name: tmp_path / "inside"}))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="taken"):
            page.launch(Roots(*(tmp_path / one.name for one in fields(Roots)[:6])), port=taken.getsockname()[1], wait=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_a_password_is_asked_for_and_lora_files_are_never_served(place: Studio, tiny_base: Path) -> None:
    demo = page.launch(replace(place.roots, first=str(tiny_base)), port=free_port(), password="open sesame", wait=False)
    try:
        with httpx.Client(base_url=str(demo.local_url)) as browser:
            assert browser.get("/config").status_code == 401
            assert browser.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
            assert browser.post("/login", data={"username": "me", "password": "open sesame"}).status_code == 200
            assert browser.get("/config").status_code == 200
            (place.roots.outputs / "x.png").parent.mkdir(parents=True, exist_ok=True)
            (place.roots.outputs / "x.png").write_bytes(b"picture")
            assert browser.get(f"/gradio_api/file={place.roots.outputs / 'x.png'}").content == b"picture"
            assert browser.get(f"/gradio_api/file={place.roots.loras / 'calm.safetensors'}").status_code == 403
    finally:
        demo.close(verbose=False)


@pytest.fixture(scope="module")
def served(place: Studio) -> Iterator[gr.Blocks]:
    with shelf.served(place.roots, place, generate_page) as demo:
        yield demo


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.is_file():
        pytest.fail(f"{CHROMIUM} is missing: this test needs it (apt-get install chromium)")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS) as opened:
        yield opened


def visit(browser: Browser, demo: gr.Blocks, **options: Any) -> Page:
    """A new visitor's page, once the mini base is ready, with the tiny base chosen and a prompt's seed set."""
    browser_page = browser.new_context(viewport={"width": 1280, "height": 1000}, **options).new_page()
    browser_page.set_default_timeout(PATIENCE_MS)
    browser_page.goto(str(demo.local_url))
    return browser_page


def choose_tiny(browser_page: Page) -> None:
    expect(browser_page.locator("#status")).to_contain_text(re.compile("Ready|준비됐"), timeout=PATIENCE_MS)
    browser_page.locator("#more > button").first.click()
    browser_page.locator("#base input").click()
    browser_page.get_by_role("option", name="tiny").click()
    expect(browser_page.locator("#status")).to_contain_text("32 × 32", timeout=PATIENCE_MS)  # noqa: RUF001


def add_lora(browser_page: Page, name: str) -> None:
    browser_page.locator("#loras .add").click()
    browser_page.locator("#loras .search").fill(name)
    browser_page.locator("#loras .result", has_text=name).first.click()
    expect(browser_page.locator(f"#loras .card[data-lora={name}] .fit")).to_contain_text("match", timeout=PATIENCE_MS)


def pictures_on(browser_page: Page, which: str) -> list[bytes]:
    """The bytes behind each picture of a gallery, as the browser gets them."""
    sources = [image.get_attribute("src") for image in browser_page.locator(f"#{which} .grid-container img").all()]
    return [browser_page.request.get(str(source)).body() for source in sources]


def generate_at(browser_page: Page, strength: str) -> tuple[list[bytes], list[bytes]]:
    """Sets the strength, draws with Ctrl+Enter; the pictures with and without LoRA."""
    field = browser_page.locator("#loras .card[data-lora=wild] input[type=number]").first
    field.fill(strength)
    browser_page.locator("#prompt textarea").focus()
    browser_page.keyboard.press("Control+Enter")
    expect(browser_page.locator("#pictures-with")).to_contain_text(f"wild × {strength}", timeout=PATIENCE_MS)  # noqa: RUF001
    expect(browser_page.locator("#status")).to_contain_text("Done in", timeout=PATIENCE_MS)
    return pictures_on(browser_page, "pictures-with"), pictures_on(browser_page, "pictures-without")


def test_two_strengths_in_a_browser_give_two_pictures_beside_the_same_plain_one(served: gr.Blocks, browser: Browser) -> None:
    browser_page = visit(browser, served)
    asked_for: list[str] = []
    browser_page.on("request", lambda request: asked_for.append(request.url))
    choose_tiny(browser_page)
    add_lora(browser_page, "wild")
    full, plain = generate_at(browser_page, "1")
    half, same_plain = generate_at(browser_page, "0.5")
    assert len(full) == len(half) == len(plain) == 2
    assert not set(full) & set(half)
    assert not set(full) & set(plain)
    assert plain == same_plain
    assert all(content.startswith(b"\x89PNG") and re.search(rb"tEXtparameters\0a red star", content) for content in full)
    assert [url for url in asked_for if not url.startswith((str(served.local_url), "data:", "blob:"))] == []
    browser_page.context.close()


def test_trigger_words_go_into_the_prompt_and_a_lora_that_does_not_fit_says_why(served: gr.Blocks, browser: Browser) -> None:
    browser_page = visit(browser, served)
    choose_tiny(browser_page)
    add_lora(browser_page, "cups")
    browser_page.locator("#loras .chip", has_text="zup").click()
    assert browser_page.locator("#prompt textarea").input_value() == "a red star on a blue background, zup"
    add_lora(browser_page, "foreign")
    expect(browser_page.locator("#loras .card[data-lora=foreign] .why")).to_contain_text("none of its 1 modules is there")
    browser_page.locator("#loras .card[data-lora=foreign] input[type=checkbox]").uncheck()
    browser_page.locator("#loras .card[data-lora=cups] .away").click()
    assert browser_page.locator("#loras .card").count() == 1
    browser_page.locator("#generate").click()
    expect(browser_page.locator("#status")).to_contain_text("Done in", timeout=PATIENCE_MS)
    expect(browser_page.locator("#pictures-with")).to_contain_text("Without LoRA")
    browser_page.context.close()


def test_after_a_reload_the_pictures_are_there_for_this_browser_alone_and_give_their_settings_back(
    served: gr.Blocks, browser: Browser, tmp_path: Path
) -> None:
    browser_page = visit(browser, served)
    choose_tiny(browser_page)
    browser_page.locator("#prompt textarea").fill("a (red:1.3) <lora:calm:0.7> cup")
    browser_page.locator("#seed input").fill("77")
    browser_page.locator("#generate").click()
    expect(browser_page.locator("#status")).to_contain_text("Done in", timeout=PATIENCE_MS)
    browser_page.reload()
    expect(browser_page.locator("#status")).to_contain_text("Ready", timeout=PATIENCE_MS)
    browser_page.locator("#generate-history > button").first.click()
    browser_page.locator("#history .grid-container button").last.click()
    expect(browser_page.locator("#history-text textarea")).to_have_value(
        re.compile(r"a \(red:1\.3\) cup <lora:calm:0\.7>\nSteps: 20.*Seed: 77,")
    )
    saved = tmp_path / "saved.png"
    saved.write_bytes(browser_page.request.get(str(browser_page.locator("#history img").last.get_attribute("src"))).body())
    assert "Seed: 77" in gallery.text_of(saved)
    browser_page.locator("#history-use").click()
    expect(browser_page.locator("#seed input")).to_have_value("77")
    expect(browser_page.locator("#prompt textarea")).to_have_value("a (red:1.3) cup")
    expect(browser_page.locator("#loras .card[data-lora=calm] input[type=number]").first).to_have_value("0.7")
    browser_page.context.close()

    other = visit(browser, served, locale="ko")
    expect(other.locator("#status")).to_contain_text("준비됐습니다", timeout=PATIENCE_MS)
    expect(other.locator("#generate")).to_have_text("생성")
    other.locator("#generate-history > button").first.click()
    other.locator("#generate-from > button").first.click()
    expect(other.locator("#history-pages")).to_contain_text("/ 1")
    assert other.locator("#history img").count() == 0
    other.locator("#generate-restore input[type=file]").set_input_files(saved)
    expect(other.locator("#seed input")).to_have_value("77")
    expect(other.locator("#loras .card[data-lora=calm]")).to_be_visible()
    other.context.close()


def test_escape_cancels_and_a_closed_tab_frees_the_base(served: gr.Blocks, browser: Browser, place: Studio) -> None:
    browser_page = visit(browser, served)
    choose_tiny(browser_page)
    browser_page.locator("#steps input[type=number]").fill("150")
    browser_page.locator("#count input[type=number]").fill("8")
    browser_page.locator("#prompt textarea").focus()
    browser_page.keyboard.press("Control+Enter")
    expect(browser_page.locator("#stop")).to_be_enabled(timeout=PATIENCE_MS)
    expect(browser_page.locator("#status")).to_contain_text("Drawing picture", timeout=PATIENCE_MS)
    browser_page.keyboard.press("Escape")
    expect(browser_page.locator("#status")).to_contain_text("Stopped", timeout=PATIENCE_MS)
    browser_page.locator("#generate").click()
    expect(browser_page.locator("#status")).to_contain_text("Drawing picture", timeout=PATIENCE_MS)
    assert place.line
    browser_page.context.close()
    until = time.monotonic() + 30
    while place.line or place.busy.locked():
        assert time.monotonic() < until, "the drawing goes on though its tab is closed"
        time.sleep(0.1)


def test_a_painted_picture_is_the_mask_in_a_browser_too(served: gr.Blocks, browser: Browser, tmp_path: Path) -> None:
    Image.new("RGB", (256, 256), (0, 160, 0)).save(tmp_path / "green.png")
    drawing = browser.browser_type.launch(executable_path=CHROMIUM, args=[*CHROMIUM_OPTIONS[:1], *WEBGL, *CHROMIUM_OPTIONS[2:]])
    browser_page = visit(drawing, served)
    for wait_ms in (2_500, 5_000, 10_000, 20_000):  # gradio's editor passes over a picture that comes before it is ready
        browser_page.reload()
        colours = painted_over(browser_page, tmp_path / "green.png", wait_ms)
        if (0, 160, 0) in colours:
            break
    assert 512 < colours[0, 160, 0] < 1024
    assert len(colours) > 4
    drawing.close()


def painted_over(browser_page: Page, picture: Path, wait_ms: int) -> dict[Any, int]:
    """Gives the editor a picture, paints its middle, and draws: how often each colour is there then."""
    choose_tiny(browser_page)
    browser_page.locator("#generate-begin > button").first.click()
    canvas = browser_page.locator("#generate-picture canvas").first
    expect(canvas).to_be_visible(timeout=PATIENCE_MS)
    browser_page.wait_for_timeout(wait_ms)
    browser_page.locator("#generate-picture input[type=file]").first.set_input_files(picture)
    browser_page.wait_for_timeout(wait_ms)
    browser_page.locator("#generate-picture button[aria-label=Brush], #generate-picture button[title=Brush]").first.click()
    browser_page.wait_for_timeout(1000)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    browser_page.mouse.move(*middle)
    browser_page.mouse.down()
    browser_page.mouse.move(middle[0] + 20, middle[1] + 10, steps=5)
    browser_page.mouse.up()
    browser_page.wait_for_timeout(1000)
    browser_page.locator("#generate").click()
    expect(browser_page.locator("#status")).to_contain_text(re.compile("Done in|nothing but white"), timeout=PATIENCE_MS)
    if "white" in browser_page.locator("#status").inner_text():
        return {}
    drawn = picture.with_name("drawn.png")
    drawn.write_bytes(pictures_on(browser_page, "pictures-with")[0])
    with Image.open(drawn) as image:
        return {colour: count for count, colour in image.convert("RGB").getcolors(4096) or []}


def test_on_a_phone_nothing_sticks_out(served: gr.Blocks, browser: Browser) -> None:
    browser_page = browser.new_context(viewport={"width": 390, "height": 800}).new_page()
    browser_page.goto(str(served.local_url))
    expect(browser_page.locator("#status")).to_contain_text("Ready", timeout=PATIENCE_MS)
    for fold in ("more", "generate-begin", "generate-hires", "generate-from", "generate-history"):
        browser_page.locator(f"#{fold} > button").first.click()
    add_lora(browser_page, "wild")
    assert browser_page.evaluate("document.documentElement.scrollWidth") <= 390
    browser_page.context.close()
