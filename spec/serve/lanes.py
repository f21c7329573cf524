"""Lanes: where prompts are read, chunk by chunk, before their texts enter the batch.

Between two steps of the batch at most one chunk is read, so that no text waits longer than for that. Of several lanes
the one goes on that has the least left to read, so that a short prompt passes a long one; whoever has waited for
`PATIENCE` chunks of others comes first. Texts whose prompts have been read enter the batch in the order in which their
lanes began, which is that of the queue. Knows nothing of how texts are decoded.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from ..engines.executors import Eager
from ..request import Held
from ..target.protocol import Span
from ..target.slots import SlotModel
from .job import Job, Phase, TokenLogprobs

PATIENCE = 32


class Lane:
    """An engine whose rows hold prompts that are read together, `chunk` tokens at a time."""

    def __init__(self, executor: Eager, chunk: int):
        self.engine, self.packing, self.chunk = executor.engine, executor.packing, chunk
        self.width = len(self.engine.state.done)
        self.jobs: dict[int, Job] = {}  # [row], until they leave it
        self.begun = 0  # which turn of all lanes this is: who began earlier enters the batch earlier
        self.left = 0  # tokens to be read
        self.waited = 0  # chunks that other lanes have read meanwhile
        self._spans: Iterator[Span] = iter(())

    @property
    def reading(self) -> bool:
        return self.left > 0

    @property
    def ready(self) -> dict[int, Job]:
        """The jobs that can enter the batch."""
        return {} if self.reading else self.jobs

    def begin(self, jobs: Sequence[Job], find: Callable[[Job], Held | None], begun: int) -> None:
        """Begin with the prompts of `jobs`, of which `find` tells what is known, as turn number `begun` of all lanes.
        A job for which that fails ends alone; where the requests cannot be written to the lane, all of them end."""
        self.jobs = dict(enumerate(jobs))
        found = [(job, held) for job in jobs for held in self._found(job, find)]
        if not found:
            return
        jobs = [job for job, _ in found]
        self.jobs = dict(enumerate(jobs))
        rows = torch.arange(len(jobs), device=self.engine.state.done.device)
        kept = {row: part for row, (_, part) in enumerate(found) if part is not None}
        for row, job in self.jobs.items():
            job.phase = Phase.READING
            job.reused = kept[row].count if row in kept else 0
        try:
            self.engine.state.admit(rows, [job.request for job in jobs], [0] * len(jobs))
        except Exception as error:
            for job in jobs:
                self.fail(job, error)
            return
        ends = [(job.reused, len(job.request.tokens) - 1 - job.reused) for job in jobs]
        self.left = max(left for _, left in ends)
        self.waited, self.begun = 0, begun
        with self.packing:
            self._spans = self.engine.spans(self.chunk, None if len(jobs) == self.width else rows, kept, ends)
            if not self.left:
                next(self._spans, None)  # clears the rows
        for job in jobs:
            job.tell()

    def _found(self, job: Job, find: Callable[[Job], Held | None]) -> list[Held | None]:
        """What is known of a prompt; nothing at all where that fails, which ends the job."""
        try:
            return [find(job)]
        except Exception as error:
            self.fail(job, error)
            return []

    def advance(self) -> None:
        """Read a chunk."""
        with self.packing:
            span = next(self._spans)
            if any(job.asked.prompt_logprobs is not None for job in self.jobs.values()):
                self._score(span)
            else:
                self.engine.session.read(span, self.engine.target.read(span))
        self.left -= span.tokens.shape[1]

    def _score(self, span: Span) -> None:
        """Read a chunk with the logits of its positions, each of which is about the token after it."""
        target = self.engine.target
        assert isinstance(target, SlotModel), "make_engine makes no others"
        seen = target.read_scored(span)
        self.engine.session.read(span, seen.features)
        for row, job in self.jobs.items():
            if (count := job.asked.prompt_logprobs) is None:
                continue
            try:
                for column, position in enumerate(span.positions[row].tolist()):
                    if position >= 0:
                        token = job.request.tokens[position + 1]
                        job.prompt_logprobs.append(TokenLogprobs.of(seen.logits[row, column], token, count))
            except Exception as error:
                self.fail(job, error)

    def drop(self, job: Job) -> None:
        """Forget a job; a lane without any is free."""
        self.jobs = {row: other for row, other in self.jobs.items() if other is not job}
        if not self.jobs:
            self.left = 0

    def fail(self, job: Job, error: Exception) -> None:
        """End a job with an error that is its alone; see `Job.fail`."""
        job.fail(error)
        self.drop(job)
        job.end("error")


def next_lane(lanes: Sequence[Lane]) -> Lane | None:
    """The lane to read a chunk; None where none has anything to read."""
    reading = [lane for lane in lanes if lane.reading]
    if not reading:
        return None
    chosen = max(reading, key=lambda lane: (lane.waited >= PATIENCE, -lane.left))
    for lane in reading:
        lane.waited = 0 if lane is chosen else lane.waited + 1
    return chosen
