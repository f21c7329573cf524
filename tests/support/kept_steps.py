"""Calls whose steps are kept, and the same by eager steps."""

import paceline
import torch
from paceline.drafters.ngram import NgramDrafter

IDS = torch.arange(5, 15)[None]
SAMPLED = dict(do_sample=True, temperature=0.8, top_p=0.9, top_k=12, min_p=0.01)


def decode(model, executor, ids=IDS, drafter=None, **options):
    options = dict(max_new_tokens=12, pad_token_id=0, do_sample=False, seed=3) | options
    return paceline.generate(model, ids, drafter=drafter or NgramDrafter(), executor=executor, **options)


def assert_eager_text(model, executor="tape", **options):
    assert torch.equal(decode(model, executor, **options), decode(model, "eager", **options))
