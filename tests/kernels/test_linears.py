"""The products of packed weights, at every level of the processor that there is here: right, and each row by itself."""

import ctypes
import shutil
import subprocess

import pytest
import torch
from paceline.spec.kernels import cpu, native
from paceline.spec.kernels.blocks import Blocks
from paceline.spec.kernels.panels import Format, pack_blocks, pack_dense, unpack_blocks

LEVELS = [level for level in cpu.LEVELS if level != "none"]
SIZES = [(1, 32), (33, 64), (61, 96), (130, 192), (70, 576)]
COUNTS = (*range(1, 14), 23, 24, 25, 65)


class Library:
    """linears.cpp compiled for a level."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.width = self.library.panel_outputs()

    def __call__(self, x, packed, outputs, form, threads=2):
        rows, inputs, count = x.numel() // x.shape[-1], x.shape[-1], len(packed)
        out = [torch.empty(rows, width, dtype=x.dtype) for width in outputs]
        numbers = form.ints()
        if packed[0].dtype == torch.float32:
            numbers[0] = 32
        pointers, wholes = ctypes.c_void_p * count, ctypes.c_int64 * count
        self.library.multiply_layers(
            ctypes.c_void_p(x.data_ptr()), int(x.dtype == torch.bfloat16), ctypes.c_int64(rows), ctypes.c_int64(inputs),
            ctypes.c_int64(count), pointers(*(each.data_ptr() for each in packed)), wholes(*outputs),
            pointers(*(each.data_ptr() for each in out)), (ctypes.c_int64 * len(numbers))(*numbers), threads,
        )  # fmt: skip
        return out


class Operator:
    """The operator, for the best level."""

    def __init__(self):
        self.width = native.panel_width()

    def __call__(self, x, packed, outputs, form, threads=2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return torch.ops.paceline.linears(x, packed, outputs, form.ints())
        finally:
            torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["operator", *(pytest.param(level, marks=pytest.mark.slow) for level in LEVELS)])
def products(request, compiled_source, tmp_path_factory):
    if request.param == "operator":
        return Operator()
    if request.param == cpu.level():
        pytest.skip("the operator's own level")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu.SWITCH, request.param)
        try:
            cpu.level()
        except ValueError:
            pytest.skip(f"this processor has no {request.param}")
    compiler = shutil.which("g++") or shutil.which("clang++")
    library = tmp_path_factory.mktemp("levels") / f"{request.param}.so"
    source = next(source for source in native.SOURCES if source.name == "linears.cpp")
    flags = [*native._FLAGS, *cpu.LEVELS[request.param], "-shared"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return Library(library)


def random_blocks(outputs, inputs, bits, group, offsets, zero, dtype=torch.float16):
    scales = (torch.rand(outputs, inputs // group) * 0.02 + 0.001).to(dtype)
    shifts = torch.randn(outputs, inputs // group).mul(0.05).to(dtype) if offsets else None
    return Blocks(torch.randint(0, 1 << bits, (outputs, inputs)).to(torch.uint8), scales, shifts, zero, bits)


def dense(outputs, inputs, dtype):
    return torch.randn(outputs, inputs).to(dtype)


def all_kinds(outputs, inputs, bias, width):
    """(name, weight in float32, packed, format) of every kind of weight."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = dense(outputs, inputs, dtype)
        yield str(dtype), weight.float(), *pack_dense(weight, bias, width)
    for bits in (4, 8):
        for group in (16, 32, 64):
            if inputs % group == 0:
                blocks = random_blocks(outputs, inputs, bits, group, group != 64, 1 << (bits - 1) if group != 32 else 0,
                                       torch.float32 if group == 16 else torch.float16)  # fmt: skip
                yield f"{bits} bits by {group}", blocks.dequantised(), *pack_blocks(blocks, bias, width)


def kinds_and_rows(outputs, inputs, bias, width):
    """The same with rows in float32, and in bfloat16 where the weight takes them."""
    for name, weight, packed, form in all_kinds(outputs, inputs, bias, width):
        for dtype in (torch.float32, torch.bfloat16):
            if packed.dtype != torch.float32 or dtype == torch.float32:
                yield f"{name}, rows in {dtype}", weight, packed, form, torch.randn(70, inputs).to(dtype)


@pytest.mark.parametrize("outputs, inputs", [*SIZES, (5, 1), (33, 7), (40, 67)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_those_of_float64(products, outputs, inputs, with_bias):
    """Within the rounding of float32 sums, and of the result."""
    torch.manual_seed(outputs)
    bias = torch.randn(outputs) if with_bias else None
    for name, weight, packed, form, x in kinds_and_rows(outputs, inputs, bias, products.width):
        exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
        (out,) = products(x, [packed], [outputs], form)
        assert out.dtype == x.dtype
        slack = 0 if x.dtype == torch.float32 else 2**-8 * exact.abs()
        # Codes and offsets are added up apart: their sums are larger than those of their sum.
        assert ((out.double() - exact).abs() <= slack + 2**-18 * (size + x.double().abs().sum(1, True))).all(), name


@pytest.mark.parametrize("outputs, inputs", SIZES)
def test_a_row_has_the_same_bits_beside_any_others(products, outputs, inputs):
    """Whatever rows, layers and threads there are."""
    torch.manual_seed(inputs)
    for name, _, packed, form, x in kinds_and_rows(outputs, inputs, torch.randn(outputs), products.width):
        for int8 in (False, True) if form.bits < 16 else (False,):
            kind = form.with_int8(int8)
            (whole,) = products(x, [packed], [outputs], kind)
            for count in COUNTS:
                assert torch.equal(products(x[-count:].clone(), [packed], [outputs], kind)[0], whole[-count:]), name
            assert torch.equal(products(x, [packed], [outputs], kind, threads=1)[0], whole), name
            for other in products(x[:3].clone(), [packed, packed], [outputs, outputs], kind):
                assert torch.equal(other, whole[:3]), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_int8_rows_are_rounded_by_groups(products, bits, group):
    """The products are exactly those of the rounded numbers, but for the rounding of float32."""
    torch.manual_seed(bits)
    blocks = random_blocks(50, 192, bits, group, True, 3)
    packed, form = pack_blocks(blocks, None, products.width)
    x = torch.randn(9, 192) * torch.tensor([1e-6, 1.0, 3e4] * 3)[:, None]
    x[4, :group] = 0
    parts = x.unflatten(1, (-1, group))
    scales = parts.abs().amax(-1, keepdim=True) / 127
    rounded = ((parts * torch.where(scales > 0, 1 / scales, 0)).round() * scales).flatten(1)
    exact = rounded.double() @ blocks.dequantised().double().T
    size = rounded.double().abs() @ (blocks.dequantised().double().abs() + 1).T
    (out,) = products(x, [packed], [50], form.with_int8(True))
    assert ((out.double() - exact).abs() <= 2**-18 * size).all()


def test_what_is_not_finite_stays_in_its_row(products):
    torch.manual_seed(0)
    for name, _, packed, form, x in kinds_and_rows(61, 96, None, products.width):
        for int8 in (False, True) if form.bits < 16 else (False,):
            kind = form.with_int8(int8)
            (before,) = products(x, [packed], [61], kind)
            for wrong in (float("nan"), float("inf")):
                spoilt = x.clone()
                spoilt[3, 40] = wrong
                (out,) = products(spoilt, [packed], [61], kind)
                assert not out[3].isfinite().any(), name
                others = torch.arange(70) != 3
                assert torch.equal(out[others], before[others]), name


def test_dense_weights_are_kept_to_the_bit(products):
    """Of float32 the unit rows give the weight; of bfloat16 numbers half the memory is taken."""
    numbers = [[1.0, -2.0, 0.5, -0.0], [2.0**-130, -(2.0**-133), 3e38, 1.0078125]]  # -(2**-133): the least of all
    short = torch.tensor(numbers).bfloat16().float().repeat(20, 1)
    long = short + torch.tensor([2.0**-20, 0, 0, 0])
    packs = [pack_dense(weight, None, products.width) for weight in (short, long)]
    assert [packed.dtype for packed, _ in packs] == [torch.int32, torch.float32]
    assert torch.equal(pack_dense(short.bfloat16(), None, products.width)[0], packs[0][0])
    for weight, (packed, form) in zip((short, long), packs):
        assert torch.equal(products(torch.eye(4), [packed], [40], form)[0], weight.T)


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_come_back_as_they_were(width, bits):
    for outputs, inputs in SIZES:
        for offsets in (False, True):
            blocks = random_blocks(outputs, inputs, bits, 16, offsets, 5, torch.float32)
            packed, form = pack_blocks(blocks, torch.randn(outputs), width)
            assert packed.shape[1] == form.panel_bytes(inputs, width) and isinstance(form, Format)
            back = unpack_blocks(packed, form, inputs, outputs, width)
            assert torch.equal(back.codes, blocks.codes) and torch.equal(back.scales, blocks.scales)
            assert torch.equal(back.dequantised(), blocks.dequantised()) and back.zero == 5
            assert (back.offsets is None) == (not offsets)


def test_a_level_that_there_is_not(monkeypatch):
    monkeypatch.setenv(cpu.SWITCH, "mmx")
    with pytest.raises(ValueError, match="PACELINE_CPU='mmx' is no level of this processor; use one of"):
        cpu.level()
