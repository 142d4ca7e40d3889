"""Prompts and captions as the states that the UNet listens to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sdlora.base_model import Base, TextStates


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
        chunks: how many chunks of 75 tokens each caption gets; as many as the longest needs if not given.
    """
    length = base.tokenizers[0].model_max_length
    ids: Tensor = base.tokenizers[0](
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return Tokens((ids[:, None].to(base.device),))


def encode(base: Base, tokens: Tokens) -> TextStates:
    """Text states of token ids, with gradients if a text encoder's LoRA asks for them."""
    return TextStates(base.text_encoders[0](tokens.ids[0][:, 0]).last_hidden_state)
