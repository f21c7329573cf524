"""A tiny target whose embeddings are its head, and rows for its draft."""

import pytest
from paceline.spec.target.load import load_target
from paceline.training.data.rows import open_data

from support.training_runs import random_rows, write_data, write_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return write_target(tmp_path_factory.mktemp("target") / "tiny", tokenizer, tie_word_embeddings=True)


@pytest.fixture
def model(folder):
    return load_target(folder)[0]


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    splits, _ = open_data(write_data(tmp_path_factory.mktemp("rows"), random_rows(3), random_rows(1)))
    return splits["train"].batch([0, 1, 2])
