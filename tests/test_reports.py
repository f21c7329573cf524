"""What users reported: false reasons, one text for every sampled call, silent numbers, models and drafters given in
other forms, and trees that would never come to an end."""

import copy
import itertools
import json
import os
import random
import time
import warnings

import numpy as np
import paceline
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.kept import kept_drafter
from paceline.spec.cli import main as cli
from paceline.spec.refill import Text, decode_texts
from paceline.spec.target import selftest
from paceline.spec.target.selftest import TOLERANCE, attach, self_test, unsteadiness
from paceline.spec.tree import MOST_DEPTH, MOST_NODES, DynamicShape, TokenTree, TreeShape
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from conftest import noisy_copy, tiny_llama
from test_families import REFUSED, build

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = dict(do_sample=False, max_new_tokens=12)
SAMPLED = dict(do_sample=True, top_k=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab=64)


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(2)
    return torch.randint(3, 64, (1, 10))


@pytest.fixture(scope="module")
def truth(model, ids):
    return model.generate(ids, **GREEDY)


def sentence(call, *words):
    """What `call` is refused with: one sentence that holds the words."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and all(word in text for word in words), text
    return text


def int8(model):
    """Linear layers in 8 bits whose activations are quantised by tensor as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


# The self-test


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
    out.logits = out.logits + spread * out.logits.std() * torch.randn_like(out.logits)
    return out


def test_a_steady_model_costs_no_second_look(monkeypatch):
    looks = []
    monkeypatch.setattr(selftest, "unsteadiness", lambda model: looks.append(model))
    attach(tiny_llama(vocab=64))
    assert not looks


def test_weights_that_are_nowhere_are_told_from_offloaded_ones(ids, truth, tmp_path):
    with torch.device("meta"):
        nowhere = tiny_llama(vocab=64)
    sentence(lambda: paceline.generate(nowhere, ids, **GREEDY), "on the meta device", "from_pretrained")
    half = tiny_llama(vocab=64)
    half.lm_head.to("meta")
    sentence(lambda: paceline.generate(half, ids, **GREEDY), "on the meta device")
    for offload in (cpu_offload, lambda model, **device: disk_offload(model, str(tmp_path / "all"), **device)):
        model = tiny_llama(vocab=64)
        offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(model.generate(ids, **GREEDY), truth)
        sentence(lambda model=model: paceline.generate(model, ids, **GREEDY), "offloaded", "load it onto one device")


def test_a_target_of_which_a_layer_is_on_disk_is_decoded(ids, truth, tmp_path):
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places["model.layers.0"] = "disk"
    model = dispatch_model(tiny_llama(vocab=64), places, "cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(paceline.generate(model, ids, drafter="ngram", **GREEDY), truth)


def test_a_forward_that_does_not_run_at_all_is_blamed_itself():
    model = tiny_llama(vocab=64)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(7))
    sentence(lambda: attach(model), "does not run a plain forward", "RuntimeError")


# Seeds


def test_sampled_calls_differ_and_follow_torchs_generator(model, ids):
    torch.manual_seed(3)
    first = [paceline.generate(model, ids, **SAMPLED) for _ in range(5)]
    assert len({tuple(text[0].tolist()) for text in first}) == 5
    torch.manual_seed(3)
    again = [paceline.generate(model, ids, drafter="ngram", **SAMPLED) for _ in range(5)]
    assert all(map(torch.equal, first, again))


def test_the_seed_that_was_drawn_is_returned_and_gives_the_text_again(model, ids):
    torch.manual_seed(3)
    out = paceline.generate(model, ids, return_dict_in_generate=True, **SAMPLED)
    torch.manual_seed(3)
    assert type(out.seed) is int and out.seed == int(torch.randint(2**53, ()))
    assert torch.equal(paceline.generate(model, ids, seed=out.seed, **SAMPLED), out.sequences)
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=12, return_dict_in_generate=True)
    torch.manual_seed(3)
    assert torch.equal(paceline.generate(model, ids, generation_config=config).sequences, out.sequences)


@pytest.mark.parametrize("seed", [7, [7, 9], np.int64(7), np.array([7, 9]), torch.tensor([7, 9]), -7, 2**70])
def test_a_seed_is_returned_as_it_was_used(model, ids, seed):
    pair, state = ids.expand(2, -1), torch.get_rng_state()
    out = paceline.generate(model, pair, seed=seed, return_dict_in_generate=True, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn where a seed is given"
    used = seed.tolist() if hasattr(seed, "tolist") else seed
    assert out.seed == used and type(out.seed) in (int, list)
    assert torch.equal(paceline.generate(model, pair, seed=used, **SAMPLED), out.sequences)


def test_greedy_calls_draw_nothing(model, ids, truth):
    state = torch.get_rng_state()
    out = paceline.generate(model, ids, drafter="ngram", return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, truth) and out.seed is None
    assert torch.equal(torch.get_rng_state(), state)


def test_best_of_n_gives_n_texts(model, ids):
    for seed in (None, 4):
        texts = paceline.generate(model, ids, num_return_sequences=6, seed=seed, **SAMPLED)
        assert len({tuple(text) for text in texts.tolist()}) == 6


def test_the_command_prints_the_seed_that_it_drew(tmp_path, tokenizer, capsys):
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["generate", "--model", str(tmp_path), "--prompt", "ABCAB", "--max-new-tokens", "8", "--temperature", "1"]
    runs = []
    for more in ([], [], ["--seed", "5"], ["--temperature", "0"]):
        assert cli.main([*command, "--json", *more]) == 0
        runs.append(json.loads(capsys.readouterr().out))
    assert runs[0]["seed"] != runs[1]["seed"] and [run["seed"] for run in runs[2:]] == [5, None]
    assert cli.main([*command, "--seed", str(runs[0]["seed"])]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == runs[0]["text"] and f"seed {runs[0]['seed']}" in captured.err


# Numbers

WRONG = {
    "prefill_chunk": (-1, 0, 1.5, True, "5", None, np.bool_(True), torch.tensor(2.0)),
    "max_new_tokens": (-1, 0, 2.0, True, "5", np.float32(3)),
    "max_length": (0, -3, False),
    "min_new_tokens": (-1, True, 0.5),
    "min_length": (-1,),
    "num_return_sequences": (0, -1, True),
    "top_k": (-1, 2.5, True),
    "no_repeat_ngram_size": (-1,),
    "temperature": (-1, "hot", True, float("nan"), float("inf")),
    "top_p": (1.5, -0.1, float("nan")),
    "min_p": (2,),
    "repetition_penalty": (-1.0, "much"),
    "max_time": (-1,),
    "seed": (True, 1.5, "a", [1, True], [1.5], [None], np.array([0.5])),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_numbers_that_mean_nothing_are_refused(model, ids, name, value):
    text = sentence(lambda: paceline.generate(model, ids, **{"max_new_tokens": 12, name: value}), f"{name}={value!r}")
    assert "number" in text or "integer" in text
    assert "; pass" in text


def test_numbers_in_a_generation_config_are_checked_too(model, ids):
    for config in (GenerationConfig(max_new_tokens=True), GenerationConfig(max_new_tokens=4, num_return_sequences=0)):
        sentence(lambda config=config: paceline.generate(model, ids, generation_config=config), "whole number")


def test_nothing_is_sampled_at_temperature_zero(model, ids, truth):
    sentence(lambda: paceline.generate(model, ids, **SAMPLED, temperature=0.0), "temperature=0", "do_sample=False")
    assert torch.equal(paceline.generate(model, ids, **GREEDY, temperature=0.0), truth)


def test_whole_numbers_of_other_libraries_are_taken(model, ids, truth):
    for kind in (np.int64, np.int32, np.uint8, torch.tensor):
        options = dict(max_new_tokens=kind(12), prefill_chunk=kind(3), min_new_tokens=kind(2), do_sample=False)
        assert torch.equal(paceline.generate(model, ids, drafter="ngram", **options), truth)
    options = dict(do_sample=True, seed=1, max_new_tokens=12)
    for given, same in ((np.float32(2), 2.0), (2, 2.0), (np.float64(0.5), 0.5)):
        texts = [paceline.generate(model, ids, temperature=value, **options) for value in (given, same)]
        assert torch.equal(*texts)


def test_texts_to_decode_are_read_in_chunks_of_at_least_one_token(model):
    for chunk in (-1, 0, True):
        texts = [Text([5, 6, 7], 4, 0, 8)]
        sentence(
            lambda chunk=chunk, texts=texts: decode_texts(model, texts, print, batch=1, prefill_chunk=chunk),
            f"prefill_chunk={chunk}",
        )


# Models and drafters in other forms


def test_a_model_wrapped_by_torch_compile_runs(model, ids, truth):
    wrapped = torch.compile(model)
    for drafter in (None, "ngram", torch.compile(noisy_copy(model))):
        assert torch.equal(paceline.generate(wrapped, ids, drafter=drafter, **GREEDY), truth)
    assert paceline.load_drafter("ngram", wrapped).name == "ngram"


def test_what_is_no_causal_lm_is_refused(model, ids):
    cases = {
        "LlamaModel, which has no language-modelling head; load the checkpoint with AutoModelForCausalLM": model.model,
        "model='smollm2-135m' is a name and no model; load it with paceline.load_target": "smollm2-135m",
        "tuple and no causal LM; pass the first of the two things that paceline.load_target": (model, None),
        "Linear and no causal LM of transformers; load one": torch.nn.Linear(2, 2),
        "DataParallel and no causal LM of transformers; pass its .module": torch.nn.DataParallel(model),
        "NoneType and no causal LM": None,
    }
    for words, given in cases.items():
        sentence(lambda given=given: paceline.generate(given, ids, **GREEDY), words)
        sentence(lambda given=given: paceline.load_drafter("ngram", given), words.replace("model=", "target="))


def test_a_generation_config_may_stand_where_transformers_has_it(model, ids, truth):
    config = GenerationConfig(**GREEDY)
    assert torch.equal(paceline.generate(model, ids, config), truth)
    assert torch.equal(paceline.generate(model, ids, config, drafter="ngram"), truth)
    sentence(lambda: paceline.generate(model, ids, config, generation_config=config), "given twice")
    sentence(lambda: paceline.generate(model, ids, [[1] * 10], **GREEDY), "attention_mask is a list")


def test_a_causal_lm_is_a_drafter(model, ids, truth):
    draft = noisy_copy(model)
    out = paceline.generate(model, ids, drafter=draft, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, truth) and out.trace.summary()["num_accepted_draft_tokens"] > 0
    drafter = paceline.load_drafter(draft, model)
    assert isinstance(drafter, ModelDrafter) and drafter.model is draft
    for again in (draft, torch.compile(draft), drafter):
        assert paceline.load_drafter(again, model) is drafter is kept_drafter(again, model)
    other = copy.deepcopy(draft)
    assert paceline.load_drafter(other, model).model is other, "a copy has a drafter of its own"
    draft.train()
    sentence(lambda: paceline.generate(model, ids, drafter=draft, **GREEDY), "training mode")


def test_models_that_cannot_draft_are_refused(model, ids):
    sizes = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    cases = {
        "vocabulary of 50 tokens and the target one of 64": tiny_llama(vocab=50),
        "is an encoder-decoder model": T5ForConditionalGeneration(sizes).eval(),
        "which has no language-modelling head": noisy_copy(model).model,
        "the target itself": model,
    }
    for words, draft in cases.items():
        for call in (lambda d: paceline.load_drafter(d, model), lambda d: paceline.generate(model, ids, drafter=d)):
            sentence(lambda call=call, draft=draft: call(draft), words)
    sentence(lambda: paceline.generate(model, ids, assistant_model=noisy_copy(model)), "as drafter=")
    sentence(lambda: paceline.load_drafter(5, model), "drafter is a int")
    sentence(lambda: paceline.generate(model, ids, drafter=(noisy_copy(model), None)), "drafter is a tuple")


def test_a_model_and_its_drafter_go_together(model):
    import gc
    import weakref

    draft = noisy_copy(model)
    kept = weakref.ref(paceline.load_drafter(draft, model))
    gc.collect()
    assert kept() is not None
    del draft
    gc.collect()
    assert kept() is None


def test_a_named_drafter_stays_loaded_until_its_folder_changes(model, ids, truth, tmp_path):
    folder = tmp_path / "draft"
    noisy_copy(model).save_pretrained(folder)
    first = kept_drafter(folder, model)
    assert kept_drafter(str(folder), model) is first and kept_drafter("ngram", model) is kept_drafter("ngram", model)
    assert torch.equal(paceline.generate(model, ids, drafter=str(folder), **GREEDY), truth)
    assert kept_drafter(folder, model) is first
    assert kept_drafter(folder, copy.deepcopy(model)) is not first
    (folder / "acceptance.json").write_text(json.dumps({"p": [[0.9], [0.8]]}))
    second = kept_drafter(folder, model)
    assert second is not first
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns + 1))
    assert kept_drafter(folder, model) is not second
    assert paceline.load_drafter(folder, model) is not paceline.load_drafter(folder, model)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    sentence(lambda: paceline.generate(model, ids, drafter=str(folder), **GREEDY), "no such folder")


# Trees

HUGE = [
    "100x100x100x100", "99999999x1", "4096", "chain:20000", "chain:513", "chain:" + "9" * 6000, "9" * 5000,
    "x".join(["1"] * 600), "1x" * 100_000 + "1", "dynamic:99999999x6x4", "dynamic:24x600x4", "dynamic:24x6x99999",
    "4x2x1+chain:5000", "1" + "+chain:1" * 5000, "1" + "+chain:500" * 100_000, [-1] + [0] * 5000,
    list(range(-1, 1000)), range(-1, 10**12), itertools.count(-1), np.arange(-1, 5000),
]  # fmt: skip


@pytest.mark.parametrize("tree", HUGE, ids=lambda tree: str(tree)[:24])
def test_trees_beyond_every_bound_are_refused_at_once(model, ids, tree):
    started = time.perf_counter()
    sentence(lambda: paceline.generate(model, ids, drafter="ngram", tree=tree, **GREEDY), "tree ", "; draft a s")
    assert time.perf_counter() - started < 2


def test_shapes_made_directly_have_the_same_bounds(tmp_path):
    for make in (
        lambda: TreeShape.chain(10**15),
        lambda: TreeShape.per_level([10**6] * 10),
        lambda: TreeShape(tuple(range(-1, 600))),
        lambda: TreeShape.per_level([4000]).beside(TreeShape.per_level([4000])),
        lambda: DynamicShape(10**9, 6, 4),
    ):
        sentence(make, "; draft a s")
    plan = dict(tokens_per_step=1.0, speedup=1.0, seconds_per_step=1.0, plain_seconds=1.0)
    (tmp_path / "plan.json").write_text(json.dumps({"parents": [-1, *[0] * 9000], **plan}))
    from paceline.spec.plan.store import read_shape

    sentence(lambda: read_shape(str(tmp_path / "plan.json"), None), f"more than {MOST_NODES} nodes")


def test_trees_within_the_bounds_are_what_they_were():
    for text, nodes, depth in (
        (f"chain:{MOST_DEPTH}", MOST_DEPTH + 1, MOST_DEPTH), (str(MOST_NODES - 1), MOST_NODES, 1),
        ("chain:03", 4, 3), ("4x2x1+chain:6+chain:2", 29, 6), ("63x64", 4096, 2), ("2+chain:0", 3, 1),
    ):  # fmt: skip
        shape = TreeShape.parse(text)
        assert (len(shape), shape.max_depth) == (nodes, depth)
    shape = TreeShape.parse("2x1+chain:3+chain:1")
    assert shape.parents == (-1, 0, 0, 0, 0, 1, 2, 3, 7) and shape.beside() == shape
    assert TreeShape.parse("2x1").beside(TreeShape.chain(3)).beside(TreeShape.chain(1)) == shape
    assert DynamicShape(4096, 512, 8).slots == 4096


def test_a_deep_tree_takes_memory_by_its_nodes_alone():
    """Ancestors, paths and depths of a large random tree against a walk up from some of its nodes."""
    dice = random.Random(1)
    shape = TreeShape((-1, *(max(0, node - dice.randint(1, 12)) for node in range(1, 1500))))
    assert 200 < shape.max_depth <= MOST_DEPTH
    tree = TokenTree.of(shape, "cpu")
    for node in dice.sample(range(1500), 50):
        path = [node]
        while shape.parents[path[0]] >= 0:
            path.insert(0, shape.parents[path[0]])
        assert tree.ancestors[0, node].nonzero().flatten().tolist() == sorted(path)
        assert tree.paths[0, node, : len(path)].tolist() == path and tree.depths[0, node] == len(path) - 1


def test_the_command_refuses_a_huge_tree_in_one_line(tmp_path, tokenizer, capsys):
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["generate", "--model", str(tmp_path), "--drafter", "ngram", "--prompt", "ABC", "--tree"]
    for tree in ("100x100x100x100", "99999999x1", "chain:20000"):
        assert cli.main([*command, tree]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith(f"paceline: tree '{tree}' ") and not any("Traceback" in line for line in lines)
