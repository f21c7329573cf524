"""torch's int4 kernel for CUDA, which reads codes of 4 bits and multiplies in bfloat16.

Its weights have the form (code - 8) * scale + zero, so that `Blocks` fit but for the rounding of scales and zeros to
bfloat16. Not run on a GPU yet: the arrangement is tested with torch's kernel for the CPU, which takes the same one.
Knows nothing of layers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .blocks import Blocks

TILES = 8  # of 16 inputs, that the kernel's inner loop reads at once
INPUTS, OUTPUTS = 16 * TILES, 8  # inputs and outputs are padded to multiples of these


@dataclass(frozen=True, slots=True, eq=False)
class Arranged:
    """Blocks padded and in the order that the kernels take, before their own packing."""

    codes: Tensor  # (N', K') uint8, of 4 bits
    scales_and_zeros: Tensor  # (K' / group, N', 2) bfloat16
    group: int


@dataclass(frozen=True, slots=True, eq=False)
class Int4:
    """A weight (N, K) as the CUDA kernel reads it."""

    packed: Tensor
    scales_and_zeros: Tensor  # (K' / group, N', 2) bfloat16
    group: int
    outputs: int  # N

    def linear(self, x: Tensor) -> Tensor:
        """x W' for x (..., K), multiplied in bfloat16: (..., N)."""
        inputs = self.group * len(self.scales_and_zeros)
        rows = F.pad(x.flatten(0, -2).bfloat16(), (0, inputs - x.shape[-1]))
        made = torch._weight_int4pack_mm(rows, self.packed, self.group, self.scales_and_zeros)
        return made[:, : self.outputs].to(x.dtype).view(*x.shape[:-1], self.outputs)


def takes(blocks: "Blocks") -> bool:
    """Whether the kernel multiplies with these blocks: on a CUDA device, of 4 bits in groups of at least 32."""
    return blocks.codes.is_cuda and blocks.bits == 4 and blocks.group >= 32


def arrange(blocks: "Blocks") -> Arranged:
    """Blocks of 4 bits, padded with weights that are 0."""
    outputs, inputs = blocks.codes.shape
    more = -outputs % OUTPUTS, -inputs % INPUTS  # INPUTS is a multiple of every group
    scales = blocks.scales.float()
    zeros = (8 - blocks.zero) * scales
    if blocks.offsets is not None:
        zeros = zeros + blocks.offsets.float()
    pairs = torch.stack([scales, zeros], dim=-1).transpose(0, 1)  # (K / group, N, 2)
    pairs = F.pad(pairs, (0, 0, 0, more[0], 0, more[1] // blocks.group))
    codes = F.pad(blocks.codes, (0, more[1], 0, more[0]), value=8)
    return Arranged(codes, pairs.bfloat16().contiguous(), blocks.group)


def paired(codes: Tensor) -> Tensor:  # (N, K) uint8, below 16 -> (N, K / 2)
    """Two codes in a byte, the first in its high half, as torch's packing for CUDA takes them."""
    return codes[:, ::2] << 4 | codes[:, 1::2]


def pack(blocks: "Blocks") -> Int4:
    """The form of `blocks` for the CUDA kernel, on their device."""
    arranged = arrange(blocks)
    packed = torch._convert_weight_to_int4pack(paired(arranged.codes), TILES)
    return Int4(packed, arranged.scales_and_zeros, arranged.group, len(blocks.codes))
