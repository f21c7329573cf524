"""GPTQ against a slow reference that updates the inverse Hessian after each column, and against plain rounding."""

import pytest
import torch
from paceline.spec.quantise.gptq import DAMPING, Hessian, gptq
from paceline.spec.quantise.grid import codes_of, fitted_scales, nearest, rounded, zero_code


def correlated(tokens, inputs, seed=0):
    torch.manual_seed(seed)
    return torch.randn(tokens, inputs) @ torch.randn(inputs, inputs) / inputs**0.5 + 0.3 * torch.randn(tokens, 1)


def column_by_column(weight, hessian, bits, group):
    """GPTQ as the paper derives it (OBQ in a fixed order): the inverse is kept explicitly, and the row and column of
    each rounded weight are removed from it by one step of Gaussian elimination."""
    left, damped = weight.double().clone(), hessian.double().clone()
    damped += DAMPING * damped.diagonal().mean() * torch.eye(len(damped))
    inverse = torch.linalg.inv(damped)
    made = torch.zeros_like(left)
    for column in range(weight.shape[1]):
        if column % group == 0:
            scales = fitted_scales(left[:, column : column + group].float(), bits)
        made[:, column] = rounded(left[:, column].float(), scales, bits).double()
        error = (left[:, column] - made[:, column]) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse -= inverse[:, column, None] * inverse[column] / inverse[column, column]
    return made


@pytest.mark.parametrize("bits, group", [(4, 16), (4, 32), (8, 32)])
def test_it_is_the_reference(bits, group):
    x = correlated(200, 96)
    torch.manual_seed(1)
    weight = torch.randn(20, 96)
    made = gptq(weight, x.T @ x, bits, group).dequantised()
    truth = column_by_column(weight, x.T @ x, bits, group)
    same = (made.double() - truth).abs() < 1e-6  # ties of rounding aside
    assert same.float().mean() > 0.995
    assert not torch.allclose(made, nearest(weight, bits, group).dequantised())


def test_outputs_are_closer_than_by_plain_rounding():
    x = correlated(300, 128)
    weight = torch.randn(64, 128)

    def error(blocks):
        return ((blocks.dequantised() - weight) @ x.T).square().mean()

    assert error(gptq(weight, x.T @ x, 4, 32)) < 0.6 * error(nearest(weight, 4, 32))


def test_inputs_that_never_come_leave_plain_rounding():
    weight = torch.randn(8, 64)
    made = gptq(weight, torch.zeros(64, 64), 4, 32)
    assert torch.equal(made.codes, nearest(weight, 4, 32).codes)


def test_a_hessian_is_left_as_it_was_and_sums_up():
    x = correlated(50, 32)
    hessian = Hessian(32)
    hessian.add(x[:20].view(2, 10, 32))
    hessian.add(x[20:])
    before = hessian.total.clone()
    gptq(torch.randn(4, 32), hessian.total, 4, 32)
    torch.testing.assert_close(hessian.total, x.T @ x)
    assert torch.equal(hessian.total, before) and hessian.rows == 50


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_better_than_the_full_range_and_codes_the_nearest(bits):
    torch.manual_seed(0)
    weights = torch.randn(50, 64)
    scales = fitted_scales(weights, bits)
    grid = (torch.arange(1 << bits) - zero_code(bits)) * scales.float()[:, None]  # (50, codes)
    best = (weights[..., None] - grid[:, None]).abs().argmin(-1)
    assert torch.equal(codes_of(weights, scales, bits).long(), best)
    widest = weights.abs().amax(1) / zero_code(bits) * -weights.gather(1, weights.abs().argmax(1, True))[:, 0].sign()
    errors, widest_errors = ((rounded(weights, s, bits) - weights).square().sum() for s in (scales, widest.half()))
    assert errors < widest_errors if bits == 4 else errors == widest_errors


def test_groups_of_zeros_stay_zeros():
    made = nearest(torch.zeros(3, 64), 4, 32)
    assert torch.equal(made.dequantised(), torch.zeros(3, 64))
