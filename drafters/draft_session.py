"""The base class of a draft model's sessions, and the session that fills a fixed tree.

After each step the cache is cut back to the accepted path. Only the last accepted token can be missing from it, because
leaves are never forwarded; so each step begins by forwarding the last two committed tokens. Knows nothing of
verification.
"""

from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..spec.proposal import DraftRequest, Proposal
from ..spec.state import DecodeState
from ..spec.target.protocol import Span
from ..spec.target.slots import SlotModel
from .static_tree import StaticTree


class ModelDraftSession:
    """One run of a draft model: its cache, and the forward that every step begins with."""

    def __init__(
        self,
        model: PreTrainedModel,
        request: DraftRequest,
        vocabulary: Tensor | None = None,
        reads: Tensor | None = None,
    ):
        self.vocabulary = vocabulary  # (V',): what the logits stand for; None is all tokens
        self.slots = SlotModel(model, request.batch, request.capacity, reads=reads)

    @property
    def packable(self) -> list[torch.nn.Module]:
        return self.slots.packable

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes

    def clear(self, rows: Tensor | None = None) -> None:
        self.slots.clear(rows)

    def read(self, span: Span, features: Tensor | None) -> None:
        self.slots.read(span)

    def copy_rows(self, other: Self, rows: Tensor) -> None:
        self.slots.copy_rows(other.slots, rows)

    def save_row(self, row: int, count: int) -> list:
        return self.slots.save_row(row, count)

    def load_row(self, row: int, saved: list, count: int) -> None:
        self.slots.load_row(row, saved, count)

    def _root_logits(self, state: DecodeState, base: Tensor) -> Tensor:
        """Logits (B, 1, V') at the root. Forwards the last two committed tokens: the root and the token before it,
        which may have been a leaf of the last tree. In a row of a single token the first column is padding."""
        pair = torch.stack([base - 1, base], dim=1)  # (B, 2) slots
        tokens = state.tokens.gather(1, pair.clamp(min=0))
        return self.slots.forward_text(tokens, pair).logits


class StaticDraftSession(ModelDraftSession):
    """A fixed tree: the inner nodes of each level are forwarded together."""

    def __init__(
        self,
        model: PreTrainedModel,
        request: DraftRequest,
        vocabulary: Tensor | None = None,
        reads: Tensor | None = None,
    ):
        super().__init__(model, request, vocabulary, reads)
        self.static = StaticTree(request, vocabulary)

    def propose(self, state: DecodeState) -> Proposal:
        base = state.lengths - 1

        def logits_of(depth: int, inner: Tensor, tokens: Tensor) -> Tensor:
            if depth == 0:
                return self._root_logits(state, base)  # (B, 1, V')
            return self.slots.forward_nodes(tokens[:, inner], base, self.static.tree, inner).logits  # (B, n, V')

        return self.static.fill(state, logits_of)

    def follow(self, base: Tensor, path: Tensor, count: Tensor, features: Tensor | None) -> None:
        self.slots.commit(base, path, count)
