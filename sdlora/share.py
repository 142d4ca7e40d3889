"""A finished run as something to give away: a folder and a zip with the LoRA file, what web UIs look for beside it, a card and pictures.

What was given away cannot be called back, so the doubtful is left out: no path of this machine is inside, and the words of prompts and
captions only if asked for. What is missing in a file shows only on somebody else's machine, so it is read again before (`share_checks`).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import huggingface_hub
import tomlkit
from PIL import Image

from sdlora import chosen, config, files, hub, images, lora_file, lora_metadata, model_card, run_folder, runs, share_checks
from sdlora.config import Config
from sdlora.errors import UserError
from sdlora.lora_file import LoRAFile
from sdlora.model_card import Card
from sdlora.runs import Drawn, Run

PROMPTS = ("sample_prompts", "captions.prefix", "captions.suffix", "data.caption")  # keys of the config that hold words of the user's
TAGS = ("ss_tag_frequency", "ss_dataset_dirs")  # of the file's metadata, likewise
LEFT_OUT = "(left out)"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date that a zip can state


@dataclass(frozen=True)
class Choice:
    """Which file of a run is given away, the step it is of, at which strength it is best, and why."""

    path: Path
    step: int
    strength: float = 1.0
    reason: str = ""


@dataclass(frozen=True)
class Shared:
    """What was written: the folder, the zip, the choice that was made, and how many sample pictures there are."""

    folder: Path
    archive: Path
    choice: Choice
    pictures: int


@dataclass(frozen=True)
class Wishes:
    """How a run is given away.

    Args:
        keep_prompts: whether prompts stay in pictures and card, and tags of captions in the file.
        license: instead of the config's.
        base_model: the base's id on the hub, if the run does not tell.
        hub_id: where it will be on the hub; "" for nowhere.
    """

    checkpoint: int | None = None
    keep_prompts: bool = False
    license: str = ""
    base_model: str = ""
    hub_id: str = ""


def share(folder: Path, out: Path | None = None, *, wishes: Wishes = Wishes()) -> Shared:
    """Writes a run as a folder and a zip beside it; both are there whole, or neither is.

    Args:
        folder: the run's.
        out: the new folder; `shared/<name>` if not given.

    Raises:
        UserError: if the run has no such file, the file is incomplete, something stands there already, or cannot be written.
    """
    told = runs.look(folder)
    if told.trouble and told.state == "broken":
        raise UserError(f"Run folder {folder} cannot be shared: {told.trouble.removesuffix('.')}; name a folder that a run has written.")
    run = config.load(folder / "config.toml")
    out = out or Path("shared") / run.name
    archive = out.with_name(f"{out.name}.zip")
    if taken := next((one for one in (out, archive) if one.exists()), None):
        raise UserError(f"{taken} exists already, and nothing is written over; choose another folder with --out, or move it away.")
    if wishes.hub_id and not hub.is_name(wishes.hub_id):
        raise UserError(f"--push-to-hub {wishes.hub_id}: give the name of a repository of yours, such as me/my-lora.")
    choice = choose(told, run, wishes.checkpoint)
    contents = dict(_contents(run, told, choice, wishes))
    share_checks.check_private(contents, [folder, *(one.folder for one in run.data)])
    modules = _started(folder).get("modules")
    _write(
        contents,
        out,
        archive,
        check=lambda part: share_checks.check_complete(part / f"{run.name}.safetensors", choice.path, modules=modules),
    )
    return Shared(out, archive, choice, sum(1 for name in contents if name.startswith("samples/")))


def choose(told: Run, run: Config, checkpoint: int | None) -> Choice:
    """The checkpoint of a step if one is asked for, else the one that a person marked, else what the run recommends, else its result.

    Raises:
        UserError: if there is none.
    """
    best, result = told.best, run_folder.result_path(told.folder, run.name)
    paths = run_folder.checkpoints(told.folder, run.name) | ({run.steps: result} if result.is_file() else {})
    marked = chosen.read(told.folder)
    if checkpoint is None and marked and marked.step in paths:
        return Choice(paths[marked.step], marked.step, marked.strength, "Marked as the best of its run by whoever looked at its pictures.")
    if checkpoint is None and best and best.path:
        return Choice(best.path, best.step, best.strength, best.reason)
    step = run.steps if checkpoint is None else checkpoint
    if step not in paths:
        ended = "has no LoRA file of its end" if told.state == "done" else "has not come to its end"
        missing = ended if checkpoint is None else f"has no checkpoint of step {checkpoint}"
        there = f"there are those of steps {', '.join(map(str, sorted(paths)))}" if paths else "it has none at all; let the run go on first"
        raise UserError(f"Run folder {told.folder} {missing}; choose one with --checkpoint STEP: {there}.")
    return Choice(paths[step], step, best.strength, best.reason) if best and best.step == step else Choice(paths[step], step)


def public_name(base: str) -> str:
    """A base without the path to it: the last part, or the whole id if the base came from the hub."""
    return base if _hub_base(base) else PurePosixPath(base.replace("\\", "/")).name


def _hub_base(base: str) -> str:
    """The base's id on the hub; "" if it is not known to come from there: what has an owner before it may be a folder too."""
    return base if hub.is_name(base) and not Path(base).exists() and hub.cached(base) else ""


# What is inside


def _contents(run: Config, told: Run, choice: Choice, wishes: Wishes) -> Iterator[tuple[str, bytes]]:
    """The files by name, LoRA first."""
    file, licence = lora_file.read(choice.path), wishes.license or run.output.license
    lora = _with_words(file, run, choice, wishes)
    yield f"{run.name}.safetensors", lora
    about = f"{run.kind}, trained with sdlora on {public_name(run.base)}"
    beside = lora_metadata.sidecar(file.family, trigger=run.trigger, strength=choice.strength, description=about, notes=choice.reason)
    yield f"{run.name}.json", json.dumps(beside, indent=2, ensure_ascii=False).encode()
    yield "config.toml", tomlkit.dumps(public_settings(run, keep_prompts=wishes.keep_prompts)).encode()
    samples = []
    for number, (one, before) in enumerate(_pairs(told.folder, choice.step), start=1):
        names = (f"samples/{number}.png", f"samples/{number}-without.png" if before else "")
        for name, picture in zip(names, (one.path, before), strict=True):
            if picture:
                yield name, _picture(picture, wishes.keep_prompts)
        if number == 1:
            yield f"{run.name}.png", _picture(one.path, wishes.keep_prompts)
        samples.append(model_card.Sample(*names, prompt=one.prompt if wishes.keep_prompts else ""))
    sheet = told.folder / "compare.png"
    if with_sheet := wishes.keep_prompts and sheet.is_file():  # prompts are drawn on it
        yield "compare.png", _picture(sheet, True)
    card = Card(
        name=run.name, file=f"{run.name}.safetensors", family=file.family, kind=run.kind, trigger=run.trigger, strength=choice.strength,
        reason=choice.reason, base=public_name(run.base), hub_base=wishes.base_model or _hub_base(run.base), license=licence,
        author=run.output.author, settings=_settings(run, told, choice, file), samples=tuple(samples),
        notes=tuple(_started(told.folder).get("limits", ())),
        no_diffusers=share_checks.no_diffusers(file), hub_id=wishes.hub_id, sheet="compare.png" if with_sheet else "",
    )  # fmt: skip
    yield "README.md", model_card.text(card).encode()


def _with_words(file: LoRAFile, run: Config, choice: Choice, wishes: Wishes) -> bytes:
    """The file as it is, with the licence and the best strength in its metadata, and without captions' tags unless they are kept."""
    added = {} if run.output.minimal_metadata else {"modelspec.usage_hint": f"strength {choice.strength:g}"}
    added |= {"modelspec.license": wishes.license} if wishes.license else {}
    kept = {key: value for key, value in file.metadata.items() if wishes.keep_prompts or key not in TAGS}
    return lora_file.to_bytes(file.modules, kept | added, family=file.family, dtype=None, layout=run.output.format)


def public_settings(run: Config, *, keep_prompts: bool = False) -> dict[str, Any]:
    """The config's values with the last part of each path, and without the user's words and names of folders unless they are kept."""
    values = run.model_dump(exclude_none=True)
    named = {key: public_name(values[key]) for key in ("base", "vae", "tokenizer") if key in values}
    public: dict[str, Any] = _without_paths(values | named, keep_prompts)
    for key in () if keep_prompts else PROMPTS:
        first, _, last = key.rpartition(".")
        tables = public[first] if first else public
        for table in tables if isinstance(tables, list) else [tables]:
            table.pop(last, None)
    return public


def _without_paths(value: Any, keep_names: bool) -> Any:
    if isinstance(value, PurePath):
        return PurePosixPath(str(value).replace("\\", "/")).name if keep_names else LEFT_OUT
    if isinstance(value, dict):
        return {key: _without_paths(one, keep_names) for key, one in value.items()}
    return [_without_paths(one, keep_names) for one in value] if isinstance(value, list | tuple) else value


def _pairs(folder: Path, step: int) -> list[tuple[Drawn, Path | None]]:
    """The samples of the newest step up to `step` that has any, each beside the base's own of the same prompt and seed."""
    drawn = runs.pictures(folder)
    newest = max((one.step for one in drawn if 0 < one.step <= step), default=None)
    before = {one.number: one.path for one in drawn if one.step == 0}
    return [(one, before.get(one.number)) for one in drawn if one.step == newest]


def _picture(path: Path, keep_words: bool) -> bytes:
    """A picture's file as it is, or its pixels alone in a file without any text."""
    if keep_words:
        return path.read_bytes()
    with Image.open(path) as image:
        return images.png_bytes(Image.frombytes(image.mode, image.size, image.tobytes()))


def _settings(run: Config, told: Run, choice: Choice, file: LoRAFile) -> dict[str, str]:
    """What the card says of the training."""
    text = f", text encoder {run.optimizer.text_encoder_learning_rate:g}" if run.lora.text_encoder else ""
    sides = run.resolution_px if isinstance(run.resolution_px, list) else [run.resolution_px] if run.resolution_px else []
    values = {
        "Pictures": str(_started(told.folder).get("pictures", "")),
        "Steps": str(run.steps) if choice.step == run.steps else f"{choice.step} of {run.steps}",
        "Batch": str(run.batch * run.optimizer.accumulation),
        "Rank, alpha": f"{run.lora.rank}, {run.lora.alpha:g}",
        "Targets": str(run.lora.targets),
        "Optimizer": f"{run.optimizer.name}, {run.optimizer.schedule}, rate {run.optimizer.learning_rate:g}{text}",
        "Resolution": ", ".join(f"{side} px" for side in sides),
        "Seed": str(run.seed),
        "SHA-256 of the weights": file.metadata.get("sshs_model_hash", ""),
    }
    return {key: value for key, value in values.items() if value}


def _started(folder: Path) -> dict[str, Any]:
    return next((row for row in run_folder.rows(folder) if row["event"] == "started"), {})


# What is written


def _write(contents: Mapping[str, bytes], out: Path, archive: Path, *, check: Callable[[Path], None]) -> None:
    """The folder under a temporary name, looked at, zipped, and only then given its name."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        for name, content in contents.items():
            files.write(part / name, content)
        check(part)
        files.write(archive, zipped(contents, top=out.name))
        part.rename(out)
    except OSError as problem:
        archive.unlink(missing_ok=True)
        raise UserError(f"{out} could not be written ({problem.strerror}); choose another folder with --out.") from problem
    finally:
        shutil.rmtree(part, ignore_errors=True)


def zipped(contents: Mapping[str, bytes], *, top: str) -> bytes:
    """A zip with all files in a folder `top`: equal contents give equal bytes, whenever and wherever it is made."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored: weights and pictures do not get smaller
        for name in sorted(contents):
            entry = zipfile.ZipInfo(f"{top}/{name}", _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, contents[name])
    return buffer.getvalue()


def push(folder: Path, hub_id: str, *, private: bool = False) -> str:
    """Uploads a shared folder into a new repository of the Hugging Face hub.

    Args:
        hub_id: "owner/name"; one that holds files already is refused.

    Returns:
        Its address.

    Raises:
        UserError: if nobody is signed in, the hub cannot be reached, or the repository holds files; the folder stays as it is.
    """
    api = huggingface_hub.HfApi()
    try:
        url = str(api.create_repo(hub_id, private=private, exist_ok=True))
        held = [name for name in api.list_repo_files(hub_id) if name != ".gitattributes"]
        if not held:
            api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="A LoRA trained with sdlora")
    except Exception as problem:  # requests of every kind fail in their own ways
        raise UserError(f"{_refusal(hub_id, problem)} The folder {folder} is complete and stays.") from problem
    if held:
        there = f"'{hub_id}' on the Hugging Face hub holds {len(held)} files already, such as {held[0]}; give a new name."
        raise UserError(f"{there} The folder {folder} is complete and stays.")
    return url


def _refusal(hub_id: str, problem: Exception) -> str:
    kinds = {one.__name__ for one in type(problem).__mro__}
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if "LocalTokenNotFoundError" in kinds or status == 401:
        return f"'{hub_id}' could not be written to the Hugging Face hub, which knows no token of yours; sign in with `hf auth login`."
    if status == 403:
        return (
            f"'{hub_id}' could not be written to the Hugging Face hub: your token may not; use one that can write, and a name of your own."
        )
    return (
        f"'{hub_id}' could not be written, because the Hugging Face hub did not answer ({type(problem).__name__}); connect and try again."
    )
