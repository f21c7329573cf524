"""The arrangement for torch's int4 kernels, by the kernel for the CPU, which takes the same codes, scales and zeros."""

import pytest
import torch
from paceline.spec.kernels.blocks import Blocks
from paceline.spec.kernels.int4 import INPUTS, OUTPUTS, arrange, paired, takes


def some_blocks(outputs, inputs, group, offsets, zero=8):
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scales = torch.rand(outputs, inputs // group).bfloat16().half() + 0.5
    scales = scales.bfloat16().half()
    return Blocks(codes, scales, torch.randn_like(scales).bfloat16().half() if offsets else None, zero, 4)


@pytest.mark.parametrize("offsets, zero", [(False, 8), (True, 8), (False, 7)])
@pytest.mark.parametrize("outputs, inputs, group", [(64, 96, 32), (60, 576, 64), (128, 256, 128)])
def test_the_kernel_multiplies_with_the_dequantised_weight(outputs, inputs, group, offsets, zero):
    blocks = some_blocks(outputs, inputs, group, offsets, zero)
    arranged = arrange(blocks)
    rows, width = arranged.codes.shape
    assert rows % OUTPUTS == 0 and width % INPUTS == 0 and width % group == 0
    rows += -rows % 16  # the CPU's kernel asks for more
    codes = torch.nn.functional.pad(arranged.codes, (0, 0, 0, rows - len(arranged.codes)))
    pairs = torch.nn.functional.pad(arranged.scales_and_zeros, (0, 0, 0, rows - len(arranged.codes)))
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    x = torch.nn.functional.pad(torch.eye(inputs), (0, width - inputs)).bfloat16()
    made = torch._weight_int4pack_mm_for_cpu(x, packed, group, pairs.contiguous())[:, :outputs]
    torch.testing.assert_close(made.float(), blocks.dequantised().T, atol=0.05, rtol=0.01)


def test_two_codes_share_a_byte_the_first_high():
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert paired(codes).tolist() == [[0x12, 0xF0]]


def test_a_cpu_has_its_own_kernels():
    assert not takes(some_blocks(8, 64, 32, False))
