"""The numbers that a group of weights can have: a scale with 2**bits codes, and rounding to the nearest of them.

Grids are symmetric, scale * (code - zero), so that a kernel has no offsets to add. Knows nothing of Hessians.
"""

import torch
from torch import Tensor

from ..kernels.blocks import Blocks

# Shares of the range without clipping that are tried; after a rotation the largest weights are rare and worth clipping.
_SHARES = tuple(1 - step / 40 for step in range(17))


def zero_code(bits: int) -> int:
    return 1 << (bits - 1)


def fitted_scales(weights: Tensor, bits: int) -> Tensor:
    """The scale of each row of `weights` (N, group) float32 with the least squared error of rounding: (N,) float16.

    The scale's sign is such that the number of largest magnitude can have the code 0, which reaches one step further
    than the largest code."""
    largest = weights.gather(1, weights.abs().argmax(1, keepdim=True))[:, 0]  # (N,)
    widest = -largest / zero_code(bits)
    best, least = widest.half(), torch.full_like(widest, torch.inf)
    for share in _SHARES if bits < 8 else _SHARES[:1]:
        scales = (widest * share).half()
        errors = (rounded(weights, scales, bits) - weights).square().sum(1)
        best = torch.where(errors < least, scales, best)
        least = torch.minimum(errors, least)
    return best


def codes_of(weights: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest codes for `weights` (N, ...) on the grids of `scales` (N,): (N, ...) float32, whole numbers."""
    scales = scales.float().view(-1, *[1] * (weights.ndim - 1))
    steps = weights / torch.where(scales == 0, 1.0, scales)
    return (steps.round() + zero_code(bits)).clamp(0, (1 << bits) - 1)


def rounded(weights: Tensor, scales: Tensor, bits: int) -> Tensor:
    """`weights` (N, ...) rounded to the grids of `scales` (N,)."""
    shape = -1, *[1] * (weights.ndim - 1)
    return (codes_of(weights, scales, bits) - zero_code(bits)) * scales.float().view(shape)


def nearest(weight: Tensor, bits: int, group: int) -> Blocks:
    """`weight` (N, K) rounded to the nearest codes; K is a multiple of `group`."""
    groups = weight.float().view(-1, group)  # (N K / group, group)
    scales = fitted_scales(groups, bits)
    codes = codes_of(groups, scales, bits).to(torch.uint8).view(weight.shape)
    return Blocks(codes, scales.view(len(weight), -1), None, zero_code(bits), bits)
