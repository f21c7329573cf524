"""SIGINT and SIGTERM during a run: the first asks it to stop, a second has its usual effect."""

import contextlib
import signal
from collections.abc import Callable

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a run is to stop. `got` is the signal that this process received, `heard` what all processes know."""

    def __init__(self):
        self.got: int | None = None
        self.heard: int | None = None

    def heed(self, number: int) -> None:
        self.got = number


@contextlib.contextmanager
def first_signal(heed: Callable[[int], None]):
    """Within, the first SIGINT or SIGTERM only calls `heed` with its number; then the former handlers are restored."""
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
