"""Textual inversion: words with vectors of their own, loaded for generation (Gal et al. 2022, arXiv 2208.01618).

A file holds n vectors that stand where a word's token would stand. The word gets n ids in each tokenizer, and n rows in each text
encoder's table of tokens behind the base's own, which stay as they are; `text` speaks all n where a prompt holds the word. As for any
other word of CLIP, upper and lower case are one; a word of letters is heard only as a whole word, so "cat" is not in "category".
Everything is checked before anything changes, and the tokenizers are changed as copies, because another base may hold the same ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from sdlora import text, weights_file
from sdlora.base_model import TITLES, Base
from sdlora.errors import UserError

NAMELESS = ("emb_params", "*")  # A1111's and sd-scripts' key, and the placeholder of the paper's code: the file's name is the word
XL_KEYS = ("clip_l", "clip_g")
_FAMILIES = {(768,): "sd1", (1024,): "sd2", (768, 1280): "sdxl"}


@dataclass(frozen=True)
class Embedding:
    """A textual inversion file: the word that it gives, and the vectors [n, D] for each text encoder."""

    word: str
    tables: tuple[Tensor, ...]


def load(base: Base, path: Path, *, word: str | None = None) -> str:
    """Teaches a base the word of a textual inversion file; the same file again changes nothing.

    Args:
        base: gets new tokenizers and longer tables of tokens; its own words mean what they meant.
        path: a .safetensors file of any layout that `read` knows.
        word: what to write in prompts; the file's own word if not given.

    Returns:
        The word.

    Raises:
        UserError: as `read` does, if the file was made for another family, or if the word has a meaning already.
    """
    embedding = read(path)
    word = (embedding.word if word is None else word).strip()
    _check_fit(base, path, embedding)
    if _is_loaded(base, path, embedding, word):
        return word
    names = [word, *(f"{word}{text.FURTHER}{i}" for i in range(1, len(embedding.tables[0])))]
    tokenizers = tuple(_with_word(tokenizer, names) for tokenizer in base.tokenizers)
    places = [tokenizer.convert_tokens_to_ids(names) for tokenizer in tokenizers]
    if any(min(ids) < len(tokenizer) for tokenizer, ids in zip(base.tokenizers, places, strict=True)):
        raise _taken(base, path, word)  # CLIP spells longer words with it
    if any(text.spoken(tokenizer, [word]) != [ids] for tokenizer, ids in zip(tokenizers, places, strict=True)):
        raise _unspeakable(path, word)
    for encoder, ids, table in zip(base.text_encoders, places, embedding.tables, strict=True):
        _append(encoder, ids, table)
    base.tokenizers = tokenizers
    return word


def read(path: Path) -> Embedding:
    """Opens a textual inversion file: `emb_params` (A1111, sd-scripts), one tensor named by its word (diffusers), or `clip_l` and `clip_g`.

    Raises:
        UserError: as `weights_file.read` does, or if the file holds something else.
    """
    entries = weights_file.header(path, limit_bytes=weights_file.LORA_HEADER_BYTES).tensors
    names = list(XL_KEYS) if set(entries) == set(XL_KEYS) else sorted(entries)
    if names != list(XL_KEYS) and (len(names) != 1 or names[0] in XL_KEYS):
        listed = ", ".join(repr(name[:60]) for name in names[:3]) or "nothing"
        raise UserError(
            f"{path} holds {len(names)} tensors ({listed}); a textual inversion holds emb_params, one tensor named by its word, or "
            "clip_l and clip_g."
        )
    tensors = weights_file.read(path).tensors
    word = path.stem if names[0] in (*NAMELESS, *XL_KEYS) else names[0]
    return Embedding(word, _tables(path, [tensors[name] for name in names]))


def _tables(path: Path, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The vectors as [n, D], n the same for each encoder."""
    tables = tuple(tensor[None] if tensor.ndim == 1 else tensor for tensor in tensors)
    formed = all(table.ndim == 2 and table.is_floating_point() and table.numel() for table in tables)
    if not formed or len({len(table) for table in tables}) != 1:
        found = " and ".join(f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors)
        raise UserError(f"{path} holds {found}; a textual inversion holds [vectors, width] of floats, as many vectors for each encoder.")
    return tables


def _check_fit(base: Base, path: Path, embedding: Embedding) -> None:
    widths = tuple(table.shape[1] for table in embedding.tables)
    wanted = tuple(encoder.get_input_embeddings().embedding_dim for encoder in base.text_encoders)
    if widths != wanted:
        family = "sdxl" if len(widths) == 2 else _FAMILIES.get(widths)
        made = TITLES[family] if family else "a model unknown here"
        raise UserError(
            f"{path} was made for {made} (vectors {' and '.join(map(str, widths))} wide), and the base '{base.name}' is "
            f"{TITLES[base.family]} ({' and '.join(map(str, wanted))} wide); load it into a base of the family that it was made for."
        )


def _is_loaded(base: Base, path: Path, embedding: Embedding, word: str) -> bool:
    """Whether the word means exactly these vectors already; an error if it means anything else."""
    spoken = [text.spoken(tokenizer, [word])[0] for tokenizer in base.tokenizers]
    if not word.isprintable() or not spoken[0]:
        raise _unspeakable(path, word)
    if len(base.tokenizers[0].tokenize(word)) > 1:
        return False  # the base has to spell it
    rows = [encoder.get_input_embeddings().weight[ids] for encoder, ids in zip(base.text_encoders, spoken, strict=True)]
    if all(row.shape == table.shape and torch.equal(row, table.to(row)) for row, table in zip(rows, embedding.tables, strict=True)):
        return True
    raise _taken(base, path, word)


def _unspeakable(path: Path, word: str) -> UserError:
    return UserError(f"{path} gives the word {word[:60]!r}, which cannot be written in a prompt; give it another word.")


def _taken(base: Base, path: Path, word: str) -> UserError:
    return UserError(f"{path} gives the word {word[:60]!r}, which has a meaning in the base '{base.name}' already; give it another word.")


def _with_word(tokenizer: Any, names: list[str]) -> Any:
    """A copy of the tokenizer with a word, if it has a letter at both ends only as a whole word, and the names of its further vectors."""
    word, *further = names
    whole = word[0].isalnum() and word[-1].isalnum()
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens([AddedToken(word, single_word=whole, normalized=True), *further])
    return changed


@torch.no_grad()
def _append(encoder: Any, ids: list[int], rows: Tensor) -> None:
    """Puts rows behind the encoder's table of tokens, in its own number format and place, frozen as the rest."""
    table = encoder.get_input_embeddings()
    grown = table.weight.new_zeros(max(len(table.weight), ids[-1] + 1), table.embedding_dim)
    grown[: len(table.weight)] = table.weight
    grown[ids] = rows.to(grown)
    table.weight = nn.Parameter(grown, requires_grad=False)
    table.num_embeddings = len(grown)
