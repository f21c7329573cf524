"""Exported EAGLE heads have the names and configs that vLLM, SGLang and speculators read, and readers written from
their key lists and formulas compute the network's logits and features."""

import pytest
import torch
from formats.exporting import EAGLE3, LAYER, assert_same, exported, network_of, order_to
from paceline.drafters.formats.export_eagle import eagle_export
from paceline.spec.target.taps import HEAD
from transformers import AutoConfig

from support.models import tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def target():
    return tiny_llama(num_hidden_layers=6)


# Golden names and configs.

BODY = {
    "self_attn.q_proj.weight": [32, 64], "self_attn.k_proj.weight": [16, 64], "self_attn.v_proj.weight": [16, 64],
    "self_attn.o_proj.weight": [32, 32], "mlp.gate_proj.weight": [40, 32], "mlp.up_proj.weight": [40, 32],
    "mlp.down_proj.weight": [32, 40], "post_attention_layernorm.weight": [32],
}  # fmt: skip
KEYS3 = {
    **{f"layers.0.{name}": shape for name, shape in BODY.items()},
    "layers.0.input_layernorm.weight": [32], "layers.0.hidden_norm.weight": [32], "fc.weight": [32, 96],
    "norm.weight": [32], "lm_head.weight": [20, 32], "d2t": [20], "t2d": [61],
}  # fmt: skip
CONFIG3 = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 40,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "vocab_size": 61,
    "draft_vocab_size": 20, "target_hidden_size": 32, "num_aux_hidden_states": 3, "max_position_embeddings": 256,
    "rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "norm_before_residual": False, "norm_before_fc": False, "fc_norm": False, "norm_output": False,
    "eagle_aux_hidden_state_layer_ids": [2, 3, 4],
    "eagle_config": {
        "use_aux_hidden_state": True, "norm_before_fc": False, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]
    },
    "bos_token_id": 1, "torch_dtype": "float32", "dtype": "float32",
}  # fmt: skip


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_golden_list_of_an_eagle_3_head(target, tmp_path, engine):
    config, tensors = exported(network_of(target, known=20, **EAGLE3), target, engine, tmp_path)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == KEYS3
    assert config == CONFIG3
    known = tensors["d2t"] + torch.arange(20)
    assert tensors["t2d"].dtype == torch.bool and tensors["t2d"].nonzero()[:, 0].tolist() == known.tolist()
    assert (known.diff() > 0).all()


def test_the_golden_list_of_an_eagle_1_head(target, tmp_path):
    network = network_of(target, input_norm=False, final_norm=False)
    keys = {f"layers.0.{name}": shape for name, shape in BODY.items()}
    keys |= {f"layers.0.self_attn.{part}_proj.weight": [size, 32] for part, size in (("q", 32), ("k", 16), ("v", 16))}
    config, tensors = exported(network, target, "vllm", tmp_path)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {**keys, "fc.weight": [32, 64]}
    third = ("draft_vocab_size", "target_hidden_size", "num_aux_hidden_states", "norm_before_residual", "eagle_config")
    third += ("norm_before_fc", "fc_norm", "norm_output", "eagle_aux_hidden_state_layer_ids")
    common = {name: value for name, value in CONFIG3.items() if name not in third}
    assert config == {**common, "architectures": ["LlamaForCausalLM"], "bias": False}
    config, tensors = exported(network, target, "sglang", tmp_path)
    assert tensors.keys() == {*keys, "fc.weight", "fc.bias"} and not tensors["fc.bias"].any()
    # With `bias` SGLang would give attention biases.
    assert config == {**common, "architectures": ["LlamaForCausalLMEagle"], "bias": False}


def test_the_advice_counts_the_whole_head_that_an_engine_reads(target):
    """Of an EAGLE-1 head that knows a part of the vocabulary, which the engine cannot know."""
    plain, trimmed = (
        eagle_export(order_to("vllm", target), network_of(target, known=known, input_norm=False, final_norm=False))
        for known in (None, 20)
    )
    assert trimmed.weights == plain.weights


def test_the_golden_form_of_speculators(target, tmp_path):
    config, tensors = exported(network_of(target, known=20, **EAGLE3), target, "speculators", tmp_path, tokens=4)
    assert tensors.keys() == KEYS3.keys()
    assert config.pop("transformers_version")
    layer = config.pop("transformer_layer_config")
    rope = ("rope_theta", "rope_scaling")
    names = (*list(CONFIG3)[1:14], "max_position_embeddings", "rope_parameters")
    layer_of_vllm = {name: CONFIG3[name] for name in names if name not in rope}
    assert layer == {**layer_of_vllm, "num_aux_hidden_states": 3}, "where vLLM looks for the number of taps"
    assert config == {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_version": "0.9.0",
        "draft_vocab_size": 20, "norm_before_residual": False, "norm_before_fc": False, "fc_norm": False,
        "norm_output": False, "target_hidden_size": None, "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": [2, 3, 4], "dtype": "float32",
        "speculators_config": {
            "algorithm": "eagle3", "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": 4, "verifier_accept_k": 1, "accept_tolerance": 0.0}
            ],
            "verifier": {"name_or_path": "someone/target", "architectures": ["LlamaForCausalLM"]},
        },
    }  # fmt: skip


# The same logits.

LAYOUTS = {
    "eagle 3": dict(EAGLE3),
    "eagle 3, known tokens": dict(EAGLE3, known=20),
    "eagle 3.1": dict(EAGLE3, known=20, tap_norms=True, norm_output=True),
    "norm before fc": dict(EAGLE3, fuse_norm=True),
    "two taps": dict(EAGLE3, taps=(0, 4), known=33),
    "five taps out of order": dict(EAGLE3, taps=(3, 0, 4, 1, 2), tap_norms=True),
    "out of order under one norm": dict(EAGLE3, taps=(3, 0), fuse_norm=True),
    "the last hidden state": dict(wide=True, taps=(HEAD,), known=20),
    "own head": dict(EAGLE3, known=20, own_head=True),
    "two layers": dict(EAGLE3, layer={"num_hidden_layers": 2}),
    "narrower": dict(EAGLE3, layer={"hidden_size": 16}, own_embeddings=True, own_head=True, known=20),
    "one tap, narrower": dict(EAGLE3, taps=(2,), layer={"hidden_size": 16}, own_embeddings=True, own_head=True),
    "scaled rotation": dict(EAGLE3, layer={"rope_parameters": LLAMA3}),
    "eagle 1": dict(input_norm=False, final_norm=False),
    "eagle 1, two layers, known tokens": dict(
        input_norm=False, final_norm=False, known=20, layer={"num_hidden_layers": 2}
    ),
}
VLLM = {
    "norm before residual": dict(EAGLE3, norm_before_residual=True),
    "own embeddings": dict(EAGLE3, own_embeddings=True, known=20),
    "qwen3": dict(EAGLE3, layer={"model_type": "qwen3"}),
    "biased attention": dict(EAGLE3, layer={"attention_bias": True}),
    "the last layer": dict(EAGLE3, taps=(1, 5)),
    "one tap": dict(EAGLE3, taps=(2,), fuse=True),
}
SGLANG = {"joined with a bias": dict(input_norm=False, final_norm=False, join_bias=True)}
CASES = [(engine, name, layout) for engine in ("vllm", "sglang") for name, layout in LAYOUTS.items()]
CASES += [("vllm", *item) for item in VLLM.items()] + [("sglang", *item) for item in SGLANG.items()]


@pytest.mark.parametrize(
    ("engine", "layout"), [pytest.param(engine, layout, id=f"{engine} {name}") for engine, name, layout in CASES]
)
def test_an_engine_computes_the_same_logits(target, tmp_path, engine, layout):
    network = network_of(target, **layout)
    assert_same(network, target, engine, *exported(network, target, engine, tmp_path))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_tied_target_leaves_the_head_its_own_rows(tmp_path, engine):
    target = tiny_llama(num_hidden_layers=6, tie_word_embeddings=True)
    for known in (None, 20):
        network = network_of(target, known=known, **EAGLE3)
        config, tensors = exported(network, target, engine, tmp_path)
        assert config["tie_word_embeddings"] is False and len(tensors["lm_head.weight"]) == (known or 61)
        assert_same(network, target, engine, config, tensors)
        assert known or not {"d2t", "t2d"} & tensors.keys(), "vLLM has no place for them where all tokens are known"


COPIED = ("draft_vocab_size", "target_hidden_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
COPIED += ("eagle_aux_hidden_state_layer_ids",)  # by vLLM, beside the layer's config


@pytest.mark.parametrize(
    "name",
    ["eagle 3.1", "norm before residual", "two layers", "qwen3", "narrower", "two taps", "five taps out of order"],
)
def test_speculators_form_gives_vllm_the_same_logits(target, tmp_path, name):
    network = network_of(target, **{**LAYOUTS, **VLLM}[name])
    config, tensors = exported(network, target, "speculators", tmp_path)
    layer = config["transformer_layer_config"]
    rope = layer["rope_parameters"]
    ids = config["eagle_aux_hidden_state_layer_ids"]
    width = config["target_hidden_size"] or layer["hidden_size"]
    assert tensors["fc.weight"].shape[1] == width * len(ids)
    plain = {**layer, **{name: config[name] for name in COPIED}}
    plain |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "architectures": ["LlamaForCausalLMEagle3"]}
    assert_same(network, target, "vllm", plain, tensors)


@pytest.mark.parametrize("rope", [LAYER["rope_parameters"], LLAMA3], ids=["default", "llama3"])
def test_transformers_reads_the_config(target, tmp_path, rope):
    """Engines begin with that."""
    exported(network_of(target, layer={"rope_parameters": rope}, **EAGLE3), target, "vllm", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters == rope and config.head_dim == 8 and config.draft_vocab_size == 61


def test_embeddings_that_are_the_targets_are_not_stored_again(target, tmp_path):
    network = network_of(target, own_embeddings=True, **EAGLE3)
    network.embeddings.copy_(target.get_input_embeddings().weight)
    config, tensors = exported(network, target, "sglang", tmp_path)
    assert "embed_tokens.weight" not in tensors
    assert_same(network, target, "sglang", config, tensors)


def test_numbers_of_16_bits_are_stored_in_16_bits(target, tmp_path):
    rounded = tiny_llama(num_hidden_layers=6).bfloat16().float()
    network = network_of(rounded, known=20, **EAGLE3)
    for parameter in network.parameters():
        parameter.copy_(parameter.bfloat16())
    config, tensors = exported(network, rounded, "vllm", tmp_path)
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and tensors["fc.weight"].dtype == torch.bfloat16
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    assert_same(network, rounded, "vllm", config, floats)
