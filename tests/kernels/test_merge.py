"""Linear layers that share an input are one call in a compiled graph, and give the same numbers."""

from operator import getitem

import pytest
import torch
from paceline.spec.engines.inductor import compiled
from paceline.spec.kernels.block_linear import BlockLinear
from paceline.spec.kernels.linears import Packing
from paceline.spec.kernels.merge import MergeLinears
from torch import nn
from torch._inductor.utils import run_and_get_code

from support.blocks import rounded


class Branches(nn.Module):
    """Three layers share an input, one of them with another kind of weight, and two share another one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.other = nn.Linear(32, 48), nn.Linear(32, 7, bias=False), nn.Linear(32, 16)
        self.blocks = BlockLinear(rounded(torch.randn(24, 32)))
        self.requires_grad_(False)

    def forward(self, x):
        y = x * 2
        first, second = self.one(x), self.two(x)
        return first.relu(), second, self.blocks(x), self.other(y), self.one(y) + first


@pytest.mark.slow
@torch.no_grad()
def test_layers_that_share_an_input_are_one_call(compiled_source):
    model, x = Branches(), torch.randn(2, 3, 32)
    with Packing([model]) as packing:
        truth = model(x)
        step = compiled(lambda: model(x))
        results, (code,) = run_and_get_code(step)
        assert code.count("torch.ops.paceline.linears.default(") == 3, "of x, of the blocks, and of y"
        for result, expected in zip(results, truth):
            assert torch.equal(result, expected)
        model.one.weight.data.mul_(3)
    packing.refresh()
    with packing:
        for result, expected in zip(step(), model(x)):
            assert torch.equal(result, expected), "the step follows weights that change"


def test_a_layer_whose_weight_is_made_later_stays_apart():
    """A call can only be moved up to where its weight is there already."""
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    operator = torch.ops.paceline.linears.default

    def call(packed):
        node = graph.call_function(operator, (x, [packed], [4], [16, 0, 0, 0, 0, 0]))
        node.meta["val"] = [torch.empty(1, 4)]
        return graph.call_function(torch._C._TensorBase.relu, (graph.call_function(getitem, (node, 0)),))

    first = call(weight)
    later = graph.call_function(torch._C._TensorBase.neg, (weight,))
    graph.output((first, call(later), call(weight)))
    MergeLinears()(graph)
    graph.lint()
    merged, apart = graph.find_nodes(op="call_function", target=operator)
    assert merged.args[1] == [weight, weight] and apart.args[1] == [later]
