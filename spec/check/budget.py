"""The time budget of a check: seconds in total, a share for each part, and an alarm that ends a running task.

Work is divided into tasks. A task that is expected to take longer than the rest of its part's share is not begun; one
that takes longer than expected is interrupted by an alarm, where possible (in the main thread on Linux and macOS). An
exception in a task becomes its finding, and the next task follows. Knows nothing of what the tasks do.
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
    """Raised by the alarm. Not an `Exception`, so that libraries do not catch it."""


class NotHere(Exception):
    """Raised by a task that cannot run on this machine, with the reason."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to find out, named by the labels `what`. `seconds` is the expected duration. A `short` task runs even
    after the part's time is used up: timing what was made until then, or reporting why something is missing."""

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
        """Begin a part, which may take `share` of the remaining time."""
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
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3), 1.0)  # and again: the first may be swallowed
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def run_tasks(tasks: Iterable[Task], clock: Clock) -> Iterator[Finding]:
    """Run the tasks of a part one by one while there is time; yields their findings. An exception in the generator
    `tasks` itself ends the part and is a finding too."""
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
    """Kill processes that an interrupted compilation leaves running, as they would slow down later measurements."""
    if (workers := sys.modules.get("torch._inductor.async_compile")) is not None:
        workers.shutdown_compile_workers()
    for process in set(psutil.Process().children(recursive=True)) - before:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def single(find: Callable[..., Finding], *arguments) -> Callable[[], list[Finding]]:
    """The `work` of a task whose function `find(*arguments)` returns a single finding."""
    return lambda: [find(*arguments)]


def absent(what: dict, reason: str) -> Task:
    """A task whose finding is that `what` is not here, for `reason`."""

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


def _failure(labels: dict, error: Exception) -> Finding:
    said = _first_line(error)
    return Finding(labels, FAILS, said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
