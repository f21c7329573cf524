"""Which tokens a drafter of a smaller vocabulary should know: the commonest of the target's own."""

from collections.abc import Iterable

import torch
from torch import Tensor


def frequent_tokens(rows: Iterable[dict], size: int, vocab_size: int) -> Tensor:
    """The `size` commonest of the target's own tokens in `rows` (dicts of `input_ids` and `loss_mask`) as a head
    vocabulary: ascending ids. Of equally common tokens the lower ids are taken, unseen ones last.

    Raises ValueError for a size that is no part of the vocabulary, and for rows without any of the target's tokens."""
    if not 1 <= size <= vocab_size:
        raise ValueError(f"a head vocabulary of {size} tokens must be at least 1 and at most the target's {vocab_size}")
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for row in rows:
        ids, mask = torch.as_tensor(row["input_ids"]).long(), torch.as_tensor(row["loss_mask"]).bool()
        counts += ids[mask].bincount(minlength=vocab_size)
    if not counts.any():
        raise ValueError("the data hold none of the target's own tokens to take a head vocabulary from; prepare more")
    return counts.argsort(descending=True, stable=True)[:size].sort().values
