"""The scheduler under the rules of captured steps: rows are inserted, aborted and moved, and nothing but the reports of
steps is read on the host."""

import traceback
from contextlib import contextmanager

import pytest
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec import rows
from paceline.spec.engines import runs
from paceline.spec.serve.gears import Gears
from paceline.spec.serve.lanes import Lane
from paceline.spec.serve.row_sampler import KEPT_KINDS
from paceline.spec.serve.scheduler import Scheduler
from paceline.spec.tree import TreeShape
from serve.playing import CHUNK, ROOM, Play
from torch.utils._python_dispatch import TorchDispatchMode

from support.models import noisy_copy
from support.tape import HOST_READS, host_readers_noted, tape_executor

SHAPES = TreeShape.parse("2x1"), TreeShape.chain(0)


class Watch(TorchDispatchMode):
    """Where the host reads."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def append(self, what):
        names = [frame.name for frame in traceback.extract_stack() if "/spec/" in frame.filename]
        if "shift" not in names:  # before which all steps have been read
            self.seen.append((what, names[-1]))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.split(".")[0] in HOST_READS:
            self.append(function.__name__)
        return function(*args, **(kwargs or {}))


@contextmanager
def watched():
    watch = Watch()
    with host_readers_noted(watch), watch:
        yield watch.seen


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_come_go_and_move_and_only_reports_are_read(model, monkeypatch, lag):
    drafter, shifts, reads = (NgramDrafter(), ModelDrafter(noisy_copy(model)))[lag], [], []
    with tape_executor(monkeypatch) as tapes:
        monkeypatch.setattr(runs.EXECUTORS["tape"], "lag", lag, raising=False)
        runs.keep(model, 16)
        gears = Gears(model, drafter, ROOM, 3, CHUNK, "tape", lasting=True, kinds=KEPT_KINDS)
        lanes = [Lane(gears.lane_engine(1, SHAPES[0]), CHUNK) for _ in range(2)]
        scheduler = Scheduler(gears, lanes, lambda live: SHAPES[live > 2], steady=2)
        tick, shift = scheduler.tick, gears.shift

        def turn():
            with watched() as seen:
                tick()
            reads.extend(seen)

        def moved(gear):
            shifts.append(gear)
            shift(gear)

        scheduler.tick, gears.shift = turn, moved
        plays = [Play(model, scheduler, 100 + seed).run() for seed in range(4)]
        gears.close()
    assert [play.faults() for play in plays] == [[]] * len(plays)
    assert any(job.reason == "abort" and job.tokens for play in plays for job in play.jobs)
    assert len(shifts) > len(tapes) and sum(tape.replays for tape in tapes) > 10
    assert [tape.tape.offences for tape in tapes if tape.tape.offences] == []
    assert {name for _, name in reads} == {rows.unpack_report.__name__}
    runs.reset(model)
