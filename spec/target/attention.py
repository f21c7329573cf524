"""Grouped-query attention over a long slot cache.

On a CPU our own kernel attends, to trees and to prompts. It skips slots that are not in use, and what a query gets does
not depend on the other queries, so that a prompt is read to the same numbers in whatever chunks. Elsewhere, given a
mask, transformers' sdpa would repeat keys and values for every query head over the whole preallocated buffer; for short
blocks the query heads of a group are packed along the node axis instead, so that each key is read once: (B, H, n, D)
becomes (B, Hkv, H/Hkv * n, D).
`install` registers the function as "sdpa" in transformers' attention registry; outside of slot forwards it calls the
function that was registered before.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels import native
from .masks import active_view

LONGEST = 128  # query tokens that are packed; longer blocks are prompts, for which the stock kernel is as good
_stock: Callable = ALL_ATTENTION_FUNCTIONS["sdpa"]  # the function registered before ours


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention signature: query (B, H, n, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), a
    boolean mask (B, 1, n, T); returns (B, n, H, Dv) and no weights."""
    batch, heads, nodes, width = query.shape
    groups = heads // key.shape[1]
    biased = kwargs.get("position_bias") is not None
    if active_view() is None or attention_mask is None or biased:
        return _stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if native.can_attend(query, key, value, attention_mask):
        scale = width**-0.5 if scaling is None else scaling
        return torch.ops.paceline.slot_attention(query, key, value, attention_mask, scale), None
    if groups == 1 or nodes > LONGEST:
        return _stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    packed = query.reshape(batch, key.shape[1], groups * nodes, width)
    mask = attention_mask.expand(-1, groups, -1, -1).reshape(batch, 1, groups * nodes, -1)
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, nodes, -1).transpose(1, 2).contiguous(), None


def install() -> None:
    """Register `packed_attention` in transformers' registry; calling it again has no effect."""
    global _stock
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not packed_attention:
        _stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        ALL_ATTENTION_FUNCTIONS["sdpa"] = packed_attention
