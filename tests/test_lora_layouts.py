"""What is written in each layout means the same to diffusers and PEFT as here, module by module, and comes back."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora import base_model, deltas, files, lora, lora_file, lora_layouts, lora_names
from sdlora.deltas import Full, Hadamard, Kronecker, LowRank, Update
from sdlora.errors import UserError
from tests.test_lora_names import full_size, targeted

MIXINS = {"sd1": StableDiffusionLoraLoaderMixin, "sd2": StableDiffusionLoraLoaderMixin, "sdxl": StableDiffusionXLLoraLoaderMixin}
FAMILIES = tuple(MIXINS)
QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
NORM = "lora_unet_conv_norm_out"
PROJECTION = "lora_unet_mid_block_attentions_0_proj_in"


def small(family: str) -> dict[str, nn.Module]:
    """The parts of a family, narrow but with its names and shapes of projections."""
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {"unet": small_unet(family), "text_encoder": CLIPTextModel(text_config())}
    return parts | ({"text_encoder_2": CLIPTextModelWithProjection(text_config())} if family == "sdxl" else {})


def small_unet(family: str) -> UNet2DConditionModel:
    """Two levels."""
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    return UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4, cross_attention_dim=32, layers_per_block=2,
        use_linear_projection=family != "sd1", down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **(added if family == "sdxl" else {}),
    )  # fmt: skip


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=8, vocab_size=50, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Halves, so that nothing is rounded when it is stored."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().float()


def low_rank(weight: Tensor, *, rank: int = 2, alpha: float = 1.0, seed: int = 0) -> LowRank:
    down, up = drawn(rank, *weight.shape[1:], seed=seed), drawn(weight.shape[0], rank, *[1] * (weight.ndim - 2), seed=seed + 1)
    return LowRank(down, up, alpha)


def mixed(parts: dict[str, nn.Module], *, alphas: tuple[float, ...] = (1.0, 2.0, 4.0), dora: bool = False) -> dict[str, Update]:
    """Updates of all targets of a base's parts, of several ranks and alphas, with DoRA's magnitudes per output if wanted."""
    found: dict[str, Update] = {}
    for part, model in parts.items():
        for name in lora.matching(model, base_model.targets("attn-mlp-conv", part=part)):
            weight, i = lora.base_weight(model.get_submodule(name)), len(found)
            magnitude = drawn(weight.shape[0], *[1] * (weight.ndim - 1), seed=i).abs() if dora else None
            change = low_rank(weight, rank=(2, 3)[i % 2], alpha=alphas[i % len(alphas)], seed=i)
            found[lora_names.stem_of(part, name)] = Update(change, magnitude)
    return found


def as_peft(tensors: dict[str, Tensor], part: str) -> set[str]:
    """The keys of one part after diffusers' own conversion for PEFT."""
    own = {key.removeprefix(f"{part}."): tensor for key, tensor in tensors.items() if key.startswith(f"{part}.")}
    if part == "unet":
        return set(convert_unet_state_dict_to_peft(own))
    return {key.removeprefix("text_model.") for key in convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))}


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_finds_every_module_of_a_full_size_file(family: str) -> None:
    modules = targeted(family, "attn-mlp-conv")
    tensors = lora_layouts.tensors_of(modules, family=family)
    converted, alphas = MIXINS[family].lora_state_dict(tensors, unet_config=full_size(family)["unet"].config)
    for part in full_size(family):
        names = [name for place, name in map(lora_names.dotted, modules) if place == part]
        assert as_peft(converted, part) == {f"{name}.lora_{side}.weight" for name in names for side in "AB"}
    assert len(alphas) == len(modules)


@pytest.mark.parametrize(("layout", "dora"), [("kohya", False), ("diffusers", False), ("diffusers", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_and_peft_apply_each_module_as_it_is(family: str, layout: str, dora: bool, tmp_path: Path) -> None:
    parts, mixin = small(family), MIXINS[family]
    modules = mixed(parts, dora=dora)
    if (family, layout) == ("sd2", "kohya"):  # whose projections are convolutions in files and linear in diffusers, which then refuses them
        modules = {stem: update for stem, update in modules.items() if "_proj_in" not in stem and "_proj_out" not in stem}
    files.write(tmp_path / "x.safetensors", lora_file.to_bytes(modules, {}, family=family, layout=layout, dtype=torch.float32))
    tensors, alphas, metadata = mixin.lora_state_dict(
        str(tmp_path), weight_name="x.safetensors", unet_config=parts["unet"].config, return_lora_metadata=True
    )
    assert (metadata is None) == (layout == "kohya")
    told = {"network_alphas": alphas, "metadata": metadata, "adapter_name": "x"}
    mixin.load_lora_into_unet(tensors, unet=parts["unet"], **told)
    for part in set(parts) - {"unet"}:
        mixin.load_lora_into_text_encoder(tensors, text_encoder=parts[part], prefix=part, **told)
    seen = 0
    for part, model in parts.items():
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                before = layer.base_layer.weight.detach().clone()
                layer.merge(adapter_names=["x"])
                expected = deltas.delta(modules[lora_names.stem_of(part, name)], before)
                torch.testing.assert_close(layer.base_layer.weight - before, expected, atol=1e-5, rtol=1e-5)
                seen += 1
    assert seen == len(modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_kohya_to_diffusers_and_back_is_the_same_file_bit_by_bit(family: str, tmp_path: Path) -> None:
    first, there = tmp_path / "first.safetensors", tmp_path / "there.safetensors"
    files.write(first, lora_file.to_bytes(mixed(small(family), alphas=(3.7,)), {"ss_output_name": "x"}, family=family))
    one = lora_file.read(first)
    files.write(there, lora_file.to_bytes(one.modules, one.metadata, family=family, layout="diffusers", dtype=None))
    two = lora_file.read(there)
    assert "lora_adapter_metadata" in two.metadata
    assert lora_file.to_bytes(two.modules, two.metadata, family=family, dtype=None) == first.read_bytes()


def test_several_alphas_survive_diffusers_layout_exactly(tmp_path: Path) -> None:
    modules = mixed(small("sdxl"))
    files.write(tmp_path / "x.safetensors", lora_file.to_bytes(modules, {}, family="sdxl", layout="diffusers"))
    back = lora_file.read(tmp_path / "x.safetensors").modules
    assert set(back) == set(modules)
    for stem, update in modules.items():
        found, wanted = back[stem].change, update.change
        assert isinstance(found, LowRank)
        assert isinstance(wanted, LowRank)
        assert found.alpha == wanted.alpha
        assert torch.equal(found.down.float(), wanted.down)
        assert torch.equal(found.up.float(), wanted.up)


def test_several_alphas_become_one_with_the_same_update() -> None:
    weight = torch.zeros(5, 6)
    kinds = {QUERY: (4, 2.0), KEY: (8, 8.0), PROJECTION: (2, 6.0), CONV: (3, 0.0)}
    modules = {stem: Update(low_rank(weight, rank=rank, alpha=alpha)) for stem, (rank, alpha) in kinds.items()}
    tensors = lora_layouts.tensors_of(modules, family="mini", dtype=torch.float32)
    assert {tensors[f"{stem}.alpha"].item() for stem in modules} == {2.0}
    for stem, update in modules.items():
        down, up, alpha = (tensors[f"{stem}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        torch.testing.assert_close(deltas.delta(Update(LowRank(down, up, alpha.item())), weight), deltas.delta(update, weight))


def test_one_alpha_leaves_every_rank_as_it_is() -> None:
    modules = {QUERY: Update(low_rank(torch.zeros(5, 6), rank=2, alpha=3.0)), KEY: Update(low_rank(torch.zeros(5, 6), rank=4, alpha=3.0))}
    tensors = lora_layouts.tensors_of(modules, family="sd1", dtype=torch.float32)
    for stem, update in modules.items():
        assert isinstance(update.change, LowRank)
        assert torch.equal(tensors[f"{stem}.lora_up.weight"], update.change.up)


def test_alpha_is_a_float_that_nothing_rounds() -> None:
    exact, odd = (
        lora_layouts.tensors_of({QUERY: Update(low_rank(torch.zeros(5, 6), alpha=alpha))}, family="sd1")[f"{QUERY}.alpha"]
        for alpha in (16, 16 * 8**0.5)
    )
    assert (exact.dtype, exact.shape, exact.item()) == (torch.float16, (), 16.0)
    assert (odd.dtype, odd.shape) == (torch.float32, ())
    assert odd.item() == pytest.approx(16 * 8**0.5, rel=1e-7)


@pytest.mark.parametrize(("family", "kohya", "diffusers"), [("sd1", 4, 4), ("sd2", 4, 2), ("sdxl", 2, 2), ("mini", None, None)])
@pytest.mark.parametrize("ndim", [2, 4])
def test_projections_have_the_shape_that_each_reader_expects(family: str, kohya: int | None, diffusers: int | None, ndim: int) -> None:
    change = low_rank(torch.zeros(8, 6, *[1] * (ndim - 2)))
    magnitude = torch.ones(8, *[1] * (ndim - 1))
    for layout, expected in (("kohya", kohya), ("diffusers", diffusers)):
        tensors = lora_layouts.tensors_of({PROJECTION: Update(change, magnitude)}, family=family, layout=layout)
        down, up, *others = (tensor for key, tensor in tensors.items() if not key.endswith(".alpha"))
        ones = [1] * ((expected or ndim) - 2)
        assert (list(down.shape), list(up.shape)) == ([2, 6, *ones], [8, 2, *ones])
        assert [one.numel() for one in others] == [8]
        assert layout == "diffusers" or others[0].ndim == down.ndim


OTHERS = {
    "LoHa": Hadamard(drawn(8, 2), drawn(2, 6), drawn(8, 2), drawn(2, 6), 3.0),
    "LoHa with cores": Hadamard(*(drawn(2, n) for n in (8, 6, 8, 6)), 0.5, drawn(2, 2, 3, 3), drawn(2, 2, 3, 3)),
    "LoKr": Kronecker(drawn(2, 2), drawn(4, 3), 1.0),
    "LoKr in pairs": Kronecker((drawn(2, 2), drawn(2, 2)), (drawn(4, 2), drawn(2, 3)), 4.0),
    "LoKr with a core": Kronecker(drawn(2, 2), (drawn(2, 4), drawn(2, 3)), 4.0, drawn(2, 2, 3, 3)),
    "Tucker": LowRank(drawn(2, 6, 1, 1), drawn(8, 2, 1, 1), 3.0, drawn(2, 2, 3, 3)),
    "full": Full(drawn(8, 6)),
}


@pytest.mark.parametrize("form", OTHERS)
def test_other_forms_are_written_and_read_as_they_are(form: str, tmp_path: Path) -> None:
    plain = LowRank(drawn(2, 6), drawn(8, 2), 1.5)
    modules = {CONV: Update(OTHERS[form], bias=drawn(8)), QUERY: Update(plain), NORM: Update(Full(drawn(8)), bias=drawn(8))}
    modules[KEY] = Update(LowRank(drawn(2, 6), drawn(8, 2), 1.5), magnitude=drawn(1, 6))
    if form == "Tucker":  # a low-rank form, so of one alpha with the others
        modules = {stem: update for stem, update in modules.items() if stem in (CONV, NORM)}
    files.write(tmp_path / "x.safetensors", lora_file.to_bytes(modules, {}, family="sdxl"))
    back = lora_file.read(tmp_path / "x.safetensors")
    assert back.unknown == ()
    assert set(back.modules) == set(modules)
    for stem, update in modules.items():
        found = back.modules[stem]
        assert type(found.change) is type(update.change)
        assert getattr(found.change, "alpha", None) == getattr(update.change, "alpha", None)
        assert all(map(torch.equal, (one.float() for one in deltas.tensors(found)), deltas.tensors(update)))
        assert len(deltas.tensors(found)) == len(deltas.tensors(update))


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        *((Update(OTHERS[form]), form.split()[0]) for form in OTHERS if form != "Tucker"),
        (Update(OTHERS["Tucker"]), "LoCon"),
        (Update(LowRank(drawn(2, 6), drawn(8, 2), 1.0), bias=drawn(8)), "a bias"),
        (Update(LowRank(drawn(2, 6), drawn(8, 2), 1.0), magnitude=drawn(1, 6)), "magnitudes per input"),
    ],
)
def test_what_diffusers_layout_cannot_carry_is_said(update: Update, reason: str) -> None:
    with pytest.raises(UserError, match=rf"diffusers' layout cannot carry .*{reason}.*write kohya's layout instead\.$"):
        lora_file.to_bytes({CONV: update}, {}, family="sdxl", layout="diffusers")


def test_dora_in_a_part_of_the_modules_is_refused_for_diffusers() -> None:
    plain = LowRank(drawn(2, 6), drawn(8, 2), 1.0)
    modules = {QUERY: Update(plain, magnitude=drawn(8, 1)), KEY: Update(plain)}
    with pytest.raises(UserError, match="DoRA in 1 of 2 modules of unet"):
        lora_file.to_bytes(modules, {}, family="sdxl", layout="diffusers")


@pytest.mark.parametrize(
    ("down", "dtype", "sentence"),
    [
        (torch.full((2, 3), 1e6), torch.float16, "reaches 1e\\+06, which is infinite in torch.float16; write the LoRA in bf16 or fp32"),
        (torch.full((2, 3), float("nan")), torch.float32, "is not finite, so no LoRA file is written"),
    ],
)
def test_weights_that_are_not_finite_are_never_written(down: Tensor, dtype: torch.dtype, sentence: str) -> None:
    with pytest.raises(UserError, match=f"attn1_to_q.lora_down.weight {sentence}"):
        lora_file.to_bytes({QUERY: Update(LowRank(down, torch.zeros(3, 2), 1.0))}, {}, family="sd1", dtype=dtype)
    with pytest.raises(ValueError, match="at least one module"):
        lora_file.to_bytes({}, {}, family="sd1")
