"""The thread of the scheduler: when it counts as stuck, and how a server ends that has a stuck one."""

import threading
import time
from types import SimpleNamespace

import pytest
from paceline.spec.serve import command, worker
from paceline.spec.serve.worker import TURN, Worker


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


class Engine:
    """A scheduler whose turns end when they are let go on."""

    def __init__(self):
        self.idle, self.reached, self.go = True, threading.Semaphore(0), threading.Semaphore(0)
        self.gears = SimpleNamespace(close=lambda: None)
        self.waiting, self.in_lanes, self.running = [], [], {}

    def submit(self, job):
        self.idle = False
        self.stop()

    def tick(self):
        self.stop()
        self.idle = True

    def stop(self):
        self.reached.release()
        assert self.go.acquire(timeout=20)


def test_the_clock_runs_while_it_works_and_stands_while_it_is_idle(clock):
    engine = Engine()
    made = Worker(engine)
    made.start()
    assert not made.stuck
    for _ in range(2):
        clock[0] += 10 * TURN  # idle
        assert not made.stuck
        made.submit(None)
        for _ in range(2):  # it hears of the job, and runs a step
            assert engine.reached.acquire(timeout=20) and not made.stuck
            clock[0] += TURN
            assert not made.stuck
            clock[0] += 1
            assert made.stuck
            engine.go.release()
        for _ in range(20_000):  # until the thread has seen that there is nothing left
            if not made.stuck:
                break
            time.sleep(0.001)
        assert not made.stuck
    assert made.close(20) and not made.stuck and made.failure is None


def test_a_server_does_not_wait_for_a_stuck_engine(monkeypatch, capsys):
    engine, codes = Engine(), []
    made = Worker(engine)
    made.start()
    made.submit(None)
    assert engine.reached.acquire(timeout=20)
    monkeypatch.setattr(command.os, "_exit", codes.append)
    monkeypatch.setattr(command, "CLOSING", 0.01)
    command._end(made)
    assert codes == [1] and "has not ended its turn within 0.01 s" in capsys.readouterr().err
    for _ in range(3):
        engine.go.release()
    command._end(made) if made.close(20) else pytest.fail("it did not end")
    assert codes == [1]
