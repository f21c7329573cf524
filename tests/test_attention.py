"""Grouped-query attention against transformers' own sdpa, and that decoding really runs it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paceline.spec import attention
from paceline.spec.masks import SlotView, showing
from paceline.spec.slots import SlotModel
from paceline.spec.tree import TokenTree, TreeShape
from torch import nn

from conftest import tiny_llama


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


@pytest.mark.parametrize("nodes, stock_calls", [(5, 0), (attention.LONGEST + 1, 2)])
def test_short_blocks_never_reach_the_stock_attention(monkeypatch, nodes, stock_calls):
    model = tiny_llama()
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    calls = []
    stock = attention._stock

    def counting(*args, **kwargs):
        calls.append(args)
        return stock(*args, **kwargs)

    monkeypatch.setattr(attention, "_stock", counting)
    slots = SlotModel(model, capacity=256)
    tree = TokenTree.of(TreeShape.chain(nodes - 1), model.device)
    with torch.no_grad():
        slots.forward_nodes(torch.ones(1, nodes, dtype=torch.long), torch.tensor([3]), tree)
    assert len(calls) == stock_calls
    calls.clear()
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.long))
    assert len(calls) == model.config.num_hidden_layers  # not ours outside a slot forward
