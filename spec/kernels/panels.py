"""The packed form of linear weights that the C++ kernels read (products.h says how a panel looks).

A panel holds the weights of some outputs, and their biases, in the order in which a product reads them. Weights are
packed as they are: float32, bfloat16 (float32 whose numbers all are bfloat16 too), or blocks of 4 or 8 bits. Knows
nothing of layers and products.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .blocks import Blocks

_ORDER = [0, 2, 1, 3]  # in which the codes of four inputs lie
_PIECE = 1 << 22  # numbers that are packed at a time, because that takes several times their memory


@dataclass(frozen=True, slots=True)
class Format:
    """How weights are packed, and what their products do; the fields of `Format` in products.h."""

    bits: int  # of a weight: 16 (or 32, where the packed tensor is float32), 8 or 4
    group: int = 0  # inputs that share a scale, of 8 and 4 bits
    scale_bytes: int = 0
    has_offsets: int = 0
    zero: int = 0  # the code that means 0
    int8: int = 0  # 1: the rows are rounded to 8 bits

    def ints(self) -> list[int]:
        return [self.bits, self.group, self.scale_bytes, self.has_offsets, self.zero, self.int8]

    def panel_bytes(self, inputs: int, outputs: int) -> int:
        """Bytes of a panel of `outputs` outputs."""
        if self.bits == 16:
            return (inputs + inputs % 2) * outputs * 2 + 4 * outputs
        scales = outputs * self.scale_bytes * (1 + self.has_offsets)
        return inputs // self.group * (self.group * outputs * self.bits // 8 + scales) + 4 * outputs

    def with_int8(self, int8: bool) -> "Format":
        return replace(self, int8=int(int8))


def pack_dense(weight: Tensor, bias: Tensor | None, width: int) -> tuple[Tensor, Format]:
    """A weight (N, K) in bfloat16 or float32, packed in panels of `width` outputs, one in each row of the result: int32
    with two bfloat16 in each; float32, where not every number is exactly a bfloat16."""
    outputs, inputs = weight.shape
    step = rows_at_a_time(inputs, width)
    wide = not all(map(holds_bfloat16, weight.split(step)))
    packed = torch.empty(-(-outputs // width), dense_panel_bytes(inputs, width, wide), dtype=torch.uint8)
    for start in range(0, outputs, step):
        some = None if bias is None else bias[start : start + step]
        made = pack_dense_rows(weight[start : start + step], some, width, wide)
        packed[start // width : start // width + len(made)] = made
    return packed.view(torch.float32 if wide else torch.int32), Format(16)


def rows_at_a_time(inputs: int, width: int) -> int:
    """How many rows of a dense weight to pack at a time, whole panels of them."""
    return max(1, _PIECE // (inputs * width)) * width


def holds_bfloat16(weight: Tensor) -> bool:
    """Whether every number of `weight` is exactly a bfloat16."""
    if weight.dtype == torch.bfloat16:
        return True
    return weight.dtype == torch.float32 and not (weight.contiguous().view(torch.int32) & 0xFFFF).any()


def dense_panel_bytes(inputs: int, width: int, wide: bool) -> int:
    """Bytes of a panel of `width` outputs of a dense weight: in float32 where it is `wide`, else in bfloat16."""
    return (inputs + 1) * width * 4 if wide else Format(16).panel_bytes(inputs, width)


def pack_dense_rows(weight: Tensor, bias: Tensor | None, width: int, wide: bool) -> Tensor:
    """The bytes (P, bytes of a panel) uint8 of some rows (N, K) of a weight: in float32 where it is `wide`, else in
    bfloat16, which then holds all of its numbers."""
    rows = _filled(weight, width)  # (P, width, K)
    if wide:
        return _with_biases(rows.float().view(torch.int32).transpose(1, 2), bias, width)
    pairs = F.pad(rows.bfloat16(), (0, rows.shape[2] % 2)).contiguous().view(torch.int32)  # (P, width, K / 2)
    return _with_biases(pairs.transpose(1, 2), bias, width)


def unpack_dense(packed: Tensor, inputs: int, outputs: int, width: int) -> Tensor:
    """The weight (outputs, inputs) that was packed: float32, or bfloat16 where that holds all of its numbers."""
    body = packed[:, :-width].view(len(packed), -1, width).transpose(1, 2).contiguous()  # (P, width, words)
    rows = body if packed.dtype == torch.float32 else body.view(torch.bfloat16)
    return rows.flatten(0, 1)[:outputs, :inputs]


def packed_biases(packed: Tensor, outputs: int, width: int) -> Tensor:
    """The biases (outputs,) float32 behind the panels of a dense weight."""
    return packed[:, -width:].contiguous().view(torch.float32).flatten()[:outputs]


def pack_blocks(blocks: Blocks, bias: Tensor | None, width: int) -> tuple[Tensor, Format]:
    """Blocks (N, K), packed in panels of `width` outputs: uint8 (P, bytes of a panel)."""
    groups = blocks.scales.shape[1]
    codes = _filled(blocks.codes, width).view(-1, width, groups, blocks.group // 4, 4)[..., _ORDER]
    codes = codes.permute(0, 2, 3, 1, 4)  # (P, groups, fours, width, 4)
    if blocks.bits == 4:
        first, second = codes.unflatten(3, (2, width // 2)).unbind(3)
        codes = first | (second << 4)
    parts = [codes.flatten(2)]
    for numbers in (blocks.scales, blocks.offsets):
        if numbers is not None:
            parts.append(_filled(numbers, width).transpose(1, 2).contiguous().view(torch.uint8))  # (P, groups, bytes)
    packed = torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], dim=2)
    return _with_biases(packed, bias, width), form_of(blocks)


def form_of(blocks: Blocks) -> Format:
    """How `blocks` are packed."""
    return Format(blocks.bits, blocks.group, blocks.scales.itemsize, int(blocks.offsets is not None), blocks.zero)


def unpack_blocks(packed: Tensor, form: Format, inputs: int, outputs: int, width: int) -> Blocks:
    """The blocks (outputs, inputs) that were packed."""
    panels, groups = len(packed), inputs // form.group
    body = packed[:, : -4 * width].view(panels, groups, -1)
    size = form.group * width * form.bits // 8
    codes = body[..., :size].reshape(panels, groups, form.group // 4, -1, 4)
    if form.bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=3)
    codes = codes[..., _ORDER].permute(0, 3, 1, 2, 4).reshape(-1, inputs)[:outputs]  # the order undoes itself
    numbers = []
    for index in range(1 + form.has_offsets):
        start = size + index * width * form.scale_bytes
        part = body[..., start : start + width * form.scale_bytes].contiguous()
        dtype = torch.float16 if form.scale_bytes == 2 else torch.float32
        numbers.append(part.view(dtype).transpose(1, 2).reshape(-1, groups)[:outputs])
    offsets = numbers[1] if form.has_offsets else None
    return Blocks(codes.contiguous(), numbers[0].contiguous(), offsets, form.zero, form.bits)


def _filled(weight: Tensor, width: int) -> Tensor:
    """(N, ...) with rows of zeros up to a multiple of `width`: (P, width, ...)."""
    return F.pad(weight, (0, 0, 0, -len(weight) % width)).unflatten(0, (-1, width))


def _with_biases(body: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """The panels' bytes (P, ...) with their biases in float32 behind them."""
    panels = len(body)
    ends = torch.zeros(panels * width)
    if bias is not None:
        ends[: len(bias)] = bias.float()
    body = body.contiguous().flatten(1).view(torch.uint8)
    return torch.cat([body, ends.view(panels, width).view(torch.uint8)], dim=1)
