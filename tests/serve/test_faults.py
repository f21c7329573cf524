"""What goes wrong with one text ends that text; what goes wrong with a step ends all."""

import gc
import json

import pytest
import torch
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.serve.job import TokenLogprobs
from paceline.spec.serve.many import make_job
from paceline.spec.serve.prefixes import KeptPrefixes
from paceline.spec.serve.running_text import RunningText
from paceline.spec.state import DecodeState
from paceline.spec.step import Engine
from paceline.spec.target.cache import SlotCache
from serve.playing import letters, pool, scheduler_of
from serve.served import CONTENTED, ask, listening, serving_of, truth

BAD = dict(prompt=[31, 40, 52, 31, 40, 52], max_new_tokens=9, end_ids=(), tenant="bad")


def fails_for(patch, owner, name, whose, kind=IndexError):
    """Let a function raise where `whose`, called with its arguments, says so."""
    plain = getattr(owner, name)

    def failing(*args, **kwargs):
        if whose(*args):
            raise kind("something\nis wrong")
        return plain(*args, **kwargs)

    patch.setattr(owner, name, failing)


FAULTS = {
    "a token": (RunningText, "put", lambda text, token: text.stops == ("?",) and len(text.tokens) == 2),
    "an end": (RunningText, "end", lambda text: text.stops == ("?",)),
    "a row": (DecodeState, "admit", lambda state, rows, requests, tickets: requests[0].tokens == BAD["prompt"]),
    "a prefix": (KeptPrefixes, "find", lambda kept, job: job.asked.tenant == "bad"),
    "log-probabilities": (TokenLogprobs, "of", lambda logits, token, count: count == 7),
    "a prompt's": (TokenLogprobs, "of", lambda logits, token, count: count == 6),
}


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS)
def test_one_texts_error_ends_that_text_only(model, monkeypatch, fault):
    owner, name, whose = FAULTS[fault]
    fails_for(monkeypatch, owner, name, whose)
    drafter, ended = NgramDrafter(), []
    prefixes = KeptPrefixes(model, drafter, 4)
    scheduler = scheduler_of(model, drafter, "2x1", rows=3, lanes=2, prefixes=prefixes)
    asked = dict(BAD, stop=("?",), logprobs=7, prompt_logprobs=6 if fault == "a prompt's" else None)
    if fault == "a prefix":
        asked["logprobs"] = None
    bad = make_job(model, letters(), asked, lambda job: ended.append(job) if job.reason else None)
    others = [(make_job(model, letters(), each), alone) for each, alone in pool()[:5]]
    for job, _ in others[:3]:
        scheduler.submit(job)
    scheduler.submit(bad)
    for job, _ in others[3:]:
        scheduler.submit(job)
    for _ in range(200):
        if not scheduler.idle:
            scheduler.tick()
    assert scheduler.idle and not scheduler.live and ended == [bad]
    assert bad.reason == "error" and bad.problem == "this text has failed (IndexError: something)"
    for job, alone in others:
        assert (job.tokens, job.text, job.reason) == alone


TEN = [31, 40, 52, 31, 40, 52, 33, 34, 35, 36]  # two whole chunks, and two tokens
ENGINES = {
    "a row's cache": (SlotCache, "copy_rows", lambda *args: True, RuntimeError),
    "a lane's cache": (SlotCache, "clear", lambda *args: True, RuntimeError),
    "a copy of a prefix": (Engine, "hold", lambda *args: True, RuntimeError),
    "memory": (TokenLogprobs, "of", lambda *args: True, torch.OutOfMemoryError),
    "the device": (DecodeState, "admit", lambda *args: True, torch.AcceleratorError),
    "the device, for a prefix": (KeptPrefixes, "find", lambda *args: True, torch.AcceleratorError),
}


@torch.no_grad()
@pytest.mark.parametrize("fault", ENGINES)
def test_an_engines_error_is_no_texts(model, monkeypatch, fault):
    """Else all texts would fail, one after the other, and the server would look well."""
    owner, name, whose, kind = ENGINES[fault]
    fails_for(monkeypatch, owner, name, whose, kind)
    drafter = NgramDrafter()
    scheduler = scheduler_of(model, drafter, "2x1", rows=3, lanes=2, prefixes=KeptPrefixes(model, drafter, 4))
    jobs = [make_job(model, letters(), dict(prompt=TEN, max_new_tokens=4, logprobs=2)) for _ in range(3)]
    for job in jobs:
        scheduler.submit(job)
    with pytest.raises(kind, match="something"):
        for _ in range(50):
            scheduler.tick()
    assert not any(job.reason for job in jobs)
    assert {*jobs} == {*scheduler.waiting, *scheduler.in_lanes, *scheduler.running.values()}, "all can be told"


def test_a_text_that_fails_is_told_in_a_sentence_and_the_server_goes_on(model, monkeypatch):
    fails_for(monkeypatch, RunningText, "put", lambda text, token: text.stops == ("?",))
    with listening(serving_of()) as address:
        status, said = ask(address, CONTENTED | dict(stop="?"))
        message = "this text has failed (IndexError: something)"
        assert status == 500 and json.loads(said)["error"]["message"] == message
        status, said = ask(address, CONTENTED | dict(stop="?", stream=True))
        assert status == 200 and message in said.decode() and said.endswith(b"data: [DONE]\n\n")
        status, said = ask(address, CONTENTED)
        assert status == 200 and json.loads(said)["choices"][0]["message"]["content"] == truth(model, "@IU", seed=3)[1]


def test_an_event_that_cannot_be_made_ends_its_stream(monkeypatch, caplog):
    from paceline.spec.serve.answers import Answer

    fails_for(monkeypatch, Answer, "more", lambda answer, index, progress: index == answer.body.get("seed") == 0)
    serving, jobs = serving_of(), []
    submit = serving.worker.submit
    monkeypatch.setattr(serving.worker, "submit", lambda job: (jobs.append(job), submit(job)))
    with listening(serving, turn_seconds=0.03) as address:
        asked = dict(stream=True, seed=0, n=2, max_tokens=40, ignore_eos=True)
        status, said = ask(address, CONTENTED | asked)
        assert status == 200 and "has failed to answer" in said.decode() and said.endswith(b"data: [DONE]\n\n")
        assert [job.reason for job in jobs] == ["abort", "length"], "nobody waits for the first"
        assert ask(address, CONTENTED)[0] == 200
    gc.collect()  # of tasks that nobody awaited, which would tell then
    assert "IndexError" in caplog.text and "something" not in caplog.text


@pytest.mark.parametrize("part, stream", [("whole", False), ("last", True), ("first", True)])
def test_what_fails_in_an_endpoint_is_told_and_not_what_was_asked(part, stream, monkeypatch, caplog, capsys):
    """uvicorn logs whatever an endpoint raises, and an error's message may have a prompt in it."""
    from paceline.spec.serve.answers import Answer

    fails_for(monkeypatch, Answer, part, lambda *arguments: True)
    with listening(serving_of()) as address:
        status, said = ask(address, CONTENTED | dict(stream=stream))
        assert (status, "has failed to answer" in said.decode()) == (200 if stream else 500, True)
        assert not stream or said.endswith(b"data: [DONE]\n\n")
        monkeypatch.undo()
        assert ask(address, CONTENTED)[0] == 200
    logged = caplog.text + "".join(capsys.readouterr())
    assert "IndexError" in logged and "something" not in logged
