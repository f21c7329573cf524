"""A linear layer of which only the packed panels exist, as our kernels on a CPU read them.

Where `Packing` keeps a packed copy beside the weight of an `nn.Linear`, this is the copy alone: the same bytes, hence
the same results. Its panels may come and go, as those of layers that are streamed do. Knows nothing of files.
"""

import torch
from torch import Tensor, nn

from . import native
from .panels import Format, packed_biases, unpack_dense


class PanelLinear(nn.Module):
    """An `nn.Linear` with a weight (`outputs`, `inputs`) of `dtype` and a bias where `has_bias`, both in `packed`."""

    packed: Tensor

    def __init__(self, packed: Tensor, outputs: int, inputs: int, dtype: torch.dtype, has_bias: bool):
        super().__init__()
        self.out_features, self.in_features, self.dtype, self.has_bias = outputs, inputs, dtype, has_bias
        self.outputs, self.ints = [outputs], Format(16).ints()
        self.register_buffer("packed", packed)

    def use(self, parts: dict[str, Tensor]) -> None:
        """Compute with other panels of the same shape, `parts["packed"]`, from now on."""
        self._buffers.update(parts)

    @property
    def bias(self) -> Tensor | None:  # (N,)
        if not self.has_bias:
            return None
        return packed_biases(self.packed, self.out_features, native.panel_width()).to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """Only of a shape and dtype, without numbers: models ask for those of their LM head."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def dense(self, rows: Tensor | None = None) -> Tensor:
        """The weight (N, K), or `rows` (n,) of it, in the layer's dtype."""
        width = native.panel_width()
        if rows is None:
            return unpack_dense(self.packed, self.in_features, self.out_features, width).to(self.dtype)
        panels, index = torch.unique(rows // width, return_inverse=True)
        weight = unpack_dense(self.packed[panels], self.in_features, len(panels) * width, width)
        return weight[index * width + rows % width].to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.paceline.linears(x, [self.packed], self.outputs, self.ints)[0]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.dtype} in panels"
