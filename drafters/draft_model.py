"""A small causal LM as drafter: one forward per tree level, a slot cache of its own.

At temperature 0 the children of a node are the draft's top-k. With the target's noise they are the
top-k of log q + g (Gumbel coupling), with its own noise the same race draws them without replacement
from q (Sequoia, arXiv:2402.12374), and the logits are handed over. Its cache follows the accepted path;
only the last accepted token can be missing from it (a leaf is never forwarded), so each step starts
with the last two committed tokens. Knows nothing of verification.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..spec.attach import attach
from ..spec.proposal import DraftRequest, Proposal
from ..spec.slots import SlotModel
from ..spec.state import DecodeState
from ..spec.tree import DynamicShape, TokenTree, TreeShape
from ..spec.verify import Verdict


class ModelDrafter:
    """`model` is any causal LM with the target's vocabulary that passes the same self-test as a target."""

    default_shape = TreeShape.chain(4)

    def __init__(self, model, name: str = "draft model"):
        attach(model)
        self.model = model
        self.name = name
        self.vocab_size = model.config.get_text_config().vocab_size

    def open(self, request: DraftRequest) -> "ModelDraftSession":
        if self.model.device != request.device:
            raise ValueError(
                f"drafter {self.name} is on {self.model.device} and the target on {request.device}; move it"
            )
        if request.shape.max_children > request.vocab_size:
            raise ValueError(
                f"tree: a node has {request.shape.max_children} children and the vocabulary {request.vocab_size} tokens"
            )
        if isinstance(request.shape, DynamicShape):
            from .dynamic_tree import DynamicDraftSession

            return DynamicDraftSession(self.model, request)
        return StaticDraftSession(self.model, request)


class ModelDraftSession:
    """What every run of a draft model has: a cache, and how a step begins."""

    def __init__(self, model, request: DraftRequest):
        self.slots = SlotModel(model, request.capacity)
        self.shape = request.shape
        self.sampling = request.sampling

    def prefill(self, state: DecodeState, chunk: int) -> None:
        self.slots.prefill(state.tokens, state.lengths, chunk)

    def _root_logits(self, state: DecodeState, base: Tensor) -> Tensor:
        """Forward the last two committed tokens: the root, and the one before it, which may be a leaf of
        the last tree. A row of one token has none before it: that column is padding. (B, 1, V)"""
        pair = torch.stack([base - 1, base], dim=1)  # (B, 2) slots
        tokens = state.tokens.gather(1, pair.clamp(min=0))
        return self.slots.forward_text(tokens, pair, keep=1)


class StaticDraftSession(ModelDraftSession):
    """A fixed tree: for each level which nodes are forwarded and where their children go."""

    def __init__(self, model, request: DraftRequest):
        super().__init__(model, request)
        self.tree = TokenTree.of(request.shape, request.device)
        self.levels = list(_plan(request.shape, lambda nodes: torch.tensor(nodes, device=request.device)))
        self.vocab = torch.arange(request.vocab_size, device=request.device)
        self.vocab_size = request.vocab_size

    def propose(self, state: DecodeState) -> Proposal:
        base = state.lengths - 1
        tokens = state.roots().repeat(1, len(self.shape))  # (B, N): filled level by level
        draws = self.sampling.noise == "own"
        draft_logits = state.tokens.new_zeros(*tokens.shape, self.vocab_size, dtype=torch.float32) if draws else None
        for depth, (inner, children, parent_place, ranks, width) in enumerate(self.levels):
            if depth == 0:
                logits = self._root_logits(state, base)  # (B, 1, V)
            else:
                logits = self.slots.forward_nodes(tokens[:, inner], base, self.tree, inner)  # (B, n, V)
            logits = logits / self.sampling.temperature
            if draws:
                draft_logits[:, inner] = logits
            race = logits + self.sampling.gumbel(state.keys, (base + depth + 1)[:, None], self.vocab)
            chosen = race.topk(width, dim=-1).indices  # (B, n, width)
            tokens[:, children] = chosen[:, parent_place, ranks]
        law = "without_replacement" if self.sampling.noise != "none" else "deterministic"
        source = "shared" if self.sampling.noise == "shared" else "own"
        return Proposal(tokens, self.tree, law, source, draft_logits)

    def commit(self, state: DecodeState, verdict: Verdict) -> None:
        self.slots.cache.compact(state.lengths - 1, verdict.path)


def _plan(shape: TreeShape, index: Callable[[list[int]], Tensor]):
    """Level by level: (nodes with children, their children, each child's parent's place, rank, widest)."""
    for level in shape.levels:
        inner = [node for node in level if shape.children[node]]
        if not inner:
            continue
        children = [child for node in inner for child in shape.children[node]]
        places = [place for place, node in enumerate(inner) for _ in shape.children[node]]
        ranks = [rank for node in inner for rank in range(len(shape.children[node]))]
        yield index(inner), index(children), index(places), index(ranks), max(ranks) + 1
