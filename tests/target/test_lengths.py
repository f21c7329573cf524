"""Lengths at which a model changes, and limits beyond its context."""

import paceline
import pytest
import torch
from paceline.spec.arguments import BeyondContext
from transformers import GPT2Config, GPT2LMHeadModel

from support.families import SUPPORTED, build
from support.models import tiny_llama
from support.sentences import sentence


def test_llama4_is_refused_where_its_queries_are_scaled_by_a_count():
    options = SUPPORTED["llama4_text"] | dict(attn_temperature_tuning=True, floor_scale=24, no_rope_layers=[1, 0])
    model = build("llama4_text", options)
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 64, (1, 10))
    truth = model.generate(ids, do_sample=False, max_new_tokens=14)
    assert torch.equal(paceline.generate(model, ids, drafter="ngram", do_sample=False, max_new_tokens=14), truth)
    with pytest.raises(ValueError, match="exceed 24"):
        paceline.generate(model, ids, do_sample=False, max_new_tokens=15)


def test_a_limit_beyond_a_table_of_positions_warns_and_stops_there():
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, eos_token_id=None, bos_token_id=1)
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    ids, mask = torch.randint(3, 61, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    options = dict(do_sample=False, pad_token_id=0)
    truth = model.generate(ids, attention_mask=mask, max_new_tokens=20, **options)
    for drafter in (None, "ngram"):
        with pytest.warns(BeyondContext, match="12 tokens and 300 new ones exceed the model's context of 32"):
            text = paceline.generate(model, ids, mask, drafter=drafter, max_new_tokens=300, **options)
        assert torch.equal(text, truth)
    with paceline.patch(model, "ngram") as patched, pytest.warns(BeyondContext, match="the text ends there"):
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=300, **options), truth)
    assert patched.speculated == 1
    sentence(lambda: paceline.generate(model, truth, max_new_tokens=1), "32 tokens fills the model's context of 32")


def test_a_limit_beyond_the_context_of_rotary_positions_warns_and_goes_on():
    model, ids = tiny_llama(max_position_embeddings=32), torch.randint(3, 61, (1, 12))
    truth = model.generate(ids, do_sample=False, max_new_tokens=30)
    with pytest.warns(
        BeyondContext, match="12 tokens and 30 new ones exceed the model's context of 32: what it was not"
    ):
        assert torch.equal(paceline.generate(model, ids, drafter="ngram", do_sample=False, max_new_tokens=30), truth)
    ended = truth[0, 40]
    with pytest.warns(BeyondContext):  # as the usual way to set no limit
        text = paceline.generate(
            model, ids, do_sample=False, max_new_tokens=4000, eos_token_id=int(ended), pad_token_id=0
        )
    assert text.shape[1] <= 41 and torch.equal(text, truth[:, : text.shape[1]])
    sentence(lambda: paceline.generate(model, ids, max_new_tokens=10**9), "need", "GB are free; lower max_new_tokens")


def test_without_a_limit_a_text_stops_at_the_context():
    model, ids = tiny_llama(max_position_embeddings=32), torch.randint(3, 61, (1, 24))
    with pytest.warns(UserWarning, match="model-agnostic default"):
        truth = model.generate(ids, do_sample=False)
    with pytest.warns(UserWarning, match="model-agnostic default"):
        assert torch.equal(paceline.generate(model, ids, drafter="ngram", do_sample=False), truth)
    assert truth.shape == (1, 32)
