"""The decode step: propose, target forward, verify, cut, write, compact. One for every drafter and rule.

A function over persistent buffers: static shapes, nothing read on the host, no branch on data, so that
it can be compiled or captured as it is (unless a logits processor looks at the history).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .proposal import DraftSession, Proposal
from .sampling import Sampler
from .slots import SlotModel
from .state import DecodeState
from .verify import Verdict, verify


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What a step did, for traces and score outputs; the texts are in the state."""

    proposal: Proposal
    verdict: Verdict
    logits: Tensor  # (B, N, V) float32
    scores: Tensor  # (B, N, V), processed


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """The parts of one decoding run."""

    state: DecodeState
    target: SlotModel
    session: DraftSession
    sampler: Sampler
    rule: str


def step(engine: Engine, mark: Callable[[str], None]) -> StepResult:
    """Advance every row that is not done. `mark` hears "draft", "verify", "commit" as each ends."""
    state = engine.state
    base = state.lengths - 1  # (B,): slot and position of the root
    proposal = engine.session.propose(state)
    mark("draft")
    logits = engine.target.forward_nodes(proposal.tokens, base, proposal.tree)
    scores = engine.sampler.scores(logits, proposal, state)
    verdict = verify(engine.rule, scores, proposal, state.keys, base, engine.sampler.do_sample)
    mark("verify")
    engine.target.cache.compact(base, verdict.path)
    engine.session.commit(state, verdict)
    write(state, verdict)
    mark("commit")
    return StepResult(proposal, verdict, logits, scores)


def write(state: DecodeState, verdict: Verdict) -> None:
    """Append the verdict's tokens up to an end of text or the row's limit; rows that are done stay."""
    columns = torch.arange(verdict.tokens.shape[1], device=verdict.tokens.device)  # (D+1,)
    ends = (verdict.tokens[..., None] == state.eos).any(-1) & (columns <= verdict.accepted[:, None])
    ended = ends.any(-1)
    count = torch.where(ended, ends.to(torch.int8).argmax(-1) + 1, verdict.accepted + 1)
    ended = ended & (count <= state.limits - state.lengths)
    count = torch.minimum(count, state.limits - state.lengths)
    state.failed |= verdict.failed & ~state.done
    count = torch.where(state.done | state.failed, 0, count)
    place = torch.where(columns < count[:, None], state.lengths[:, None] + columns, state.tokens.shape[1] - 1)
    state.tokens.scatter_(1, place, verdict.tokens)
    state.lengths += count
    state.committed.copy_(count)
    state.done |= ended | (state.lengths >= state.limits) | state.failed
