"""Corners in which a lossless decoder goes wrong quietly: lengths at which a model changes, processors that
know their rows, limits inside a tree, input of every odd kind."""

import json
import re

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.proposal import DraftRequest, DraftSampling
from paceline.spec.request import Request
from paceline.spec.state import DecodeState
from paceline.spec.target.load import load_target
from paceline.spec.target.selftest import attach
from paceline.spec.tree import TreeShape
from safetensors.torch import load_file, save_file
from transformers import LogitsProcessor

from conftest import noisy_copy, tiny_llama
from test_families import REFUSED, SUPPORTED, build


def test_llama4_is_refused_where_its_queries_are_scaled_by_a_count():
    options = SUPPORTED["llama4_text"] | dict(attn_temperature_tuning=True, floor_scale=24, no_rope_layers=[1, 0])
    model = build("llama4_text", options)
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 64, (1, 10))
    truth = model.generate(ids, do_sample=False, max_new_tokens=14)
    assert torch.equal(paceline.generate(model, ids, drafter="ngram", do_sample=False, max_new_tokens=14), truth)
    with pytest.raises(ValueError, match="exceed 24"):
        paceline.generate(model, ids, do_sample=False, max_new_tokens=15)


def test_a_rotary_embedding_that_changes_with_the_length_is_not_crossed():
    rope = dict(
        rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=4.0,
        original_max_position_embeddings=24,
    )  # fmt: skip
    model = tiny_llama(rope_parameters=rope)
    for width, new in ((8, 12), (30, 12)):
        ids = torch.randint(3, 61, (1, width))
        truth = model.generate(ids, do_sample=False, max_new_tokens=new)
        got = paceline.generate(model, ids, drafter="ngram", tree="chain:3", do_sample=False, max_new_tokens=new)
        assert torch.equal(got, truth)
    with pytest.raises(ValueError, match="cross 24 positions"):
        paceline.generate(model, torch.randint(3, 61, (1, 12)), do_sample=False, max_new_tokens=20)


class Biased(LogitsProcessor):
    """Knows its rows: a bias (B, V), and looks at the history so that it cannot run vectorised."""

    def __init__(self, bias):
        self.bias = bias

    def __call__(self, input_ids, scores):
        return scores + self.bias * (1 + input_ids.shape[1] % 2)


def test_a_processor_that_knows_its_rows_gets_its_rows(target, draft, ragged):
    ids, mask = ragged
    torch.manual_seed(0)
    options = dict(logits_processor=[Biased(torch.randn(3, 61))], do_sample=False, max_new_tokens=16)
    truth = target.generate(ids, attention_mask=mask, **options)
    for drafter in (None, "ngram", draft):
        assert torch.equal(paceline.generate(target, ids, mask, drafter=drafter, **options), truth)


class Walled(LogitsProcessor):
    """Forbids everything from a length on; a processor that is never asked there does no harm."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        assert input_ids.shape[1] < self.length, "asked behind the end"
        return scores


def test_nothing_is_asked_behind_the_last_token(target, draft, ragged):
    ids, mask = ragged
    plan = {length: [3 + length % 50] for length in range(9, 25)}
    options = dict(do_sample=False, max_new_tokens=16, pad_token_id=0)
    truth = target.generate(ids, attention_mask=mask, prefix_allowed_tokens_fn=lambda _, x: plan[len(x)], **options)
    for drafter in ("ngram", draft, ModelDrafter(target)):
        for tree in ("chain:5", "3x2x1"):
            more = options | dict(drafter=drafter, tree=tree)
            got = paceline.generate(target, ids, mask, prefix_allowed_tokens_fn=lambda _, x: plan[len(x)], **more)
            assert torch.equal(got, truth)
            paceline.generate(target, ids, mask, logits_processor=[Walled(25)], **more)


def test_a_prefix_function_is_asked_for_copies_as_by_transformers(target, draft, ragged):
    ids, mask = ragged
    options = dict(do_sample=True, num_return_sequences=2, max_new_tokens=8)
    forced = dict(prefix_allowed_tokens_fn=lambda place, text: [7 * place + len(text)])
    truth = target.generate(ids, attention_mask=mask, **options, **forced)
    for drafter in (None, "ngram", draft):
        assert torch.equal(paceline.generate(target, ids, mask, drafter=drafter, **options, **forced), truth)


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
@pytest.mark.parametrize("name", ["bloom", "mpt", "gpt_neo", "falcon-alibi", "mamba"])
def test_refusals_do_not_depend_on_the_precision(name, dtype):
    with pytest.raises(ValueError, match="; use a model"):
        attach(build(name, REFUSED[name]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3_text", "gpt2"])
def test_supported_families_are_supported_in_low_precision(name, dtype):
    attach(build(name, SUPPORTED[name]).to(dtype))


def test_prompt_lookup_drafts_only_what_stands_in_the_text():
    """Every drafted edge of every shape follows the text: 5 6 7 or 5 8 9, never 5 8 7."""
    text = [5, 6, 7, 5, 8, 9, 5]
    edges = {(5, 6), (6, 7), (7, 5), (5, 8), (8, 9), (9, 5)}
    for parents in ([-1, 0, 0, 1, 2], [-1, 0, 0, 2, 1], [-1, 0, 1, 0, 3, 2, 4], [-1, 0, 0, 0, 1, 2, 3]):
        shape = TreeShape(tuple(parents))
        request = DraftRequest(1, 32, 61, torch.device("cpu"), shape, DraftSampling())
        session = NgramDrafter().open(request)
        state = DecodeState.empty(1, 32, 0, torch.device("cpu"))
        state.admit(torch.tensor([0]), [Request(text, 8, (1, 2))], [1])
        tokens = session.propose(state).tokens[0].tolist()
        drafted = {(tokens[shape.parents[n]], tokens[n]) for n in range(1, len(shape)) if tokens[n] >= 0}
        assert drafted and drafted <= edges
        assert {(5, 6), (5, 8)} <= drafted


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_prompts_of_other_integer_types(target, ragged, dtype):
    ids, mask = ragged
    truth = paceline.generate(target, ids, mask, max_new_tokens=6)
    for keep in (mask, mask.bool(), mask.float()):
        assert torch.equal(paceline.generate(target, ids.to(dtype), keep, max_new_tokens=6).long(), truth)


GOOD = torch.tensor([[5, 6, 7]])
BAD = {
    "negative id": (dict(input_ids=torch.tensor([[5, -100]])), "from -100 to 5"),
    "id beyond the vocabulary": (dict(input_ids=torch.tensor([[5, 61]])), "ends at 60"),
    "floats": (dict(input_ids=torch.ones(1, 2)), "integers"),
    "a list": (dict(input_ids=[[1, 2]]), "input_ids is list"),
    "drafter of another kind": (dict(input_ids=GOOD, drafter=5), "drafter is a int"),
    "a truth for a seed": (dict(input_ids=GOOD, seed=True), "seed=True"),
    "half a seed": (dict(input_ids=GOOD, seed=1.5), "seed=1.5"),
    "tree of another kind": (dict(input_ids=GOOD, drafter="ngram", tree=5), "tree=5"),
    "words for a number": (dict(input_ids=GOOD, max_new_tokens="5"), "whole number"),
    "a dict for a config": (dict(input_ids=GOOD, generation_config={"a": 1}), "not a GenerationConfig"),
    "another engine's option": (dict(input_ids=GOOD, num_assistant_tokens=3), "no effect"),
    "early exit": (dict(input_ids=GOOD, assistant_early_exit=1), "pass drafter="),
    "no such executor here": (dict(input_ids=GOOD, executor="cuda_graph"), "needs CUDA|needs a CUDA"),
    "executor for Python": (
        dict(input_ids=GOOD, executor="compiled", repetition_penalty=1.5, pad_token_id=0),
        "look at the history",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_odd_input_is_refused_in_one_sentence(target, case):
    options, words = BAD[case]
    with pytest.raises(ValueError, match=words) as caught:
        paceline.generate(target, **dict(max_new_tokens=4) | options)
    assert "\n" not in str(caught.value)


def test_the_model_itself_is_no_drafter(target):
    with pytest.raises(ValueError, match="drafter is a LlamaForCausalLM"):
        paceline.generate(target, GOOD, drafter=target, max_new_tokens=4)
    with pytest.raises(ValueError, match="62 children and the vocabulary 61"):
        paceline.generate(target, GOOD, drafter=ModelDrafter(noisy_copy(target)), tree="62", max_new_tokens=4)


def test_weights_that_lack_a_tensor_are_refused(tmp_path, tokenizer):
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape("lack model.layers.1.input_layernorm.weight and 8 more")):
        load_target(tmp_path)


def test_tokenizers_that_return_more_than_ids(tmp_path, tokenizer, capsys):
    from paceline.spec.cli import main as cli

    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert cli.main(["generate", "--model", str(tmp_path), "--prompt", "ABC", "--max-new-tokens", "3"]) == 0
    assert len(capsys.readouterr().out.strip()) == 3


def test_a_draft_model_needs_no_tokenizer(target, tmp_path):
    noisy_copy(target).save_pretrained(tmp_path)
    assert paceline.load_drafter(tmp_path, target).traits.vocab_size == 61


def test_a_long_prompt_is_read_in_chunks(target, draft, ragged):
    ids, mask = ragged
    truth = paceline.generate(target, ids, mask, max_new_tokens=8)
    for chunk in (1, 2, 7):
        assert torch.equal(
            paceline.generate(target, ids, mask, max_new_tokens=8, drafter=draft, prefill_chunk=chunk), truth
        )
