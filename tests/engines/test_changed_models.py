"""A kept step is never taken for another state of the model."""

import copy

import pytest
import torch
from paceline.spec.engines import runs
from paceline.spec.engines.module_state import addresses, fingerprint, structure
from torch import nn

from support.kept_steps import assert_eager_text, decode
from support.models import tiny_llama


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


@pytest.mark.slow
def test_a_compiled_step_sees_weights_that_changed_in_place(traced_only):
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
