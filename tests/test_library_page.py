"""The page of LoRA files and runs: what its presses do, with real files, and how it fares with 500 of them."""

import gc
import json
import re
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from sdlora import chosen, files, lora_file, lora_notes, run_lock, shelf
from sdlora.errors import UserError
from sdlora.ui import library_actions as actions
from sdlora.ui import library_merge, library_page, lora_shelf
from sdlora.ui.roots import Roots
from sdlora.ui.studio import Studio
from tests.shelf import make_roots, make_studio, served, write_lora
from tests.test_page import CHROMIUM, CHROMIUM_OPTIONS

pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")


@pytest.fixture
def roots(tiny_base: Path, tmp_path: Path) -> Roots:
    return make_roots(tiny_base, tmp_path)


@pytest.fixture
def studio(roots: Roots) -> Studio:
    return make_studio(roots)


def key_of(roots: Roots, name: str) -> str:
    return next(key for key, path in lora_shelf.paths(roots).items() if path.stem == name)


def run_of(roots: Roots) -> str:
    return next(key for _, key in lora_shelf.runs_of(roots))


def base_of(roots: Roots) -> str:
    return next(key for shown, key in lora_shelf.bases_of(roots) if shown == "tiny")


def names_on(html: str) -> list[str]:
    return re.findall(r'<span class="name">(.*?)</span>', html)


def listed(roots: Roots, what: str = "loras", search: str = "", family: str = "", order: str = "name", page: int = 1) -> list[str]:
    return names_on(actions.shelf_of(roots, what, search, family, order, page, "en")[0])


def test_what_is_chosen_can_be_drawn_with(roots: Roots) -> None:
    (roots.loras / "calm.json").write_text('{"preferred weight": 0.7, "activation text": "zup"}')
    told = actions.setting_of(roots, key_of(roots, "calm"), base_of(roots))
    assert (told["lora"], told["base"], told["strength"], told["prompt"]) == (key_of(roots, "calm"), base_of(roots), 0.7, "zup")
    told = actions.setting_of(roots, key_of(roots, "cups-000010"), base_of(roots))
    assert (told["lora"], told["base"], told["prompt"]) == (key_of(roots, "cups-000010"), "mini", "zup"), (
        "a run's files with the run's base"
    )
    assert actions.setting_of(roots, run_of(roots), "mini")["lora"] == key_of(roots, "cups")
    for nothing in ("", None):
        with pytest.raises(UserError, match="No LoRA is chosen"):
            actions.setting_of(roots, nothing, "mini")  # type: ignore[arg-type]


def test_a_name_that_another_lora_has_is_not_given(roots: Roots) -> None:
    for name in ("cups", "wild", "calm"):
        with pytest.raises(UserError, match=f"called {name} is there already"):
            actions.rename(roots, key_of(roots, "calm"), name, "en")


# --- looking --------------------------------------------------------------------------------------------------------------------


def test_files_of_runs_and_from_elsewhere_are_found_by_words_family_and_order(roots: Roots) -> None:
    assert listed(roots) == ["calm", "cups", "foreign", "torn", "wild"]
    assert listed(roots, search="ZUP") == ["cups"], "by its trigger word"
    assert listed(roots, search="cups 20") == ["cups-000020"]
    lora_notes.write(roots.loras / "calm.safetensors", "for rainy days")
    assert listed(roots, search="rainy") == ["calm"]
    assert listed(roots, family="sdxl") == []
    assert listed(roots, order="size")[0] == "wild", "rank 4 is the largest"
    assert listed(roots, what="runs") == ["cups"]
    for word in ({"what": "all"}, {"family": "sd9"}, {"order": "colour"}):
        with pytest.raises(UserError, match="there are"):
            actions.shelf_of(roots, **({"what": "loras", "search": "", "family": "", "order": "name", "page": 1} | word), language="en")


def test_a_run_is_one_card_its_best_in_front_and_the_other_checkpoints_folded_behind_it(roots: Roots) -> None:
    run = roots.runs / "cups"

    def shown(language: str = "en") -> tuple[str, list[str], str]:
        html = actions.shelf_of(roots, "loras", "", "", "name", 1, language)[0]
        (stack,) = [one for one in html.split('<div class="stack">') if "cups" in one]
        front, _, fold = stack.partition("<details")
        return front, re.findall(r"<span>(cups[^<]*)</span>", fold), fold

    front, folded, fold = shown()
    assert (names_on(front), folded) == (["cups"], ["cups-000020", "cups-000010"]), "without a word on it the result, then from the last on"
    assert "2 more checkpoints" in fold
    assert "recommended" not in front + fold
    files.write(run / "verdict.json", b'{"step": 10, "strength": 0.8, "path": "checkpoints/cups-000010.safetensors"}')
    front, folded, _ = shown()
    assert (names_on(front), folded) == (["cups-000010"], ["cups", "cups-000020"])
    assert ">recommended</span>" in front
    chosen.mark_best(run, 20, 0.5)
    front, folded, fold = shown("ko")
    assert (names_on(front), folded) == (["cups-000020"], ["cups-000010", "cups"]), "a person's word goes before the run's"
    assert ">내가 고른 최고</span>" in front
    assert ">추천</span>" in fold
    assert "체크포인트 2개 더" in fold
    assert key_of(roots, "cups-000010") in fold
    assert listed(roots, search="cups-000010") == ["cups-000010"], "a search finds what is folded away"
    assert "recommended" in actions.look(roots, key_of(roots, "cups-000010"), "en")[0]
    names = [one.shown for one in lora_shelf.fronts_first(lora_shelf.matching(lora_shelf.items(roots), order="name"), 6)]
    assert names == ["calm", "cups-000020", "foreign", "torn", "wild", "cups-000010"], "what Generate offers first"
    offered = [name for name, _ in lora_shelf.choices_of(roots)]
    assert offered == ["calm", "cups", "cups-000010", "cups-000020 ★", "foreign", "torn", "wild"], "what Compare and merging offer"


def test_header_facts_are_those_of_the_file_read_whole(roots: Roots) -> None:
    for path in lora_shelf.paths(roots).values():
        if path.stem != "torn":
            whole, seen = lora_file.read(path), shelf.facts(path)
            assert seen.family == whole.family, path
            assert list(seen.ranks) == whole.ranks, path
            assert seen.hash == whole.metadata["sshs_model_hash"]
            assert seen.legacy_hash == whole.metadata["sshs_legacy_hash"] == shelf.legacy_hash(path)
    assert "torn.safetensors is damaged" in shelf.facts(roots.loras / "torn.safetensors").trouble
    assert str(roots.loras) not in shelf.facts(roots.loras / "torn.safetensors").trouble


def test_what_stands_beside_a_file_counts_and_a_file_written_anew_is_read_anew(roots: Roots, tiny_base: Path) -> None:
    path = roots.loras / "calm.safetensors"
    assert (shelf.facts(path).trigger, shelf.facts(path).strength) == ("", 1.0)
    files.write(path.with_suffix(".json"), json.dumps({"activation text": "kalm", "preferred weight": 0.7}).encode())
    assert (shelf.facts(path).trigger, shelf.facts(path).strength) == ("kalm", 0.7)
    time.sleep(0.01)
    write_lora(tiny_base, path, seed=1, rank=3, metadata={"modelspec.trigger_phrase": "new"})
    assert (shelf.facts(path).trigger, shelf.facts(path).ranks) == ("new", (3,))
    assert shelf.tags(roots.runs / "cups/cups.safetensors") == [("cup", 4), ("<b>red", 2)]


def test_a_preview_is_the_picture_beside_the_file_else_a_sample_of_its_step_else_the_newest(roots: Roots) -> None:
    run = roots.runs / "cups"
    assert shelf.preview(run / "cups.safetensors") is None
    for step in (10, 30):
        (run / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (step, 0, 0)).save(run / f"samples/{step:06d}-0.png")
    assert [shelf.preview(path).name for path in (run / "checkpoints/cups-000010.safetensors", run / "cups.safetensors")] == [  # type: ignore[union-attr]
        "000010-0.png", "000030-0.png",
    ]  # fmt: skip
    Image.new("RGB", (32, 32)).save(run / "cups.preview.png")
    assert shelf.preview(run / "cups.safetensors") == run / "cups.preview.png"
    assert lora_shelf.small_picture(run / "cups.preview.png").startswith("data:image/jpeg;base64,")
    (roots.loras / "calm.png").write_bytes(b"<svg onload=alert(1)>")
    assert lora_shelf.small_picture(shelf.preview(roots.loras / "calm.safetensors")) == ""
    assert 'class="blank"' in actions.look(roots, key_of(roots, "calm"), "en")[0]


def test_one_file_is_shown_with_its_facts_tags_and_notes_and_a_run_with_what_was_chosen(roots: Roots) -> None:
    html, notes = actions.look(roots, key_of(roots, "cups"), "en")
    assert "zup" in html
    assert "cup<b>4</b>" in html
    assert "&lt;b&gt;red" in html
    assert notes == ""
    assert actions.keep_notes(roots, key_of(roots, "cups"), "mine\n<b>", "en") == "The notes on cups are kept."
    assert actions.look(roots, key_of(roots, "cups"), "en")[1] == "mine\n<b>"
    chosen.mark_best(roots.runs / "cups", 20, 0.8)
    shown = actions.look(roots, run_of(roots), "en")[0]
    assert "step 20 at strength 0.8" in shown
    assert "30 / 30" in shown
    assert "20스텝, 강도 0.8" in actions.look(roots, run_of(roots), "ko")[0]


def test_notes_change_no_byte_of_the_file_and_leave_nothing_when_they_are_taken_away(roots: Roots) -> None:
    path = roots.loras / "calm.safetensors"
    before = path.read_bytes(), sorted(one.name for one in roots.loras.iterdir())
    lora_notes.write(path, "x")
    assert lora_notes.read(path).notes == "x"
    lora_notes.write(path, "  ")
    assert (path.read_bytes(), sorted(one.name for one in roots.loras.iterdir())) == before
    for words, sentence in (("x" * 20_001, "20,001 characters"), ("\ud800", "half of a character pair")):
        with pytest.raises(UserError, match=sentence):
            lora_notes.write(path, words)


def test_inside_are_counts_of_matched_keys_both_hashes_and_all_metadata(roots: Roots) -> None:
    said, html = actions.inspect(make_studio(roots), key_of(roots, "cups"), base_of(roots), "en")
    count = len(lora_file.read(roots.runs / "cups/cups.safetensors").modules)
    assert f"cups and base tiny: {count} of {count} modules match" in said
    metadata = lora_file.read(roots.runs / "cups/cups.safetensors").metadata
    assert f"All metadata ({len(metadata)})" in html
    assert metadata["sshs_model_hash"] in html
    assert metadata["sshs_legacy_hash"] in html
    assert (
        "does not fit base tiny: none of its 1 modules is there"
        in actions.inspect(make_studio(roots), key_of(roots, "foreign"), base_of(roots), "en")[0]
    )
    with pytest.raises(UserError, match="was not fetched"):
        actions.inspect(make_studio(roots), key_of(roots, "cups"), "nobody/nothing-here", "en")


# --- changing -------------------------------------------------------------------------------------------------------------------


def test_a_new_name_goes_to_the_file_and_all_beside_it_and_a_run_keeps_its_own(roots: Roots) -> None:
    path = roots.loras / "calm.safetensors"
    before = path.read_bytes()
    for ending in (".png", ".json", ".sdlora.json"):
        path.with_name(f"calm{ending}").write_text("{}")
    path.with_name("calmer.png").write_text("another's")
    assert actions.rename(roots, key_of(roots, "calm"), "quiet (v2)", "en") == "calm is now called quiet (v2)."
    assert (roots.loras / "quiet (v2).safetensors").read_bytes() == before
    left = sorted(one.name for one in roots.loras.iterdir() if one.name.startswith(("calm", "quiet")))
    assert left == ["calmer.png", *(f"quiet (v2){ending}" for ending in (".json", ".png", ".safetensors", ".sdlora.json"))]
    said = actions.rename(roots, key_of(roots, "cups-000010"), "early", "en")
    assert "belongs to a run and keeps its name there" in said
    assert (roots.loras / "early.safetensors").read_bytes() == (roots.runs / "cups/checkpoints/cups-000010.safetensors").read_bytes()
    for name in ("early", "calmer"):  # a picture of another would become this one's
        with pytest.raises(UserError, match="is there already"):
            actions.rename(roots, key_of(roots, "quiet (v2)"), name, "en")


def test_what_is_deleted_lies_in_the_trash_with_its_place_and_nothing_is_written_over(roots: Roots) -> None:
    path = roots.loras / "deep/wild.safetensors"
    content = path.read_bytes()
    with pytest.raises(UserError, match="tick that you are sure"):
        actions.delete(roots, key_of(roots, "wild"), False, "en")
    lora_notes.write(path, "note")
    for _ in range(2):
        files.write(path, content)
        assert "was moved to trash/" in actions.delete(roots, key_of(roots, "wild"), True, "en")
    assert not path.exists()
    places = sorted(roots.trash.iterdir())
    assert [(one / "wild.safetensors").read_bytes() == content for one in places] == [True, True]
    assert json.loads((places[0] / "from.json").read_text())["wild.safetensors"] == str(path.absolute())
    assert sorted(one.name for one in places[0].iterdir()) == ["from.json", "wild.safetensors", "wild.sdlora.json"]
    assert not [one for one in lora_shelf.paths(roots).values() if one.is_relative_to(roots.trash)]


def test_a_run_is_deleted_whole_but_not_while_it_is_at_work(roots: Roots) -> None:
    key, run = run_of(roots), roots.runs / "cups"
    with run_lock.held(run):
        for one in (key, key_of(roots, "cups")):
            with pytest.raises(UserError, match="is at work in that folder"):
                actions.delete(roots, one, True, "en")
    assert "cups was moved" in actions.delete(roots, key, True, "en")
    assert not run.exists()
    assert next(roots.trash.rglob("cups-000020.safetensors")).is_file()
    with pytest.raises(UserError, match="is not there"):
        actions.look(roots, key, "en")


def test_to_another_disk_it_is_copied_whole_before_it_is_deleted(roots: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(self: Path, goal: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    content = (roots.loras / "calm.safetensors").read_bytes()
    key, run = key_of(roots, "calm"), run_of(roots)
    honest = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, goal: honest(self, goal) if ".part" in self.name else elsewhere(self, goal))
    actions.delete(roots, key, True, "en")
    actions.delete(roots, run, True, "en")
    assert next(roots.trash.rglob("calm.safetensors")).read_bytes() == content
    assert next(roots.trash.rglob("cups-000010.safetensors")).is_file()
    assert not (roots.loras / "calm.safetensors").exists()
    assert not (roots.runs / "cups").exists()


def test_a_sound_upload_is_kept_as_it_is_and_another_of_its_name_is_refused(roots: Roots, tmp_path: Path) -> None:
    upload = tmp_path / "from elsewhere.safetensors"
    shutil.copy(roots.loras / "calm.safetensors", upload)
    assert actions.take_in(roots, str(upload), "", "en") == "from elsewhere is sound and was imported."
    assert (roots.loras / "from elsewhere.safetensors").read_bytes() == upload.read_bytes()
    assert upload.exists()
    with pytest.raises(UserError, match="is there already"):
        actions.take_in(roots, str(upload), "", "en")
    with pytest.raises(UserError, match=r"^torn\.safetensors is damaged"):
        actions.take_in(roots, str(roots.loras / "torn.safetensors"), "x", "en")
    with pytest.raises(UserError, match="No file was given"):
        actions.take_in(roots, None, "x", "en")
    assert not list(roots.loras.glob("x.*"))
    assert not list(roots.loras.glob(".*"))


# --- making ---------------------------------------------------------------------------------------------------------------------


def test_resizing_and_converting_make_new_files_that_say_how_far_they_are(roots: Roots) -> None:
    *_, said = actions.resize(make_studio(roots), key_of(roots, "wild"), "small", "rank", 2, "", "en")
    assert "small was made" in said
    assert "relative error: worst" in said
    assert lora_file.read(roots.loras / "small.safetensors").ranks == [2]
    *_, said = actions.convert(roots, key_of(roots, "wild"), "theirs", "diffusers", "en")
    assert "theirs was made" in said
    assert lora_file.read(roots.loras / "theirs.safetensors").layout == "PEFT"
    for values, sentence in (
        (("small", "rank", 2), "is there already"),
        (("y", "colour", 2), "Limit"),
        (("y", "rank", 2.5), "a whole number"),
    ):
        with pytest.raises(UserError, match=sentence):
            list(actions.resize(make_studio(roots), key_of(roots, "wild"), *values, "", "en"))


def merge_values(roots: Roots, **changed: Any) -> list[Any]:
    plain = {"method": "sum", "rank": 0, "base": base_of(roots), "a": key_of(roots, "calm"), "b": key_of(roots, "wild"), "c": "", "d": ""}
    return list((plain | {"wa": 1.0, "wb": -0.5, "wc": 1.0, "wd": 1.0} | changed).values())


def test_a_merge_is_kept_under_its_name_and_its_preview_draws_the_very_file(roots: Roots, studio: Studio) -> None:
    *_, said = library_merge.merge(studio, "both", "en", *merge_values(roots))
    assert "both was made" in said
    assert lora_file.read(roots.loras / "both.safetensors").ranks == [6]
    recipe = library_merge.recipe_of(studio, *merge_values(roots))
    seen = list(library_merge.preview(studio, recipe, "a cup", 3, "en", threading.Event()))
    row = seen[-1][1]
    assert row is not None
    assert "merged beside its parts, all at seed 3" in seen[-1][0]
    assert studio.base is not None
    assert not [layer for part in studio.base.parts.values() for layer in library_merge.lora.layers(part)], "the base is left as it was"
    whole = Image.new("RGB", row.size)
    whole.paste(row)
    cells = [row.crop((150 + 6 + column * 198, 48, 150 + 6 + column * 198 + 192, 240)).tobytes() for column in range(4)]
    assert len(set(cells)) == 4, "without, each part, and the merged one differ"
    stop = threading.Event()
    stop.set()
    assert [row for _, row in library_merge.preview(studio, recipe, "a cup", 3, "en", stop)][-1] is None
    for changed, sentence in (({"b": ""}, "at least two"), ({"b": key_of(roots, "calm")}, "each once"), ({"wb": 9}, "from -2 to 2")):
        with pytest.raises(UserError, match=sentence):
            library_merge.recipe_of(studio, *merge_values(roots, **changed))


def test_a_share_pack_of_no_run_is_refused(roots: Roots) -> None:
    with pytest.raises(UserError, match="is of no run here"):
        actions.share_pack(roots, key_of(roots, "calm"), "", False, "en")


# --- many -----------------------------------------------------------------------------------------------------------------------


def test_five_hundred_files_are_listed_in_two_seconds_and_a_hundred_times_without_growing(roots: Roots) -> None:
    content = (roots.loras / "calm.safetensors").read_bytes()
    for number in range(500):
        path = roots.loras / f"many/{number % 10}/lora-{number:03d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        Image.new("RGB", (512, 512), (number % 256, 90, 90)).save(path.with_suffix(".png"))
    started_s = time.monotonic()
    shown, _, pages = actions.shelf_of(roots, "loras", "", "", "name", 1, "en")
    first_s = time.monotonic() - started_s
    assert (len(names_on(shown)), pages) == (24, 22)
    for one in lora_shelf.items(roots):  # as `warm` does while the page is looked at
        assert one.facts.path == one.path
    started_s = time.monotonic()
    assert listed(roots, search="lora-499") == ["lora-499"]
    again_s = time.monotonic() - started_s
    assert (first_s < 2, again_s < 0.5) == (True, True), (first_s, again_s)

    keys = list(lora_shelf.paths(roots))

    def load(number: int) -> None:
        actions.shelf_of(roots, "loras", "lora", "", "newest", number % 22 + 1, "en")
        actions.look(roots, keys[number], "en")

    for number in range(20):
        load(number)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for number in range(100):
        load(number)
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    assert grown < 24 * 2**20, f"{grown / 2**20:.1f} MiB more after 100 loads"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > psutil.Process().num_fds()


# --- as others see it -----------------------------------------------------------------------------------------------------------


def test_over_http_a_file_is_imported_found_inspected_and_deleted(roots: Roots, studio: Studio, tmp_path: Path) -> None:
    shutil.copy(roots.loras / "calm.safetensors", tmp_path / "new one.safetensors")
    with served(roots, studio, library_page) as demo:
        client = Client(str(demo.local_url), verbose=False)
        assert "is sound and was imported" in client.predict(handle_file(tmp_path / "new one.safetensors"), "", api_name="/library_import")
        cards = client.predict("loras", "new one", "", "name", 1, api_name="/library_list")[0]
        assert names_on(cards) == ["new one"]
        (key,) = re.findall(r'data-key="([0-9a-f]{16})"', cards)
        assert "modules match" in client.predict(key, base_of(roots), api_name="/library_inspect")[0]
        assert "are kept" in client.predict(key, "a note", api_name="/library_notes")
        assert client.predict(key, api_name="/library_look")[1] == "a note"
        assert "was moved to" in client.predict(key, True, api_name="/library_delete")[0]
        assert "is not there" in client.predict(key, api_name="/library_look")[0]


def test_in_a_browser_a_card_is_clicked_by_mouse_and_by_keyboard(roots: Roots, studio: Studio) -> None:
    if not CHROMIUM.is_file():
        pytest.fail(f"{CHROMIUM} is missing: this test needs it (apt-get install chromium)")
    with (
        served(roots, studio, library_page) as demo,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS) as browser,
    ):
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        tab.set_default_timeout(60_000)
        tab.goto(str(demo.local_url))
        tab.locator(".card", has_text="calm").click()
        expect(tab.locator("#library-detail h3")).to_have_text("calm")
        tab.locator(".card", has_text="wild").focus()
        tab.keyboard.press("Enter")
        expect(tab.locator("#library-detail h3")).to_have_text("wild")
        tab.locator(".fold summary").click()
        tab.locator(".leaf", has_text="cups-000010").click()
        expect(tab.locator("#library-detail h3")).to_have_text("cups-000010")
        tab.locator("#library-search textarea, #library-search input").first.fill("zup")
        expect(tab.locator(".card")).to_have_count(1)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
