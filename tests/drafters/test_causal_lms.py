"""Causal LMs as drafters: given as they are or by name, kept with their target, refused where they cannot draft."""

import copy
import json
import os

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.kept import kept_drafter
from transformers import T5Config, T5ForConditionalGeneration

from support.models import noisy_copy, tiny_llama
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = dict(do_sample=False, max_new_tokens=12)


def test_a_causal_lm_is_a_drafter(model, ids, truth):
    draft = noisy_copy(model)
    out = paceline.generate(model, ids, drafter=draft, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, truth) and out.trace.summary()["num_accepted_draft_tokens"] > 0
    drafter = paceline.load_drafter(draft, model)
    assert isinstance(drafter, ModelDrafter) and drafter.model is draft
    for again in (draft, torch.compile(draft), drafter):
        assert paceline.load_drafter(again, model) is drafter is kept_drafter(again, model)
    other = copy.deepcopy(draft)
    assert paceline.load_drafter(other, model).model is other, "a copy has a drafter of its own"
    draft.train()
    sentence(lambda: paceline.generate(model, ids, drafter=draft, **GREEDY), "training mode")


def test_models_that_cannot_draft_are_refused(model, ids):
    sizes = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    cases = {
        "vocabulary of 50 tokens and the target one of 64": tiny_llama(vocab=50),
        "is an encoder-decoder model": T5ForConditionalGeneration(sizes).eval(),
        "which has no language-modelling head": noisy_copy(model).model,
        "the target itself": model,
    }
    for words, draft in cases.items():
        for call in (lambda d: paceline.load_drafter(d, model), lambda d: paceline.generate(model, ids, drafter=d)):
            sentence(lambda call=call, draft=draft: call(draft), words)
    sentence(lambda: paceline.generate(model, ids, assistant_model=noisy_copy(model)), "as drafter=")
    sentence(lambda: paceline.load_drafter(5, model), "drafter is a int")
    sentence(lambda: paceline.generate(model, ids, drafter=(noisy_copy(model), None)), "drafter is a tuple")


def test_a_model_and_its_drafter_go_together(model):
    import gc
    import weakref

    draft = noisy_copy(model)
    kept = weakref.ref(paceline.load_drafter(draft, model))
    gc.collect()
    assert kept() is not None
    del draft
    gc.collect()
    assert kept() is None


def test_a_named_drafter_stays_loaded_until_its_folder_changes(model, ids, truth, tmp_path):
    folder = tmp_path / "draft"
    noisy_copy(model).save_pretrained(folder)
    first = kept_drafter(folder, model)
    assert kept_drafter(str(folder), model) is first and kept_drafter("ngram", model) is kept_drafter("ngram", model)
    assert torch.equal(paceline.generate(model, ids, drafter=str(folder), **GREEDY), truth)
    assert kept_drafter(folder, model) is first
    assert kept_drafter(folder, copy.deepcopy(model)) is not first
    (folder / "acceptance.json").write_text(json.dumps({"p": [[0.9], [0.8]]}))
    second = kept_drafter(folder, model)
    assert second is not first
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns + 1))
    assert kept_drafter(folder, model) is not second
    assert paceline.load_drafter(folder, model) is not paceline.load_drafter(folder, model)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    sentence(lambda: paceline.generate(model, ids, drafter=str(folder), **GREEDY), "no such folder")


GOOD = torch.tensor([[5, 6, 7]])


def test_the_model_itself_is_no_drafter(target):
    with pytest.raises(ValueError, match="drafter is a LlamaForCausalLM"):
        paceline.generate(target, GOOD, drafter=target, max_new_tokens=4)
    with pytest.raises(ValueError, match="62 children and the vocabulary 61"):
        paceline.generate(target, GOOD, drafter=ModelDrafter(noisy_copy(target)), tree="62", max_new_tokens=4)


def test_a_draft_model_needs_no_tokenizer(target, tmp_path):
    noisy_copy(target).save_pretrained(tmp_path)
    assert paceline.load_drafter(tmp_path, target).traits.vocab_size == 61
