"""What cannot be read is refused in one sentence that names it: formats, tensors, configs, pickles, other targets."""

import json
import random

import paceline
import pytest
import torch
from formats.published import (
    INNER,
    KNOWN,
    WIDTH,
    V,
    config_of,
    drawn,
    eagle1,
    eagle3,
    layer,
    medusa,
    mlp_speculator,
    norm,
    write,
)  # fmt: skip
from paceline.drafters.eagle.folder import save_network
from safetensors.torch import load_file, save_file

from support.models import noisy_copy, random_eagle, tiny_llama
from support.sentences import sentence

OTHERS = {
    "DFlash": ({"fc.weight": norm(3), "hidden_norm.weight": norm(3), "layers.0.self_attn.q_norm.weight": norm(3)}, {}),
    "DFlash2": (
        {"candidate_selector.successor_codebook": norm(3), "fc.weight": norm(3), "hidden_norm.weight": norm(3)},
        {},
    ),
    "DSpark": ({"markov_head.markov_w1.weight": norm(3), "fc.weight": norm(3), "hidden_norm.weight": norm(3)}, {}),
    "P-EAGLE": (eagle3() | {"mask_hidden": drawn(1, 96)}, {"mask_token_id": 3}),
    "Hydra": ({"hydra_mlp.0.1.linear.weight": norm(3), "hydra_lm_head.0.1.weight": norm(3)}, {}),
    "XPress": ({"layers.0.mix_l": norm(3), "readout.weight": norm(3)}, {}),
    "MTP": ({"mtp.fc.weight": norm(3), "mtp.layers.0.self_attn.q_proj.weight": norm(3)}, {}),
    "MTP of DeepSeek": ({"model.layers.61.eh_proj.weight": norm(3), "model.layers.61.enorm.weight": norm(3)}, {}),
    "speculators' P-EAGLE": (eagle3(), {"speculators_model_type": "peagle"}),
    "speculators' DSpark": (eagle3(), {"speculators_model_type": "dspark"}),
}


@pytest.fixture(scope="module")
def eight():
    return tiny_llama(V, num_hidden_layers=8)


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_refused_by_name(target, tmp_path, name):
    tensors, config = OTHERS[name]
    folder = write(tmp_path / "it", tensors, config)
    form = name.removeprefix("speculators' ").removesuffix(" of DeepSeek")
    sentence(lambda: paceline.load_drafter(folder, target), f"has the format {form}, ", "not read yet", str(folder))


def test_a_draft_model_with_a_mask_token_is_pard(target, tmp_path):
    noisy_copy(target).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pard_token": 5}))
    sentence(lambda: paceline.load_drafter(tmp_path, target), "has the format PARD, ", "not read yet")


def test_a_whole_model_with_layers_for_several_tokens_is_a_draft_model_but_of_itself(target, tmp_path):
    noisy_copy(target).save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors") | {"mtp.fc.weight": norm(3)}, tmp_path / "model.safetensors")
    assert paceline.load_drafter(tmp_path, target).traits.kind == "draft_lm"
    itself, _ = paceline.load_target(tmp_path, with_tokenizer=False)
    sentence(lambda: paceline.load_drafter(tmp_path, itself), "has the format MTP, a target's own layers")


@pytest.mark.parametrize("form", ["MTP", "DFlash", "Hydra"])
def test_what_is_not_read_beside_a_draft_model_does_not_matter(target, tmp_path, form):
    """Layers for several tokens are kept outside of the index at times."""
    noisy_copy(target).save_pretrained(tmp_path)
    save_file(OTHERS[form][0], tmp_path / "beside.safetensors")
    assert paceline.load_drafter(tmp_path, target).traits.kind == "draft_lm"
    itself, _ = paceline.load_target(tmp_path, with_tokenizer=False)
    sentence(lambda: paceline.load_drafter(tmp_path, itself), f"has the format {form}, ")
    (tmp_path / "model.safetensors").rename(tmp_path / "another.safetensors")
    sentence(lambda: paceline.load_drafter(tmp_path, target), f"has the format {form}, ")


def test_heads_beside_a_model_are_for_models_as_wide(target, tmp_path):
    """As those of Medusa-2, which tunes the model too; beside a narrower one they are of no use to this target."""
    noisy_copy(target).save_pretrained(tmp_path / "tuned")
    tiny_llama(V, hidden_size=16).save_pretrained(tmp_path / "draft")
    for name in ("tuned", "draft"):
        save_file(medusa(), tmp_path / name / "medusa_lm_head.safetensors")
    words = "no more than by chance: it was made for another"
    sentence(lambda: paceline.load_drafter(tmp_path / "tuned", target), words)
    assert paceline.load_drafter(tmp_path / "draft", target).traits.kind == "draft_lm"


def test_a_type_of_speculators_that_is_not_known_is_named(target, tmp_path):
    folder = write(tmp_path, eagle3(), {"speculators_model_type": "oracle"})
    sentence(lambda: paceline.load_drafter(folder, target), "speculators_model_type='oracle'")


def changed(tensors, **changes):
    return {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}


LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
LONG |= {"original_max_position_embeddings": 64, "factor": 32.0}
Q, FC = "layers.0.self_attn.q_proj.weight", "fc.weight"
SECOND = {"layers.1.input_layernorm.weight": norm(WIDTH), "layers.1.hidden_norm.weight": norm(WIDTH)}
FIRST_NORM = {"layers.1.input_layernorm.weight": norm(WIDTH)}
UP, SPELT = "layers.0.mlp.up_proj.weight", "midlayer.mlp.up_proj.weight"
DAMAGED = {
    "renamed": (lambda: changed(eagle3(), **{Q: None, "layers.0.self_attn.query.weight": drawn(32, 64)}), {},
                f"lacks the tensor '{Q}' and has 'layers.0.self_attn.query.weight'"),
    "renamed, in the reference's spelling": (
        lambda: changed(eagle3("midlayer."), **{SPELT: None, "midlayer.mlp.up.weight": norm(3)}),
        {}, "lacks the tensor 'midlayer.mlp.up_proj.weight'"),
    "unknown": (lambda: eagle3() | {"gate.weight": norm(3)}, {}, "has a tensor 'gate.weight', which layers of"),
    "other attention": (lambda: eagle3() | {"layers.0.self_attn.kv_a_proj_with_mqa.weight": drawn(9, 9)}, {},
                        "'layers.0.self_attn.kv_a_proj_with_mqa.weight', which layers of Llama and Qwen3 have no"),
    "no fc": (lambda: changed(eagle3(), **{FC: None}), {}, "lacks the tensor 'fc.weight'"),
    "no norm": (lambda: changed(eagle3(), **{"norm.weight": None}), {}, "lacks the tensor 'norm.weight'"),
    "no hidden norm": (lambda: changed(eagle3(), **{"layers.0.hidden_norm.weight": None}), {},
                       "lacks the tensor 'layers.0.hidden_norm.weight'"),
    "no down": (lambda: changed(eagle1(), **{"layers.0.mlp.down_proj.weight": None}), {},
                "lacks the tensor 'layers.0.mlp.down_proj.weight'"),
    "declared norms": (eagle3, {"fc_norm": True}, "lacks the tensor 'fc_norm.0.weight'"),
    "declared input norm": (eagle3, {"norm_before_fc": True}, "lacks the tensor 'input_norm.weight'"),
    "shape": (lambda: changed(eagle3(), **{UP: drawn(INNER, 31)}), {},
              f"'{UP}' has shape [40, 31] and the others ask for [40, 32]"),
    "no matrix": (lambda: changed(eagle3(), **{Q: norm(64)}), {}, f"tensor '{Q}' has shape [64]"),
    "nothing in it": (lambda: changed(eagle3(), **{Q: torch.zeros(0, 64)}), {}, f"tensor '{Q}' has shape [0, 64]"),
    "whole numbers": (lambda: changed(eagle3(), **{Q: torch.ones(32, 64, dtype=torch.int64)}), {},
                      f"tensor '{Q}' holds int64 and no weights"),
    "nan": (lambda: changed(eagle3(), **{Q: drawn(32, 64) * float("nan")}), {}, f"tensor '{Q}' holds NaN"),
    "few bits": (lambda: changed(eagle3(), **{Q: drawn(32, 64).to(torch.float8_e4m3fn)}), {},
                 f"tensor '{Q}' is stored as float8_e4m3fn"),
    "no d2t": (lambda: changed(eagle3(), d2t=None), {}, "24 tokens and the target 61, and without the tensor 'd2t'"),
    "d2t of another length": (lambda: changed(eagle3(), d2t=torch.arange(5)), {}, "lists 5 tokens and the head has 24"),
    "d2t twice": (lambda: changed(eagle3(), d2t=-torch.arange(KNOWN)), {}, "'d2t' lists a token twice"),
    "d2t of floats": (lambda: changed(eagle3(), d2t=torch.rand(KNOWN)), {}, "'d2t' holds no offsets"),
    "twice": (lambda: eagle3() | {"model.norm.weight": norm(WIDTH)}, {},
              "tensors 'model.norm.weight' and 'norm.weight' are the same one by their names"),
    "two norms": (lambda: eagle3() | layer("layers.1.", WIDTH) | SECOND, {},
        "'layers.1.hidden_norm.weight' and 'layers.1.input_layernorm.weight' differ"),
    "tokens beyond": (lambda: changed(eagle3(), d2t=torch.arange(KNOWN) + 99), {}, "another target: it drafts token"),
    "tokens below": (lambda: changed(eagle3(), d2t=torch.arange(KNOWN) - 9), {}, "drafts token -9 and this target"),
    "a longer head": (lambda: eagle3(known=70), {}, "another target: it drafts 70 tokens and this target has 61"),
    "embeddings": (lambda: eagle3() | {"embed_tokens.weight": drawn(90, WIDTH)}, {"base_model_name_or_path": "a/b"},
                        "made for another target (a/b): it embeds 90 tokens and this target has 61"),
    "another width": (lambda: eagle3(width=48, heads=6, groups=3), {"num_attention_heads": 6, "num_key_value_heads": 3},
                      "made for another target: it reads embeddings of 48 numbers and this target's have 32"),
    "other states": (lambda: changed(eagle3(), **{FC: drawn(WIDTH, 100)}), {},
                     "made for another target: it reads states of 100 numbers, no multiple of this target's 32"),
    "another width, eagle-1": (lambda: layer("layers.0.", 48, 48, 6, 3) | {FC: drawn(48, 96)}, {"head_dim": 8},
                               "it has a tensor 'fc.weight' of shape [48, 96], and this target's embeddings and"),
    "another width, no head": (
        lambda: changed(eagle3(width=48, heads=6, groups=3, known=V), **{"lm_head.weight": None}), {"head_dim": 8},
        "it is 48 wide without an LM head, and this target's takes 32"),
    "ids beyond": (eagle3, {"eagle_aux_hidden_state_layer_ids": [20, 40, 77]}, None),
    "rope base": (eagle3, {"rope_theta": "10000"}, "its config says rope_theta='10000'"),
    "rope type": (eagle3, {"rope_scaling": {"type": "spiral"}}, "rope_type='spiral', which transformers does not know"),
    "rope without numbers": (eagle3, {"rope_scaling": {"rope_type": "llama3"}}, "no network can be made of its config"),
    "a part of each head": (eagle3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, and layers of Llama"),
    "a part, in the rope": (eagle3, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
                            "partial_rotary_factor=0.25, and layers of Llama and Qwen3 turn whole heads"),
    "long rope": (eagle3, {"rope_scaling": {**LONG, "long_factor": [1.0] * 3}}, "turn no attention heads of these"),
    "short rope": (eagle3, {"rope_scaling": {**LONG, "short_factor": [1.0] * 5}}, "turn no attention heads of these"),
    "window": (eagle3, {"layer_types": ["sliding_attention"]}, "sliding_window=None, and use_sliding_window=None, and"),
    "window unused": (eagle3, {"layer_types": ["sliding_attention"], "sliding_window": 9, "use_sliding_window": False},
                      "sliding_window=9, and use_sliding_window=False, and it has layers of sliding_attention"),
    "chunks": (eagle3, {"layer_types": ["chunked_attention"]}, "layer_types=['chunked_attention'], which are not full"),
    "types": (eagle3, {"layer_types": "full_attention"}, "layer_types='full_attention', which are not full_attention"),
    "types of too few": (lambda: eagle3() | layer("layers.1.", WIDTH) | FIRST_NORM, {"layer_types": ["full_attention"]},
                         "or sliding_attention for 2 layers"),
    "eps": (eagle3, {"rms_norm_eps": "small"}, "rms_norm_eps='small'"),
    "act": (eagle3, {"hidden_act": "sigh"}, "hidden_act='sigh'"),
    "ids": (eagle3, {"eagle_aux_hidden_state_layer_ids": "2,4,7"}, "layer_ids='2,4,7'"),
    "flag": (eagle3, {"norm_before_residual": "yes"}, "norm_before_residual='yes', which is neither true nor false"),
    "heads": (eagle3, {"num_attention_heads": 5, "num_key_value_heads": None}, "no whole number of attention heads"),
    "no heads": (eagle3, {"num_attention_heads": None, "num_key_value_heads": None}, "num_attention_heads is None"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_does_not_fit_is_named(eight, tmp_path, case):
    make, config, words = DAMAGED[case]
    folder = write(tmp_path / "head", make(), config_of(**{"eagle_config": None, **config}))
    sentence(lambda: paceline.load_drafter(folder, eight), words or "no more than by chance", str(folder))


def test_heads_for_a_target_without_an_lm_head(target, tmp_path):
    headless = tiny_llama(V)
    headless.get_output_embeddings = lambda: None
    for name, tensors in (("eagle", eagle3()), ("medusa", medusa()), ("mlp", mlp_speculator())):
        folder = write(tmp_path / name, tensors, config_of(n_predict=3))
        sentence(lambda folder=folder: paceline.load_drafter(folder, headless), "has no linear LM head")
    save_network(random_eagle(target), tmp_path / "ours")
    folder = tmp_path / "ours"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "paceline_target": None}))
    sentence(lambda: paceline.load_drafter(folder, headless), "has no linear LM head")


def test_a_target_of_fewer_layers_than_a_head_reads(tmp_path):
    folder = write(tmp_path, eagle3(taps=5), config_of(target_layer_ids=[1, 9, 17, 25, 33]))
    words = "names layers [2, 10, 18, 26, 34], and this target has 2"
    sentence(lambda: paceline.load_drafter(folder, tiny_llama(V)), words)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", "{", "config.json is no JSON file"),
        ("config.json", "[]", "config.json holds no JSON object"),
        ("model.safetensors", "x" * 40, "model.safetensors cannot be read"),
        ("model.safetensors.index.json", "[]", "index.json is no index of weights"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../a.safetensors"}}', "it names files elsewhere"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "a.safetensors"}}', "a.safetensors cannot be read"),
    ],
)
def test_damaged_files_are_named(target, tmp_path, file, content, words):
    write(tmp_path, eagle3(), config_of())
    (tmp_path / file).write_text(content)
    sentence(lambda: paceline.load_drafter(tmp_path, target), words)


def test_a_config_is_not_needed_to_know_the_format(target, tmp_path):
    sentence(lambda: paceline.load_drafter(write(tmp_path, eagle3(), None), target), "num_attention_heads is None")


VALUES = [
    None, 0, -1, 1, 3, 2.5, 1e300, float("nan"), "", "x", True, [], [1, 2, 3], ["a"], {}, {"rope_theta": []},
    {"rope_type": 4}, {"rope_type": "yarn"}, {"full_attention": 3}, [None], [[1, 2, 3]], "eagle3", "mlp_speculator",
]  # fmt: skip
FIELDS = [
    *config_of(), "rope_theta", "rope_scaling", "rope_parameters", "eagle_aux_hidden_state_layer_ids", "eagle_config",
    "target_layer_ids", "head_dim", "norm_before_residual", "fc_norm", "norm_output", "norm_before_fc",
    "attention_bias", "transformer_layer_config", "speculators_model_type", "speculators_config", "draft_vocab_size",
    "n_predict", "target_hidden_size", "base_model_name_or_path", "medusa_num_heads", "pard_token", "scale_input",
]  # fmt: skip


def test_damage_never_ends_in_a_traceback(tmp_path, capsys):
    """300 files with random damage to config and tensors are loaded, or refused in one sentence."""
    target, chance, refused = tiny_llama(V, num_hidden_layers=4), random.Random(0), 0
    makes = [eagle1, eagle3, lambda: eagle3("midlayer.", "model."), medusa, lambda: medusa(engine=True), mlp_speculator]
    torch.manual_seed(0)
    for trial in range(300):
        tensors, config = chance.choice(makes)(), config_of()
        for _ in range(chance.randrange(3)):
            config[chance.choice(FIELDS)] = chance.choice(VALUES)
        for _ in range(chance.randrange(1, 3)):
            name = chance.choice(sorted(tensors))
            change = chance.randrange(6)
            tensor = tensors.pop(name) if change < 5 else tensors[name]
            if change == 1:
                tensors[name + chance.choice([".x", "s", ".weight"])] = tensor
            elif change == 2:
                tensors[name] = tensor[:-1]
            elif change == 3:
                tensors[name] = tensor[None]
            elif change == 4:
                tensors[name] = tensor.to(chance.choice([torch.int32, torch.bool, torch.float16, torch.float64]))
            elif change == 5:
                tensors[chance.choice(["layers.7.x", "0.9.weight", "fc.weight", "d2t", "norm.bias"])] = drawn(3)
            if not tensors:
                break
        folder = write(tmp_path / str(trial), tensors, config)
        try:
            paceline.load_drafter(folder, target)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, error
            refused += 1
    assert refused > 290
