"""Documents of packed rows apart: each in a row of its own.

Attention keeps the documents of a row apart by a mask. A state would run on from one to the next, so that models that
keep states read each document in a row of its own. Documents of like lengths are read together, so that at most half of
what is read is padding. Knows no model.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Documents:
    """The documents of packed rows, whose `positions` (B, T) begin at 0 with each of them.

    They are read group by group, in each of which the longest has at most twice the tokens of the shortest; or all
    `at_once`."""

    def __init__(self, positions: Tensor, at_once: bool = False):
        begins = positions == 0
        begins[:, 0] = True
        self.shape = positions.shape
        self.lengths: list[int] = ((begins.flatten().cumsum(0) - 1).bincount()).tolist()
        self.groups: list[list[int]] = []
        for number in sorted(range(len(self.lengths)), key=lambda number: -self.lengths[number]):
            if self.groups and (at_once or 2 * self.lengths[number] >= self.lengths[self.groups[-1][0]]):
                self.groups[-1].append(number)
            else:
                self.groups.append([number])

    def apart(self, packed: Tensor) -> list[Tensor]:
        """Tokens (B, T) as a row for each document, padded behind its end by zeros, (P, L) for each group."""
        pieces = packed.flatten(0, 1).split(self.lengths)
        return [pad_sequence([pieces[number] for number in group], batch_first=True) for group in self.groups]

    def packed(self, apart: list[Tensor]) -> Tensor:
        """States (P, L, H) of each group's documents as those of the packed rows, (B, T, H)."""
        pieces = [apart[0].new_empty(0)] * len(self.lengths)
        for group, rows in zip(self.groups, apart):
            for number, states in zip(group, rows):
                pieces[number] = states[: self.lengths[number]]
        return torch.cat(pieces).unflatten(0, self.shape)
