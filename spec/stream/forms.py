"""The forms of streamed weights: what is written of a linear layer, and the layer that is made of what was read.

    panels   the packed panels of a dense weight and its bias, for our kernels (PanelLinear)
    blocks   the parts of a weight in blocks, for the device that it is for (BlockLinear)
    (none)   all other parameters are written as they are

Knows nothing of files and of when layers are read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..kernels import native
from ..kernels.block_linear import BlockLinear
from ..kernels.panel_linear import PanelLinear
from ..kernels.panels import Format, dense_panel_bytes, holds_bfloat16, pack_dense_rows, rows_at_a_time
from ..kernels.rotation import Rotation
from .layout import FileWriter, Stored, dtype_name, torch_dtype

if TYPE_CHECKING:
    from .source import Source

Parts = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Device:
    """What weights are repacked for."""

    device: torch.device
    dtype: torch.dtype

    @property
    def in_panels(self) -> bool:
        """Whether our kernels multiply with dense weights there."""
        usual = self.dtype in (torch.float32, torch.bfloat16)
        return self.device.type == "cpu" and usual and native.prepare()

    @property
    def described(self) -> str:
        """The same where the same bytes are written."""
        if self.device.type != "cpu":
            return f"{self.device.type} {dtype_name(self.dtype)}"
        return f"{dtype_name(self.dtype)} panels of {native.panel_width() if native.prepare() else 0}"


def write_panels(to: FileWriter, path: str, linear: nn.Module, source: "Source", weight: str) -> None:
    """Write the panels of a dense linear layer at `path`, of the source's weight of that name, some rows at a time."""
    assert isinstance(linear, nn.Linear)
    (outputs, inputs), dtype, width = linear.weight.shape, linear.weight.dtype, native.panel_width()
    step = rows_at_a_time(inputs, width)

    def pieces() -> Iterator[tuple[int, Tensor]]:
        return ((start, source.rows(weight, start, min(start + step, outputs))) for start in range(0, outputs, step))

    wide = dtype != torch.bfloat16 and not all(holds_bfloat16(rows) for _, rows in pieces())
    bias = None if linear.bias is None else source.read(f"{path}.bias")
    packed = (
        pack_dense_rows(rows, None if bias is None else bias[start : start + step], width, wide)
        for start, rows in pieces()
    )
    words = dense_panel_bytes(inputs, width, wide) // 4
    kind = torch.float32 if wide else torch.int32
    to.put_rows(f"{path}.packed", kind, (-(-outputs // width), words), packed)
    to.forms[path] = {
        "kind": "panels", "outputs": outputs, "inputs": inputs, "dtype": dtype_name(dtype), "bias": bias is not None,
        "parts": ["packed"],
    }  # fmt: skip


def write_blocks(to: FileWriter, path: str, layer: BlockLinear) -> None:
    """Write the parts of a linear layer in blocks, but for its bias and rotation."""
    for name, part in layer.parts.items():
        to.put(f"{path}.{name}", part.cpu())
    to.forms[path] = {
        "kind": "blocks", "outputs": layer.out_features, "inputs": layer.in_features, "format": layer.ints,
        "rotation": layer.rotation and layer.rotation.block, "parts": list(layer.parts),
    }  # fmt: skip


def layer_of(form: Mapping, parts: Parts, bias: Tensor | None, rotation: Rotation | None) -> PanelLinear | BlockLinear:
    """The linear layer of a form, with its parts."""
    if form["kind"] == "panels":
        dtype = torch_dtype(form["dtype"])
        return PanelLinear(parts["packed"], form["outputs"], form["inputs"], dtype, form["bias"])
    return BlockLinear.of_parts(parts, Format(*form["format"]), form["outputs"], form["inputs"], bias, rotation)


def put(module: nn.Module, parts: Parts) -> None:
    """Let a module compute with `parts`: the parts of a linear layer in a form, or parameters by their names."""
    if isinstance(module, (PanelLinear, BlockLinear)):
        module.use(parts)
        return
    for name, part in parts.items():
        module._parameters[name].data = part  # type: ignore[union-attr]


def nothing(stored: Stored, device: torch.device) -> Tensor:
    """A tensor like a stored one of which all bits are set, and that takes no memory. Numbers are NaN, of every dtype,
    also those of panels, and the scales of blocks."""
    dtype = torch_dtype(stored.dtype)
    blank = torch.full((dtype.itemsize,), 255, dtype=torch.uint8).view(dtype)
    return blank.view((1,) * len(stored.shape)).to(device).expand(stored.shape)
