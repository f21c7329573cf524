"""The scheduler under the rules of captured steps: rows are inserted, aborted and moved, and nothing but the reports of
steps is read on the host."""

import traceback
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec import rows
from paceline.spec.engines import pool, runs
from paceline.spec.engines.pool import pool_of
from paceline.spec.serve.gears import Gears
from paceline.spec.serve.lanes import Lane
from paceline.spec.serve.many import make_job
from paceline.spec.serve.planner import measured
from paceline.spec.serve.row_sampler import DRAWN, EVERY, KEPT_KINDS
from paceline.spec.serve.scheduler import Scheduler, run
from paceline.spec.serve.text_request import TextRequest
from paceline.spec.tree import TreeShape
from serve.playing import CHUNK, ROOM, Play, alone
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
        gears = Gears(model, drafter, ROOM, 3, CHUNK, "tape", lasting=True, kinds=(DRAWN, EVERY))
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


@torch.no_grad()
def test_kept_steps_are_made_ahead(model, monkeypatch):
    """A text never waits for one; the steps of rare requests are eager."""
    shapes = TreeShape.chain(0), TreeShape.chain(2)
    with tape_executor(monkeypatch) as tapes:
        gears = Gears(model, NgramDrafter(), 40, 2, 8, "tape", lasting=True, kinds=KEPT_KINDS, rare=(EVERY,))
        pairs = [*product((1, 2), shapes)]
        gears.make(pairs)
        assert {run.spec.capacity for run in pool_of(model).runs} == {64}, "no more than the room, in whole 64s"
        measured(gears, pairs)
        scheduler = Scheduler(
            gears, [Lane(gears.lane_engine(1, shapes[0]), 8)], lambda rows: shapes[rows % 2], steady=1
        )
        cut = TextRequest(prompt=[33, 40, 35], top_p=0.8, seed=1, end_ids=())
        asked = [replace(cut, max_new_tokens=tokens, temperature=tokens / 9) for tokens in (2, 14)]
        asked += [replace(cut, max_new_tokens=5, temperature=0.0, presence_penalty=0.9)]
        jobs = [make_job(model, None, request) for request in asked]
        run(scheduler, jobs)
        gears.close()
    assert len(tapes) == 8 and gears.shifts > 1
    assert [job.tokens for job in jobs] == [alone(model, request)[0] for request in asked]
    runs.reset(model)


def test_steps_that_cannot_all_be_kept_are_refused(model, monkeypatch):
    """Else each would be made again and again, while texts wait."""
    monkeypatch.setattr(pool, "KEPT_SHARE", 0.0)
    with tape_executor(monkeypatch):
        gears = Gears(model, NgramDrafter(), 40, 2, 8, "tape", lasting=True, kinds=KEPT_KINDS)
        with pytest.raises(ValueError, match="the tape steps of up to 2 rows of 40 tokens take more memory than"):
            gears.make([(1, TreeShape.chain(0)), (2, TreeShape.chain(0))])
    runs.reset(model)
