"""Time for a check: a budget in seconds, shares of it for the parts, and a hard end for whatever is running.

Work is cut into tasks. A task that is known to take longer than what is left of its part's share is not begun; one that
turns out to is interrupted by an alarm, where the system has one (the main thread on Linux and macOS). What a task
raises becomes its finding, and the next task goes on. Knows nothing of what the tasks do.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import psutil
import torch

from .record import FAILS, NOT_HERE, Finding


class OutOfTime(BaseException):
    """The alarm. No `Exception`, so that no library takes it for an error of its own."""


class NotHere(Exception):
    """Raised by a task that cannot run on this machine, with the reason."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to find out. `seconds` is what it is known to take; what is `short` runs after the part's end too, such
    as timing what was made until then, or saying why something is not here."""

    what: dict
    work: Callable[[], list[Finding]]
    seconds: float = 0.0
    short: bool = False


class Clock:
    """Counts down `seconds` from `started` (`time.perf_counter()`); `end` is where the running part must end."""

    def __init__(self, seconds: float, started: float):
        self.seconds, self.started = seconds, started
        self.end = started + seconds

    def begin(self, share: float) -> None:
        """The part that begins now may take `share` of all time that is left."""
        now = time.perf_counter()
        self.end = now + share * max(self.started + self.seconds - now, 0.0)

    @property
    def left(self) -> float:
        """Seconds that are left to the running part."""
        return self.end - time.perf_counter()

    @contextlib.contextmanager
    def alarm(self) -> Iterator[None]:
        """Raise `OutOfTime` in the block once no time is left."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
            yield
            return

        def ring(number, frame):
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3), 1.0)  # and again: a first one can be swallowed
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def run_tasks(tasks: Iterable[Task], clock: Clock) -> Iterator[Finding]:
    """Run the tasks of a part one by one, each as far as time allows; yields what they find. An error between tasks
    ends the part and is a finding of its own."""
    tasks = iter(tasks)
    while True:
        try:
            task = next(tasks, None)
        except Exception as error:
            yield _failure({"what": "preparing this part"}, error)
            return
        if task is None:
            return
        yield from _run(task, clock)


def _run(task: Task, clock: Clock) -> list[Finding]:
    if task.short:
        return _outcome(task, task.work)
    if clock.left <= max(task.seconds, 0.0):
        reason = "the part's share of the budget is used up; give a larger --budget"
        if task.seconds and clock.left > 0:
            reason = f"takes about {task.seconds:.0f} s and {clock.left:.0f} s are left; give a larger --budget"
        return [Finding(task.what, NOT_HERE, reason)]
    running = set(psutil.Process().children(recursive=True))
    try:
        with clock.alarm():
            return _outcome(task, task.work)
    except OutOfTime:
        _stop_compiling(running)
        return [Finding(task.what, NOT_HERE, "ran out of the part's share of the budget; give a larger --budget")]


def _stop_compiling(before: set[psutil.Process]) -> None:
    """End what an interrupted compilation leaves running: it would slow down everything that is measured after it."""
    if (workers := sys.modules.get("torch._inductor.async_compile")) is not None:
        workers.shutdown_compile_workers()
    for process in set(psutil.Process().children(recursive=True)) - before:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def single(find: Callable[..., Finding], *arguments) -> Callable[[], list[Finding]]:
    """The work of a task that finds one thing."""
    return lambda: [find(*arguments)]


def absent(what: dict, reason: str) -> Task:
    """A task that finds nothing but the reason why."""

    def work() -> list[Finding]:
        raise NotHere(reason)

    return Task(what, work, short=True)


def _outcome(task: Task, work: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return work()
    except NotHere as reason:
        return [Finding(task.what, NOT_HERE, str(reason))]
    except (torch.OutOfMemoryError, MemoryError) as error:
        return [Finding(task.what, NOT_HERE, f"out of memory ({_first_line(error)})")]
    except Exception as error:  # whatever a model, a driver or a compiler raises is what was to be found out
        return [_failure(task.what, error)]


def _failure(what: dict, error: Exception) -> Finding:
    said = _first_line(error)
    return Finding(what, FAILS, said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
