"""A tiny target and its data."""

import pytest

from support.training_runs import (
    random_rows,
    write_data,
    write_target,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("training")
    write_target(path / "target", tokenizer)
    write_data(path / "data", random_rows(10), random_rows(5, seed=1))
    return path
