"""Weights in blocks of few bits, as quantised files hold them.

In each row of a weight, `group` neighbouring inputs share a scale, and in some formats an offset:

    weight = scale * (code - zero) + offset

The formats of GGUF files with uniform codes and the checkpoints of `paceline quantise` all have this form, so that
their numbers are kept exactly. Knows nothing of files and models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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

    def of_rows(self, rows: Tensor) -> "Blocks":
        """The weight (n, K) of the outputs `rows` (n,)."""
        offsets = None if self.offsets is None else self.offsets[rows]
        return Blocks(self.codes[rows], self.scales[rows], offsets, self.zero, self.bits)

    def split(self, outputs: list[int]) -> list["Blocks"]:
        """Weights of so many outputs each, in order."""
        scales = self.scales.split(outputs)
        offsets = [None] * len(outputs) if self.offsets is None else self.offsets.split(outputs)
        parts = zip(self.codes.split(outputs), scales, offsets)
        return [Blocks(codes, scale, offset, self.zero, self.bits) for codes, scale, offset in parts]
