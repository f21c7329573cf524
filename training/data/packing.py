"""Packing documents of any length into rows of one length.

Positions restart with every document, which is how attention is kept within it. Pure functions of lengths and lists.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pieces(length: int, size: int) -> list[tuple[int, int]]:
    """Where a document of `length` tokens is cut so that no piece is longer than `size`: (start, stop)."""
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def plan(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which items, none longer than `size`, go into which row: best fit, longest first, so that little is padding.

    Rows come in the order of their first item, items in theirs; the same lengths always give the same rows."""
    room: list[tuple[int, int]] = []  # (free, row), sorted
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        assert 0 < lengths[item] <= size
        index = bisect_left(room, (lengths[item], -1))
        if index < len(room):
            free, row = room.pop(index)
        else:
            free, row = size, len(rows)
            rows.append([])
        rows[row].append(item)
        if free > lengths[item]:
            insort(room, (free - lengths[item], row))
    return sorted(map(sorted, rows))


def pack(parts: list[tuple[list[int], list[int]]], size: int) -> dict[str, list[int]]:
    """One row of `size` from (tokens, loss) of its documents; padding is token 0 of document -1."""
    row: dict[str, list[int]] = {"input_ids": [], "loss_mask": [], "position_ids": [], "document": []}
    for number, (tokens, loss) in enumerate(parts):
        row["input_ids"] += tokens
        row["loss_mask"] += loss
        row["position_ids"] += range(len(tokens))
        row["document"] += [number] * len(tokens)
    padding = size - len(row["input_ids"])
    row["input_ids"] += [0] * padding
    row["loss_mask"] += [0] * padding
    row["position_ids"] += range(padding)
    row["document"] += [-1] * padding
    return row
