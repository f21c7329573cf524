"""Every published layout computes its formulas, through slots, in chunks, in chains and trees."""

from dataclasses import replace

import pytest
import torch
from eagle.by_hand import TEXTS, opened
from eagle.slow import SlowEagle
from paceline.drafters.eagle.drafter import EagleDrafter
from paceline.drafters.eagle.network import EagleNetwork
from paceline.drafters.eagle.settings import EagleSettings
from paceline.spec.proposal import DraftRequest, DraftSampling
from paceline.spec.tree import TreeShape

from support.models import eagle_features, random_eagle, tiny_llama
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")
KNOWN = torch.arange(4, 50)
SLIDING = "sliding_attention"
WIDE = dict(wide=True, taps=(0, 1, 2))
CASES = {
    "EAGLE-1": dict(input_norm=False, final_norm=False, join_bias=True),
    "EAGLE-1 of two layers": dict(layer=dict(num_hidden_layers=2), input_norm=False, final_norm=False),
    "EAGLE-3": WIDE | dict(own_head=True, known=KNOWN, layer=dict(rope_parameters={"rope_theta": 500.0})),
    "EAGLE-3 of one feature": dict(wide=True, norm_before_residual=True),
    "EAGLE-3.1": WIDE | dict(tap_norms=True, norm_output=True, norm_before_residual=True, known=KNOWN),
    "norm before fc": WIDE | dict(fuse_norm=True, norm_before_residual=True),
    "two wide layers": WIDE | dict(layer=dict(num_hidden_layers=2), norm_output=True),
    "q/k norms": WIDE | dict(layer=dict(model_type="qwen3", head_dim=8), taps=(0, 2, "head")),
    "a window": WIDE | dict(layer=dict(layer_types=[SLIDING], sliding_window=4)),
    "a window in one of two layers, q/k norms": WIDE | dict(
        layer=dict(model_type="qwen3", head_dim=8, num_hidden_layers=2, layer_types=["full_attention", SLIDING])
        | dict(use_sliding_window=True, sliding_window=3),
    ),
    "EAGLE-1 with a window": dict(layer=dict(layer_types=[SLIDING], sliding_window=2), input_norm=False),
    "another width": WIDE | dict(layer=dict(hidden_size=16), own_embeddings=True, own_head=True, known=KNOWN),
    "ours": dict(embedding_norm=True, feature_norm=True, norm_output=True, known=KNOWN),
    "ours of two layers": dict(
        embedding_norm=True, feature_norm=True, norm_output=True, layer=dict(num_hidden_layers=2), taps=(1, "head")
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=4, seed=3)


def reading(model, drafter, tree):
    """An engine that has read ragged prompts in chunks, and whose drafts are drawn with their logits."""
    engine, shape = opened(model, drafter, tree), TreeShape.parse(tree)
    drawing = DraftSampling("own")
    asked = DraftRequest(len(TEXTS), 64, 61, torch.device("cpu"), shape, drawing, model)
    engine = replace(engine, session=drafter.open(asked))
    with torch.no_grad():
        engine.read(chunk=3)
    return engine


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_of_chains_and_trees_are_those_of_the_formulas(model, case):
    network = random_eagle(model, **CASES[case])
    slow, known = SlowEagle(network, model), network.vocabulary
    for tree in ("chain:3", "2x2x1"):
        engine = reading(model, EagleDrafter(network), tree)
        proposal = engine.session.propose(engine.state)
        shape = TreeShape.parse(tree)
        for row, text in enumerate(TEXTS):
            logits = proposal.draft_logits[row][:, known]
            assert logits.isfinite().all(), "also of a text of one token, which has no pair"
            if len(text) == 1:
                continue
            true = eagle_features(model, network.settings.taps, torch.tensor([text[:-1]]))[0]
            pairs, made = [(slow.fused(feature), token) for feature, token in zip(true, text[1:])], {}
            for node, children in enumerate(shape.children):
                if children:
                    path = [int(at) for at in proposal.tree.paths[0, node, 1 : shape.depths[node] + 1]]
                    behind = [(made[above], int(proposal.tokens[row, at])) for above, at in zip([0, *path], path)]
                    expected, made[node] = slow.last([*pairs, *behind])
                    torch.testing.assert_close(logits[node], expected.float(), atol=1e-5, rtol=1e-5)


def test_frequencies_keep_their_precision(model):
    network = random_eagle(model)
    frequencies = network.rotary_emb.inv_freq.clone()
    network.to(torch.bfloat16)
    assert network.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert torch.equal(network.rotary_emb.inv_freq, frequencies)


def test_the_targets_parts_are_on_its_memory(model):
    network = random_eagle(model)
    assert network.shares_head and network.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert network.embeddings.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert not {"embeddings", "lm_head.weight", "vocabulary"} & network.stored().keys()
    trimmed = random_eagle(model, known=KNOWN)
    assert not trimmed.shares_head and torch.equal(trimmed.lm_head.weight, model.lm_head.weight[KNOWN])


def test_settings_that_make_no_network_are_refused(model):
    layer = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4}
    sentence(lambda: EagleSettings({"model_type": "gpt2"}), "layer.model_type='gpt2'", "llama, qwen3")
    sentence(lambda: EagleSettings(layer, taps=()), "taps=[]")
    sentence(lambda: EagleSettings(layer, norm_output=True, final_norm=False), "set final_norm")
    sentence(lambda: EagleSettings(layer, wide=True, feature_norm=True), "wide layers")
    sentence(lambda: EagleSettings(layer, norm_before_residual=True), "for wide layers")
    for types in ([SLIDING], ["chunked_attention"], [SLIDING] * 2):
        described = EagleSettings({**layer, "num_hidden_layers": 1, "layer_types": types})
        sentence(lambda described=described: EagleNetwork(described, model), "make no decoder layer", "layer_types")
    window = random_eagle(model, layer=dict(layer_types=[SLIDING], sliding_window=4))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    text = torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, 32), torch.arange(3)[None]
    sentence(lambda: window(*text, attention_mask=mask), "train without it")
    sentence(lambda: EagleNetwork(EagleSettings(layer), model), "hidden_size=16 is not the target's 32", "own_head")
