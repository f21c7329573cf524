"""Packed weights: the same products, packed again when weights change, left behind by copies."""

import copy
import gc
import pickle
import threading
import weakref

import paceline
import pytest
import torch
from paceline.spec.engines import runs
from paceline.spec.kernels import linears, native
from paceline.spec.kernels.linears import Packing
from torch import nn

from support.models import tiny_llama

pytestmark = pytest.mark.skipif(not native.prepare(), reason="no C++ compiler, or a CPU that our own code is not for")
DTYPES = [torch.float32, torch.bfloat16]


def linear(inputs: int, outputs: int, bias: bool, dtype=DTYPES[-1]) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 16), (1, 3, 70), (0, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_packed_products_are_the_products(dtype, rows, bias):
    layer = linear(96, 61, bias, dtype)
    x = torch.randn(*rows, 96).to(dtype)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with Packing([layer]):
        out = layer(x)
    assert out.shape == exact.shape and out.dtype == dtype
    near = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(out.double(), exact, rtol=near, atol=near)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_packed_weights_are_read_only_inside_and_follow_the_weights(dtype, bias):
    layer, x = linear(32, 32, bias, dtype), torch.randn(3, 32).to(dtype)
    packing = Packing([layer])
    first = layer.packed_weight
    with packing:
        before = layer(x)
        for parameter in layer.parameters():
            parameter.data.mul_(-2)  # which no version counter sees
        assert torch.equal(layer(x), before), "the packed copy is read"
    torch.testing.assert_close(layer(x), before * -2)
    packing.refresh()
    with packing:
        assert torch.equal(layer(x), before * -2)
    second = layer.packed_weight
    packing.refresh()
    assert layer.packed_weight is second is not first, "packed again where weights changed, and only there"


@torch.no_grad()
def test_nothing_but_this_thread_sees_packed_weights():
    """Neither the class, nor another thread, nor what comes after; packings of one layer may overlap."""
    layer, x, usual = linear(32, 32, False, torch.float32), torch.randn(3, 32), nn.Linear.forward
    one, other = Packing([layer]), Packing([nn.Sequential(layer)])
    truth, elsewhere = layer(x), []
    layer.weight.data.mul_(2)  # from now on, what is packed can be told from what is not
    with one:
        with other, one:
            assert torch.allclose(layer(x), truth)
        assert torch.allclose(layer(x), truth)
        thread = threading.Thread(target=lambda: elsewhere.append(nn.functional.linear(x, layer.weight) - layer(x)))
        thread.start()
        thread.join()
        assert nn.Linear.forward is usual
    assert torch.equal(elsewhere[0], torch.zeros(3, 32))
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))
    assert "forward" not in vars(layer)


def test_packings_do_not_keep_models():
    layer = linear(32, 32, False)
    packing, gone = Packing([layer]), weakref.ref(layer)
    with packing:
        pass
    del layer
    gc.collect()
    assert gone() is None
    with packing:
        pass


def test_there_must_be_memory_for_a_copy(monkeypatch):
    class Little:
        available = 100

    monkeypatch.setattr(linears.psutil, "virtual_memory", Little)
    with pytest.raises(ValueError, match="no memory for a packed copy of a weight of 0 MB; free some"):
        Packing([linear(32, 32, False)])


def test_layers_on_the_same_memory_share_a_copy():
    one, other, apart = (linear(32, 32, False) for _ in range(3))
    other.weight = nn.Parameter(one.weight.detach(), requires_grad=False)
    Packing([one, nn.ModuleList([other, apart])])
    assert one.packed_weight is other.packed_weight is not apart.packed_weight


def test_copies_leave_packed_weights_behind():
    layer, x = linear(32, 32, True), torch.randn(3, 32).to(DTYPES[-1])
    packing = Packing([layer])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.weight.data.mul_(2)
        with packing:
            assert torch.equal(other(x), nn.functional.linear(x, other.weight, other.bias))
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_what_gains_nothing_is_left_alone():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    layers = nn.ModuleList([linear(32, 32, False, torch.float64), Own(4, 4).to(DTYPES[-1])])
    Packing([layers])
    assert not any(hasattr(layer, "packed_weight") for layer in layers)
    layer = linear(32, 32, False)
    Packing([layer])
    Packing([layer.double()])
    assert not hasattr(layer, "packed_weight"), "no longer a dtype that is packed"


@pytest.mark.slow
def test_a_compiled_step_follows_weights_that_change(ragged):
    """The kept step with the packed weights of now, and another one where they are packed otherwise now, give the text
    of a model that was never packed."""
    model = tiny_llama().to(torch.bfloat16).float()
    options = dict(do_sample=False, max_new_tokens=8)
    torch._dynamo.reset()  # what other tests compiled
    torch._dynamo.utils.counters.clear()
    texts = []
    # At most so many graphs: the kernels of both kinds may be called by one.
    for factor, dtype, graphs in ((1, torch.int32, 1), (-2, torch.int32, 1), (-1.5, torch.float32, 2)):
        for parameter in model.parameters():  # not all of them are bfloat16 numbers in the end
            parameter.data.mul_(factor)
        texts.append(paceline.generate(model, *ragged, executor="compiled", **options))
        assert torch.equal(texts[-1], paceline.generate(copy.deepcopy(model), *ragged, executor="eager", **options))
        assert model.lm_head.packed_weight.packed.tensor.dtype == dtype
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs
    assert not torch.equal(texts[0], texts[1]) and not torch.equal(texts[1], texts[2])
    runs.reset(model)
