"""Greedy text equals transformers' own with every argument, its scores too, and steps do no more than they need."""

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines import executors
from paceline.spec.step import step
from paceline.spec.target.slots import cache_argument
from transformers import GenerationConfig, LogitsProcessorList

from support.models import noisy_copy, tiny_llama
from support.processors import Upwards

NEW = 24


def drafters(draft, hydra):
    return {"none": None, "ngram": NgramDrafter(), "model": draft, "hydra": hydra}


CASES = {
    "plain": {},
    "eos": dict(eos_token_id=17, pad_token_id=0),
    "several eos": dict(eos_token_id=[17, 23, 5], pad_token_id=3),
    "min_new_tokens": dict(eos_token_id=[17, 23, 5, 30], min_new_tokens=9),
    "min_length": dict(eos_token_id=[17, 23, 5, 30], min_length=15),
    "max_length": dict(max_length=20, max_new_tokens=None),
    "repetition penalty": dict(repetition_penalty=1.7),
    "no repeat n-gram": dict(no_repeat_ngram_size=2),
    "encoder penalties": dict(encoder_repetition_penalty=1.5, encoder_no_repeat_ngram_size=2),
    "bad words": dict(bad_words_ids=[[17], [23, 5], [9, 9]]),
    "suppressed": dict(suppress_tokens=[17, 23, 5, 9], begin_suppress_tokens=[30, 31]),
    "forced eos": dict(eos_token_id=2, forced_eos_token_id=2),
    "sequence bias": dict(sequence_bias=[[[17], 4.0], [[23, 5], -9.0]]),
    "length decay": dict(exponential_decay_length_penalty=(5, 1.4), eos_token_id=17),
    "prefix function": dict(prefix_allowed_tokens_fn=lambda row, ids: [row + 3, 10, 20, 30 + int(ids[-1]) % 7]),
    "user processor": dict(logits_processor=LogitsProcessorList([Upwards()])),
    "config object": dict(generation_config=GenerationConfig(max_new_tokens=11, pad_token_id=0, do_sample=False)),
    "remove invalid values": dict(remove_invalid_values=True, renormalize_logits=True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["none", "ngram", "model", "hydra"])
def test_greedy_text_equals_transformers(target, draft, hydra, ragged, case, which):
    ids, mask = ragged
    options = dict(do_sample=False, max_new_tokens=NEW) | CASES[case]
    if "generation_config" in options:
        options = CASES[case]
    truth = target.generate(ids, attention_mask=mask, **options)
    for tree in ("chain:3", "3x2x1"):
        got = paceline.generate(
            target,
            ids,
            mask,
            drafter=drafters(draft, hydra)[which],
            tree=tree if which != "none" else None,
            **options,
        )
        assert torch.equal(got, truth), tree


def test_scores_and_logits_are_transformers_own(target, draft, ragged):
    ids, mask = ragged
    options = dict(
        do_sample=False, max_new_tokens=12, repetition_penalty=1.3, eos_token_id=[17, 5], pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    truth = target.generate(ids, attention_mask=mask, **options)
    got = paceline.generate(target, ids, mask, drafter=draft, tree="2x2", **options)
    assert torch.equal(got.sequences, truth.sequences)
    assert len(got.scores) == len(truth.scores) and len(got.logits) == len(truth.logits)
    for index in range(len(truth.scores)):
        for row in range(3):
            if set(got.sequences[row, 9 : 9 + index].tolist()) & {17, 5}:
                assert not got.scores[index][row].any(), "zeros behind the end"
                continue
            assert torch.allclose(got.scores[index][row], truth.scores[index][row], atol=1e-4)
            assert torch.allclose(got.logits[index][row], truth.logits[index][row], atol=1e-4)


def test_the_cache_is_allocated_once_and_steps_do_not_grow(target, draft, ragged, monkeypatch):
    """Buffers keep their addresses, and no tensor that a step makes is larger late in a text than early."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest, addresses = [], set()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest[-1].append(tensor.numel())
            return out

    def watched(engine, mark):
        caches = engine.target.cache, engine.session.slots.cache
        addresses.add(tuple(layer.keys.data_ptr() for cache in caches for layer in cache.layers))
        largest.append([])
        with Sizes():
            return step(engine, mark)

    monkeypatch.setattr(executors, "step", watched)
    ids, mask = ragged
    paceline.generate(target, ids, mask, drafter=draft, tree="3x2", do_sample=False, max_new_tokens=100)
    assert len(addresses) == 1 and len(largest) > 20
    assert largest[0] == largest[-1]


def test_drafts_beyond_the_context_do_no_harm():
    """A text that fills a context of learned positions to the last token, with trees that reach past it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, eos_token_id=None)
    )
    model = model.eval()
    ids = torch.randint(1, 61, (2, 8))
    truth = model.generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=0)
    got = paceline.generate(
        model,
        ids,
        drafter=ModelDrafter(noisy_copy(model)),
        tree="2x2x1x1x1",
        do_sample=False,
        max_new_tokens=24,
    )
    assert torch.equal(got, truth)


def test_a_draft_model_recomputes_nothing(target, ragged, monkeypatch):
    """After a commit every slot of the draft's cache below the pair that starts a step holds what a
    cache-less forward of the committed text gives, although only drafted nodes were ever forwarded."""
    drafter = ModelDrafter(noisy_copy(target, noise=0.005))
    engines = []

    def watched(engine, mark):
        engines.append(engine)
        return step(engine, mark)

    monkeypatch.setattr(executors, "step", watched)
    ids, mask = ragged
    out = paceline.generate(
        target,
        ids,
        mask,
        drafter=drafter,
        tree="2x2x1",
        do_sample=False,
        max_new_tokens=40,
        return_dict_in_generate=True,
    )
    assert out.trace.summary()["tokens_per_step"] > 1.5
    engine = engines[-1]
    for row in range(3):
        length = int(engine.state.lengths[row])
        kept = length - 2  # all but the leaf that may be missing, and the root
        with torch.no_grad():
            out = drafter.model(engine.state.tokens[row : row + 1, :kept], use_cache=True)
            truth = out[cache_argument(drafter.model)]
        # A row that had ended earlier is followed no further than its last own step.
        layer = engine.session.slots.cache.layers[1]
        mine = layer.by_row(layer.keys)[row, : kept - 4]  # (T, H * D)
        theirs = truth.layers[1].keys[0].transpose(0, 1).flatten(1)
        assert torch.allclose(mine, theirs[: kept - 4], atol=1e-4)


def test_drafters_by_name_and_folder(target, ragged, tmp_path, tokenizer):
    ids, mask = ragged
    noisy_copy(target).save_pretrained(tmp_path / "draft")
    tokenizer.save_pretrained(tmp_path / "draft")
    drafter = paceline.load_drafter(tmp_path / "draft", target)
    assert drafter.name == "draft"
    truth = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    for named in (drafter, str(tmp_path / "draft"), "ngram"):
        assert torch.equal(
            paceline.generate(target, ids, mask, drafter=named, do_sample=False, max_new_tokens=NEW), truth
        )
    with pytest.raises(ValueError, match="vocabulary of 61 tokens and the target one of 50"):
        paceline.load_drafter(tmp_path / "draft", tiny_llama(vocab=50))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_prompts_of_other_integer_types(target, ragged, dtype):
    ids, mask = ragged
    truth = paceline.generate(target, ids, mask, max_new_tokens=6)
    for keep in (mask, mask.bool(), mask.float()):
        assert torch.equal(paceline.generate(target, ids.to(dtype), keep, max_new_tokens=6).long(), truth)


def test_a_long_prompt_is_read_in_chunks(target, draft, ragged):
    ids, mask = ragged
    truth = paceline.generate(target, ids, mask, max_new_tokens=8)
    for chunk in (1, 2, 7):
        assert torch.equal(
            paceline.generate(target, ids, mask, max_new_tokens=8, drafter=draft, prefill_chunk=chunk), truth
        )
