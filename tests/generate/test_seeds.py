"""Seeds: drawn by torch's generator where none is given, returned, and giving the text again."""

import numpy as np
import paceline
import pytest
import torch
from transformers import GenerationConfig

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = dict(do_sample=False, max_new_tokens=12)
SAMPLED = dict(do_sample=True, top_k=0, max_new_tokens=12)


def test_sampled_calls_differ_and_follow_torchs_generator(model, ids):
    torch.manual_seed(3)
    first = [paceline.generate(model, ids, **SAMPLED) for _ in range(5)]
    assert len({tuple(text[0].tolist()) for text in first}) == 5
    torch.manual_seed(3)
    again = [paceline.generate(model, ids, drafter="ngram", **SAMPLED) for _ in range(5)]
    assert all(map(torch.equal, first, again))


def test_the_seed_that_was_drawn_is_returned_and_gives_the_text_again(model, ids):
    torch.manual_seed(3)
    out = paceline.generate(model, ids, return_dict_in_generate=True, **SAMPLED)
    torch.manual_seed(3)
    assert type(out.seed) is int and out.seed == int(torch.randint(2**53, ()))
    assert torch.equal(paceline.generate(model, ids, seed=out.seed, **SAMPLED), out.sequences)
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=12, return_dict_in_generate=True)
    torch.manual_seed(3)
    assert torch.equal(paceline.generate(model, ids, generation_config=config).sequences, out.sequences)


@pytest.mark.parametrize("seed", [7, [7, 9], np.int64(7), np.array([7, 9]), torch.tensor([7, 9]), -7, 2**70])
def test_a_seed_is_returned_as_it_was_used(model, ids, seed):
    pair, state = ids.expand(2, -1), torch.get_rng_state()
    out = paceline.generate(model, pair, seed=seed, return_dict_in_generate=True, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn where a seed is given"
    used = seed.tolist() if hasattr(seed, "tolist") else seed
    assert out.seed == used and type(out.seed) in (int, list)
    assert torch.equal(paceline.generate(model, pair, seed=used, **SAMPLED), out.sequences)


def test_greedy_calls_draw_nothing(model, ids, truth):
    state = torch.get_rng_state()
    out = paceline.generate(model, ids, drafter="ngram", return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, truth) and out.seed is None
    assert torch.equal(torch.get_rng_state(), state)


def test_best_of_n_gives_n_texts(model, ids):
    for seed in (None, 4):
        texts = paceline.generate(model, ids, num_return_sequences=6, seed=seed, **SAMPLED)
        assert len({tuple(text) for text in texts.tolist()}) == 6
