"""Prompts and captions as the states that the UNet listens to; with `base_model` the only place where families differ.

CLIP reads 77 tokens: a begin, 75 of the text, an end. A longer text is read in chunks of 75, each with a begin and an end of its own,
and the chunks' states are laid end to end, as A1111 does. A text is cut after each 75 tokens, whatever stands there (A1111 may go back
to a comma), and no token is dropped. Texts of one batch get equally many chunks, the shorter ones empty chunks at their end. There is
no attention mask: padding is heard, as it was when Stable Diffusion was trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdlora.base_model import Base, TextStates
from sdlora.errors import UserError

CHUNK = 75
FURTHER = "\ue000"  # a private character: in a tokenizer it numbers the second and later vectors of a word, see `text_embeddings`


@dataclass(frozen=True)
class Tokens:
    """Token ids [N, C, 77] in C chunks, one tensor for each of the base's text encoders."""

    ids: tuple[Tensor, ...]

    def __getitem__(self, rows: Sequence[int]) -> Tokens:
        """The tokens of some rows, in that order."""
        return Tokens(tuple(one[list(rows)] for one in self.ids))


def tokens(base: Base, captions: Sequence[str], *, chunks: int | None = None) -> Tokens:
    """Token ids of captions, on the base's device.

    Args:
        captions: N texts of any length.
        chunks: how many chunks of 75 tokens each caption gets; as many as the longest needs if not given.

    Raises:
        UserError: if a caption needs more than `chunks`.
    """
    read = [spoken(tokenizer, captions) for tokenizer in base.tokenizers]
    room = _chunks(read) if chunks is None else chunks
    for caption, *lists in zip(captions, *read, strict=True):
        if (needed := _chunks([lists])) > room:
            raise UserError(
                f"'{caption[:40]}…' is {max(map(len, lists))} tokens long, which takes {needed} chunks of {CHUNK}, and there is room for "
                f"{room}; shorten it or allow more chunks."
            )
    filled = [[_chunked(tokenizer, ids, room) for ids in lists] for tokenizer, lists in zip(base.tokenizers, read, strict=True)]
    return Tokens(tuple(torch.tensor(rows, dtype=torch.long).reshape(-1, room, CHUNK + 2).to(base.device) for rows in filled))


def count(base: Base, caption: str) -> int:
    """How many tokens the base's first tokenizer makes of a caption, without begin and end."""
    return len(spoken(base.tokenizers[0], [caption])[0])


def chunk_count(base: Base, captions: Sequence[str]) -> int:
    """How many chunks of 75 tokens the longest of some captions needs, at least 1."""
    return _chunks([spoken(tokenizer, captions) for tokenizer in base.tokenizers])


def encode(base: Base, tokens: Tokens) -> TextStates:
    """Text states of token ids, with gradients if a text encoder's LoRA asks for them.

    The states of layer `base.clip_skip`, counted from the last; SD 1.x and 2.x then apply the encoder's final norm, as A1111 and
    diffusers do. SDXL (Podell et al. 2023, arXiv 2307.01952, section 2.1) takes both encoders' states without that norm, side by side,
    and the second's projected sentence of the first chunk.

    Args:
        tokens: ids [N, C, 77] for each text encoder.

    Returns:
        States [N, C · 77, D], and for SDXL the pooled sentence [N, P].

    Raises:
        UserError: if `base.clip_skip` leaves no layer of an encoder.
    """
    answers = [
        encoder.to(base.device)(ids.flatten(0, 1), output_hidden_states=True)  # it may have been sent away; no attention mask is meant
        for encoder, ids in zip(base.text_encoders, tokens.ids, strict=True)
    ]
    states = torch.cat([_layer(base, *pair) for pair in zip(base.text_encoders, answers, strict=True)], dim=-1)
    captions, chunks, length = tokens.ids[0].shape
    context = states.reshape(captions, chunks * length, states.shape[-1])
    if base.family != "sdxl":
        return TextStates(context)
    return TextStates(context, _sentence(base, tokens.ids[-1][:, 0], answers[-1].last_hidden_state[::chunks]))


def spoken(tokenizer: Any, captions: Sequence[str]) -> list[list[int]]:
    """The ids that a tokenizer makes of each caption, all of them, without begin and end; a loaded word has one for each of its vectors."""
    if not captions:
        return []
    plain = tokenizer(list(captions), add_special_tokens=False, truncation=False, padding=False, verbose=False).input_ids
    vectors = _vectors(tokenizer)
    return [[one for number in ids for one in vectors.get(number, (number,))] for ids in plain]


def _vectors(tokenizer: Any) -> dict[int, list[int]]:
    """The ids that a loaded word stands for, in their order, by the first of them, which is the word's own."""
    added: dict[str, int] = tokenizer.added_tokens_encoder
    found: dict[int, list[int]] = {}
    for content, number in sorted(added.items(), key=lambda item: item[1]):
        found.setdefault(added[content.partition(FURTHER)[0]], []).append(number)
    return found


def _chunks(read: Sequence[Sequence[list[int]]]) -> int:
    longest = max((len(ids) for lists in read for ids in lists), default=0)
    return max(1, math.ceil(longest / CHUNK))


def _chunked(tokenizer: Any, ids: list[int], chunks: int) -> list[list[int]]:
    """Chunks of begin, up to 75 tokens, end, and the padding that the encoder was trained with: "!" in SD 2.x, the end elsewhere."""
    begin, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    pieces = [ids[start : start + CHUNK] for start in range(0, chunks * CHUNK, CHUNK)]
    return [[begin, *piece, end, *[padding] * (CHUNK - len(piece))] for piece in pieces]


def _layer(base: Base, encoder: Any, answer: Any) -> Tensor:
    layers = len(answer.hidden_states) - 1  # the first is the embedding, before any layer
    if not 1 <= base.clip_skip <= layers:
        raise UserError(
            f"Clip skip {base.clip_skip} is not one of the layers 1 (the last) to {layers} of the text encoder of '{base.name}'."
        )
    states: Tensor = answer.hidden_states[-base.clip_skip]
    if base.family == "sdxl":
        return states
    normed: Tensor = getattr(encoder, "text_model", encoder).final_layer_norm(states)
    return normed


def _sentence(base: Base, ids: Tensor, last: Tensor) -> Tensor:
    """The projected state at the first end token.

    The encoder's own `text_embeds` are not asked: with the config of SDXL's second encoder (end token "2") transformers takes the
    highest id for the end, and a word loaded later has a higher one.
    """
    ends = (ids == base.tokenizers[-1].eos_token_id).int().argmax(dim=1)
    pooled: Tensor = base.text_encoders[-1].text_projection(last[torch.arange(len(ids), device=ids.device), ends])
    return pooled
