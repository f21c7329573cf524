"""Requests enter and leave rows while others go on."""

import paceline
import pytest
import torch
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines import runs
from paceline.spec.engines.executors import Eager
from paceline.spec.noise import stream_key
from paceline.spec.rows import Rows
from paceline.spec.target.slots import SlotModel
from paceline.spec.tree import TreeShape

from support.engines import DRAFTERS, PROMPT, engine_of, request
from support.models import tiny_llama
from support.tape import TapeExecutor


def alone(model, asked):
    """The reference: `generate` on this text only."""
    ids, sampled = torch.tensor([asked.tokens]), asked.sampling.temperature != 1.0
    options = dict(do_sample=True, temperature=asked.sampling.temperature, top_k=0, top_p=0.9)
    options = options if sampled else dict(do_sample=False)
    seed = next(seed for seed in range(9) if stream_key(seed) == asked.key)
    out = paceline.generate(
        model, ids, torch.ones_like(ids), max_new_tokens=asked.new_tokens, seed=[seed],
        eos_token_id=list(asked.ends) or None, pad_token_id=0, **options,
    )  # fmt: skip
    return out[0, len(asked.tokens) :].tolist()


@pytest.mark.parametrize("lag", [None, 0, 1])
@pytest.mark.parametrize("name", DRAFTERS)
def test_requests_enter_and_leave_while_another_goes_on(name, lag, monkeypatch):
    """Two rows: one text goes on for forty tokens; beside it others end, are evicted, and follow one another, each
    with its own seed, temperature and ends of text. Eager, and by tape read at once or one step late."""
    model = tiny_llama(seed=3)
    drafter, shape = DRAFTERS[name](model)
    target = SlotModel(model, 2, 128, drafter.traits.taps)
    engine = engine_of(target, drafter, shape, temperature=0.7)
    monkeypatch.setattr(TapeExecutor, "lag", lag or 0)
    rows = Rows(Eager(engine) if lag is None else TapeExecutor(engine), chunk=4)
    free = alone(model, request(PROMPT[:4], 12, 4, 1.3))
    asked = {
        "long": request(PROMPT, 40, 1, 0.7),
        "short": request(PROMPT[:7], 5, 2, 0.4),
        "evicted": request(PROMPT[2:], 30, 3, 0.9),
        "ending": request(PROMPT[:4], 12, 4, 1.3, ends=(free[5], 60)),
        "last": request(PROMPT[5:6], 7, 5, 0.6),
    }
    waiting, names, texts, steps = list(asked), {}, {}, 0
    while waiting or rows.live:
        for row in rows.free if waiting else ():
            names[row] = waiting.pop(0)
            with torch.no_grad():
                rows.admit({row: asked[names[row]]})
            if not waiting:
                break
        with torch.no_grad():
            arrival, steps = rows.step(), steps + 1
        assert steps < 500
        for row in arrival.ended:
            texts[names[row]] = rows.text(row)[len(asked[names[row]].tokens) :]
        rows.evict([row for row in rows.live if names[row] == "evicted" and row in arrival.reports])
    assert "evicted" not in texts and asked.keys() - {"evicted"} == texts.keys()
    for one, text in texts.items():
        assert text == alone(model, asked[one]), one
    assert texts["ending"] == free[: free.index(free[5]) + 1]
    runs.reset(model)


@torch.no_grad()
def test_a_kept_engine_forgets_whose_its_rows_were(monkeypatch):
    """A later call's request is not ended by a report, read a step late, of the row's last one."""
    model, short, other = tiny_llama(seed=3), request(PROMPT[:6], 3, 1), request(PROMPT[2:8], 5, 2)
    monkeypatch.setattr(TapeExecutor, "lag", 1)
    executor = TapeExecutor(engine_of(SlotModel(model, 2, 64), NgramDrafter(), TreeShape.parse("2x2")))
    first = Rows(executor, 4)
    first.admit({0: short, 1: short})
    while first.live:
        first.step()
    rows = Rows(executor, 4)
    rows.admit({0: request(PROMPT, 20, 3)})
    rows.step()
    rows.admit({1: other})
    while 1 in rows.live:
        rows.step()
    assert rows.text(1)[len(other.tokens) :] == alone(model, other)


@torch.no_grad()
def test_steps_that_were_not_read_are_drained_before_rows_move(monkeypatch):
    model, asked = tiny_llama(seed=3), [request(PROMPT, 20, 1), request(PROMPT[:5], 4, 2), request(PROMPT[3:], 6, 3)]
    monkeypatch.setattr(TapeExecutor, "lag", 1)
    executor = TapeExecutor(engine_of(SlotModel(model, 3, 64), NgramDrafter(), TreeShape.parse("2x2")))
    rows, tokens = Rows(executor, 4), 0
    rows.admit(dict(enumerate(asked)))
    while len(rows.live) > 1:
        tokens += sum(report.committed for report in rows.step().reports.values())
    for arrival in rows.drain():
        tokens += sum(report.committed for report in arrival.reports.values())
    assert rows.live == [0]
    narrow = Eager(engine_of(SlotModel(model, 1, 64), NgramDrafter(), TreeShape.parse("2x2")))
    rows = rows.moved([0], narrow)
    while rows.live:
        tokens += sum(report.committed for report in rows.step().reports.values())
    assert rows.text(0)[len(PROMPT) :] == alone(model, asked[0]) and tokens == 20 + 4 + 6
