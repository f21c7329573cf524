"""Filling a fixed tree level by level from logits: what all drafters with a law of their own share.

At temperature 0 the children of a node are its top-k. With the target's noise they are the top-k of log q + g
(Gumbel coupling), with its own noise the same race draws them without replacement from q (Sequoia,
arXiv:2402.12374), and the logits are handed over. Knows nothing of where the logits come from.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..spec.proposal import NO_TOKEN, DraftRequest, Law, Proposal
from ..spec.state import DecodeState
from ..spec.tree import DynamicShape, TokenTree, TreeShape


class StaticTree:
    """The request's tree and how its levels are drawn.

    `vocabulary` (V') are the ids that the logits stand for, in ascending order (None: all); levels beyond `depth`
    stay empty. Raises ValueError where a node has more children than there are ids."""

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
        """Ask `logits_of(depth, inner, tokens)` for the logits (B, n, V') of the inner nodes (n,) of each level,
        or (B, 1, V') where they share theirs, given the tokens (B, N) of all levels above; draw their children."""
        base = state.lengths - 1
        tokens = torch.full_like(self.tree.parents, NO_TOKEN).repeat(len(base), 1)  # (B, N)
        tokens[:, :1] = state.roots()
        draft_logits = None
        if self.sampling.noise == "own":
            draft_logits = state.lengths.new_zeros(*tokens.shape, self.vocab_size, dtype=torch.float32)
        for depth, (inner, children, parent_place, ranks, width) in enumerate(self.levels):
            logits = logits_of(depth, inner, tokens) / state.temperature[:, None, None]
            if draft_logits is not None:
                draft_logits[:, inner] = self._widened(logits)
            race = logits + self.sampling.gumbel(state.keys, (base + depth + 1)[:, None], self.vocabulary)
            chosen = self.vocabulary[race.topk(width, dim=-1).indices]  # (B, n or 1, width)
            tokens[:, children] = chosen.expand(-1, len(inner), -1)[:, parent_place, ranks]
        law: Law = "without_replacement" if self.sampling.noise != "none" else "deterministic"
        return Proposal(tokens, self.tree, law, self.sampling.source, draft_logits)

    def _widened(self, logits: Tensor) -> Tensor:
        """Logits of the whole vocabulary: ids that the drafter does not know are impossible."""
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
    """Level by level: (nodes with children, their children, each child's parent's place, rank, widest)."""
    for level in shape.levels:
        inner = [node for node in level if shape.children[node]]
        if not inner:
            continue
        children = [child for node in inner for child in shape.children[node]]
        places = [place for place, node in enumerate(inner) for _ in shape.children[node]]
        ranks = [rank for node in inner for rank in range(len(shape.children[node]))]
        yield index(inner), index(children), index(places), index(ranks), max(ranks) + 1
