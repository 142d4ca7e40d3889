"""Attention whose q, k and v are asked together, since they see the same input: diffusers' own, with `lora_fused` for the linears.

Fewer operations for the same numbers: one product for the A's of all three, no sum of three gradients, no division by a factor of 1.
Modules that do more than Stable Diffusion's attention keep diffusers' processor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sdlora import lora
from sdlora.lora import LoRALayer


def share_inputs(model: nn.Module) -> int:
    """Lets the attentions of a model that have LoRA layers answer together; what they answer stays the same.

    Returns:
        How many do.
    """
    chosen = [module for module in model.modules() if _is_plain(module) and any(isinstance(one, LoRALayer) for one in _projections(module))]
    for module in chosen:
        module.forward = partial(_attend, module)  # as a processor it would be looked at by `inspect` at each call
    return len(chosen)


def _projections(attention: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    return attention.to_q, attention.to_k, attention.to_v


def _is_plain(module: Any) -> bool:
    """Whether a module is an attention as Stable Diffusion's UNets have it: no norms or residuals of its own."""
    extras = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")
    return (
        hasattr(module, "set_processor")
        and all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "to_out"))
        and not any(getattr(module, name, None) for name in extras)
        and not module.residual_connection
        and module.rescale_output_factor == 1
    )


def _attend(
    attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None, **_: Any
) -> Tensor:
    """softmax(q kᵀ / √d) v of each head, and the projection out of it, as diffusers asks for it.

    Args:
        attention: whose projections and heads they are.
        hidden_states: [B, N, D], what q is of.
        encoder_hidden_states: [B, M, E], what k and v are of; the former if not given.

    Returns:
        [B, N, D].
    """
    assert hidden_states.ndim == 3
    assert attention_mask is None
    to_q, to_k, to_v = _projections(attention)
    if encoder_hidden_states is None:
        query, key, value = lora.together(hidden_states, [to_q, to_k, to_v])
    else:
        query = to_q(hidden_states)
        key, value = lora.together(encoder_hidden_states, [to_k, to_v])
    batch, heads = len(query), attention.heads
    query, key, value = (one.view(batch, -1, heads, one.shape[-1] // heads).transpose(1, 2) for one in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value)
    out, dropout = attention.to_out
    made: Tensor = dropout(out(mixed.transpose(1, 2).flatten(2)))
    return made
