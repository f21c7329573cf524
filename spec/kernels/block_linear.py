"""A linear layer whose weight is in blocks of 4 or 8 bits.

On a CPU with our kernels (linears.cpp) its weight is kept in their packed form alone; elsewhere as a dense weight, with
torch's kernels. Knows nothing of files and models.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import native
from .blocks import Blocks
from .panels import pack_blocks, unpack_blocks


class BlockLinear(nn.Module):
    """`nn.Linear` whose weight is in blocks. With `int8_activations` the inputs of each group are rounded to 8 bits,
    which is faster and changes the results a little.

    `dtype` is that of the inputs."""

    def __init__(
        self,
        blocks: Blocks,
        bias: Tensor | None = None,
        int8_activations: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.out_features, self.in_features = blocks.codes.shape
        self.int8_activations = int8_activations
        self.bits, self.group = blocks.bits, blocks.group
        self.packs = native.prepare() and dtype in (torch.float32, torch.bfloat16)
        if self.packs:
            packed, form = pack_blocks(blocks, bias, native.panel_width())
            self.form = form.with_int8(int8_activations)
            self.ints, self.outputs = self.form.ints(), [self.out_features]
            self.register_buffer("packed", packed)
        else:
            self.register_buffer("weight", blocks.dequantised().to(dtype))
            self.register_buffer("bias", None if bias is None else bias.to(dtype))

    def dequantised(self) -> Tensor:
        """The weight (N, K) in float32."""
        if not self.packs:
            return self.weight.float()
        sizes = self.in_features, self.out_features, native.panel_width()
        return unpack_blocks(self.packed, self.form, *sizes).dequantised()

    def forward(self, x: Tensor) -> Tensor:
        if not self.packs:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.paceline.linears(x, [self.packed], self.outputs, self.ints)[0]

    def extra_repr(self) -> str:
        kind = ", int8 activations" if self.int8_activations else ""
        return f"{self.in_features}, {self.out_features}, {self.bits} bits in groups of {self.group}{kind}"
