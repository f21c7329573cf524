"""The scheduler: a client of the rows of an engine for which requests come and go.

Each turn (`tick`) admits what is ready, reads a chunk of a prompt in a lane (lanes.py), steps the batch once, and
delivers what the step brought. What goes wrong with one job alone (its text, its log-probabilities, its settings) ends
that job with the reason "error"; what goes wrong with the engine (a chunk, a step, a row's copy) is raised. A request
is taken only if its whole text has room, so that what is admitted always ends. What a request's text is depends on
nothing that happens here. There is no clock: a turn is the unit of time.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import count
from operator import or_

from ..request import Held
from ..rows import Arrival, Rows
from .gears import Gear, Gears, Shape, sizes
from .job import Job, Phase
from .lanes import Lane, next_lane
from .waiting import Waiting

STEADY = 8  # turns, so that a batch whose size goes to and fro is not moved each time

Plan = Callable[[int], Shape]  # the tree for a number of rows


class Prefixes:
    """Keeps nothing of the prompts that were read; see prefixes.py for one that does."""

    def find(self, job: Job) -> Held | None:
        """What is kept of the beginning of a prompt."""
        return None

    def keep(self, lane: Lane, row: int, job: Job) -> None:
        """Keep what a lane's row holds of a prompt."""


class Scheduler:
    """Serves jobs in the rows of `gears`, whose trees `plan` chooses; `lanes` read the prompts.

    To be used by one thread. `on_step` is called with each step that was read. Another gear is taken once it has been
    the better one for `steady` turns, or at once where the present one does not do."""

    def __init__(
        self,
        gears: Gears,
        lanes: Sequence[Lane],
        plan: Plan,
        prefixes: Prefixes | None = None,
        on_step: Callable[[Arrival, Gear], None] = lambda arrival, gear: None,
        steady: int = STEADY,
    ):
        self.gears, self.lanes, self.plan, self.on_step, self.steady = gears, lanes, plan, on_step, steady
        self.prefixes = prefixes or Prefixes()
        self.waiting = Waiting()
        self.running: dict[int, Job] = {}  # [ticket]
        self.sizes = sizes(gears.most)
        self._begun = count(1)  # numbers what the lanes begin with
        self._better = 0  # turns for which another gear has been the better one

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running and not any(lane.jobs for lane in self.lanes)

    @property
    def in_lanes(self) -> list[Job]:
        return [job for lane in self.lanes for job in lane.jobs.values()]

    @property
    def live(self) -> list[int]:
        return [] if self.gears.rows is None else self.gears.rows.live

    def fits(self, job: Job) -> bool:
        """Whether the whole text of a job has room."""
        return len(job.request.tokens) + job.request.new_tokens <= self.gears.room

    def submit(self, job: Job, first: bool = False) -> None:
        """Queue a job, behind its tenant's others or before them."""
        assert self.fits(job), "what has no room is refused before"
        self.waiting.add(job, first)

    def cancel(self, job: Job) -> None:
        """End a job where it is."""
        if job.phase is Phase.ENDED:
            return
        if job.phase is Phase.WAITING:
            self.waiting.remove(job)
        for lane in self.lanes:
            lane.drop(job)
        tickets = [ticket for ticket, other in self.running.items() if other is job]
        for ticket in tickets:
            self._rows.evict([self._rows.tickets.index(ticket)])
            del self.running[ticket]
        job.end("abort")

    def tick(self) -> None:
        """One turn."""
        self._admit()
        self._read()
        if self.live:
            gear = self.gears.current
            assert gear is not None
            self._deliver(self._rows.step(), gear)

    @property
    def _rows(self) -> Rows:
        assert self.gears.rows is not None, "the first shift comes before the first row"
        return self.gears.rows

    def _admit(self) -> None:
        """Let the jobs whose prompts have been read enter free rows, in another gear where that is better."""
        lanes = sorted(self.lanes, key=lambda lane: lane.begun)
        ready = [(lane, row, job) for lane in lanes for row, job in lane.ready.items()]
        self._settle([job for _, _, job in ready])
        for (lane, lane_row, job), row in zip(ready, self._rows.free if ready else ()):
            try:
                index = self._rows.enter({row: job.request})
            except Exception as error:
                lane.fail(job, error)
                self._rows.evict([row])
                continue
            self._rows.take_over(index, lane.engine, [lane_row])
            lane.drop(job)
            job.phase = Phase.RUNNING
            self.running[self._rows.tickets[row]] = job

    def _settle(self, ready: Sequence[Job]) -> None:
        """Shift gears at once where the present one does not do, and where another has been better for a while."""
        jobs = [*self.running.values(), *ready]
        if not jobs:
            return
        coming = len(self.running) + len(self.in_lanes) + len(self.waiting)
        size = next(size for size in self.sizes if size >= min(coming, self.gears.most))
        wish = Gear(size, self.plan(size), self.gears.kind(reduce(or_, (job.kind for job in jobs))))
        current = self.gears.current
        if wish == current:
            self._better = 0
            return
        crowded = current is not None and bool(ready) and size > current.rows and not self._rows.free
        at_once = current is None or not self.running or crowded or not current.kind.serves(wish.kind)
        self._better += 1
        if at_once or self._better >= self.steady:
            self._shift(wish)

    def _shift(self, gear: Gear) -> None:
        self._better = 0
        if self.gears.rows is not None and self.gears.current is not None:
            for arrival in self._rows.drain():
                self._deliver(arrival, self.gears.current)
        self.gears.shift(gear)

    def _read(self) -> None:
        """Fill the free lanes, and read one chunk, so that whoever comes or goes meanwhile is heard before the next."""
        for lane in self.lanes:
            if not lane.jobs and self.waiting:
                lane.begin(self.waiting.take(lane.width), self.prefixes.find, next(self._begun))
                self._finished(lane)
        if (chosen := next_lane(self.lanes)) is not None:
            chosen.advance()
            self._finished(chosen)

    def _finished(self, lane: Lane) -> None:
        """What comes of a lane whose prompts have been read, if they have."""
        for row, job in lane.ready.items():
            self.prefixes.keep(lane, row, job)
            if not job.request.new_tokens:
                lane.drop(job)
                job.end("length")

    def _deliver(self, arrival: Arrival, gear: Gear) -> None:
        self.on_step(arrival, gear)
        for row, report in arrival.reports.items():
            job = self.running[report.ticket]
            try:
                job.take(report, None if arrival.logits is None else arrival.logits[row])
            except Exception as error:
                job.fail(error)
            if report.done or job.reason:
                self._rows.evict([row] if not report.done else [])
                del self.running[report.ticket]
                job.end(job.reason)
            else:
                job.tell()


def run(scheduler: Scheduler, jobs: Iterable[Job]) -> None:
    """Serve `jobs` until all have ended."""
    for job in jobs:
        scheduler.submit(job)
    while not scheduler.idle:
        scheduler.tick()
