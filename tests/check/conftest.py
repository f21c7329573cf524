"""A tiny model to check, in little time."""

import pytest

from support.models import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("check") / "tiny"
    tiny_llama(vocab=97).save_pretrained(path)
    return path


@pytest.fixture
def short(monkeypatch):
    """Few repeats and steps: the tests ask what is found, not how long it takes."""
    monkeypatch.setattr("paceline.spec.check.steps.REPEATS", 3)
    monkeypatch.setattr("paceline.spec.check.lossless.MOST_TOKENS", 12)
    monkeypatch.setattr("paceline.training.probe.SIZES", {"cpu": (1, 16)})
