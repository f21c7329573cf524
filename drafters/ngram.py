"""Prompt lookup: drafts the continuation of earlier occurrences of the text's last tokens. No weights.

Every earlier position of the row's text that ends in the same tokens votes for its continuation; the weight of a vote
grows exponentially with the length of the match (prompt lookup decoding, Saxena 2023; several matches are merged into
a tree as in a suffix trie). The votes define a distribution q over next tokens at every node: greedy decoding takes
its top-k, sampling the top-k of log q plus the target's noise (Gumbel coupling). All on the device with static shapes.
Knows nothing of models or verification.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..spec.proposal import NO_TOKEN, DrafterTraits, DraftRequest, EmptySession, Proposal, Unremembering
from ..spec.state import DecodeState
from ..spec.tree import TokenTree, TreeShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .folder import DrafterFolder


@dataclass(frozen=True)
class NgramDrafter:
    """Matches are at most `longest` tokens long; the best `matches` of them are used."""

    longest: int = 4
    matches: int = 8

    name: ClassVar[str] = "ngram"
    traits: ClassVar[DrafterTraits] = DrafterTraits(follows_any_tree=True, remembers=False, kind="ngram")
    # Two continuations, the better one longer.
    default_shape: ClassVar[TreeShape] = TreeShape((-1, 0, 0, 1, 2, 3, 4, 5, 7, 8))

    def __post_init__(self):
        if self.longest < 1 or self.matches < 1:
            raise ValueError(f"ngram: longest={self.longest} and matches={self.matches} must be at least 1")

    @classmethod
    def load(cls, source: str | Path, folder: "DrafterFolder | None", target: "PreTrainedModel") -> "NgramDrafter":
        return cls()  # for any target

    def open(self, request: DraftRequest) -> "NgramSession | EmptySession":
        if len(request.shape) == 1:
            return EmptySession(TokenTree.of(request.fixed_shape, request.device))
        return NgramSession(self, request)


class NgramSession(Unremembering):
    """One run. It has no state of its own: it reads the row's text in the decode state."""

    def __init__(self, drafter: NgramDrafter, request: DraftRequest):
        self.longest = drafter.longest
        self.matches = min(drafter.matches, request.capacity)
        self.shape = request.fixed_shape
        self.sampling = request.sampling
        self.tree = TokenTree.of(self.shape, request.device)

    def propose(self, state: DecodeState) -> Proposal:
        continuations, weights = self._look_up(state)  # (B, K, D), (B, K)
        columns: list[Tensor] = [state.roots()[:, 0]]
        depths = torch.arange(continuations.shape[2], device=weights.device)
        tokens = continuations.clamp(min=0).transpose(1, 2)  # (B, D, K)
        noise = self.sampling.gumbel(state.keys, state.lengths[:, None] + depths, tokens)  # (B, D, K) or 0
        noise = noise + torch.zeros_like(tokens, dtype=weights.dtype)
        following = [torch.zeros_like(weights)]  # [node]: 0 where a match agrees with the path, else -inf
        for node, children in enumerate(self.shape.children):
            if not children:
                continue
            depth = self.shape.depths[node]
            candidates = continuations[:, :, depth]  # (B, K)
            alive = weights + following[node]
            alive = torch.where(candidates == NO_TOKEN, -torch.inf, alive)
            race = _votes(candidates, alive) / state.temperature[:, None] + noise[:, depth]
            for _ in children:
                best, index = race.max(-1, keepdim=True)
                token = candidates.gather(1, index)  # (B, 1)
                token = torch.where(best > -torch.inf, token, NO_TOKEN)
                columns.append(token[:, 0])
                agrees = (candidates == token) & (token != NO_TOKEN)
                following.append(torch.where(agrees, following[node], -torch.inf))
                race = torch.where(agrees, -torch.inf, race)
        tokens = torch.stack(columns, dim=1)
        return Proposal(tokens, self.tree, "deterministic", self.sampling.source)

    def _look_up(self, state: DecodeState) -> tuple[Tensor, Tensor]:
        """The best K matches: the D tokens after each (NO_TOKEN past the text), (B, K, D), and log weights (B, K).

        Position j matches with length m when the m tokens up to j equal the last m tokens of the text. A match has the
        weight e**(2m); of two matches of one length the later has a slightly larger weight. What is predicted of a row
        counts as text that is later still, but for its own end."""
        text, last = torch.cat([state.tokens, state.predicted], dim=1), state.lengths[:, None] - 1
        position = torch.arange(text.shape[1], device=text.device)  # (T,)
        begun = torch.where(position < state.tokens.shape[1], 0, state.tokens.shape[1])  # (T,): of the part it is in
        final = torch.where(begun > 0, begun + state.foretold[:, None] - 1, last)  # (B, T): its last token
        running = position < final  # (B, T)
        length = torch.zeros_like(text)
        for back in range(self.longest):
            suffix = text.gather(1, (last - back).clamp(min=0))
            shifted = text.roll(back, dims=1)
            running = running & (shifted == suffix) & (position - begun >= back) & (last >= back)
            length = length + running
        recency = position / (torch.where(begun > 0, text.shape[1], last + 1))  # (B, T), below 1
        score = torch.where(length > 0, 2.0 * length + recency, -torch.inf)
        weights, positions = score.topk(self.matches, dim=1)  # (B, K)
        steps = positions[:, :, None] + 1 + torch.arange(max(self.shape.max_depth, 1), device=text.device)
        inside = steps <= final.gather(1, positions)[:, :, None]
        rows = text[:, None].expand(-1, self.matches, -1)
        continuations = rows.gather(2, steps.clamp(max=text.shape[1] - 1))
        return torch.where(inside, continuations, NO_TOKEN), weights


def _votes(candidates: Tensor, alive: Tensor) -> Tensor:
    """log q (unnormalised) of each match's next token, (B, K): weights of matches with the same token are summed."""
    same = candidates[:, :, None] == candidates[:, None, :]
    votes = torch.where(same, alive[:, None, :], -torch.inf).logsumexp(-1)
    return torch.where(alive > -torch.inf, votes, -torch.inf)
