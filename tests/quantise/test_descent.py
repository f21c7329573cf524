"""Coordinate descent against a slow reference that tries every code and solves least squares outright."""

import torch
from paceline.spec.kernels.blocks import Blocks
from paceline.spec.quantise.descent import SWEEPS, descend
from paceline.spec.quantise.gptq import Hessian, gptq
from paceline.spec.quantise.grid import nearest


def problem(rows, inputs, tokens=200):
    """A weight, and the damped Hessian of correlated inputs."""
    torch.manual_seed(0)
    hessian = Hessian(inputs)
    hessian.add(torch.randn(tokens, inputs) @ torch.randn(inputs, inputs) / inputs**0.5 + 0.3 * torch.randn(tokens, 1))
    return torch.randn(rows, inputs), hessian


def changes(weight, made, damped):
    """How much each row's outputs change, in float64: (N,)."""
    error = weight.double() - made.double()
    return (error @ damped.double() * error).sum(1)


def row_by_row(weight, blocks, damped):
    """Each row (K,) by itself: least squares on whitened inputs for scale and offset, all 16 codes for a column."""
    root, group = torch.linalg.cholesky(damped.double()), blocks.group  # |e @ root|^2 = e H e^T
    made = blocks.dequantised().double()
    for row, goal, codes in zip(made, weight.double(), blocks.codes.double()):
        for _ in range(SWEEPS):
            for start in range(0, len(row), group):
                span = slice(start, start + group)
                steps = codes[span] - blocks.zero
                basis = torch.stack([steps @ root[span], root[span].sum(0)], 1)  # (K, 2)
                rest = row.clone()
                rest[span] = 0
                scale, offset = torch.linalg.lstsq(basis, (goal - rest) @ root, driver="gelsd").solution.half().double()
                row[span] = steps * scale + offset
                for column in range(start, start + group):
                    tried = row.repeat(16, 1)
                    tried[:, column] = (torch.arange(16) - blocks.zero) * scale + offset
                    best = int(((goal - tried) @ root).square().sum(1).argmin())
                    row[column], codes[column] = tried[best, column], best
    return made


def test_it_is_the_reference():
    weight, hessian = problem(12, 64)
    start, damped = nearest(weight, 4, 16), hessian.damped()
    made, truth = descend(weight, start, damped.float()).dequantised(), row_by_row(weight, start, damped)
    same = ((made - truth).abs() < 1e-3).all(1)  # rows that rounding led elsewhere aside
    assert same.float().mean() > 0.7
    torch.testing.assert_close(
        changes(weight, made, damped).sum(), changes(weight, truth, damped).sum(), rtol=0.01, atol=0
    )


def test_what_gptq_leaves_becomes_less_in_each_row():
    weight, hessian = problem(64, 128)
    damped = hessian.damped()
    start = gptq(weight, hessian.factor(), 4, 32)
    before = changes(weight, start.dequantised(), damped)
    after = changes(weight, descend(weight, start, damped.float()).dequantised(), damped)
    assert (after <= 1.001 * before).all() and after.sum() < 0.9 * before.sum()


def test_a_group_of_equal_codes_keeps_its_grid():
    codes = torch.full((3, 32), 8, dtype=torch.uint8)
    scales, offsets = torch.full((3, 1), 0.25).half(), torch.full((3, 1), 0.5).half()
    blocks = Blocks(codes, scales, offsets, 8, 4)
    made = descend(torch.full((3, 32), 0.5), blocks, torch.eye(32))
    assert torch.equal(made.codes, codes) and torch.equal(made.scales, scales) and torch.equal(made.offsets, offsets)
