"""Every published layout of EAGLE gives the logits of a slow reference, with every spelling of its config."""

import pytest
import torch
from formats.published import INNER, KNOWN, WIDTH, Reference, V, config_of, drawn, eagle1, eagle3, layer, norm, write
from paceline.drafters.formats.checkpoint import open_checkpoints
from paceline.drafters.formats.detect import detect
from paceline.drafters.formats.eagle import EagleFile
from paceline.drafters.formats.eagle_config import EagleConfig
from paceline.spec.target.taps import joined, listening, put_taps

from support.models import tiny_llama

ROPE = {"rope_type": "default", "rope_theta": 500.0}
DEFAULT = [2, 4, 5]


@pytest.fixture(scope="module")
def target():
    return tiny_llama(V, num_hidden_layers=8)


def deepspec():
    tensors = eagle3("layers.0.", taps=5, known=V)
    norms = {f"layers.0.self_attn.{name}_norm.weight": norm(8) for name in "qk"}
    return tensors | norms | {"embed_tokens.weight": drawn(V, WIDTH, scale=1.0)}


def two_layers():
    second = layer("layers.1.", WIDTH) | {"layers.1.input_layernorm.weight": norm(WIDTH)}
    return eagle3() | second


def twice_named():
    tensors = two_layers()
    return tensors | {"layers.1.hidden_norm.weight": tensors["layers.1.input_layernorm.weight"].clone()}


def second_by_other_name():
    tensors = two_layers()
    tensors["layers.1.hidden_norm.weight"] = tensors.pop("layers.1.input_layernorm.weight")
    return tensors


def other_width():
    return eagle3(width=48, heads=6, groups=3, known=V) | {"embed_tokens.weight": drawn(V, 48, scale=1.0)}


def unsorted():
    """The reference writes its ids in order; nothing says that others do."""
    tensors = eagle3()
    order = torch.randperm(KNOWN)
    ids = (tensors["d2t"] + torch.arange(KNOWN))[order]
    return tensors | {"d2t": ids - torch.arange(KNOWN)}


def of_qwen2():
    return eagle1() | {f"layers.0.self_attn.{name}_proj.bias": drawn(rows) for name, rows in zip("qkv", (32, 16, 16))}


def speculators_eagle1():
    plain = {name.replace("layers.0.", "transformer.").replace("fc.", "fusion_fc."): t for name, t in eagle1().items()}
    names = ("embedding_layernorm", "transformer.input_layernorm", "pre_lm_head_layernorm")
    return plain | {f"{name}.weight": norm(WIDTH) for name in names}


def nested(inner=(), **outer):
    inner = config_of(rope_parameters=ROPE, architectures=None, **dict(inner))
    return {"speculators_model_type": "eagle3", "transformer_layer_config": inner, "target_hidden_size": None, **outer}


IDS, EAGLE_1 = "eagle_aux_hidden_state_layer_ids", dict(ids=None)
WINDOW = dict(use_sliding_window=True, sliding_window=4)
OTHER_BASE = dict(ids=None, base=500.0)
# name: tensors, config, and what the reference is told of it
LAYOUTS = {
    "eagle-1": (eagle1, config_of(bias=False), EAGLE_1),
    "eagle-1 with a bias": (lambda: eagle1("model.", bias=True), config_of(rope_theta=500.0), OTHER_BASE),
    "eagle-1 with embeddings": (lambda: eagle1() | {"embed_tokens.weight": drawn(V, WIDTH)}, config_of(), EAGLE_1),
    "eagle-2 of qwen2": (of_qwen2, config_of(model_type="qwen2"), EAGLE_1),
    "speculators eagle-1": (speculators_eagle1, {**nested(), "speculators_model_type": "eagle"}, OTHER_BASE),
    "reference": (lambda: eagle3("midlayer."), config_of(draft_vocab_size=KNOWN), {}),
    "specforge": (lambda: eagle3("midlayer.", "model."), config_of(rope_scaling={"rope_theta": 50.0}), dict(base=50.0)),
    "modelopt": (eagle3, config_of(eagle_config={IDS: [0, 2, 6], "use_aux_hidden_state": True}), dict(ids=[1, 3, 7])),
    "top level": (eagle3, config_of(**{IDS: [1, 3, 8]}, rope_parameters=ROPE), dict(ids=[1, 3, 8], base=500.0)),
    "angelslim": (eagle3, config_of(head_dim=16, num_hidden_layers=36), {}),
    "only head_dim": (eagle3, config_of(head_dim=8, num_attention_heads=None, num_key_value_heads=None), {}),
    "deepspec": (deepspec, config_of(target_layer_ids=[0, 1, 3, 5, 6], model_type="qwen3"), dict(ids=[1, 2, 4, 6, 7])),
    "deepspec without ids": (deepspec, config_of(), dict(ids=[2, 3, 4, 5, 6])),
    "speculators": (eagle3, nested(norm_before_residual=True, **{IDS: [2, 3, 6]}),
                    dict(ids=[2, 3, 6], base=500.0, residual_normed=True)),
    "speculators with a window": (eagle3, nested(WINDOW | dict(layer_types=["sliding_attention"])),
                                  dict(base=500.0, window=4)),
    "a window of layers beyond": (eagle3, config_of(**WINDOW, max_window_layers=28), {}),
    "a window without layers": (eagle3, config_of(**WINDOW), dict(window=4)),
    "layers of the target": (eagle3, config_of(layer_types=["full_attention", "other"], sliding_window=4), {}),
    "3.1": (lambda: eagle3() | {f"fc_norm.{i}.weight": norm(WIDTH) for i in range(3)},
            config_of(fc_norm=True, norm_output=True), dict(output_normed=True)),
    "before 3.1": (lambda: eagle3() | {f"aux_norm_{i}.weight": norm(WIDTH) for i in ("low", "mid", "high")},
                   config_of(use_aux_norm=True), {}),
    "norm before fc": (lambda: eagle3() | {"input_norm.weight": norm(3 * WIDTH)},
                       config_of(eagle_config={"norm_before_fc": True}), {}),
    "one feature": (lambda: eagle3(taps=0), config_of(eagle_config={"use_aux_hidden_state": False}), EAGLE_1),
    "one mapped feature": (lambda: eagle3(taps=1), config_of(), dict(ids=[8])),
    "two layers": (two_layers, config_of(), {}),
    "two layers, one norm twice": (twice_named, config_of(), {}),
    "two layers, the other norm": (second_by_other_name, config_of(), {}),
    "another width": (other_width, config_of(num_attention_heads=6, num_key_value_heads=3), {}),
    "unsorted ids": (unsorted, config_of(), {}),
    "ids of the target's head": (lambda: {name: t for name, t in eagle3().items() if name != "lm_head.weight"},
                                 config_of(), {}),
}  # fmt: skip


def read(folder, target):
    (checkpoint,) = open_checkpoints(folder)
    assert detect(checkpoint.config(), checkpoint.files) == "EAGLE"
    return EagleFile(checkpoint, target).network()[0]


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_and_fed_back_features_are_the_references(name, target, tmp_path):
    torch.manual_seed(len(name))
    make, config, told = LAYOUTS[name]
    tensors = make()
    network = read(write(tmp_path / "head", tensors, config), target)
    text, drafted = torch.randint(1, V, (12,)), torch.randint(1, V, (1,))
    reference = Reference(tensors, target, **{"ids": DEFAULT, **told})
    if name.startswith("ids of"):
        ids = tensors["d2t"] + torch.arange(KNOWN)
        reference.t["lm_head.weight"] = target.lm_head.weight[ids]
    features, tokens = reference.features(text)[:-1], text[1:]
    logits, fed_back = reference(features, tokens)
    later, _ = reference(torch.cat([features, fed_back[-1:]]), torch.cat([tokens, drafted]))

    put_taps(target, network.settings.taps)
    put_taps(network, (network.feedback,))
    with listening() as heard:
        target(text[None])
    mine = network.fused(joined(heard, network.settings.taps))[:, :-1]
    places = torch.arange(12)[None]
    with listening() as heard:
        drawn_logits = network(tokens[None], mine, places[:, :-1]).logits
    fed = torch.cat([mine, heard[network.feedback][:, -1:]], dim=1)
    chained = network(torch.cat([tokens, drafted])[None], fed, places).logits

    known = torch.arange(V)
    if "d2t" in tensors:
        known = tensors["d2t"] + torch.arange(KNOWN)
    for got, wanted in ((drawn_logits, logits), (chained, later)):
        everywhere = torch.full((wanted.shape[0], V), -1e9).index_copy(1, known, wanted)
        torch.testing.assert_close(got[0], everywhere[:, network.vocabulary], atol=1e-5, rtol=1e-5)


def test_copies_of_the_targets_weights_are_not_kept(target, tmp_path):
    """DeepSpec and vLLM store embeddings and heads that are the target's."""
    copies = {"embed_tokens": target.model.embed_tokens, "lm_head": target.lm_head}
    tensors = deepspec() | {f"{name}.weight": module.weight.detach() for name, module in copies.items()}
    network = read(write(tmp_path, tensors, config_of()), target)
    assert not network.settings.own_embeddings and not network.settings.own_head
    assert network.lm_head.weight.data_ptr() == target.lm_head.weight.data_ptr()
    assert network.embeddings.data_ptr() == target.model.embed_tokens.weight.data_ptr()


def test_adopting_is_as_making_anew(target, tmp_path):
    from dataclasses import replace

    network = read(write(tmp_path, eagle3(), config_of()), target)
    others = replace(
        network.settings, taps=(0, 2, 6), norm_before_residual=True,
        layer={**network.settings.layer, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    )  # fmt: skip
    anew = type(network)(others, target, network.vocabulary)
    anew.load_state_dict(network.state_dict())
    features, tokens = torch.randn(1, 9, 3 * WIDTH), torch.randint(0, V, (1, 9))
    before = network(tokens, network.fused(features), torch.arange(9)[None]).logits
    network.adopt(others)
    assert network.settings == others and network.config.to_dict() == anew.config.to_dict()
    after, made = (net(tokens, net.fused(features), torch.arange(9)[None]).logits for net in (network, anew))
    assert torch.equal(after, made) and not torch.allclose(after, before)


LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SPELLINGS = [
    {"rope_theta": 500, "rope_scaling": LLAMA_3},
    {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA_3}, "rope_parameters": None},
    {"rope_parameters": {"rope_theta": 500.0, **LLAMA_3}, "rope_theta": 7.0},
    {"rope_scaling": {"rope_theta": 500.0, **LLAMA_3}},
    {"rope_parameters": {"full_attention": {"rope_theta": 500.0, **LLAMA_3}}},
    {"transformer_layer_config": {"rope_parameters": {"rope_theta": 500.0, **LLAMA_3}}, "rope_theta": 7.0},
]


@pytest.mark.parametrize("config", SPELLINGS)
def test_rotary_frequencies_have_many_spellings(config, target, tmp_path):
    expected = {**LLAMA_3, "rope_theta": 500.0}
    assert {name: value for name, value in EagleConfig(config, "x").rope().items() if name != "type"} == expected
    sizes = config.get("transformer_layer_config", config) | config_of()
    nested = {"transformer_layer_config": sizes} if "transformer_layer_config" in config else {}
    network = read(write(tmp_path, eagle3(), {**config, **config_of(), **nested}), target)
    model = tiny_llama(V, rope_parameters=expected)
    assert torch.equal(network.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_frequencies_are_plain_where_nothing_is_said():
    for config in (
        {},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"type": "mrope"}},
    ):
        assert EagleConfig(config, "x").rope() == {"rope_type": "default", "rope_theta": 10000.0}


def test_sizes_come_from_the_tensors(target, tmp_path):
    wrong = config_of(
        hidden_size=4096, intermediate_size=7, num_hidden_layers=40, vocab_size=5, draft_vocab_size=9,
        target_hidden_size=None, num_aux_hidden_states=5, tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    network = read(write(tmp_path, eagle3(), wrong), target)
    assert len(network.vocabulary) == KNOWN and len(network.layers) == 1 and network.config.intermediate_size == INNER
