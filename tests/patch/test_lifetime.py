"""A patch leaves nothing behind: it nests, is not copied or saved, and passes by nobody's own `generate`."""

import copy
import inspect
import io
import pickle

import paceline
import pytest
import torch
from transformers import AutoModelForCausalLM

from support.models import tiny_llama

GREEDY = dict(max_new_tokens=16, do_sample=False)


def test_nothing_is_left(model, ids):
    before, signature = dict(vars(model)), inspect.signature(model.generate)
    for _ in range(2):
        paceline.patch(model)
        assert inspect.signature(model.generate) == signature and model.generate.__doc__
        model.generate(ids, **GREEDY)
    paceline.unpatch(model)
    paceline.unpatch(model)
    assert vars(model) == before
    with pytest.raises(KeyError), paceline.patch(model, "ngram"):
        raise KeyError
    assert vars(model) == before


def test_patches_nest(model, ids):
    first = paceline.patch(model, "ngram", tree="chain:2")
    with paceline.patch(model, "ngram", tree="chain:4") as second:
        model.generate(ids, **GREEDY)
        third = paceline.patch(model, None)
        model.generate(ids, **GREEDY)
    model.generate(ids, **GREEDY)
    assert [first.speculated, second.speculated, third.speculated] == [1, 1, 1]
    with second:
        paceline.unpatch(model)
        assert "generate" not in vars(model)
    assert vars(model)["_paceline_patch"] is first
    paceline.unpatch(model)
    assert "_paceline_patch" not in vars(model)


def test_somebodys_own_generate_is_neither_passed_by_nor_removed(model, ids):
    with paceline.patch(model, "ngram") as patched:
        inner = model.generate
        model.generate = wrapper = lambda *args, **kwargs: inner(*args, **kwargs)
        assert model.generate(ids, **GREEDY).shape == (1, 25) and patched.speculated == 1
        with pytest.raises(ValueError, match="somebody's own"):
            paceline.patch(model, "ngram")
    assert model.generate is wrapper and model.generate(ids, **GREEDY).shape == (1, 25)
    assert patched.speculated == 1
    with pytest.raises(ValueError, match="somebody's own"):
        paceline.patch(model, "ngram")


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: [torch.save(model, f := io.BytesIO()), f.seek(0), torch.load(f, weights_only=False)][2],
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_not_patched(model, ids, duplicate):
    expected = model.generate(ids, **GREEDY)
    with paceline.patch(model, "ngram") as patched:
        other = duplicate(model)
        assert vars(other).keys() == vars(tiny_llama()).keys()
        assert torch.equal(other.generate(ids, **GREEDY), expected) and patched.speculated == 0
        assert torch.equal(model.generate(ids, **GREEDY), expected) and patched.speculated == 1


def test_saving_and_wrapping(model, ids, tmp_path):
    expected = model.generate(ids, **GREEDY)
    compiled = torch.compile(model)
    with paceline.patch(compiled, "ngram") as patched:
        model.save_pretrained(tmp_path)
        assert torch.equal(compiled.generate(ids, **GREEDY), expected) and patched.speculated == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, **GREEDY), expected)
