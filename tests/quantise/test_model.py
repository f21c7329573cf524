"""Quantising a model in place: what is replaced, on what it is calibrated, and that decoding stays lossless."""

import copy

import pytest
import torch
from paceline import generate
from paceline.spec.kernels.block_linear import BlockLinear
from paceline.spec.kernels.rotation import random_rotation
from paceline.spec.quantise.descent import descend
from paceline.spec.quantise.gptq import Hessian, gptq
from paceline.spec.quantise.model import Recipe, quantise_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from support.blocks import RECIPE, some_texts
from support.sentences import sentence


def test_the_linears_and_the_head_are_in_blocks_and_the_rest_is_as_it_was(original, quantised):
    kinds = {name: type(module) for name, module in quantised.named_modules()}
    assert nn.Linear not in kinds.values()
    assert sum(kind is BlockLinear for kind in kinds.values()) == 2 * 7 + 1
    head = quantised.lm_head.blocks
    assert head.bits == 8 and quantised.lm_head.rotation is None and quantised.model.layers[0].mlp.up_proj.rotation
    before = original.state_dict()
    for name, parameter in quantised.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert original.config.tie_word_embeddings and not quantised.config.tie_word_embeddings


@torch.no_grad()
def test_a_layer_is_calibrated_on_what_the_quantised_layers_before_it_make(original, quantised):
    """The last layer's projections, from a forward of the model whose first layer alone is quantised."""
    half = copy.deepcopy(original)
    half.model.layers[0] = quantised.model.layers[0]
    linear, hessian = half.model.layers[1].mlp.down_proj, Hessian(96)
    rotation = random_rotation(96, 96)
    linear.register_forward_pre_hook(lambda layer, args: hessian.add(rotation(args[0])))
    for text in some_texts():
        half(input_ids=torch.tensor([text]))
    weight = rotation(linear.weight.detach())
    truth = descend(weight, gptq(weight, hessian.factor(), 4, 32), hessian.damped().float())
    made = quantised.model.layers[1].mlp.down_proj
    assert (made.blocks.codes == truth.codes).float().mean() > 0.999
    assert torch.equal(made.rotation.signs, rotation.signs)


@torch.no_grad()
def test_layers_that_share_an_input_are_quantised_as_if_each_were_alone(original, quantised):
    rotation, hessian = random_rotation(64, 64), Hessian(64)
    mine, theirs = quantised.model.layers[0].self_attn, original.model.layers[0].self_attn
    hook = theirs.q_proj.register_forward_pre_hook(lambda layer, args: hessian.add(rotation(args[0])))
    for text in some_texts():
        original(input_ids=torch.tensor([text]))
    hook.remove()
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = rotation(getattr(theirs, name).weight.detach())
        truth = descend(weight, gptq(weight, hessian.factor(), 4, 32), hessian.damped().float())
        made = getattr(mine, name)
        assert (made.blocks.codes == truth.codes).float().mean() > 0.999, name
        assert torch.equal(made.bias, getattr(theirs, name).bias)


def test_the_layers_work_as_before_once_their_calls_are_recorded(original):
    model = copy.deepcopy(original)
    quantise_model(model, Recipe(8, 32, head_bits=16), some_texts(count=2))
    assert not any("forward" in vars(module) for module in model.modules())
    assert len(model(input_ids=torch.tensor([[3, 4, 5]]), output_hidden_states=True).hidden_states) == 3


def test_nearest_needs_no_texts_and_is_further_away(original, quantised):
    nearest = copy.deepcopy(original)
    quantise_model(nearest, Recipe(4, 32, method="nearest"), [])
    ids = torch.tensor(some_texts())
    truth = original(ids).logits.log_softmax(-1)
    errors = [(model(ids).logits.log_softmax(-1) - truth).square().mean() for model in (quantised, nearest)]
    assert errors[0] < errors[1]


def test_a_head_may_stay_dense_or_take_4_bits(original):
    for bits in (4, 16):
        model = copy.deepcopy(original)
        quantise_model(model, Recipe(8, 32, head_bits=bits), some_texts(count=2))
        if bits == 4:
            assert model.lm_head.blocks.bits == 4
        else:
            assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_without_linears_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    sentence(lambda: quantise_model(model, RECIPE, some_texts()), "GPT2LMHeadModel", "nn.Linear", "--group")


def texts(model, executor="eager", drafters=(None, "ngram"), **options):
    ids = torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4]])
    options = dict(max_new_tokens=24, executor=executor) | options
    return [generate(model, ids, drafter=drafter, **options).tolist() for drafter in drafters]


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "seed": 3, "top_k": 0}])
def test_drafted_text_is_the_plain_text(quantised, original, options):
    plain, drafted = texts(quantised, **options)
    assert plain == drafted
    assert plain == generate(quantised, torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4]]), max_new_tokens=24, **options).tolist()


def test_greedy_text_is_that_of_transformers(quantised):
    ids = torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4]])
    assert texts(quantised)[1] == quantised.generate(ids, do_sample=False, max_new_tokens=24).tolist()


@pytest.mark.slow
def test_compiled_steps_give_the_same_text(quantised):
    plain, drafted = texts(quantised, drafters=[None]), texts(quantised, "compiled", ["ngram"], tree="chain:3")
    assert drafted == plain
