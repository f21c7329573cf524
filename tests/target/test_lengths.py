"""Lengths at which a model changes are not crossed."""

import paceline
import pytest
import torch

from support.families import SUPPORTED, build
from support.models import tiny_llama


def test_llama4_is_refused_where_its_queries_are_scaled_by_a_count():
    options = SUPPORTED["llama4_text"] | dict(attn_temperature_tuning=True, floor_scale=24, no_rope_layers=[1, 0])
    model = build("llama4_text", options)
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 64, (1, 10))
    truth = model.generate(ids, do_sample=False, max_new_tokens=14)
    assert torch.equal(paceline.generate(model, ids, drafter="ngram", do_sample=False, max_new_tokens=14), truth)
    with pytest.raises(ValueError, match="exceed 24"):
        paceline.generate(model, ids, do_sample=False, max_new_tokens=15)


def test_a_rotary_embedding_that_changes_with_the_length_is_not_crossed():
    rope = dict(
        rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=4.0,
        original_max_position_embeddings=24,
    )  # fmt: skip
    model = tiny_llama(rope_parameters=rope)
    for width, new in ((8, 12), (30, 12)):
        ids = torch.randint(3, 61, (1, width))
        truth = model.generate(ids, do_sample=False, max_new_tokens=new)
        got = paceline.generate(model, ids, drafter="ngram", tree="chain:3", do_sample=False, max_new_tokens=new)
        assert torch.equal(got, truth)
    with pytest.raises(ValueError, match="cross 24 positions"):
        paceline.generate(model, torch.randint(3, 61, (1, 12)), do_sample=False, max_new_tokens=20)
