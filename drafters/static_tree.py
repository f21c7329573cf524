"""Filling trees level by level from logits: fixed trees, and what all drafters that compute logits share.

At temperature 0 the children of a node are the top-k tokens. With sampling they are the top-k of log q + g for Gumbel
noise g: with the target's noise this couples the draft to the target (Gumbel coupling), with noise of the drafter's own
it draws without replacement from q (Sequoia, arXiv:2402.12374), and the proposal includes the logits. Knows nothing of
where the logits come from.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..spec.proposal import NO_TOKEN, DraftRequest, Law, Proposal
from ..spec.state import DecodeState
from ..spec.tree import Ancestry, DynamicShape, TokenTree, TreeShape


class ForwardsNodes(Protocol):
    """A session that can forward nodes of the tree that it fills; see `NetworkSession`."""

    def root_logits(self, state: DecodeState, base: Tensor) -> Tensor: ...

    def node_logits(self, tokens: Tensor, base: Tensor, tree: Ancestry, nodes: Tensor) -> Tensor: ...


class StaticTree:
    """The request's tree, and the index tensors with which its levels are filled.

    `vocabulary` (V',) are the token ids of the logits' columns, ascending (None: all); levels beyond `depth` stay
    empty. Raises ValueError where a node has more children than there are ids."""

    def __init__(self, request: DraftRequest, vocabulary: Tensor | None = None, depth: int | None = None):
        shape = request.fixed_shape
        self.tree = TokenTree.of(shape, request.device)
        self.sampling = request.sampling
        self.vocab_size = request.vocab_size
        self.trimmed = vocabulary is not None
        every = torch.arange(request.vocab_size, device=request.device)
        self.vocabulary = every if vocabulary is None else vocabulary
        check_children(shape, len(self.vocabulary))
        self.levels = list(_plan(shape, lambda nodes: torch.tensor(nodes, device=request.device)))[:depth]

    def fill(self, state: DecodeState, logits_of: Callable[[int, Tensor, Tensor], Tensor]) -> Proposal:
        """Call `logits_of(depth, inner, tokens)` for each level and choose the children from its result.

        `inner` (n,) are the level's nodes that have children, `tokens` (B, N) is filled down to that level; the result
        is (B, n, V'), or (B, 1, V') where all nodes share their logits."""
        base = state.lengths - 1
        tokens = torch.full_like(self.tree.parents, NO_TOKEN).repeat(len(base), 1)  # (B, N)
        tokens[:, :1] = state.roots()
        draft_logits = None
        if self.sampling.coupling == "own":
            draft_logits = state.lengths.new_zeros(*tokens.shape, self.vocab_size, dtype=torch.float32)
        for depth, (inner, children, parent_index, ranks, width) in enumerate(self.levels):
            logits = logits_of(depth, inner, tokens) / state.temperature[:, None, None]
            if draft_logits is not None:
                draft_logits[:, inner] = self._widened(logits)
            race = logits + self.sampling.gumbel(state.keys, (base + depth + 1)[:, None], self.vocabulary)
            chosen = self.vocabulary[race.topk(width, dim=-1).indices]  # (B, n or 1, width)
            tokens[:, children] = chosen.expand(-1, len(inner), -1)[:, parent_index, ranks]
        law: Law = "without_replacement" if self.sampling.coupling != "none" else "deterministic"
        return Proposal(tokens, self.tree, law, self.sampling.source, draft_logits)

    def grow(self, state: DecodeState, session: ForwardsNodes) -> Proposal:
        """Fill it by forwarding the inner nodes of each level together."""
        base = state.lengths - 1

        def logits_of(depth: int, inner: Tensor, tokens: Tensor) -> Tensor:
            if depth == 0:
                return session.root_logits(state, base)
            return session.node_logits(tokens[:, inner], base, self.tree, inner)

        return self.fill(state, logits_of)

    def slots_of(self, path: Tensor) -> Tensor:
        """Where the nodes of `path` (B, D+1) were forwarded, counted from the root's slot."""
        return path

    def _widened(self, logits: Tensor) -> Tensor:
        """Logits of the whole vocabulary, -inf for ids that the drafter does not know."""
        if not self.trimmed:
            return logits
        return logits.new_full((*logits.shape[:2], self.vocab_size), -torch.inf).index_copy(2, self.vocabulary, logits)


def check_children(shape: TreeShape | DynamicShape, vocab_size: int) -> None:
    """Raise ValueError where a node has more children than there are tokens."""
    if shape.max_children > vocab_size:
        raise ValueError(f"tree: a node has {shape.max_children} children and the vocabulary {vocab_size} tokens")


def _plan(
    shape: TreeShape, index: Callable[[list[int]], Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, int]]:
    """For each level: the nodes with children, these children, for each child the index of its parent among those nodes
    and its rank among its siblings, and the largest number of siblings."""
    for level in shape.levels:
        inner = [node for node in level if shape.children[node]]
        if not inner:
            continue
        children = [child for node in inner for child in shape.children[node]]
        parent_indices = [index_of_parent for index_of_parent, node in enumerate(inner) for _ in shape.children[node]]
        ranks = [rank for node in inner for rank in range(len(shape.children[node]))]
        yield index(inner), index(children), index(parent_indices), index(ranks), max(ranks) + 1
