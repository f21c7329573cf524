"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): rounding that lets later weights make up for the errors of earlier ones.

The columns of a weight are rounded one after the other; the error of each is spread over the columns that are still to
come, so that the change of the layer's outputs on the calibration inputs is least. Knows nothing of models.
"""

import torch
from torch import Tensor

from ..kernels.blocks import Blocks
from .grid import codes_of, fitted_scales, zero_code

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to the diagonal (as in the paper)


class Hessian:
    """The second moments of a layer's inputs, summed over the calibration texts."""

    def __init__(self, inputs: int):
        self.total = torch.zeros(inputs, inputs)  # (K, K) float32
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add inputs (..., K)."""
        rows = x.detach().flatten(0, -2).float()  # (T, K)
        self.total = self.total.to(rows.device).addmm_(rows.T, rows)
        self.rows += len(rows)


def gptq(weight: Tensor, hessian: Tensor, bits: int, group: int) -> Blocks:
    """`weight` (N, K) in blocks, rounded for inputs of second moments `hessian` (K, K) of any scale; K is a multiple of
    `group`. A group's scales are fitted to its weights as they are when its turn comes (GPTQ's own rule)."""
    spread = _inverse_factor(hessian)  # (K, K), upper triangular
    left = weight.float().clone()  # what is still to round, errors of earlier columns spread over it
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(weight), weight.shape[1] // group, dtype=torch.float16, device=weight.device)
    for number, start in enumerate(range(0, weight.shape[1], group)):
        stop = start + group
        part, own = left[:, start:stop].clone(), spread[start:stop, start:stop]
        scale = scales[:, number] = fitted_scales(part, bits)
        errors = torch.empty_like(part)
        for column in range(group):
            code = codes_of(part[:, column], scale, bits)
            codes[:, start + column] = code.to(torch.uint8)
            error = (part[:, column] - (code - zero_code(bits)) * scale.float()) / own[column, column]
            part[:, column:].addr_(error, own[column, column:], alpha=-1)
            errors[:, column] = error
        left[:, stop:].addmm_(errors, spread[start:stop, stop:], alpha=-1)
    return Blocks(codes, scales, None, zero_code(bits), bits)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian (K, K), in float32; computed in float64."""
    damped = hessian.to(torch.float64, copy=True)
    level = float(damped.diagonal().mean())
    damped.diagonal().add_(DAMPING * level if level > 0 else 1.0)  # no inputs at all: plain rounding
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
