"""The decode loop: prefill, then steps until every row is done. The host's side of decoding.

It reads what a step committed, records the trace, and lets stopping criteria and streamers see the
text. It does no arithmetic on logits and knows no drafter and no rule.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from .lockstep import Lockstep, ScoreBook
from .step import Engine, StepResult, step
from .trace import Event, Trace


class Stopwatch:
    """Seconds of each phase of a step; on CUDA by events, so that timing never waits inside a step."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, object]] = []

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.marks = [("", self._now())]

    def mark(self, phase: str) -> None:
        self.marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """Read after the step's results have been read, when all events have passed."""
        pairs = zip(self.marks, self.marks[1:])
        if self.cuda:
            self.marks[-1][1].synchronize()
            return {phase: before.elapsed_time(after) / 1000 for (_, before), (phase, after) in pairs}
        return {phase: after - before for (_, before), (phase, after) in pairs}


def decode(
    engine: Engine,
    prompt: Tensor,
    pads: Tensor,
    trace: Trace,
    lockstep: Lockstep | None = None,
    score_book: ScoreBook | None = None,
    logit_book: ScoreBook | None = None,
    on_step: Callable[[list[Event]], None] | None = None,
) -> list[int]:
    """Decode until all rows are done; returns how many generated tokens of each row stand.

    The texts are in `engine.state`, the events in `trace` (also when an exception ends the loop).
    """
    state = engine.state
    engine.target.prefill(prompt, pads)
    engine.session.prefill(state)
    texts: list[list[int]] = [[] for _ in prompt]
    watch = Stopwatch(prompt.device)
    active = [not done for done in state.done.tolist()]
    number = 0
    while any(active):
        watch.start()
        result = step(engine, watch.mark)
        events = read_events(result, state.committed.tolist(), active, number, watch)
        trace.events += events
        for event in events:
            texts[event.row] += event.committed
        for book, scores in ((score_book, result.scores), (logit_book, result.logits)):
            if book is not None:
                book.add(scores, result.verdict.path, state.committed.tolist())
        if state.failed.any():
            row = int(state.failed.to(torch.int8).argmax())
            raise ValueError(
                f"row {row}: the scores after token {int(state.lengths[row])} of its text are NaN or forbid every "
                "token; check the model's weights and dtype and the logits processors"
            )
        if on_step is not None:
            on_step(events)
        if lockstep is not None:
            lockstep.advance(texts)
            stopped = [done and (lockstep.pad is not None or lockstep.stopped) for done in lockstep.finished]
            state.done |= torch.tensor(stopped, device=prompt.device)
        active = [not done for done in state.done.tolist()]
        number += 1
    counts = lockstep.counts if lockstep is not None else [len(text) for text in texts]
    for row, count in enumerate(counts):
        if count < len(texts[row]):
            trace.cut(row, count)
    return counts


def read_events(
    result: StepResult, committed: list[int], active: list[bool], number: int, watch: Stopwatch
) -> list[Event]:
    """What the step did, as events of the rows that were active before it."""
    rows = len(active)
    tokens = result.proposal.tokens.tolist()
    parents = result.proposal.tree.parents.expand(rows, -1).tolist()
    path, accepted = result.verdict.path.tolist(), result.verdict.accepted.tolist()
    bonus = result.verdict.bonus.tolist()
    seconds = watch.seconds()
    events = []
    for row in range(rows):
        if active[row] and committed[row]:
            nodes = path[row][1 : accepted[row] + 1]
            event = Event(row, number, tokens[row], parents[row], nodes, bonus[row], seconds)
            event.keep(committed[row])
            events.append(event)
    return events
