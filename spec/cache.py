"""The slot cache: preallocated keys and values that a step writes by slot and compacts by path.

transformers calls `update(keys, values, layer)` without a position, so where to write lives here:
`slots` is set before each forward. Every layer keeps the full capacity, sliding-window layers too (the
mask does the windowing), because a ring cannot forget rejected tokens. Slots that are masked still hold
finite numbers. Knows nothing of trees; lengths belong to the decode state.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """Keys (B, H, capacity, D) and values (B, H, capacity, Dv) of one layer, allocated on first use."""

    is_compileable = True
    is_sliding = False
    is_croppable = False

    def __init__(self, cache: "SlotCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, self.cache.capacity, width)
        self.values = value_states.new_zeros(batch, heads, self.cache.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = self.cache.slots[:, None, :, None]  # (B, 1, n, 1)
        self.keys.scatter_(2, slots.expand_as(key_states), key_states)
        self.values.scatter_(2, slots.expand_as(value_states), value_states)
        return self.keys[:, :, : self.cache.reach], self.values[:, :, : self.cache.reach]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` (B, n) to slots `target` (B, n); the two may overlap."""
        for buffer in (self.keys, self.values):
            shape = (-1, buffer.shape[1], -1, buffer.shape[3])
            moved = buffer.gather(2, source[:, None, :, None].expand(shape))
            buffer.scatter_(2, target[:, None, :, None].expand(shape), moved)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.reach, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.cache.capacity


class SlotCache(Cache):
    """One `SlotLayer` per decoder layer; the last slot takes padding."""

    def __init__(self, capacity: int, layers: int):
        self.capacity = capacity
        self.reach = capacity  # how many slots the next forward looks at
        self.slots: Tensor | None = None  # (B, n): where the next forward writes
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def clear(self) -> None:
        """Forget everything, so that nothing of an earlier text (a NaN, say) is behind the mask."""
        for layer in self.layers:
            layer.reset()

    def compact(self, base: Tensor, path: Tensor) -> None:
        """Move the nodes of `path` (B, D+1), written at slots base + node, to base + 0, 1, ... D.

        A constant number of slots; where `path` repeats its last node, that node is copied past the
        accepted length, where nothing is kept."""
        target = base[:, None] + torch.arange(path.shape[1], device=path.device)
        for layer in self.layers:
            if layer.is_initialized:
                layer.move(base[:, None] + path, target)
