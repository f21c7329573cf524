"""What an engine cannot run is refused in a sentence that names the value and the setting to train with."""

from functools import partial

import pytest
from formats.exporting import EAGLE3, network_of, order_to
from paceline.drafters.formats.eagle_limits import limits, sglang_ids
from paceline.drafters.formats.export_eagle import eagle_export
from paceline.spec.target.taps import HEAD
from torch import nn

from support.models import tiny_llama
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = ("vllm", "sglang", "speculators")


@pytest.fixture(scope="module")
def target():
    return tiny_llama(num_hidden_layers=6)


CASES = [
    # settings, the engines that refuse, words of the sentence
    (dict(), ALL, "wide=False"),  # our own layout: joined, with norms
    (dict(embedding_norm=True, input_norm=False, final_norm=False), ALL, "embedding_norm=True"),
    (dict(feature_norm=True, input_norm=False, final_norm=False), ALL, "feature_norm=True"),
    (dict(input_norm=False, final_norm=True), ALL, "final_norm=True"),
    (dict(input_norm=False, final_norm=False, taps=(1, 2)), ALL, "taps=[1, 2]"),
    (dict(input_norm=False, final_norm=False, fuse=True), ALL, "fuse=True"),
    (dict(input_norm=False, final_norm=False, own_head=True), ALL, "own_head=True"),
    (dict(input_norm=False, final_norm=False, own_embeddings=True), ALL, "own_embeddings=True"),
    (dict(input_norm=False, final_norm=False, layer={"model_type": "qwen3"}), ALL, "'qwen3'"),
    (dict(input_norm=False, final_norm=False, join_bias=True), ("vllm", "speculators"), "objective.layout: wide"),
    (dict(input_norm=False, final_norm=False), ("speculators",), "--to vllm"),
    (dict(EAGLE3, final_norm=False), ALL, "final_norm: true"),
    (dict(EAGLE3, tap_norms=True, fuse_norm=True), ALL, "tap_norms=True and fuse_norm=True"),
    (dict(EAGLE3, taps=(1, 2, HEAD)), ALL, "taps=[1, 2, 'head']"),
    (dict(EAGLE3, taps=(1, 2, 2)), ALL, "taps=[1, 2, 2]"),
    (dict(EAGLE3, taps=(HEAD,), fuse=True), ALL, "taps=['head']"),
    (dict(EAGLE3, taps=(HEAD,)), ("speculators",), "--to vllm"),
    (dict(EAGLE3, taps=(HEAD,), tap_norms=True), ALL, "taps=['head']"),
    (dict(EAGLE3, taps=(2,), fuse=True), ("sglang",), "several layers"),
    (dict(EAGLE3, layer={"hidden_size": 16}, own_head=True), ALL, "own_embeddings: true"),
    (dict(EAGLE3, norm_before_residual=True), ("sglang",), "norm_before_residual=True"),
    (dict(EAGLE3, layer={"model_type": "qwen3"}), ("sglang",), "model_type: llama"),
    (dict(EAGLE3, layer={"attention_bias": True}), ("sglang",), "attention_bias=True"),
    (dict(EAGLE3, layer={"mlp_bias": True}), ("sglang",), "mlp_bias=True"),
    (dict(EAGLE3, own_embeddings=True), ("sglang",), "own_embeddings: false"),
    (dict(EAGLE3, layer={"layer_types": ["sliding_attention"], "sliding_window": 9}), ALL, "see all the text"),
    (dict(EAGLE3, taps=(1, 5)), ("sglang",), "the last layer, 5"),
    (dict(EAGLE3, known=20, tap_norms=True, norm_output=True), (), ""),
]


@pytest.mark.parametrize(("settings", "engines", "words"), CASES)
def test_what_an_engine_cannot_run_is_said(target, settings, engines, words):
    network = network_of(target, **settings)
    for engine in ALL:
        sentences = list(limits(network, target, engine))
        assert bool(sentences) == (engine in engines), (engine, sentences)
        assert engine not in engines or any(words in said for said in sentences), (engine, sentences)
        order = order_to(engine, target)
        if engine in engines:
            assert sentence(partial(eagle_export, order, network), "mine cannot be run by")
        else:
            assert eagle_export(order, network).weights > 0


def test_a_head_with_a_bias_is_refused():
    target = tiny_llama(num_hidden_layers=6)
    target.lm_head = nn.Linear(32, 61)
    network = network_of(target, **EAGLE3)
    assert all("bias" in next(limits(network, target, engine)) for engine in ALL)


@pytest.mark.parametrize("engine", ["transformers", "tgi"])
def test_engines_without_eagle_are_named(target, engine):
    with pytest.raises(ValueError, match="runs no EAGLE heads; export mine --to vllm"):
        eagle_export(order_to(engine, target), network_of(target, **EAGLE3))


def test_a_folder_for_one_engine_alone_says_so(target):
    order = order_to("vllm", target)
    both = eagle_export(order, network_of(target, **EAGLE3)).notes
    alone = eagle_export(order, network_of(target, norm_before_residual=True, **EAGLE3)).notes
    assert both == () and alone[0].startswith("SGLang cannot run this folder: norm_before_residual=True")


def sglang_taps(model_type, ids):
    """The indices of `hidden_states` that SGLang 0.5.23 captures."""
    if model_type == "llama" or ids[0] == 1:
        return [number + 1 for number in ids]
    return ids


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "glm4_moe_lite"])
@pytest.mark.parametrize("ids", [[2, 16, 29], [3, 16, 29], [4, 5]])
def test_sglang_taps_the_same_layers_of_any_target(model_type, ids):
    assert sglang_taps(model_type, sglang_ids(ids, model_type)) == ids
