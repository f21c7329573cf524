"""Requests of whatever kind, submitted, cancelled and served in whatever order: what holds after each turn."""

import random

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.serve.job import Phase
from paceline.spec.serve.many import make_job
from paceline.spec.tree import TreeShape
from serve.playing import ROOM, letters, pool, scheduler_of, toy

MODEL, TOKENIZER = toy(), letters()
SHAPES = TreeShape.parse("2x1"), TreeShape.chain(0)


class Serving(RuleBasedStateMachine):
    @initialize(rows=st.integers(1, 4), lanes=st.integers(1, 2))
    def begin(self, rows, lanes):
        plan = lambda live: SHAPES[live > 2]  # noqa: E731
        self.scheduler = scheduler_of(MODEL, NgramDrafter(), plan, rows=rows, lanes=lanes)
        self.jobs, self.ended, self.truths = [], [], {}

    @rule(which=st.integers(0, 10_000), first=st.booleans())
    def submit(self, which, first):
        asked, truth = random.Random(which).choice(pool())
        job = make_job(MODEL, TOKENIZER, asked, lambda job: self.ended.append(job) if job.reason else None)
        self.truths[id(job)] = truth
        self.jobs.append(job)
        self.scheduler.submit(job, first)

    @precondition(lambda self: self.jobs)
    @rule(which=st.integers(0, 10_000))
    def cancel(self, which):
        self.scheduler.cancel(self.jobs[which % len(self.jobs)])

    @rule(turns=st.integers(1, 6))
    def serve(self, turns):
        with torch.no_grad():
            for _ in range(turns):
                self.scheduler.tick()

    @invariant()
    def every_job_is_in_one_place(self):
        scheduler = self.scheduler
        waiting, reading, running = [*scheduler.waiting], scheduler.in_lanes, [*scheduler.running.values()]
        places = [*map(id, waiting), *map(id, reading), *map(id, running), *map(id, self.ended)]
        assert sorted(places) == sorted(map(id, self.jobs)), "one place, and one ending"
        for jobs, phase in ((waiting, "waiting"), (reading, "reading"), (running, "running"), (self.ended, "ended")):
            assert all(job.phase == phase for job in jobs)

    @invariant()
    def rows_are_those_of_running_jobs(self):
        rows = self.scheduler.gears.rows
        if rows is not None:
            tickets = [ticket for ticket in rows.tickets if ticket]
            assert sorted(tickets) == sorted(self.scheduler.running) and len(rows.tickets) <= self.scheduler.gears.most
            assert int(rows.engine.state.lengths.max()) <= ROOM

    @invariant()
    def tokens_are_a_beginning_of_the_text(self):
        for job in self.jobs:
            tokens, text, reason = self.truths[id(job)]
            assert job.tokens == tokens[: len(job.tokens)]
            if job.phase is Phase.ENDED and job.reason != "abort":
                assert (job.tokens, job.text, job.reason) == (tokens, text, reason)

    def teardown(self):
        with torch.no_grad():
            for _ in range(600):
                if self.scheduler.idle:
                    break
                self.scheduler.tick()
        assert self.scheduler.idle and not self.scheduler.live
        self.every_job_is_in_one_place()
        self.scheduler.gears.close()


TestServing = Serving.TestCase
TestServing.settings = settings(
    max_examples=8, stateful_step_count=20, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
