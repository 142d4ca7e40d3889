"""Text: our states are diffusers' states, nothing of a long prompt is lost, and a textual inversion's word means its vectors."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from sdlora import base_model, lora, text, text_embeddings
from sdlora.base_model import Base, TextStates
from sdlora.errors import UserError
from sdlora.mini import world
from tests.tiny_families import make_folder

FAMILIES = ("sd1", "sd2", "sdxl")
PROMPTS = ["a red star on a blue background", "", "Café déjà-vu, 你好 🎨 ÆØÅ ẞ!\n\t x", "hello! (a:1.2) 100%", " ".join(["star"] * 75)]
WORDS = [*world.COLOURS, "star", "cup"] * 20  # one token each


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_folder(family, tmp_path_factory.mktemp("text") / family) for family in FAMILIES}


@pytest.fixture
def opened(folders: dict[str, Path]) -> Callable[[str], tuple[Any, Base]]:
    """Opens a family twice over: a pipeline for diffusers, and a base with modules of its own, equal in every weight."""
    return lambda family: (pipeline(family, folders[family]), as_base(family, pipeline(family, folders[family])))


def pipeline(family: str, folder: Path) -> Any:
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipe = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for encoder in encoders(pipe):
        encoder.requires_grad_(False)
        norm = getattr(encoder, "text_model", encoder).final_layer_norm  # a fresh norm of a normed state would change nothing
        norm.weight.copy_(torch.linspace(0.5, 2, len(norm.weight)))
        norm.bias.copy_(torch.linspace(-1, 1, len(norm.bias)))
    return pipe


def encoders(pipe: Any) -> tuple[Any, ...]:
    return tuple(getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None)


def as_base(family: str, pipe: Any) -> Base:
    tokenizers = tuple(getattr(pipe, name) for name in ("tokenizer", "tokenizer_2") if getattr(pipe, name, None) is not None)
    skip = 2 if family == "sdxl" else 1
    return Base("tiny", family, pipe.unet, pipe.vae, encoders(pipe), tokenizers, "epsilon", {}, (), clip_skip=skip)


def states(base: Base, prompts: list[str]) -> TextStates:
    return text.encode(base, text.tokens(base, prompts))


@torch.no_grad()
def diffusers_states(pipe: Any, prompts: list[str], clip_skip: int | None = None) -> TextStates:
    """The pipeline's own `encode_prompt`; its `clip_skip` is one less than A1111's, and in SDXL two less."""
    answer = pipe.encode_prompt(prompts, "cpu", 1, False, clip_skip=clip_skip) if len(encoders(pipe)) == 1 else None
    if answer is not None:
        return TextStates(answer[0])
    context, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False, clip_skip=clip_skip)
    return TextStates(context, pooled)


def assert_equal(ours: TextStates, theirs: TextStates) -> None:
    torch.testing.assert_close(ours.context, theirs.context, rtol=0, atol=1e-5)
    assert (ours.pooled is None) == (theirs.pooled is None)
    if ours.pooled is not None:
        torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_diffusers(family: str, opened: Callable[[str], tuple[Any, Base]]) -> None:
    pipe, base = opened(family)
    assert_equal(states(base, PROMPTS), diffusers_states(pipe, PROMPTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_clip_skip_is_that_of_diffusers(family: str, opened: Callable[[str], tuple[Any, Base]]) -> None:
    """diffusers asks SD 1.x's encoder for a `text_model` that transformers has taken away; here the encoder gets it back for the asking."""
    pipe, base = opened(family)
    plain = states(base, PROMPTS).context
    base.clip_skip += 1
    skipped = states(base, PROMPTS)
    if family != "sdxl":
        object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    assert_equal(skipped, diffusers_states(pipe, PROMPTS, clip_skip=1))
    assert (plain - skipped.context).abs().max() > 0.01


def test_sdxl_listens_to_the_last_layer_without_its_norm_when_told_so(opened: Callable[[str], tuple[Any, Base]]) -> None:
    pipe, base = opened("sdxl")
    base.clip_skip = 1
    assert_equal(states(base, PROMPTS), diffusers_states(pipe, PROMPTS, clip_skip=-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_skip_beyond_the_first_layer_is_refused(family: str, opened: Callable[[str], tuple[Any, Base]]) -> None:
    _, base = opened(family)
    base.clip_skip = 3
    states(base, ["a"])
    base.clip_skip = 4
    with pytest.raises(UserError, match=r"Clip skip 4 is not one of the layers 1 \(the last\) to 3"):
        states(base, ["a"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_prompt_is_the_states_of_its_pieces_end_to_end(family: str, opened: Callable[[str], tuple[Any, Base]]) -> None:
    pipe, base = opened(family)
    long, short = " ".join(WORDS[:160]), "a red star"
    pieces = [" ".join(WORDS[start:stop]) for start, stop in ((0, 75), (75, 150), (150, 160))]
    ours = states(base, [long, short])
    theirs = [diffusers_states(pipe, [prompt]) for prompt in [*pieces, short, "", ""]]
    expected = torch.stack([torch.cat([one.context[0] for one in theirs[start : start + 3]]) for start in (0, 3)])
    firsts = None if theirs[0].pooled is None else torch.cat([theirs[i].pooled for i in (0, 3)])  # type: ignore[misc]
    assert_equal(ours, TextStates(expected, firsts))


# Each chunk as (words, weight) pieces, one token a word: what the prompt before it must be read as.
WEIGHTED = [
    ("a (red:1.5) star", [[("a", 1), ("red", 1.5), ("star", 1)]]),
    ("a [red] ((star))", [[("a", 1), ("red", 1 / 1.1), ("star", 1.1 * 1.1)]]),
    ("a red BREAK (star:0.5)", [[("a red", 1)], [("star", 0.5)]]),
    ("BREAK (a:2) BREAK", [[], [("a", 2)]]),
    (
        f"({' '.join(WORDS[:80])}:1.2) star",
        [[(" ".join(WORDS[:75]), 1.2)], [(" ".join(WORDS[75:80]), 1.2), ("star", 1)]],
    ),
    (f"{' '.join(WORDS[:75])} BREAK (star)", [[(" ".join(WORDS[:75]), 1)], [("star", 1.1)]]),
]  # fmt: skip


def chunk_alone(base: Base, place: int, pieces: list[tuple[str, float]]) -> Tensor:
    """One chunk's states [77, D] by the transformers model alone, weighted, with its mean restored where it has one."""
    tokenizer, encoder = base.tokenizers[place], base.text_encoders[place]
    words = [(word, weight) for text_, weight in pieces for word in text_.split()]
    ids = tokenizer([" ".join(word for word, _ in words)], padding="max_length", max_length=77, return_tensors="pt").input_ids
    answer = encoder(ids, output_hidden_states=True)
    states = answer.hidden_states[-2] if base.family == "sdxl" else answer.last_hidden_state
    weights = torch.tensor([1.0, *(weight for _, weight in words), *[1.0] * (76 - len(words))])
    loud = states[0] * weights[:, None]
    has_mean = bool(states.mean().abs() >= 0.01 * states.std())
    return loud * (states.mean() / loud.mean()) if has_mean and bool((weights != 1).any()) else loud


@pytest.mark.parametrize("offset", [0.5, 0.0], ids=["a mean", "hardly a mean"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_weights_and_breaks_are_those_of_each_chunk_alone(family: str, offset: float, opened: Callable[[str], tuple[Any, Base]]) -> None:
    _, base = opened(family)
    for encoder in base.text_encoders:
        inner = getattr(encoder, "text_model", encoder)
        inner.final_layer_norm.bias.add_(offset)
        inner.embeddings.position_embedding.weight.add_(offset)  # SDXL listens before the norm
    for prompt, chunks in WEIGHTED:
        ours = text.encode(base, text.weighted(base, [prompt]))
        expected = [torch.cat([chunk_alone(base, place, chunk) for chunk in chunks]) for place in range(len(base.text_encoders))]
        torch.testing.assert_close(ours.context[0], torch.cat(expected, dim=-1), rtol=0, atol=2e-5)
        if ours.pooled is not None:  # the first chunk's sentence, without weights
            plain = text.encode(base, text.tokens(base, [" ".join(words for words, _ in chunks[0])]))
            torch.testing.assert_close(ours.pooled, plain.pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_without_weights_is_the_same_bytes_as_its_plain_text(family: str, opened: Callable[[str], tuple[Any, Base]]) -> None:
    _, base = opened(family)
    for prompt in ("a red star", "", "hello! 100%, a:b", " ".join(WORDS[:80])):
        assert torch.equal(text.encode(base, text.weighted(base, [prompt])).context, states(base, [prompt]).context)
    escaped = text.weighted(base, [r"a \(red\) star"])
    assert torch.equal(escaped.ids[0], text.tokens(base, ["a (red) star"]).ids[0])
    assert escaped.weights == ()


def test_prompts_of_one_batch_do_not_change_each_other(opened: Callable[[str], tuple[Any, Base]]) -> None:
    _, base = opened("sd1")
    both = text.weighted(base, ["a (red:1.5) star BREAK a cup", "a fish"])
    assert both.ids[0].shape == (2, 2, 77)
    assert torch.equal(both[[1]].weights[0], torch.ones(1, 2, 77))
    padded = text.encode(base, text.tokens(base, ["a fish"], chunks=2)).context
    torch.testing.assert_close(text.encode(base, both).context[1:], padded, rtol=0, atol=1e-6)


def test_clip_skip_can_be_another_than_the_bases(opened: Callable[[str], tuple[Any, Base]]) -> None:
    _, base = opened("sd1")
    asked = text.encode(base, text.tokens(base, ["a"]), clip_skip=2).context
    base.clip_skip = 2
    assert torch.equal(asked, states(base, ["a"]).context)
    with pytest.raises(UserError, match="Clip skip 9 is not one of"):
        text.encode(base, text.tokens(base, ["a"]), clip_skip=9)


def test_no_token_is_dropped_and_none_is_invented(opened: Callable[[str], tuple[Any, Base]]) -> None:
    _, base = opened("sdxl")
    begin, end = base.tokenizers[0].bos_token_id, base.tokenizers[0].eos_token_id
    for length, chunks in ((0, 1), (1, 1), (74, 1), (75, 1), (76, 2), (150, 2), (151, 3)):
        prompt = " ".join(WORDS[:length])
        assert text.count(base, prompt) == length
        assert text.chunk_count(base, ["a", prompt]) == chunks
        wanted = [base.tokenizers[0].convert_tokens_to_ids(f"{word}</w>") for word in WORDS[:length]]
        for ids, padding in zip(text.tokens(base, [prompt]).ids, (end, 0), strict=True):
            assert ids.shape == (1, chunks, 77)
            for i, row in enumerate(ids[0].tolist()):
                inside = wanted[75 * i : 75 * (i + 1)]
                assert row == [begin, *inside, end, *[padding] * (75 - len(inside))]


def test_a_batch_gets_the_chunks_of_its_longest_or_as_many_as_asked_for(opened: Callable[[str], tuple[Any, Base]]) -> None:
    _, base = opened("sd1")
    longest = " ".join(WORDS[:80])
    read = text.tokens(base, ["a", longest])
    assert torch.equal(text.tokens(base, ["a"], chunks=2).ids[0], read[[0]].ids[0])
    assert torch.equal(read[[1, 0]].ids[0], read.ids[0].flip(0))
    assert text.tokens(base, []).ids[0].shape == (0, 1, 77)
    with pytest.raises(UserError, match="is 80 tokens long, which takes 2 chunks of 75, and there is room for 1; shorten it"):
        text.tokens(base, ["a", longest], chunks=1)


@pytest.mark.parametrize(("family", "skip"), [("sd1", 1), ("sd1", 2), ("sd2", 1), ("sdxl", 2)])
def test_gradients_reach_the_lora_of_every_layer_that_is_listened_to(
    family: str, skip: int, opened: Callable[[str], tuple[Any, Base]]
) -> None:
    _, base = opened(family)
    base.clip_skip = skip
    assert not states(base, ["a"]).context.requires_grad
    for encoder in base.text_encoders:
        targets = base_model.targets("attn-mlp", part="text_encoder")
        names = lora.add(encoder, rank=2, alpha=2, targets=targets, generator=torch.Generator().manual_seed(0))
        assert len(names) == 3 * 6
    answer = states(base, ["a red star", " ".join(WORDS[:80])])
    (answer.context.square().sum() + (0 if answer.pooled is None else answer.pooled.square().sum())).backward()
    for place, encoder in enumerate(base.text_encoders):
        heard = {name for name, layer in lora.layers(encoder).items() if any(has_gradient(one.up) for one in layer.each_adapter())}
        deaf = {name for name in lora.layers(encoder) if skip == 2 and place == 0 and "layers.2." in name}
        assert heard == set(lora.layers(encoder)) - deaf  # SDXL's second encoder is heard to its end by the pooled sentence


def has_gradient(weight: Tensor) -> bool:
    return weight.grad is not None and bool(weight.grad.abs().sum() > 0)


def vectors(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.1


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    safetensors.torch.save_file(tensors, path)
    return path


PROMPT = "a red sdl-thing on a blue background, sdl-thing!"
LAYOUTS = {
    "A1111, three vectors": {"emb_params": vectors(3, 192)},
    "A1111, one vector": {"emb_params": vectors(1, 192)},
    "the paper's placeholder, half precision": {"*": vectors(2, 192).half()},
    "diffusers, a row": {"sdl-thing": vectors(1, 192)[0]},
    "diffusers, three vectors": {"sdl-thing": vectors(3, 192)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_word_of_a_textual_inversion_means_what_it_means_in_diffusers(
    layout: str, tmp_path: Path, opened: Callable[[str], tuple[Any, Base]]
) -> None:
    pipe, base = opened("sd1")
    before = states(base, PROMPTS)
    path = saved(tmp_path / "sdl-thing.safetensors", LAYOUTS[layout])
    assert text_embeddings.load(base, path) == "sdl-thing"
    (table,) = LAYOUTS[layout].values()
    pipe.load_textual_inversion({"sdl-thing": table.float()})
    assert_equal(states(base, [PROMPT]), diffusers_states(pipe, [PROMPT]))
    assert_equal(states(base, PROMPTS), before)
    assert not base.text_encoders[0].get_input_embeddings().weight.requires_grad


def test_a_word_of_sdxl_means_its_vectors_in_both_encoders(tmp_path: Path, opened: Callable[[str], tuple[Any, Base]]) -> None:
    pipe, base = opened("sdxl")
    tables = {"clip_g": vectors(2, 256), "clip_l": vectors(2, 192)}
    assert text_embeddings.load(base, saved(tmp_path / "x.safetensors", tables), word="sdl-thing") == "sdl-thing"
    for name, key in (("", "clip_l"), ("_2", "clip_g")):
        parts = {"text_encoder": getattr(pipe, f"text_encoder{name}"), "tokenizer": getattr(pipe, f"tokenizer{name}")}
        pipe.load_textual_inversion({"sdl-thing": tables[key]}, **parts)
    assert_equal(states(base, [PROMPT]), diffusers_states(pipe, [PROMPT]))


def test_the_sentence_ends_at_its_end_token_though_a_loaded_word_has_a_higher_id(
    tmp_path: Path, opened: Callable[[str], tuple[Any, Base]]
) -> None:
    """The config of SDXL's second encoder names a wrong end token, and transformers then looks for the highest id."""
    pipe, base = opened("sdxl")
    base.text_encoders[1].text_model.eos_token_id = 2
    assert_equal(states(base, PROMPTS), diffusers_states(pipe, PROMPTS))
    path = saved(tmp_path / "sdl-thing.safetensors", {"clip_g": vectors(2, 256), "clip_l": vectors(2, 192)})
    text_embeddings.load(base, path)
    wrong = states(base, [PROMPT]).pooled
    base.text_encoders[1].text_model.eos_token_id = base.tokenizers[1].eos_token_id
    right = base.text_encoders[1](text.tokens(base, [PROMPT]).ids[1][:, 0]).text_embeds
    torch.testing.assert_close(wrong, right, rtol=0, atol=1e-5)


def test_a_loaded_word_counts_its_vectors_in_any_case_and_only_as_a_whole_word(
    tmp_path: Path, opened: Callable[[str], tuple[Any, Base]]
) -> None:
    _, base = opened("sd1")
    spelled = text.count(base, "sdlthings")
    text_embeddings.load(base, saved(tmp_path / "SdlThing.safetensors", {"emb_params": vectors(40, 192)}))
    assert [text.count(base, prompt) for prompt in ("SdlThing", "a sdlthing, red", "sdlthings")] == [40, 43, spelled]
    assert text.chunk_count(base, ["sdlthing sdlthing"]) == 2
    text_embeddings.load(base, saved(tmp_path / "x.safetensors", {"<s0>": vectors(2, 192, 1)}))
    assert text.count(base, "a<s0><s0>") == 5


def test_the_same_file_again_changes_nothing_and_another_under_its_word_is_refused(
    tmp_path: Path, opened: Callable[[str], tuple[Any, Base]]
) -> None:
    _, base = opened("sd1")
    path = saved(tmp_path / "sdl-thing.safetensors", {"emb_params": vectors(2, 192)})
    text_embeddings.load(base, path)
    tokenizers, weight = base.tokenizers, base.text_encoders[0].get_input_embeddings().weight
    assert text_embeddings.load(base, path) == "sdl-thing"
    for other in (vectors(2, 192, 1), vectors(3, 192)):
        with pytest.raises(UserError, match="'sdl-thing', which has a meaning in the base 'tiny' already; give it another word"):
            text_embeddings.load(base, saved(path, {"emb_params": other}))
    assert base.tokenizers is tokenizers
    assert base.text_encoders[0].get_input_embeddings().weight is weight
    assert text_embeddings.load(base, path, word="sdl-other") == "sdl-other"
    assert text.count(base, "sdl-thing sdl-other") == 5


def test_another_base_with_the_same_tokenizer_never_hears_of_the_word(tmp_path: Path, opened: Callable[[str], tuple[Any, Base]]) -> None:
    _, base = opened("sd1")
    other = dataclasses.replace(base)
    before = text.tokens(other, [PROMPT]).ids[0]
    text_embeddings.load(base, saved(tmp_path / "sdl-thing.safetensors", {"emb_params": vectors(2, 192)}))
    assert torch.equal(text.tokens(other, [PROMPT]).ids[0], before)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("star", "has a meaning in the base 'tiny' already"),
        ("st", "has a meaning in the base 'tiny' already"),
        ("<|endoftext|>", "has a meaning in the base 'tiny' already"),
        ("<|endoftext|>x", "cannot be written in a prompt"),
        ("  ", "cannot be written in a prompt"),
        ("a\nb", "cannot be written in a prompt"),
    ],
)
def test_a_word_that_the_base_uses_or_nobody_can_write_is_refused(
    word: str, sentence: str, tmp_path: Path, opened: Callable[[str], tuple[Any, Base]]
) -> None:
    _, base = opened("sd1")
    tokenizers, table = base.tokenizers, base.text_encoders[0].get_input_embeddings().weight
    with pytest.raises(UserError, match=sentence):
        text_embeddings.load(base, saved(tmp_path / "x.safetensors", {"emb_params": vectors(2, 192)}), word=word)
    assert base.tokenizers is tokenizers
    assert base.text_encoders[0].get_input_embeddings().weight is table


@pytest.mark.parametrize(
    ("tensors", "made_for"),
    [
        ({"emb_params": vectors(2, 768)}, r"Stable Diffusion 1\.x \(vectors 768 wide\)"),
        ({"emb_params": vectors(2, 1024)}, r"Stable Diffusion 2\.x \(vectors 1024 wide\)"),
        ({"clip_g": vectors(2, 1280), "clip_l": vectors(2, 768)}, r"Stable Diffusion XL \(vectors 768 and 1280 wide\)"),
        ({"emb_params": vectors(2, 100)}, r"a model unknown here \(vectors 100 wide\)"),
    ],
)
def test_an_embedding_of_another_family_is_refused_by_name(
    tensors: dict[str, Tensor], made_for: str, tmp_path: Path, opened: Callable[[str], tuple[Any, Base]]
) -> None:
    _, base = opened("sd2")
    sentence = rf"was made for {made_for}, and the base 'tiny' is Stable Diffusion 2\.x \(256 wide\); load it"
    with pytest.raises(UserError, match=sentence):
        text_embeddings.load(base, saved(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({}, r"holds 0 tensors \(nothing\)"),
        ({"clip_g": vectors(1, 8)}, r"holds 1 tensors \('clip_g'\); a textual inversion holds"),
        ({"lora_unet_x.alpha": vectors(1, 1), "lora_unet_x.lora_up.weight": vectors(2, 2)}, r"holds 2 tensors \('lora_unet_x.alpha'"),
        ({"clip_l": vectors(1, 8), "clip_g": vectors(2, 9)}, r"holds \[1, 8\] of float32 and \[2, 9\] of float32"),
        ({"emb_params": torch.ones(2, 8, dtype=torch.int64)}, r"holds \[2, 8\] of int64; a textual inversion holds \[vectors, width\]"),
        ({"emb_params": torch.ones(0, 8)}, r"holds \[0, 8\] of float32"),
        ({"emb_params": torch.ones(2, 2, 2)}, r"holds \[2, 2, 2\] of float32"),
        ({"emb_params": torch.full((1, 8), torch.nan)}, "holds NaN or infinity"),
    ],
)
def test_a_file_that_is_no_textual_inversion_gets_one_sentence(tensors: dict[str, Tensor], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        text_embeddings.read(saved(tmp_path / "x.safetensors", tensors))


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 and more")
        with pytest.raises(UserError, match="is a pickle"):
            text_embeddings.read(tmp_path / name)
