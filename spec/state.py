"""The record of persistent buffers that the decode step reads and writes, one row a text.

Every buffer has the batch row as its first axis and a fixed address for the whole run. Position and
cache slot of a committed token are the same number: rows hold no padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class DecodeState:
    """B rows of at most `capacity - 1` tokens; the last column takes what must not be kept."""

    tokens: Tensor  # (B, capacity): the committed text
    lengths: Tensor  # (B,): committed tokens; the last of them, the root, is not in the cache yet
    limits: Tensor  # (B,): the length at which a row is full
    done: Tensor  # (B,) bool
    failed: Tensor  # (B,) bool: the scores held a NaN, or forbade every token
    keys: Tensor  # (B, 2): the row's noise stream
    eos: Tensor  # (E,): token ids that end a row
    committed: Tensor  # (B,): tokens committed by the last step

    @classmethod
    def from_prompt(
        cls, input_ids: Tensor, pads: Tensor, new_tokens: int, capacity: int, keys: Tensor, eos: Tensor
    ) -> "DecodeState":
        """Rows of `input_ids` (B, P) without their `pads` (B,) left-padding tokens."""
        batch, width = input_ids.shape
        columns = torch.arange(width, device=input_ids.device) - pads[:, None]  # (B, P)
        tokens = input_ids.new_zeros(batch, capacity)
        tokens.scatter_(1, torch.where(columns >= 0, columns, capacity - 1), input_ids)
        lengths = width - pads
        flags = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        return cls(
            tokens=tokens,
            lengths=lengths,
            limits=lengths + new_tokens,
            done=flags,
            failed=flags.clone(),
            keys=keys,
            eos=eos,
            committed=torch.zeros_like(lengths),
        )

    def roots(self) -> Tensor:
        """The last committed token of each row, (B, 1)."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)
