"""Kept steps: made once for all that is data, never taken for another state of the model, never shared, freed.

By tape wherever a recording stands for a capture, and compiled where the compiler is at stake.
"""

import copy
import gc
import io
import threading
import weakref

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.medusa import MedusaDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines import executors, pool, runs
from paceline.spec.engines.executors import CompiledLater
from paceline.spec.engines.module_state import addresses, fingerprint, structure
from paceline.spec.kernels.linears import pack
from paceline.spec.plan.store import plan_path
from paceline.spec.proposal import NoDrafter
from paceline.spec.refill import Text, decode_texts
from tape import TapeExecutor, tape_executor
from torch import nn

from conftest import fitted_heads, noisy_copy, tiny_llama

IDS = torch.arange(5, 15)[None]
SAMPLED = dict(do_sample=True, temperature=0.8, top_p=0.9, top_k=12, min_p=0.01)


@pytest.fixture
def tapes(monkeypatch):
    with tape_executor(monkeypatch) as made:
        yield made
    TapeExecutor.made.clear()


def decode(model, executor, ids=IDS, drafter=None, **options):
    options = dict(max_new_tokens=12, pad_token_id=0, do_sample=False, seed=3) | options
    return paceline.generate(model, ids, drafter=drafter or NgramDrafter(), executor=executor, **options)


def assert_eager_text(model, executor="tape", **options):
    assert torch.equal(decode(model, executor, **options), decode(model, "eager", **options))


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


@pytest.mark.parametrize("drafter", [NoDrafter(), NgramDrafter()], ids=lambda drafter: drafter.name)
def test_another_value_is_no_other_step(tapes, drafter):
    model = tiny_llama()
    for values in VALUES.values():
        for value in values:
            assert_eager_text(model, drafter=drafter, **{**SAMPLED, **value})
    assert len(tapes) == 1


def test_another_value_compiles_nothing():
    """The same by the compiler itself, greedily and sampled, plain and drafted: one graph each."""
    model = tiny_llama()
    runs.reset(model)
    for drafter, sampling in ((NoDrafter(), {}), (NgramDrafter(), SAMPLED)):
        torch._dynamo.utils.counters.clear()
        for value in [dict(), dict(seed=9), dict(eos_token_id=[7, 9]), dict(max_new_tokens=25), dict(ids=IDS[:, :6])]:
            assert_eager_text(model, "compiled", drafter=drafter, **{**sampling, **value})
        for value in [dict(temperature=1.3), dict(top_p=0.5), dict(top_k=5)] if sampling else []:
            assert_eager_text(model, "compiled", drafter=drafter, **{**sampling, **value})
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


class Adapter(nn.Module):
    """What an adapter library puts around a linear layer: switched by a plain attribute."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.active, self.scales = layer, "one", {"one": 1.0, "two": -1.0, "none": 0.0}
        self.down = nn.Linear(layer.in_features, 3, bias=False)
        self.up = nn.Linear(3, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.scales[self.active] * self.up(self.down(x))


def a_forward_hook(model):
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: -output)


def another_activation(model):
    model.model.layers[0].mlp.act_fn = nn.ReLU()


def another_scaling(model):
    model.model.layers[1].self_attn.scaling *= 3


def resized_embeddings(model):
    model.resize_token_embeddings(90)


def switched_adapter(model):
    for layer in model.model.layers:
        layer.mlp.up_proj.active = "two"


def merged_adapter(model):
    for layer in model.model.layers:
        adapter = layer.mlp.up_proj
        adapter.layer.weight.data += adapter.up.weight @ adapter.down.weight
        layer.mlp.up_proj = adapter.layer


def added_adapters(model):
    for layer in model.model.layers:
        layer.mlp.down_proj = Adapter(layer.mlp.down_proj)


def fewer_layers(model):
    del model.model.layers[1]
    model.config.num_hidden_layers = 1


def another_rope(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def permuted_weights(model):
    weight = model.model.layers[0].mlp.up_proj.layer.weight
    weight.data.copy_(weight.data[torch.randperm(len(weight))].clone())


def one_other_number(model):
    model.model.layers[0].mlp.up_proj.layer.weight.data[3, 5] += 4.0


CHANGES = [
    a_forward_hook, another_activation, another_scaling, resized_embeddings, switched_adapter, merged_adapter,
    added_adapters, fewer_layers, another_rope, permuted_weights, one_other_number,
]  # fmt: skip


def adapted():
    torch.manual_seed(4)
    model = tiny_llama(seed=9)
    for layer in model.model.layers:
        layer.mlp.up_proj = Adapter(layer.mlp.up_proj)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_kept_step_sees_that_the_model_changed(tapes, change):
    model = adapted()
    before = decode(model, "tape")
    assert torch.equal(before, decode(model, "eager"))
    change(model)
    assert_eager_text(model)
    if change not in (resized_embeddings, merged_adapter):  # new tokens are unlikely, a merge computes the same
        assert not torch.equal(before, decode(model, "tape")), "the change is one that matters"


def test_a_compiled_step_sees_weights_that_changed_in_place():
    """It reads packed copies, which must be packed again; switching back and forth compiles each state once."""
    model = adapted()
    runs.reset(model)
    torch._dynamo.utils.counters.clear()
    assert_eager_text(model, "compiled")
    for change in (permuted_weights, one_other_number):
        change(model)
        assert_eager_text(model, "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for active in ("two", "one", "two"):
        for layer in model.model.layers:
            layer.mlp.up_proj.active = active
        assert_eager_text(model, "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    runs.reset(model)


@pytest.mark.parametrize("executor", ["eager", "tape", "compiled"])
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
    pack([model])
    assert fingerprint([model]) == fingerprint([tiny_llama()])
    truth = decode(tiny_llama(), "eager")
    assert torch.equal(decode(model, "eager", drafter=draft), truth)


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
    (kept,) = pool.pool_of(model).runs
    assert not kept.in_use
    counts.clear()
    again = decode(model, "auto", **options)
    assert torch.equal(again.sequences, truth.sequences) and not counts, "what was compiled is kept"
    runs.reset(model)


def test_the_state_of_a_module_is_its_structure_and_its_addresses():
    model = adapted()
    before = structure(model), addresses(model), fingerprint([model])
    assert (structure(model), addresses(model), fingerprint([model])) == before
    other = copy.deepcopy(model)
    assert fingerprint([other]) == before[2] and addresses(other) != before[1]
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    assert fingerprint([other]) != before[2]
    for change in (a_forward_hook, another_activation, another_scaling, switched_adapter, added_adapters):
        changed = adapted()
        mine = structure(changed)
        change(changed)
        assert structure(changed) != mine, change.__name__
    model.generation_config.temperature = 0.3
    assert structure(model) == before[0], "how texts are drawn is no part of it"


def test_a_plan_belongs_to_the_weights_of_its_drafter():
    """A draft that was trained again into the same folder has another plan, one that was loaded again the same."""
    model = tiny_llama()
    paths = [plan_path(model, ModelDrafter(noisy_copy(model, seed=seed)), "eager", "match", 0.0) for seed in (1, 1, 2)]
    assert paths[0] == paths[1] != paths[2]
    assert plan_path(model, NgramDrafter(), "eager", "match", 0.0) != plan_path(
        model, NgramDrafter(longest=3), "eager", "match", 0.0
    )
