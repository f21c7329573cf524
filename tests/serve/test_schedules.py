"""Whatever the traffic, each request gets the text that it would get alone.

PACELINE_SCHEDULES=10000 pytest tests/serve/test_schedules.py -m "slow or not slow" -k all_of_them
"""

import os
import random

import paceline
import pytest
import torch
from paceline.drafters.beside import Beside
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.eagle.drafter import EagleDrafter
from paceline.drafters.medusa import MedusaDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines.executors import Eager
from paceline.spec.kernels import native
from paceline.spec.noise import stream_key
from paceline.spec.proposal import NoDrafter
from paceline.spec.rows import Arrival, Rows
from paceline.spec.serve.gears import Gears
from paceline.spec.serve.many import make_job
from paceline.spec.serve.prefixes import KeptPrefixes
from paceline.spec.serve.row_sampler import EVERY, GREEDY, KEPT_KINDS, KINDS
from paceline.spec.serve.scheduler import Scheduler
from paceline.spec.state import DecodeState
from paceline.spec.target.cache import SlotCache
from paceline.spec.target.selftest import attach
from paceline.spec.tree import TreeShape
from serve.playing import Play, alone, letters, pool, scheduler_of, toy

from support.models import eagle_copy, fitted_heads, noisy_copy

SOME, MANY = 8, int(os.environ.get("PACELINE_SCHEDULES", "100"))
BOTH = "2x1+chain:2"


@pytest.fixture(scope="module")
def drafters(model):
    eagle = EagleDrafter(eagle_copy(model))
    return {
        "none": (NoDrafter(), "chain:0"),
        "ngram": (NgramDrafter(), "2x1"),
        "draft": (ModelDrafter(noisy_copy(model)), "2x2x1"),
        "hydra": (MedusaDrafter(fitted_heads(model, "hydra", steps=20)), "3x2x1"),
        "eagle": (eagle, "2x2"),
        "eagle+ngram": (Beside(eagle, NgramDrafter()), BOTH),
    }


def changing(shape):
    """A tree for few rows and none for many, as a planner has it."""
    shapes = TreeShape.parse(shape), TreeShape.chain(0)
    return lambda rows: shapes[rows > 2]


def plays(model, drafters, seeds):
    """One scheduler serves a few schedules, one after the other, as a server does."""
    for seed in seeds:
        draw = random.Random(seed)
        drafter, shape = drafters[draw.choice(list(drafters))]
        plan = changing(shape) if draw.random() < 0.4 else shape
        sizes = dict(rows=draw.choice((1, 3, 4)), chunk=draw.choice((2, 4, 16)), lanes=draw.choice((1, 2)))
        if draw.random() < 0.6:
            sizes["prefixes"] = KeptPrefixes(model, drafter, sizes["chunk"], megabytes=draw.choice((0.01, 1)))
        scheduler = scheduler_of(model, drafter, plan, **sizes)
        for part in range(2):
            yield Play(model, scheduler, 10 * seed + part)
        scheduler.gears.close()


def test_the_reference_is_generate(model):
    """Where `generate` has the settings, the slow reference gives its text."""
    compared = 0
    for asked, (tokens, _, _) in pool():
        if asked.logit_bias or asked.presence_penalty or asked.frequency_penalty or asked.stop or asked.choice:
            continue
        options = dict(do_sample=False)
        if asked.temperature:
            options = {name: getattr(asked, name) for name in ("temperature", "top_k", "top_p", "min_p")}
            options |= dict(do_sample=True, min_p=asked.min_p or None)
        ends = list(asked.end_ids) if asked.end_ids is not None else model.generation_config.eos_token_id
        out = paceline.generate(
            model, torch.tensor([asked.prompt]), seed=[asked.seed], max_new_tokens=asked.max_new_tokens, pad_token_id=0,
            attention_mask=torch.ones(1, len(asked.prompt), dtype=torch.long), eos_token_id=ends or None,
            repetition_penalty=asked.repetition_penalty, **options,
        )  # fmt: skip
        assert out[0, len(asked.prompt) :].tolist() == tokens
        compared += 1
    assert compared >= 5
    reasons = [reason for _, (_, _, reason) in pool()]
    assert {"stop", "length"} <= set(reasons) and alone(model, pool()[0][0], letters()) == pool()[0][1]


def test_every_request_gets_its_own_text(model, drafters):
    for play in plays(model, drafters, range(SOME)):
        assert play.run().faults() == []


@pytest.mark.slow
def test_every_request_gets_its_own_text_in_all_of_them(model, drafters):
    for play in plays(model, drafters, range(1000, 1000 + MANY // 2)):
        assert play.run().faults() == [], play


def test_reports_may_come_late(model, drafters, monkeypatch):
    """As on a GPU, where the host is a step behind."""
    monkeypatch.setattr(Eager, "lag", 1)
    for play in plays(model, drafters, range(SOME, SOME + 8)):
        assert play.run().faults() == []


# Planted faults: each must be found by the schedules that pass without it.


def no_ticket_check(patch):
    def read(self, readout):
        reports = {row: report for row, report in enumerate(readout.reports()) if self.tickets[row]}
        for row, report in reports.items():
            object.__setattr__(report, "ticket", self.tickets[row])
            if report.done:
                self.tickets[row] = 0
        return Arrival(readout.number, reports, readout.watch, readout.logits, readout.scores)

    patch.setattr(Rows, "_read", read)


def noise_by_row(patch):
    admit = DecodeState.admit

    def keyed(self, rows, requests, tickets):
        admit(self, rows, requests, tickets)
        self.keys[rows] = torch.where(self.keys[rows] < 0, -1, torch.tensor([stream_key(int(row)) for row in rows]))

    patch.setattr(DecodeState, "admit", keyed)


def caught_up_never(patch):
    patch.setattr(Rows, "catch_up", lambda self, rows: None)


@pytest.mark.parametrize("fault", [no_ticket_check, noise_by_row])
def test_planted_faults_are_found(model, drafters, fault, monkeypatch):
    monkeypatch.setattr(Eager, "lag", 1)
    fault(monkeypatch)

    def faulty(play):
        try:
            return play.run().faults() != []
        except (AssertionError, KeyError, ValueError):
            return True

    assert any(faulty(play) for play in plays(model, drafters, range(SOME)))


def broken_token(model):
    """A token that no text of the pool has gets an embedding of NaN; returns it."""
    used = {token for asked, (tokens, _, _) in pool() for token in [*asked.prompt, *tokens]}
    token = next(token for token in range(61) if token not in used)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    return token


@pytest.mark.parametrize("cleared", [True, False])
def test_a_row_of_nan_ends_alone(drafters, monkeypatch, cleared):
    """It ends with an error; who has its row, or its lane, after it notices nothing. Where slots are not cleared, all
    who come after it in its lane fail too."""
    monkeypatch.setattr(native, "can_attend", lambda *tensors: False)  # it looks at no slot behind a text
    model = toy()
    attach(model)
    token = broken_token(model)
    if not cleared:
        monkeypatch.setattr(SlotCache, "clear", lambda self, rows=None: None)
    scheduler = scheduler_of(model, NgramDrafter(), "2x1", rows=2, lanes=1)
    bad = [make_job(model, None, dict(prompt=[*[31] * 20, token, 32], max_new_tokens=5)) for _ in range(2)]
    for job in bad:
        scheduler.submit(job)
    faults = [Play(model, scheduler, seed).run().faults() for seed in range(4)]
    assert [job.reason for job in bad] == ["error", "error"] and "NaN" in bad[0].problem and bad[0].tokens == []
    assert all(fault == [] for fault in faults) is cleared


# Nothing else matters to a text.


def test_poison_in_free_rows_and_behind_texts_changes_nothing(model, drafters, monkeypatch):
    """After every turn whatever no text owns is filled with 1e4."""
    drafter, shape = drafters["draft"]
    tick = Scheduler.tick

    def poisoned(self):
        tick(self)
        for lane in self.lanes:
            if not lane.jobs:
                fill(lane.engine, range(lane.width))
        if self.gears.rows is not None:
            fill(self.gears.rows.engine, self.gears.rows.free)

    monkeypatch.setattr(Scheduler, "tick", poisoned)
    for seed in range(4):
        assert Play(model, scheduler_of(model, drafter, shape, rows=3), seed).run().faults() == []


def fill(engine, rows):
    for slots in (engine.target, engine.session.slots):
        for layer in slots.cache.layers:
            if layer.is_initialized:
                for buffer in layer.buffers:
                    layer.by_row(buffer)[list(rows)] = 1e4


def test_a_drafter_that_did_not_draft_for_a_while_catches_up(model, drafters, monkeypatch):
    """Drafts behind a stretch without a tree are those of a text that was drafted behind all along."""

    def accepted(*shapes):
        turns = iter([*shapes, *[shapes[-1]] * 99])
        plan = lambda rows: TreeShape.parse(next(turns))  # noqa: E731
        scheduler = scheduler_of(model, drafters[name][0], plan, rows=1, lanes=1, steady=1)
        job = make_job(model, None, dict(prompt=[35, 40, 52, 35], max_new_tokens=40, end_ids=()))
        scheduler.submit(job)
        brought = []
        with torch.no_grad():
            while not scheduler.idle:
                before = len(job.tokens)
                scheduler.tick()
                brought.append((before, len(job.tokens) - before))
        return {start: count for start, count in brought if count}, job.tokens

    for name in ("draft", "eagle"):
        tree = "chain:3"
        steady, text = accepted(tree)
        plain = ["chain:3", *["chain:0"] * 8, tree]
        late, same = accepted(*plain)
        assert text == same
        shared = [start for start in late if start in steady and start > 12]
        assert shared and all(late[start] == steady[start] for start in shared), name
        with monkeypatch.context() as patch:
            caught_up_never(patch)
            worse, same = accepted(*plain)
        assert text == same and len(worse) > len(late), name


def test_rows_go_to_wider_and_narrower_batches(model):
    """A burst takes one shift, and the last of it goes on in a batch of one."""
    scheduler, widths = scheduler_of(model, NoDrafter(), "chain:0", rows=6, lanes=2), []
    shift = Gears.shift

    def watched(self, gear):
        widths.append(gear.rows)
        shift(self, gear)

    scheduler.gears.shift = watched.__get__(scheduler.gears)
    asked = [dict(prompt=[31, 40 + number], max_new_tokens=3 + 25 * (number == 0), end_ids=()) for number in range(5)]
    jobs = [make_job(model, None, request) for request in asked]
    with torch.no_grad():
        for job in jobs:
            scheduler.submit(job)
        while not scheduler.idle:
            scheduler.tick()
    assert widths == [6, 1] or widths == [6, 2, 1]
    assert [len(job.tokens) for job in jobs] == [28, 3, 3, 3, 3]


def test_no_request_can_ask_for_a_step_of_its_own(model):
    """However its fields are set, the steps are of the few kinds that a server has."""
    scheduler, made = scheduler_of(model, NoDrafter(), "chain:0", rows=1), []
    shift = Gears.shift

    def watched(self, gear):
        made.append(self.spec(gear))
        shift(self, gear)

    scheduler.gears.shift = watched.__get__(scheduler.gears)
    fields = [{}, dict(top_k=1), dict(top_k=900), dict(top_p=0.5), dict(min_p=0.1), dict(logprobs=1), dict(seed=9)]
    fields += [
        dict(logit_bias={3: 1.0}),
        dict(presence_penalty=1.0),
        dict(prediction=[31] * 9),
        dict(top_k=70, top_p=0.9),
    ]
    with torch.no_grad():
        for temperature in (0.0, 1.0):
            for more in fields:
                asked = dict(prompt=[31, 40], max_new_tokens=2, temperature=temperature, **more)
                scheduler.submit(make_job(model, None, asked))
                while not scheduler.idle:
                    scheduler.tick()
    assert len({*made}) == len(KINDS) and (GREEDY, *KEPT_KINDS, EVERY) == KINDS
    assert all(later.serves(kind) for number, later in enumerate(KINDS) for kind in KINDS[:number])
