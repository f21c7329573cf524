"""Which layers stay in memory: as many as a number of bytes allows. Knows nothing of models."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

BUFFERS = 2  # one is computed with while the next layer is fetched into the other; a third would hold a layer as well
_UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where layers are."""

    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    buffers: int
    bytes: int  # of all weights in memory


def bytes_of(size: str | int | float) -> int:
    """The bytes that "8GB", "512 MiB" or a number stand for. Raises ValueError for anything else."""
    if isinstance(size, (int, float)) and not isinstance(size, bool) and 1 <= size < float("inf"):
        return int(size)
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", size.lower()) if isinstance(size, str) else None
    bytes = int(float(parts[1]) * _UNITS[parts[2]]) if parts is not None and parts[2] in _UNITS else 0
    if not bytes:
        raise ValueError(f"resident={size!r} is no size of memory; write it like '8GB' or '512MB'")
    return bytes


def free_bytes(device: torch.device) -> int:
    """The memory of a device that is free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def place(sizes: Sequence[int], fixed: int, budget: int, buffers: int = BUFFERS) -> Placement:
    """Keep as many of the layers of `sizes` bytes in memory as fit into `budget`, beside `fixed` bytes that are always
    there and buffers as large as the largest streamed layer. Raises ValueError, with the least budget, where not even
    the buffers fit."""
    count = len(sizes)
    if fixed + sum(sizes) <= budget:
        return Placement(tuple(range(count)), (), 0, fixed + sum(sizes))
    for streamed in range(1, count + 1):
        chosen = spread(streamed, count)
        kept = tuple(number for number in range(count) if number not in chosen)
        total = fixed + sum(sizes[number] for number in kept) + buffers * max(sizes[number] for number in chosen)
        if total <= budget:
            return Placement(kept, chosen, buffers, total)
    least = min(total, fixed + sum(sizes))
    raise ValueError(
        f"resident={budget / 1e6:.1f} MB is too little: {fixed / 1e6:.1f} MB always stay in memory, and {buffers} "
        f"layers of {max(sizes) / 1e6:.1f} MB pass through it; allow at least {_up(least)}"
    )


def _up(size: int) -> str:
    """A size in MB that is not below `size`."""
    return f"{-(-size // 100_000) / 10:.1f}MB"


def spread(streamed: int, count: int) -> tuple[int, ...]:
    """Which of `count` layers to stream: spread evenly, so that between two of them others compute while the next one
    is fetched; the first and the last among them, because fetching goes on from the last to the first while logits are
    computed and the next tree is drafted."""
    if streamed == 1:
        return (0,)
    return tuple(round(index * (count - 1) / (streamed - 1)) for index in range(streamed))
