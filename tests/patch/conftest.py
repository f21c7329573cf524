"""A model to patch and a prompt for it."""

import warnings

import pytest
import torch

from support.models import tiny_llama


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def ids():
    torch.manual_seed(3)
    return torch.randint(1, 61, (1, 9))


@pytest.fixture(autouse=True)
def strict():
    """A fall back that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="transformers' own generate decodes")
        yield
