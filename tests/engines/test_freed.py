"""What an eager call made is gone when the call ends, without waiting for the garbage collector, which comes by too
seldom for a server: engines hold few objects of Python, and many megabytes."""

import contextlib
import gc

import paceline
import pytest
import torch
from paceline.drafters.ngram import NgramDrafter

from support.engines import DRAFTERS
from support.families import KINDS, STATEFUL, build
from support.models import tiny_llama

IDS = torch.arange(3, 23)[None]


@contextlib.contextmanager
def collected():
    """Yields a list, which at the end has what only the garbage collector could free."""
    gc.collect()
    gc.disable()
    found = []
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += [each for each in gc.garbage if isinstance(each, torch.Tensor) or "paceline" in type(each).__module__]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def left(model, drafter, **options):
    def call():
        paceline.generate(model, IDS, drafter=drafter, max_new_tokens=6, executor="eager", eos_token_id=None, **options)

    call()  # what is kept with the models is made now
    with collected() as found:
        call()
    return {type(each).__name__ for each in found}


@pytest.mark.parametrize("options", [{}, dict(do_sample=True, temperature=0.8, seed=1)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_call_leaves_nothing_to_the_garbage_collector(name, options):
    model = tiny_llama(seed=3)
    drafter, tree = DRAFTERS[name](model)
    assert not left(model, drafter, tree=tree, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_nor_does_a_target_with_states(kind):
    assert not left(build(KINDS[kind], STATEFUL[KINDS[kind]]), NgramDrafter())


def test_many_requests_leave_nothing_either():
    model = tiny_llama(seed=3)
    requests = [dict(prompt=IDS[0, : 4 + n].tolist(), max_new_tokens=6, temperature=0.8 * (n % 2)) for n in range(4)]
    paceline.generate_many(model, requests, drafter="ngram", rows=2, executor="eager")
    with collected() as found:
        paceline.generate_many(model, requests, drafter="ngram", rows=2, executor="eager")
    assert not {type(each).__name__ for each in found}
