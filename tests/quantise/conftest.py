"""A tiny model, and the same in 4 bits with its folder."""

import copy

import pytest
from paceline.spec.quantise.folder import write_model
from paceline.spec.quantise.model import quantise_model

from support.blocks import RECIPE, some_texts
from support.models import tiny_llama


@pytest.fixture(scope="session")
def original():
    """Sizes that the groups divide; the head is tied to the embeddings."""
    sizes = dict(hidden_size=64, intermediate_size=96, max_position_embeddings=512, attention_bias=True)
    return tiny_llama(tie_word_embeddings=True, **sizes)


@pytest.fixture(scope="session")
def quantised(original):
    model = copy.deepcopy(original)
    quantise_model(model, RECIPE, some_texts())
    return model


@pytest.fixture(scope="session")
def folder(quantised, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised") / "q4"
    path.mkdir()
    write_model(quantised, tokenizer, path, {"base": "tiny", "bits": 4, "group": 32})
    return path
