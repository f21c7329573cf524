"""A cache folder of its own for every test, and models that are saved and then streamed."""

import pytest
from paceline.spec.kernels import native


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    native.prepare()  # from the usual cache folder, where it has been built before
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", autouse=True)
def one_thread_each(one_thread):
    """Tiny tensors."""
