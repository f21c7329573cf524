"""Small draft models: where their layers come from, what they share with the target, how they are saved."""

import json

import paceline
import pytest
import torch
from paceline.drafters.complete import complete
from paceline.training.objectives.draft_network import from_layers
from paceline.training.objectives.target import OnlineTarget
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.draft_lms import SIZES, build
from support.families import STATEFUL, tiny
from support.families import build as build_target
from support.models import tiny_llama


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}),
        ("gemma3_text", {"layer_types": [*["sliding_attention"] * 2, "full_attention"], "sliding_window": 4}),
        ("gpt_neox", {}),
        ("gpt2", {"n_embd": 32, "n_head": 4}),
        ("mixtral", {"num_local_experts": 3}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ],
)  # fmt: skip
def test_layers_are_taken_from_any_plain_stack(family, options):
    """All layers give the target itself; a choice gives what the target gives when the others pass their input on."""
    model = tiny(family, **{"num_hidden_layers": 3, **options})
    ids = torch.randint(3, 61, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(from_layers(model, [0, 1, 2]).eval()(ids).logits, model(ids).logits)
        chosen = from_layers(model, [0, 2]).eval()(ids, use_cache=False).logits
        stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
        middle = stack[1]

        def pass_on(module, args, kwargs, out):
            states = args[0] if args else kwargs["hidden_states"]
            return (states, *out[1:]) if isinstance(out, tuple) else states

        handle = middle.register_forward_hook(pass_on, with_kwargs=True)
        torch.testing.assert_close(chosen, model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)
        handle.remove()


def test_shared_weights_are_the_targets_and_stay(model, batch):
    objective = build(model, layers=[1], embeddings="target", head="target", losses={"forward_kl": 1.0})
    assert set(objective.parameter_groups()) == {"layers"}
    objective(batch, OnlineTarget(model).view(batch, "train", [0])).total.backward()
    draft = objective.model
    assert draft.lm_head.weight is draft.model.embed_tokens.weight and draft.lm_head.weight.grad is None
    assert draft.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr(), "not even copied"
    untied = build(model, layers=[1], head="target")
    assert set(untied.parameter_groups()) == {"embeddings", "layers"}
    assert not untied.model.config.tie_word_embeddings
    assert torch.equal(untied.model.get_input_embeddings().weight, model.get_input_embeddings().weight)
    own = build(model, sizes=SIZES)
    assert set(own.parameter_groups()) == {"embeddings", "layers"} and own.model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba"])
def test_a_target_without_positions_gets_a_draft_that_has_some(name, tmp_path):
    target = build_target(name, STATEFUL[name])
    build(target, sizes=SIZES).save(tmp_path)
    ids = torch.randint(3, 61, (1, 6))
    plain = target.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    drafter = paceline.load_drafter(str(tmp_path), target)
    assert torch.equal(plain, paceline.generate(target, ids, max_new_tokens=6, eos_token_id=None, drafter=drafter))


def test_an_untied_targets_head_is_its_own(tmp_path):
    target = tiny_llama(tie_word_embeddings=False)
    build(target, sizes=SIZES).save(tmp_path)
    draft = build(target, start=str(tmp_path), embeddings="target", head="target").model
    assert torch.equal(draft.get_input_embeddings().weight, target.get_input_embeddings().weight)
    assert torch.equal(draft.get_output_embeddings().weight, target.get_output_embeddings().weight)
    assert not draft.config.tie_word_embeddings


def test_a_head_with_a_bias_is_not_shared_with_a_llama():
    target = tiny("gptj", n_embd=32, n_layer=2, n_head=4, rotary_dim=8)
    with pytest.raises(ValueError, match="has a bias, for which the draft's architecture has no place"):
        build(target, sizes=SIZES, head="target")


@pytest.mark.parametrize("origin", [{"layers": [1]}, {"sizes": SIZES}])
def test_the_saved_folder_is_an_ordinary_model(model, folder, tmp_path, origin):
    objective = build(model, **origin, embeddings="target", save={"dtype": "float32"})
    objective.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 9, 11, 4]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, objective.model(ids).logits, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == 61 and config["paceline_drafter"] == "draft_lm"
    assert config["architectures"] == ["LlamaForCausalLM"] and config["paceline_target"]["name"] == "tiny"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    options = dict(max_new_tokens=9, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=loaded, **options), plain)
    assert torch.equal(paceline.generate(model, ids, drafter=str(tmp_path), **options), plain)


def test_a_folder_without_the_targets_weights_is_completed_by_it(model, tmp_path, batch):
    settings = {"layers": [1], "embeddings": "target", "head": "target"}
    objective = build(model, **settings, save={"without_target_weights": True})
    objective.save(tmp_path / "lean")
    build(model, **settings).save(tmp_path / "whole")
    lean, whole = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("lean", "whole"))
    assert lean < whole - 61 * 32 * 4 + 600
    ids = torch.tensor([[5, 9, 11, 4]])
    with torch.no_grad():
        torch.testing.assert_close(complete(tmp_path / "lean", model)(ids).logits, objective.model(ids).logits)
    assert paceline.load_drafter(tmp_path / "lean", model).name == "lean"
    with pytest.raises(ValueError, match="was made for target 'tiny'"):
        complete(tmp_path / "lean", tiny_llama(seed=4))
    further = build(model, start=str(tmp_path / "lean"), embeddings="target", head="target")
    assert torch.equal(further(batch, None).total, objective(batch, None).total), "distillation begins from pretraining"
    own = build(model, start=str(tmp_path / "lean"))
    with torch.no_grad():
        for weight in own.model.parameters():
            weight.mul_(1.5)
    own.save(tmp_path / "own")
    with torch.no_grad():
        torch.testing.assert_close(complete(tmp_path / "own", model)(ids).logits, own.model(ids).logits)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "no origin; give one of sizes, layers and start"),
        ({"layers": [0], "sizes": SIZES}, "sizes and layers; give one of"),
        ({"layers": [2]}, r"\[2\] must name layers of LlamaForCausalLM, which has 0 to 1"),
        ({"layers": []}, "must name layers"),
        ({"layers": [0], "depths": 0}, "must be at least 1"),
        ({"layers": [0], "save": {"without_target_weights": True}}, "nothing is; set objective.embeddings"),
        ({"sizes": {**SIZES, "hidden_size": 16}, "head": "target"}, "hidden size 16 is not the target's 32"),
        ({"sizes": {**SIZES, "num_attention_heads": 5}}, "5 heads do not divide hidden_size 32"),
        ({"sizes": {**SIZES, "num_attention_heads": 0}}, "num_attention_heads is 0; give a number of at least 1"),
        ({"sizes": {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 3}}, "3 key-value heads do not divide 4"),
        ({"start": "./none-such"}, "no such folder"),
        ({"layers": [0], "losses": {"kl": 1}}, "loss 'kl' is unknown"),
        ({"layers": [0], "head": "mine"}, "choose of own, target"),
    ],
)
def test_mistakes_are_named(model, settings, words):
    with pytest.raises(ValueError, match=words):
        build(model, **settings)
