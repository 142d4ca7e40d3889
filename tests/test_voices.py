"""LoRAs in a base: their sum is that of their deltas in any order and format, strengths follow their course, and memory stays flat."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdlora import base_files, base_model, files, generate, lora, lora_file, voices
from sdlora.base_model import Base
from sdlora.deltas import Full, Hadamard, Kronecker, LowRank, Update
from sdlora.errors import UserError
from sdlora.generate import LoRA, Moment, Request
from sdlora.lora_adapters import Fixed

REQUEST = Request("a red star", seed=3, steps=4, guidance=3.0)
Made = tuple[Update, Tensor]  # what a file holds of a module, and the ΔW that it means


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)


def weights(base: Base) -> dict[str, Tensor]:
    """All weights that a LoRA can change, by stem."""
    return {
        stem: lora.base_weight(module.base if isinstance(module := base.parts[part].get_submodule(name), lora.LoRALayer) else module)
        .detach()
        .clone()
        for stem, (part, name) in base_model.stems(base).items()
    }


def low_rank(weight: Tensor, draw: Callable[..., Tensor]) -> Made:
    down, up = draw(3, *weight.shape[1:]), draw(weight.shape[0], 3, *[1] * (weight.ndim - 2))
    return Update(LowRank(down, up, 1.5)), 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def hadamard(weight: Tensor, draw: Callable[..., Tensor]) -> Made:
    rows, columns = weight.shape[0], weight[0].numel()
    a, b, c, d = draw(rows, 2), draw(2, columns), draw(rows, 2), draw(2, columns)
    return Update(Hadamard(a, b, c, d, 1.0)), 0.5 * ((a @ b) * (c @ d)).reshape(weight.shape)


def kronecker(weight: Tensor, draw: Callable[..., Tensor]) -> Made:
    rows, columns = weight.shape[:2]
    first, second = draw(2, 2), draw(rows // 2, columns // 2)
    return Update(Kronecker(first, second, 1.0)), torch.kron(first, second)


def full(weight: Tensor, draw: Callable[..., Tensor]) -> Made:
    change = draw(*weight.shape)
    return Update(Full(change)), change


def dora(weight: Tensor, draw: Callable[..., Tensor]) -> Made:
    update, change = low_rank(weight, draw)
    length = (weight + change).flatten(1).norm(dim=1)
    magnitude = length * (1 + 0.1 * draw(len(length)).sign())
    shape = (-1, *[1] * (weight.ndim - 1))
    return replace(update, magnitude=magnitude.reshape(shape)), (weight + change) * (magnitude / length).reshape(shape) - weight


FORMS: list[tuple[str, Callable[[Tensor, Callable[..., Tensor]], Made], str, torch.dtype, Callable[[str, Tensor], bool]]] = [
    ("kohya", low_rank, "kohya", torch.float32, lambda stem, weight: "attn" in stem),
    ("half", low_rank, "kohya", torch.float16, lambda stem, weight: "attn" in stem),
    ("bfloat", low_rank, "kohya", torch.bfloat16, lambda stem, weight: "attn2" in stem),
    ("diffusers", low_rank, "diffusers", torch.float32, lambda stem, weight: "attn" in stem),
    ("convolutions", low_rank, "kohya", torch.float32, lambda stem, weight: weight.ndim == 4),
    ("text", low_rank, "kohya", torch.float32, lambda stem, weight: stem.startswith("lora_te")),
    ("loha", hadamard, "kohya", torch.float32, lambda stem, weight: "attn" in stem),
    ("lokr", kronecker, "kohya", torch.float32, lambda stem, weight: "attn1" in stem and not any(side % 2 for side in weight.shape)),
    ("full", full, "kohya", torch.float32, lambda stem, weight: "ff" in stem),
    ("dora", dora, "kohya", torch.float32, lambda stem, weight: "attn" in stem),
]


def write(base: Base, path: Path, number: int) -> dict[str, Tensor]:
    """A file of one of the forms; the ΔW that each of its modules means, as it was rounded."""
    _, make, layout, dtype, wanted = FORMS[number]
    generator = torch.Generator().manual_seed(number)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).to(dtype).float()

    made = {stem: make(weight, draw) for stem, weight in weights(base).items() if weight.ndim > 1 and wanted(stem, weight)}
    files.write(path, lora_file.to_bytes({stem: one for stem, (one, _) in made.items()}, {}, family="sd1", dtype=dtype, layout=layout))
    return {stem: change for stem, (_, change) in made.items()}


def test_ten_files_of_mixed_formats_are_the_sum_of_their_deltas(base: Base, tmp_path: Path) -> None:
    pristine = weights(base)
    expected = {stem: weight.double() for stem, weight in pristine.items()}
    loras = []
    for number, form in enumerate(FORMS):
        strength, text_strength = 0.3 + 0.1 * number, -0.7 + 0.1 * number
        path = tmp_path / f"{form[0]}.safetensors"
        for stem, change in write(base, path, number).items():
            expected[stem] += change.double() * (text_strength if stem.startswith("lora_te") else strength)
        loras.append(LoRA(path, strength, text_strength))
    generate.set_loras(base, loras)
    for stem, weight in weights(base).items():
        torch.testing.assert_close(weight.double(), expected[stem], rtol=0, atol=2e-5, msg=stem)
    assert sum(not torch.equal(pristine[stem].double(), expected[stem]) for stem in pristine) > 60
    generate.set_loras(base, [])
    assert all(torch.equal(weight, pristine[stem]) for stem, weight in weights(base).items())


def test_the_sum_does_not_hang_on_what_was_drawn_before(base: Base, tiny_base: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, number in zip(paths, (0, 3, 9), strict=True):
        write(base, path, number)
    loras = [LoRA(path, 0.7) for path in paths]
    generate.set_loras(base, loras[::-1])
    generate.set_loras(base, [loras[1]])
    generate.set_loras(base, loras)
    fresh = base_files.load(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    generate.set_loras(fresh, loras)
    assert all(torch.equal(weight, weights(fresh)[stem]) for stem, weight in weights(base).items())


def adapters(base: Base) -> set[str]:
    return {name for part in base.parts.values() for layer in lora.layers(part).values() for name in layer.adapters}


def test_after_a_hundred_loads_only_the_last_few_are_in_memory(base: Base, tmp_path: Path) -> None:
    modules = {stem: low_rank(weight, lambda *shape: torch.ones(shape))[0] for stem, weight in weights(base).items() if "attn1" in stem}
    held, kept = [], LoRA(tmp_path / "0.safetensors", 0.5)
    for number in range(100):
        path = tmp_path / f"{number}.safetensors"
        files.write(path, lora_file.to_bytes(modules, {}, family="sd1"))
        generate.set_loras(base, list(dict.fromkeys([kept, LoRA(path, 0.5)])))
        if number in (20, 99):
            gc.collect()
            held.append(sum(type(thing) is Fixed for thing in gc.get_objects()))
    assert len(adapters(base)) == voices.SILENT + 2
    assert held[0] == held[1]


def test_a_file_that_does_not_fit_leaves_the_base_as_it_was(base: Base, tmp_path: Path) -> None:
    pristine = weights(base)
    write(base, tmp_path / "good.safetensors", 0)
    foreign = {"lora_unet_down_blocks_7_attentions_0_proj_in": Update(LowRank(torch.zeros(2, 5), torch.zeros(5, 2), 2.0))}
    files.write(tmp_path / "foreign.safetensors", lora_file.to_bytes(foreign, {}, family="sd1"))
    with pytest.raises(UserError, match="does not fit base"):
        generate.set_loras(base, [LoRA(tmp_path / "good.safetensors"), LoRA(tmp_path / "foreign.safetensors")])
    assert all(torch.equal(weight, pristine[stem]) for stem, weight in weights(base).items())


def test_a_course_changes_the_weights_between_the_steps_and_only_then(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    changes = write(base, path, 0)
    pristine = weights(base)
    one = LoRA(path, 1.0, 0.5, course=((0.0, 0.0), (0.5, 1.0)))
    generate.set_loras(base, [one])
    folds = []
    folded = lora.fold
    monkeypatch.setattr(lora, "fold", lambda model, **where: (folds.append(model), folded(model, **where)))
    monkeypatch.setattr(lora_file, "read", lambda path: pytest.fail("read again"))
    stem = next(stem for stem in changes if stem.startswith("lora_unet"))
    seen = []
    for item in generate.drawing(base, replace(REQUEST, steps=4), loras=[one]):
        if isinstance(item, Moment):
            seen.append(float(((weights(base)[stem] - pristine[stem]) / changes[stem]).median()))
    assert [round(share, 3) for share in seen] == [0.0, 0.5, 1.0, 1.0]
    assert folds == [base.unet, base.unet]


def test_a_course_that_stays_is_the_picture_of_that_strength_and_one_that_moves_is_another(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(base, path, 0)

    def drawn(one: LoRA) -> bytes:
        generate.set_loras(base, [one])
        *_, image = generate.picture(base, REQUEST, loras=[one])
        assert not isinstance(image, int)
        return image.tobytes()

    constant = drawn(LoRA(path, 0.8))
    assert drawn(LoRA(path, 5.0, course=((0.0, 0.8), (1.0, 0.8)))) == constant
    moving = LoRA(path, course=((0.0, 0.2), (0.75, 0.8)))
    first = drawn(moving)
    assert first != constant
    assert drawn(moving) == first
    assert drawn(LoRA(path, 0.8)) == constant
