"""From logits to scores where every row has settings of its own.

All settings are data of the row, so that requests of any kind share a step. Which operations a step has (sorting a
vocabulary, counting tokens) is its `SamplingKind`: of a few that are fixed, the first that does what the live rows ask
for. Penalties and biases are
computed from the row's text, and at a node of the tree from the tokens of its path, so that nothing has to be kept,
moved or cleared. Order: bias, repetition, presence and frequency, temperature, top-k, top-p, min-p.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..proposal import Proposal
from ..sampling import RowWarp, Sampler
from ..state import DecodeState
from .text_request import TextRequest

LEAST_TOP_K = 64  # steps are made for this bound of top-k, or a power of two above it
MOST_TOP_K = 1024  # for this one where it is not known who will come


@dataclass(frozen=True, slots=True)
class SamplingKind:
    """Which operations are applied, and what else steps are made for: whether the logits of accepted tokens are kept,
    and whether rows have a prediction."""

    draws: bool = False
    top_k: int = 0  # the largest that can be applied; 0: none
    top_p: bool = False
    min_p: bool = False
    penalties: bool = False
    bias: bool = False
    logits: bool = False
    predicted: bool = False  # there is text to copy from

    @classmethod
    def of(cls, request: TextRequest) -> "SamplingKind":
        draws = request.temperature > 0
        return cls(
            draws=draws,
            top_k=max(LEAST_TOP_K, 1 << (request.top_k - 1).bit_length()) if draws and request.top_k else 0,
            top_p=draws and request.top_p < 1,
            min_p=draws and request.min_p > 0,
            penalties=request.penalised,
            bias=bool(request.logit_bias),
            logits=request.logprobs is not None,
            predicted=bool(request.prediction),
        )

    def __or__(self, other: "SamplingKind") -> "SamplingKind":
        """What serves both."""
        return SamplingKind(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def serves(self, other: "SamplingKind") -> bool:
        return self | other == self


# What a server makes steps for. They are few, and none follows from a request, so that no client can have others made.
GREEDY, DRAWN = SamplingKind(), SamplingKind(draws=True)
CUT = replace(DRAWN, top_k=MOST_TOP_K, top_p=True, min_p=True)
EVERY = replace(CUT, penalties=True, bias=True, logits=True, predicted=True)
KINDS = GREEDY, DRAWN, CUT, EVERY  # of eager steps, which cost nothing to make
KEPT_KINDS = DRAWN, CUT  # of steps that are compiled or captured, which takes long, and keep their buffers


class RowSampler(Sampler):
    """Turns logits (B, N, V) of a tree into scores (B, N, V) by the settings in the state."""

    def __init__(self, kind: SamplingKind, rows: int, device: torch.device):
        blank = torch.zeros(rows, 0, dtype=torch.long, device=device)
        super().__init__([], kind.draws, blank, blank.sum(1))
        self.kind = kind
        self.warp = RowWarp(kind.draws, kind.top_k, kind.top_p, kind.min_p)

    @property
    def signature(self) -> tuple:
        return ("by row", replace(self.kind, logits=False, predicted=False))

    def scores(self, logits: Tensor, proposal: Proposal, state: DecodeState) -> Tensor:
        nodes = torch.arange(proposal.tree.size, device=logits.device).expand(len(logits), -1)
        return self._at(nodes, logits, proposal, state)

    def scores_at(self, node: Tensor, going: Tensor, logits: Tensor, proposal: Proposal, state: DecodeState) -> Tensor:
        return self._at(node[:, None], logits[:, None], proposal, state)[:, 0]

    def _at(self, nodes: Tensor, logits: Tensor, proposal: Proposal, state: DecodeState) -> Tensor:
        """Scores at `nodes` (B, n), of which the logits are (B, n, V)."""
        if self.kind.bias:
            added = torch.zeros_like(logits[:, 0]).scatter_add(1, state.biased, state.bias)  # (B, V)
            logits = logits + added[:, None]
        if self.kind.penalties:
            logits = penalised(nodes, logits, proposal, state)
        return self.warp(logits, state)


def penalised(nodes: Tensor, logits: Tensor, proposal: Proposal, state: DecodeState) -> Tensor:
    """Apply the rows' penalties to the logits (B, n, V) at `nodes` (B, n), each by its own path."""
    tree, columns = proposal.tree, torch.arange(state.tokens.shape[1], device=logits.device)
    inside = columns < state.lengths[:, None]  # (B, T)
    new = inside & (columns >= state.begun[:, None])
    text, none = state.tokens.clamp(0, logits.shape[-1] - 1), torch.zeros_like(logits[:, 0])
    every = none.scatter_add(1, text, inside.to(logits.dtype))[:, None]  # (B, 1, V)
    fresh = none.scatter_add(1, text, new.to(logits.dtype))[:, None]
    # The path of a node: itself and its ancestors, but for the root, which is in the text already.
    paths = tree.ancestors.expand(len(nodes), -1, -1).gather(1, nodes[..., None].expand(-1, -1, tree.size))
    on_path = paths & (torch.arange(tree.size, device=logits.device) > 0) & (proposal.tokens >= 0)[:, None]  # (B, n, N)
    drafted = proposal.tokens.clamp(min=0)[:, None].expand(-1, nodes.shape[1], -1)
    along = torch.zeros_like(logits).scatter_add(2, drafted, on_path.to(logits.dtype))  # (B, n, V)
    factor = state.repetition[:, None, None]
    repeated = torch.where(logits < 0, logits * factor, logits / factor)
    logits = torch.where(every + along > 0, repeated, logits)
    count = fresh + along
    return logits - state.frequency[:, None, None] * count - state.presence[:, None, None] * (count > 0)
