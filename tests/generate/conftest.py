"""A model, a prompt, and its greedy text by transformers."""

import pytest
import torch

from support.models import tiny_llama

GREEDY = dict(do_sample=False, max_new_tokens=12)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab=64)


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(2)
    return torch.randint(3, 64, (1, 10))


@pytest.fixture(scope="module")
def truth(model, ids):
    return model.generate(ids, **GREEDY)
