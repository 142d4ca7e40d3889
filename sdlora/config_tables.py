"""The keys of a run, table by table. Each default stands here and nowhere else, with a line that says what it is and its unit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Level = Annotated[int, Field(ge=0, le=255)]
Resolution = Annotated[int, Field(ge=64, le=4096, multiple_of=8)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class OverrideConfig(_Table):
    """Modules that are treated otherwise than the rest."""

    pattern: str = Field(description='module names, such as "mid_block.*" or "*.attn2.*"')
    rank: int | None = Field(None, ge=1, le=1024, description="their rank")
    alpha: float | None = Field(None, gt=0, description="their alpha")
    learning_rate: float | None = Field(None, ge=0, description="their peak rate")


class LoRAConfig(_Table):
    """The low-rank layers."""

    rank: int = Field(16, ge=1, le=1024, description="rows of A and columns of B")
    alpha: float = Field(16.0, gt=0, description="updates are scaled by alpha / rank")
    targets: str | list[str] = Field("attn", description="preset (attn, attn-mlp, attn-mlp-conv) or patterns for UNet module names")
    text_encoder: bool | None = Field(None, description="also train the text encoders; by kind: character yes, style no")
    text_targets: str | list[str] | None = Field(None, description="the same for the text encoders' modules; the preset of `targets`")
    rank_stabilised: bool = Field(False, description="scale by alpha / √rank (rsLoRA, Kalajdzievski 2023) instead of alpha / rank")
    dora: bool = Field(False, description="also learn each weight's magnitude (DoRA, Liu et al. 2024); diffusers cannot read it")
    init: Literal["gaussian", "pissa"] = Field(
        "gaussian", description="pissa starts at the weights' main directions; the file has 2 · rank"
    )
    rank_dropout: float = Field(0.0, ge=0, lt=1, description="share of the ranks left out, drawn for each batch")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="share of the modules left out, drawn for each batch")
    network_dropout: float = Field(0.0, ge=0, lt=1, description="share of the numbers between A and B set to 0")
    start_from: Path | None = Field(None, strict=False, description="an existing LoRA file to go on from; its ranks and alphas are kept")
    overrides: list[OverrideConfig] = Field([], description="other ranks, alphas or rates for some modules; the last that matches counts")


class OptimizerConfig(_Table):
    """How the weights move."""

    name: Literal["adamw", "adamw8bit", "adafactor", "lion", "prodigy", "schedule_free"] = Field(
        "adamw", description="the others need an extra package; prodigy wants a rate of 1, the same for all"
    )
    learning_rate: float = Field(1e-3, gt=0, le=10, description="peak rate of the UNet's layers")
    text_encoder_learning_rate: float = Field(2e-4, ge=0, le=10, description="peak rate of the text encoder's layers")
    text_encoder_2_learning_rate: float | None = Field(None, ge=0, le=10, description="that of SDXL's second; the same if not given")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled decay")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises")
    schedule: Literal["cosine", "constant", "cosine_with_restarts", "linear", "polynomial", "warmup_stable_decay", "rex"] = Field(
        "cosine", description="course of the rate after warm-up"
    )
    cycles: int = Field(1, ge=1, le=100, description="half cosines of cosine_with_restarts")
    power: float = Field(1.0, gt=0, le=10, description="of polynomial; more falls earlier")
    decay: float = Field(0.2, gt=0, le=1, description="share of the steps in which warmup_stable_decay falls")
    lora_plus_ratio: float = Field(1.0, ge=1, le=64, description="B learns this many times as fast as A (LoRA+, Hayou et al. 2024)")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the average that is drawn with and saved, such as 0.99; 0 for none")
    max_norm: float = Field(0.0, ge=0, description="largest norm of a module's update; 0 for none")
    clip_norm: float = Field(1.0, ge=0, description="largest norm of all gradients together; 0 for none")
    accumulation: int = Field(1, ge=1, le=1024, description="batches per step")
    text_encoder_until: float = Field(1.0, ge=0, le=1, description="share of the steps after which the text encoders stand still")


class ObjectiveConfig(_Table):
    """What is learned from each noisy picture."""

    loss: Literal["mse", "l1", "huber"] = Field("mse", description="form of the error")
    huber_delta: float = Field(0.1, gt=0, le=1, description="where huber turns from square to straight")
    huber_schedule: Literal["snr", "exponential", "constant"] = Field("snr", description="how that place moves with the noise")
    weighting: Literal["min_snr", "soft_min_snr", "debiased", "none"] = Field("min_snr", description="of timesteps; see min_snr_gamma")
    noise_offset: float = Field(0.0, ge=0, le=1, description="of a constant per channel in the noise; lets pictures go dark or bright")
    pyramid_discount: float = Field(0.0, ge=0, lt=1, description="of each coarser level of noise; 0 for plain noise")
    pyramid_levels: int = Field(6, ge=1, le=12, description="of coarser noise")
    input_perturbation: float = Field(0.0, ge=0, le=1, description="extra noise that the target does not hold")
    timesteps: Literal["uniform", "logit_normal"] = Field("uniform", description="how timesteps are drawn")
    timestep_mean: float = Field(0.0, description="of logit_normal; above 0 for more noise")
    timestep_scale: float = Field(1.0, gt=0, description="of logit_normal")
    timestep_low: int = Field(0, ge=0, description="the least noisy timestep")
    timestep_high: int | None = Field(None, ge=1, description="one above the noisiest; all if not given")
    stratified: bool = Field(False, description="a batch's timesteps from equal bands: its loss varies less")


class OutputConfig(_Table):
    """The LoRA file."""

    format: Literal["kohya", "diffusers"] = Field("kohya", description="kohya's layout loads everywhere; diffusers' in diffusers")
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="number format of the weights")
    minimal_metadata: bool = Field(False, description="only what loaders need, no settings, no tags")
    sidecars: bool = Field(False, description="also <name>.json and a preview <name>.png for the web UIs")
    author: str = Field("", description="written into the file")
    license: str = Field("", description="written into the file")


class FolderConfig(_Table):
    """One folder of pictures with captions."""

    folder: Path = Field(strict=False, description="pictures with captions, in any of the usual layouts")
    repeats: int = Field(1, ge=1, le=10_000, description="how often each picture is seen per epoch")
    trigger: str | None = Field(None, description="another trigger word for this folder")
    caption: str | None = Field(None, description="for pictures that have no caption of their own")
    captions_from_names: bool = Field(False, description="file names as captions where there is no other")
    caption_lines: Literal["joined", "alternatives"] = Field("joined", description="lines of a caption file: one text, or one per visit")
    caption_suffixes: tuple[str, ...] = Field((".txt", ".caption"), strict=False, description="of caption files; the first found counts")
    metadata: Path | None = Field(None, strict=False, description="a table of captions, if it is not called metadata.jsonl or .csv")
    folder_names: bool = Field(True, description='sub-folders such as "10_pip dragon" say repeats and caption')
    sub_folders: bool = Field(True, description="pictures in sub-folders belong to it")
    masks: Path | None = Field(None, strict=False, description="folder of same-named greyscale pictures; white is learned")
    alpha_masks: bool = Field(False, description="the pictures' own transparency as masks")
    weight: float = Field(1.0, gt=0, description="of the loss; for regularisation pictures often less than 1")
    regularisation: bool = Field(False, description="pictures of the class without the subject: no trigger word is put into their captions")


class CaptionConfig(_Table):
    """What is changed in captions at each visit."""

    dropout: float = Field(0.05, ge=0, lt=1, description="share of captions left empty, so that guidance keeps working")
    shuffle: bool = Field(False, description="tags in a new order at each visit")
    keep_first: int = Field(0, ge=0, description="tags at the beginning that stay there")
    tag_dropout: float = Field(0.0, ge=0, lt=1, description="share of the other tags left out")
    wildcards: bool = Field(False, description="{a|b} in captions means one of them at each visit")
    prefix: str = Field("", description="put before each caption")
    suffix: str = Field("", description="put after each caption")


class SizeConfig(_Table):
    """At which sizes pictures are trained, and which part of them."""

    step_px: int | None = Field(None, ge=8, multiple_of=8, description="sides of training sizes are multiples; 64, or the base's own")
    most_aspect: float = Field(2.0, ge=1, le=8, description="the longest training size is this many times as long as wide; 1 for squares")
    most_shapes: int | None = Field(None, ge=1, description="cap on the number of training sizes per resolution")
    upscale: bool = Field(True, description="enlarge pictures that are smaller than their training size")
    crop: Literal["centre", "top", "random"] = Field("centre", description="which part is kept; top keeps faces of portraits")
    crops: int = Field(4, ge=1, le=64, description="random crops per picture")
    flip: bool = Field(False, description="also learn the mirrored pictures; not for faces or lettering")
    background: tuple[Level, Level, Level] = Field((255, 255, 255), strict=False, description="RGB that transparent pictures are laid on")


class ValidationConfig(_Table):
    """Pictures that are never trained on."""

    share: float = Field(0.0, ge=0, lt=1, description="share of the pictures held out, at least one")
    folder: Path | None = Field(None, strict=False, description="a folder of its own instead")
    every: int | None = Field(None, ge=0, description="steps between looks at them; as save_every if not given, 0 for none")
    draws: int = Field(16, ge=1, le=256, description="fixed pairs of timestep and noise for each picture")
    most_pictures: int = Field(16, ge=1, le=256, description="held-out pictures that are looked at, and as many of those trained on")


class Config(_Table):
    """One run."""

    base: str = Field(description="mini, a diffusers folder, a .safetensors checkpoint, or a hub name")
    vae: str | None = Field(None, description="another autoencoder: a folder or a .safetensors file")
    tokenizer: str | None = Field(None, description="folder with a tokenizer, for a checkpoint that brings none")
    family: Literal["auto", "sd1", "sd2", "sdxl"] = Field("auto", description="what the base is, if it is taken for something else")
    prediction: Literal["auto", "epsilon", "v_prediction", "sample"] = Field("auto", description="what the base predicts, likewise")
    zero_terminal_snr: bool | None = Field(None, description="last timestep without any signal; as the base says if not given")
    clip_skip: int | None = Field(None, ge=1, le=12, description="text layer counted from the last, 1 for the last; the family's own")
    data: list[FolderConfig] = Field(min_length=1, description="a folder, an sd-scripts dataset TOML, or a list of tables")
    kind: Literal["style", "character"] = Field(description="what the pictures have in common")
    trigger: str = Field("", description="word that calls the LoRA; put first in captions that lack it")
    name: str = Field(pattern=r"^[\w][\w. -]*$", description="stem of the LoRA file")
    steps: int = Field(600, ge=1, le=1_000_000, description="optimizer steps")
    batch: int = Field(4, ge=1, le=1024, description="pictures per batch")
    seed: int = Field(0, ge=0, lt=2**31, description="all chance comes from it")
    resolution_px: Resolution | Annotated[list[Resolution], Field(min_length=1)] | None = Field(
        None, description="side of the square of the training sizes' area; one or several"
    )
    cache: Literal["disk", "memory"] = Field("disk", description="keep encoded pictures and captions for the next run, or not")
    min_snr_gamma: float = Field(5.0, ge=0, description="limit of the loss weight (Hang et al. 2023); 0 for none")
    save_every: int = Field(200, ge=0, description="steps between checkpoints; 0 for none but at the end")
    keep_last: int = Field(2, ge=1, description="newest states that a run can go on from; LoRA files of checkpoints all stay")
    keep_every: int = Field(0, ge=0, description="also the states of steps that are multiples; 0 for none")
    sample_every: int = Field(200, ge=0, description="steps between sample pictures, the base's own at step 0; 0 for none")
    sample_prompts: list[str] = Field([], description="prompts of the samples; two of the captions if empty")
    regularisation: Literal["none", "auto", "prediction"] = Field(
        "none", description="auto: the base draws class pictures from your captions; prediction: holds the base's own answer"
    )
    class_word: str = Field("", description="what the subject is, such as dog; stands for the trigger word in regularisation")
    regularisation_weight: float = Field(1.0, gt=0, description="of the regularisation's loss")
    gradient_checkpointing: bool | None = Field(None, description="much less memory for a third more time; by base: SDXL yes, others no")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="of the frozen base; auto: bf16 on a GPU that has it")
    quantise: Literal["none", "int8"] = Field("none", description="int8: half the memory of the frozen linears of the UNet, rounded")
    report: bool = Field(True, description="report.html, report.md and compare.png at the end")
    trackers: list[Literal["tensorboard", "wandb"]] = Field([], description="also log there; metrics.jsonl is always written")
    captions: CaptionConfig = CaptionConfig()
    sizes: SizeConfig = SizeConfig()
    validation: ValidationConfig = ValidationConfig()
    lora: LoRAConfig = LoRAConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    output: OutputConfig = OutputConfig()
    untranslated: tuple[str, ...] = Field((), exclude=True, description="what a foreign dataset TOML asks for in vain; never written")


TABLES: dict[str, type[BaseModel]] = {
    "lora": LoRAConfig, "optimizer": OptimizerConfig, "objective": ObjectiveConfig, "data": FolderConfig, "output": OutputConfig,
    "overrides": OverrideConfig, "captions": CaptionConfig, "sizes": SizeConfig, "validation": ValidationConfig,
}  # fmt: skip
