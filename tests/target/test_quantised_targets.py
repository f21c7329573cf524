"""Targets whose weights are in blocks: the promises hold for them, and all that reads weights can read theirs."""

import copy

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.known_tokens import trimmed_head
from paceline.drafters.medusa import MedusaDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines.module_state import fingerprint, structure
from paceline.spec.kernels.block_linear import BlockLinear
from paceline.spec.plan.store import plan_path
from paceline.spec.provenance import target_fingerprint
from paceline.spec.target.selftest import self_test
from paceline.spec.target.taps import HEAD, feature_sizes, linear_head
from paceline.spec.target.weights import (
    Weights,
    dense_rows,
    dense_weight,
    head_rows,
    head_weight,
    parameter_count,
    refuse_saving,
    stored_bytes,
    weights_form,
)
from paceline.training.objectives.draft_network import from_layers

from support.blocks import dense_copy, in_blocks
from support.models import fitted_heads, noisy_copy, tiny_llama
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied"])
def pair(request):
    """A dense model and the same in blocks, with the same numbers."""
    model = tiny_llama(tie_word_embeddings=request.param)
    blocks = in_blocks(model)
    return dense_copy(model, blocks), blocks


@pytest.fixture(scope="module")
def drafters(pair):
    dense, blocks = pair
    heads = fitted_heads(blocks, "hydra", known=40)
    return {
        "none": None,
        "ngram": NgramDrafter(),
        "model": ModelDrafter(noisy_copy(dense)),
        "itself in blocks": ModelDrafter(copy.deepcopy(blocks)),
        "hydra": MedusaDrafter(heads),
    }


@pytest.mark.parametrize("which", ["none", "ngram", "model", "itself in blocks", "hydra"])
@pytest.mark.parametrize("sampled", [False, True])
def test_drafted_text_is_plain_text(pair, drafters, ragged, which, sampled):
    _, blocks = pair
    options = dict(max_new_tokens=24, seed=5, do_sample=sampled, return_dict_in_generate=True)
    plain = paceline.generate(blocks, *ragged, **options)
    if not sampled:
        theirs = blocks.generate(ragged[0], attention_mask=ragged[1], max_new_tokens=24, do_sample=False)
        assert torch.equal(plain.sequences, theirs)
    for tree in ("chain:3", "3x2x1") if which != "none" else (None,):
        drafted = paceline.generate(blocks, *ragged, drafter=drafters[which], tree=tree, **options)
        assert torch.equal(plain.sequences, drafted.sequences), tree
        accepted = drafted.trace.summary()["num_accepted_draft_tokens"]
        assert accepted > 0 or which == "none" or (which == "ngram" and sampled)


def test_it_is_the_dense_model(pair, ragged):
    dense, blocks = pair
    assert torch.allclose(dense(ragged[0]).logits, blocks(ragged[0]).logits, atol=1e-4)
    assert self_test(blocks) < 1e-4
    assert target_fingerprint(blocks) == target_fingerprint(dense), "drafters for one are for the other"
    assert feature_sizes(blocks, [HEAD]) == [32] and isinstance(linear_head(blocks), BlockLinear)


def test_the_head_can_be_read(pair):
    dense, blocks = pair
    theirs = dense.get_output_embeddings().weight
    ids = torch.tensor([3, 17, 60])
    assert torch.equal(head_weight(blocks), theirs)
    assert torch.equal(head_rows(blocks, ids), theirs[ids])
    assert torch.equal(dense_rows(blocks.get_output_embeddings(), ids), theirs[ids])
    assert torch.equal(trimmed_head(blocks.get_output_embeddings(), ids, torch.bfloat16).weight, theirs[ids].bfloat16())
    if blocks.config.tie_word_embeddings:
        assert head_weight(blocks).data_ptr() == blocks.get_input_embeddings().weight.data_ptr()


def test_a_draft_can_be_made_of_its_layers(pair, ragged):
    dense, blocks = pair
    theirs, made = from_layers(dense, [1]), from_layers(blocks, [1])
    assert torch.equal(theirs(ragged[0]).logits, made(ragged[0]).logits)


def test_plans_and_compiled_steps_tell_the_forms_apart(pair):
    dense, blocks = pair
    rounded = in_blocks(dense, int8_activations=True)
    forms = [dense, blocks, rounded]
    assert len({plan_path(model, NgramDrafter(), "eager", "match", 0.0) for model in forms}) == 3
    assert len({fingerprint([model]) for model in forms}) == 3
    assert len(set(map(structure, forms))) == 3
    assert weights_form(dense) == "" and weights_form(blocks) == "15 of 4 bits by 16"
    assert fingerprint([blocks]) == fingerprint([in_blocks(dense)]) == fingerprint([copy.deepcopy(blocks)])
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] += 1.0
    assert fingerprint([in_blocks(other)]) != fingerprint([blocks])


def test_bytes_are_those_of_the_blocks():
    dense = tiny_llama()
    model = in_blocks(dense)
    assert 0.2 * stored_bytes(dense) < stored_bytes(model) < 0.45 * stored_bytes(dense)
    assert parameter_count(model) == parameter_count(dense)
    assert dense_weight(model.get_submodule("model.layers.0.mlp.down_proj")).shape == (32, 48)


def test_saving_is_refused(pair, tmp_path):
    model = copy.deepcopy(pair[1])
    refuse_saving(model)
    sentence(lambda: model.save_pretrained(tmp_path / "model"), "weights in blocks", "weights='16'")
    assert not (tmp_path / "model").exists()


def test_unknown_weights_are_refused():
    sentence(lambda: Weights("q3"), "weights='q3' is none of 16, q4, q8, q4-int8, q8-int8")
