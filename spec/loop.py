"""The decode loop: prefill, then steps until every row is done. The host's side of decoding.

It reads what a step committed, records the trace, and lets stopping criteria and streamers see the
text. It does no arithmetic on logits and knows no drafter and no rule. Where the executor runs ahead
of the host, a step is read while the next one runs, and what that one overshoots is cut.
"""

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from .lockstep import Lockstep, ScoreBook
from .state import DecodeState
from .step import Engine, StepResult
from .step_report import RowReport, unpack_report
from .trace import Event, Trace


class Stopwatch:
    """Seconds of each phase of a step; on CUDA by events, so that timing never waits inside a step."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.marks: list[tuple[str, object]] = [("", self._now())]

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # which need not be the current device
        return event

    def mark(self, phase: str) -> None:
        self.marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """To be asked once the step's results have been read."""
        pairs = zip(self.marks, self.marks[1:])
        if self.cuda:
            self.marks[-1][1].synchronize()
            return {phase: before.elapsed_time(after) / 1000 for (_, before), (phase, after) in pairs}
        return {phase: after - before for (_, before), (phase, after) in pairs}


class Readout:
    """A step's report on its way to the host: on CUDA an asynchronous copy to pinned memory."""

    def __init__(self, result: StepResult, watch: Stopwatch, number: int, lag: int):
        self.number, self.watch = number, watch
        self.path, self.logits, self.scores = result.path, result.logits, result.scores
        if lag and result.scores is not None:  # the next step writes over them
            self.path, self.logits, self.scores = (t.clone() for t in (self.path, self.logits, self.scores))
        self.report, self.arrived = result.report, None
        if result.report.is_cuda:
            self.report = torch.empty(result.report.shape, dtype=torch.int64, pin_memory=True)
            self.report.copy_(result.report, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(result.report.device))
        elif lag:
            self.report = result.report.clone()

    def rows(self) -> list[RowReport]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return unpack_report(self.report, self.path.shape[1])


def decode(
    engine: Engine,
    executor,
    prompt: Tensor,
    trace: Trace,
    prefill_chunk: int,
    lockstep: Lockstep | None = None,
    score_book: ScoreBook | None = None,
    logit_book: ScoreBook | None = None,
    on_step: Callable[[list[Event]], None] | None = None,
) -> list[int]:
    """Decode until all rows are done; returns how many generated tokens of each row stand.

    The texts are in `engine.state`, the events in `trace` (also when an exception ends the loop).
    """
    state = engine.state
    engine.prefill(prefill_chunk)
    texts: list[list[int]] = [[] for _ in prompt]

    def read(readout: Readout) -> bool:
        rows = readout.rows()
        _check(rows, state)
        seconds = readout.watch.seconds()
        events = [report.event(row, readout.number, seconds) for row, report in enumerate(rows) if report.committed]
        trace.events += events
        for event in events:
            texts[event.row] += event.committed
        for book, scores in ((score_book, readout.scores), (logit_book, readout.logits)):
            if book is not None:
                book.add(scores, readout.path, [report.committed for report in rows])
        if on_step is not None and events:
            on_step(events)
        done = all(report.done for report in rows)
        if lockstep is None:
            return done
        lockstep.advance(texts)
        stopped = [hit and (lockstep.pad is not None or lockstep.stopped) for hit in lockstep.finished]
        if any(stopped):
            state.done |= torch.tensor(stopped, device=prompt.device)
        return done or all(report.done or stop for report, stop in zip(rows, stopped))

    run_steps(engine, executor, read)
    counts = lockstep.counts if lockstep is not None else [len(text) for text in texts]
    for row, count in enumerate(counts):
        if count < len(texts[row]):
            trace.cut(row, count)
    return counts


def run_steps(engine: Engine, executor, read: Callable[[Readout], bool]) -> None:
    """The loop: steps, each read as late as the executor says, until `read` says that it has seen enough."""
    waiting: deque[Readout] = deque()
    done, number = False, 0
    while not done:
        watch = Stopwatch(engine.state.tokens.device)
        waiting.append(Readout(executor.run(watch.mark), watch, number, executor.lag))
        number += 1
        if len(waiting) > executor.lag:
            done = read(waiting.popleft())


def _check(rows: list[RowReport], state: DecodeState) -> None:
    for row, report in enumerate(rows):
        if report.failed:
            raise ValueError(
                f"row {row}: the scores after token {int(state.lengths[row])} of its text are NaN or forbid every "
                "token; check the model's weights and dtype and the logits processors"
            )
