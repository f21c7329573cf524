"""The decode step: the same for every drafter and rule.

The drafter proposes a tree, the target's forward reads it, a rule verifies it, `write` appends what was accepted up to
an end of text or the row's limit, and target and drafter take over the accepted path (`commit`, `follow`). A function
over persistent buffers with static shapes, which reads nothing on the host and does not branch on data, so that it can
be compiled or captured as it is (unless a logits processor looks at the history, or the tree is so large that scores
are computed along the accepted path only, node after node).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .proposal import DraftSession, Proposal
from .request import Held
from .sampling import Sampler
from .state import DecodeState
from .target.protocol import Resumable, Span, TakesPrompts, Target, Unscored, spans
from .trace import Event, Fetched
from .tree import TokenTree, TreeShape
from .verify import Verdict, verify, walk

if TYPE_CHECKING:
    from .target.given import GivenPrompt


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """The results of a step that the host reads; the texts themselves are in the state."""

    report: Tensor  # (B, 2N + D + 7): see pack_report
    path: Tensor  # (B, D+1): accepted nodes from the root on, the last repeated
    logits: Tensor | None  # (B, D+1, V) float32, of the path's nodes, where asked for
    scores: Tensor | None  # (B, D+1, V), processed, where asked for


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """The parts of one decoding run, with all its buffers."""

    state: DecodeState
    target: Target
    session: DraftSession
    sampler: Sampler
    rule: str
    keep_scores: bool = False

    def read(self, chunk: int, rows: Tensor | None = None, held: Mapping[int, Held] | None = None) -> None:
        """Prefill: clear all rows, or `rows` (R,), and read their texts in the state, except the last token of each
        and what is `held` [row], `chunk` tokens at a time."""
        for span in self.spans(chunk, rows, held):
            self.session.read(span, self.target.read(span))

    def spans(
        self,
        chunk: int,
        rows: Tensor | None = None,
        held: Mapping[int, Held] | None = None,
        ends: Sequence[tuple[int, int]] | None = None,
    ) -> Iterator[Span]:
        """What `read` reads, span by span: rows are cleared at the first one. `ends` is that of `protocol.spans`."""
        self.target.clear(rows)
        self.session.clear(rows)
        counts = torch.zeros_like(self.state.lengths)
        for row, part in (held or {}).items():
            self._resume(row, part)
            counts[row] = part.count
        yield from spans(self.state.tokens, self.state.lengths, chunk, rows, counts, self.state.beside, ends)

    def _resume(self, row: int, held: Held) -> None:
        for part, saved in ((self.target, held.target), (self.session, held.session)):
            if saved is not None:
                assert isinstance(part, Resumable), "nothing is held of others"
                part.load_row(row, saved, held.count)

    def hold(self, row: int, session: bool, count: int | None = None) -> Held:
        """A copy of what is known of the first `count` tokens of a row's text, with `session` the drafter's part, too.
        None is all but the last two: the root, which is not absorbed, and the one before it, which may be a drafter's
        to read again."""
        assert isinstance(self.target, Resumable), "others are refused"
        count = max(int(self.state.lengths[row]) - 2, 0) if count is None else count
        part = self.session.save_row(row, count) if session and isinstance(self.session, Resumable) else None
        return Held(count, self.target.save_row(row, count), part)

    def copy_rows(self, other: "Engine", rows: Tensor, into: Tensor | None = None) -> None:
        """Copy `rows` (R,) of `other`, an engine for the same drafter, into the rows `into` (R,) of this one; None:
        into all of them."""
        self.state.copy_rows(other.state, rows, into)
        self.target.copy_rows(other.target, rows, into)
        self.session.copy_rows(other.session, rows, into)

    @property
    def packable(self) -> list[torch.nn.Module]:
        """The models and layers whose linear weights compiled steps may repack."""
        return [*self.target.packable, *self.session.packable]

    @property
    def nbytes(self) -> int:
        """Bytes of the caches of target and drafter."""
        return self.target.nbytes + self.session.nbytes

    def idle_step(self) -> None:
        """Run a step in which every row is done: changes no text, but allocates buffers that are made on first use."""
        self.state.done.fill_(True)
        step(self, lambda phase: None)


def step(engine: Engine, mark: Callable[[str], None]) -> StepResult:
    """Advance every row that is not done. Calls `mark` with "draft", "verify" and "commit" at the end of each phase."""
    state = engine.state
    base = state.lengths - 1  # (B,): slot and position of the root
    proposal = engine.session.propose(state)
    mark("draft")
    seen = engine.target.forward(proposal, base)
    if isinstance(seen, Unscored):
        verdict, kept = walked(engine, seen, proposal, base)
    else:
        verdict, kept = _judged(engine, seen.logits, proposal, base)
    mark("verify")
    write(state, verdict)
    engine.target.commit(base, verdict.path, state.committed)
    engine.session.follow(base, verdict.path, state.committed, seen.features)
    result = StepResult(pack_report(state, proposal, verdict), verdict.path, *kept)
    mark("commit")
    return result


def begin(engine: Engine, prompt: "GivenPrompt", chunk: int) -> StepResult:
    """The first step of texts whose prompts the model's own forward has read: one token for each row of the engine, by
    the logits behind the prompts. The drafter's session reads the prompts `chunk` tokens at a time."""
    state = engine.state
    assert isinstance(engine.target, TakesPrompts), "the targets of generate do"
    engine.target.clear()
    engine.session.clear()
    engine.target.take_over(prompt)
    logits = prompt.logits[:, None]  # (B, 1, V)
    root = TokenTree.of(TreeShape.chain(0), logits.device)
    proposal = Proposal(state.roots(), root, "deterministic", "own")
    verdict, kept = _judged(engine, logits, proposal, state.lengths - 1)
    write(state, verdict)
    for span in spans(state.tokens, state.lengths, chunk, beside=state.beside):
        engine.session.read(span, prompt.features_at(span.positions))
    return StepResult(pack_report(state, proposal, verdict), verdict.path, *kept)


Kept = tuple[Tensor | None, Tensor | None]  # logits and scores, (B, D+1, V) each, where they are kept


def _judged(engine: Engine, logits: Tensor, proposal: Proposal, base: Tensor) -> tuple[Verdict, Kept]:
    """The verdict on a tree whose logits are (B, N, V)."""
    scores = engine.sampler.scores(logits, proposal, engine.state)
    verdict = verify(engine.rule, scores, proposal, engine.state.keys, base, engine.sampler.do_sample)
    if not engine.keep_scores:
        return verdict, (None, None)
    rows = torch.arange(len(base), device=base.device)[:, None]
    return verdict, (logits[rows, verdict.path], scores[rows, verdict.path])


def walked(engine: Engine, seen: Unscored, proposal: Proposal, base: Tensor) -> tuple[Verdict, Kept]:
    """The verdict on a tree whose logits are computed along the accepted path."""
    state, sampler, kept = engine.state, engine.sampler, []

    def scores_at(node: Tensor, going: Tensor) -> Tensor:
        logits = seen.logits_at(node[:, None])[:, 0]  # (B, V)
        scores = sampler.scores_at(node, going, logits, proposal, state)
        if engine.keep_scores:
            kept.append((logits, scores))
        return scores

    verdict = walk(scores_at, proposal, state.keys, base, ~state.done, sampler.do_sample)
    if not engine.keep_scores:
        return verdict, (None, None)
    kept += kept[-1:] * (proposal.tree.max_depth + 1 - len(kept))  # as the path repeats its last node
    logits, scores = (torch.stack(levels, dim=1) for levels in zip(*kept))
    return verdict, (logits, scores)


def write(state: DecodeState, verdict: Verdict) -> None:
    """Append the verdict's tokens up to an end of text or the row's limit; rows that are done do not change."""
    columns = torch.arange(verdict.tokens.shape[1], device=verdict.tokens.device)  # (D+1,)
    ends = (verdict.tokens[..., None] == state.eos[:, None]).any(-1) & (columns <= verdict.accepted[:, None])
    ended = ends.any(-1)
    # Not argmax over int8, which inductor can compile wrongly.
    count = torch.where(ended, (ends.cumsum(-1) == 0).sum(-1) + 1, verdict.accepted + 1)
    ended = ended & (count <= state.limits - state.lengths)
    count = torch.minimum(count, state.limits - state.lengths)
    state.failed |= verdict.failed & ~state.done & (count > verdict.accepted)  # only matters where the bonus is used
    count = torch.where(state.done | state.failed, 0, count)
    slots = torch.where(columns < count[:, None], state.lengths[:, None] + columns, state.tokens.shape[1] - 1)
    state.tokens.scatter_(1, slots, verdict.tokens)
    state.lengths += count
    state.committed.copy_(count)
    state.done |= ended | (state.lengths >= state.limits) | state.failed


_SCALARS = 6


def pack_report(state: DecodeState, proposal: Proposal, verdict: Verdict) -> Tensor:  # (B, 2N + D + 7)
    """The report of the step that has just written `verdict` to `state`."""
    scalars = [verdict.accepted, verdict.bonus, state.committed, state.done, state.failed, state.ticket]
    parents = proposal.tree.parents.expand_as(proposal.tokens)
    return torch.cat([proposal.tokens, parents, verdict.path, torch.stack(scalars, dim=1)], dim=1)


@dataclass(frozen=True, slots=True)
class RowReport:
    """One row of a step's report."""

    tokens: list[int]
    parents: list[int]
    path: list[int]
    accepted: int
    bonus: int
    committed: int
    done: bool
    failed: bool
    ticket: int

    def event(self, row: int, step: int, seconds: dict[str, float], fetched: Fetched | None = None) -> Event:
        nodes = self.path[1 : self.accepted + 1]
        event = Event(row, step, self.tokens, self.parents, nodes, self.bonus, seconds, fetched=fetched)
        event.keep(self.committed)
        return event


def unpack_report(report: Tensor, levels: int) -> list[RowReport]:
    """The rows of a report (B, 2N + D + 7) of a tree with D + 1 `levels`, root included."""
    nodes = (report.shape[1] - levels - _SCALARS) // 2
    return [_row(numbers, nodes, levels) for numbers in report.tolist()]


def _row(numbers: list[int], nodes: int, levels: int) -> RowReport:
    accepted, bonus, committed, done, failed, ticket = numbers[-_SCALARS:]
    return RowReport(
        tokens=numbers[:nodes],
        parents=numbers[nodes : 2 * nodes],
        path=numbers[2 * nodes : 2 * nodes + levels],
        accepted=accepted,
        bonus=bonus,
        committed=committed,
        done=bool(done),
        failed=bool(failed),
        ticket=ticket,
    )
