"""The decode step: propose, target forward, verify, cut, write, compact. One for every drafter and rule.

A function over persistent buffers: static shapes, nothing read on the host, no branch on data, so that
it can be compiled or captured as it is (unless a logits processor looks at the history).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .proposal import DraftSession
from .sampling import Sampler
from .slots import SlotModel
from .state import DecodeState
from .step_report import pack_report
from .verify import Verdict, verify


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What a step did, for the host; the texts are in the state."""

    report: Tensor  # (B, 2N + D + 6): see step_report.py
    path: Tensor  # (B, D+1): accepted nodes from the root on, the last repeated
    logits: Tensor | None  # (B, N, V) float32, where asked for
    scores: Tensor | None  # (B, N, V), processed, where asked for


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """The parts of one decoding run, with all its buffers."""

    state: DecodeState
    target: SlotModel
    session: DraftSession
    sampler: Sampler
    rule: str
    keep_scores: bool = False

    def prefill(self, chunk: int, rows: Tensor | None = None) -> None:
        """Read the prompts in the state, or those of `rows` (R,), all but the last token of each, `chunk` tokens
        at a time."""
        state = self.state
        hidden = self.target.prefill(state.tokens, state.lengths, chunk, rows)
        if hidden is not None:
            state.hidden[slice(None) if rows is None else rows] = hidden
        self.session.prefill(state, chunk, rows)

    @property
    def packable(self) -> list[torch.nn.Module]:
        """The models that the step runs, and layers beside them, whose linear layers can be packed."""
        return [self.target.model, *self.session.packable]

    def idle_step(self) -> None:
        """A step in which every row is done: it changes no text, and allocates what is made on first use."""
        self.state.done.fill_(True)
        step(self, lambda phase: None)


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
    if state.hidden is not None:
        last = verdict.path.gather(1, (state.committed - 1).clamp(min=0)[:, None])  # the node that gave the new root
        last = last[..., None].expand(-1, 1, state.hidden.shape[1])
        state.hidden.copy_(engine.target.hidden.gather(1, last)[:, 0])
    report = pack_report(state, proposal, verdict)
    mark("commit")
    kept = (logits, scores) if engine.keep_scores else (None, None)
    return StepResult(report, verdict.path, *kept)


def write(state: DecodeState, verdict: Verdict) -> None:
    """Append the verdict's tokens up to an end of text or the row's limit; rows that are done stay."""
    columns = torch.arange(verdict.tokens.shape[1], device=verdict.tokens.device)  # (D+1,)
    ends = (verdict.tokens[..., None] == state.eos[:, None]).any(-1) & (columns <= verdict.accepted[:, None])
    ended = ends.any(-1)
    # Not by an argmax over int8, which inductor can get wrong.
    count = torch.where(ended, (ends.cumsum(-1) == 0).sum(-1) + 1, verdict.accepted + 1)
    ended = ended & (count <= state.limits - state.lengths)
    count = torch.minimum(count, state.limits - state.lengths)
    state.failed |= verdict.failed & ~state.done & (count > verdict.accepted)  # else the bonus is not used
    count = torch.where(state.done | state.failed, 0, count)
    place = torch.where(columns < count[:, None], state.lengths[:, None] + columns, state.tokens.shape[1] - 1)
    state.tokens.scatter_(1, place, verdict.tokens)
    state.lengths += count
    state.committed.copy_(count)
    state.done |= ended | (state.lengths >= state.limits) | state.failed
