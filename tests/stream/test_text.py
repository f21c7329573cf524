"""The text of a streamed target is the resident one's, from the same bits."""

import gc
import threading
import time

import paceline
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from paceline import PromptCache
from paceline.drafters.draft_model import ModelDrafter
from paceline.spec.engines import runs
from paceline.spec.stream import load
from paceline.spec.stream.streamer import prompt_chunk, streamer_of
from paceline.spec.target.last_part import LastPart
from paceline.spec.tree import DynamicShape
from stream.streaming import FAMILIES, LAYERS, assert_same, resident, saved, streamed, text

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


@pytest.mark.parametrize("family, dtype, tree, way", [
    ("gemma3_text", "bfloat16", "dynamic:128x16x8", SEEDED),
    ("mixtral", "float32", "dynamic:512x6x32", dict(do_sample=False)),
])  # fmt: skip
def test_large_trees_whose_scores_are_computed_along_the_path(family, dtype, tree, way, prompts, tmp_path, monkeypatch):
    path = saved(family, tmp_path / "model", dtype)
    here, away = resident(path, dtype), streamed(path, 4, dtype)
    truth, counts, logits = paceline.generate(here, prompts, max_new_tokens=10, **way), [], LastPart.logits
    monkeypatch.setattr(LastPart, "logits", lambda *inputs: counts.append(inputs[-1].numel()) or logits(*inputs))
    monkeypatch.setattr(runs, "MOST_SCORES", 0)
    drafter = ModelDrafter(noisy_copy(resident(path), 0.05))
    out = paceline.generate(away, prompts, drafter=drafter, tree=tree, max_new_tokens=10, **way)
    assert torch.equal(out, truth) and len(counts) > 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder, its model in memory, and a draft model."""
    path = saved("qwen2", tmp_path_factory.mktemp("pair") / "model")
    model = resident(path)
    return path, model, ModelDrafter(noisy_copy(model, 0.05))


MEANS = [(0, 1), *((fetched, buffers) for fetched in range(2, LAYERS + 1) for buffers in range(1, min(fetched, 5)))]
TREES = ["chain:1", "4x2x1", "16x2", "1x8", DynamicShape(7, 3, 2), DynamicShape(40, 4, 4)]


@given(means=st.sampled_from(MEANS), tree=st.sampled_from(TREES), seeded=st.booleans())
@limits(max_examples=6)
def test_budgets_buffers_and_trees_change_no_text(pair, prompts, means, tree, seeded):
    """Of fewer buffers than layers that are fetched: with as many, all layers would fit."""
    path, here, drafter = pair
    fetched, buffers = means
    away = streamed(path, fetched, buffers=buffers)
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


def test_a_kept_prompt_is_not_read_again(pair):
    """What identifies the weights stays the same while they come and go."""
    path, here, drafter = pair
    away, reuse, prompt = streamed(path, 4), PromptCache(), torch.arange(3, 40)[None]
    first, _ = text(away, prompt, drafter=drafter, reuse=reuse)
    again = torch.cat([first, prompt[:, :4]], dim=1)
    assert torch.equal(text(away, again, drafter=drafter, reuse=reuse)[0], text(here, again)[0])
    assert reuse.tokens_reused > 30


class Immediate:
    """Copies that are done when they are asked for, in place of a GPU's."""

    waited = fetching = 0.0

    def __init__(self, layers, buffers):
        self.layers, self.buffers = layers, buffers

    def copy(self, layer, buffer):
        self.buffers[buffer][: len(self.layers[layer])].copy_(self.layers[layer])
        return len(self.layers[layer])

    def wait(self, buffer):
        pass

    leave = wait

    def close(self):
        pass


def test_weights_that_wait_in_the_hosts_memory(pair, monkeypatch, capsys):
    path, here, drafter = pair
    monkeypatch.setattr(load, "CudaCopies", Immediate)
    away = streamed(path, 5, kind="host")
    assert_same(here, away, torch.arange(3, 20)[None], drafter=drafter, **SEEDED)
    said = capsys.readouterr().err
    assert "in the GPU's memory are" in said and "the host keeps" in said and "this process takes" not in said
    about, record = streamer_of(away).about, streamer_of(away).record
    assert about.kind == "host" and record.bytes_read >= (record.forwards - 1) * about.bytes_per_forward


def test_a_model_that_is_gone_fetches_no_more(pair):
    def fetching():
        return sum(thread.name == "paceline-stream" for thread in threading.enumerate())

    gc.collect()
    before, away = fetching(), streamed(pair[0])
    text(away, torch.arange(3, 9)[None])
    assert fetching() == before + 1
    del away
    gc.collect()
    for _ in range(100):  # until its last layer is there
        if fetching() > before:
            time.sleep(0.05)
    assert fetching() == before


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2(smollm2):
    model, tokenizer = smollm2
    folder = model.config.name_or_path  # by its name it would be fetched again, into this test's cache
    away, _ = paceline.load_target(folder, "float32", "cpu", with_tokenizer=False, stream="disk", resident="120MB")
    assert streamer_of(away).about.resident_layers < 30
    ids = tokenizer("A bicycle stays upright because", return_tensors="pt")["input_ids"]
    assert_same(model, away, ids, drafter="ngram", tree="8x2", max_new_tokens=8, **SEEDED)
