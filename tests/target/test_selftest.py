"""The self-test of a target: no false reason is given, noise is not taken for wrong attention, in any precision."""

import warnings

import paceline
import pytest
import torch
from paceline.spec.target import selftest
from paceline.spec.target.selftest import TOLERANCE, attach, self_test, unsteadiness

from support.families import REFUSED, SUPPORTED, build
from support.models import tiny_llama
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = dict(do_sample=False, max_new_tokens=12)


def int8(model):
    """Linear layers in 8 bits whose activations are quantised by tensor as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_target_is_tested_and_decoded_under_autocast(ids, dtype):
    model = tiny_llama(vocab=64)
    with torch.autocast("cpu", dtype):
        assert self_test(model) < 1e-5
        truth = model.generate(ids, **GREEDY)
        for drafter in (None, "ngram"):
            assert torch.equal(paceline.generate(model, ids, drafter=drafter, **GREEDY), truth)
        assert torch.is_autocast_enabled("cpu"), "and the caller's context is as it was"


@pytest.mark.parametrize("sizes", [{}, dict(hidden_size=256, num_hidden_layers=4, initializer_range=0.02)])
def test_noise_of_quantised_activations_is_told_from_wrong_attention(ids, sizes):
    model = int8(tiny_llama(vocab=64, **sizes))
    assert self_test(model) > 100 * TOLERANCE[model.dtype], "else nothing is tested"
    with pytest.warns(UserWarning, match="other logits for the same tokens when another text is in the batch"):
        attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model)  # once
    assert paceline.generate(model, ids, drafter="ngram", **GREEDY).shape == (1, 22)


@pytest.mark.parametrize("name", ["mpt", "gpt_neo"])
def test_wrong_attention_is_found_behind_that_noise(name, monkeypatch):
    model = int8(build(name, REFUSED[name]))
    monkeypatch.setattr(model.config, "model_type", "unknown")
    sentence(lambda: attach(model), "its attention does not follow the positions")


def test_a_model_too_unsteady_to_be_checked_is_refused_for_that():
    model = tiny_llama(vocab=64)
    forward = model.forward
    model.forward = lambda **inputs: _noisy(forward(**inputs), 3.0)
    sentence(lambda: attach(model), "LlamaForCausalLM gives other logits for the same tokens", "activations")
    assert unsteadiness(model) > selftest.UNSTEADY


def _noisy(out, spread):
    if out.logits.numel():  # none while a text is read
        out.logits = out.logits + spread * out.logits.std() * torch.randn_like(out.logits)
    return out


def test_a_steady_model_costs_no_second_look(monkeypatch):
    looks = []
    monkeypatch.setattr(selftest, "unsteadiness", lambda model: looks.append(model))
    attach(tiny_llama(vocab=64))
    assert not looks


def test_a_forward_that_does_not_run_at_all_is_blamed_itself():
    model = tiny_llama(vocab=64)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(7))
    sentence(lambda: attach(model), "does not run a plain forward", "RuntimeError")


def test_a_model_is_looked_at_again_when_it_changes(ragged):
    model = tiny_llama(attention_dropout=0.5)
    paceline.generate(model, *ragged, max_new_tokens=2)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        paceline.generate(model, *ragged, max_new_tokens=2)
    model.eval().set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention"):
        paceline.generate(model, *ragged, max_new_tokens=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["bloom", "mpt", "gpt_neo", "falcon-alibi", "recurrent_gemma"])
def test_refusals_do_not_depend_on_the_precision(name, dtype):
    with pytest.raises(ValueError, match="; use a model"):
        attach(build(name, REFUSED[name]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3_text", "gpt2"])
def test_supported_families_are_supported_in_low_precision(name, dtype):
    attach(build(name, SUPPORTED[name]).to(dtype))
