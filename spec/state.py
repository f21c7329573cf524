"""The record of persistent buffers that the decode step reads and writes, one row a text.

Every buffer has the batch row as its first axis and a fixed address for the whole run. Position and
cache slot of a committed token are the same number: rows hold no padding.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

NO_END = -2  # no token, and not what an empty node holds


@dataclass(slots=True, eq=False)
class DecodeState:
    """B rows of at most `capacity - 1` tokens; the last column takes what must not be kept."""

    tokens: Tensor  # (B, capacity): the committed text
    lengths: Tensor  # (B,): committed tokens; the last of them, the root, is not in the cache yet
    limits: Tensor  # (B,): the length at which a row is full
    done: Tensor  # (B,) bool
    failed: Tensor  # (B,) bool: the scores held a NaN, or forbade every token
    keys: Tensor  # (B, 2): the row's noise stream
    eos: Tensor  # (B, E): token ids that end the row, NO_END where there are fewer
    temperature: Tensor  # (B,): at which the row is drawn, and drafted for; 1 where it is greedy
    top_k: Tensor  # (B,): how many tokens the row is drawn from at most
    tail: Tensor  # (B,): 1 - top_p, the probability that is cut off
    min_p: Tensor  # (B,): the least probability, as a share of the likeliest token's
    committed: Tensor  # (B,): tokens committed by the last step
    hidden: Tensor | None  # (B, H): the target's last hidden state that gave the root, for drafters that read it

    @classmethod
    def empty(
        cls, batch: int, capacity: int, eos: int, device: torch.device, hidden: Tensor | None = None
    ) -> "DecodeState":
        """Buffers for `batch` rows of at most `eos` end-of-text ids; every row is done until a text is loaded.

        `hidden` is the buffer (B, H) for hidden states, where the drafter reads them."""

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
            eos=numbers(batch, eos) * NO_END,
            temperature=torch.ones(batch, device=device),
            top_k=numbers(batch),
            tail=torch.zeros(batch, device=device),
            min_p=torch.zeros(batch, device=device),
            committed=numbers(batch),
            hidden=hidden,
        )

    def load(self, input_ids: Tensor, pads: Tensor, new_tokens: int, keys: Tensor, eos: Tensor) -> None:
        """Start on the rows of `input_ids` (B, P) without their `pads` (B,) left-padding tokens, all of which end at
        the ids `eos` (at most E)."""
        width, trash = input_ids.shape[1], self.tokens.shape[1] - 1
        columns = torch.arange(width, device=input_ids.device) - pads[:, None]  # (B, P)
        self.tokens.zero_()
        self.tokens.scatter_(1, torch.where(columns >= 0, columns, trash), input_ids)
        self.lengths.copy_(width - pads)
        self.limits.copy_(width - pads + new_tokens)
        self.keys.copy_(keys)
        self.eos.fill_(NO_END)
        self.eos[:, : len(eos)] = eos
        self.done.fill_(False)
        self.failed.fill_(False)
        self.committed.zero_()
        if self.hidden is not None:
            self.hidden.zero_()

    def start(self, rows: Tensor, texts: list[list[int]], limits: Tensor, keys: Tensor, eos: Tensor) -> None:
        """Replace the texts of `rows` (R,), which then end at lengths `limits` (R,) or at the ids `eos`, and draw from
        `keys` (R, 2)."""
        padded = [text + [0] * (self.tokens.shape[1] - len(text)) for text in texts]
        self.tokens[rows] = torch.tensor(padded, device=rows.device)
        self.lengths[rows] = torch.tensor([len(text) for text in texts], device=rows.device)
        self.limits[rows] = limits
        self.keys[rows] = keys
        self.eos[rows] = NO_END
        self.eos[rows[:, None], torch.arange(len(eos), device=rows.device)] = eos
        self.done[rows] = False
        self.failed[rows] = False
        self.committed[rows] = 0
        if self.hidden is not None:
            self.hidden[rows] = 0

    def copy_rows(self, other: "DecodeState", rows: Tensor) -> None:
        """Hold what `rows` (B,) of `other`, a state of the same capacity, hold."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine is not None:
                mine.copy_(theirs[rows])

    def roots(self) -> Tensor:
        """The last committed token of each row, (B, 1)."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)
