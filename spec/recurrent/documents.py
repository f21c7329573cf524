"""Documents of packed rows apart: each in a row of its own.

Attention keeps the documents of a row apart by a mask. A state would run on from one to the next, so that models that
keep states read each document in a row of its own. Knows no model.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Documents:
    """The documents of packed rows, whose `positions` (B, T) begin at 0 with each of them."""

    def __init__(self, positions: Tensor):
        begins = positions == 0
        begins[:, 0] = True
        self.shape = positions.shape
        self.lengths = ((begins.flatten().cumsum(0) - 1).bincount()).tolist()

    def apart(self, packed: Tensor) -> Tensor:
        """Tokens (B, T) as a row for each document, padded behind its end by zeros, (P, L)."""
        return pad_sequence(list(packed.flatten(0, 1).split(self.lengths)), batch_first=True)

    def packed(self, apart: Tensor) -> Tensor:
        """States (P, L, H) of documents as those of the packed rows, (B, T, H)."""
        pieces = [states[:length] for states, length in zip(apart, self.lengths)]
        return torch.cat(pieces).unflatten(0, self.shape)
