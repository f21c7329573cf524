"""Trees that follow the draft's confidence: best-first growth to a fixed number of nodes, on the device.

Level by level the most probable paths (by cumulative draft probability) are forwarded, and their top-k tokens become
candidates; the best `nodes - 1` of all candidates form the tree (SpecExec, arXiv:2406.02532; EAGLE-2,
arXiv:2406.16858). Shapes are static and the parents are tensor data, so that one captured step can grow a different
tree every time. Children are chosen, not drawn at random, which the rules `match` and `typical` can verify.
"""

import torch
from torch import Tensor

from ..spec.proposal import DraftRequest, Proposal
from ..spec.state import DecodeState
from ..spec.tree import DynamicShape, TokenTree
from .static_tree import ForwardsNodes

# Subtracted from the score at every edge: a child then scores below its parent and is never chosen without it.
_EDGE = 1e-3


class DynamicTree:
    """What grows a `DynamicShape`: N nodes, D levels, W paths forwarded per level, W children each. `vocabulary` (V',)
    are the token ids of the logits' columns; None is all."""

    def __init__(self, request: DraftRequest, vocabulary: Tensor | None = None):
        assert isinstance(request.shape, DynamicShape), "StaticTree fills the others"
        self.shape, shape, device = request.shape, request.shape, request.device
        self.vocabulary = vocabulary
        forwarded = 1 + shape.width * (shape.max_depth - 1)
        self.forward_parents = torch.full((request.batch, forwarded), -1, device=device)  # (B, F)
        self.slot_of_node = torch.zeros(request.batch, len(shape), dtype=torch.int64, device=device)

    def grow(self, state: DecodeState, session: ForwardsNodes) -> Proposal:
        """Choose the tree anew and fill it."""
        shape, base = self.shape, state.lengths - 1
        rows, width = len(base), shape.width
        self.forward_parents[:, 1:].fill_(0)
        pool = _Pool(rows, shape.width, shape.max_depth, base.device)
        certain = torch.zeros(rows, 1, device=base.device)  # log probability of the root's path
        tokens, scores = self._children(session.root_logits(state, base), certain, state)
        pool.add(tokens, scores, parents=torch.zeros_like(tokens))
        frontier = pool.last(width)  # (B, W) indices in the pool
        for depth in range(1, shape.max_depth):
            first = 1 + (depth - 1) * width
            nodes = torch.arange(first, first + width, device=base.device)  # their slots behind the root
            self.forward_parents[:, nodes] = pool.parents.gather(1, frontier)
            pool.slots.scatter_(1, frontier, nodes.expand(rows, -1))
            tree = TokenTree.from_parents(self.forward_parents, shape.max_depth, width)
            logits = session.node_logits(pool.tokens.gather(1, frontier), base, tree, nodes)  # (B, W, V')
            tokens, scores = self._children(logits, pool.scores.gather(1, frontier), state)
            pool.add(tokens, scores, parents=nodes.repeat_interleave(width).expand(rows, -1))
            frontier = pool.last(width)
        tokens, parents, slots = pool.choose(len(shape) - 1)
        self.slot_of_node[:, 1:].copy_(slots)
        tree = TokenTree.from_parents(parents, shape.max_depth, width)
        return Proposal(torch.cat([state.roots(), tokens], dim=1), tree, "deterministic", "own")

    def _children(self, logits: Tensor, scores: Tensor, state: DecodeState) -> tuple[Tensor, Tensor]:
        """The W most probable children of each node and their path scores: (B, n, V'), (B, n) -> (B, n * W) each."""
        log_probs = (logits / state.temperature[:, None, None]).log_softmax(-1)
        best = log_probs.topk(self.shape.width, dim=-1)
        tokens = best.indices if self.vocabulary is None else self.vocabulary[best.indices]
        return tokens.flatten(1), (scores[..., None] + best.values - _EDGE).flatten(1)

    def slots_of(self, path: Tensor) -> Tensor:
        """Where the nodes of `path` (B, D+1) were forwarded, counted from the root's slot; 0 for leaves, which were
        not."""
        return self.slot_of_node.gather(1, path)


class _Pool:
    """All candidates of one step, level by level: token, path score, the parent's slot, and the candidate's own slot if
    it has been forwarded (else 0). Slots count from the root, which is slot 0."""

    def __init__(self, rows: int, width: int, depth: int, device: torch.device):
        size = width + width * width * (depth - 1)
        self.tokens = torch.zeros(rows, size, dtype=torch.int64, device=device)
        self.parents = torch.zeros_like(self.tokens)
        self.slots = torch.zeros_like(self.tokens)
        self.scores = torch.full((rows, size), -torch.inf, device=device)
        self.start = self.stop = 0

    def add(self, tokens: Tensor, scores: Tensor, parents: Tensor) -> None:
        self.start, self.stop = self.stop, self.stop + tokens.shape[1]
        level = slice(self.start, self.stop)
        self.tokens[:, level].copy_(tokens)
        self.scores[:, level].copy_(scores)
        self.parents[:, level].copy_(parents)

    def last(self, width: int) -> Tensor:
        """The best `width` candidates of the level added last, (B, W)."""
        return self.start + self.scores[:, self.start : self.stop].topk(width, dim=1).indices

    def choose(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best `count` candidates as a tree: tokens (B, count), parents (B, count + 1), slots (B, count)."""
        chosen = self.scores.topk(count, dim=1).indices.sort(dim=1).values  # in the order in which they were added
        slots = self.slots.gather(1, chosen)
        # node_at[slot]: the number of the node in that slot. Nodes that have no slot write to the spare last column.
        spare = self.tokens.shape[1]
        indices = torch.where(slots > 0, slots, spare)
        numbers = torch.arange(1, count + 1, device=chosen.device).expand_as(chosen)
        node_at = torch.zeros(len(chosen), spare + 1, dtype=torch.int64, device=chosen.device)
        node_at.scatter_(1, indices, numbers)
        node_at[:, 0].fill_(0)
        above = node_at.gather(1, self.parents.gather(1, chosen))
        root = torch.full_like(above[:, :1], -1)
        return self.tokens.gather(1, chosen), torch.cat([root, above], dim=1), slots
