"""Repeated layers as regions: which they are, that they are traced once, and that odd layers give no other numbers."""

import pytest
import torch
from paceline.drafters.blocks import in_blocks
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines import executors
from paceline.spec.engines.executors import Compiled
from paceline.spec.engines.regions import distinct_layers, layer_kinds, layers_as_regions, repeated_layers
from paceline.spec.plan.step_times import open_idle
from paceline.spec.target.weights import Weights
from paceline.spec.tree import TreeShape
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from support.families import tiny
from support.models import tiny_llama


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that the compiled executor hands to its backend, which runs them operator by operator."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return aot_eager(graph, inputs)

    def traced(function):
        own = function.__code__.replace()
        copy = type(function)(own, function.__globals__, closure=function.__closure__)
        options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        return torch.compile(copy, backend=backend, fullgraph=True, dynamic=False, options=options)

    monkeypatch.setattr(executors, "compiled", traced)
    yield seen
    torch._dynamo.reset()


def engine_of(model):
    """An engine in the middle of a text of many different tokens."""
    engine = open_idle(model, "eager", NgramDrafter(), TreeShape.chain(2), capacity=64).engine
    engine.state.tokens.copy_(torch.arange(64) % 50 + 5)
    with torch.no_grad():
        engine.idle_step()
        engine.read(16)
    return engine


def logits_of(engine):
    base, proposal = engine.state.lengths - 1, engine.session.propose(engine.state)
    return lambda engine, mark: engine.target.forward(proposal, base).logits


def layer_calls(graph):
    """The subgraphs that the graph calls for the target's layers, one name a call."""
    return [node.args[1] for node in graph.graph.nodes if node.target is torch.ops.higher_order.invoke_subgraph]


def test_repeated_layers_are_found_by_structure():
    llama = tiny_llama(num_hidden_layers=3)
    assert repeated_layers(llama) == list(llama.model.layers)
    assert distinct_layers([llama, llama]) == 2
    outer = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(2, 2)] * 2)), nn.Sequential(nn.Linear(2, 2))])
    assert repeated_layers(nn.Sequential(outer)) == list(outer), "not the lists inside"
    assert repeated_layers(nn.ModuleList([nn.Linear(2, 2)] * 3)) == []
    hybrid = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.TransformerEncoderLayer(4, 2), nn.Sequential(nn.ReLU())])
    assert repeated_layers(hybrid) == [hybrid[0], hybrid[2]]


def mixed_blocks(**config):
    """A model of four layers, every second of which has some weights in other blocks."""
    model = tiny_llama(num_hidden_layers=4, hidden_size=64, intermediate_size=64, **config)
    for number, layer in enumerate(model.model.layers):
        for path, part in list(layer.named_modules()):
            if isinstance(part, nn.Linear):
                bits = Weights("q8" if number % 2 and "down" in path else "q4")
                layer.set_submodule(path, in_blocks(part.weight, part.bias, bits))
    return model


def test_layers_of_other_settings_or_blocks_are_of_another_kind():
    model = tiny_llama(num_hidden_layers=4)
    layers = list(model.model.layers)
    assert len(set(layer_kinds(layers))) == 1, "their numbers do not matter"
    layers[2].self_attn.scaling *= 2
    kinds = layer_kinds(layers)
    assert kinds[0] == kinds[1] == kinds[3] != kinds[2]
    layers[1].mlp.act_fn = nn.Tanh()
    layers[3].mlp.scaling = {"default": 1.0}
    layers[0].mlp.scaling = {"default": 2.0}
    assert len(set(layer_kinds(layers))) == 4
    for layer in layers:
        layer.mlp.scaling = {"default": 3.0}
    assert len(set(layer_kinds(layers))) == 3
    kinds = layer_kinds(list(mixed_blocks().model.layers))
    assert kinds[0] == kinds[2] != kinds[1] == kinds[3]
    hybrid = [*tiny_llama(num_hidden_layers=2).model.layers, *tiny("gemma2").model.layers]
    assert len({kind[0] for kind in layer_kinds(hybrid)}) == 2


def test_layers_of_a_draft_model_that_is_run_several_times_are_told_apart(graphs):
    """Torch's own guards do not, in the second and later runs within a step."""
    drafter = ModelDrafter(mixed_blocks(seed=5), "draft")
    engine = open_idle(tiny_llama(num_hidden_layers=2), "eager", drafter, TreeShape.chain(3), capacity=64).engine
    with torch.no_grad():
        Compiled(engine)
    (graph,) = graphs
    calls = layer_calls(graph)
    assert len(calls) == 2 + 3 * 4, "none is traced as a part of the whole"
    assert len(set(calls)) <= 1 + 2 * 2, "a region for each kind of layer and number of tokens"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_all_layers_are_one_subgraph(graphs, family):
    engine = engine_of(tiny(family))
    work = logits_of(engine)
    with torch.no_grad():
        truth = work(engine, lambda phase: None)
        got = Compiled(engine, work).step()
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4)
    (graph,) = graphs
    calls = layer_calls(graph)
    assert len(calls) == 2 and len(set(calls)) == 1


def test_a_layer_with_another_constant_is_another_subgraph(graphs):
    """Same shapes and modules: only guards can tell the layers apart."""
    model = tiny_llama(num_hidden_layers=4)
    model.model.layers[1].self_attn.scaling *= 3
    model.model.layers[3].self_attn.scaling *= 3
    engine = engine_of(model)
    work = logits_of(engine)
    with torch.no_grad():
        truth = work(engine, lambda phase: None)
        got = Compiled(engine, work).step()
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4)
    (graph,) = graphs
    first, second, third, fourth = layer_calls(graph)
    assert first == third != second == fourth


class Sharing(nn.Module):
    """A decoder layer that adds what its neighbour left in a dict."""

    def __init__(self, layer, shared):
        super().__init__()
        self.layer, self.shared = layer, shared
        self.self_attn = layer.self_attn

    def forward(self, hidden, *args, **kwargs):
        out = self.layer(hidden + self.shared.get("last", 0), *args, **kwargs)
        self.shared["last"] = out * 0.5
        return out


class Boxed(Sharing):
    """The same, but what it leaves is no tensor."""

    def forward(self, hidden, *args, **kwargs):
        left = self.shared.pop("last", None)
        out = self.layer(hidden if left is None else hidden + left[0], *args, **kwargs)
        self.shared["last"] = [out * 0.5]
        return out


@pytest.mark.parametrize("kind", [Sharing, Boxed])
def test_layers_that_talk_past_their_arguments_give_the_same_numbers(graphs, kind):
    model, shared = tiny_llama(num_hidden_layers=3), {}
    engine = engine_of(model)
    model.model.layers = nn.ModuleList([kind(layer, shared) for layer in model.model.layers])
    forward = logits_of(engine)

    def work(engine, mark):
        shared.clear()
        return forward(engine, mark)

    with torch.no_grad():
        truth = work(engine, lambda phase: None)
        made = Compiled(engine, work)
        got = made.step()
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4)


def test_a_model_whose_layers_torch_refuses_is_compiled_whole(graphs, monkeypatch):
    """Regions that fail leave nothing behind, and the step is what it was."""

    def refused(*args):
        def region(*args, **kwargs):
            raise RuntimeError("no region")

        return region

    model = tiny_llama()
    engine = engine_of(model)
    work = logits_of(engine)
    monkeypatch.setattr("paceline.spec.engines.regions._region", refused)
    with torch.no_grad():
        truth = work(engine, lambda phase: None)
        torch.testing.assert_close(Compiled(engine, work).step(), truth, rtol=1e-4, atol=1e-4)
    assert layer_calls(graphs[-1]) == []
    assert not any({"forward", "_paceline_cache_layer"} & set(vars(layer)) for layer in model.model.layers)


def test_regions_end_with_the_block():
    model = tiny_llama()
    with pytest.raises(KeyError), layers_as_regions([model], lambda: None) as found:
        assert found == 2 and all("forward" in vars(layer) for layer in model.model.layers)
        raise KeyError
    assert not any("forward" in vars(layer) for layer in model.model.layers)
