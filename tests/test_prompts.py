r"""A prompt's syntax: weights, escapes, breaks and LoRA tags are read as A1111 describes them, and nothing makes the reader fail."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlora import prompts
from sdlora.prompts import Piece, Tag


def said(words: str) -> list[list[tuple[str, float]]]:
    """Pieces with weights rounded, because 1.1 · 1.1 is not 1.21 in floats."""
    return [[(piece.words, round(piece.weight, 6)) for piece in part] for part in prompts.pieces(words)]


# the first nine are the examples in the docstring of A1111's own parser
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("(a:1.2", [("a:1.2", 1.1)]),
        ("a:1.2) b", [("a:1.2) b", 1.0)]),
        ("[[a]]", [("a", 0.826446)]),
        ("((a))", [("a", 1.21)]),
        ("([a])", [("a", 1.0)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3.0), (" c", 1.5)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:-1)", [("a", -1.0)]),
        ("(a:+.5)", [("a", 0.5)]),
        ("(a:0)", [("a", 0.0)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        ("[a:1.3]", [("a:1.3", 0.909091)]),
        ("a)b", [("a)b", 1.0)]),
        ("a]b", [("a]b", 1.0)]),
        ("(a]b)", [("a]b", 1.1)]),
        ("[a", [("a", 0.909091)]),
        ("((a)", [("a", 1.21)]),
        ("()", [("", 1.0)]),
        ("", [("", 1.0)]),
        (r"saber \(fate\)", [("saber (fate)", 1.0)]),
        (r"(saber \(fate\):1.2)", [("saber (fate)", 1.2)]),
        (r"a\\b", [("a\\b", 1.0)]),
        (r"a\b", [("a\\b", 1.0)]),
        ("a\\", [("a\\", 1.0)]),
        (r"\(a)", [("(a)", 1.0)]),
        ("(한국어:1.4), 猫", [("한국어", 1.4), (", 猫", 1.0)]),
        ("time 12:30", [("time 12:30", 1.0)]),
    ],
)  # fmt: skip
def test_weights(words: str, expected: list[tuple[str, float]]) -> None:
    assert said(words) == [expected]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a BREAK b", [[("a", 1.0)], [("b", 1.0)]]),
        ("a\nBREAK\nb BREAK c", [[("a", 1.0)], [("b", 1.0)], [("c", 1.0)]]),
        ("BREAK a", [[("", 1.0)], [("a", 1.0)]]),
        ("a BREAK", [[("a", 1.0)], [("", 1.0)]]),
        ("BREAKFAST at OUTBREAK", [[("BREAKFAST at OUTBREAK", 1.0)]]),
        ("break", [[("break", 1.0)]]),
        ("(a BREAK b:1.3) c", [[("a", 1.3)], [("b", 1.3), (" c", 1.0)]]),
        ("(a) BREAK [b]", [[("a", 1.1)], [("b", 0.909091)]]),
    ],
)
def test_breaks(words: str, expected: list[list[tuple[str, float]]]) -> None:
    assert said(words) == expected


@pytest.mark.parametrize(
    ("prompt", "tag"),
    [
        ("<lora:a>", Tag("a")),
        ("<lora:a:0.8>", Tag("a", 0.8, 0.8)),
        ("<lora:a:-0.5>", Tag("a", -0.5, -0.5)),
        ("<lora:a:0.3:0.7>", Tag("a", 0.7, 0.3)),
        ("<lora:a:te=0.3>", Tag("a", 0.3, 0.3)),
        ("<lora:a:unet=0.7>", Tag("a", 0.7, 1.0)),
        ("<lora:a:te=0.3:unet=0.7>", Tag("a", 0.7, 0.3)),
        ("<lora:a:0.5:unet=0.7>", Tag("a", 0.7, 0.5)),
        ("<lora:a:0.5:dyn=4>", Tag("a", 0.5, 0.5)),
        ("<lyco:a:0.5>", Tag("a", 0.5, 0.5)),
        ("<lora:my file (v1.0):1>", Tag("my file (v1.0)")),
        ("<lora:a:0.2@0,1@0.5>", Tag("a", 1.0, 1.0, ((0.0, 0.2), (0.5, 1.0)))),
        ("<lora:a:0.2@0, 1@0.5>", Tag("a", 1.0, 1.0, ((0.0, 0.2), (0.5, 1.0)))),
        ("<lora:a:0.4:1@0.5,0.2@0>", Tag("a", 1.0, 0.4, ((0.0, 0.2), (0.5, 1.0)))),
        ("<lora:a:te=0:unet=1@0,0@1>", Tag("a", 0.0, 0.0, ((0.0, 1.0), (1.0, 0.0)))),
    ],
)
def test_lora_tags(prompt: str, tag: Tag) -> None:
    assert prompts.read(f"a cat {prompt}, red") == prompts.Prompt("a cat, red", (tag,))
    assert prompts.read(prompts.tag_text(tag)).tags == (tag,)


@pytest.mark.parametrize(
    "tag",
    [
        "<lora:a:x>", "<lora:a:>", "<lora: :1>", "<lora:a:1@2>", "<lora:a:1@0,2>", "<lora:a:1@0,2@0>", "<lora:a:nan>", "<lora:a:1e3>",
        "<hypernet:b:1>", "<wildcard:x>", "<lora:a:unet=loud>",
    ],
)  # fmt: skip
def test_a_tag_that_says_nothing_is_told_of_and_not_spoken(tag: str) -> None:
    assert prompts.read(f"a {tag} b") == prompts.Prompt("a b", (), (tag,))


def test_what_only_looks_like_a_tag_stays() -> None:
    for prompt in ("a < b", "<b>bold</b>", "<lora>", "<lora:a", "<:a>", "lora:a:1>"):
        assert prompts.read(prompt) == prompts.Prompt(prompt)


def test_several_tags_are_read_in_their_order() -> None:
    read = prompts.read("<lora:b:1> a <lora:a:0.5><lora:b:2>")
    assert ([tag.name for tag in read.tags], read.words) == (["b", "a", "b"], " a")


def test_a_course_goes_in_straight_lines_between_its_points() -> None:
    course = prompts.course_of("0.2@0.25, 1@0.5, 0@1")
    shares = [0, 0.25, 0.375, 0.5, 0.75, 1]
    assert [round(prompts.strength_at(course, share), 9) for share in shares] == [0.2, 0.2, 0.6, 1.0, 0.5, 0.0]
    assert prompts.strength_at(prompts.course_of("0.7"), 0.9) == 0.7


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab ()[]\\:.<>@,=-+1209BREAKlora\n\0\ud800é", max_size=60))
def test_nothing_makes_the_reader_fail_and_nothing_is_lost(prompt: str) -> None:
    read = prompts.read(prompt)
    spoken = "".join(piece.words for part in prompts.pieces(read.words) for piece in part)
    assert sum(letter.isalnum() for letter in spoken) <= sum(letter.isalnum() for letter in read.words)
    assert prompts.pieces(prompts.escaped(read.words.replace("BREAK", ""))) == ((Piece(read.words.replace("BREAK", "")),),)
    for tag in read.tags:
        assert prompts.read(prompts.tag_text(tag)).tags == (tag,)
