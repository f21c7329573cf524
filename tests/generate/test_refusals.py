"""What `generate` cannot do is refused in one sentence."""

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from transformers import DynamicCache, LlamaConfig, StaticCache

from support.models import tiny_llama

REFUSALS = {
    "beams": (dict(num_beams=2), "beam search"),
    "contrastive": (dict(penalty_alpha=0.6, top_k=4), "contrastive"),
    "guidance": (dict(guidance_scale=1.5), "CFG"),
    "assistant": (dict(assistant_model=object()), "drafter="),
    "typo": (dict(max_new_token=3), "did you mean 'max_new_tokens'"),
    "nonsense": (dict(qqqq=3), "does not take 'qqqq'"),
    "rule": (dict(verify="exact"), "match, residual, typical"),
    "executor": (dict(executor="quantum"), "eager"),
    "law": (dict(drafter="ngram", verify="residual", do_sample=True), "verify='match'"),
    "no tokens": (dict(max_new_tokens=0), "at least 1 token"),
    "seeds": (dict(seed=[1, 2]), "2 entries for 3 rows"),
    "tree": (dict(drafter="ngram", tree="4y2"), "'chain:5'"),
    "stop strings": (dict(stop_strings=["x"]), "tokenizer"),
    "attentions": (
        dict(output_attentions=True, return_dict_in_generate=True),
        "attentions are not collected",
    ),
    "another cache": (dict(cache=StaticCache(LlamaConfig(), 20)), "is a StaticCache"),
    "an offloaded past": (dict(past_key_values=DynamicCache(offloading=True)), "is an offloaded DynamicCache"),
    "static cache": (dict(cache_implementation="static"), "slot cache"),
    "no cache": (dict(use_cache=False), "without a cache"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_is_refused_in_one_sentence(target, ragged, case):
    options, words = REFUSALS[case]
    ids, mask = ragged
    with pytest.raises(ValueError, match=words) as caught:
        paceline.generate(target, ids, mask, **dict(max_new_tokens=4, pad_token_id=0) | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), None, "at least 1 token"),
        (torch.tensor([1, 2]), None, "shape"),
        (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4), "must agree"),
        (torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 1, 0]]), "left only"),
        (torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [1, 0, 1]]), "left only"),
        (torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]), "row 1"),
    ],
)
def test_bad_prompts_are_refused_in_one_sentence(target, ids, mask, words):
    with pytest.raises(ValueError, match=words) as caught:
        paceline.generate(target, ids, mask, max_new_tokens=4)
    assert "\n" not in str(caught.value)


def test_other_vocabularies_and_encoder_decoders_are_refused(target, ragged):
    ids, mask = ragged
    other = ModelDrafter(tiny_llama(vocab=50))
    with pytest.raises(ValueError, match="vocabulary of 50 tokens and the target one of 61"):
        paceline.generate(target, ids, mask, drafter=other, max_new_tokens=4)
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).eval()
    with pytest.raises(ValueError, match="encoder-decoder"):
        paceline.generate(t5, ids, max_new_tokens=4)


def test_nan_logits_end_in_a_sentence(ragged):
    broken = tiny_llama(seed=4)
    paceline.generate(broken, ragged[0], ragged[1], max_new_tokens=2)  # attached while still whole
    with torch.no_grad():
        broken.model.norm.weight[3] = torch.nan
    for drafter in (None, "ngram"):
        with pytest.raises(ValueError, match=r"row 0: the scores .* are NaN"):
            paceline.generate(broken, ragged[0], ragged[1], drafter=drafter, max_new_tokens=4)
    fresh = tiny_llama(seed=4)
    with torch.no_grad():
        fresh.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"NaN|nan"):
        paceline.generate(fresh, ragged[0], ragged[1], max_new_tokens=4)


GOOD = torch.tensor([[5, 6, 7]])
BAD = {
    "negative id": (dict(input_ids=torch.tensor([[5, -100]])), "from -100 to 5"),
    "id beyond the vocabulary": (dict(input_ids=torch.tensor([[5, 61]])), "ends at 60"),
    "floats": (dict(input_ids=torch.ones(1, 2)), "integers"),
    "a list": (dict(input_ids=[[1, 2]]), "input_ids is list"),
    "drafter of another kind": (dict(input_ids=GOOD, drafter=5), "drafter is a int"),
    "a truth for a seed": (dict(input_ids=GOOD, seed=True), "seed=True"),
    "half a seed": (dict(input_ids=GOOD, seed=1.5), "seed=1.5"),
    "tree of another kind": (dict(input_ids=GOOD, drafter="ngram", tree=5), "tree=5"),
    "words for a number": (dict(input_ids=GOOD, max_new_tokens="5"), "whole number"),
    "a dict for a config": (dict(input_ids=GOOD, generation_config={"a": 1}), "not a GenerationConfig"),
    "another engine's option": (dict(input_ids=GOOD, num_assistant_tokens=3), "no effect"),
    "early exit": (dict(input_ids=GOOD, assistant_early_exit=1), "pass drafter="),
    "no such executor here": (dict(input_ids=GOOD, executor="cuda_graph"), "needs CUDA|needs a CUDA"),
    "executor for Python": (
        dict(input_ids=GOOD, executor="compiled", repetition_penalty=1.5, pad_token_id=0),
        "look at the history",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_odd_input_is_refused_in_one_sentence(target, case):
    options, words = BAD[case]
    with pytest.raises(ValueError, match=words) as caught:
        paceline.generate(target, **dict(max_new_tokens=4) | options)
    assert "\n" not in str(caught.value)
