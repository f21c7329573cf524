"""Rotations of inputs: against explicit matrices, and the same bits for a row whatever is beside it."""

import pytest
import torch
from paceline.spec.kernels.block_linear import BlockLinear
from paceline.spec.kernels.rotation import LARGEST, Rotation, hadamard, random_rotation
from paceline.spec.quantise.grid import nearest


def explicit(rotation):
    """The matrix H D, by Sylvester's construction."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while len(block) < rotation.block:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    block = block / rotation.block**0.5
    return torch.block_diag(*[block] * (len(rotation.signs) // rotation.block)) * rotation.signs


@pytest.mark.parametrize("inputs", [1, 6, 32, 96, 576, 1024])
def test_a_rotation_is_its_matrix_and_undone_by_its_inverse(inputs):
    rotation = random_rotation(inputs, seed=3)
    torch.manual_seed(0)
    x = torch.randn(5, inputs)
    assert rotation.block == min(inputs & -inputs, LARGEST)
    torch.testing.assert_close(rotation(x).double(), x.double() @ explicit(rotation).T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotation.inverse(rotation(x)), x, atol=1e-5, rtol=1e-5)


def test_signs_come_from_the_seed():
    assert torch.equal(random_rotation(64, 1).signs, random_rotation(64, 1).signs)
    assert not torch.equal(random_rotation(64, 1).signs, random_rotation(64, 2).signs)
    assert set(random_rotation(64, 1).signs.tolist()) == {-1, 1}


def test_products_are_those_of_the_plain_weight():
    torch.manual_seed(0)
    weight, x, rotation = torch.randn(24, 96), torch.randn(7, 96), random_rotation(96, 0)
    layer = BlockLinear(nearest(rotation(weight), 8, 32), torch.randn(24), rotation=rotation)
    torch.testing.assert_close(layer(x), x @ layer.dequantised().T + layer.bias, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.dequantised(), weight, atol=0.03, rtol=0.0)


def test_blocks_and_rotation_move_with_the_layer_and_keep_their_dtype():
    rotation = random_rotation(64, 0)
    layer = BlockLinear(nearest(torch.randn(8, 64), 4, 32), torch.randn(8), rotation=rotation).to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16 and layer.blocks.scales.dtype == torch.float16
    assert layer.rotation is rotation
    layer.to("meta")
    assert layer.blocks.codes.is_meta and layer.blocks.offsets.is_meta and layer.rotation.signs.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [32, 512])
def test_a_row_has_the_same_bits_whatever_is_beside_it(dtype, block):
    torch.manual_seed(0)
    rotation = Rotation(torch.randint(0, 2, (1536,), dtype=torch.int8) * 2 - 1, block)
    x = torch.randn(65, 1536).to(dtype)
    alone = torch.cat([rotation(row[None]) for row in x])
    for rows in range(1, 66):
        assert torch.equal(rotation(x[:rows]), alone[:rows])
    assert torch.equal(rotation(x[None, 3:40])[0], alone[3:40])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_rotations_have_the_eager_bits(dtype):
    torch.manual_seed(0)
    rotation = random_rotation(96, 0)
    compiled = torch.compile(lambda x: rotation(x), dynamic=True)
    x = torch.randn(65, 96).to(dtype)
    for rows in range(1, 66):
        assert torch.equal(compiled(x[:rows]), rotation(x)[:rows])


def test_blocks_of_one_input_change_signs_alone():
    x = torch.randn(3, 7)
    assert torch.equal(hadamard(x, 1), x)
