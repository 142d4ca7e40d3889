"""The whole page in a real browser, as somebody new uses it: from pictures to a pair with and without; readable for everybody."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import axe_playwright_python
import gradio as gr
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from sdlora.errors import UserError
from sdlora.ui import page, watch_buttons
from sdlora.ui.roots import Roots
from tests.shelf import free_port, make_roots
from tests.test_page import CHROMIUM, CHROMIUM_OPTIONS, PATIENCE_MS

pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),  # gradio counts its events with pandas
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]
AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
TABS = ("Train", "Generate", "Compare", "Library")
SETTINGS = "steps = 4\nbatch = 2\nsave_every = 2\nsample_every = 4\nvalidation.every = 0\nlora.rank = 2\n"


@pytest.fixture(scope="module")
def demo(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[gr.Blocks]:
    """The page as it is served, with nothing in its folders but a base."""
    place = tmp_path_factory.mktemp("whole")
    roots = Roots(*(place / name for name in ("runs", "loras", "data", "bases", "outputs", "trash")), str(tiny_base))
    with on_page(roots) as served:
        yield served


@contextmanager
def on_page(roots: Roots) -> Iterator[gr.Blocks]:
    """The page over some roots, listening on a free port of this computer."""
    served = page.launch(roots, port=free_port(), wait=False)
    try:
        yield served
    finally:
        served.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_OPTIONS)
        yield found
        found.close()


def opened(browser: Browser, demo: gr.Blocks, **looks: Any) -> Page:
    tab = browser.new_context(viewport={"width": looks.get("width", 1280), "height": 900}, color_scheme=looks.get("scheme")).new_page()
    tab.set_default_timeout(PATIENCE_MS)
    tab.goto(str(demo.local_url) + ("?__theme=dark" if looks.get("scheme") == "dark" else ""))
    expect(tab.locator("#train-go")).to_be_visible(timeout=PATIENCE_MS)
    return tab


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_no_page_has_a_serious_barrier(browser: Browser, demo: gr.Blocks, width: int, scheme: str) -> None:
    tab = opened(browser, demo, width=width, scheme=scheme)
    tab.evaluate(AXE.read_text(encoding="utf-8"))
    for name in TABS:
        tab.get_by_role("tab", name=name, exact=True).first.click()
        tab.wait_for_timeout(1000)
        found = tab.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        serious = [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")]
        assert serious == [], name
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than the screen"
    tab.context.close()


def test_five_actions_lead_from_pictures_to_a_pair_with_and_without(browser: Browser, demo: gr.Blocks, pictures: Path) -> None:
    tab = opened(browser, demo)
    problems: list[str] = []
    tab.on("pageerror", lambda problem: problems.append(str(problem)))
    given = [str(path) for path in sorted(pictures.iterdir())]
    tab.set_input_files("#train-drop input[type=file]", given)  # 1
    expect(tab.locator("#train-cards .card")).to_have_count(5, timeout=PATIENCE_MS)
    tab.locator("#train-name input, #train-name textarea").first.fill("first")  # 2
    tab.locator("#train-trigger input, #train-trigger textarea").first.fill("vitrail")  # 3
    tab.get_by_text("All settings").click()  # a test has no minutes: four steps of a tiny model; a user leaves this alone
    expect(tab.locator("#train-text .cm-content")).to_contain_text("vitrail", timeout=PATIENCE_MS)
    tab.locator("#train-text .cm-content").click()
    tab.keyboard.press("Control+A")
    tab.keyboard.insert_text(SETTINGS)
    tab.locator("#train-go").click()  # 4
    expect(tab.locator("#watch-head")).to_contain_text("first", timeout=PATIENCE_MS)
    expect(tab.locator("#watch-use")).to_be_visible(timeout=PATIENCE_MS)
    pairs = tab.locator("#watch-pictures img")
    expect(pairs.nth(1)).to_be_visible(timeout=PATIENCE_MS)  # one without the LoRA and one with it
    tab.locator("#watch-report").click()
    expect(tab.frame_locator("#watch-paper iframe").locator("h1")).to_contain_text("first", timeout=PATIENCE_MS)
    expect(tab.locator("#watch-file")).to_be_visible()
    tab.locator("#watch-use").click()  # 5
    expect(tab.locator("#generate")).to_be_visible(timeout=PATIENCE_MS)
    tab.locator("#generate").click()
    expect(tab.locator("#status .message.good")).to_be_visible(timeout=PATIENCE_MS)
    assert problems == []
    tab.context.close()


def test_a_refused_jump_to_generate_does_not_spoil_the_next_one(
    browser: Browser, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise UserError("not now")

    with on_page(make_roots(tiny_base, tmp_path)) as demo:
        tab = opened(browser, demo)
        tab.locator("#watch-job input").click()
        tab.get_by_role("option", name="cups", exact=True).click()
        with monkeypatch.context() as patch:
            patch.setattr(watch_buttons, "setting_of", refuse)
            tab.locator("#watch-use").click()
            expect(tab.locator("#watch-status")).to_contain_text("not now")
        tab.locator("#watch-use").click()
        expect(tab.locator("#loras .card .name")).to_have_text("cups", timeout=PATIENCE_MS)
        tab.locator("#loras .add").click()
        expect(tab.locator("#loras .result").first).to_be_visible()
        tab.context.close()
