"""Sessions of networks that draft level by level over a slot cache: what they share, and those of a draft model.

A draft model's cache is cut back to the accepted path after each step. Only the last accepted token can be missing from
it, because leaves are never forwarded, and tokens that another drafter proposed; so each step begins by forwarding as
many of the last committed tokens as may be missing. Knows nothing of verification.
"""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..spec.proposal import DraftRequest, Proposal
from ..spec.state import DecodeState
from ..spec.target.protocol import Span
from ..spec.target.slots import SlotModel
from ..spec.tree import Ancestry, DynamicShape
from .dynamic_tree import DynamicTree
from .static_tree import StaticTree


class NetworkSession(ABC):
    """One run of a network: its cache, and what fills trees from its logits. `vocabulary` (V',) is what these stand
    for; None is all tokens. Subclasses say what is read, forwarded and followed."""

    def __init__(self, slots: SlotModel, request: DraftRequest, vocabulary: Tensor | None):
        self.slots = slots
        grows = isinstance(request.shape, DynamicShape)
        self.growth = DynamicTree(request, vocabulary) if grows else StaticTree(request, vocabulary)

    @property
    def packable(self) -> list[torch.nn.Module]:
        return self.slots.packable

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes

    def clear(self, rows: Tensor | None = None) -> None:
        self.slots.clear(rows)

    def propose(self, state: DecodeState) -> Proposal:
        return self.growth.grow(state, self)

    @abstractmethod
    def root_logits(self, state: DecodeState, base: Tensor) -> Tensor:
        """Logits (B, 1, V') at the root, the token at `base` (B,). Reads the end of the text first, as far as the cache
        may not hold it."""

    @abstractmethod
    def node_logits(self, tokens: Tensor, base: Tensor, tree: Ancestry, nodes: Tensor) -> Tensor:
        """Logits (B, n, V') at `nodes` (n,) of `tree`, whose `tokens` are (B, n); their parents were forwarded before
        them."""

    def copy_rows(self, other: Self, rows: Tensor, into: Tensor | None = None) -> None:
        self.slots.copy_rows(other.slots, rows, into)


class ModelSession(NetworkSession):
    """One run of a draft model. `reads` (V,) are its own ids of the target's tokens, where it has a vocabulary of its
    own."""

    def __init__(
        self,
        model: PreTrainedModel,
        request: DraftRequest,
        vocabulary: Tensor | None = None,
        reads: Tensor | None = None,
    ):
        super().__init__(SlotModel(model, request.batch, request.capacity, reads=reads), request, vocabulary)
        share, self.unread, self.numbers = request.share, 2, None
        if share is not None:
            self.unread = max(2, 1 + share.depth_of_others)
            numbers = {node: number for number, node in enumerate(share.nodes)}
            # The number of each node of the whole tree in the drafter's own; others' tokens are read again anyway.
            every = [numbers.get(node, 0) for node in range(len(share.whole))]
            self.numbers = torch.tensor(every, device=request.device)

    def read(self, span: Span, features: Tensor | None) -> None:
        self.slots.read(span)

    def root_logits(self, state: DecodeState, base: Tensor) -> Tensor:
        """In a row whose text is shorter than what is read again, the first columns are padding."""
        last = base[:, None] + torch.arange(1 - self.unread, 1, device=base.device)  # (B, n) slots
        return self.slots.forward_text(state.tokens.gather(1, last.clamp(min=0)), last).logits

    def node_logits(self, tokens: Tensor, base: Tensor, tree: Ancestry, nodes: Tensor) -> Tensor:
        return self.slots.forward_nodes(tokens, base, tree, nodes).logits

    def follow(self, base: Tensor, path: Tensor, count: Tensor, features: Tensor | None) -> None:
        nodes = path if self.numbers is None else self.numbers[path]
        self.slots.commit(base, self.growth.slots_of(nodes), count)

    @property
    def resumable(self) -> bool:
        return self.slots.resumable

    def save_row(self, row: int, count: int) -> list:
        return self.slots.save_row(row, count)

    def load_row(self, row: int, saved: list, count: int) -> None:
        self.slots.load_row(row, saved, count)
