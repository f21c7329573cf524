"""A tiny target and its data."""

import pytest

from support.training_runs import write_both


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return write_both(tmp_path_factory.mktemp("training"), tokenizer)
