"""The session of trained heads: one hidden state for each row, and a tree filled from it. Knows nothing of networks."""

from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ..spec.proposal import DraftRequest, Proposal, Unremembering
from ..spec.state import DecodeState, index_of
from ..spec.target.protocol import Span
from ..spec.target.taps import linear_head
from ..spec.target.weights import linear_shape
from .head_settings import HeadSettings
from .static_tree import StaticTree

Started = tuple[Tensor, ...]  # what `start` computes from a hidden state and `follow` reads


class Heads(Protocol):
    """A network that drafts from the target's last hidden state alone: V' known of V tokens, hidden size H."""

    settings: HeadSettings  # of which `heads` is how many tokens ahead it guesses
    vocab_size: int
    hidden_size: int
    trimmed: bool  # whether it knows a part of the vocabulary only

    @property
    def weight(self) -> Any:
        """One of its weights, on its device."""

    @property
    def vocabulary(self) -> Any:
        """The ids (V',) that it knows, ascending."""

    @property
    def index_of_token(self) -> Any:
        """The index (V,) of each token among these; V' for unknown ones."""

    @property
    def dtype(self) -> torch.dtype: ...

    def start(self, hidden: Tensor) -> Started:  # (..., H)
        """The part of the computation that depends on the hidden state alone."""

    def follow(self, started: Started, depth: int, path: Tensor) -> Tensor:  # -> (..., V') float32
        """The logits for the children of nodes at `depth`; `path` (..., depth + 1) are the tokens from root to node."""

    def linears(self) -> list[nn.Linear]:
        """The layers that compiled steps may pack."""


class MedusaSession(Unremembering):
    """One run, whose only state is a hidden state per row. Nodes deeper than the number of heads stay empty."""

    def __init__(self, name: str, heads: Heads, request: DraftRequest):
        """Raises ValueError where the heads, of the drafter `name`, are not for this target's hidden states."""
        assert request.target is not None, "heads read the hidden states of a model"
        expected = linear_shape(linear_head(request.target))[1], request.target.dtype, request.device
        if (heads.hidden_size, heads.dtype, heads.weight.device) != expected:
            raise ValueError(
                f"drafter {name!r} is for hidden states of {heads.hidden_size} numbers in {heads.dtype} on "
                f"{heads.weight.device} and the target's are {expected[0]} in {expected[1]} on {expected[2]}; load it "
                "for this target"
            )
        self.heads = heads
        vocabulary = heads.vocabulary if heads.trimmed else None
        self.static = StaticTree(request, vocabulary, depth=heads.settings.heads)
        # (B, H): the target's last hidden state at the token before the root, zeros where there is none.
        self.hidden = torch.zeros(request.batch, heads.hidden_size, dtype=heads.dtype, device=request.device)

    @property
    def packable(self) -> list[nn.Linear]:
        return self.heads.linears()

    def clear(self, rows: Tensor | None = None) -> None:
        self.hidden[index_of(rows)] = 0

    def read(self, span: Span, features: Tensor | None) -> None:
        if features is None:
            return  # these positions were followed
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

    def copy_rows(self, other: Self, rows: Tensor, into: Tensor | None = None) -> None:
        self.hidden[index_of(into)] = other.hidden[rows]
