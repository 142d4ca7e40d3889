"""Folders of the Hugging Face hub: its cache is asked first, without any request, and only the files that are needed are fetched.

A base that was fetched once therefore opens offline, and a newer version on the hub never changes a base between two runs unasked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub

from sdlora.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_name(name: str) -> bool:
    """Whether this can be a hub id, "owner/name"."""
    return bool(_NAME.fullmatch(name)) and len(name) <= 200


def cached(name: str) -> Path | None:
    """The folder in the cache, whatever it holds; no request is made."""
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not there: LocalEntryNotFoundError is both
        return None


def listing(name: str) -> list[str]:
    """The names of a repository's files.

    Raises:
        UserError: if the hub does not know it, does not let one in, or cannot be reached.
    """
    try:
        found = huggingface_hub.HfApi().model_info(name).siblings or []  # one request; `list_repo_files` tries for 23 s when offline
    except Exception as problem:  # requests of every kind fail in their own ways
        raise _refusal(name, problem) from problem
    return [one.rfilename for one in found]


def fetch(name: str, files: Iterable[str]) -> Path:
    """The folder in the cache after the named files (or patterns) have been fetched.

    Raises:
        UserError: as `listing` does.
    """
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=sorted(files)))
    except Exception as problem:
        raise _refusal(name, problem) from problem


def _refusal(name: str, problem: Exception) -> UserError:
    kinds = {one.__name__ for one in type(problem).__mro__}
    if "GatedRepoError" in kinds:
        return UserError(f"'{name}' on the Hugging Face hub is gated; accept its terms there, and sign in with `hf auth login`.")
    if "RepositoryNotFoundError" in kinds:
        return UserError(
            f"There is no folder '{name}' here and no such repository on the Hugging Face hub; check the spelling, or sign in."
        )
    return UserError(
        f"'{name}' is neither a folder here nor in the Hugging Face cache, and the hub cannot be reached ({type(problem).__name__}); "
        "connect, or give a local folder or .safetensors checkpoint."
    )
