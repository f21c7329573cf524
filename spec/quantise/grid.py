"""The numbers that a group of weights can have: 2**bits equally spaced ones, and rounding to the nearest of them.

In 4 bits a group has a scale and an offset, as its numbers seldom lie around 0 evenly; 8 bits are enough without. Knows
nothing of Hessians.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.blocks import Blocks

# Shares of the range without clipping that are tried; after a rotation the largest weights are rare and worth clipping.
_SHARES = tuple(1 - step / 20 for step in range(9))

CHUNK = 1 << 18  # weights that are rounded at a time


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The grids of n groups: scale * (code - zero) + offset."""

    scales: Tensor  # (n,) float16
    offsets: Tensor  # (n,) float16
    bits: int

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)

    def codes(self, weights: Tensor) -> Tensor:
        """The nearest codes of weights (n, m): (n, m) float32, whole numbers."""
        scales = self.scales.float()[:, None]
        steps = (weights - self.offsets.float()[:, None]) / torch.where(scales == 0, 1.0, scales)
        return (steps.round() + self.zero).clamp(0, (1 << self.bits) - 1)

    def numbers(self, codes: Tensor) -> Tensor:
        """What codes (n, m) stand for, as `Blocks` dequantises them."""
        return (codes - self.zero) * self.scales.float()[:, None] + self.offsets.float()[:, None]

    def where(self, chosen: Tensor, other: "Grid") -> "Grid":
        """This grid for the groups where `chosen` (n,) is true, and `other` for the rest."""
        scales = torch.where(chosen, self.scales, other.scales)
        return Grid(scales, torch.where(chosen, self.offsets, other.offsets), self.bits)


def fitted(weights: Tensor, bits: int, clipped: bool = True) -> Grid:
    """The grids for groups of weights (n, group) float32 with the least squared error of rounding, of those tried;
    without `clipped`, which takes a twentieth of the time, those that reach over all weights."""
    best = _grid(weights, bits, 1.0)
    if bits == 8 or not clipped:
        return best
    least = _errors(best, weights)
    for share in _SHARES[1:]:
        grid = _grid(weights, bits, share)
        errors = _errors(grid, weights)
        best, least = grid.where(errors < least, best), torch.minimum(errors, least)
    return best


def _errors(grid: Grid, weights: Tensor) -> Tensor:  # (n,)
    return (grid.numbers(grid.codes(weights)) - weights).square().sum(1)


def _grid(weights: Tensor, bits: int, share: float) -> Grid:
    """Grids that reach over a share of the groups' ranges, about their middle; of 8 bits, about 0."""
    if bits == 8:
        scales = (weights.abs().amax(1) / 127).half()
        return Grid(scales, torch.zeros_like(scales), bits)
    low, high = weights.aminmax(dim=1)
    scales = ((high - low) * (share / 15)).half()
    return Grid(scales, ((low + high + scales.float()) / 2).half(), bits)  # the codes' middle is 7.5, and zero is 8


def in_blocks(codes: Tensor, grids: list[Grid]) -> Blocks:
    """Codes (N, K) whose groups, from left to right, have these grids of N groups each."""
    scales, offsets = (torch.stack([getattr(grid, name) for grid in grids], 1) for name in ("scales", "offsets"))
    return Blocks(codes, scales, None if grids[0].bits == 8 else offsets, grids[0].zero, grids[0].bits)


def nearest(weight: Tensor, bits: int, group: int, clipped: bool = True) -> Blocks:
    """`weight` (N, K) rounded to the nearest codes; K is a multiple of `group`."""
    codes, scales, offsets = [], [], []
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        parts = rows.float().reshape(-1, group)
        grid = fitted(parts, bits, clipped)
        codes.append(grid.codes(parts).to(torch.uint8).view(rows.shape))
        scales.append(grid.scales.view(len(rows), -1))
        offsets.append(grid.offsets.view(len(rows), -1))
    offset = None if bits == 8 else torch.cat(offsets)
    return Blocks(torch.cat(codes), torch.cat(scales), offset, 1 << (bits - 1), bits)
