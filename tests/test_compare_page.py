"""The page of sheets: what its presses do, called directly, over HTTP by two clients, and once in a browser."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from sdlora import chosen, compare, files, generate, run_folder, sheets
from sdlora.errors import UserError
from sdlora.ui import compare_actions as actions
from sdlora.ui import compare_cells as cells
from sdlora.ui import compare_page, compare_prompts, lora_shelf, side_work
from sdlora.ui.roots import Roots
from sdlora.ui.side_work import Desk
from sdlora.ui.studio import Studio
from tests.shelf import make_roots, make_studio, served
from tests.test_page import CHROMIUM, CHROMIUM_OPTIONS

PATIENCE_MS = 120_000
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")  # gradio counts its calls with pandas


@pytest.fixture(scope="module")
def roots(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Roots:
    return make_roots(tiny_base, tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def studio(roots: Roots) -> Studio:
    return make_studio(roots)


def key_of(roots: Roots, name: str) -> str:
    return next(key for key, path in lora_shelf.paths(roots).items() if path.stem == name)


def base_of(roots: Roots) -> str:
    return next(key for shown, key in lora_shelf.bases_of(roots) if shown == "tiny")


def controls(roots: Roots, **changed: Any) -> list[Any]:
    """Values of all controls in the handler's order."""
    plain = {"base": base_of(roots), "loras": [key_of(roots, "wild")], "strengths": "0.5, 1", "prompts": "a cup\n\n a red star \n"}
    more = {"rows": "prompt", "negative": "", "seed": 3, "steps": 2, "guidance": 3.0, "sampler": "Euler", "side": 0}
    return list((plain | more | changed).values())


def press(roots: Roots, studio: Studio, desk: Desk | None = None, session: str = "me", **changed: Any) -> list[dict[str, Any]]:
    return list(actions.draw_sheet(roots, studio, desk or Desk(), session, "en", *controls(roots, **changed)))


def together(changes: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for one in changes for name, value in one.items()}


@pytest.fixture(scope="module")
def drawn(roots: Roots, studio: Studio) -> list[dict[str, Any]]:
    """The changes of one press with the run's checkpoints, two strengths and two prompts."""
    _, keys = cells.checkpoints_of(roots, next(key for _, key in lora_shelf.runs_of(roots)))
    return press(roots, studio, loras=keys)


def test_a_sheet_fills_in_and_ends_as_a_png_whose_cells_are_the_pictures(drawn: list[dict[str, Any]], roots: Roots) -> None:
    final = together(drawn)
    path, shown = Path(final["sheet"]["value"]), final["shown"]
    assert path.is_relative_to(roots.outputs.resolve())
    assert re.fullmatch(r"sheet-\d{6}-[0-9a-f]{16}\.png", path.name)
    assert "Done: 14 pictures" in final["status"]
    assert any("of 14 pictures" in one["status"] for one in drawn[:-1])
    assert final["cell"]["choices"][0] == ("a cup · no LoRA", "0-0")
    assert len(final["cell"]["choices"]) == 14
    frame = sheets.frame(shown.order.sheet, shown.size_px)
    with Image.open(path) as png:
        cell = {at: png.crop((*frame.corner(*at), frame.corner(*at)[0] + frame.width, frame.corner(*at)[1] + frame.height)) for at in
                ((0, 0), (0, 1), (0, 2), (1, 0), (1, 6))}  # fmt: skip
    assert len({one.tobytes() for one in cell.values()}) == 5
    assert final["go"]["interactive"]
    assert not final["stop"]["interactive"]


def test_while_it_draws_the_picture_is_there_with_its_empty_cells(roots: Roots, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "LIVE_S", 0.0)
    lives = [one["sheet"]["value"] for one in press(roots, studio, steps=4) if "sheet" in one]
    greys = [sum(count for count, colour in (image.getcolors(1 << 24) or []) if colour == compare.EMPTY) for image in lives[:-1]]
    assert len(greys) >= 2
    assert greys == sorted(greys, reverse=True)
    assert greys[0] > 0


def test_runs_checkpoints_and_results_are_called_by_run_and_step(roots: Roots) -> None:
    name, keys = cells.checkpoints_of(roots, next(key for _, key in lora_shelf.runs_of(roots)))
    voices = [cells.voice_of(lora_shelf.paths(roots)[key]) for key in keys]
    assert (name, [(one.name, one.step) for one in voices]) == ("cups", [("cups", 10), ("cups", 20), ("cups", 30)])
    assert cells.voice_of(roots.loras / "calm.safetensors").step is None
    with pytest.raises(UserError, match="That run is not there"):
        cells.checkpoints_of(roots, "../runs/cups")


def test_prompts_are_proposed_with_the_trigger_word_or_as_the_run_has_drawn_them(tiny_base: Path, tmp_path: Path) -> None:
    roots = make_roots(tiny_base, tmp_path)
    run, keys = roots.runs / "cups", {path.stem: key for key, path in lora_shelf.paths(roots).items()}

    def lines(*names: str) -> list[str]:
        return compare_prompts.proposed(roots, [keys[name] for name in names]).splitlines()

    red, teal = compare_prompts.PLAIN
    assert lines() == lines("calm") == lines("torn", "foreign") == [red, teal], "nothing is known of these"
    assert lines("cups", "cups-000010", "cups-000020") == [f"zup, {red}", f"zup, {teal}"]
    files.write(roots.loras / "calm.json", b'{"activation text": "kalm,\\n soft"}')
    assert lines("cups", "calm") == [f"zup, {red}", f"kalm, soft, {red}", f"zup, {teal}", f"kalm, soft, {teal}"], "they take turns"
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("style", "character"))
    assert lines("cups") == ["zup on a blue background", "zup on an orange background"]
    for step, number, words in ((10, 0, "old"), (20, 0, "zup, a cup\nof tea"), (20, 1, "zup, a mug")):
        png = generate.png_bytes(Image.new("RGB", (8, 8)), f"{words}\nSteps: 20, Seed: 1")
        files.write(run_folder.sample_path(run, step, number), png)
    assert lines("cups-000010") == ["zup, a cup of tea", "zup, a mug"]
    (run / "config.toml").write_text(config + f'sample_prompts = ["one", " ", 3, "two", "three", "four", "five", "{"long " * 900}"]\n')
    assert lines("cups") == ["one", "two", "three", "four"]
    for odd in (None, "x", [None, 3, "../x", {}], {"a": 1}):
        assert compare_prompts.proposed(roots, odd) == f"{red}\n{teal}"


def test_a_cell_is_a_setting_and_marks_the_runs_best(drawn: list[dict[str, Any]], roots: Roots) -> None:
    shown = together(drawn)["shown"]
    frame = sheets.frame(shown.order.sheet, shown.size_px)
    left, top = frame.corner(1, 4)
    assert cells.cell_at(shown, left + 5, top + 5) == "1-4"
    assert cells.cell_at(shown, 1, 1) is cells.cell_at(None, left, top) is None
    setting = cells.setting_of(shown, "1-4")
    assert lora_shelf.paths(roots)[setting.pop("lora")].stem == "cups-000020"
    assert setting == {
        "base": base_of(roots), "strength": 1.0, "prompt": "a red star", "negative": "", "seed": 3, "steps": 2, "guidance": 3.0,
        "sampler": "Euler", "width_px": None, "height_px": None,
    }  # fmt: skip
    assert cells.setting_of(shown, "0-0")["lora"] == ""
    before = chosen.read(roots.runs / "cups")
    assert "Step 20 at strength 1 is now marked" in cells.mark_best(roots, shown, "1-4", "en")
    assert (before, chosen.read(roots.runs / "cups")) == (None, chosen.Chosen(20, 1.0))
    with pytest.raises(UserError, match="the base's own"):
        cells.mark_best(roots, shown, "0-0", "en")


@pytest.mark.parametrize("key", [None, "", "9-0", "0-99", "-1-0", "0-0\n", "../x", ["0-0"], 3])
def test_any_other_word_is_no_cell(drawn: list[dict[str, Any]], key: Any) -> None:
    shown = together(drawn)["shown"]
    for state in (shown, None):
        with pytest.raises(UserError, match=r"No picture is chosen|has no cell"):
            cells.cell_of(state, key)


def test_a_lora_that_no_run_made_cannot_be_a_runs_best(roots: Roots, studio: Studio) -> None:
    shown = together(press(roots, studio))["shown"]
    with pytest.raises(UserError, match=r"wild\.safetensors is not a checkpoint of a run"):
        cells.mark_best(roots, shown, "0-1", "en")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"base": "/etc"}, "is not offered"),
        ({"loras": ["../x"]}, "That LoRA is not there"),
        ({"loras": None}, "No LoRA is chosen"),
        ({"strengths": "0.5; loud"}, "are not understood"),
        ({"strengths": "nan"}, "are not understood"),
        ({"strengths": "3"}, "numbers from -2 to 2"),
        ({"prompts": " \n "}, "no prompt"),
        ({"prompts": "x" * 5000}, "up to 4,000 characters"),
        ({"rows": "<b>"}, "Axis &#x27;&lt;b&gt;&#x27; is unknown"),
        ({"seed": None}, "The seed is &#x27;None&#x27;"),
        ({"seed": -1}, "from 0 to 4294967295"),
        ({"seed": float("nan")}, "The seed is"),
        ({"steps": 1e9}, "The number of steps"),
        ({"sampler": "Eular"}, "Sampler &#x27;Eular&#x27; is unknown"),
        ({"side": 99999}, "The side is"),
        ({"side": 33}, "multiples of"),
        ({"loras": "foreign"}, "does not fit base"),
        ({"loras": "torn"}, "damaged"),
    ],
)
def test_bad_input_is_one_escaped_sentence(roots: Roots, studio: Studio, changed: dict[str, Any], sentence: str) -> None:
    if isinstance(changed.get("loras"), str):
        changed = {"loras": [key_of(roots, changed["loras"])]}
    final = together(press(roots, studio, **changed))
    assert sentence in final["status"]
    assert "message bad" in final["status"]
    assert final["go"]["interactive"]
    assert not studio.busy.locked()


def test_stop_is_for_ones_own_sheet_alone_and_ends_it_after_its_step(roots: Roots, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    honest = generate.picture
    desk = Desk()

    def slow(*values: Any, **options: Any) -> Iterator[Any]:
        for item in honest(*values, **options):
            steps.append(1)
            time.sleep(0.02)
            yield item

    monkeypatch.setattr(generate, "picture", slow)
    work = actions.draw_sheet(roots, studio, desk, "me", "en", *controls(roots, steps=100))
    states = [next(work)]
    while not steps:
        states.append(next(work))
    assert not side_work.stop(desk, "somebody else")
    time.sleep(0.2)
    counted = len(steps)
    time.sleep(0.2)
    assert len(steps) > counted, "somebody else's stop did nothing"
    assert side_work.stop(desk, "me")
    counted = len(steps)
    states += list(work)
    assert len(steps) <= counted + 1
    assert re.search("Stopped. [01] of 6 pictures", states[-1]["status"])  # between two looks a slow machine draws a whole one
    assert not studio.busy.locked()
    assert not desk.stops


def test_it_waits_for_the_workplace_says_so_and_a_stop_while_it_waits_ends_it(
    roots: Roots, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, seen = Desk(), []
    monkeypatch.setattr(generate, "picture", lambda *_, **__: pytest.fail("drawn beside another"))
    with studio.busy:
        for changes in actions.draw_sheet(roots, studio, desk, "me", "en", *controls(roots)):
            seen.append(changes["status"])
            if len(seen) == 2:
                threading.Timer(0.2, side_work.stop, (desk, "me")).start()
        assert "Waiting: another picture is being drawn" in seen[1]
        assert "Stopped. 0 of 6" in seen[-1]
        assert studio.busy.locked(), "the other one's hold stays"


def test_a_second_press_of_one_session_waits_for_its_first(roots: Roots, studio: Studio) -> None:
    desk = Desk()
    desk.stops["me"] = threading.Event()
    assert "Your last press is still at work here" in press(roots, studio, desk)[-1]["status"]
    assert "Done" in press(roots, studio, desk, session="another")[-1]["status"]
    assert list(desk.stops) == ["me"]


def test_two_sheets_at_once_are_drawn_one_after_the_other(roots: Roots, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, most, honest = [], [], generate.picture

    def watched(*values: Any, **options: Any) -> Iterator[Any]:
        at_work.append(1)
        most.append(len(at_work))
        yield from honest(*values, **options)
        at_work.pop()

    monkeypatch.setattr(generate, "picture", watched)
    desk, ends = Desk(), []
    threads = [threading.Thread(target=lambda name=name: ends.append(press(roots, studio, desk, session=name)[-1])) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert max(most) == 1
    assert ["Done" in one["status"] for one in ends] == [True] * 3
    assert len({one["sheet"]["value"] for one in ends}) == 3


@pytest.fixture(scope="module")
def page(roots: Roots, studio: Studio) -> Iterator[gr.Blocks]:
    with served(roots, studio, compare_page) as demo:
        yield demo


def test_two_clients_see_and_stop_their_own_sheets_alone(page: gr.Blocks, roots: Roots) -> None:
    one, other = (Client(str(page.local_url), verbose=False) for _ in range(2))
    final = one.predict(*controls(roots), api_name="/compare_draw")
    assert any("Done: 6 pictures" in str(value) for value in final)
    setting, said = one.predict("1-2", api_name="/compare_use")
    assert (setting["prompt"], setting["strength"], setting["seed"]) == ("a red star", 1.0, 3)
    assert "Sent to Generate" in said
    assert "No picture is chosen" in other.predict("1-2", api_name="/compare_use")[1]
    assert "No picture is chosen" in other.predict("1-2", api_name="/compare_best")
    job = one.submit(*controls(roots, steps=100, prompts="\n".join("abcdefgh")), api_name="/compare_draw")
    deadline = time.monotonic() + 30
    while not job.outputs() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "Nothing of yours" in other.predict(api_name="/compare_stop")
    assert "Stopping" in one.predict(api_name="/compare_stop")
    assert any("Stopped." in str(value) for value in job.result(timeout=30))


def test_in_a_browser_a_sheet_is_drawn_a_picture_is_clicked_and_used(page: gr.Blocks) -> None:
    if not CHROMIUM.is_file():
        pytest.fail(f"{CHROMIUM} is missing: this test needs it (apt-get install chromium)")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS) as browser,
    ):
        tab = browser.new_page(viewport={"width": 1280, "height": 1000}, locale="ko-KR")
        tab.set_default_timeout(PATIENCE_MS)
        tab.goto(str(page.local_url))
        expect(tab.locator("#compare-go")).to_have_text("시트 그리기")
        tab.locator("#compare-run input").click()
        tab.get_by_role("option", name="cups").click()
        expect(tab.locator("#compare-status")).to_contain_text("cups의 체크포인트 3개를 골랐습니다")
        prompts = tab.locator("#compare-prompts textarea")
        expect(prompts).to_have_value(re.compile("^zup, a red star"))
        prompts.fill("a cup\na red star")
        proposed = tab.locator("#compare-proposed textarea, #compare-proposed input")
        tab.locator("#compare-loras input").click()
        tab.get_by_role("option", name="wild").click()
        expect(proposed).to_have_value(re.compile("\na red star on a blue"))
        tab.get_by_role("option", name="wild").click()
        expect(proposed).not_to_have_value(re.compile("\na red star on a blue"))
        tab.keyboard.press("Escape")
        tab.keyboard.press("Tab")
        expect(prompts).to_have_value("a cup\na red star")
        tab.locator("#compare-more button").first.click()
        tab.locator("#compare-base input").click()
        tab.get_by_role("option", name="tiny").click()
        tab.locator("#compare-steps input[type=number]").fill("2")
        tab.locator("#compare-steps input[type=number]").press("Tab")
        tab.locator("#compare-go").click()
        expect(tab.locator("#compare-status")).to_contain_text("완료", timeout=PATIENCE_MS)
        expect(tab.locator("#compare-use")).to_be_enabled(timeout=60_000)
        tab.wait_for_function("(image => image && image.complete && image.src.endsWith('.png') && image.src.includes('sheet-'))"
                              "(document.querySelector('#compare-sheet img'))")  # fmt: skip
        sheet = tab.locator("#compare-sheet img")
        sheet.scroll_into_view_if_needed()
        tab.wait_for_timeout(300)  # the page has its last height
        box = sheet.bounding_box()
        assert box is not None
        tab.mouse.click(box["x"] + box["width"] - 20, box["y"] + box["height"] - 20)
        expect(tab.locator("#compare-cell input")).to_have_value(re.compile("step 30 · strength 1"))
        tab.locator("#compare-use").click()
        expect(tab.locator("#compare-status")).to_contain_text("생성 페이지로 보냈습니다")
