"""Which tokens a drafter of a smaller vocabulary should know: the commonest of the target's own; and the target's law
over them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...drafters.known_tokens import trimmed_head
from ...spec.target.weights import is_in_blocks, linear_shape
from .target import ScaledHead


def frequent_tokens(rows: Iterable[dict], size: int, vocab_size: int, known: Tensor | None = None) -> Tensor:
    """The `size` commonest of the target's own tokens in `rows` (dicts of `input_ids` and `loss_mask`) as a head
    vocabulary: ascending ids. Of equally common tokens the lower ids are taken, unseen ones last. Tokens `known` (n,)
    are taken before all others.

    Raises ValueError for a size that is no part of the vocabulary, and for rows without any of the target's tokens."""
    if not 1 <= size <= vocab_size:
        raise ValueError(f"a head vocabulary of {size} tokens must be at least 1 and at most the target's {vocab_size}")
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for row in rows:
        ids, mask = torch.as_tensor(row["input_ids"]).long(), torch.as_tensor(row["loss_mask"]).bool()
        counts += ids[mask].bincount(minlength=vocab_size)
    if not counts.any():
        raise ValueError("the data hold none of the target's own tokens to take a head vocabulary from; prepare more")
    if known is not None:
        counts[known] += counts.sum()
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def of_known(head: nn.Module, ids: Tensor, dtype: torch.dtype) -> nn.Module:
    """The target's LM head trimmed to the known tokens `ids` (V',), for hidden states in `dtype`: its softmax is the
    target's law on condition that one of them is next."""
    scaled = isinstance(head, ScaledHead)
    linear = head.linear if scaled else head
    if len(ids) == linear_shape(linear)[0] and not is_in_blocks(linear):
        return head
    linear = trimmed_head(linear, ids, dtype)
    return ScaledHead(linear, head.factor, head.cap) if scaled else linear
