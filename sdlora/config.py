"""What one run is: a TOML file with strict keys. Each default stands here and nowhere else, with its unit.

An unknown key or a wrong type is an error that names the nearest valid key: a misspelt setting that is quietly ignored costs a night.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdlora import kohya_toml
from sdlora.errors import UserError

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

    name: Literal["adamw"] = Field("adamw", description="optimizer")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="peak rate of the UNet's layers")
    text_encoder_learning_rate: float = Field(2e-4, ge=0, le=10, description="peak rate of the text encoder's layers")
    text_encoder_2_learning_rate: float | None = Field(None, ge=0, le=10, description="that of SDXL's second; the same if not given")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled decay")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="course of the rate after warm-up")
    clip_norm: float = Field(1.0, ge=0, description="largest norm of all gradients together; 0 for none")
    accumulation: int = Field(1, ge=1, le=1024, description="batches per step")


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
    save_every: int = Field(200, ge=0, description="steps between checkpoints; 0 for none")
    sample_every: int = Field(200, ge=0, description="steps between sample pictures, the base's own at step 0; 0 for none")
    sample_prompts: list[str] = Field([], description="prompts of the samples; two of the captions if empty")
    regularisation: Literal["none", "auto", "prediction"] = Field(
        "none", description="auto: the base draws class pictures from your captions; prediction: holds the base's own answer"
    )
    class_word: str = Field("", description="what the subject is, such as dog; stands for the trigger word in regularisation")
    regularisation_weight: float = Field(1.0, gt=0, description="of the regularisation's loss")
    gradient_checkpointing: bool = Field(False, description="less memory for about a third more time")
    captions: CaptionConfig = CaptionConfig()
    sizes: SizeConfig = SizeConfig()
    validation: ValidationConfig = ValidationConfig()
    lora: LoRAConfig = LoRAConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    output: OutputConfig = OutputConfig()
    untranslated: tuple[str, ...] = Field((), exclude=True, description="what a foreign dataset TOML asks for in vain; never written")


def load(path: Path, *, changes: list[str] | None = None) -> Config:
    """Reads a run's TOML file; relative data folders are looked for from where the command runs and then from the file's folder.

    Args:
        changes: "key=value" or "table.key=value", with the value in TOML.

    Raises:
        UserError: if the file is missing or not TOML, a key is unknown, a type is wrong, or a value is not allowed.
    """
    if path.is_dir():
        raise UserError(f"Config {path} is a folder; a run is a TOML file, and the folder of pictures stands in it as data.")
    if not path.is_file():
        raise UserError(f"Config {path} does not exist.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise UserError(f"{path} is not valid TOML: {problem}.") from problem
    for change in changes or []:
        _apply(values, change)
    run = parse(values, where=str(path))
    return run.model_copy(update={"data": [_found(one, path.parent) for one in run.data]})


def is_run(path: Path) -> bool:
    """Whether a TOML file is a run rather than a dataset of sd-scripts; what is no TOML is left to `load` to say."""
    try:
        return not {"datasets", "general"} & set(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError):
        return True


def parse(values: dict[str, Any], *, where: str) -> Config:
    """A config from plain values.

    Args:
        where: names the source in error messages.

    Raises:
        UserError: as `load` does.
    """
    values, untranslated = _with_data(values)
    try:
        run = Config.model_validate(values)
    except ValidationError as problem:
        raise UserError(f"{where}: {_sentence(problem)}") from None
    if run.lora.dora and run.output.format == "diffusers":
        raise UserError(
            f'{where}: output.format = "diffusers" cannot carry lora.dora, whose magnitudes are per input here; '
            'set output.format = "kohya" or lora.dora = false.'
        )
    if reason := _contradiction(run):
        raise UserError(f"{where}: {reason}")
    if run.regularisation != "none" and not run.class_word:
        raise UserError(f'{where}: regularisation needs class_word, what the subject is, such as "dog" or "person".')
    if run.lora.text_encoder is None:
        # a style is how things look, which the UNet alone learns; a character's name must also be heard by the text encoder
        run = run.model_copy(update={"lora": run.lora.model_copy(update={"text_encoder": run.kind == "character"})})
    if run.lora.text_targets is None:
        text_targets = run.lora.targets if isinstance(run.lora.targets, str) else "attn"
        run = run.model_copy(update={"lora": run.lora.model_copy(update={"text_targets": text_targets})})
    return run.model_copy(update={"untranslated": untranslated})


def _contradiction(run: Config) -> str | None:
    """Settings that cannot be meant together, in a sentence."""
    folders = [folder.folder for folder in run.data]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    sides = run.resolution_px if isinstance(run.resolution_px, list) else []
    checks = {
        f"data names {twice} twice; name it once, and give repeats if it should count for more.": twice is not None,
        "every data folder is regularisation, so nothing is learned; add the folder of your own pictures.": all(
            folder.regularisation for folder in run.data
        ),
        "a data folder has both masks and alpha_masks; choose one.": any(folder.masks and folder.alpha_masks for folder in run.data),
        "validation has both share and folder; choose one.": bool(run.validation.share and run.validation.folder),
        "resolution_px names a side twice; name each once.": len(set(sides)) < len(sides),
        "class_word is the trigger word; it is what the subject is, such as dog.": bool(
            run.class_word and run.class_word.strip().lower() == run.trigger.strip().lower()
        ),
        "regularisation needs a trigger word, in whose place the class word stands; set trigger.": run.regularisation != "none"
        and not run.trigger.strip(),
        f"trigger is {run.trigger!r}; it is one word or phrase without commas or blanks around it.": run.trigger != run.trigger.strip()
        or "," in run.trigger,
    }
    return next((sentence for sentence, wrong in checks.items() if wrong), None)


def _with_data(values: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`data` as a list of tables: a name is a folder, or a dataset TOML of sd-scripts, whose settings hold where the run says nothing."""
    data = values.get("data")
    if isinstance(data, list):  # names alone are folders too
        return values | {"data": [{"folder": one} if isinstance(one, str) else one for one in data]}, ()
    if not isinstance(data, str):
        return values, ()
    if not data.endswith(".toml"):
        return values | {"data": [{"folder": data}]}, ()
    theirs = kohya_toml.read_kohya(Path(data))
    tables = {key: value | values.get(key, {}) for key, value in theirs.settings.items() if isinstance(value, dict)}
    return theirs.settings | values | tables | {"data": list(theirs.folders)}, theirs.unsupported


def to_toml(config: Config) -> str:
    """The resolved config as TOML: written into the run folder, it repeats the run."""
    return tomlkit.dumps(config.model_dump(mode="json", exclude_none=True))


def unset(run: BaseModel, *, inside: str = "") -> dict[str, str]:
    """The keys that have no value, with what they are for."""
    found: dict[str, str] = {}
    for key, field in type(run).model_fields.items():
        value = getattr(run, key)
        if isinstance(value, BaseModel):
            found |= unset(value, inside=f"{inside}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            found |= unset(value[0], inside=f"{inside}{key}.")
        elif value is None:
            found[f"{inside}{key}"] = field.description or ""
    return found


def _found(data: FolderConfig, beside: Path) -> FolderConfig:
    """The folder as an absolute path, so that the config in the run folder repeats the run from anywhere."""
    places = [data.folder, beside / data.folder]
    return data.model_copy(update={"folder": next((one for one in places if one.is_dir()), data.folder).absolute()})


def _apply(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals:
        raise UserError(f"--set {change}: expected key=value, for example lora.rank=8.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {change}: '{table}' is a value and has no keys of its own.")
    values[last] = value


def _sentence(problem: ValidationError) -> str:
    """The first mistake in words: where, what was found, what is allowed."""
    error = problem.errors()[0]
    kinds = re.compile(r"int|str|list\[.*|constrained-.*")  # pydantic names the branch of a union after the key
    name = ".".join(str(part) for part in error["loc"] if not kinds.fullmatch(str(part)) or isinstance(part, int))
    if error["type"] == "extra_forbidden":
        valid = _keys_beside(error["loc"])
        near = difflib.get_close_matches(str(error["loc"][-1]), valid, n=1, cutoff=0)
        return f"unknown key '{name}'; the nearest valid key is '{near[0]}'. Valid here: {', '.join(valid)}."
    if error["type"] == "missing":
        return f"key '{name}' is missing; it is needed."
    found = f"{error['input']!r} ({type(error['input']).__name__})"
    if error["type"] == "string_pattern_mismatch":
        return f"'{name}' is {found}; letters, digits, spaces, dots, dashes and underscores are allowed, with a letter or digit first."
    if error["type"] in ("model_type", "dict_type"):
        return f"'{name}' is {found}; it is a table of keys."
    return f"'{name}' is {found}; {error['msg'][0].lower()}{error['msg'][1:]}."


def _keys_beside(place: tuple[int | str, ...]) -> list[str]:
    tables: dict[str, type[BaseModel]] = {
        "lora": LoRAConfig, "optimizer": OptimizerConfig, "data": FolderConfig, "output": OutputConfig, "overrides": OverrideConfig,
        "captions": CaptionConfig, "sizes": SizeConfig, "validation": ValidationConfig,
    }  # fmt: skip
    inner = [str(part) for part in place[:-1] if isinstance(part, str)]
    fields = tables[inner[-1]].model_fields if inner and inner[-1] in tables else Config.model_fields
    return [key for key, field in fields.items() if not field.exclude]
