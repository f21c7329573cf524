"""Models and configurations in other forms: wrapped ones run, what is no causal LM is refused."""

import paceline
import pytest
import torch
from transformers import GenerationConfig

from support.models import noisy_copy
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = dict(do_sample=False, max_new_tokens=12)


def test_a_model_wrapped_by_torch_compile_runs(model, ids, truth):
    wrapped = torch.compile(model)
    for drafter in (None, "ngram", torch.compile(noisy_copy(model))):
        assert torch.equal(paceline.generate(wrapped, ids, drafter=drafter, **GREEDY), truth)
    assert paceline.load_drafter("ngram", wrapped).name == "ngram"


def test_what_is_no_causal_lm_is_refused(model, ids):
    cases = {
        "LlamaModel, which has no language-modelling head; load the checkpoint with AutoModelForCausalLM": model.model,
        "model='smollm2-135m' is a name and no model; load it with paceline.load_target": "smollm2-135m",
        "tuple and no causal LM; pass the first of the two things that paceline.load_target": (model, None),
        "Linear and no causal LM of transformers; load one": torch.nn.Linear(2, 2),
        "DataParallel and no causal LM of transformers; pass its .module": torch.nn.DataParallel(model),
        "NoneType and no causal LM": None,
    }
    for words, given in cases.items():
        sentence(lambda given=given: paceline.generate(given, ids, **GREEDY), words)
        sentence(lambda given=given: paceline.load_drafter("ngram", given), words.replace("model=", "target="))


def test_a_generation_config_may_stand_where_transformers_has_it(model, ids, truth):
    config = GenerationConfig(**GREEDY)
    assert torch.equal(paceline.generate(model, ids, config), truth)
    assert torch.equal(paceline.generate(model, ids, config, drafter="ngram"), truth)
    sentence(lambda: paceline.generate(model, ids, config, generation_config=config), "given twice")
    sentence(lambda: paceline.generate(model, ids, [[1] * 10], **GREEDY), "attention_mask is a list")
