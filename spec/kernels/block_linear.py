"""A linear layer whose weight is in blocks of 4 or 8 bits.

On a CPU with our kernels (linears.cpp) the weight is kept in their packed form alone; elsewhere it is dequantised once,
for torch's kernels. Knows nothing of files and models.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import native
from .blocks import Blocks
from .panels import pack_blocks, unpack_blocks


class BlockLinear(nn.Module):
    """`nn.Linear` whose weight is in blocks. With `int8_activations` the inputs of each group are rounded to 8 bits,
    which is faster and changes the results a little. `dtype` is that of the inputs."""

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
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        here = blocks.codes.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
        self.packs = here and native.prepare()
        if self.packs:
            packed, form = pack_blocks(blocks, self.bias, native.panel_width())
            self.form = form.with_int8(int8_activations)
            self.ints, self.outputs = self.form.ints(), [self.out_features]
            self.register_buffer("packed", packed)
        else:
            self.register_buffer("weight", blocks.dequantised().to(dtype))

    def dequantised(self, rows: Tensor | None = None) -> Tensor:
        """The weight (N, K) in float32, or `rows` (n,) of it."""
        if not self.packs:
            return self.weight.float() if rows is None else self.weight[rows].float()
        width = native.panel_width()
        panels, outputs = self.packed, self.out_features
        if rows is not None:
            chosen, place = torch.unique(rows // width, return_inverse=True)
            panels, rows, outputs = panels[chosen], place * width + rows % width, len(chosen) * width
        weight = unpack_blocks(panels, self.form, self.in_features, outputs, width).dequantised()
        return weight if rows is None else weight[rows]

    def forward(self, x: Tensor) -> Tensor:
        if not self.packs:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.paceline.linears(x, [self.packed], self.outputs, self.ints)[0]

    def extra_repr(self) -> str:
        kind = ", int8 activations" if self.int8_activations else ""
        return f"{self.in_features}, {self.out_features}, {self.bits} bits in groups of {self.group}{kind}"
