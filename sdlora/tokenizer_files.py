"""Tokenizers: words to token ids, with the padding that each family was trained on.

All Stable Diffusion families share CLIP's one vocabulary of 49,408 tokens. Single files bring none, so it is looked for where it is likely
to be, before the hub is asked once. OpenCLIP was trained with token 0, "!", after the end of a prompt, CLIP with its end token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from sdlora import hub
from sdlora.errors import UserError

END, ZERO = "<|endoftext|>", "!"
PADDING: dict[str, tuple[str, ...]] = {"sd1": (END,), "sd2": (ZERO,), "sdxl": (END, ZERO)}
LENGTH = 77  # tokens of one chunk, with start and end
SOURCE = "openai/clip-vit-large-patch14"
_HUB = (
    SOURCE, "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4",
    "stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1-base", "stabilityai/stable-diffusion-xl-base-1.0",
)  # fmt: skip
FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def folder_in(folder: Path) -> Path | None:
    """The folder itself or its `tokenizer` folder, whichever holds a tokenizer's files."""
    return next((one for one in (folder, folder / "tokenizer") if _holds_one(one)), None)


def _holds_one(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))


def for_checkpoint(path: Path, given: str | None) -> Path:
    """The folder of the tokenizer for a single file: the one given, one beside the file, or one that the hub's cache or the hub has.

    Raises:
        UserError: if there is none.
    """
    if given is not None:
        return named(given)
    cached = (hub.cached(name) for name in _HUB)
    for folder in (path.with_suffix(""), path.parent, *(one for one in cached if one is not None)):
        if found := folder_in(folder):
            return found
    try:
        found = folder_in(hub.fetch(SOURCE, FILES))
    except UserError:
        found = None
    if found is None:
        raise UserError(
            f"{path} brings no tokenizer, none lies beside it or in the Hugging Face cache, and the hub cannot be reached; put vocab.json "
            f"and merges.txt of {SOURCE} into {path.parent / 'tokenizer'}, or give a folder that holds them as the tokenizer."
        )
    return found


def named(name: str) -> Path:
    """The folder of a tokenizer that the user names: a folder, a pipeline's folder, or a hub id.

    Raises:
        UserError: if it holds none.
    """
    folder: Path | None = Path(name)
    if not Path(name).is_dir() and hub.is_name(name):
        folder = hub.cached(name)
        if folder is None or folder_in(folder) is None:
            folder = hub.fetch(name, [*FILES, *(f"tokenizer/{one}" for one in FILES)])
    found = folder_in(folder) if folder is not None and folder.is_dir() else None
    if found is None:
        raise UserError(f"Tokenizer '{name}' is no folder with vocab.json and merges.txt, or tokenizer.json; give one, such as {SOURCE}.")
    return found


def load(folder: Path, *, words: int, pad: str | None = None) -> Any:
    """Opens a tokenizer.

    Args:
        words: how many the text encoder knows.
        pad: what follows the end of a prompt; as its own files say if not given.

    Raises:
        UserError: if its files are missing or damaged, or it is not the text encoder's.
    """
    if not _holds_one(folder):  # the library would make up a tokenizer of three words
        raise UserError(f"{folder} holds no tokenizer (vocab.json and merges.txt, or tokenizer.json); fetch the whole folder again.")
    options = {} if pad is None else {"pad_token": pad}
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=LENGTH, **options)
    except Exception as problem:  # damaged files break the libraries in any way they like
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(f"The tokenizer in {folder} cannot be opened ({reason[:200]}); fetch it again.") from problem
    if len(tokenizer) > words:
        raise UserError(
            f"The tokenizer in {folder} has {len(tokenizer):,} words, but the text encoder knows {words:,}; give the one it had."
        )
    return tokenizer
