"""EAGLE as a drafter: its folder, what is refused, and the target's own text in every way of decoding."""

import json

import paceline
import pytest
import torch
from paceline.drafters.beside import Beside
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.eagle.drafter import EagleDrafter
from paceline.drafters.eagle.folder import save_network
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines import runs
from paceline.spec.target.weights import block_layers
from transformers import DynamicCache

from support.blocks import write_tiny
from support.models import eagle_copy, noisy_copy, random_eagle, tiny_llama
from support.reference import two_token_law
from support.sentences import edit_tensors, sentence
from support.tape import tape_executor

pytestmark = pytest.mark.usefixtures("one_thread")
WAYS = {"greedy": dict(do_sample=False), "sampled": dict(do_sample=True, temperature=0.8, top_k=0, seed=5)}
WIDE = dict(wide=True, taps=(0, 1, "head"), tap_norms=True, norm_output=True)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=3)


@pytest.fixture(scope="module")
def eagle(model):
    return EagleDrafter(eagle_copy(model, known=torch.arange(2, 58)))


@pytest.fixture
def saved(model, tmp_path):
    """A folder of EAGLE-3 with a vocabulary and embeddings of its own."""
    known = torch.arange(3, 43)
    network = random_eagle(model, known, dict(hidden_size=16), own_head=True, own_embeddings=True, **WIDE)
    save_network(network, tmp_path / "eagle", torch.float32)
    return tmp_path / "eagle"


@pytest.mark.parametrize("way", WAYS)
def test_the_text_is_that_of_plain_decoding(model, eagle, ragged, way):
    options = dict(max_new_tokens=24, return_dict_in_generate=True, **WAYS[way])
    both, draft = Beside(eagle, NgramDrafter()), Beside(ModelDrafter(noisy_copy(model)), NgramDrafter())
    for ids, mask in (ragged, (ragged[0][:1], ragged[1][:1])):
        truth, steps = paceline.generate(model, ids, mask, **options).sequences, {}
        for drafter, tree in (
            (eagle, None), (eagle, "chain:4"), (eagle, "3x2x1"), (eagle, "dynamic:10x4x3"),
            (both, "3x2x1+chain:4"), (draft, "2x1+chain:4"),
        ):  # fmt: skip
            out = paceline.generate(model, ids, mask, drafter=drafter, tree=tree, **options)
            assert torch.equal(out.sequences, truth), (drafter.name, tree)
            steps[drafter.name, tree] = out.trace.summary()["tokens_per_step"]
        assert min(steps.values()) > 1.15, steps


@pytest.mark.parametrize("rule", ["match", "residual"])
def test_decoding_has_the_targets_law(rule):
    """Four thousand rows of one prompt, as of heads: a network that knows three of four tokens."""
    model = tiny_llama(vocab=4, seed=1, bos_token_id=None)
    drafter = EagleDrafter(eagle_copy(model, 0.3, known=torch.tensor([0, 1, 3])))
    distance, accepted = two_token_law(model, drafter, rule)
    assert distance < 0.045 and 0.1 < accepted < 0.9


def test_dynamic_trees_are_captured(model, eagle, ragged, monkeypatch):
    """One recording grows other trees on other prompts."""
    ids, mask = ragged
    with tape_executor(monkeypatch) as tapes:
        for seed, batch in enumerate([(ids, mask), (ids.flip(0), mask.flip(0))]):
            options = dict(drafter=eagle, tree="dynamic:10x4x3", max_new_tokens=16, seed=seed, do_sample=True)
            truth = paceline.generate(model, *batch, executor="eager", **options)
            assert torch.equal(paceline.generate(model, *batch, executor="tape", **options), truth)
    assert len(tapes) == 1 and tapes[0].tape.offences == [] and tapes[0].replays > 5
    runs.reset(model)


def test_a_drafter_drafts_as_it_did_before_it_was_saved(model, saved, tmp_path):
    network = eagle_copy(model, known=torch.arange(3, 43))
    save_network(network, tmp_path / "ours", torch.float32)
    (tmp_path / "ours" / "acceptance.json").write_text(json.dumps({"p": [[0.9, 0.01], [0.9, 0.01]]}))
    config = json.loads((saved / "config.json").read_text())
    assert config["paceline_drafter"] == "eagle" and config["layer"]["hidden_size"] == 16 and config["wide"]
    assert config["taps"] == [0, 1, "head"] and (config["known_tokens"], config["vocab_size"]) == (40, 61)
    loaded = paceline.load_drafter(tmp_path / "ours", model)
    assert loaded.name == "ours" and loaded.default_shape.max_depth == 2, "planned from its acceptance"
    mine, read = network.state_dict(), loaded.network.state_dict()
    assert mine.keys() == read.keys() and all(torch.equal(mine[name], read[name]) for name in mine)
    again = paceline.load_drafter(saved, model).network
    assert again.embeddings.shape == (61, 16) and again.vocabulary.tolist() == list(range(3, 43))
    both = paceline.load_drafter(f"{saved}+ngram", model)
    assert both.name == "eagle+ngram" and both.traits.taps == (0, 1, "head")


def edit_config(change):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


BROKEN = {
    "missing": (edit_tensors(lambda tensors: tensors.pop("fuse.weight")), "lacks the tensor 'fuse.weight'"),
    "renamed": (
        edit_tensors(lambda tensors: tensors.update(fc=tensors.pop("fuse.weight"))), "lacks the tensor 'fuse.weight'"
    ),
    "extra": (edit_tensors(lambda tensors: tensors.update(extra=torch.ones(1))), "has a tensor 'extra'"),
    "shape": (edit_tensors(lambda tensors: tensors.update({"norm.weight": torch.ones(1)})), "'norm.weight' has shape"),
    "nan": (edit_tensors(lambda tensors: tensors["lm_head.weight"].fill_(torch.nan)), "'lm_head.weight' holds NaN"),
    "no ids": (edit_tensors(lambda tensors: tensors.pop("vocabulary")), "lacks the list of its 40 tokens"),
    "ids": (edit_tensors(lambda tensors: tensors["vocabulary"].fill_(3)), "ascending token ids"),
    "setting": (edit_config(lambda config: config.pop("tap_norms")), "lacks 'tap_norms'"),
    "tap": (edit_config(lambda config: config.update(taps=[0, 1, 9])), "no layer 9 to tap"),
    "family": (edit_config(lambda config: config["layer"].update(model_type="gpt2")), "layer.model_type='gpt2'"),
    "heads": (edit_config(lambda config: config["layer"].update(num_attention_heads="x")), "make no decoder layer"),
    "layer": (edit_config(lambda config: config.update(layer=[])), "layer.model_type=None"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_a_sentence(model, saved, case):
    breaks, words = BROKEN[case]
    breaks(saved)
    sentence(lambda: paceline.load_drafter(saved, model), words)


def test_what_does_not_fit_the_target_is_refused_in_a_sentence(model, eagle, saved):
    other = tiny_llama(seed=4)
    sentence(lambda: paceline.load_drafter(saved, other), "was made for target")
    half = tiny_llama(seed=3).to(torch.bfloat16)
    call = dict(drafter=eagle, max_new_tokens=4)
    ids = torch.tensor([[5, 6, 7]])
    sentence(lambda: paceline.generate(half, ids, **call), "in torch.float32", "in torch.bfloat16", "load it")
    sentence(lambda: paceline.generate(model, ids, tree="60x1", **call), "60 children", "56 tokens")


@pytest.mark.parametrize("weights", ["q4", "q4-int8"])
def test_weights_in_four_bits(model, eagle, saved, ragged, tmp_path, weights):
    options = dict(max_new_tokens=16, do_sample=False)
    save_network(eagle.network, tmp_path / "ours", torch.float32)
    truth = paceline.generate(model, *ragged, **options)
    for folder in (tmp_path / "ours", saved):
        drafter = paceline.load_drafter(folder, model, weights=weights)
        assert drafter.name.endswith(weights) and block_layers(drafter.network)
        assert torch.equal(paceline.generate(model, *ragged, drafter=drafter, tree="2x1", **options), truth)
    save_network(random_eagle(model), tmp_path / "shared", torch.float32)
    shared = paceline.load_drafter(tmp_path / "shared", model, weights=weights).network
    assert "lm_head" not in block_layers(shared) and shared.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_targets_in_half_precision_and_in_blocks(tmp_path):
    half = tiny_llama(seed=3).to(torch.bfloat16)
    quantised, _ = paceline.load_target(write_tiny(tmp_path / "t.gguf", ("Q4_K",)), dtype="float32", weights="q4")
    wide = dict(hidden_size=256, intermediate_size=64)
    for model, layer in ((half, {}), (quantised, wide)):
        for settings in (dict(embedding_norm=True, feature_norm=True), dict(wide=True, taps=(0, "head"))):
            drafter, prompt = EagleDrafter(random_eagle(model, layer=layer, **settings)), torch.tensor([[5, 9, 2, 7]])
            options = dict(max_new_tokens=12, do_sample=False, drafter=drafter)
            text = paceline.generate(model, prompt, tree="2x1", **options)
            assert torch.equal(text, paceline.generate(model, prompt, tree="2x1", **options | dict(drafter=None)))


def test_prompts_that_the_model_itself_has_read(model, eagle):
    """Embeddings instead of ids, and a cache that is handed on: the same drafts as behind ids."""
    ids = torch.tensor([[5, 9, 33, 12, 7, 40, 5, 9]])
    options = dict(drafter=eagle, tree="2x2x1", do_sample=False, max_new_tokens=14, return_dict_in_generate=True)
    plain = paceline.generate(model, ids, **options)
    given = paceline.generate(model, ids, past_key_values=DynamicCache(config=model.config), **options)
    assert torch.equal(plain.sequences, given.sequences)
    drafts = [{event.tokens[0]: event.tokens for event in out.trace.events} for out in (plain, given)]
    assert any(drafts[0].get(root) == tokens for root, tokens in drafts[1].items() if len(tokens) > 1)
