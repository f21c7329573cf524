"""Coordinate descent on a rounded weight: scales, offsets and codes again, each given all the others.

GPTQ rounds a column before it knows what the later ones are rounded to. A sweep goes over the groups, left to right:
the scale and the offset of a group are fitted by least squares, its codes kept; then its columns are rounded one after
the other, each to the codes that are best while all else stays (QuantEase, Behdin et al. 2023, arXiv:2309.01885). But
for the rounding of scales to 16 bits, each step lowers

    tr(E H E^T),    E = weight - rounded weight,    H = damped Hessian

the change of the layer's outputs on the calibration inputs. Knows nothing of models.
"""

import torch
from torch import Tensor

from ..kernels.blocks import Blocks
from .grid import Grid, in_blocks

SWEEPS = 2  # the first brings most; eight are hardly better than three


def descend(weight: Tensor, blocks: Blocks, hessian: Tensor) -> Blocks:
    """`blocks` of 4 bits brought closer to `weight` (N, K), for inputs with this damped `hessian` (K, K) float32."""
    assert blocks.offsets is not None
    grids = [Grid(s, o, blocks.bits) for s, o in zip(blocks.scales.unbind(1), blocks.offsets.unbind(1))]
    codes = blocks.codes.T.float()  # (K, N): a column of the weight is a row here, and so below
    goal, made = weight.float().T, blocks.dequantised().T.contiguous()
    for _ in range(SWEEPS):
        for number in range(len(grids)):
            span = slice(number * blocks.group, (number + 1) * blocks.group)
            own, pull = hessian[span, span], hessian[span] @ (goal - made)  # (group, group), (group, N)
            grids[number] = _refitted(grids[number], codes[span], own, pull)
            pull -= own @ _replace(made[span], grids[number].numbers(codes[span].T).T)
            _round_again(grids[number], codes[span], made[span], own, pull)
    return in_blocks(codes.T.to(torch.uint8), grids)


def _refitted(grid: Grid, codes: Tensor, own: Tensor, pull: Tensor) -> Grid:
    """The grids with the scales and offsets that are best for these codes (group, N): from the two normal equations
    for their changes, where these are not singular (all codes the same)."""
    steps = codes - grid.zero
    curved = own @ steps
    both, cross, only = (curved * steps).sum(0), curved.sum(0), own.sum()  # [[both, cross], [cross, only]]
    first, second = (pull * steps).sum(0), pull.sum(0)
    determinant = both * only - cross.square()
    singular = determinant <= 1e-5 * both * only
    determinant = torch.where(singular, torch.inf, determinant)
    scales = grid.scales.float() + (only * first - cross * second) / determinant
    offsets = grid.offsets.float() + (both * second - cross * first) / determinant
    return Grid(scales.half(), offsets.half(), grid.bits)


def _round_again(grid: Grid, codes: Tensor, made: Tensor, own: Tensor, pull: Tensor) -> None:
    """Round the columns of a group again, one after the other; changes `codes` and `made`, and uses up `pull`, all
    (group, N)."""
    for column, row in enumerate(own):
        best = made[column] + pull[column] / row[column]
        code = grid.codes(best[:, None])  # (N, 1)
        codes[column] = code[:, 0]
        moved = _replace(made[column], grid.numbers(code)[:, 0])
        pull[column + 1 :].addr_(row[column + 1 :], moved, alpha=-1)


def _replace(made: Tensor, new: Tensor) -> Tensor:
    """Put `new` in the place of `made`; returns the difference."""
    moved = new - made
    made.copy_(new)
    return moved
