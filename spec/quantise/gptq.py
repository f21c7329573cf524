"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): rounding in which later weights make up for the errors of earlier ones.

The columns of a weight are rounded one after the other; the error of each is spread over the columns that are still to
come, so that the change of the layer's outputs on the calibration inputs is least. Knows nothing of models.
"""

import torch
from torch import Tensor

from ..kernels.blocks import Blocks
from .grid import fitted, in_blocks

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to the diagonal (as in the paper)


class Hessian:
    """The second moments of a layer's inputs, summed over the calibration texts."""

    def __init__(self, inputs: int):
        self.total = torch.zeros(inputs, inputs)  # (K, K) float32

    def add(self, x: Tensor) -> None:
        """Add inputs (..., K)."""
        rows = x.detach().flatten(0, -2).float()  # (T, K)
        self.total = self.total.to(rows.device).addmm_(rows.T, rows)

    def damped(self) -> Tensor:
        """The Hessian (K, K) with the damping on its diagonal, in float64."""
        damped = self.total.double()
        level = float(damped.diagonal().mean())
        damped.diagonal().add_(DAMPING * level if level > 0 else 1.0)  # no inputs at all: plain rounding
        return damped

    def factor(self) -> Tensor:
        """What `gptq` needs of it: the upper Cholesky factor (K, K) of the inverse of the damped Hessian, in float32;
        computed in float64."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.damped()))
        return torch.linalg.cholesky(inverse, upper=True).float()


def gptq(weight: Tensor, factor: Tensor, bits: int, group: int) -> Blocks:
    """`weight` (N, K) in blocks, rounded for inputs whose `Hessian` has this `factor` (K, K).

    K is a multiple of `group`. A group's grid is fitted to its weights as they are when its turn comes (the paper's own
    rule)."""
    left = weight.float().clone()  # what is still to round, errors of earlier columns spread over it
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    grids = []
    for start in range(0, weight.shape[1], group):
        stop = start + group
        part, own = left[:, start:stop].clone(), factor[start:stop, start:stop]
        grid = fitted(part, bits)
        errors = torch.empty_like(part)  # (N, group)
        for column in range(group):
            now = part[:, column : column + 1]
            code = grid.codes(now)
            codes[:, start + column] = code[:, 0].to(torch.uint8)
            errors[:, column] = (now - grid.numbers(code))[:, 0] / own[column, column]
            part[:, column:].addr_(errors[:, column], own[column, column:], alpha=-1)
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
        grids.append(grid)
    return in_blocks(codes, grids)
