"""What SIGINT and SIGTERM mean to a run: the first asks it to stop, a second acts as usual."""

import contextlib
import signal
from collections.abc import Callable

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a run is to stop: the signal that this process `got`, and the one that all processes have `heard` of."""

    def __init__(self):
        self.got: int | None = None
        self.heard: int | None = None

    def heed(self, number: int) -> None:
        self.got = number


@contextlib.contextmanager
def first_signal(heed: Callable[[int], None]):
    """Within it the first of the two signals calls `heed` with its number, and nothing else happens."""
    usual = {number: signal.getsignal(number) for number in STOPPING}

    def restore():
        for number, handler in usual.items():
            signal.signal(number, handler)

    def first(number, frame):
        restore()
        heed(number)

    for number in STOPPING:
        signal.signal(number, first)
    try:
        yield
    finally:
        restore()
