"""Whatever a call of `model.generate` may hold, `paceline.generate` takes in its place."""

import numpy as np
import paceline
import pytest
import torch
from transformers import GenerationConfig

from support.models import tiny_llama
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = dict(do_sample=False, max_new_tokens=12)
NOTHING = dict.fromkeys([
    "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model",
    "streamer", "tokenizer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate", "synced_gpus",
    "past_key_values", "cache", "pixel_values", "inputs_embeds", "position_ids", "token_type_ids", "inputs",
    "assistant_tokenizer", "use_model_defaults", "trust_remote_code", "encoder_outputs", "cache_implementation",
])  # fmt: skip
TAKEN = {
    "nothing": NOTHING,
    "no compiling": dict(disable_compile=True, compile_config=None),
    "one process": dict(synced_gpus=False),
    "of beams": dict(num_beams=1, length_penalty=1.0, early_stopping=False, num_beam_groups=1, diversity_penalty=0.0),
    "of forwards": dict(use_cache=True, return_dict=True, prefill_chunk_size=None, low_memory=False),
    "numpy": dict(max_new_tokens=np.int64(12), min_new_tokens=np.int8(2), do_sample=np.bool_(False), top_k=np.int8(50)),
    "tensors": dict(max_new_tokens=torch.tensor(12), eos_token_id=torch.tensor([2]), repetition_penalty=torch.ones(())),
    "ids": dict(eos_token_id=[np.int64(2), torch.tensor(62)], pad_token_id=np.int64(0), suppress_tokens=np.array([2])),
}


@pytest.mark.parametrize("options", TAKEN.values(), ids=TAKEN)
def test_arguments_without_a_meaning_or_of_other_types_are_taken(model, ids, truth, options):
    for call in (lambda **given: paceline.generate(model, ids, drafter="ngram", **given), patched(model, ids)):
        assert torch.equal(call(**GREEDY | options)[:, :15], truth[:, :15])
    config = {name: value for name, value in (GREEDY | options).items() if hasattr(GenerationConfig(), name)}
    for given in (dict(generation_config=GenerationConfig(**config)), dict(attention_mask=GenerationConfig(**config))):
        assert torch.equal(paceline.generate(model, ids, **given), truth)


def patched(model, ids):
    def call(**given):
        with paceline.patch(model, "ngram") as active:
            text = model.generate(**given | dict(inputs=ids))
        assert active.speculated == 1 and not active.fell_back
        return text

    return call


def test_a_config_with_numbers_of_others_is_not_changed(model, ids, truth):
    config = GenerationConfig(
        do_sample=True, temperature=np.float32(0.5), max_new_tokens=torch.tensor(12), top_k=np.int64(9)
    )
    config.do_sample = np.bool_(True)
    same = dict(do_sample=True, temperature=0.5, max_new_tokens=12, top_k=9)
    found = paceline.generate(model, ids, config, seed=np.int64(3))
    assert torch.equal(found, paceline.generate(model, ids, seed=3, **same))
    assert isinstance(config.max_new_tokens, torch.Tensor), "the caller's own is as it was"
    mine = tiny_llama(vocab=64)
    mine.generation_config = GenerationConfig(**GREEDY)
    assert torch.equal(paceline.generate(mine, ids), truth)


def test_a_prompt_by_another_name_and_none_at_all(model, ids, truth):
    assert torch.equal(paceline.generate(model, inputs=ids, **GREEDY), truth)
    sentence(lambda: paceline.generate(model, ids, inputs=ids, **GREEDY), "two names of the prompt")
    for options in (GREEDY, dict(GREEDY, bos_token_id=7)):
        expected = model.generate(**options)
        assert torch.equal(paceline.generate(model, drafter="ngram", **options), expected)
        with paceline.patch(model, "ngram") as active:
            assert torch.equal(model.generate(**options), expected) and active.speculated == 1
    several = paceline.generate(model, do_sample=True, num_return_sequences=3, seed=[1, 2, 1], max_new_tokens=12)
    assert torch.equal(several[0], several[2]) and not torch.equal(several[0], several[1])
    bare = tiny_llama(vocab=64, bos_token_id=None)
    sentence(lambda: paceline.generate(bare, **GREEDY), "there is no prompt", "pass input_ids")


def test_compiling_is_left_out_where_that_is_asked(model, ids, monkeypatch):
    chosen = []
    monkeypatch.setattr("paceline.spec.engines.runs.choose", lambda name, *_: chosen.append(name) or "eager")
    for options in ({}, dict(disable_compile=True), dict(generation_config=GenerationConfig(disable_compile=True))):
        paceline.generate(model, ids, max_new_tokens=3, **options)
    assert chosen == ["auto", "eager", "eager"]


def test_what_would_mean_something_is_refused(model, ids):
    sentence(lambda: paceline.generate(model, ids, synced_gpus=True), "synced_gpus=True", "leave it out")
    sentence(lambda: paceline.generate(model, ids, num_assistant_tokens=3), "has no effect")
    sentence(lambda: paceline.generate(model, ids, max_new_token=3), "did you mean 'max_new_tokens'")
