"""What is said at each visit: read as it was written, varied as it was asked, and the same on every run."""

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlora import captions
from sdlora.captions import CaptionRules
from sdlora.errors import UserError

OF_ALL = CaptionRules(
    trigger="pip",
    shuffle=True,
    keep_first=2,
    tag_dropout=0.3,
    caption_dropout=0.2,
    wildcards=True,
    prefix="drawing of",
    suffix=", at night",
)


def said(caption: str, rules: CaptionRules, *, epoch: int = 0, index: int = 0, seed: int = 0) -> str:
    return captions.caption_at((caption,), rules, seed=seed, epoch=epoch, index=index)


def many(caption: str, rules: CaptionRules, count: int = 400) -> list[str]:
    return [said(caption, rules, epoch=epoch) for epoch in range(count)]


def test_three_epochs_of_two_pictures_are_these_very_captions() -> None:
    pictures = [("pip, red hat, {big|small} smile, star, sun", "pip waves"), ("tree, {red|green} leaf, sky, bird",)]
    found = [[captions.caption_at(one, OF_ALL, seed=25, epoch=epoch, index=i) for i, one in enumerate(pictures)] for epoch in range(3)]
    assert found == [
        ["drawing of pip waves, at night", "pip, drawing of tree, green leaf, sky, at night"],
        ["drawing of pip, red hat, star, sun, big smile, at night", ""],
        ["drawing of pip, red hat, star, small smile, sun, at night", "pip, drawing of tree, sky, bird, red leaf, at night"],
    ]


def test_no_two_visits_share_a_stream() -> None:
    seen = Counter()
    everything = ", ".join(f"tag{i}" for i in range(40))
    rules = CaptionRules(shuffle=True)
    for seed, epoch, index in product((0, 1, 2, 101, 2**32, 2**40 + 1), (0, 1, 2, 101, 104), (0, 1, 2, 101, 104)):
        seen[said(everything, rules, seed=seed, epoch=epoch, index=index)] += 1
    assert len(seen) == 6 * 5 * 5


def test_no_two_choices_share_a_stream() -> None:
    keys = [(captions._ALTERNATIVE, captions._WILDCARDS, captions._ORDER, captions._TAG_DROPOUT, captions._CAPTION_DROPOUT)]
    purposes = [*keys[0], 11, 13, 19, 23]  # the others are of dropped samples, of the order of an epoch, and of views
    draws = [np.random.default_rng([3, 1, 4, purpose]).random() for purpose in purposes]
    draws += [np.random.default_rng([3, 1, purpose]).random() for purpose in purposes]
    assert len(set(draws)) == len(draws)
    assert 0 not in purposes


def test_one_choice_switched_on_leaves_the_others_as_they_were() -> None:
    caption = "a, b, c, d, e, {x|y|z}"
    plain = many(caption, CaptionRules(wildcards=True), 50)
    dropping = many(caption, CaptionRules(wildcards=True, caption_dropout=0.5), 50)
    assert 10 < dropping.count("") < 40
    assert all(with_dropout in ("", without) for with_dropout, without in zip(dropping, plain, strict=True))
    shuffled = many(caption, CaptionRules(wildcards=True, shuffle=True), 50)
    assert [sorted(captions.tags(one)) for one in shuffled] == [sorted(captions.tags(one)) for one in plain]


def test_each_alternative_comes_as_often_as_the_others() -> None:
    counts = Counter(captions.caption_at(("a", "b", "c"), CaptionRules(), seed=0, epoch=epoch, index=4) for epoch in range(3000))
    assert all(abs(counts[one] - 1000) < 110 for one in "abc")  # 4 standard deviations


def test_kept_tags_stay_in_front_and_the_others_take_every_order() -> None:
    found = many("a, b, c, d, e", CaptionRules(shuffle=True, keep_first=2))
    assert {one[:4] for one in found} == {"a, b"}
    assert len(set(found)) == 6


def test_the_trigger_word_is_the_first_of_the_kept_tags_written_or_added() -> None:
    for caption in ("pip, a, b, c", "a, b, pip, c", "a, b, c"):
        found = {tuple(captions.tags(one)) for one in many(caption, CaptionRules(trigger="pip", shuffle=True, keep_first=2))}
        assert {one[:2] for one in found} == {("pip", "a")}, caption
        assert {one[2:] for one in found} == {("b", "c"), ("c", "b")}, caption
    assert {one[:5] for one in many("a, b, Pip", CaptionRules(trigger="pip", shuffle=True))} == {"Pip, "}
    assert {said("sea, a portrait of pip", CaptionRules(trigger="pip", shuffle=True, tag_dropout=0.999))} == {"a portrait of pip"}


def test_tags_are_dropped_at_their_share_but_never_the_kept_ones() -> None:
    found = [captions.tags(one) for one in many("a, b, c, d, pip", CaptionRules(trigger="pip", keep_first=2, tag_dropout=0.25), 2000)]
    assert all(one[:2] == ["pip", "a"] for one in found)
    for tag in "bcd":
        assert np.mean([tag not in one for one in found]) == pytest.approx(0.25, abs=0.04)
    assert np.mean(["b" not in one and "c" not in one for one in found]) == pytest.approx(0.0625, abs=0.025), "each for itself"
    assert said("a, b", CaptionRules(tag_dropout=1.0)) == ""
    assert said("a, b", CaptionRules(trigger="pip", tag_dropout=1.0)) == "pip"


def test_captions_are_dropped_whole_at_their_share() -> None:
    found = many("a star", CaptionRules(trigger="pip", prefix="drawing of", caption_dropout=0.1), 4000)
    assert set(found) == {"", "pip, drawing of a star"}
    assert found.count("") / 4000 == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a {red|blue} star", {"a red star", "a blue star"}),
        ("{a|b} {c|d}", {"a c", "a d", "b c", "b d"}),
        ("{a|{b|c} d}", {"a", "b d", "c d"}),
        ("{{a|b}|c}", {"a", "b", "c"}),
        ("red, {|big}, star", {"red, star", "red, big, star"}),
        ("{red, hot|blue}, star", {"red, hot, star", "blue, star"}),
        ("{only}", {"only"}),
        ("{}", {""}),
        (r"\{a\|b\} {c|d\}}", {"{a|b} c", "{a|b} d}"}),
        ("a {b|c", {"a {b|c"}),
        ("a} {b|c}", {"a} b", "a} c"}),
        ("a|b", {"a|b"}),
        ("{a|{b", {"{a|{b"}),
    ],
)
def test_wildcards_mean_one_of_their_options(caption: str, expected: set[str]) -> None:
    assert set(many(caption, CaptionRules(wildcards=True), 100)) == expected
    assert set(many(caption, CaptionRules(), 3)) == {caption}


def test_deeply_nested_braces_take_no_time() -> None:
    deep = 20_000
    assert said("{" * deep + "a" + "}" * deep, CaptionRules(wildcards=True)) == "a"
    assert said("{" * deep, CaptionRules(wildcards=True)) == "{" * deep


@pytest.mark.parametrize(
    ("prefix", "suffix", "expected"),
    [
        ("a photo of", "", "pip, a photo of cat, sea"),
        ("anime style,", ", at night", "pip, anime style, cat, sea, at night"),
        (" oil on canvas, ", " in rain ", "pip, oil on canvas, cat, sea in rain"),
        ("portrait of pip,", "", "portrait of pip, cat, sea"),
    ],
)
def test_prefix_and_suffix_stand_as_they_were_written(prefix: str, suffix: str, expected: str) -> None:
    assert said("cat, sea", CaptionRules(trigger="pip", prefix=prefix, suffix=suffix)) == expected


def test_nothing_asked_means_nothing_changed() -> None:
    for caption in ("A photo of a dog , at the sea.", ",, a,b ,", "{a|b}", "日本, 犬", "a\\b"):
        assert said(caption, CaptionRules()) == caption
    assert said("", CaptionRules(trigger="pip", shuffle=True, tag_dropout=0.5, wildcards=True)) == "pip"
    assert said("", CaptionRules(suffix=", at night")) == "at night"


def test_another_separator_is_used_throughout() -> None:
    rules = CaptionRules(trigger="pip", shuffle=True, separator=";")
    assert set(many("a, b; c", rules)) == {"pip; a, b; c", "pip; c; a, b"}
    assert captions.tags(" a , b;; c;", separator=";") == ["a , b", "c"]
    assert captions.tags(" a , b,, ,c\n,") == ["a", "b", "c"]
    assert captions.tags("") == []


@given(
    alternatives=st.lists(st.text("ab,{|} p", max_size=12), min_size=1, max_size=3),
    rules=st.builds(
        CaptionRules, trigger=st.sampled_from(["", "p"]), shuffle=st.booleans(), keep_first=st.integers(0, 3),
        tag_dropout=st.sampled_from([0, 0.5, 1]), caption_dropout=st.sampled_from([0, 0.5, 1]), wildcards=st.booleans(),
        prefix=st.sampled_from(["", "x"]),
    ),
)  # fmt: skip
def test_what_does_not_vary_is_always_the_same(alternatives: list[str], rules: CaptionRules) -> None:
    heard = {captions.caption_at(alternatives, rules, seed=seed, epoch=epoch, index=3) for seed in (0, 1) for epoch in range(12)}
    assert captions.varies(alternatives, rules) or len(heard) == 1
    assert set(captions.variants(alternatives, rules, seed=0, epochs=range(12), indices=[3])) <= heard
    expected = [captions.caption_at(alternatives, rules, seed=0, epoch=epoch, index=i) for epoch in range(2) for i in (3, 9)]
    assert captions.variants(alternatives, rules, seed=0, epochs=range(2), indices=iter([3, 9])) == tuple(dict.fromkeys(expected))


def test_what_varies_is_known_beforehand() -> None:
    still = [
        (("a, b",), CaptionRules(trigger="pip", prefix="x", wildcards=True)),
        (("a", "a"), CaptionRules()),
        (("a, b",), CaptionRules(shuffle=True, keep_first=1)),
        (("pip, b",), CaptionRules(trigger="pip", shuffle=True)),
        (("pip",), CaptionRules(trigger="pip", tag_dropout=0.5)),
        (("{a|b}",), CaptionRules()),
    ]
    moving = [
        (("a", "b"), CaptionRules()),
        (("a, b",), CaptionRules(shuffle=True)),
        (("a",), CaptionRules(tag_dropout=0.5)),
        (("a",), CaptionRules(caption_dropout=0.05)),
        (("{{a|b}|c}",), CaptionRules(wildcards=True)),
    ]
    assert [captions.varies(*one) for one in still] == [False] * len(still)
    assert [captions.varies(*one) for one in moving] == [True] * len(moving)
    for alternatives, rules in moving:
        assert len(captions.variants(alternatives, rules, seed=0, epochs=range(100), indices=[0])) > 1


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_all_lines_are_one_caption_unless_they_are_alternatives(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"{mark}a red\tstar \r\n\r\n  at night\r\na red star\n".encode())
    assert captions.read_caption_file(path) == ("a red star at night a red star",)
    assert captions.read_caption_file(path, alternatives=True) == ("a red star", "at night")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty; write"),
        (b"\xef\xbb\xbf \n\t", "is empty; write"),
        ("a star".encode("utf-16"), "is not UTF-8 but UTF-16; save it anew as UTF-8"),
        ("a star".encode("utf-32"), "is not UTF-8 but UTF-32; save"),
        ("a star".encode("utf-16-le"), "is not text, it holds zero bytes"),
        ("ein M\u00e4dchen".encode("cp1252"), "is not UTF-8 but probably Windows-1252, byte 6 is 0xE4; save"),
        ("a \u201cstar\u201d".encode("cp1252"), "is not UTF-8 but probably Windows-1252, byte 3 is 0x93"),
        ("赤い星".encode("shift_jis"), "is not UTF-8 but probably Shift-JIS, byte 1 is 0x90"),
        ("红色的星星".encode("gb18030"), "is not UTF-8 but probably GB 18030, byte 1 is 0xBA"),
        ("a st\u00e4r".encode()[:5], "is not UTF-8 but probably Windows-1252, byte 5 is 0xC3"),
        (b"a" * 100_001, r"has 100,001 bytes, at most 100,000 are read; it should hold"),
    ],
    ids=["nothing", "white", "utf16", "utf32", "utf16-unmarked", "cp1252", "quotes", "shift-jis", "gb18030", "cut", "long"],
)
def test_a_caption_file_that_cannot_be_read_is_named_with_what_it_is(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"^Caption .*a\.txt {sentence}"):
        captions.read_caption_file(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == content


def test_a_missing_caption_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt cannot be read \(No such file"):
        captions.read_caption_file(tmp_path / "none.txt")


def test_a_caption_lies_beside_its_picture_as_txt_or_else_as_caption(tmp_path: Path) -> None:
    picture = tmp_path / "a.v2.png"
    assert captions.caption_path(picture) is None
    (tmp_path / "a.v2.caption").write_text("of another tool")
    assert captions.caption_path(picture) == tmp_path / "a.v2.caption"
    (tmp_path / "a.v2.txt").write_text("a star")
    assert captions.caption_path(picture) == tmp_path / "a.v2.txt"
