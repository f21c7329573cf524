"""Who waits for whom: prompts, and texts whose prompts have been read."""

import pytest
import torch
from paceline.spec.proposal import NoDrafter
from paceline.spec.serve.lanes import Lane
from paceline.spec.serve.many import make_job
from serve.playing import CHUNK, alone, scheduler_of


@pytest.fixture
def served(model):
    """Makes jobs that are submitted, and takes turns."""

    class Served:
        def __init__(self, **sizes):
            self.scheduler, self.ended = scheduler_of(model, NoDrafter(), "chain:0", **sizes), []

        def submit(self, length, new_tokens, tenant=""):
            asked = dict(prompt=[31] * length, max_new_tokens=new_tokens, end_ids=(), tenant=tenant)
            job = make_job(model, None, asked, lambda job: self.ended.append(job) if job.reason else None)
            self.scheduler.submit(job)
            return job

        @torch.no_grad()
        def serve(self):
            for _ in range(200):
                if self.scheduler.idle:
                    return self.ended
                self.scheduler.tick()
            raise AssertionError("it does not end")

    return Served


def test_whose_prompt_was_read_first_enters_the_batch_first(served):
    """With one row and two lanes, of which one is always filled again before the row is free."""
    serving = served(rows=1)
    jobs = [serving.submit(3, 4) for _ in range(8)]
    assert serving.serve() == jobs


def test_a_tenant_with_many_texts_keeps_no_other_waiting(served):
    serving = served(rows=1)
    many = [serving.submit(3, 4, "a") for _ in range(8)]
    one = serving.submit(3, 4, "b")
    assert serving.serve().index(one) <= 2 and len(many) == 8


@torch.no_grad()
def test_a_turn_reads_one_chunk_also_where_nothing_is_decoded(model, served, monkeypatch):
    """So that a cancellation is heard, and a short prompt passes."""
    read, advance = [], Lane.advance
    monkeypatch.setattr(Lane, "advance", lambda lane: (read.append(lane), advance(lane)))
    serving = served(rows=2)
    long = serving.submit(9 * CHUNK + 1, 2)
    for turn in range(3):
        serving.scheduler.tick()
        assert len(read) == turn + 1
    short = serving.submit(3, 2)
    for _ in range(4):
        serving.scheduler.tick()
    assert short.tokens == alone(model, short.asked)[0] and long.phase == "reading" and len(read) == 4 + 3
    serving.scheduler.cancel(long)
    assert serving.scheduler.idle and len(read) == 7
