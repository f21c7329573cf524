"""The text of a streamed target is the resident one's, from the same bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from paceline.drafters.draft_model import ModelDrafter
from paceline.spec.stream.streamer import prompt_chunk, streamer_of
from paceline.spec.tree import DynamicShape
from stream.streaming import FAMILIES, LAYERS, assert_same, resident, saved, streamed

from support.models import noisy_copy

SEEDED = dict(do_sample=True, seed=5, temperature=0.8, top_p=0.9)


@pytest.fixture(scope="module")
def prompts():
    torch.manual_seed(3)
    return torch.randint(3, 61, (2, 9))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_the_resident_ones(family, dtype, prompts, tmp_path):
    path = saved(family, tmp_path / "model", dtype)
    here, away = resident(path, dtype), streamed(path, 4, dtype)
    about = streamer_of(away).about
    assert (about.layers, about.resident_layers, about.buffers) == (LAYERS, LAYERS - 4, 2)
    before = streamer_of(away).record
    for way in (dict(drafter=None), dict(drafter="ngram", **SEEDED)):
        assert_same(here, away, prompts, **way)
    spent = streamer_of(away).record - before
    assert spent.bytes_read >= (spent.forwards - 2) * about.bytes_per_forward > 0, "each forward fetches its layers"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder, its model in memory, and a draft model."""
    path = saved("qwen2", tmp_path_factory.mktemp("pair") / "model")
    model = resident(path)
    return path, model, ModelDrafter(noisy_copy(model, 0.05))


TREES = ["chain:1", "4x2x1", "16x2", "1x8", DynamicShape(7, 3, 2), DynamicShape(40, 4, 4)]


@given(fetched=st.integers(0, LAYERS), buffers=st.integers(1, 4), tree=st.sampled_from(TREES), seeded=st.booleans())
@limits(max_examples=8)
def test_budgets_buffers_and_trees_change_no_text(pair, prompts, fetched, buffers, tree, seeded):
    path, here, drafter = pair
    away = streamed(path, fetched, buffers=buffers)
    assert streamer_of(away).about.resident_layers >= LAYERS - fetched
    assert_same(here, away, prompts, drafter=drafter, tree=tree, **(SEEDED if seeded else {}))


def test_a_long_prompt_is_read_in_few_passes(pair, tmp_path):
    """Chunks are as large as memory allows, and never smaller than others'."""
    path, here, _ = pair
    away = streamed(path)
    assert prompt_chunk(here) == 512 <= prompt_chunk(away) <= 2048
    torch.manual_seed(1)
    ids = torch.randint(3, 61, (1, 150))
    assert_same(here, away, ids)
    before = streamer_of(away).record
    assert_same(here, away, ids, max_new_tokens=3)
    assert (streamer_of(away).record - before).forwards == 1 + 3, "one for the prompt, one for each token"


def test_rows_of_different_length_and_a_second_call(pair):
    path, here, drafter = pair
    away = streamed(path, 5)
    torch.manual_seed(4)
    ids = torch.randint(3, 61, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for _ in range(2):
        assert_same(here, away, ids * mask, attention_mask=mask, drafter=drafter, pad_token_id=0)


def test_transformers_own_forward_streams_too(pair):
    """Whoever calls the model gets its logits, of products in another order of summation than torch's."""
    path, here, _ = pair
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.allclose(here(ids).logits, streamed(path)(ids).logits, atol=1e-3)
