"""Beginnings of prompts that are kept: the same bits as read anew, for those who sent them."""

import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.eagle.drafter import EagleDrafter
from paceline.drafters.medusa import MedusaDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.serve.many import make_job
from paceline.spec.serve.prefixes import KeptPrefixes, can_resume
from serve.playing import scheduler_of

from support.models import eagle_copy, fitted_heads, noisy_copy

LONG = [31 + (number * 7) % 30 for number in range(30)]


MAKERS = {
    "ngram": lambda model: (NgramDrafter(), "2x1"),
    "draft": lambda model: (ModelDrafter(noisy_copy(model)), "2x1"),
    "hydra": lambda model: (MedusaDrafter(fitted_heads(model, "hydra", steps=5)), "2x1"),
    "eagle": lambda model: (EagleDrafter(eagle_copy(model)), "2x1"),
}


@torch.no_grad()
def served(scheduler, prompt, **more):
    job = make_job(scheduler.gears.model, None, dict(prompt=prompt, max_new_tokens=12, end_ids=(), **more))
    scheduler.submit(job)
    while not scheduler.idle:
        scheduler.tick()
    return job


@pytest.mark.parametrize("name", MAKERS)
def test_a_beginning_is_taken_over_bit_for_bit(model, name):
    """Logits, drafts and text behind kept chunks are those behind a prompt that was read whole."""
    drafter, shape = MAKERS[name](model)
    kept = KeptPrefixes(model, drafter, 4)
    scheduler, fresh = (scheduler_of(model, drafter, shape, room=64, prefixes=prefixes) for prefixes in (kept, None))
    assert can_resume(scheduler.lanes[0].engine, drafter.traits.remembers)
    served(scheduler, LONG)
    for prompt, reused in (([*LONG, 40, 41, 42], 28), ([*LONG[:18], 40, 41], 16), (LONG[:3], 0), (LONG, 28)):
        logprobs = dict(logprobs=3)
        job, other = served(scheduler, prompt, **logprobs), served(fresh, prompt, **logprobs)
        assert job.reused == reused and other.reused == 0
        assert (job.tokens, job.logprobs) == (other.tokens, other.logprobs)
        assert (job.steps, job.accepted, job.drafted) == (other.steps, other.accepted, other.drafted)


def test_others_texts_and_scored_prompts_are_read_anew(model):
    told = []
    kept = KeptPrefixes(model, NgramDrafter(), 4, tell=lambda *numbers: told.append(numbers))
    scheduler = scheduler_of(model, NgramDrafter(), "2x1", room=64, prefixes=kept)
    served(scheduler, LONG, tenant="one")
    assert served(scheduler, LONG, tenant="two").reused == 0 and served(scheduler, LONG, tenant="one").reused == 28
    assert served(scheduler, LONG, tenant="one", prompt_logprobs=0).reused == 0
    assert told == [(30, 0), (30, 0), (30, 28)]


def test_what_was_used_last_is_kept(model):
    drafter = NgramDrafter()
    one = KeptPrefixes(model, drafter, 4)
    served(scheduler_of(model, drafter, "2x1", room=64, prefixes=one), LONG)
    kept = KeptPrefixes(model, drafter, 4, megabytes=2.5 * one.nbytes / 1e6)
    scheduler = scheduler_of(model, drafter, "2x1", room=64, prefixes=kept)
    prompts = [[40 + number, *LONG[1:]] for number in range(3)]
    for number in (0, 1, 0, 2):
        served(scheduler, prompts[number])
        assert kept.nbytes <= kept.bytes
    assert [served(scheduler, prompts[number]).reused for number in (0, 2, 1)] == [28, 28, 0]
    assert set(kept._by_key) == {key for each in kept._kept.values() for key in each.keys}
    none = KeptPrefixes(model, drafter, 4, megabytes=1e-6)
    scheduler = scheduler_of(model, drafter, "2x1", room=64, prefixes=none)
    assert served(scheduler, LONG).tokens == served(scheduler, LONG).tokens and none.nbytes == 0 == len(none._by_key)


def test_a_longer_beginning_takes_the_place_of_a_shorter_one(model):
    kept = KeptPrefixes(model, NgramDrafter(), 4)
    scheduler = scheduler_of(model, NgramDrafter(), "2x1", room=64, prefixes=kept)
    served(scheduler, LONG[:10])
    served(scheduler, LONG)
    assert len(kept._kept) == 1 and served(scheduler, LONG[:10]).reused == 8
