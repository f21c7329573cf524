"""Kept steps: made once for all that is data, never shared, freed.

By tape wherever a recording stands for a capture, and compiled where the compiler is at stake.
"""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.medusa import MedusaDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines import executors, pool, runs
from paceline.spec.engines.executors import CompiledLater
from paceline.spec.engines.module_state import fingerprint
from paceline.spec.kernels.linears import Packing
from paceline.spec.proposal import NoDrafter
from paceline.spec.serve.texts import Text, decode_texts
from paceline.spec.trace import COMPILING

from support.kept_steps import IDS, SAMPLED, assert_eager_text, decode
from support.models import fitted_heads, noisy_copy, tiny_llama

VALUES = {
    "temperatures": [dict(temperature=0.8), dict(temperature=1.7)],
    "top-p": [dict(top_p=0.9), dict(top_p=0.3)],
    "top-k": [dict(top_k=12), dict(top_k=3)],
    "min-p": [dict(min_p=0.01), dict(min_p=0.2)],
    "seeds": [dict(seed=3), dict(seed=[77])],
    "ends": [dict(eos_token_id=7), dict(eos_token_id=[9, 11, 30])],
    "lengths": [dict(max_new_tokens=12), dict(max_new_tokens=31)],
    "prompts": [dict(ids=IDS), dict(ids=IDS[:, :4])],
}


@pytest.mark.parametrize(
    "drafter", [NoDrafter(), pytest.param(NgramDrafter(), marks=pytest.mark.slow)], ids=lambda drafter: drafter.name
)
def test_another_value_is_no_other_step(tapes, drafter):
    model = tiny_llama()
    for values in VALUES.values():
        for value in values:
            assert_eager_text(model, drafter=drafter, **{**SAMPLED, **value})
    assert len(tapes) == 1


def test_a_shorter_text_takes_the_step_of_a_longer_one(tapes):
    """Made for 512 slots, it serves texts that fit into 256; one of 1024 is too large for these."""
    model = tiny_llama(max_position_embeddings=2048)
    texts = {length: torch.arange(length)[None] % 50 + 5 for length in (300, 10, 600)}
    for length, kept in ((300, 1), (10, 1), (600, 2), (10, 2), (300, 2)):
        assert_eager_text(model, ids=texts[length], max_new_tokens=4)
        assert len(tapes) == kept
    model = tiny_llama(max_position_embeddings=2048)
    for length in (600, 10):
        assert_eager_text(model, ids=texts[length], max_new_tokens=4)
    assert len(tapes) == 4


@pytest.mark.slow
def test_another_value_compiles_nothing(traced_only):
    """The same by the compiler itself: one graph."""
    model = tiny_llama()
    runs.reset(model)
    torch._dynamo.utils.counters.clear()
    values = [dict(), dict(seed=9), dict(eos_token_id=[7, 9]), dict(max_new_tokens=25), dict(ids=IDS[:, :6])]
    for value in [*values, dict(temperature=1.3), dict(top_p=0.5), dict(top_k=5)]:
        assert_eager_text(model, "compiled", **{**SAMPLED, **value})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    runs.reset(model)


def test_a_drafter_that_taps_the_model_costs_no_other_step(tapes):
    """Heads put hooks on the model, which are deaf in the steps of others."""
    model = tiny_llama()
    drafters = [NoDrafter(), MedusaDrafter(fitted_heads(tiny_llama(), "hydra", steps=2)), NgramDrafter()]
    for drafter in (drafters[0], drafters[2], *drafters):
        assert_eager_text(model, drafter=drafter)
    assert len(tapes) == 3


def test_a_second_data_run_makes_no_other_step(tapes):
    model = tiny_llama()
    for temperature in (0.9, 0.4):
        texts, got = [Text([5 + number, 6, 7], 9, number, 12, number) for number in range(5)], {}

        def finish(text, tokens, failed, got=got):
            got[text.name] = tokens

        options = dict(batch=2, drafter=NgramDrafter(), temperature=temperature, executor="tape")
        decode_texts(model, texts, finish, **options)
        for text in texts:
            options = dict(do_sample=True, temperature=temperature, top_k=0, seed=[text.seed], max_new_tokens=9)
            alone = decode(model, "eager", torch.tensor([text.tokens]), **options)
            assert got[text.name] == alone[0, 3:].tolist()
    assert len(tapes) == 1


@pytest.mark.slow
def test_equal_weights_are_one_drafter(tapes):
    """Two objects with the same numbers share a step; other numbers have their own."""
    model = tiny_llama()
    for kind in (lambda seed: ModelDrafter(noisy_copy(model, seed=seed)),
                 lambda seed: MedusaDrafter(fitted_heads(model, "hydra", known=40, seed=seed))):  # fmt: skip
        tapes.clear()
        runs.reset(model)
        for seed in (1, 1, 2, 2):
            drafter = kind(seed)
            assert_eager_text(model, drafter=drafter)
        assert len(tapes) == 2


def test_a_drafter_that_changed_is_not_taken_for_the_one_it_was(tapes):
    """The step of the first drafter would draft with its new weights, which are not the second one's."""
    model = tiny_llama()
    first, second = (ModelDrafter(noisy_copy(model)) for _ in range(2))
    assert_eager_text(model, drafter=first)
    with torch.no_grad():
        first.model.lm_head.weight.neg_()
    out = decode(model, "tape", drafter=second, return_dict_in_generate=True)
    truth = decode(model, "eager", drafter=second, return_dict_in_generate=True)
    drafts = [[event.tokens for event in result.trace.events] for result in (out, truth)]
    assert drafts[0] == drafts[1] and len(tapes) == 2


@pytest.mark.parametrize("executor", ["eager", "tape", pytest.param("compiled", marks=pytest.mark.slow)])
def test_threads_get_their_own_texts(tapes, executor):
    model = tiny_llama()
    runs.reset(model)
    prompts = [IDS + number for number in range(4)]
    truth = [decode(model, "eager", ids) for ids in prompts]
    decode(model, executor)  # a step to fight for
    got: list = [None] * 4

    def work(number):
        torch.set_num_threads(1)
        got[number] = [decode(model, executor, prompts[number]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(text, truth[number]) for number, texts in enumerate(got) for text in texts)
    runs.reset(model)


@pytest.mark.slow
def test_a_call_inside_a_call_has_an_engine_of_its_own(tapes):
    model, inner = tiny_llama(), []

    def criterion(ids, scores, **kwargs):
        inner.append(decode(model, "tape", IDS + 7))
        return torch.zeros(len(ids), dtype=torch.bool)

    out = decode(model, "tape", stopping_criteria=[criterion])
    assert torch.equal(out, decode(model, "eager"))
    assert len(inner) == 12 and all(torch.equal(text, decode(model, "eager", IDS + 7)) for text in inner)


def test_copies_and_files_of_a_model_begin_without_kept_steps(tapes):
    model = tiny_llama()
    attributes = set(vars(model))
    truth = decode(model, "tape")
    assert set(vars(model)) == attributes, "nothing is hung on the model"
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(decode(other, "tape"), truth) and torch.equal(decode(other, "eager"), truth)
    assert len(tapes) == 3


def test_a_first_call_in_inference_mode_serves_calls_outside_of_it(tapes):
    model = tiny_llama()
    with torch.inference_mode():
        inside = decode(model, "tape", IDS.clone())
    assert torch.equal(decode(model, "tape"), inside)
    with torch.inference_mode():
        assert torch.equal(decode(model, "tape"), inside)
    assert len(tapes) == 1


def test_models_made_in_inference_mode_are_like_others():
    """Their tensors count no changes, and their weights are packed, told apart and decoded all the same."""
    with torch.inference_mode():
        model = tiny_llama()
        draft = ModelDrafter(noisy_copy(model))
    assert model.lm_head.weight.is_inference()
    Packing([model])
    assert fingerprint([model]) == fingerprint([tiny_llama()])
    truth = decode(tiny_llama(), "eager")
    assert torch.equal(decode(model, "eager", drafter=draft), truth)


@pytest.mark.slow
def test_engines_go_with_their_model():
    model = tiny_llama()
    decode(model, "compiled")
    engine = weakref.ref(pool.pool_of(model).runs[0].engine.state.tokens)
    torch._dynamo.reset()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and engine() is None


def test_kept_engines_stay_within_their_memory(tapes, monkeypatch):
    model = tiny_llama()
    decode(model, "tape")
    (run,) = pool.pool_of(model).runs
    assert run.nbytes == sum(2 * layer.keys.nbytes for layer in run.engine.target.cache.layers) > 0
    monkeypatch.setattr(pool, "_device_bytes", lambda device: 2.5 * run.nbytes / pool.KEPT_SHARE)
    for tree in ("chain:2", "chain:3", "chain:4"):
        decode(model, "tape", tree=tree)
    assert len(pool.pool_of(model).runs) == 2


def test_a_call_that_is_interrupted_before_it_begins_gives_its_step_back(tapes, monkeypatch):
    model = tiny_llama()
    assert_eager_text(model)

    def interrupt(packing):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Packing, "refresh", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decode(model, "tape")
    replays = tapes[0].replays
    assert_eager_text(model)
    assert len(tapes) == 1 and tapes[0].replays > replays


@pytest.mark.slow
def test_a_long_limit_compiles_only_if_the_text_becomes_long(monkeypatch, capfd):
    """`auto` begins eagerly; in the middle of a text it goes on compiled, with heads that read hidden states."""
    model = tiny_llama()
    runs.reset(model)
    monkeypatch.setattr(executors, "LONG_RUN", 1)
    hydra = MedusaDrafter(fitted_heads(model, "hydra", known=40))
    ids = IDS.repeat(2, 1)
    options = dict(drafter=hydra, ids=ids, max_new_tokens=40, eos_token_id=[17], return_dict_in_generate=True)
    truth = decode(model, "eager", **options)
    short = decode(model, "auto", **options)
    assert torch.equal(short.sequences, truth.sequences) and not pool.pool_of(model).runs
    assert "compiling" not in capfd.readouterr().err
    run, counts = CompiledLater.run, []

    def impatient(self, mark):
        counts.append(1)
        self.patience = 0.0 if len(counts) == 5 else 1e9
        return run(self, mark)

    monkeypatch.setattr(CompiledLater, "run", impatient)
    long = decode(model, "auto", **options)
    assert torch.equal(long.sequences, truth.sequences) and "compiling" in capfd.readouterr().err
    drafts = [[event.tokens for event in out.trace.events] for out in (long, truth)]
    assert drafts[0] == drafts[1], "the switch changes no draft either"
    assert {event.step for event in long.trace.events if COMPILING in event.seconds} == {4}, "a phase of its own"
    (kept,) = pool.pool_of(model).runs
    assert not kept.in_use
    counts.clear()
    again = decode(model, "auto", **options)
    assert torch.equal(again.sequences, truth.sequences) and not counts, "what was compiled is kept"
    runs.reset(model)
