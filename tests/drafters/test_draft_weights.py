"""Drafters in 4 bits: the text stays the target's, a file keeps its own blocks, and `auto` takes the quickest."""

import json

import paceline
import pytest
import torch
from paceline.drafters import draft_weights
from paceline.drafters.medusa import MedusaHeads
from paceline.spec.engines import runs
from paceline.spec.kernels import native
from paceline.spec.plan.store import plan_path
from paceline.spec.target.weights import block_layers, dense_weight

from support.blocks import write_tiny
from support.models import fitted_heads, noisy_copy, tiny_llama
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ["draft model", "independent", "markov", "hydra"]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=3)


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """A drafter folder of each kind; heads know a part of the vocabulary, so that their LM head is their own."""
    base = tmp_path_factory.mktemp("drafters")
    noisy_copy(model).save_pretrained(base / "draft model")
    for mode in KINDS[1:]:
        fitted_heads(model, mode, known=40).save(base / mode, torch.float32)
    return {kind: base / kind for kind in KINDS}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    native.prepare()  # from the usual cache folder, where it has been built before
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))


def module_of(drafter):
    (module,) = drafter.traits.modules
    return module


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("weights", ["q4", "q4-int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_that_of_plain_decoding(model, folders, kind, weights, sampled):
    drafter = paceline.load_drafter(folders[kind], model, weights=weights)
    layers = block_layers(module_of(drafter))
    assert layers and all(layer.int8_activations == (weights == "q4-int8") for layer in layers.values())
    torch.manual_seed(1)
    prompts = torch.randint(1, 61, (3, 6))
    options = dict(do_sample=sampled, top_k=0, max_new_tokens=40, seed=5, return_dict_in_generate=True)
    plain = paceline.generate(model, prompts, drafter=None, **options)
    drafted = paceline.generate(model, prompts, drafter=drafter, tree="2x1x1", **options)
    assert torch.equal(plain.sequences, drafted.sequences)
    assert drafted.trace.summary()["num_accepted_draft_tokens"] > 0, "a test without accepted tokens proves little"


@pytest.mark.slow
def test_compiled_steps_give_the_same_text(model, folders, traced_only):
    drafter = paceline.load_drafter(folders["draft model"], model, weights="q4-int8")
    options = dict(do_sample=True, top_k=0, max_new_tokens=24, seed=5)
    prompt = torch.tensor([[5, 9, 2, 7]])
    plain = paceline.generate(model, prompt, drafter=None, **options)
    out = paceline.generate(
        model, prompt, drafter=drafter, tree="2", executor="compiled", return_dict_in_generate=True, **options
    )
    assert torch.equal(plain, out.sequences) and out.trace.summary()["num_accepted_draft_tokens"] > 0
    runs.reset(model)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_to_the_nearest_codes_and_used(model, folders, kind):
    dense, coarse = (paceline.load_drafter(folders[kind], model, weights=weights) for weights in ("16", "q4"))
    assert not block_layers(module_of(dense))
    torch.manual_seed(0)
    if kind == "draft model":
        ids = torch.randint(1, 61, (1, 8))
        logits = [module_of(drafter)(ids).logits for drafter in (dense, coarse)]
        weights = [layer.weight for layer in dense.model.modules() if type(layer) is torch.nn.Linear]
        assert len(weights) == len(block_layers(coarse.model)) + 2, "all but two layers, of 48 inputs, are in blocks"
        weights = [weight for weight in weights if weight.shape[1] == 32]
    else:
        heads = [module_of(drafter) for drafter in (dense, coarse)]
        hidden, path = torch.randn(2, 32), torch.tensor([[5, 9], [7, 3]])
        logits = [each.follow(each.start(hidden), 1, path) for each in heads]
        weights = [weight for weight, _ in heads[0]._dense().values()]
    spread = logits[0].std()
    assert 0 < (logits[0] - logits[1]).abs().mean() < spread / 2, "close to the dense ones, and not the same"
    for weight, layer in zip(weights, block_layers(module_of(coarse)).values(), strict=True):
        steps = (weight.unflatten(1, (-1, 32)).aminmax(dim=-1).max - weight.unflatten(1, (-1, 32)).amin(-1)) / 15
        error = (dense_weight(layer) - weight).unflatten(1, (-1, 32)).abs().amax(-1)
        assert (error <= 0.51 * steps + 1e-3).all()


def test_an_lm_head_on_the_targets_memory_stays_dense(model, folders, tmp_path):
    fitted_heads(model, "independent").save(tmp_path / "whole", torch.float32)
    whole = module_of(paceline.load_drafter(tmp_path / "whole", model, weights="q4"))
    assert list(whole.blocks) == ["first"] and whole.head_weight.data_ptr() == model.lm_head.weight.data_ptr()
    trimmed = module_of(paceline.load_drafter(folders["hydra"], model, weights="q4"))
    assert list(trimmed.blocks) == ["first", "head", "path_0", "path_1", "path_2"]


def test_heads_in_blocks_are_saved_dense(model, folders, tmp_path):
    heads = module_of(paceline.load_drafter(folders["hydra"], model, weights="q4"))
    heads.save(tmp_path / "again", torch.float32)
    again, before = (module_of(paceline.load_drafter(f, model)) for f in (tmp_path / "again", folders["hydra"]))
    assert isinstance(again, MedusaHeads) and again.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_plan_belongs_to_the_weights_of_its_drafter(model, folders):
    for kind in KINDS:
        paths = {
            plan_path(model, paceline.load_drafter(folders[kind], model, weights=weights), "eager", "match", 0.0)
            for weights in ("16", "q4", "q4-int8", "q4")
        }
        assert len(paths) == 3, kind


def test_plans_tell_blocks_apart_without_our_kernels(model, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "prepare", lambda: False)
    names = []
    for seed in (1, 2):
        noisy_copy(model, seed=seed).save_pretrained(tmp_path / str(seed))
        drafter = paceline.load_drafter(tmp_path / str(seed), model, weights="q4")
        for parameter in drafter.model.parameters():
            parameter.data.zero_()  # what is dense is the same in both
        drafter.name = "draft"
        names.append(plan_path(model, drafter, "eager", "match", 0.0))
    assert names[0] != names[1]


def test_a_file_keeps_its_own_blocks(tmp_path, cache):
    path = write_tiny(tmp_path / "draft.gguf", ("Q4_K", "Q6_K", "Q4_K"))
    target, _ = paceline.load_target(path, dtype="float32")
    theirs, _ = paceline.load_target(path, dtype="float32", weights="q4")
    drafter = paceline.load_drafter(path, target, weights="q4-int8")
    assert drafter.name == "draft.gguf in q4-int8"
    mine = block_layers(drafter.model)
    assert mine.keys() == block_layers(theirs).keys() and {layer.bits for layer in mine.values()} == {4, 8}
    for name, layer in block_layers(theirs).items():
        assert torch.equal(layer.dequantised(), mine[name].dequantised()) and mine[name].int8_activations
    eight = write_tiny(tmp_path / "eight.gguf", ("Q8_0",))
    sentence(lambda: paceline.load_drafter(eight, target, weights="q4"), "q4")
    assert block_layers(paceline.load_drafter(eight, target, weights="q8").model)


def test_auto_takes_the_quickest_and_keeps_the_choice(model, folders, cache, monkeypatch):
    seconds, timed = {"": 1.0, " in q4": 0.99, " in q4-int8": 0.9}, []

    def of(target, drafter):
        timed.append(drafter.name)
        return seconds[drafter.name.removeprefix("hydra")]

    monkeypatch.setattr(draft_weights, "_seconds", of)
    for _ in range(2):
        assert paceline.load_drafter(folders["hydra"], model, weights="auto").name == "hydra in q4-int8"
    assert timed == ["hydra", "hydra in q4", "hydra in q4-int8"], "it is decided once"
    monkeypatch.setitem(seconds, " in q4-int8", 0.985)
    draft_weights._path().unlink()
    assert paceline.load_drafter(folders["hydra"], model, weights="auto").name == "hydra", "that gains too little"
    assert list(json.loads(draft_weights._path().read_text()).values()) == ["16"]
    draft_weights._path().write_text("damaged")
    assert paceline.load_drafter(folders["hydra"], model, weights="auto").name == "hydra"


def test_auto_times_real_steps(model, folders, cache):
    drafter = paceline.load_drafter(folders["draft model"], model, weights="auto")
    assert drafter.name.removeprefix("draft model") in ("", " in q4", " in q4-int8")


def test_what_cannot_be_in_blocks(model, folders):
    sentence(lambda: paceline.load_drafter("ngram", model, weights="q3"), "is none of auto, 16, q4")
    sentence(lambda: paceline.load_drafter(noisy_copy(model), model, weights="q4"), "is loaded already")
    sentence(lambda: paceline.load_drafter(folders["hydra"], model, weights="q8"), "rounded to 4 bits only")
    assert paceline.load_drafter("ngram", model, weights="q4").name == "ngram", "it has no weights"
    both = paceline.load_drafter(f"{folders['hydra']}+ngram", model, weights="q4")
    assert both.name == "hydra in q4+ngram"
    drafter = paceline.load_drafter(folders["hydra"], model)
    monkey = type("Other", (), {"name": "other", "traits": drafter.traits})()
    sentence(lambda: draft_weights.rounded(monkey, "q4"), "its kind only computes with dense ones")
