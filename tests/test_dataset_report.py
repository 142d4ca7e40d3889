"""The doctor names what is wrong with a folder and leaves the rest, and the folder, alone."""

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from sdlora import caption_findings, data_folders, dataset, dataset_report, picture_checks, recipes
from sdlora.captions import CaptionRules
from sdlora.data_folders import Scan
from sdlora.dataset import Finding, Sample
from sdlora.dataset_report import Report
from tests import nasty_folder
from tests.nasty_folder import TRIGGER, Nasty, drawing, encoded

ROOT = Path(__file__).parent.parent


def examine(*scans: Scan, **options: Any) -> Report:
    """The report at the end; by default of a style at 64 px."""
    asked = {"rules": [CaptionRules(TRIGGER)] * 9, "kind": "style", "batch": 4, "resolutions_px": [64], "step_px": 8} | options
    samples, findings = [one for scan in scans for one in scan.samples], [one for scan in scans for one in scan.findings]
    *progress, report = dataset_report.examine(samples, findings, **asked)
    assert isinstance(report, Report)
    assert [done for done, _ in progress] == list(range(1, len(progress) + 1))
    return report


def put(folder: Path, name: str, image: Image.Image, caption: str = f"{TRIGGER}, a drawing of shapes") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    path.with_suffix(".txt").write_text(caption)
    return path


def found(report: Report, *, notes: bool = True) -> set[tuple[str, str]]:
    """(code, file name) of the findings."""
    return {(one.code, one.path.name if one.path else "") for one in report.findings if notes or one.severity != "notes"}


def everything(folder: Path) -> dict[str, object]:
    paths = [folder, *folder.rglob("*")]
    return {os.fsencode(one).hex(): (one.read_bytes() if one.is_file() else None, one.lstat().st_mtime_ns) for one in paths}


# --- folders as people have them ---


@pytest.mark.parametrize(("name", "trigger"), [("style", "vitrail"), ("character", "pip")])
def test_the_examples_are_clean(name: str, trigger: str) -> None:
    report = examine(data_folders.scan(ROOT / "datasets" / name), kind=name, rules=[CaptionRules(trigger)])
    assert report.findings == ()
    assert (report.pictures, report.buckets[0].size_px, report.buckets[0].pictures) == (30, (64, 64), 30)


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Nasty:
    return nasty_folder.make(tmp_path_factory.mktemp("nasty"))


@pytest.fixture(scope="module")
def nasty_report(nasty: Nasty) -> Report:
    """Examined with every file of the folder the same before and after."""
    before = everything(nasty.root)
    scans = [data_folders.scan(nasty.root / name, source=i) for i, name in enumerate(("plain", "table", "classes"))]
    masked = data_folders.scan(nasty.root / "masked", masks=nasty.root / "masks", source=3)
    apart = data_folders.scan(nasty.root / "apart")
    report = examine(*scans, masked, Scan((), apart.findings), held_out=apart.samples)
    assert everything(nasty.root) == before
    return report


def test_every_defect_of_a_nasty_folder_is_named_with_its_file_and_severity(nasty: Nasty, nasty_report: Report) -> None:
    assert len(nasty.defects) >= 100
    unreadable = {"unreadable", "truncated"}  # some decoders do not say which
    said = {(str(one.path.relative_to(nasty.root)), one.severity, one.code) for one in nasty_report.findings if one.path}
    missed = [
        (kind, name)
        for kind, name, severity, code in nasty.defects
        if not any((name, severity, each) in said for each in ({code} if code else unreadable))
    ]
    assert missed == []


def test_nothing_else_is_said_of_a_nasty_folder(nasty: Nasty, nasty_report: Report) -> None:
    expected = {(name, severity) for _, name, severity, _ in nasty.defects} | {
        ("classes/1_zrk sketch", "notes"),
        ("classes/40_zrk drawing", "notes"),
    }
    implied = {("plain/ghost.png", "notes"), ("plain/caption-0.png", "notes")}  # transparent, and repeating itself to be long
    said = {(str(one.path.relative_to(nasty.root)), one.severity) for one in nasty_report.findings if one.path}
    assert said - expected - implied == set()
    assert [one.code for one in nasty_report.findings if one.path is None] == ["small-buckets"]


def test_good_pictures_are_trained_as_if_they_were_alone(nasty: Nasty, nasty_report: Report) -> None:
    scans = [data_folders.scan(nasty.root / name) for name in ("plain", "table", "classes", "masked")]
    samples = [one for scan in scans for one in scan.samples]
    among = {samples[item.sample].picture: (item.shape_px, samples[item.sample].captions) for item in nasty_report.items}
    good = data_folders.scan(nasty.root / "plain/good")
    report = examine(good)
    alone = {good.samples[item.sample].picture: (item.shape_px, good.samples[item.sample].captions) for item in report.items}
    assert found(report) <= {("small-buckets", ""), ("caption-repeats", "")}
    assert len(alone) == sum(name.startswith("plain/good") for name in nasty.good) >= 20
    assert {path: among[path] for path in alone} == alone


STORY = f"""
import json, resource, sys, time
from pathlib import Path
from sdlora import data_folders, dataset_report
from sdlora.captions import CaptionRules

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

scan = data_folders.scan(Path(sys.argv[1]))
start, longest, last = peak_mb(), 0.0, time.monotonic()
rules = [CaptionRules("{TRIGGER}")]
for one in dataset_report.examine(scan.samples, scan.findings, rules=rules, kind=None, batch=4, resolutions_px=[64], step_px=8):
    longest, last = max(longest, time.monotonic() - last), time.monotonic()
stops = [finding.path.name for finding in one.findings if finding.severity == "stops"]
used = [scan.samples[item.sample].picture.name for item in one.items]
print(json.dumps(dict(stops=stops, used=used, grown_mb=peak_mb() - start, longest_s=longest)))
"""


def test_a_thousand_damaged_files_end_in_a_picture_or_a_finding_each_in_little_time_and_memory(tmp_path: Path) -> None:
    cut = dict(nasty_folder.damage(tmp_path, count=1200))
    before = everything(tmp_path)
    done = subprocess.run([sys.executable, "-c", STORY, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    stops, used = set(said["stops"]), set(said["used"])
    assert stops | used == {path.name for path in cut}
    assert not stops & used
    assert {path.name for path, is_cut in cut.items() if is_cut} <= stops
    assert len(used) > 50  # changed bytes that leave a picture whole are no reason to refuse it
    assert said["grown_mb"] < 512
    assert said["longest_s"] < 10
    assert everything(tmp_path) == before


def test_whoever_stops_asking_does_not_wait_for_the_rest(tmp_path: Path) -> None:
    for i in range(40):
        put(tmp_path, f"{i}.png", drawing(i))
    scan = data_folders.scan(tmp_path)
    asked = dataset_report.examine(scan.samples, scan.findings, rules=[CaptionRules()], kind=None, batch=1, resolutions_px=[64], step_px=8)
    assert next(asked) == (1, 40)
    asked.close()  # type: ignore[attr-defined]
    assert list(asked) == []


# --- what pictures show ---


@pytest.mark.parametrize("sigma_px", [1.5, 2.0, 4.0])
def test_the_blur_of_an_edge_is_measured_as_the_formula_says(sigma_px: float) -> None:
    across = np.arange(-50, 51) / (sigma_px * math.sqrt(2))
    edge = np.tile([255 * (1 + math.erf(x)) / 2 for x in across], (40, 1)).astype(np.float32)
    assert picture_checks.blur_px(edge) == pytest.approx(sigma_px, rel=0.1)


def test_sharp_drawings_and_photographs_are_not_blurred_and_blurred_ones_are() -> None:
    for seed in range(6):
        sharp = drawing(seed, (320, 320))
        noisy = np.asarray(sharp).astype(float) + np.random.default_rng(seed).normal(0, 12, (320, 320, 3))  # as a photograph has texture
        for image in (sharp, Image.fromarray(noisy.clip(0, 255).astype(np.uint8))):
            soft, blurred = (image.filter(ImageFilter.GaussianBlur(sigma_px)) for sigma_px in (1, 2.5))
            measured = [picture_checks.blur_px(picture_checks.grey(one)) for one in (image, soft, blurred)]
            assert measured[0] < 0.8 < measured[1] < 1.6 < measured[2]


def test_what_shows_nothing_is_not_called_blurred() -> None:
    assert picture_checks.blur_px(np.full((64, 64), 7, np.float32)) == 0
    assert picture_checks.blur_px(np.zeros((2, 2), np.float32)) == 0


def test_blur_that_is_gone_at_the_training_size_is_no_finding(tmp_path: Path) -> None:
    put(tmp_path, "a.png", drawing(3, (512, 512)).filter(ImageFilter.GaussianBlur(4)))
    assert ("blurred", "a.png") not in found(examine(data_folders.scan(tmp_path)))
    assert ("blurred", "a.png") in found(examine(data_folders.scan(tmp_path), resolutions_px=[512]))


@pytest.mark.parametrize("colour", ["black", "white", "teal"])
@pytest.mark.parametrize(("left", "top"), [(0, 30), (30, 0), (24, 40)])
def test_bars_are_measured_and_what_stands_on_plain_ground_is_not_a_bar(left: int, top: int, colour: str) -> None:
    for seed in range(4):
        inner = drawing(seed, (180, 180))
        image = Image.new("RGB", (180 + 2 * left, 180 + 2 * top), colour)
        image.paste(inner, (left, top))
        jpeg = Image.open(io.BytesIO(encoded(image, "JPEG", quality=90)))
        share = 1 - 180 * 180 / (image.width * image.height)
        assert picture_checks.edges(jpeg).bars == pytest.approx(share, abs=0.03)
        assert picture_checks.edges(inner).bars == 0
    plain = Image.open(ROOT / "datasets/character/05.png")
    assert picture_checks.edges(plain.convert("RGB")).bars == 0
    assert picture_checks.edges(plain.convert("RGB")).empty > 0.5


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "saved again": lambda one: Image.open(io.BytesIO(encoded(one, "JPEG", quality=30))),
    "smaller": lambda one: one.resize((one.width // 3, one.height // 3), Image.Resampling.BICUBIC),
    "brighter": lambda one: ImageEnhance.Brightness(one).enhance(1.2),
    "flatter": lambda one: ImageEnhance.Contrast(one).enhance(0.8),
    "cropped": lambda one: one.crop((3, 3, one.width - 2, one.height - 2)),
    "turned": lambda one: one.rotate(2, Image.Resampling.BICUBIC),
    "softer": lambda one: one.filter(ImageFilter.GaussianBlur(2)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_copy_is_found_and_a_mirrored_one_too(edit: Callable[[Image.Image], Image.Image]) -> None:
    originals = [drawing(seed, (190, 190)) for seed in range(12)]
    edited = [edit(one) for one in originals]
    prints = np.stack([picture_checks.fingerprint(one) for one in originals + edited])
    assert picture_checks.alike(prints) == [(i, i + 12, False) for i in range(12)]
    prints = np.stack([picture_checks.fingerprint(one) for one in originals + [ImageOps.mirror(one) for one in edited]])
    assert picture_checks.alike(prints) == [(i, i + 12, True) for i in range(12)]


def test_different_pictures_of_one_style_or_character_are_no_copies() -> None:
    for name in ("style", "character"):
        pictures = [Image.open(path) for path in sorted((ROOT / "datasets" / name).glob("*.png"))]
        assert picture_checks.alike(np.stack([picture_checks.fingerprint(one) for one in pictures])) == []


def test_blank_pictures_are_alike_with_nothing() -> None:
    blank = np.stack([picture_checks.fingerprint(Image.new("RGB", (9, 9), colour)) for colour in ("red", "red", "white")])
    assert picture_checks.alike(blank) == []


def test_copies_of_copies_are_one_group(tmp_path: Path) -> None:
    assert picture_checks.groups(6, [(4, 1), (2, 4), (0, 5)]) == [[0, 5], [1, 2, 4]]
    for name in ("a", "b", "c"):
        put(tmp_path, f"{name}.png", drawing(7))
    put(tmp_path, "d.jpg", drawing(7))
    put(tmp_path, "e.png", ImageOps.mirror(drawing(7)))
    put(tmp_path, "f.png", drawing(8))
    groups = [(one.kind, [path.name for path in one.pictures]) for one in examine(data_folders.scan(tmp_path)).copies]
    assert groups == [("exact", ["a.png", "b.png", "c.png"]), ("near", ["a.png", "d.jpg", "e.png"])]


# --- sizes and numbers ---


def test_the_table_of_sizes_says_what_the_trainer_will_do(tmp_path: Path) -> None:
    for name, size, folder in (("a", (64, 64), "3_x"), ("b", (80, 64), "3_x"), ("c", (130, 130), "1_y"), ("d", (128, 64), "1_y")):
        put(tmp_path, f"{folder}/{name}.png", drawing(ord(name), size))
    report = examine(data_folders.scan(tmp_path))
    assert [(one.size_px, one.pictures, one.visits) for one in report.buckets] == [
        ((72, 56), 1, 3),
        ((64, 64), 2, 4),
        ((88, 48), 1, 1),
    ]
    cut = {one.size_px: one.mean_cropped for one in report.buckets}
    assert cut[64, 64] == 0
    assert cut[72, 56] == pytest.approx(1 - (80 / 64) / (72 / 56))
    for batch in (1, 2, 3, 8):
        shapes, repeats = [one.shape_px for one in report.items], [one.repeats for one in report.items]
        assert dataset_report.steps_per_epoch(report, batch=batch) == len(
            dataset.epoch_batches(shapes, repeats, batch=batch, seed=0, epoch=0)
        )


def test_a_picture_is_too_small_by_what_it_would_be_enlarged_and_not_at_all_if_it_is_not(tmp_path: Path) -> None:
    put(tmp_path, "a.png", drawing(1, (96, 64)))
    scan = data_folders.scan(tmp_path)
    (finding,) = [one for one in examine(scan, resolutions_px=[64, 256]).findings if one.code == "too-small"]
    assert (finding.severity, finding.what) == ("warns", "The picture has 96 by 64 px and is enlarged 3.2 times to 312 by 208.")
    assert "too-small" not in {code for code, _ in found(examine(scan, resolutions_px=[256], upscale=False))}


def test_repeats_are_for_balance(tmp_path: Path) -> None:
    for i in range(12):
        put(tmp_path, f"{'few' if i < 2 else 'many'}/{i}.png", drawing(i))
    few, many = (data_folders.scan(tmp_path / name, repeats=times, source=i) for i, (name, times) in enumerate((("few", 5), ("many", 1))))
    assert "unbalanced-repeats" not in {code for code, _ in found(examine(few, many))}
    few, many = (data_folders.scan(tmp_path / name, repeats=times, source=i) for i, (name, times) in enumerate((("few", 1), ("many", 9))))
    report = examine(few, many)
    assert ("unbalanced-repeats", "many") in found(report)
    assert "unbalanced-repeats" not in {code for code, _ in found(examine(few, many, regularisation={1}))}


def test_a_picture_whose_caption_cannot_be_read_is_still_looked_at(tmp_path: Path) -> None:
    put(tmp_path, "a.png", drawing(1))
    put(tmp_path, "b.png", drawing(2))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    scan = data_folders.scan(tmp_path)
    asked = dataset_report.examine(scan.samples, scan.findings, rules=[CaptionRules()], kind=None, batch=1, resolutions_px=[64], step_px=8)
    assert [one for one in asked if isinstance(one, tuple)] == [(1, 2), (2, 2)]


def test_recommended_settings_follow_kind_and_number_and_give_reasons() -> None:
    style, character = (recipes.recipe(kind, pictures=30, batch=2) for kind in ("style", "character"))
    assert (style.text_encoder, character.text_encoder) == (False, True)
    assert (style.steps, style.repeats, style.rank, style.alpha) == (2000, 10, 16, 8)
    assert all(one.endswith(".") for one in style.reasons)
    for pictures in (1, 3, 8, 20, 100, 1000):
        for batch in (1, 4):
            one = recipes.recipe("style", pictures=pictures, batch=batch)
            shown = pictures - (round(0.1 * pictures) if pictures >= 20 else 0)  # a tenth is held out
            assert 20 <= one.steps * batch / shown <= 250
            assert pictures > 400 or 180 <= one.repeats * pictures <= 450
            assert str(one.rank) in one.reasons[2]
    assert recipes.recipe("style", pictures=5, batch=2).rank < style.rank


def test_a_folder_whose_kind_is_open_gets_both_recipes(tmp_path: Path) -> None:
    put(tmp_path, "a.png", drawing(1))
    assert [one.kind for one in examine(data_folders.scan(tmp_path), kind=None).recommended] == ["style", "character"]
    (tmp_path / "none").mkdir()
    assert examine(data_folders.scan(tmp_path / "none")).recommended == ()


# --- captions ---


def said_of(caption: str, *, kind: str = "style", rules: CaptionRules | None = None, **options: Any) -> list[str]:
    sample = Sample(Path("a.png"), (caption,))
    return [one.code for one in caption_findings.of_sample(sample, rules or CaptionRules(TRIGGER), kind=kind, **options)]


def test_ordinary_captions_are_ordinary() -> None:
    for caption in ("zrk, a red (and blue) star at 12:30", "Zrk waves, café, night", "zrk, 1girl, :3, (o_o)", "a cat, zrk, {smiling}"):
        assert said_of(caption) == []


def test_what_is_heard_is_counted_with_trigger_prefix_and_suffix() -> None:
    rules = CaptionRules(TRIGGER, prefix="a photo of " * 20, suffix=", at night")
    assert said_of("zrk, some trees", rules=rules, token_count=lambda words: len(words.split())) == []
    assert said_of("zrk, some trees", rules=rules, token_count=len) == ["caption-long"]
    heard: list[str] = []
    said_of("some trees", rules=rules, token_count=lambda words: heard.append(words) or 0)  # type: ignore[func-returns-value]
    assert heard[0].startswith("zrk, a photo of")
    assert heard[0].endswith("some trees, at night")


def test_a_short_caption_hides_more_in_a_style_than_in_a_character() -> None:
    (style,) = caption_findings.of_sample(Sample(Path("a.png"), ("zrk",)), CaptionRules(TRIGGER), kind="style")
    (character,) = caption_findings.of_sample(Sample(Path("a.png"), ("zrk",)), CaptionRules(TRIGGER), kind="character")
    assert (style.severity, character.severity) == ("warns", "notes")


@pytest.mark.parametrize(
    ("trigger", "code"),
    [
        ("dog", "trigger-common"),
        ("Red Cat", "trigger-common"),
        ("", "trigger-missing"),
        ("red zrk", ""),
        ("a photo of my pip", "trigger-long"),
    ],
)
def test_a_trigger_word_should_mean_nothing_yet(trigger: str, code: str) -> None:
    samples = [Sample(Path(f"{i}.png"), (f"{trigger} drawn in way {i}",)) for i in range(6)]
    assert [one.code for one in caption_findings.of_set(samples, [CaptionRules(trigger)], kind="style")] == ([code] if code else [])


def test_tags_that_appear_once_are_told_of_tags_and_never_of_sentences() -> None:
    tagged = [Sample(Path(f"{i}.png"), (f"zrk, tree, night, sky{', mispelt' if i == 2 else ''}",)) for i in range(6)]
    assert caption_findings.tag_counts(tagged) == (("night", 6), ("sky", 6), ("tree", 6), ("zrk", 6), ("mispelt", 1))
    (finding,) = caption_findings.of_set(tagged, [CaptionRules(TRIGGER)], kind="style")
    assert (finding.severity, finding.what) == ("notes", "1 of 5 tags appear once: mispelt.")
    sentences = [Sample(Path(f"{i}.png"), (f"zrk, a tree number {i}",)) for i in range(6)]
    assert caption_findings.tag_counts(sentences) == ()
    assert list(caption_findings.of_set(sentences, [CaptionRules(TRIGGER)], kind="style")) == []


def test_captions_that_are_all_the_same_are_one_finding() -> None:
    samples = [Sample(Path(f"{i}.png"), ("zrk, a person",)) for i in range(9)]
    (finding,) = caption_findings.of_set(samples, [CaptionRules(TRIGGER)], kind="style")
    assert (finding.code, finding.path) == ("captions-same", None)


# --- in words ---


def test_the_same_finding_of_many_files_is_one_line_the_worst_first(tmp_path: Path) -> None:
    for i in range(8):
        put(tmp_path, f"{i}.png", drawing(i, (16, 16)), "some shapes in a row")
    (tmp_path / "7.png").write_bytes(b"nothing")
    said = dataset_report.lines(examine(data_folders.scan(tmp_path)), batch=4)
    assert said[0] == "7 pictures in 1 training size; an epoch shows 7 pictures in 2 steps of 4."
    assert said[1].startswith("stops: 7.png: The picture cannot be read (")
    (small,) = [one for one in said if "16 by 16" in one]
    assert small.startswith("warns: 0.png, 1.png, 2.png, 3.png, 4.png and 2 more: The picture has 16 by 16 px and is enlarged 4.0 times")
    (lacking,) = [one for one in said if "trigger word" in one]
    assert lacking.startswith("notes: 0.png, 1.png, 2.png, 3.png, 4.png and 3 more: The caption lacks")
    severities = [one.partition(":")[0] for one in said[1:] if one.partition(":")[0] in dataset_report.SEVERITIES]
    assert severities == sorted(severities, key=dataset_report.SEVERITIES.index)


def test_names_are_shown_on_one_line_from_the_common_folder_on(tmp_path: Path) -> None:
    assert dataset_report.shown(tmp_path / "a/ü ☆.png", tmp_path) == "a/ü ☆.png"
    assert dataset_report.shown(tmp_path / "a\n\x1b[31m.png", tmp_path) == "a\\n\\x1b[31m.png"
    assert len(dataset_report.shown(tmp_path / ("d/" * 100 + "e.png"), tmp_path)) == 80
    assert dataset_report.shown(tmp_path, tmp_path) == tmp_path.name


def test_every_finding_is_a_sentence_and_says_what_to_do(nasty_report: Report) -> None:
    ours = [one for one in nasty_report.findings if not one.what.startswith("Caption ")]
    assert [one for one in ours if not (one.what[0].isupper() or one.what[0].isdigit()) or not one.what.endswith(".")] == []
    assert [one for one in nasty_report.findings if not (one.advice[0].isupper() and one.advice.endswith("."))] == []


def test_json_has_the_same_keys_for_every_folder(nasty: Nasty, nasty_report: Report) -> None:
    plain = json.loads(json.dumps(dataset_report.as_json(nasty_report)))
    assert list(plain) == ["pictures", "held_out", "counts", "findings", "sizes", "copies", "tags", "recommended"]
    assert list(plain["findings"][0]) == ["severity", "code", "what", "advice", "path"]
    assert list(plain["sizes"][0]) == ["size_px", "pictures", "visits", "mean_cropped", "most_cropped"]
    assert plain["counts"]["stops"] == sum(one["severity"] == "stops" for one in plain["findings"]) > 20
    assert (plain["held_out"], plain["copies"][0]["kind"]) == (3, "exact")
    assert Path(plain["findings"][0]["path"]).is_relative_to(nasty.root)
    clean = dataset_report.as_json(examine(Scan((), (Finding("stops", "folder-missing", "It is gone.", "Name another.", None),))))
    assert list(clean) == list(plain)
