"""Grouped-query attention: which code attends to a block, that it equals transformers' own, that decoding runs it."""

import paceline
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paceline.spec.engines import runs
from paceline.spec.kernels import native
from paceline.spec.kernels.cpu import has_bfloat16
from paceline.spec.kernels.linears import Packing
from paceline.spec.target import attention
from paceline.spec.target.masks import SlotView, showing
from paceline.spec.target.protocol import spans
from paceline.spec.target.slots import SlotModel
from paceline.spec.tree import TokenTree, TreeShape
from torch import nn

from support.models import tiny_llama


class Layer(nn.Module):
    """What transformers' sdpa reads of the attention module."""

    is_causal = True

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    nodes=st.sampled_from([1, 2, 7, 16, attention.LONGEST, attention.LONGEST + 1]),
    slots=st.integers(1, 40),
    widths=st.tuples(st.sampled_from([4, 8]), st.sampled_from([4, 6])),
    scaling=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 1000),
)
def test_it_equals_the_stock_attention(batch, kv_heads, groups, nodes, slots, widths, scaling, seed):
    torch.manual_seed(seed)
    query = torch.randn(batch, kv_heads * groups, nodes, widths[0], dtype=torch.float64)
    key = torch.randn(batch, kv_heads, slots, widths[0], dtype=torch.float64)
    value = torch.randn(batch, kv_heads, slots, widths[1], dtype=torch.float64)
    mask = torch.rand(batch, 1, nodes, slots) < 0.5
    mask[..., 0] = True  # a query that sees nothing is NaN in both
    stock, _ = attention._stock(Layer(groups), query, key, value, mask, scaling=scaling)
    with showing(SlotView(mask, mask, mask)):
        packed, weights = attention.packed_attention(Layer(groups), query, key, value, mask, scaling=scaling)
    assert weights is None
    assert packed.shape == stock.shape and packed.is_contiguous()
    torch.testing.assert_close(packed, stock, rtol=1e-10, atol=1e-12)


def test_it_takes_results_in_any_layout(monkeypatch):
    """On a GPU some kernels give (B, H, n, D) as a view of (B, n, H, D)."""
    torch_attention = attention.F.scaled_dot_product_attention

    def nodes_before_heads(*tensors, **options):
        return torch_attention(*tensors, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", nodes_before_heads)
    test_it_equals_the_stock_attention.hypothesis.inner_test(2, 3, 4, 7, 40, (8, 6), 0.3, 1)


@pytest.mark.parametrize("nodes, stock_calls", [(5, 0), (attention.LONGEST + 1, 2)])
def test_short_blocks_never_reach_the_stock_attention(monkeypatch, nodes, stock_calls):
    model = tiny_llama()
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    attention.install()
    calls, stock = [], attention._stock

    def counting(*args, **kwargs):
        calls.append(args)
        return stock(*args, **kwargs)

    monkeypatch.setattr(attention, "_stock", counting)
    monkeypatch.setattr(native, "can_attend", lambda *tensors: False)
    slots = SlotModel(model, 1, capacity=256)
    tree = TokenTree.of(TreeShape.chain(nodes - 1), model.device)
    with torch.no_grad():
        slots.forward_nodes(torch.ones(1, nodes, dtype=torch.long), torch.tensor([3]), tree)
    assert len(calls) == stock_calls
    calls.clear()
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.long))
    assert len(calls) == model.config.num_hidden_layers  # not ours outside a slot forward


EMULATED = pytest.mark.skipif(not has_bfloat16(), reason="bfloat16 is emulated here, which takes minutes")


@torch.no_grad()
def test_trees_and_prompts_are_attended_by_our_own_code(compiled_source, monkeypatch):
    model = tiny_llama().bfloat16()
    calls, real = [], native.can_attend
    monkeypatch.setattr(native, "can_attend", lambda *tensors: calls.append(real(*tensors)) or calls[-1])
    slots, tree = SlotModel(model, 1, 200), TokenTree.of(TreeShape.chain(4), torch.device("cpu"))
    slots.forward_nodes(torch.ones(1, 5, dtype=torch.long), torch.tensor([0]), tree)
    assert calls == [True] * model.config.num_hidden_layers
    slots.forward_text(torch.ones(1, 190, dtype=torch.long), torch.arange(190)[None])
    assert calls == [True] * 2 * model.config.num_hidden_layers


@torch.no_grad()
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=EMULATED), torch.float32])
def test_chunks_of_a_prompt_do_not_matter(compiled_source, dtype):
    """Bit by bit: the slots after reading in pieces, also longer ones than one call of the kernel takes."""
    model = tiny_llama(hidden_size=64, intermediate_size=96).to(dtype)
    tokens = torch.randint(1, 61, (2, 230), generator=torch.Generator().manual_seed(0))
    held = []
    for chunk in (230, 100, 7, 1):
        slots = SlotModel(model, 2, 256)
        with Packing([model]):
            for span in spans(tokens, torch.tensor([230, 150]), chunk):
                slots.read(span)
        held.append([layer.by_row(buffer)[:, :149] for layer in slots.cache.layers for buffer in layer.buffers])
    for other in held[1:]:
        assert all(map(torch.equal, other, held[0]))


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_our_own_attention_stands_in_for_the_stock_one(compiled_source, monkeypatch, heads, scaling):
    """The same call in bfloat16, once each way, as transformers makes it in a slot forward."""
    torch.manual_seed(0)
    query = torch.randn(2, 5, heads[0], 16).bfloat16().transpose(1, 2)
    key, value = (torch.randn(2, 40, heads[1], 16).bfloat16().transpose(1, 2) for _ in range(2))
    mask = torch.rand(2, 1, 5, 40) < 0.5
    mask[..., 0] = True
    layer = Layer(heads[0] // heads[1])
    with showing(SlotView(mask, mask, mask)):
        ours, _ = attention.packed_attention(layer, query, key, value, mask, scaling=scaling)
        monkeypatch.setattr(native, "can_attend", lambda *tensors: False)
        stock, _ = attention.packed_attention(layer, query, key, value, mask, scaling=scaling)
    assert not torch.equal(ours, stock), "two ways were taken"
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    "change", ["broadcast mask", "another batch", "two dtypes", "float64", "strided", "additive mask"]
)
def test_what_our_own_attention_does_not_take(compiled_source, change):
    query, key = torch.randn(2, 4, 3, 16).bfloat16(), torch.randn(2, 2, 9, 16).bfloat16()
    mask = torch.ones(2, 1, 3, 9, dtype=torch.bool)
    assert native.can_attend(query, key, key, mask)
    if change == "broadcast mask":
        mask = mask[:1]
    elif change == "another batch":
        key = key[:1]
    elif change == "two dtypes":
        query = query.float()
    elif change == "float64":
        query, key = query.double(), key.double()
    elif change == "strided":
        key = key.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        mask = mask.bfloat16()
    assert not native.can_attend(query, key, key, mask)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_step_with_our_own_attention_is_the_eager_one(compiled_source, ragged, traced_only):
    """The operator inside a traced step, on ragged rows and a tree: the same text as eagerly."""
    model = tiny_llama()
    options = dict(do_sample=False, max_new_tokens=12, drafter="ngram", tree="2x2")
    eager = paceline.generate(model, *ragged, executor="eager", **options)
    compiled = paceline.generate(model, *ragged, executor="compiled", **options)
    runs.reset(model)
    assert torch.equal(eager, compiled)


def rows_do_not_matter(*widths):
    """Whether this machine's bfloat16 linear layers give a row the same numbers whatever rows are beside it."""
    torch.manual_seed(0)
    for inner, outer in widths:
        x, weight = torch.randn(24, inner).bfloat16(), torch.randn(outer, inner).bfloat16()
        whole = nn.functional.linear(x, weight)
        if not all(torch.equal(nn.functional.linear(x[:count], weight), whole[:count]) for count in (1, 2, 5, 16)):
            return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, executor",
    [
        pytest.param(torch.bfloat16, "eager", marks=EMULATED),
        (torch.float32, "eager"),
        (None, "compiled"),  # in bfloat16, which fused kernels could round elsewhere, if it can be
    ],
)
def test_text_is_the_same_with_and_without_drafts(compiled_source, dtype, executor):
    """Not up to near-ties: bit for bit, where linear layers allow it. A tiny random model has ties all the time."""
    steady = has_bfloat16() and rows_do_not_matter((192, 192), (192, 96), (192, 256), (256, 192), (192, 61))
    if dtype == torch.bfloat16 and not steady:
        pytest.skip("bfloat16 linear layers depend on the number of rows on this machine")
    dtype = dtype or (torch.bfloat16 if steady else torch.float32)
    model = tiny_llama(hidden_size=192, intermediate_size=256, initializer_range=0.1).to(dtype)
    torch.manual_seed(1)
    prompts = torch.randint(1, 61, (4 if executor == "eager" else 3, 1, 12))
    options = dict(max_new_tokens=48, executor=executor, return_dict_in_generate=True, output_logits=True)
    ways = [dict(do_sample=False), dict(do_sample=True, temperature=0.7, top_k=0, seed=0)]
    for sampling in ways if executor == "eager" else ways[:1]:  # compiling takes seconds
        for ids in prompts:
            plain = paceline.generate(model, ids, **sampling, **options)
            for tree in ("chain:4", "4x2x1") if executor == "eager" else ("chain:4",):
                drafted = paceline.generate(model, ids, drafter="ngram", tree=tree, **sampling, **options)
                assert torch.equal(drafted.sequences, plain.sequences)
                assert all(map(torch.equal, drafted.logits, plain.logits))
