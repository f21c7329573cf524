"""Numbers: those that mean nothing are refused, those of other libraries are taken."""

import numpy as np
import paceline
import pytest
import torch
from paceline.spec.serve.texts import Text, decode_texts
from transformers import GenerationConfig

from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = dict(do_sample=False, max_new_tokens=12)
SAMPLED = dict(do_sample=True, top_k=0, max_new_tokens=12)

WRONG = {
    "prefill_chunk": (-1, 0, 1.5, True, "5", np.bool_(True), torch.tensor(2.0)),
    "max_new_tokens": (-1, 0, 2.0, True, "5", np.float32(3)),
    "max_length": (0, -3, False),
    "min_new_tokens": (-1, True, 0.5),
    "min_length": (-1,),
    "num_return_sequences": (0, -1, True),
    "top_k": (-1, 2.5, True),
    "no_repeat_ngram_size": (-1,),
    "temperature": (-1, "hot", True, float("nan"), float("inf")),
    "top_p": (1.5, -0.1, float("nan")),
    "min_p": (2,),
    "repetition_penalty": (-1.0, "much"),
    "max_time": (-1,),
    "seed": (True, 1.5, "a", [1, True], [1.5], [None], np.array([0.5])),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_numbers_that_mean_nothing_are_refused(model, ids, name, value):
    text = sentence(lambda: paceline.generate(model, ids, **{"max_new_tokens": 12, name: value}), f"{name}={value!r}")
    assert "number" in text or "integer" in text
    assert "; pass" in text


def test_numbers_in_a_generation_config_are_checked_too(model, ids):
    for config in (GenerationConfig(max_new_tokens=True), GenerationConfig(max_new_tokens=4, num_return_sequences=0)):
        sentence(lambda config=config: paceline.generate(model, ids, generation_config=config), "whole number")


def test_nothing_is_sampled_at_temperature_zero(model, ids, truth):
    sentence(lambda: paceline.generate(model, ids, **SAMPLED, temperature=0.0), "temperature=0", "do_sample=False")
    assert torch.equal(paceline.generate(model, ids, **GREEDY, temperature=0.0), truth)


def test_whole_numbers_of_other_libraries_are_taken(model, ids, truth):
    for kind in (np.int64, np.int32, np.uint8, torch.tensor):
        options = dict(max_new_tokens=kind(12), prefill_chunk=kind(3), min_new_tokens=kind(2), do_sample=False)
        assert torch.equal(paceline.generate(model, ids, drafter="ngram", **options), truth)
    options = dict(do_sample=True, seed=1, max_new_tokens=12)
    for given, same in ((np.float32(2), 2.0), (2, 2.0), (np.float64(0.5), 0.5)):
        texts = [paceline.generate(model, ids, temperature=value, **options) for value in (given, same)]
        assert torch.equal(*texts)


def test_texts_to_decode_are_read_in_chunks_of_at_least_one_token(model):
    for chunk in (-1, 0, True):
        texts = [Text([5, 6, 7], 4, 0, 8)]
        sentence(
            lambda chunk=chunk, texts=texts: decode_texts(model, texts, print, batch=1, prefill_chunk=chunk),
            f"prefill_chunk={chunk}",
        )
