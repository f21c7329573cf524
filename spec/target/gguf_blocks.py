"""The block formats of GGUF files, unpacked to `Blocks`: the same numbers, nothing is rounded.

A row of a weight is a row of bytes, and so many neighbouring weights are one block of bytes: half-precision scales,
then codes whose low and high bits may lie apart. Codes of 2 and 3 bits become codes of 4, those of 5 and 6 become codes
of 8. Knows nothing of files, names and models.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.blocks import Blocks

Parts = tuple[Tensor, Tensor, Tensor | None]  # codes (N, n, ...), scales (N, n, ...), offsets like the scales


_CHUNK = 1 << 22  # bytes that are unpacked at a time, because that takes several times their memory


def unpacked(kind: str, data: Tensor) -> Blocks:
    """The blocks of a weight of N rows whose bytes are `data` (N, bytes of a row) uint8; `kind` is one of `TYPES`."""
    size, bits, zero, unpack = TYPES[kind]
    pieces = [unpack(rows.view(len(rows), -1, size)) for rows in data.split(max(1, _CHUNK // data.shape[1]))]
    codes, scales, offsets = (None if parts[0] is None else torch.cat(parts).flatten(1) for parts in zip(*pieces))
    assert codes is not None and scales is not None
    return Blocks(codes, scales, offsets, zero, 4 if bits <= 4 else 8)


def _half(blocks: Tensor, start: int) -> Tensor:  # (N, n, bytes) -> (N, n, 1) float16
    return blocks[..., start : start + 2].contiguous().view(torch.float16)


def _nibbles(packed: Tensor) -> Tensor:  # (..., w) -> (..., 2, w)
    """The low halves of some bytes, then their high halves."""
    return torch.stack([packed & 15, packed >> 4], dim=-2)


def _bits(packed: Tensor, shifts: range, mask: int) -> Tensor:  # (..., w) -> (..., s, w)
    """What stands at each of the shifts in some bytes."""
    return torch.stack([(packed >> shift) & mask for shift in shifts], dim=-2)


def _q2_k(blocks: Tensor) -> Parts:
    codes = _bits(blocks[..., 16:80].unflatten(-1, (2, 32)), range(0, 8, 2), 3).flatten(-3)  # (N, n, 256)
    scales, offsets = blocks[..., :16] & 15, blocks[..., :16] >> 4
    return codes, _half(blocks, 80).float() * scales.float(), -(_half(blocks, 82).float() * offsets.float())


def _q3_k(blocks: Tensor) -> Parts:
    """The third bits come first, of code i in group g of 32: bit g of byte i."""
    low = _bits(blocks[..., 32:96].unflatten(-1, (2, 32)), range(0, 8, 2), 3).flatten(-3)  # (N, n, 256)
    codes = low | _bits(blocks[..., :32], range(8), 1).flatten(-2) << 2
    scales = _nibbles(blocks[..., 96:104]).flatten(-2) | _bits(blocks[..., 104:108], range(0, 8, 2), 3).flatten(-2) << 4
    return codes, _half(blocks, 108).float() * (scales.float() - 32), None


def _q4_0(blocks: Tensor) -> Parts:
    return _nibbles(blocks[..., 2:]).flatten(-2), _half(blocks, 0), None


def _q4_1(blocks: Tensor) -> Parts:
    return _nibbles(blocks[..., 4:]).flatten(-2), _half(blocks, 0), _half(blocks, 2)


def _fifth_bits(low: Tensor, high: Tensor) -> Tensor:  # (N, n, 16), (N, n, 4) -> (N, n, 32)
    """Codes of 5 bits in blocks of 32: the highest of code i is bit i % 8 of byte i // 8."""
    highest = _bits(high, range(8), 1).transpose(-1, -2)  # (N, n, 4, 8)
    return _nibbles(low).flatten(-2) | highest.flatten(-2) << 4


def _q5_0(blocks: Tensor) -> Parts:
    return _fifth_bits(blocks[..., 6:], blocks[..., 2:6]), _half(blocks, 0), None


def _q5_1(blocks: Tensor) -> Parts:
    return _fifth_bits(blocks[..., 8:], blocks[..., 4:8]), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Parts:
    return blocks[..., 2:] ^ 128, _half(blocks, 0), None  # signed bytes, 128 more


def _scales_of_eight(blocks: Tensor) -> tuple[Tensor, Tensor]:  # (N, n, bytes) -> (N, n, 8) float32 twice
    """Scales and offsets of the 8 groups of a block of 256, in which they are codes of 6 bits themselves: 4 scales, 4
    offsets, and 4 bytes with the low halves of 4 more of each, whose high bits top the first 8 bytes."""
    scales, offsets, both = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat([scales & 63, both & 15 | (scales >> 6) << 4], dim=-1)
    offsets = torch.cat([offsets & 63, both >> 4 | (offsets >> 6) << 4], dim=-1)
    return _half(blocks, 0).float() * scales.float(), -(_half(blocks, 2).float() * offsets.float())


def _q4_k(blocks: Tensor) -> Parts:
    return _nibbles(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(-3), *_scales_of_eight(blocks)


def _q5_k(blocks: Tensor) -> Parts:
    low = _nibbles(blocks[..., 48:].unflatten(-1, (4, 32))).flatten(-3, -2)  # (N, n, 8, 32)
    highest = _bits(blocks[..., 16:48], range(8), 1)  # of code i in group g: bit g of byte i
    return (low | highest << 4).flatten(-2), *_scales_of_eight(blocks)


def _q6_k(blocks: Tensor) -> Parts:
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))  # (N, n, 2, 2, 64)
    high = _bits(blocks[..., 128:192].unflatten(-1, (2, 32)), range(0, 8, 2), 3)  # (N, n, 2, 4, 32)
    codes = low.flatten(-3) | high.flatten(-3) << 4
    scales = _half(blocks, 208).float() * blocks[..., 192:208].contiguous().view(torch.int8).float()
    return codes, scales, None


# Bytes of a block, bits of a code, the code that means 0, and how blocks are unpacked.
TYPES: dict[str, tuple[int, int, int, Callable[[Tensor], Parts]]] = {
    "Q2_K": (84, 2, 0, _q2_k),
    "Q3_K": (110, 3, 4, _q3_k),
    "Q4_0": (18, 4, 8, _q4_0),
    "Q4_1": (20, 4, 0, _q4_1),
    "Q4_K": (144, 4, 0, _q4_k),
    "Q5_0": (22, 5, 16, _q5_0),
    "Q5_1": (24, 5, 0, _q5_1),
    "Q5_K": (176, 5, 0, _q5_k),
    "Q6_K": (210, 6, 32, _q6_k),
    "Q8_0": (34, 8, 128, _q8_0),
}
