"""GPTQ against a slow reference that updates the inverse Hessian after each column, and against plain rounding."""

import pytest
import torch
from paceline.spec.quantise.gptq import DAMPING, Hessian, gptq
from paceline.spec.quantise.grid import fitted, nearest


def correlated(tokens, inputs, seed=0):
    torch.manual_seed(seed)
    return torch.randn(tokens, inputs) @ torch.randn(inputs, inputs) / inputs**0.5 + 0.3 * torch.randn(tokens, 1)


def moments(x):
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return hessian


def column_by_column(weight, hessian, bits, group):
    """GPTQ as the paper derives it (OBQ in a fixed order): the inverse is kept explicitly, and the row and column of
    each rounded weight are removed from it by one step of Gaussian elimination."""
    left, damped = weight.double().clone(), hessian.double().clone()
    damped += DAMPING * damped.diagonal().mean() * torch.eye(len(damped))
    inverse = torch.linalg.inv(damped)
    made = torch.zeros_like(left)
    for column in range(weight.shape[1]):
        if column % group == 0:
            grid = fitted(left[:, column : column + group].float(), bits)
        now = left[:, column : column + 1].float()
        made[:, column] = grid.numbers(grid.codes(now))[:, 0].double()
        error = (left[:, column] - made[:, column]) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse -= inverse[:, column, None] * inverse[column] / inverse[column, column]
    return made


@pytest.mark.parametrize("bits, group", [(4, 16), (4, 32), (8, 32)])
def test_it_is_the_reference(bits, group):
    x = correlated(200, 96)
    torch.manual_seed(1)
    weight = torch.randn(20, 96)
    made = gptq(weight, moments(x).factor(), bits, group).dequantised()
    truth = column_by_column(weight, x.T @ x, bits, group)
    same = (made.double() - truth).abs() < 1e-6  # ties of rounding aside
    assert same.float().mean() > 0.995
    assert not torch.allclose(made, nearest(weight, bits, group).dequantised())


def test_outputs_are_closer_than_by_plain_rounding():
    x = correlated(300, 128)
    weight = torch.randn(64, 128)

    def error(blocks):
        return ((blocks.dequantised() - weight) @ x.T).square().mean()

    assert error(gptq(weight, moments(x).factor(), 4, 32)) < 0.6 * error(nearest(weight, 4, 32))


def test_inputs_that_never_come_leave_plain_rounding():
    weight = torch.randn(8, 64)
    made = gptq(weight, Hessian(64).factor(), 4, 32)
    assert torch.equal(made.codes, nearest(weight, 4, 32).codes)


def test_a_hessian_sums_up():
    x = correlated(50, 32)
    parts = moments(x[:20].view(2, 10, 32))
    parts.add(x[20:])
    torch.testing.assert_close(parts.total, x.T @ x)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_the_nearest_and_clipping_pays(bits):
    torch.manual_seed(0)
    weights = torch.randn(50, 64) + 0.2
    grid = fitted(weights, bits)
    every = grid.numbers(torch.arange(1 << bits).float().expand(50, -1))  # (50, codes)
    best = (weights[..., None] - every[:, None]).abs().argmin(-1)
    assert torch.equal(grid.codes(weights).long(), best)
    low, high = weights.aminmax(dim=1, keepdim=True)
    step = (high - low) / 15
    unclipped = ((weights - low) / step).round() * step + low
    errors = (grid.numbers(grid.codes(weights)) - weights).square().sum()
    assert errors < (0.95 if bits == 4 else 0.01) * (unclipped - weights).square().sum()


def test_grids_of_8_bits_have_no_offsets():
    assert nearest(torch.randn(3, 64), 8, 32).offsets is None and nearest(torch.randn(3, 64), 4, 32).offsets is not None


def test_groups_of_zeros_stay_zeros():
    made = nearest(torch.zeros(3, 64), 4, 32)
    assert torch.equal(made.dequantised(), torch.zeros(3, 64))
