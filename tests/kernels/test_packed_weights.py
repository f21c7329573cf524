"""Packed weights: the same products, packed again when weights change, left behind by copies."""

import copy
import pickle

import paceline
import pytest
import torch
from paceline.spec.engines import runs
from paceline.spec.kernels import native
from paceline.spec.kernels.cpu import has_bfloat16, is_x86
from paceline.spec.kernels.linears import pack, packed_linears
from torch import nn

from support.models import as_traced, tiny_llama

pytestmark = pytest.mark.skipif(not (torch.backends.mkldnn.is_available() and is_x86()), reason="not an x86 CPU")
DTYPES = [torch.float32, *([torch.bfloat16] if has_bfloat16() else [])]


def linear(inputs: int, outputs: int, bias: bool, dtype=DTYPES[-1]) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 16), (1, 3, 70)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_products_are_the_products(dtype, rows, bias):
    layer = linear(96, 61, bias, dtype)
    x = torch.randn(*rows, 96).to(dtype)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    pack([layer])
    assert layer.packed_weight.tensor.is_mkldnn == (dtype == torch.bfloat16 or not native.prepare())
    with as_traced(layer):
        found = layer(x)
    assert found.shape == exact.shape and found.dtype == dtype
    near = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found.double(), exact, rtol=near, atol=near)


@pytest.fixture
def panels():
    if not native.prepare():
        pytest.skip("there is no compiler")
    return native.panels


@pytest.fixture(params=["short", "long"])
def weights(request):
    """A function that makes weights whose numbers are bfloat16, or are not."""
    return lambda *shape: torch.randn(shape).bfloat16().float() if request.param == "short" else torch.randn(shape)


@pytest.mark.parametrize("outputs, inputs", [(1, 1), (16, 3), (61, 96), (130, 40), (1000, 7)])
def test_a_row_has_the_same_numbers_beside_any_others(panels, weights, outputs, inputs):
    """In panels every sum is taken in the order of the inputs, as float32 rounds it."""
    torch.manual_seed(outputs)
    weight, bias, x = weights(outputs, inputs), torch.randn(outputs), torch.randn(200, inputs)
    packed = panels(weight)
    exact = (x.double() @ weight.double().T + bias.double()).float()
    whole = torch.ops.paceline.panel_linear(x, packed, bias, outputs)
    torch.testing.assert_close(whole, exact, rtol=1e-5, atol=1e-5)
    for rows in (*range(1, 20), 95, 96, 97):
        assert torch.equal(torch.ops.paceline.panel_linear(x[:rows], packed, bias, outputs), whole[:rows])
    assert torch.equal(torch.ops.paceline.panel_linear(x.T.contiguous().T, packed, bias, outputs), whole)


def test_panels_hold_bfloat16_where_that_is_all_there_is(panels):
    numbers = [[1.0, -2.0, 0.5, -0.0], [2.0**-130, -(2.0**-133), 3e38, 1.0078125]]  # -(2**-133): the least of all
    short = torch.tensor(numbers).bfloat16().float().repeat(20, 1)
    long = short + torch.tensor([2.0**-20, 0, 0, 0])
    assert panels(short).dtype == torch.int32 and panels(long).dtype == torch.float32
    assert panels(long).nbytes == 2 * panels(short).nbytes
    for weight in (short, long):
        kept = torch.ops.paceline.panel_linear(torch.eye(4), panels(weight), None, len(weight))
        assert torch.equal(kept, weight.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_are_read_only_inside_and_follow_the_weights(dtype):
    """In bfloat16 the products are the very same numbers."""
    near = {"rtol": 0, "atol": 0} if dtype == torch.bfloat16 else {}
    layer, x = linear(32, 32, False, dtype), torch.randn(3, 32).to(dtype)
    pack([layer])
    first = layer.packed_weight.tensor
    before = layer(x)
    layer.weight.data.mul_(-2)  # which no version counter sees
    with as_traced(layer):
        torch.testing.assert_close(layer(x), before, **near)  # the packed copy is read
    assert torch.equal(layer(x), before * -2), "outside, the weights are"
    pack([layer])
    with as_traced(layer):
        torch.testing.assert_close(layer(x), before * -2, **near)
    second = layer.packed_weight.tensor
    pack([layer])
    assert layer.packed_weight.tensor is second is not first, "packed again where weights changed, and only there"


def test_nothing_but_the_trace_sees_packed_weights():
    """Neither the class, nor another thread, nor the same layer outside of a compiler."""
    layer, x, usual = linear(32, 32, False, torch.float32), torch.randn(3, 32), nn.Linear.forward
    pack([layer])
    truth = layer(x)
    layer.packed_weight.tensor = torch.zeros(1)  # no layer could be computed with it
    with packed_linears([layer]):
        assert nn.Linear.forward is usual and torch.equal(layer(x), truth)
    assert "forward" not in vars(layer)


def test_layers_on_the_same_memory_share_a_copy():
    one, other, apart = (linear(32, 32, False) for _ in range(3))
    other.weight = nn.Parameter(one.weight.detach(), requires_grad=False)
    pack([one, nn.ModuleList([other, apart])])
    assert one.packed_weight is other.packed_weight is not apart.packed_weight


def test_copies_leave_packed_weights_behind():
    layer, x = linear(32, 32, True), torch.randn(3, 32).to(DTYPES[-1])
    pack([layer])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.weight.data.mul_(2)
        with as_traced(other):
            assert torch.equal(other(x), nn.functional.linear(x, other.weight, other.bias))
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_what_gains_nothing_is_left_alone():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    layers = nn.ModuleList([linear(32, 32, False, torch.float64), Own(4, 4).to(DTYPES[-1])])
    pack([layers])
    assert not any(hasattr(layer, "packed_weight") for layer in layers)
    layer = linear(32, 32, False)
    pack([layer])
    pack([layer.double()])
    assert not hasattr(layer, "packed_weight"), "no longer a dtype that is packed"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_step_follows_weights_that_change(ragged, dtype):
    """The kept step, with the packed weights of now, gives the text of a step compiled now."""
    model = tiny_llama().to(torch.bfloat16).to(dtype)  # times -1.5, not all of its weights are bfloat16 any more
    options = dict(do_sample=False, max_new_tokens=8, executor="compiled")
    first = paceline.generate(model, *ragged, **options)
    before = model.lm_head.packed_weight.tensor
    for parameter in model.parameters():
        parameter.data.mul_(-1.5)
    second = paceline.generate(model, *ragged, **options)
    if dtype == torch.float32 and native.prepare():
        assert (before.dtype, model.lm_head.packed_weight.tensor.dtype) == (torch.int32, torch.float32)
    runs.reset(model)
    for module in model.modules():
        module.__dict__.pop("packed_weight", None)
    assert torch.equal(second, paceline.generate(model, *ragged, **options))
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_a_compiled_step_reads_weights_in_onednns_layout(ragged, monkeypatch):
    monkeypatch.setattr(native, "prepare", lambda: False)
    model = tiny_llama()
    options = dict(do_sample=False, max_new_tokens=8)
    text = paceline.generate(model, *ragged, executor="compiled", **options)
    assert model.lm_head.packed_weight.tensor.is_mkldnn
    assert torch.equal(text, paceline.generate(model, *ragged, executor="eager", **options))
