"""Times of compiling and of steps that are kept, and what follows from them."""

import math

import pytest
from paceline.spec.engines import compile_times
from paceline.spec.engines.compile_times import EACH, FIRST, expected_compile, keep, patience, paying_tokens, step_key
from torch import nn

from support.models import tiny_llama


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_estimate_is_the_last_time_or_by_layers_of_other_steps():
    assert expected_compile("a", 1) == FIRST + EACH
    keep("a", compile=2 * (FIRST + EACH), kinds=1)
    assert expected_compile("a", 5) == 2 * (FIRST + EACH)
    assert expected_compile("b", 3) == 2 * (FIRST + 3 * EACH), "this machine takes twice as long"
    keep("a", compile=3.0)
    assert expected_compile("a", 1) == 3.0


def test_a_run_compiles_when_eager_steps_have_lost_what_it_costs():
    keep("a", compile=10.0, kinds=1)
    keep("a", eager=0.05, compiled=0.03)
    assert patience("a") == pytest.approx(25.0)  # 500 steps, each 0.02 s too long
    assert paying_tokens("a") == pytest.approx(1000.0)
    keep("a", compiled=0.06)
    assert math.isinf(patience("a")) and math.isinf(paying_tokens("a"))
    assert paying_tokens("b") is None


def test_damaged_or_unwritable_files_are_as_none(cache, monkeypatch):
    cache.mkdir()
    (cache / "compile_times.json").write_text("[")
    assert paying_tokens("a") is None
    keep("a", compile=10.0, kinds=1)
    assert expected_compile("a", 1) == 10.0
    (cache / "file").write_text("")
    monkeypatch.setenv("PACELINE_CACHE", str(cache / "file"))
    keep("a", compile=1.0, kinds=1)
    assert expected_compile("a", 1) == FIRST + EACH


def test_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr(compile_times, "MOST", 2)
    for key in ("a", "b", "a", "c"):
        keep(key, compile=1.0, kinds=1)
    assert expected_compile("b", 7) != 1.0 and expected_compile("a", 7) == expected_compile("c", 7) == 1.0


def test_the_key_is_of_models_and_sizes():
    model = tiny_llama()
    key = step_key([model], 1, 256)
    assert key == step_key([model, nn.Linear(2, 2)], 1, 256) == step_key([tiny_llama(seed=3)], 1, 256)
    others = [([model], 2, 256), ([model], 1, 512), ([model, model], 1, 256), ([tiny_llama(vocab=7)], 1, 256)]
    assert key not in {step_key(*other) for other in others}
