"""The thread that owns the scheduler, and how others hand it jobs and learn what became of them.

Jobs come in through a queue. Out go `Progress` records, one for each step that brought tokens; a reader who is slow
gets the latest one, which has all tokens so far, and holds nobody up. Knows nothing of HTTP.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from .job import Job, Phase
from .scheduler import Scheduler

T = TypeVar("T")

TURN = 600.0  # seconds in which a chunk is read and a step is run, also of the slowest model


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is: its text, without an end that may become a stop string, and its number of tokens."""

    text: str
    tokens: int
    reason: str  # "" until it has ended


class Reader:
    """A job as an asyncio task sees it."""

    def __init__(self, job: Job, loop: asyncio.AbstractEventLoop):
        self.job, self.loop, self.progress = job, loop, Progress("", 0, "")
        self.begun, self.changed = time.monotonic(), asyncio.Event()
        self.read = self.first_token = self.ended = 0.0  # when that was, 0 until then
        job.listener = self._listen

    def _listen(self, job: Job) -> None:
        """Called by the worker's thread."""
        progress, now = Progress(job.shown, len(job.tokens), job.reason), time.monotonic()
        self.read = self.read or now
        self.first_token = self.first_token or (now if job.tokens else 0.0)
        self.ended = now if job.reason else 0.0
        with suppress(RuntimeError):  # of a loop that is closed: nobody reads any more
            self.loop.call_soon_threadsafe(self._put, progress)

    def _put(self, progress: Progress) -> None:
        self.progress = progress
        self.changed.set()

    async def more(self, seconds: float) -> Progress | None:
        """The progress since the last call; None where there is none within `seconds`."""
        try:
            await asyncio.wait_for(self.changed.wait(), seconds)
        except TimeoutError:
            return None
        self.changed.clear()
        return self.progress


def in_passing_thread(function: Callable[[], T]) -> T:
    """What `function` returns or raises, from a thread that ends with it.

    OpenMP keeps a team of threads for each thread that has computed, and once there are more of them than processors
    they sleep between two loops, which makes a step of a small model last half as long again. So whoever starts a
    `Worker` leaves all computing to it, and to threads whose teams end with them."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="paceline-preparing", daemon=True).start()
    return future.result()


class Worker:
    """Runs the turns of `scheduler` in a thread of its own while there are jobs. `failure` is what ended it, if any.

    A clock runs while it works, and stands while it waits for jobs, so that it can be told whether it is stuck."""

    def __init__(self, scheduler: Scheduler, before: Callable[[], None] = lambda: None):
        self.scheduler, self.before = scheduler, before
        self.failure: BaseException | None = None
        self._due: float | None = None  # when what it does now has to be done; None while it does nothing
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="paceline", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._inbox.put(lambda: self.scheduler.submit(job))

    def cancel(self, job: Job) -> None:
        if job.phase is not Phase.ENDED:
            self._inbox.put(lambda: self.scheduler.cancel(job))

    def close(self, seconds: float) -> bool:
        """End the thread after its turn, with all jobs where they are; whether it has ended within `seconds`."""
        self._inbox.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self.failure is None and self._thread.is_alive()

    @property
    def stuck(self) -> bool:
        """Whether a turn takes longer than `TURN` seconds."""
        due = self._due
        return due is not None and time.monotonic() > due

    def _allow(self, seconds: float) -> None:
        self._due = time.monotonic() + seconds

    def _run(self) -> None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.before()
                while self._take():
                    self._allow(TURN)
                    self.scheduler.tick()
        except BaseException as error:
            self.failure = error
            self._end_all(f"the engine has failed ({type(error).__name__}: {error})")
        finally:
            self._due = None
            self.scheduler.gears.close()

    def _take(self) -> bool:
        """Do what came in meanwhile; wait for it where there is no job. False where it is to end."""
        while True:
            try:
                self._due = None
                message = self._inbox.get(block=self.scheduler.idle)
            except Empty:
                return True
            self._allow(TURN)
            if message is None:
                return False
            message()

    def _end_all(self, problem: str) -> None:
        """Tell all jobs, those in the inbox too, that nothing will come of them."""
        scheduler = self.scheduler
        while not self._inbox.empty():
            message = self._inbox.get()
            if message is not None:
                message()
        for job in [*scheduler.waiting, *scheduler.in_lanes, *scheduler.running.values()]:
            job.problem = problem
            job.end("error")
