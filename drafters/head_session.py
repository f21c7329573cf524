"""The session of trained heads: one hidden state for each row, and a tree filled from it. Knows nothing of networks."""

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from ..spec.proposal import DraftRequest, Proposal, Unremembering
from ..spec.state import DecodeState
from ..spec.target.protocol import Span
from .static_tree import StaticTree

if TYPE_CHECKING:
    from .medusa import MedusaHeads


class MedusaSession(Unremembering):
    """One run, whose only state is a hidden state per row. Nodes deeper than the number of heads stay empty."""

    def __init__(self, heads: "MedusaHeads", request: DraftRequest):
        self.heads = heads
        vocabulary = heads.vocabulary if heads.trimmed else None
        self.static = StaticTree(request, vocabulary, depth=heads.settings.heads)
        # (B, H): the target's last hidden state at the token before the root, zeros where there is none.
        self.hidden = torch.zeros(request.batch, heads.hidden_size, dtype=heads.dtype, device=request.device)

    @property
    def packable(self) -> list[nn.Linear]:
        return self.heads.linears()

    def clear(self, rows: Tensor | None = None) -> None:
        self.hidden[slice(None) if rows is None else rows] = 0

    def read(self, span: Span, features: Tensor | None) -> None:
        assert features is not None, "a drafter with taps is handed features"
        last = (span.positions >= 0).sum(1)[:, None] - 1  # (R, 1): the column of a row's last token, -1 for none
        states = features.gather(1, last.clamp(min=0)[..., None].expand(-1, 1, features.shape[2]))[:, 0]
        self.hidden[span.index] = torch.where(last >= 0, states, self.hidden[span.index])

    def propose(self, state: DecodeState) -> Proposal:
        started = self.heads.start(self.hidden[:, None])  # of (B, 1, H)

        def logits_of(depth: int, inner: Tensor, tokens: Tensor) -> Tensor:
            path = tokens[:, self.static.tree.paths[0, inner, : depth + 1]]  # (B, n, depth + 1)
            return self.heads.follow(started, depth, path)

        return self.static.fill(state, logits_of)

    def follow(self, base: Tensor, path: Tensor, count: Tensor, features: Tensor | None) -> None:
        assert features is not None, "a drafter with taps is handed features"
        last = path.gather(1, (count - 1).clamp(min=0)[:, None])  # (B, 1): the node that gave the new root
        states = features.gather(1, last[..., None].expand(-1, 1, features.shape[2]))[:, 0]
        self.hidden.copy_(torch.where(count[:, None] > 0, states, self.hidden))

    def copy_rows(self, other: Self, rows: Tensor) -> None:
        self.hidden.copy_(other.hidden[rows])
