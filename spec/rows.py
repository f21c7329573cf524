"""The rows of an engine and the requests in them: the host's side of every decode loop.

A request is admitted to a free row, steps advance all rows together, and a row whose text has ended is free again.
Where the executor runs ahead of the host, a step's report is read while the next step runs. A report may then be of a
request that is no longer in the row: every request has a ticket, and reports with another ticket are dropped. Does no
arithmetic on logits, and knows no drafter and no rule.
"""

import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .engines.executors import Executor
from .request import Request
from .state import NO_TICKET
from .step import Engine, RowReport, StepResult, begin, unpack_report
from .stream.record import StreamRecord
from .stream.streamer import Streamer, streamer_of
from .target.protocol import spans
from .trace import WAIT, Fetched

if TYPE_CHECKING:
    from .target.given import GivenPrompt


class Stopwatch:
    """Measures the seconds of each phase of a step; on CUDA with events, so that timing never waits for the device.
    What `streamer`, if there is one, lets a phase wait for weights is a phase of its own. On CUDA its counts are those
    of what has ended, and so are complete only when the step has: the wait is taken out of "verify", in which the
    target computes."""

    def __init__(self, device: torch.device, streamer: Streamer | None = None):
        self.device, self.streamer = device, streamer
        self.phases: list[str] = []
        self.times: list[float] = []
        self.events: list[torch.cuda.Event] = []
        self.records: list[StreamRecord] = []
        self._look()

    def _look(self) -> None:
        if self.streamer is not None and not (self.records and self.device.type == "cuda"):
            self.records.append(self.streamer.record)
        if self.device.type != "cuda":
            self.times.append(time.perf_counter())
            return
        self.events.append(torch.cuda.Event(enable_timing=True))
        self.events[-1].record(torch.cuda.current_stream(self.device))  # `device` need not be the current one

    def mark(self, phase: str) -> None:
        self.phases.append(phase)
        self._look()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase; to be called after the step's results have been read."""
        self._settle()
        if self.events:
            pairs = itertools.pairwise(self.events)
            spent = [before.elapsed_time(after) / 1000 for before, after in pairs]
        else:
            spent = [after - before for before, after in itertools.pairwise(self.times)]
        seconds = dict(zip(self.phases, spent))
        if self.records:
            waited = [(after - before).waited_seconds for before, after in itertools.pairwise(self.records)]
            waits = dict(zip(["verify"] if self.events else self.phases, waited))
            seconds = {phase: max(0.0, whole - waits.get(phase, 0.0)) for phase, whole in seconds.items()}
            seconds[WAIT] = sum(waited)
        return seconds

    def _settle(self) -> None:
        """Wait until the device has done the step, and count what it fetched."""
        if self.events:
            self.events[-1].synchronize()
            if self.streamer is not None and len(self.records) == 1:
                self.records.append(self.streamer.record)

    def fetched(self) -> Fetched | None:
        """What was fetched meanwhile; None where weights are not streamed."""
        if not self.records:
            return None
        self._settle()
        between = self.records[-1] - self.records[0]
        return Fetched(between.bytes_read, between.read_seconds)


class Readout:
    """A step's report on its way to the host: on CUDA an asynchronous copy to pinned memory."""

    def __init__(self, result: StepResult, watch: Stopwatch, number: int, lag: int):
        self.number, self.watch = number, watch
        self.levels, self.logits, self.scores = result.path.shape[1], result.logits, result.scores
        if lag and result.logits is not None and result.scores is not None:  # the next step overwrites them
            self.logits, self.scores = result.logits.clone(), result.scores.clone()
        self.report, self.arrived = result.report, None
        if result.report.is_cuda:
            self.report = torch.empty(result.report.shape, dtype=torch.int64, pin_memory=True)
            self.report.copy_(result.report, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(result.report.device))
        elif lag:
            self.report = result.report.clone()

    def reports(self) -> list[RowReport]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return unpack_report(self.report, self.levels)


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """The results of a step, on the host."""

    number: int
    reports: dict[int, RowReport]  # [row]: only of rows whose request is still the one that the step was for
    watch: Stopwatch
    logits: Tensor | None  # (B, D+1, V), where asked for
    scores: Tensor | None  # (B, D+1, V), where asked for

    @property
    def seconds(self) -> dict[str, float]:
        """Of each phase of the step."""
        return self.watch.seconds()

    @property
    def fetched(self) -> Fetched | None:
        return self.watch.fetched()

    @property
    def ended(self) -> dict[int, RowReport]:
        """The reports of rows whose texts ended in this step; these rows are free now."""
        return {row: report for row, report in self.reports.items() if report.done}


class Rows:
    """The rows of an engine, stepped by `executor`; prompts are read `chunk` tokens at a time."""

    def __init__(self, executor: Executor, chunk: int):
        self.engine, self.executor, self.chunk = executor.engine, executor, chunk
        self.streamer = streamer_of(self.engine.target.model)
        self.tickets = [NO_TICKET] * len(self.engine.state.done)  # [row]
        self._numbers, self._next = itertools.count(), itertools.count(NO_TICKET + 1)
        self._waiting: deque[Readout] = deque()  # steps that the host has not read
        self.engine.state.done.fill_(True)
        self.engine.state.ticket.fill_(NO_TICKET)  # an earlier call's, where the engine is a kept one

    @property
    def free(self) -> list[int]:
        return [row for row, ticket in enumerate(self.tickets) if ticket == NO_TICKET]

    @property
    def live(self) -> list[int]:
        return [row for row, ticket in enumerate(self.tickets) if ticket != NO_TICKET]

    def admit(self, requests: Mapping[int, Request], given: "GivenPrompt | None" = None) -> None:
        """Put each request into its row, which must be free, and read all their prompts together; or take over what the
        model's own forward has `given` of them, one for each row, and with it the first token of each text."""
        index = self.enter(requests)
        with self.executor.packing:
            if given is not None:
                watch = Stopwatch(index.device, self.streamer)
                result = begin(self.engine, given, self.chunk)
                watch.mark("verify")
                self._waiting.append(Readout(result, watch, next(self._numbers), self.executor.lag))
                return
            held = {row: request.held for row, request in requests.items() if request.held is not None}
            self.engine.read(self.chunk, None if len(requests) == len(self.tickets) else index, held)

    def take_over(self, index: Tensor, engine: Engine, rows: Sequence[int]) -> None:
        """Let the rows `index` (R,), whose requests have been entered, know what the `rows` of `engine`, an engine for
        the same drafter, hold of their prompts."""
        source = self._index(rows)
        self.engine.target.copy_rows(engine.target, source, index)
        self.engine.session.copy_rows(engine.session, source, index)

    def enter(self, requests: Mapping[int, Request]) -> Tensor:
        """Write each request to the state of its row, which must be free, with a ticket; returns the rows (R,), in
        which nothing is known of the prompts yet."""
        (_, capacity), (_, ends) = self.engine.state.tokens.shape, self.engine.state.eos.shape
        for row, request in requests.items():
            assert self.tickets[row] == NO_TICKET, f"row {row} is taken"
            assert request.tokens and len(request.tokens) + request.new_tokens < capacity, "the text has no room"
            assert len(request.ends) <= ends, "the engine was made for fewer ends of text"
        for row in requests:
            self.tickets[row] = next(self._next)
        index = self._index(list(requests))
        self.engine.state.admit(index, list(requests.values()), [self.tickets[row] for row in requests])
        return index

    def step(self) -> Arrival:
        """Advance all rows and return the oldest step not read yet, which is `executor.lag` steps behind."""
        while len(self._waiting) <= self.executor.lag:
            watch = Stopwatch(self.engine.state.tokens.device, self.streamer)
            result = self.executor.run(watch.mark)
            self._waiting.append(Readout(result, watch, next(self._numbers), self.executor.lag))
        return self._read(self._waiting.popleft())

    def drain(self) -> list[Arrival]:
        """The steps that the host has not read yet, without running another one."""
        unread = [*self._waiting]
        self._waiting.clear()
        return [self._read(readout) for readout in unread]

    def _read(self, readout: Readout) -> Arrival:
        every = enumerate(readout.reports())
        reports = {row: report for row, report in every if report.ticket == self.tickets[row] != NO_TICKET}
        for row, report in reports.items():
            if report.done:
                self.tickets[row] = NO_TICKET
        return Arrival(readout.number, reports, readout.watch, readout.logits, readout.scores)

    def evict(self, rows: list[int]) -> None:
        """End the texts of `rows` where they are."""
        for row in rows:
            self.tickets[row] = NO_TICKET
        if rows:
            self.engine.state.done[self._index(rows)] = True

    def extend(self, row: int, new_tokens: int) -> None:
        """Continue a text that has ended, by at most `new_tokens` tokens."""
        state = self.engine.state
        assert self.tickets[row] == NO_TICKET, f"row {row} is taken"
        self.tickets[row] = next(self._next)
        state.ticket[row] = self.tickets[row]
        state.limits[row] = state.lengths[row] + new_tokens
        state.done[row] = False

    def text(self, row: int) -> list[int]:
        """All tokens of a row that has ended, prompt included."""
        state = self.engine.state
        return state.tokens[row, : int(state.lengths[row])].tolist()

    def moved(self, rows: list[int], executor: Executor) -> "Rows":
        """Copy the requests of `rows` to the first rows of the engine of another executor, which has the same drafter,
        once all steps have been read."""
        assert not self._waiting
        moved = Rows(executor, self.chunk)
        if rows:
            moved.engine.copy_rows(self.engine, self._index(rows), self._index(range(len(rows))))
        moved.tickets[: len(rows)] = [self.tickets[row] for row in rows]
        moved._next, moved._numbers = self._next, self._numbers
        return moved

    def catch_up(self, rows: list[int]) -> None:
        """Let the drafter's session read the new tokens of `rows`, which it followed while nothing was drafted."""
        state, index = self.engine.state, self._index(rows)
        with self.executor.packing:
            for span in spans(state.tokens, state.lengths, self.chunk, index, state.begun - 1, state.beside):
                self.engine.session.read(span, None)

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(list(rows), dtype=torch.long, device=self.engine.state.done.device)
