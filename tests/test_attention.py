"""Grouped-query attention against transformers' own sdpa, our C++ against the formula, and that decoding runs them."""

import shutil

import paceline
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paceline.spec.engines import runs
from paceline.spec.kernels import native
from paceline.spec.kernels.cpu import has_bfloat16
from paceline.spec.target import attention
from paceline.spec.target.masks import SlotView, showing
from paceline.spec.target.slots import SlotModel
from paceline.spec.tree import TokenTree, TreeShape
from torch import nn

from conftest import tiny_llama

CAPABILITY = torch.backends.cpu.get_cpu_capability()


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
    attention.install()
    calls, stock = [], attention._stock

    def counting(*args, **kwargs):
        calls.append(args)
        return stock(*args, **kwargs)

    monkeypatch.setattr(attention, "_stock", counting)
    slots = SlotModel(model, 1, capacity=256)
    tree = TokenTree.of(TreeShape.chain(nodes - 1), model.device)
    with torch.no_grad():
        slots.forward_nodes(torch.ones(1, nodes, dtype=torch.long), torch.tensor([3]), tree)
    assert len(calls) == stock_calls
    calls.clear()
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.long))
    assert len(calls) == model.config.num_hidden_layers  # not ours outside a slot forward


def plain_attention(query, key, value, mask, scale):
    """The formula, query by query, in float64: (B, H, n, D), (B, Hkv, T, D), (B, Hkv, T, Dv) -> (B, n, H, Dv)."""
    batch, heads, nodes, _ = query.shape
    out = torch.zeros(batch, nodes, heads, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // key.shape[1])
            for i in range(nodes):
                seen = mask[b, 0, i]
                if seen.any():
                    scores = key[b, group, seen].double() @ query[b, h, i].double() * scale
                    out[b, i, h] = scores.softmax(0) @ value[b, group, seen].double()
    return out


EMULATED = pytest.mark.skipif(not has_bfloat16(), reason="bfloat16 is emulated here, which takes minutes")


@pytest.fixture(scope="module")
def compiled_source():
    native.prepare()
    if not (shutil.which("g++") or shutil.which("clang++")) or not native._MARCH.get(CAPABILITY):
        pytest.skip("no C++ compiler, or a CPU that our own attention is not for")
    assert native._loaded is not None, "the source compiles"


DTYPES = st.sampled_from([torch.bfloat16, torch.float32])


@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    nodes=st.sampled_from([1, 2, 7, 16]),
    slots=st.sampled_from([1, 15, 16, 17, 127, 128, 129, 300]),
    widths=st.tuples(st.sampled_from([4, 16, 20, 64, 80]), st.sampled_from([4, 64, 130])),
    seen=st.floats(0.0, 1.0),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
def test_our_own_attention_is_the_formula(
    compiled_source, batch, kv_heads, groups, nodes, slots, widths, seen, dtype, seed
):
    """Keys and values lie as in the slot cache, the slots behind the last one seen hold NaN, and a query that sees
    nothing gives zeros."""
    torch.manual_seed(seed)
    query = torch.randn(batch, nodes, kv_heads * groups, widths[0]).to(dtype).transpose(1, 2) * 3
    key, value = (torch.randn(batch, slots, kv_heads, width).to(dtype).transpose(1, 2) for width in widths)
    mask = torch.rand(batch, 1, nodes, slots) < seen
    reach = torch.randint(0, slots + 1, (batch,))
    mask &= torch.arange(slots) < reach[:, None, None, None]
    wanted = plain_attention(query, key, value, mask, 0.3)
    for row in range(batch):
        last = int(mask[row].any(0).any(0).nonzero().max()) + 1 if mask[row].any() else 0
        key[row, :, last:] = value[row, :, last:] = float("nan")
    assert native.can_attend(query, key, value, mask)
    got = torch.ops.paceline.slot_attention(query, key, value, mask, 0.3)
    assert got.dtype == dtype and got.is_contiguous()
    near = 5e-3 if dtype == torch.bfloat16 else 1e-5  # half a unit in bfloat16's last place is 2**-9
    torch.testing.assert_close(got.double(), wanted, rtol=near, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    others=st.integers(0, 15),
    seen=st.sampled_from([1, 2, 16, 100, 128, 130, 200]),
    gaps=st.integers(0, 30),
    widths=st.sampled_from([(64, 64), (20, 40), (128, 130)]),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
def test_what_a_query_gets_depends_on_what_it_sees_alone(
    compiled_source, kv_heads, groups, others, seen, gaps, widths, dtype, seed
):
    """Bit by bit: alone over whole text, or among other queries, with masked slots between the last ones it sees."""
    torch.manual_seed(seed)
    query = torch.randn(1, kv_heads * groups, 1, widths[0]).to(dtype)
    key, value = (torch.randn(1, kv_heads, seen, width).to(dtype) for width in widths)
    alone = torch.ops.paceline.slot_attention(query, key, value, torch.ones(1, 1, 1, seen).bool(), 0.3)
    places = torch.arange(seen)
    first = max(0, seen - 5)  # from here on the slots stand apart
    places[first:] += torch.randint(0, gaps + 1, (seen - first,)).cumsum(0)
    slots = int(places[-1]) + 1 + gaps
    wide = [torch.randn(1, kv_heads, slots, width).to(dtype) for width in widths]
    for padded, own in zip(wide, (key, value)):
        padded[:, :, places] = own
    among = torch.randn(1, kv_heads * groups, others + 1, widths[0]).to(dtype)
    among[:, :, others // 2] = query[:, :, 0]
    mask = torch.rand(1, 1, others + 1, slots) < 0.5
    mask[:, :, others // 2] = False
    mask[:, :, others // 2, places] = True
    out = torch.ops.paceline.slot_attention(among, *wide, mask, 0.3)
    assert torch.equal(out[:, others // 2], alone[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_our_own_attention_hides_no_nan(compiled_source, place, dtype):
    tensors = {name: torch.randn(2, 3, 40, 8).to(dtype) for name in ("query", "key", "value")}
    tensors["query"] = torch.randn(2, 6, 2, 8).to(dtype)
    tensors[place][1, 1, 1, 1] = float("nan")
    mask = torch.ones(2, 1, 2, 40, dtype=torch.bool)
    out = torch.ops.paceline.slot_attention(*tensors.values(), mask, 0.5)
    assert out[0].isfinite().all() and out[1].isnan().any()


@torch.no_grad()
def test_a_short_block_is_attended_by_our_own_code_and_a_long_one_is_not(compiled_source, monkeypatch):
    model = tiny_llama().bfloat16()
    calls, real = [], native.can_attend
    monkeypatch.setattr(native, "can_attend", lambda *tensors: calls.append(real(*tensors)) or calls[-1])
    slots, tree = SlotModel(model, 1, 200), TokenTree.of(TreeShape.chain(4), torch.device("cpu"))
    slots.forward_nodes(torch.ones(1, 5, dtype=torch.long), torch.tensor([0]), tree)
    assert calls == [True] * model.config.num_hidden_layers
    slots.forward_text(torch.ones(1, 100, dtype=torch.long), torch.arange(100)[None])
    assert len(calls) == model.config.num_hidden_layers, "a prompt is read by the general kernel"


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


@torch.no_grad()
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=EMULATED), torch.float32])
def test_a_compiled_step_with_our_own_attention_is_the_eager_one(compiled_source, ragged, dtype):
    """The operator inside a compiled step, on ragged rows and a tree: the same text as eagerly."""
    model = tiny_llama().to(dtype)
    options = dict(do_sample=False, max_new_tokens=12, drafter="ngram", tree="2x2")
    eager = paceline.generate(model, *ragged, executor="eager", **options)
    compiled = paceline.generate(model, *ragged, executor="compiled", **options)
    runs.reset(model)
    equal = (eager == compiled).float().mean()
    assert equal == 1 if dtype == torch.float32 else equal > 0.9  # near-ties of bfloat16 may part


def rows_do_not_matter(*widths):
    """Whether this machine's bfloat16 linear layers give a row the same numbers whatever rows are beside it."""
    torch.manual_seed(0)
    for inner, outer in widths:
        x, weight = torch.randn(24, inner).bfloat16(), torch.randn(outer, inner).bfloat16()
        whole = nn.functional.linear(x, weight)
        if not all(torch.equal(nn.functional.linear(x[:count], weight), whole[:count]) for count in (1, 2, 5, 16)):
            return False
    return True


@pytest.mark.parametrize(
    "dtype, executor",
    [
        pytest.param(torch.bfloat16, "eager", marks=EMULATED),
        pytest.param(torch.bfloat16, "compiled", marks=EMULATED),
        (torch.float32, "compiled"),
    ],
)
def test_text_is_the_same_with_and_without_drafts(compiled_source, dtype, executor):
    """Not up to near-ties: bit for bit, where linear layers allow it. A tiny random model has ties all the time."""
    model = tiny_llama(hidden_size=192, intermediate_size=256, initializer_range=0.1).to(dtype)
    if dtype == torch.bfloat16 and not rows_do_not_matter((192, 192), (192, 96), (192, 256), (256, 192), (192, 61)):
        pytest.skip("bfloat16 linear layers depend on the number of rows on this machine")
    torch.manual_seed(1)
    prompts = torch.randint(1, 61, (24 if executor == "eager" else 6, 1, 12))
    options = dict(max_new_tokens=48, executor=executor, return_dict_in_generate=True, output_logits=True)
    ways = [dict(do_sample=False), dict(do_sample=True, temperature=0.7, top_k=0, seed=0)]
    for sampling in ways if executor == "eager" else ways[:1]:  # compiling takes seconds
        for ids in prompts:
            plain = paceline.generate(model, ids, **sampling, **options)
            for tree in ("chain:4", "4x2x1") if executor == "eager" else ("chain:4",):
                drafted = paceline.generate(model, ids, drafter="ngram", tree=tree, **sampling, **options)
                assert torch.equal(drafted.sequences, plain.sequences)
                assert all(map(torch.equal, drafted.logits, plain.logits))


def test_without_a_compiler_there_is_no_own_attention(monkeypatch, capsys):
    monkeypatch.setattr(native, "_loaded", native._loaded)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    native._library_file.cache_clear()
    native.prepare()
    query = torch.randn(1, 2, 1, 8).bfloat16()
    assert native._loaded is None and not native.can_attend(query, query, query, torch.ones(1, 1, 1, 1).bool())
    assert capsys.readouterr().err == ""
    native._library_file.cache_clear()


def test_source_that_does_not_compile_is_a_line_and_no_error(compiled_source, monkeypatch, tmp_path, capsys):
    broken = tmp_path / "attention.cpp"
    broken.write_text("this is no C++")
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    for source in (broken, tmp_path / "missing.cpp"):
        monkeypatch.setattr(native, "SOURCES", [*native.SOURCES, source])
        native._library_file.cache_clear()
        assert native._library_file() is None
        assert "torch's kernels are (" in capsys.readouterr().err
    native._library_file.cache_clear()
