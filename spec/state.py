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
    def empty(cls, batch: int, capacity: int, eos: int, device: torch.device) -> "DecodeState":
        """Buffers for `batch` rows and `eos` end-of-text ids; every row is done until a text is loaded."""

        def numbers(*shape: int) -> Tensor:
            return torch.ones(shape, dtype=torch.int64, device=device)

        flags = torch.ones(batch, dtype=torch.bool, device=device)
        return cls(
            tokens=numbers(batch, capacity),
            lengths=numbers(batch),
            limits=numbers(batch),
            done=flags,
            failed=~flags,
            keys=numbers(batch, 2),
            eos=numbers(eos),
            committed=numbers(batch),
        )

    def load(self, input_ids: Tensor, pads: Tensor, new_tokens: int, keys: Tensor, eos: Tensor) -> None:
        """Start on the rows of `input_ids` (B, P) without their `pads` (B,) left-padding tokens."""
        width, trash = input_ids.shape[1], self.tokens.shape[1] - 1
        columns = torch.arange(width, device=input_ids.device) - pads[:, None]  # (B, P)
        self.tokens.zero_()
        self.tokens.scatter_(1, torch.where(columns >= 0, columns, trash), input_ids)
        self.lengths.copy_(width - pads)
        self.limits.copy_(width - pads + new_tokens)
        self.keys.copy_(keys)
        self.eos.copy_(eos)
        self.done.fill_(False)
        self.failed.fill_(False)
        self.committed.zero_()

    def roots(self) -> Tensor:
        """The last committed token of each row, (B, 1)."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)
