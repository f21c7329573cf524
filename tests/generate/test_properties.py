"""Random models, prompts, trees, drafters and arguments: the text is always the target's own."""

from functools import cache

import paceline
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.ngram import NgramDrafter

from support.families import SUPPORTED, build
from support.models import noisy_copy, tiny_llama
from support.trees import shapes

pytestmark = pytest.mark.slow

FAMILIES = ["llama", "mistral", "gemma3_text", "gpt2", "qwen3"]


@cache
def pair(family, seed):
    """A target and a draft model that agrees with it more or less."""
    torch.manual_seed(seed)
    if family == "llama":
        model = tiny_llama(vocab=64, seed=seed)
    else:
        model = build(family, SUPPORTED[family])
    model.generation_config.eos_token_id = None
    return model, ModelDrafter(noisy_copy(model, noise=[0.0, 0.02, 0.2][seed], seed=seed))


@st.composite
def calls(draw):
    model, drafter = pair(draw(st.sampled_from(FAMILIES)), draw(st.integers(0, 2)))
    ngram = NgramDrafter(longest=draw(st.integers(1, 5)), matches=draw(st.integers(1, 9)))
    batch, width = draw(st.integers(1, 4)), draw(st.integers(1, 14))
    torch.manual_seed(draw(st.integers(0, 999)))
    ids = torch.randint(1, draw(st.sampled_from([4, 64])), (batch, width))
    pads = torch.tensor([0, *(draw(st.integers(0, width - 1)) for _ in range(batch - 1))])
    mask = (torch.arange(width) >= pads[:, None]).long()
    options = {"max_new_tokens": draw(st.integers(1, 12)), "pad_token_id": 0}
    if draw(st.booleans()):
        options["eos_token_id"] = draw(st.lists(st.integers(1, 63), min_size=1, max_size=8))
    if draw(st.booleans()):
        options["repetition_penalty"] = draw(st.sampled_from([0.8, 1.3]))
    if draw(st.booleans()):
        options["min_new_tokens"] = draw(st.integers(1, options["max_new_tokens"]))
    if draw(st.booleans()):
        options["suppress_tokens"] = draw(st.lists(st.integers(0, 63), min_size=1, max_size=5))
    which = draw(st.sampled_from([ngram, drafter]))
    return model, ids * mask, mask, options, which, draw(shapes(most=10))


@given(calls())
@settings(max_examples=130)
def test_greedy_text_is_transformers_own(call):
    model, ids, mask, options, drafter, shape = call
    truth = model.generate(ids, attention_mask=mask, do_sample=False, **options)
    got = paceline.generate(model, ids, mask, drafter=drafter, tree=shape, do_sample=False, **options)
    assert torch.equal(got, truth)


@given(
    calls(),
    st.integers(0, 2**40),
    st.sampled_from([{"top_k": 0}, {"top_k": 6}, {"top_k": 0, "top_p": 0.8}, {"top_k": 0, "min_p": 0.05}]),
    st.sampled_from([0.4, 1.0, 1.6]),
)
@settings(max_examples=130)
def test_sampled_text_is_the_seeds_own(call, seed, cut, temperature):
    model, ids, mask, options, drafter, shape = call
    options |= {"do_sample": True, "temperature": temperature, "seed": seed, **cut}
    truth = paceline.generate(model, ids, mask, **options)
    got = paceline.generate(model, ids, mask, drafter=drafter, tree=shape, **options)
    assert torch.equal(got, truth)
