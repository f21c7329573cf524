"""Trees that follow the draft's confidence: best-first growth to a fixed number of nodes, on the device.

Level by level the most probable paths (by cumulative draft probability) are forwarded together, and their top-k tokens
become candidates, of which the best `nodes - 1` are kept (EAGLE-2, arXiv:2406.16858, within the budget of SpecExec,
arXiv:2406.02532). SpecExec's batches, which take the best leaves of whatever depth, came out no better in tokens per
step and need more forwards: shallow leaves that were passed over are seldom the text. Shapes are static and the parents
are tensor data, so that one captured step can grow a different tree every time. Children are chosen, not drawn at
random, which the rules `match` and `typical` can verify.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ..spec.proposal import DraftRequest, Proposal
from ..spec.state import DecodeState
from ..spec.tree import Ancestry, DynamicShape, TokenTree
from .static_tree import ForwardsNodes

BLOCK = 64  # tokens of which the best is looked at first
LEAST = -1e30  # stands for log probabilities of -inf and NaN, which no node of a tree may have


class DynamicTree:
    """What grows a `DynamicShape`: N nodes, D forwards, the first of the root, the others of W nodes of a level.
    `vocabulary` (V',) are the token ids of the logits' columns; None is all."""

    def __init__(self, request: DraftRequest, vocabulary: Tensor | None = None):
        assert isinstance(request.shape, DynamicShape), "StaticTree fills the others"
        self.shape, self.may_wait, self.vocabulary = request.shape, request.may_wait, vocabulary
        most = 1 + self.shape.batch * (self.shape.max_depth - 1)
        self.forwarded = Ancestry.of_roots(request.batch, most, request.device)  # numbered by their slots
        self.slot_of_node = torch.zeros(request.batch, len(self.shape), dtype=torch.int64, device=request.device)

    def grow(self, state: DecodeState, session: ForwardsNodes) -> Proposal:
        """Choose the tree anew and fill it. Where a step waits for the host anyway, no more nodes are forwarded than
        the last level brought into the tree, and growth ends where it brought none."""
        shape, base = self.shape, state.lengths - 1
        root = torch.zeros(len(base), 1, dtype=torch.int64, device=base.device)  # its slot
        pool = _Pool.empty(len(base), len(shape) - 1, base.device)
        pool = pool.joined(root, *self._children(session.root_logits(state, base), root.float(), state))
        for first in range(1, self.forwarded.size, shape.batch):
            count = self._useful(pool, state) if self.may_wait else shape.batch
            if count == 0:
                break
            chosen, scores = pool.best_new(count)  # (B, W)
            slots = torch.arange(first, first + count, device=base.device)
            self.forwarded.add(slice(first, first + count), pool.parents.gather(1, chosen))
            logits = session.node_logits(pool.tokens.gather(1, chosen), base, self.forwarded, slots)  # (B, W, V')
            pool = pool.expanded(chosen, slots).joined(slots, *self._children(logits, scores, state))
        self.slot_of_node[:, 1:].copy_(pool.slots)
        tree = TokenTree.from_parents(pool.as_tree(self.forwarded.size), shape.max_depth, shape.width)
        return Proposal(torch.cat([state.roots(), pool.tokens], dim=1), tree, "deterministic", "own")

    def _useful(self, pool: "_Pool", state: DecodeState) -> int:
        """How many nodes it is of use to forward for the rows that are not done; all where every row is."""
        if state.done.all():
            return self.shape.batch  # an idle step, which is to take as long as others
        return min(int((pool.new & ~state.done[:, None]).sum(1).max()), self.shape.batch)

    def _children(self, logits: Tensor, scores: Tensor, state: DecodeState) -> tuple[Tensor, Tensor]:
        """The most probable children of each node and their path scores: (B, n, V'), (B, n) -> (B, n, width) each."""
        scaled = logits / state.temperature[:, None, None]
        values, tokens = best_tokens(scaled, self.shape.width)
        best = values[..., :1]
        total = scaled.sub_(best).exp_().sum(-1, keepdim=True)  # in place: fresh memory costs more than the arithmetic
        log_probs = (values - best - total.log()).nan_to_num(nan=LEAST, neginf=LEAST)
        return tokens if self.vocabulary is None else self.vocabulary[tokens], scores[..., None] + log_probs

    def slots_of(self, path: Tensor) -> Tensor:
        """Where the nodes of `path` (B, D+1) were forwarded, counted from the root's slot; 0 for leaves, which were
        not."""
        return self.slot_of_node.gather(1, path)


@dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """The best P nodes so far, in the order of their scores. A child never scores above its parent, and comes after it.
    The last are none, with a score of -inf, as long as there are fewer."""

    scores: Tensor  # (B, P): log probabilities of the paths
    tokens: Tensor  # (B, P)
    parents: Tensor  # (B, P): slots, counted from the root's, which is 0
    slots: Tensor  # (B, P): its own where it was forwarded, else 0
    new: Tensor  # (B, P) bool: whether it came with the last level

    @classmethod
    def empty(cls, rows: int, size: int, device: torch.device) -> Self:
        numbers = torch.zeros(rows, size, dtype=torch.int64, device=device)
        return cls(torch.full((rows, size), -torch.inf, device=device), numbers, numbers, numbers, numbers.bool())

    def best_new(self, count: int) -> tuple[Tensor, Tensor]:
        """The indices of the best `count` new nodes and their scores, (B, count) each. Where there are fewer, the
        others are older nodes, with scores of -inf, so that they get no more children."""
        first = (~self.new).byte().sort(dim=1, stable=True).indices[:, :count]
        return first, torch.where(self.new, self.scores, -torch.inf).gather(1, first)

    def expanded(self, chosen: Tensor, slots: Tensor) -> Self:
        """The pool after its nodes `chosen` (B, n), those that are new, were forwarded at `slots` (n,)."""
        given = torch.where(self.new.gather(1, chosen), slots, self.slots.gather(1, chosen))
        return replace(self, slots=self.slots.scatter(1, chosen, given))

    def joined(self, slots: Tensor, tokens: Tensor, scores: Tensor) -> Self:
        """The best of the pool and of a new level (B, n, width), children of the nodes at `slots`, (n,) or (B, n)."""
        old = self.scores, self.tokens, self.parents, self.slots, torch.zeros_like(self.new)
        level = scores, tokens, slots[..., None].expand_as(tokens), torch.zeros_like(tokens), scores > -torch.inf
        every = [torch.cat([before, added.flatten(1)], dim=1) for before, added in zip(old, level)]
        # Stable: of equals, those that were here before stay before the new ones, some of which are their children.
        order = every[0].sort(dim=1, descending=True, stable=True).indices[:, : self.scores.shape[1]]
        return type(self)(*(field.gather(1, order) for field in every))

    def as_tree(self, forwarded: int) -> Tensor:
        """The parents (B, P + 1) of a tree of the root and these nodes, in this order; slots are below `forwarded`."""
        numbers = torch.arange(1, self.slots.shape[1] + 1, device=self.slots.device).expand_as(self.slots)
        node_at = torch.zeros(len(numbers), forwarded + 1, dtype=torch.int64, device=numbers.device)
        node_at = node_at.scatter(1, torch.where(self.slots > 0, self.slots, forwarded), numbers)  # others have none
        return torch.cat([torch.full_like(numbers[:, :1], -1), node_at.gather(1, self.parents)], dim=1)


def best_tokens(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`scores.topk(count)` of (..., V) in one pass: the best tokens are in as many blocks of tokens, those whose own
    best are best, or behind the last block."""
    blocked = scores.shape[-1] // BLOCK * BLOCK
    blocks = scores[..., :blocked].unflatten(-1, (-1, BLOCK))  # (..., V / BLOCK, BLOCK)
    if blocks.shape[-2] <= count:
        values, tokens = scores.topk(count, dim=-1)
        return values, tokens
    chosen = blocks.amax(-1).topk(count, dim=-1).indices[..., None]  # (..., count, 1)
    tokens = (chosen * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten(-2)
    rest = torch.arange(blocked, scores.shape[-1], device=scores.device)
    tokens = torch.cat([tokens, rest.expand(*tokens.shape[:-1], -1)], dim=-1)
    values, index = scores.gather(-1, tokens).topk(count, dim=-1)
    return values, tokens.gather(-1, index)
