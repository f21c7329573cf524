"""Our C++ attention against the formula, and what is said where it cannot be compiled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paceline.spec.kernels import native


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


DTYPES = st.sampled_from([torch.bfloat16, torch.float32])


@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    nodes=st.sampled_from([1, 2, 7, 16, 45]),
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
    others=st.integers(0, 60),
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


def test_without_a_compiler_there_is_no_own_attention(monkeypatch, capsys):
    monkeypatch.setattr(native, "_loaded", native._loaded)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    native._library_file.cache_clear()
    native.prepare()
    query = torch.randn(1, 2, 1, 8).bfloat16()
    assert native._loaded is None and not native.can_attend(query, query, query, torch.ones(1, 1, 1, 1).bool())
    assert capsys.readouterr().err == "our own kernels are not used, torch's are (there is no C++ compiler)\n"
    native._library_file.cache_clear()


@pytest.mark.slow
def test_source_that_does_not_compile_is_a_line_and_no_error(compiled_source, monkeypatch, tmp_path, capsys):
    good, broken = tmp_path / "a.cpp", tmp_path / "attention.cpp"
    good.write_text("int good;")
    broken.write_text("this is no C++")
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    for source in (broken, tmp_path / "missing.cpp"):
        monkeypatch.setattr(native, "SOURCES", [good, source])
        native._library_file.cache_clear()
        assert native._library_file() is None
        assert "torch's are (" in capsys.readouterr().err
    native._library_file.cache_clear()
