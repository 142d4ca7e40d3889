"""Prompts and captions as the states that the UNet listens to."""

from __future__ import annotations

from torch import Tensor

from sdlora.base_model import Base


def token_ids(base: Base, captions: list[str]) -> Tensor:
    """Token ids [B, L], padded to the text encoder's length; what is longer is cut at its end."""
    length = base.tokenizer.model_max_length
    ids: Tensor = base.tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return ids.to(base.device)


def encode(base: Base, ids: Tensor) -> Tensor:
    """Text states [B, L, D] of token ids, with gradients if the text encoder's LoRA asks for them."""
    states: Tensor = base.text_encoder(ids).last_hidden_state
    return states
