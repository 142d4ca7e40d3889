"""Prompts and captions as the states that the UNet listens to; with `base_model` the only place where families differ.

CLIP reads 77 tokens: a begin, 75 of the text, an end. A longer text is read in chunks of 75, each with a begin and an end of its own,
and the chunks' states are laid end to end, as A1111 does. A text is cut after each 75 tokens, whatever stands there (A1111 may go back
to a comma), and no token is dropped. Texts of one batch get equally many chunks, the shorter ones empty chunks at their end. There is
no attention mask: padding is heard, as it was when Stable Diffusion was trained.

Captions are read as they stand (`tokens`), prompts of a person with the syntax of `prompts` (`weighted`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdlora import base_model, prompts
from sdlora.base_model import Base, TextStates
from sdlora.errors import UserError

CHUNK = 75
LEAST_MEAN = 0.01  # of the deviation, below which the mean of a chunk's states is not restored
FURTHER = "\ue000"  # a private character: in a tokenizer it numbers the second and later vectors of a word, see `text_embeddings`


@dataclass(frozen=True)
class Tokens:
    """Token ids [N, C, 77] in C chunks, one tensor for each of the base's text encoders.

    Args:
        weights: how loud each token is [N, C, 77], likewise; none if all speak as they are.
    """

    ids: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] = ()

    def __getitem__(self, rows: Sequence[int]) -> Tokens:
        """The tokens of some rows, in that order."""
        chosen = list(rows)
        return Tokens(tuple(one[chosen] for one in self.ids), tuple(one[chosen] for one in self.weights))


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


def weighted(base: Base, texts: Sequence[str]) -> Tokens:
    """Token ids and weights of prompts in the syntax of `prompts`, on the base's device.

    What stands between two BREAKs begins a chunk of its own, and fills up its last one, as in A1111; after a BREAK at the end none is
    begun. Prompts without weights and breaks get what `tokens` gives.

    Args:
        texts: N prompts without LoRA tags.
    """
    read = [prompts.pieces(one) for one in texts]
    if all(parts == ((prompts.Piece(parts[0][0].words),),) for parts in read):
        return tokens(base, [parts[0][0].words for parts in read])
    spelled = [[_weighted_chunks(tokenizer, parts) for parts in read] for tokenizer in base.tokenizers]
    room = max(len(chunks) for rows in spelled for chunks in rows)
    ids, weights = [], []
    for tokenizer, rows in zip(base.tokenizers, spelled, strict=True):
        full = [rows_of + [([], [])] * (room - len(rows_of)) for rows_of in rows]
        ids.append(torch.tensor([[_chunked(tokenizer, numbers, 1)[0] for numbers, _ in chunks] for chunks in full], dtype=torch.long))
        loud = [[[1.0, *loudness, *[1.0] * (CHUNK + 1 - len(loudness))] for _, loudness in chunks] for chunks in full]
        weights.append(torch.tensor(loud))
    return Tokens(tuple(one.to(base.device) for one in ids), tuple(one.to(base.device) for one in weights))


def _weighted_chunks(tokenizer: Any, parts: Sequence[Sequence[prompts.Piece]]) -> list[tuple[list[int], list[float]]]:
    """Chunks of up to 75 token ids and as many weights; a weighted piece is spelled for itself."""
    chunks = []
    for i, part in enumerate(parts):
        spelled = spoken(tokenizer, [piece.words for piece in part])
        ids = [number for numbers in spelled for number in numbers]
        loudness = [piece.weight for piece, numbers in zip(part, spelled, strict=True) for _ in numbers]
        if ids or i < len(parts) - 1:
            chunks += [(ids[at : at + CHUNK], loudness[at : at + CHUNK]) for at in range(0, max(1, len(ids)), CHUNK)]
    return chunks or [([], [])]


def count(base: Base, caption: str) -> int:
    """How many tokens the base's first tokenizer makes of a caption, without begin and end."""
    return len(spoken(base.tokenizers[0], [caption])[0])


def chunk_count(base: Base, captions: Sequence[str]) -> int:
    """How many chunks of 75 tokens the longest of some captions needs, at least 1."""
    return _chunks([spoken(tokenizer, captions) for tokenizer in base.tokenizers])


def encode(base: Base, tokens: Tokens, *, clip_skip: int | None = None) -> TextStates:
    """Text states of token ids, with gradients if a text encoder's LoRA asks for them.

    The states of layer `base.clip_skip`, counted from the last; SD 1.x and 2.x then apply the encoder's final norm, as A1111 and
    diffusers do. SDXL (Podell et al. 2023, arXiv 2307.01952, section 2.1) takes both encoders' states without that norm, side by side,
    and the second's projected sentence of the first chunk.

    Weights w multiply the states z of each encoder, and each chunk's mean is then restored as A1111 does:
    z' = w z · mean(z) / mean(w z). Where |mean(z)| is less than a hundredth of the deviation (0.1 of it in SD 1.5, 0.001 in the mini base)
    the quotient of the means is chance, and the weights alone count, A1111's "No norm". The sentence has no weights.

    Args:
        tokens: ids [N, C, 77] for each text encoder.
        clip_skip: the layer, if not the base's own.

    Returns:
        States [N, C · 77, D], and for SDXL the pooled sentence [N, P].

    Raises:
        UserError: if there is no such layer of an encoder.
    """
    skip = base.clip_skip if clip_skip is None else clip_skip
    base_model.bring(base, "text_encoder")
    answers = [
        encoder(ids.flatten(0, 1), output_hidden_states=True)  # no attention mask is meant
        for encoder, ids in zip(base.text_encoders, tokens.ids, strict=True)
    ]
    layers = [_layer(base, encoder, answer, skip) for encoder, answer in zip(base.text_encoders, answers, strict=True)]
    if tokens.weights:
        layers = [_loud(layer, weights.flatten(0, 1)) for layer, weights in zip(layers, tokens.weights, strict=True)]
    states = torch.cat(layers, dim=-1)
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


def _loud(states: Tensor, weights: Tensor) -> Tensor:
    """States [chunks, 77, D] times weights [chunks, 77], with each chunk's mean restored; a chunk without weights keeps its bytes."""
    plain = states.float()
    loud = plain * weights.unsqueeze(-1)
    before, after = (one.mean(dim=(1, 2), keepdim=True) for one in (plain, loud))
    says_something = before.abs() >= LEAST_MEAN * plain.std(dim=(1, 2), keepdim=True)
    scale = torch.where(says_something, before / after, 1.0)
    changed = (weights != 1).any(dim=1)[:, None, None]
    return torch.where(changed, (loud * scale).to(states.dtype), states)


def _layer(base: Base, encoder: Any, answer: Any, skip: int) -> Tensor:
    layers = len(answer.hidden_states) - 1  # the first is the embedding, before any layer
    if not 1 <= skip <= layers:
        raise UserError(f"Clip skip {skip} is not one of the layers 1 (the last) to {layers} of the text encoder of '{base.name}'.")
    states: Tensor = answer.hidden_states[-skip]
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
