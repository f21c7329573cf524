"""The budget of a check, and what is kept when it is interrupted."""

import json
import os
import signal
import time

import pytest
import torch
from paceline.spec import cli
from paceline.spec.check.budget import Clock, NotHere, OutOfTime, Task, run_tasks
from paceline.spec.check.record import FAILS, HOLDS, NOT_HERE, Finding

from support.checks import parts, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_sigterm_keeps_what_was_found(folder, tmp_path, monkeypatch, short):
    end = lambda self: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr("paceline.spec.check.steps.Steps._transformers", end)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run(folder, tmp_path)
    check = json.loads((tmp_path / "check.json").read_text())
    assert ended.value.code == 143 and check["interrupted"] and parts(check)["lossless"]["verdict"] == HOLDS
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_between_tasks_is_a_finding():
    def tasks():
        yield Task({"n": 0}, lambda: [Finding({"n": 0})])
        raise RuntimeError("in between")

    first, second = run_tasks(tasks(), Clock(10, time.perf_counter()))
    assert first.verdict == HOLDS and second.verdict == FAILS and "in between" in second.reason


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_found(folder, tmp_path, monkeypatch, short, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("paceline.spec.check.steps.Steps._transformers", interrupted)
    code, check = run(folder, tmp_path)
    assert code == 130 and check["interrupted"] and "stopped" in capsys.readouterr().err
    found = parts(check)
    assert found["lossless"]["verdict"] == HOLDS and found["steps"]["findings"] and not found["training"]["findings"]


@pytest.mark.parametrize("budget", ["0", "-3", "nan", "soon", "1e300"])
def test_a_budget_is_a_number_of_seconds(budget, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "--budget", budget])
    assert ended.value.code == 2 and "not a number of seconds" in capsys.readouterr().err


def test_a_budget_is_kept_and_every_outcome_recorded():
    def endless():
        while True:
            time.sleep(0.01)

    def absent():
        raise NotHere("no such thing here")

    def raising(error):
        def work():
            raise error

        return work

    clock = Clock(0.5, time.perf_counter())
    clock.begin(1.0)
    tasks = [
        Task({"n": 0}, lambda: [Finding({"n": 0})]),
        Task({"n": 1}, absent),
        Task({"n": 2}, raising(ValueError("a sentence"))),
        Task({"n": 3}, raising(KeyError("x"))),
        Task({"n": 4}, raising(torch.OutOfMemoryError("12 GB"))),
        Task({"n": 5}, lambda: [Finding({"n": 5})], seconds=1000.0),
        Task({"n": 6}, endless),
        Task({"n": 7}, lambda: [Finding({"n": 7})]),
        Task({"n": 8}, lambda: [Finding({"n": 8})], short=True),
    ]
    found = list(run_tasks(tasks, clock))
    assert [f.verdict for f in found] == [HOLDS, NOT_HERE, FAILS, FAILS, *[NOT_HERE] * 4, HOLDS]
    reasons = ["no such thing here", "a sentence", "KeyError: 'x'", "out of memory (12 GB)", "takes about 1000 s",
               "ran out of the part's share", "is used up"]  # fmt: skip
    for finding, words in zip(found[1:], reasons):
        assert words in finding.reason
    assert issubclass(OutOfTime, BaseException) and not issubclass(OutOfTime, Exception)


def test_shares_are_of_what_is_left():
    clock = Clock(100, time.perf_counter() - 20)
    clock.begin(0.25)
    assert clock.left == pytest.approx(20, abs=0.5)
    clock.begin(1.0)
    assert clock.left == pytest.approx(80, abs=0.5)
