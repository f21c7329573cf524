"""Weights in blocks of few bits: what a quantised file holds, and a linear layer that multiplies with it.

In each row of a weight, `group` neighbouring inputs share a scale, and in some formats an offset:

    weight = scale * (code - zero) + offset

The formats of GGUF files with uniform codes and the checkpoints of `paceline quantise` all have this form, so that
their numbers are kept exactly. Knows nothing of files and models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import int4
from .rotation import Rotation

GROUPS = (16, 32, 64, 128)  # inputs that may share a scale


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """A weight (N, K) in blocks; K is a multiple of `group`."""

    codes: Tensor  # (N, K) uint8, below 2**bits
    scales: Tensor  # (N, K / group) float16 or float32
    offsets: Tensor | None  # (N, K / group), as the scales; None: all 0
    zero: int  # the code that means 0, where there is no offset
    bits: int  # 4 or 8

    def __post_init__(self) -> None:
        assert self.codes.dtype == torch.uint8 and self.bits in (4, 8) and 0 <= self.zero < 1 << self.bits
        assert self.scales.dtype in (torch.float16, torch.float32) and self.group in GROUPS
        assert self.codes.shape[1] % self.group == 0 and self.codes.shape[1] == self.group * self.scales.shape[1]
        for other in (self.offsets,):
            assert other is None or (other.dtype, other.shape) == (self.scales.dtype, self.scales.shape)

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantised(self) -> Tensor:
        """The weight (N, K) in float32, each operation rounded once."""
        codes = self.codes.view(len(self.codes), -1, self.group).float() - self.zero
        weight = codes * self.scales.float()[..., None]
        if self.offsets is not None:
            weight = weight + self.offsets.float()[..., None]
        return weight.flatten(1)

    def to(self, device: torch.device) -> "Blocks":
        offsets = None if self.offsets is None else self.offsets.to(device)
        return Blocks(self.codes.to(device), self.scales.to(device), offsets, self.zero, self.bits)


class BlockLinear(nn.Module):
    """`nn.Linear` whose weight is in blocks. With `int8_activations` the inputs of each group are rounded to 8 bits,
    which is faster and changes the results a little. With a `rotation` the blocks hold the weight for rotated inputs,
    and inputs are rotated first."""

    def __init__(
        self,
        blocks: Blocks,
        bias: Tensor | None = None,
        int8_activations: bool = False,
        rotation: Rotation | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = blocks.codes.shape
        self.int8_activations = int8_activations
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._place(blocks, rotation)

    def _place(self, blocks: Blocks, rotation: Rotation | None) -> None:
        self.blocks, self.rotation = blocks, rotation
        self.int4 = int4.pack(blocks) if int4.takes(blocks) else None

    def _apply(self, fn, recurse=True):
        """What moves parameters to a device moves blocks with them; their dtype stays."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self.blocks.codes.device)).device
        if device != self.blocks.codes.device:
            self._place(self.blocks.to(device), self.rotation and self.rotation.to(device))
        return self

    def dequantised(self) -> Tensor:
        """The weight (N, K) in float32, for inputs as they come: rotated back where there is a rotation."""
        weight = self.blocks.dequantised()
        return weight if self.rotation is None else self.rotation.inverse(weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.rotation is not None:
            x = self.rotation(x)
        if self.int4 is not None:
            return self.int4.linear(x) if self.bias is None else self.int4.linear(x) + self.bias
        return F.linear(x, self.blocks.dequantised().to(x.dtype), self.bias)
