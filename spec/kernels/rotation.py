"""Random rotations of a linear layer's inputs: signs, then a Hadamard transform of each block.

    x -> H D x,    D = diag(signs),    H = orthonormal Hadamard matrices of `block` inputs along the diagonal

The map is orthonormal, so a weight whose rows were rotated gives on rotated inputs the products of the plain weight on
plain inputs; its numbers are nearly normally distributed, without outliers ("incoherent": QuIP, arXiv:2307.13304; with
Hadamard matrices: QuIP#, arXiv:2402.04396). The transform is a sequence of element-wise sums and differences in
float32, in one order, so that a row has the same bits whatever rows are beside it. Knows nothing of quantisation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import native

LARGEST = 512  # inputs in a block, at most: each doubling is another pass over the inputs


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """The rotation of K inputs in blocks; `block` is a power of two that divides K."""

    signs: Tensor  # (K,) int8, 1 or -1
    block: int

    def __post_init__(self) -> None:
        assert self.signs.dtype == torch.int8 and self.signs.ndim == 1
        assert self.block & (self.block - 1) == 0 and len(self.signs) % self.block == 0

    def __call__(self, x: Tensor) -> Tensor:
        """H D x for x (..., K), computed in float32 and rounded once to the dtype of x: (..., K)."""
        if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and native.ready():
            return torch.ops.paceline.rotate(x, self.signs, self.block, self.block**-0.5)
        return hadamard(x.float() * self.signs, self.block).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """D H x for x (..., K): what undoes the rotation, up to rounding."""
        return (hadamard(x.float(), self.block) * self.signs).to(x.dtype)

    def to(self, device: torch.device) -> "Rotation":
        return Rotation(self.signs.to(device), self.block)


def random_rotation(inputs: int, seed: int) -> Rotation:
    """A rotation of `inputs` numbers with signs drawn from `seed`, in the largest blocks that divide them."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (inputs,), generator=generator, dtype=torch.int8) * 2 - 1
    return Rotation(signs, min(inputs & -inputs, LARGEST))


def hadamard(x: Tensor, block: int) -> Tensor:
    """The orthonormal Hadamard transform (Sylvester's order) of each block of x (..., K) float32: (..., K)."""
    shape, half = x.shape, 1
    while half < block:
        first, second = x.reshape(*shape[:-1], -1, 2, half).unbind(-2)  # (..., K / (2 half), half) each
        x = torch.stack([first + second, first - second], dim=-2)
        half *= 2
    return x.reshape(shape) * block**-0.5
