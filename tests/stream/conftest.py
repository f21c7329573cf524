"""A cache folder of its own for every test, and models that are saved and then streamed."""

import pytest
from paceline.spec.kernels import native
from paceline.spec.stream import layout, reader
from paceline.spec.stream.layout import StreamFolder
from stream.streaming import saved


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    native.prepare()  # from the usual cache folder, where it has been built before
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    """Files of tiny layers are read in several pieces, as those of large ones are, and the last is not whole."""
    for module in (reader, layout):
        monkeypatch.setattr(module, "PIECE", 4 * reader.PAGE)


@pytest.fixture(autouse=True)
def passed(monkeypatch):
    """The self-test of streamed models, a second for each, counts as passed; a test of its own is about it."""
    monkeypatch.setattr(StreamFolder, "tested", lambda *ignored: True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The folder of a Llama in float32, which no test changes."""
    return saved("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module", autouse=True)
def one_thread_each(one_thread):
    """Tiny tensors."""
