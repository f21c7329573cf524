"""The decode step: propose, target forward, verify, cut, write, commit. One for every drafter and rule.

A function over persistent buffers: static shapes, nothing read on the host, no branch on data, so that
it can be compiled or captured as it is (unless a logits processor looks at the history).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .proposal import DraftSession
from .sampling import Sampler
from .state import DecodeState
from .step_report import pack_report
from .target import Target, spans
from .verify import Verdict, verify


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What a step did, for the host; the texts are in the state."""

    report: Tensor  # (B, 2N + D + 7): see step_report.py
    path: Tensor  # (B, D+1): accepted nodes from the root on, the last repeated
    logits: Tensor | None  # (B, N, V) float32, where asked for
    scores: Tensor | None  # (B, N, V), processed, where asked for


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """The parts of one decoding run, with all its buffers."""

    state: DecodeState
    target: Target
    session: DraftSession
    sampler: Sampler
    rule: str
    keep_scores: bool = False

    def read(self, chunk: int, rows: Tensor | None = None) -> None:
        """Read the texts in the state, or those of `rows` (R,), all but the last token of each, `chunk` tokens
        at a time; what these rows held before is forgotten."""
        self.target.clear(rows)
        self.session.clear(rows)
        for span in spans(self.state.tokens, self.state.lengths, chunk, rows):
            self.session.read(span, self.target.read(span))

    def copy_rows(self, other: "Engine", rows: Tensor) -> None:
        """Go on with `rows` (B,) of `other`, an engine of the same capacity for the same drafter."""
        self.state.copy_rows(other.state, rows)
        self.target.copy_rows(other.target, rows)
        self.session.copy_rows(other.session, rows)

    @property
    def packable(self) -> list[torch.nn.Module]:
        """The models that the step runs, and layers beside them, whose linear layers can be packed."""
        return [*self.target.packable, *self.session.packable]

    @property
    def nbytes(self) -> int:
        """Bytes of what target and drafter keep of the texts."""
        return self.target.nbytes + self.session.nbytes

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
    seen = engine.target.forward(proposal, base)
    scores = engine.sampler.scores(seen.logits, proposal, state)
    verdict = verify(engine.rule, scores, proposal, state.keys, base, engine.sampler.do_sample)
    mark("verify")
    write(state, verdict)
    engine.target.commit(base, verdict.path, state.committed)
    engine.session.follow(base, verdict.path, state.committed, seen.features)
    report = pack_report(state, proposal, verdict)
    mark("commit")
    kept = (seen.logits, scores) if engine.keep_scores else (None, None)
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
