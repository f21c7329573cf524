"""A linear layer whose weight is in blocks of 4 or 8 bits.

On a CPU with our kernels (linears.cpp) the weight is kept in their packed form alone; on CUDA devices blocks of 4 bits
use torch's int4 kernel; elsewhere the weight is dequantised, for torch's usual kernels. Knows nothing of files and
models.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import int4, native
from .blocks import Blocks
from .int4 import Int4
from .panels import Format, form_of, pack_blocks, unpack_blocks
from .rotation import Rotation


class BlockLinear(nn.Module):
    """`nn.Linear` whose weight is in blocks. With `int8_activations` the inputs of each group are rounded to 8 bits,
    which is faster and changes the results a little. With a `rotation` the blocks hold the weight for rotated inputs,
    and inputs are rotated first."""

    packed: Tensor
    keeps_dense = True  # where the weight is dequantised, for the next time too

    def __init__(
        self,
        blocks: Blocks,
        bias: Tensor | None = None,
        int8_activations: bool = False,
        rotation: Rotation | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = blocks.codes.shape
        self.bits, self.group, self.int8_activations = blocks.bits, blocks.group, int8_activations
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._place(blocks, rotation)

    @classmethod
    def of_parts(
        cls,
        parts: dict[str, Tensor],
        form: Format,
        outputs: int,
        inputs: int,
        bias: Tensor | None,
        rotation: Rotation | None,
    ) -> Self:
        """A layer with a weight (`outputs`, `inputs`) of the `parts` and the form that another one has."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.out_features, made.in_features = outputs, inputs
        made.bits, made.group, made.int8_activations = form.bits, form.group, bool(form.int8)
        made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        made.rotation, made.device = rotation, next(iter(parts.values())).device
        made.form, made.ints, made.outputs = form, form.ints(), [outputs]
        made.keeps_dense = False
        made.use(parts)
        return made

    def _place(self, blocks: Blocks, rotation: Rotation | None) -> None:
        """Keep `blocks` in the form for the device that they are on."""
        self.rotation, self.device = rotation, blocks.codes.device
        self.form = form_of(blocks).with_int8(self.int8_activations)
        self.ints, self.outputs = self.form.ints(), [self.out_features]
        self.unpacked: Blocks | None = blocks
        self.int4 = int4.pack(blocks) if int4.takes(blocks) else None
        self.dense: Tensor | None = None
        self._buffers.pop("packed", None)
        if self.device.type == "cpu" and native.prepare():
            self.unpacked = None
            self.register_buffer("packed", pack_blocks(blocks, None, native.panel_width())[0])

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors with which it computes: panels; what the int4 kernel reads; or blocks."""
        if self.unpacked is None and self.int4 is None:
            return {"packed": self.packed}
        if self.int4 is not None:
            return {"int4": self.int4.packed, "scales_and_zeros": self.int4.scales_and_zeros}
        assert self.unpacked is not None
        named = {"codes": self.unpacked.codes, "scales": self.unpacked.scales, "offsets": self.unpacked.offsets}
        return {name: part for name, part in named.items() if part is not None}

    def use(self, parts: dict[str, Tensor]) -> None:
        """Compute with other `parts` of the same shapes from now on."""
        self.unpacked, self.int4, self.dense = None, None, None
        if "packed" in parts:
            self._buffers.update(parts)
        elif "int4" in parts:
            self.int4 = Int4(parts["int4"], parts["scales_and_zeros"], self.group, self.out_features)
        else:
            self.unpacked = Blocks(parts["codes"], parts["scales"], parts.get("offsets"), self.form.zero, self.bits)

    def round_activations(self) -> None:
        """From now on round the inputs to 8 bits."""
        self.int8_activations, self.form = True, self.form.with_int8(True)
        self.ints = self.form.ints()

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """What moves parameters to a device moves blocks with them; their dtype stays."""
        before = self.device
        after = fn(torch.empty(0, device=before)).device
        blocks = self.blocks if after != before else None
        super()._apply(fn, recurse)
        if blocks is not None:
            self._place(blocks.to(after), self.rotation and self.rotation.to(after))
        return self

    @property
    def blocks(self) -> Blocks:
        """The weight (N, K) in blocks, for rotated inputs where there is a rotation."""
        return self._some_blocks(self.packed, self.out_features) if self.unpacked is None else self.unpacked

    def _some_blocks(self, panels: Tensor, outputs: int) -> Blocks:
        return unpack_blocks(panels, self.form, self.in_features, outputs, native.panel_width())

    def dequantised(self, rows: Tensor | None = None) -> Tensor:
        """The weight (N, K), or `rows` (n,) of it, in float32, for inputs as they come: rotated back where there is a
        rotation."""
        if rows is None:
            weight = self.blocks.dequantised()
        elif self.unpacked is not None:
            weight = self.unpacked.dequantised()[rows]
        else:
            width = native.panel_width()
            panels, place = torch.unique(rows // width, return_inverse=True)
            weight = self._some_blocks(self.packed[panels], len(panels) * width).dequantised()
            weight = weight[place * width + rows % width]
        return weight if self.rotation is None else self.rotation.inverse(weight)

    def of_rows(self, rows: Tensor) -> "BlockLinear":
        """A layer with the outputs `rows` (n,) of this one."""
        bias = None if self.bias is None else self.bias.detach()[rows]
        return BlockLinear(self.blocks.of_rows(rows), bias, self.int8_activations, self.rotation)

    @property
    def weight(self) -> Tensor:
        """Only of a shape and dtype, without numbers: models ask for those of their LM head."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        if self.rotation is not None:
            x = self.rotation(x)
        if self.int4 is not None:
            out = self.int4.linear(x)
        elif self.unpacked is None and x.dtype in (torch.float32, torch.bfloat16):
            out = torch.ops.paceline.linears(x, [self.packed], self.outputs, self.ints)[0]
        else:
            dense = self.dense
            if dense is None or dense.dtype != x.dtype:
                dense = self.blocks.dequantised().to(x.dtype)
            if self.keeps_dense:
                self.dense = dense
            out = F.linear(x, dense)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        kind = ", int8 activations" if self.int8_activations else ""
        kind += ", rotated" if self.rotation is not None else ""
        return f"{self.in_features}, {self.out_features}, {self.bits} bits in groups of {self.group}{kind}"
