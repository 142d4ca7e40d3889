"""What was encoded once is kept: latents of pictures and states of texts, one file each, in one folder outside the data.

An entry's name is the hash of everything that it depends on: the picture's bytes, which part at which size, the autoencoder's weights;
the text's tokens, the text encoders' weights. Nothing else is asked: an edited file has a new name, a renamed one the old. Each entry
carries the hash of its own bytes, and one that is damaged is made anew, so a crash while writing can never be believed later.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from sdlora import base_model, files, text, weights_file
from sdlora import latents as encoding
from sdlora.base_model import Base, TextStates
from sdlora.errors import UserError
from sdlora.latents import Latents
from sdlora.text import Tokens
from sdlora.views import View

VERSION = 1  # of what an entry holds; another number makes all entries anew
AHEAD = 4  # pictures that are decoded while one is encoded
DRAWN = "drawn"  # sub-folder of regularisation pictures
MOST_BYTES = 20 * 2**30


@dataclass(frozen=True)
class Info:
    """How many entries there are, and how much they weigh."""

    folder: Path
    entries: int
    bytes: int


def default_folder() -> Path:
    """`SDLORA_CACHE`, or the user's cache folder."""
    own = os.environ.get("SDLORA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdlora"


def trouble(folder: Path) -> str | None:
    """Why nothing can be kept in a folder, in a sentence; None if all is well."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as problem:
        return f"The cache {folder} cannot be written ({problem.strerror}): the next run encodes all again. SDLORA_CACHE names another."
    return None


def latents(base: Base, views: Sequence[View], *, folder: Path | None, background: tuple[int, int, int]) -> Iterator[Latents]:
    """The latents of views in their order, kept or made; the next pictures are read while one is encoded.

    Args:
        folder: where entries lie; None keeps nothing.
        background: RGB that transparent pictures are laid on.

    Raises:
        UserError: if a picture cannot be read or its latents are not finite.
    """
    keys = [_latents_key(base, view, background) for view in views] if folder else [""] * len(views)
    made: dict[str, Latents] = {}

    def prepared(view: View, key: str) -> Latents | encoding.Pixels:
        kept = _kept_latents(folder, key)
        return kept or encoding.pixels(view, reduction=base.reduction, background=background)

    with ThreadPoolExecutor(max_workers=2) as pool:
        waiting: deque[tuple[View, str, Future[Latents | encoding.Pixels]]] = deque()
        for view, key in [*zip(views, keys, strict=True), *[(None, "")] * AHEAD]:
            if view is not None:
                waiting.append((view, key, pool.submit(prepared, view, key)))
            if view is None or len(waiting) > AHEAD:
                if not waiting:
                    break
                yield _finished(base, folder, *waiting.popleft(), made)


def _finished(
    base: Base, folder: Path | None, view: View, key: str, coming: Future[Latents | encoding.Pixels], made: dict[str, Latents]
) -> Latents:
    """A view's latents: as they were kept, as another view of equal bytes has just got them, or encoded now and kept."""
    ready = coming.result()
    if isinstance(ready, Latents):
        return ready
    if key in made:
        return made[key]
    one = encoding.encode(base, view, ready)
    if folder:
        made[key] = one
        tensors = {"mean": one.mean, "deviation": one.deviation} | ({} if one.mask is None else {"mask": one.mask})
        put(folder, key, tensors)
    return one


def _kept_latents(folder: Path | None, key: str) -> Latents | None:
    tensors = get(folder, key) if folder else None
    return Latents(tensors["mean"], tensors["deviation"], tensors.get("mask")) if tensors else None


def missing(base: Base, views: Sequence[View], *, folder: Path, background: tuple[int, int, int]) -> int:
    """How many of some views have no entry; nothing is read but names."""
    return sum(not entry_path(folder, _latents_key(base, view, background)).is_file() for view in views)


def text_states(base: Base, tokens: Tokens, *, folder: Path | None) -> TextStates:
    """States of texts by text encoders that do not change, kept or made, on the base's device."""
    found = []
    for row in range(len(tokens.ids[0])):
        one = tokens[[row]]
        key = _text_key(base, one) if folder else ""
        kept = get(folder, key) if folder else None
        if kept is None:
            states = text.encode(base, one)
            if folder:
                put(folder, key, {"context": states.context} | ({} if states.pooled is None else {"pooled": states.pooled}))
        else:
            states = TextStates(kept["context"], kept.get("pooled"))
        found.append(states.to(base.device))
    return base_model.joined(found)


# --- keys ---------------------------------------------------------------------------------------------------------------------


def _latents_key(base: Base, view: View, background: tuple[int, int, int]) -> str:
    mask = view.mask if view.mask is None or isinstance(view.mask, str) else files.sha256(view.mask)
    return _key(
        "latents", picture=files.sha256(view.picture), mask=mask, fit=asdict(view.fit), flipped=view.flipped, background=background,
        vae=base.vae_hash, reduction=base.reduction, scaling=base.scaling,
    )  # fmt: skip


def _text_key(base: Base, one: Tokens) -> str:
    ids = [each.flatten().tolist() for each in one.ids]
    return _key("text", ids=ids, encoders=base.text_hash, clip_skip=base.clip_skip, dtype=str(base.dtype), family=base.family)


def _key(kind: str, **parts: Any) -> str:
    told = json.dumps({"kind": kind, "version": VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()


# --- entries ------------------------------------------------------------------------------------------------------------------


def entry_path(folder: Path, key: str) -> Path:
    """Where an entry lies."""
    return folder / key[:2] / f"{key}.safetensors"


def put(folder: Path, key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Keeps an entry; a folder that cannot be written loses nothing but time.

    No fsync: an entry that a power cut leaves half written does not have the hash that it states.

    Returns:
        Whether it was kept.
    """
    path = entry_path(folder, key)
    content = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{key}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save(content, metadata={"key": key, "sha256": _tensors_hash(content)}))
        temporary.replace(path)
    except OSError:
        with suppress(OSError):  # there may be no such folder
            temporary.unlink(missing_ok=True)
        return False
    return True


def get(folder: Path, key: str) -> dict[str, Tensor] | None:
    """An entry, if there is one and it is whole; a damaged one is deleted."""
    path = entry_path(folder, key)
    if not path.is_file():
        return None
    try:
        entry = weights_file.read(path)
        whole = entry.metadata == {"key": key, "sha256": _tensors_hash(entry.tensors)}
    except (UserError, OSError, safetensors.SafetensorError):
        whole = False
    if not whole:
        path.unlink(missing_ok=True)
        return None
    os.utime(path)  # used now: `trim` takes the longest unused first
    return entry.tensors


def _tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        one = tensors[name].contiguous()
        digest.update(f"{name} {one.dtype} {tuple(one.shape)} ".encode())
        digest.update(one.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- the folder ---------------------------------------------------------------------------------------------------------------


def info(folder: Path) -> Info:
    """What the cache holds."""
    sizes = [path.stat().st_size for path in _entries(folder)]
    return Info(folder, len(sizes), sum(sizes))


def clear(folder: Path) -> Info:
    """Deletes all entries, and nothing else; returns what there was."""
    before = info(folder)
    for path in _entries(folder):
        path.unlink(missing_ok=True)
        with suppress(OSError):  # other files may lie there
            path.parent.rmdir()
    return before


def trim(folder: Path, *, most_bytes: int = MOST_BYTES, since_s: float = 0.0) -> int:
    """Deletes the longest unused entries until the rest weighs at most so much.

    Args:
        since_s: entries used after this time (seconds since 1970) stay: they are the running run's.

    Returns:
        The number of deleted entries.
    """
    entries = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in _entries(folder))
    total, deleted = sum(size for _, size, _ in entries), 0
    for used_s, size, path in entries:
        if total <= most_bytes or used_s >= since_s > 0:
            break
        path.unlink(missing_ok=True)
        total, deleted = total - size, deleted + 1
    return deleted


def _entries(folder: Path) -> list[Path]:
    """Files that are named as entries are, half-written ones, and pictures that a base drew."""
    found = [path for path in folder.glob("??/*") if path.suffix in (".safetensors", ".part")] + list(folder.glob(f"{DRAWN}/*.png"))
    return [path for path in found if path.is_file() and not path.is_symlink()]
