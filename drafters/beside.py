"""Two drafters side by side: both propose behind the same root, and the target checks both proposals in one forward.

Trained drafters predict new text but copy badly; prompt lookup copies but cannot predict. The tree is divided between
them: the last child of the root and the chain below it belong to the second drafter, everything else to the first. Both
draft in every step, so that the step stays static; where the second drafter has no proposal its branch is empty. The
two draw their tokens in different ways, which only the rule `match` can verify; where drafts must come from a known
distribution, the first drafter drafts alone. A session is told which part of the tree is its own, as it has to follow
paths that the other drafted. Knows nothing of verification.
"""

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from ..spec.proposal import NO_TOKEN, Drafter, DrafterTraits, DraftRequest, DraftSession, Proposal, Share, divided
from ..spec.state import DecodeState
from ..spec.target.protocol import Resumable, Span, can_resume
from ..spec.tree import TokenTree, TreeShape

COPIED = 2  # length of the second drafter's chain in the default tree


class Beside:
    """`first` and `second` must be drafters that can follow a path which the other one drafted, as all kinds can that
    come with the package.

    Raises ValueError for any other drafter."""

    def __init__(self, first: Drafter, second: Drafter):
        for part in (first, second):
            if part.traits.parts:
                raise ValueError(f"drafter {part.name!r} is two drafters already; no more than two draft side by side")
            if not part.traits.follows_any_tree:
                raise ValueError(
                    f"drafter {part.name!r} follows no tree but its own (its traits lack follows_any_tree) and cannot "
                    "stand beside another; combine others, such as smollm2-135m-hydra+ngram"
                )
        self.parts = first, second
        self.name = f"{first.name}+{second.name}"
        traits = first.traits, second.traits
        taps = {each.taps for each in traits if each.taps}
        if len(taps) > 1:
            raise ValueError(f"drafters {self.name!r} read different hidden states of the target; combine others")
        self.traits = DrafterTraits(
            vocab_size=next((each.vocab_size for each in traits if each.vocab_size is not None), None),
            taps=next(iter(taps), ()),
            follows_any_tree=True,
            remembers=any(each.remembers for each in traits),
            catches_up=all(each.catches_up or not each.remembers for each in traits),
            parts=self.parts,
        )
        self.default_shape = first.default_shape.beside(TreeShape.chain(COPIED))

    def open(self, request: DraftRequest) -> "BesideSession":
        shape = request.fixed_shape
        first, second = divided(shape)
        if len(shape) > 1 and (len(first) == 1 or shape.part(second).max_children > 1):
            raise ValueError(
                f"drafter {self.name!r} needs a tree of two or more branches, the last one a chain, which is "
                f"{self.parts[1].name!r}'s; use one like '4x2x1+chain:6'"
            )
        sessions = [
            drafter.open(replace(request, shape=shape.part(nodes), share=Share(shape, tuple(nodes))))
            for drafter, nodes in zip(self.parts, (first, second))
        ]
        remembering = [session for part, session in zip(self.parts, sessions) if part.traits.remembers]
        resumable = all(can_resume(session) for session in remembering)
        return (ResumableBesideSession if resumable else BesideSession)(sessions, request)


class BesideSession:
    """One run of both drafters, each with its own session on its own part of the tree."""

    def __init__(self, sessions: list[DraftSession], request: DraftRequest):
        self.sessions, shape = sessions, request.fixed_shape
        self.tree = TokenTree.of(shape, request.device)
        self.nodes = [torch.tensor(nodes, device=request.device) for nodes in divided(shape)]
        self.first_alone = request.sampling.coupling == "own"

    @property
    def packable(self) -> list[torch.nn.Module]:
        return [layer for session in self.sessions for layer in session.packable]

    @property
    def nbytes(self) -> int:
        return sum(session.nbytes for session in self.sessions)

    def clear(self, rows: Tensor | None = None) -> None:
        for session in self.sessions:
            session.clear(rows)

    def read(self, span: Span, features: Tensor | None) -> None:
        for session in self.sessions:
            session.read(span, features)

    def propose(self, state: DecodeState) -> Proposal:
        if self.tree.size == 1:
            return Proposal(state.roots(), self.tree, "deterministic", "own")
        tokens = torch.full_like(self.tree.parents, NO_TOKEN).repeat(len(state.lengths), 1)  # (B, N)
        proposals = [session.propose(state) for session in self.sessions[: 1 if self.first_alone else 2]]
        for nodes, proposal in zip(self.nodes, proposals):
            tokens[:, nodes] = proposal.tokens
        first = proposals[0]
        if not self.first_alone:
            return Proposal(tokens, self.tree, "deterministic", first.coupling)
        logits = first.draft_logits
        if logits is not None:
            logits = logits.new_zeros(*tokens.shape, logits.shape[-1]).index_copy(1, self.nodes[0], logits)
        return Proposal(tokens, self.tree, first.law, first.coupling, logits)

    def follow(self, base: Tensor, path: Tensor, count: Tensor, features: Tensor | None) -> None:
        for session in self.sessions:
            session.follow(base, path, count, features)

    def copy_rows(self, other: Self, rows: Tensor, into: Tensor | None = None) -> None:
        for session, source in zip(self.sessions, other.sessions):
            session.copy_rows(source, rows, into)


class ResumableBesideSession(BesideSession):
    """One whose drafters, those that remember anything, can go on from a text that was read before."""

    def save_row(self, row: int, count: int) -> list:
        parts = (session if isinstance(session, Resumable) else None for session in self.sessions)
        return [None if part is None else part.save_row(row, count) for part in parts]

    def load_row(self, row: int, saved: list, count: int) -> None:
        for session, part in zip(self.sessions, saved):
            if isinstance(session, Resumable):
                session.load_row(row, part, count)
