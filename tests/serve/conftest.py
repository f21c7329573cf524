"""The toy model that is served, and tiny tensors in one thread."""

import pytest
from serve.playing import toy


@pytest.fixture(scope="module", autouse=True)
def one_thread_each(one_thread):
    """Tiny tensors."""


@pytest.fixture(scope="module")
def model():
    return toy()
