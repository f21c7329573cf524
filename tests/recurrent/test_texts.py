"""Texts of targets with states: those of plain decoding and of transformers, whatever drafts, in any company."""

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines import runs
from paceline.spec.noise import row_keys
from paceline.spec.recurrent.hooks import followed
from paceline.spec.serve.texts import Text, decode_texts
from paceline.spec.step import step
from paceline.spec.target.given import cache_name
from paceline.spec.target.slots import SlotModel
from paceline.spec.target.taps import HEAD, hidden_states
from paceline.spec.tree import TreeShape
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, TemperatureLogitsWarper

from support.engines import engine_of
from support.families import KINDS, STATEFUL, build
from support.models import noisy_copy
from support.reference import plain_text
from support.tape import tape_executor

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (11, 8, 3, 1)


@pytest.fixture(scope="module")
def texts():
    """Ragged prompts with something to look up."""
    torch.manual_seed(4)
    return [torch.randint(3, 64, (4,)).repeat(3)[:length].tolist() for length in LENGTHS]


def _batch(texts):
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    return ids, mask


def _decode(model, texts, drafter, tree=None, new=12, seed=None, **options):
    ways = dict(do_sample=False) if seed is None else dict(do_sample=True, temperature=1.3, top_k=0, seed=seed)
    settings = dict(max_new_tokens=new, eos_token_id=None, pad_token_id=0, drafter=drafter, tree=tree)
    return paceline.generate(model, *_batch(texts), **settings, **ways, **options)


@pytest.mark.parametrize("tree", ["2x2x1", "1x1x1"], ids=["tree", "chain"])
@pytest.mark.parametrize("which", ["ngram", "model"])
def test_texts_are_those_of_plain_decoding(stateful, texts, which, tree):
    drafter = "ngram" if which == "ngram" else ModelDrafter(noisy_copy(stateful))
    out = _decode(stateful, texts, drafter, tree, return_dict_in_generate=True)
    assert [row[-12:].tolist() for row in out.sequences] == [plain_text(stateful, text, 12) for text in texts]
    assert which == "ngram" or out.trace.summary()["mean_acceptance_length"] > 1.2
    alone = stateful.generate(torch.tensor(texts[:1]), do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(_decode(stateful, texts[:1], drafter, tree), alone)
    sampled = [_decode(stateful, texts, given, None if given is None else tree, seed=5) for given in (None, drafter)]
    assert torch.equal(*sampled)


@pytest.mark.parametrize("name", STATEFUL)
def test_every_family_writes_its_own_text(name, texts):
    """Greedy, with a draft model, and seeded, with what is looked up; a row alone and two ragged ones."""
    model, rows = build(name, STATEFUL[name]), [texts[0], texts[2]]
    drafted = _decode(model, rows, ModelDrafter(noisy_copy(model)), "2x1", new=6)
    assert drafted[:, -6:].tolist() == [plain_text(model, text, 6) for text in rows]
    alone = model.generate(torch.tensor(rows[:1]), do_sample=False, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(_decode(model, rows[:1], "ngram", "2x1", new=6), alone) and torch.equal(alone[0], drafted[0])
    sampled = _decode(model, rows, "ngram", "2x1", new=6, seed=5)
    keys, heat = row_keys(5, 2, "cpu"), (TemperatureLogitsWarper(1.3),)
    assert sampled[:, -6:].tolist() == [plain_text(model, text, 6, heat, key) for text, key in zip(rows, keys)]


def test_dynamic_trees_grow_over_a_draft_model_with_states(stateful, texts):
    drafter = ModelDrafter(noisy_copy(stateful))
    assert torch.equal(_decode(stateful, texts, drafter, "dynamic:8x3x2"), _decode(stateful, texts, None))


def test_refilled_rows_have_the_texts_of_rows_alone(stateful, texts):
    got = {}

    def finish(text, tokens, failed):
        got[text.name] = tokens

    waiting = [Text(text, 5 + 2 * name, name, len(text) + 5 + 2 * name, name) for name, text in enumerate(texts)]
    stateful.generation_config.eos_token_id = None
    decode_texts(stateful, waiting, finish, batch=2, drafter=ModelDrafter(noisy_copy(stateful)), prefill_chunk=4)
    assert got == {text.name: plain_text(stateful, text.tokens, text.new_tokens) for text in waiting}


@pytest.mark.parametrize("name", [*KINDS.values(), "mamba2"])
def test_a_recorded_step_decodes_other_prompts(name, texts, monkeypatch):
    """By tape, as a CUDA graph is: a draft model with states beside a target with states."""
    model = build(name, STATEFUL[name])
    drafter = ModelDrafter(noisy_copy(model))
    with tape_executor(monkeypatch) as tapes:
        runs.reset(model)
        for batch in (texts, texts[::-1]):
            truth = _decode(model, batch, drafter, "2x1", executor="eager")
            assert torch.equal(_decode(model, batch, drafter, "2x1", executor="tape"), truth)
    (tape,) = tapes
    assert tape.tape.offences == [] and tape.replays > 4
    runs.reset(model)


def test_what_needs_slots_alone_is_refused(stateful, texts):
    """A text read before, and a cache handed in: a state is that of its whole text."""
    with pytest.raises(ValueError, match="keeps states of whole texts only"):
        _decode(stateful, texts[:1], None, reuse=paceline.PromptCache())
    with pytest.raises(ValueError, match="of attention layers, or leave it out"):
        _decode(stateful, texts[:1], None, **{cache_name(): DynamicCache(config=stateful.config)})
    embeddings = stateful.get_input_embeddings()(torch.tensor(texts[:1]))
    with pytest.raises(ValueError, match=r"keeps something else of this prompt|doesn't have its forwarding"):
        paceline.generate(stateful, inputs_embeds=embeddings, max_new_tokens=4, eos_token_id=None)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_model_has_states_where_its_layers_have(name):
    assert followed(build(name, STATEFUL[name]))


def test_a_model_whose_layers_all_attend_has_none(texts):
    """Granite 4 comes with and without layers of Mamba-2, in one module; then texts may be read before. Of
    documents of a packed row it makes no mask."""
    model = build("granitemoehybrid", STATEFUL["granitemoehybrid"] | dict(layer_types=["attention"] * 2))
    assert not followed(model)
    kept, ways = paceline.PromptCache(), dict(drafter="ngram", tree="2x1")
    first = _decode(model, texts[:1], reuse=kept, **ways)
    assert first[0, -12:].tolist() == plain_text(model, texts[0], 12)
    again = _decode(model, first.tolist(), reuse=kept, return_dict_in_generate=True, **ways)
    assert again.sequences[0, -12:].tolist() == plain_text(model, first[0].tolist(), 12)
    positions = torch.tensor([[*range(4), *range(5)]])
    packed = hidden_states(model, (HEAD,), torch.tensor([texts[0][:9]]), positions)[HEAD]
    alone = hidden_states(model, (HEAD,), torch.tensor([texts[0][4:9]]), positions[:, 4:])[HEAD]
    torch.testing.assert_close(packed[:, 4:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_every_step_is_one_graph(stateful):
    counter = CompileCounter()
    engine = engine_of(SlotModel(stateful, 2, 64), NgramDrafter(), TreeShape.parse("2x1"))
    with torch.no_grad():
        engine.idle_step()
        traced = torch.compile(lambda: step(engine, lambda phase: None), backend=counter, fullgraph=True, dynamic=False)
        traced(), traced()
    assert counter.frame_count == 1


def _assert_compiled_text(model, batches, tree):
    for batch in batches:
        truth = _decode(model, batch, "ngram", tree, executor="eager")
        assert torch.equal(_decode(model, batch, "ngram", tree, executor="compiled"), truth)
    runs.reset(model)


@pytest.mark.slow
def test_a_traced_step_decodes_the_same(texts, traced_only):
    """A model of convolutions, which are a part of the states that are compiled below, too."""
    _assert_compiled_text(build("lfm2", STATEFUL["lfm2"]), (texts, texts[::-1]), "2x1")


# A layer of each kind; mixtures take a minute more to compile.
COMPILED = {"mamba2": dict(num_hidden_layers=1), "qwen3_next": dict(num_experts=0)}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_decodes_the_same(name, texts):
    _assert_compiled_text(build(name, STATEFUL[name] | COMPILED[name]), (texts[::2], texts[1::2]), "2")
