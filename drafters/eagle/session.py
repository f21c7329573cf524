"""The session of an EAGLE network: one slot for each pair of a feature and the token after it.

Pair t is the target's fused feature at position t and token t + 1, so the pair of the root, the last committed token,
is the last whose two halves are known. The fused features of all committed positions are kept. Each step begins by
forwarding the pairs that the last one may have committed: they take the place of what was drafted there from features
that the network had only guessed. Knows nothing of verification.
"""

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from ...spec.proposal import DraftRequest
from ...spec.state import DecodeState, index_of
from ...spec.target.protocol import Span
from ...spec.target.slots import SlotModel
from ...spec.tree import Ancestry
from ..draft_session import NetworkSession
from .network import EagleNetwork


class EagleSession(NetworkSession):
    """One run. Node i of a tree is at slot base - 1 + i, as the pair of the root is at base - 1."""

    def __init__(self, network: EagleNetwork, request: DraftRequest):
        slots = SlotModel(network, request.batch, request.capacity, taps=(network.feedback,))
        super().__init__(slots, request, network.vocabulary if network.trimmed else None)
        self.network, self.depth = network, request.whole_depth
        size, dtype = network.config.hidden_size, network.dtype
        # (B, capacity, H): the fused features of the text, each at its position
        self.features = torch.zeros(request.batch, request.capacity, size, dtype=dtype, device=request.device)
        # (B, N, H): what nodes hand to their children, in place of features
        self.fed_back = self.features.new_zeros(request.batch, request.shape.slots, size)

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes + self.features.nbytes  # `fed_back` is of a step, and no longer for longer texts

    def clear(self, rows: Tensor | None = None) -> None:
        super().clear(rows)
        self.features[index_of(rows)] = 0

    def read(self, span: Span, features: Tensor | None) -> None:
        trash = self.features.shape[1] - 1
        rows = torch.arange(len(self.features), device=self.features.device)[span.index]
        if features is not None:  # else they were followed
            slots = torch.where(span.positions >= 0, span.positions, trash)
            self.features[rows[:, None], slots] = self.network.fused(features)
        pairs = span.positions - 1  # (R, n): of each token with the feature before it; the text's first has none
        before = self.features[rows[:, None], pairs.clamp(min=0)]  # (R, n, H)
        self.slots.read(replace(span, positions=pairs), before)

    def root_logits(self, state: DecodeState, base: Tensor) -> Tensor:
        """In a row whose text is shorter than what is read again, the first columns are padding."""
        pairs = base[:, None] - torch.arange(self.depth + 1, 0, -1, device=base.device)  # (B, D+1)
        tokens = state.tokens.gather(1, (pairs + 1).clamp(min=0))
        seen = self.slots.forward_text(tokens, pairs, features=_at(self.features, pairs.clamp(min=0)))
        assert seen.features is not None, "the network is tapped"
        self.fed_back[:, :1] = seen.features
        return seen.logits

    def node_logits(self, tokens: Tensor, base: Tensor, tree: Ancestry, nodes: Tensor) -> Tensor:
        before = _at(self.fed_back, tree.parents[:, nodes].expand(len(base), -1))  # (B, n, H)
        seen = self.slots.forward_nodes(tokens, base - 1, tree, nodes, before)
        assert seen.features is not None, "the network is tapped"
        self.fed_back[:, nodes] = seen.features
        return seen.logits

    def follow(self, base: Tensor, path: Tensor, count: Tensor, features: Tensor | None) -> None:
        assert features is not None, "a drafter with taps is handed features"
        columns = torch.arange(path.shape[1], device=path.device)
        slots = torch.where(columns < count[:, None], base[:, None] + columns, self.features.shape[1] - 1)
        fused = self.network.fused(_at(features, path))  # (B, D+1, H)
        self.features.scatter_(1, slots[..., None].expand_as(fused), fused)

    def copy_rows(self, other: Self, rows: Tensor, into: Tensor | None = None) -> None:
        super().copy_rows(other, rows, into)
        shared = min(self.features.shape[1], other.features.shape[1])
        self.features[index_of(into), :shared] = other.features[rows, :shared]

    def save_row(self, row: int, count: int) -> Any:
        return self.features[row, :count].clone(), self.slots.save_row(row, count)

    def load_row(self, row: int, saved: Any, count: int) -> None:
        features, slots = saved
        self.features[row, :count] = features[:count]
        self.slots.load_row(row, slots, count)


def _at(states: Tensor, index: Tensor) -> Tensor:  # (B, T, H), (B, n) -> (B, n, H)
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[2]))
