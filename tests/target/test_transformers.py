"""The installed transformers: the name of a forward's cache, and that nothing is used which it has deprecated."""

import logging
import warnings

import paceline
import pytest
import torch
import transformers
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.medusa import MedusaDrafter
from paceline.spec.target.slots import cache_argument
from paceline.spec.target.taps import HEAD, hidden_states
from paceline.training.objectives.target import OnlineTarget
from packaging.version import Version
from torch import nn
from transformers import LlamaForCausalLM
from transformers.utils.logging import warning_once

from support.models import fitted_heads, noisy_copy, tiny_llama

OWN = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
IDS = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
GREEDY = dict(do_sample=False, max_new_tokens=12)


class OldName(LlamaForCausalLM):
    """As code that comes with a checkpoint."""

    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        return super().forward(input_ids, **{OWN: past_key_values}, **kwargs)


class NewName(LlamaForCausalLM):
    def forward(self, input_ids=None, cache=None, **kwargs):
        return super().forward(input_ids, **{OWN: cache}, **kwargs)


class NoName(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Wrapper(nn.Module):
    """As PEFT's."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def get_base_model(self):
        return self.model


@pytest.mark.parametrize(
    "kind, name",
    {LlamaForCausalLM: OWN, OldName: "past_key_values", NewName: "cache", NoName: OWN}.items(),
)
def test_the_name_of_the_cache(kind, name, target):
    model = kind(target.config).eval()
    model.load_state_dict(target.state_dict())
    assert cache_argument(model) == cache_argument(torch.compile(model)) == cache_argument(Wrapper(model)) == name
    expected = target.generate(IDS, **GREEDY)
    assert torch.equal(paceline.generate(model, IDS, drafter="ngram", **GREEDY), expected)
    forward = model.forward
    model.forward = lambda **inputs: forward(**inputs)
    assert cache_argument(model) == name
    assert torch.equal(paceline.generate(model, IDS, drafter="ngram", **GREEDY), expected)


@pytest.fixture
def strict(caplog):
    """Warnings are errors, and transformers' log is heard, what it says once a process too."""
    warning_once.cache_clear()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield caplog
    logger.removeHandler(caplog.handler)


DRAFTERS = {
    "plain": lambda model: None,
    "ngram": lambda model: "ngram",
    "draft model": lambda model: ModelDrafter(noisy_copy(model)),
    "heads": lambda model: MedusaDrafter(fitted_heads(model, "hydra", steps=1)),
}


@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
@pytest.mark.parametrize("options", [GREEDY, dict(do_sample=True, seed=3, max_new_tokens=12, top_k=9)])
def test_decoding_warns_of_nothing(strict, drafter, options):
    model = tiny_llama()
    out = paceline.generate(model, IDS, drafter=drafter(model), return_dict_in_generate=True, **options)
    assert out.sequences.shape[1] == 20 and not strict.records


def test_patched_calls_and_training_forwards_warn_of_nothing(strict):
    model = tiny_llama()
    with paceline.patch(model, "ngram"):
        model.generate(IDS, **GREEDY)
    model.train()
    hidden_states(model, (HEAD,), IDS, torch.arange(8)[None])[HEAD].sum().backward()
    OnlineTarget(model).view({"input_ids": IDS, "position_ids": torch.arange(8)[None]}, "train", [0])
    assert not strict.records
