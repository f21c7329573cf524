"""The slot cache: preallocated keys and values that a step writes by slot and compacts by path.

transformers calls `update(keys, values, layer)` without positions, so the slots to write are set by `aim` before each
forward. A slot is one contiguous line with all heads, so that writing and moving slots copies whole lines. Every layer
has the full capacity, also sliding-window layers (the mask restricts them), because rejected tokens cannot be removed
from a ring buffer. Masked slots must hold finite numbers. Layers with convolutions and recurrences keep states instead,
or besides (../recurrent/states.py). Knows nothing of trees; lengths belong to the decode state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ..recurrent.passes import NodePass, TextPass
from ..recurrent.states import States
from ..state import index_of

# One operator for all layers, so that torch.compile has nothing to trace, fuse and compile for each.
_library = torch.library.Library("paceline", "FRAGMENT")
_library.define("move_lines(Tensor(a!)[] buffers, Tensor source, Tensor target) -> ()")
torch.library.register_fake("paceline::move_lines", lambda buffers, source, target: None, lib=_library)


def _move_lines(buffers: list[Tensor], source: Tensor, target: Tensor) -> None:
    """Copy lines `source` (M,) of each buffer to lines `target` (M,); the two may overlap."""
    if source.device.type == "cpu" and torch.equal(source, target):
        return  # all lines are in their places, as always where the tree is a chain
    for buffer in buffers:
        buffer.index_copy_(0, target, buffer.index_select(0, source))


_library.impl("move_lines", _move_lines, "CompositeExplicitAutograd")  # any device


def bytes_per_token(model: PreTrainedModel) -> int:
    """About the bytes of keys and values of one token, by the configuration of `model`: 0 where no layer attends."""
    config = model.config.get_text_config()
    if not (queries := getattr(config, "num_attention_heads", None)):
        return 0
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    layers = config.num_hidden_layers
    if kinds is not None:
        layers = sum(kind == "hybrid" or ("attention" in kind and "linear" not in kind) for kind in kinds)
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return 2 * layers * heads * width * model.dtype.itemsize


class AimedSlots:
    """The slots of one layer as one forward writes and reads them. In the forward of its decoder layer it can stand in
    for the whole cache, so that all layers can be traced as calls of one function of tensors."""

    def __init__(
        self,
        keys: Tensor,  # (B * capacity, H * D)
        values: Tensor,  # (B * capacity, H * Dv)
        lines: Tensor,  # (B * n,): where to write
        reach: int,
        capacity: int,
        heads: int,
        rows: Tensor | None = None,  # (R,): the batch rows; None: all
    ):
        self.keys, self.values, self.lines = keys, values, lines
        self.reach, self.capacity, self.heads, self.rows = reach, capacity, heads, rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write states (B, H, n, D); returns the first `reach` slots, (B, H, reach, D)."""
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            lines = states.transpose(1, 2).reshape(-1, buffer.shape[1])  # (B * n, H * D)
            buffer.index_copy_(0, self.lines, lines)
        return self._seen(self.keys), self._seen(self.values)

    def _seen(self, buffer: Tensor) -> Tensor:
        rows = buffer.unflatten(0, (-1, self.capacity))[:, : self.reach]
        if self.rows is not None:
            rows = rows[self.rows]  # a copy, of no more than is looked at
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)


@dataclass(eq=False)
class Running:
    """The sizes of a cache, and where the running forward writes and reads. All its layers share this, and do not hold
    the cache, so that its buffers are free as soon as nobody uses it."""

    batch: int
    capacity: int  # slots of a row
    reach: int  # how many slots are read
    lines: Tensor | None = None  # (B * n,): where to write
    rows: Tensor | None = None  # (R,): the batch rows; None: all


class SlotLayer(CacheLayerMixin):
    """Keys (B * capacity, H * D) and values (B * capacity, H * Dv) of one layer, allocated on first use."""

    is_compileable = True
    is_sliding = False
    is_croppable = False

    def __init__(self, running: Running):
        super().__init__()
        self.running = running

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads = key_states.shape[1]
        self.allocate(heads, *(states.new_empty(0, heads * states.shape[-1]) for states in (key_states, value_states)))

    def allocate(self, heads: int, keys: Tensor, values: Tensor) -> None:
        """Make buffers of slots like `keys` (n, H * D) and `values` (n, H * Dv)."""
        self.heads, lines = heads, self.running.batch * self.running.capacity
        self.keys, self.values = (like.new_zeros(lines, like.shape[1]) for like in (keys, values))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write states (B, H, n, D) at the slots set by `aim`; returns the first `reach` slots, (B, H, reach, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return AimedSlots(*self.aimed(), self.running.rows).update(key_states, value_states)

    def aimed(self) -> tuple[Tensor, Tensor, Tensor, int, int, int]:
        """What makes the `AimedSlots` of all rows."""
        assert self.running.lines is not None, "aim() comes first"
        return self.keys, self.values, self.running.lines, self.running.reach, self.running.capacity, self.heads

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def by_row(self, buffer: Tensor) -> Tensor:
        """(B, capacity, H * D)"""
        return buffer.unflatten(0, (-1, self.running.capacity))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.running.reach, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.running.capacity


class SlotCache(Cache):
    """One `SlotLayer` per decoder layer; padding is written to the last slot. `states` are those of layers that keep
    some, None where no layer does; `at` says what the running forward is for them."""

    def __init__(self, batch: int, capacity: int, layers: int, states: States | None = None):
        self.running, self.states = Running(batch, capacity, capacity), states
        self.at: TextPass | NodePass | None = None
        super().__init__(layers=[SlotLayer(self.running) for _ in range(layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, as far as they are allocated."""
        buffers = (buffer for layer in self.layers if layer.is_initialized for buffer in layer.buffers)
        return sum(buffer.nbytes for buffer in buffers) + (0 if self.states is None else self.states.nbytes)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None: the window is joined where the convolution is computed."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None: the state is with the rule."""

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Say that a layer is at work; its inputs (B, C, n) go on to the convolution as they are."""
        if self.at is None or self.states is None:
            raise RuntimeError("its convolution is not one that Paceline follows")
        self.at.layer, self.at.window, self.at.calls = self.states.layers[layer_idx], state_idx, 0
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **kwargs: Any) -> Tensor:
        """The rule, which keeps it, is done."""
        if self.at is None or not self.at.calls:
            raise RuntimeError("its recurrence is none of the rules that Paceline follows")
        self.at.layer = None
        return recurrent_states

    def aim(self, slots: Tensor, reach: int) -> None:
        """Let the next forward write at `slots` (B, n) and read the slots below `reach`."""
        self.running.lines, self.running.reach = self._lines(slots), reach

    def _lines(self, slots: Tensor) -> Tensor:
        """The lines of `slots` (B, n) in a layer's buffers, (B * n,)."""
        rows = torch.arange(len(slots), device=slots.device) if self.running.rows is None else self.running.rows
        return (rows[:, None] * self.running.capacity + slots).flatten()

    def clear(self, rows: Tensor | None = None) -> None:
        """Zero all rows, or `rows` (R,): a NaN of an earlier text would spread even from masked slots."""
        if self.states is not None:
            self.states.clear(rows)
        for layer in self.layers:
            if rows is None:
                layer.reset()
            elif layer.is_initialized:
                for buffer in layer.buffers:
                    layer.by_row(buffer)[rows] = 0

    def copy_rows(self, other: "SlotCache", rows: Tensor, into: Tensor | None = None) -> None:
        """Copy `rows` (R,) of `other` into the rows `into` (R,) of this cache, None: into all of them. Where the
        capacities differ, the slots that both have are copied; what else the rows held is zeroed."""
        index, shared = index_of(into), min(self.running.capacity, other.running.capacity)
        if self.states is not None and other.states is not None:
            self.states.copy_rows(other.states, rows, into)
        for layer, source in zip(self.layers, other.layers):
            if not source.is_initialized:
                continue
            if not layer.is_initialized:
                layer.allocate(source.heads, source.keys[:0], source.values[:0])
            for buffer, filled in zip(layer.buffers, source.buffers):
                lines = layer.by_row(buffer)
                lines[index, shared:] = 0
                lines[index, :shared] = source.by_row(filled)[rows, :shared]

    def save_row(self, row: int, count: int) -> list[tuple[int, Tensor, Tensor] | None]:
        """Of each layer the heads and copies of the first `count` slots of `row`, None where it has no slots."""
        return [
            (layer.heads, *(layer.by_row(buffer)[row, :count].clone() for buffer in layer.buffers))
            if layer.is_initialized
            else None
            for layer in self.layers
        ]

    def load_row(self, row: int, saved: list[tuple[int, Tensor, Tensor] | None], count: int) -> None:
        """Copy the first `count` slots that `save_row` gave, of a cache of any capacity, to `row`."""
        for layer, kept in zip(self.layers, saved):
            if kept is None:
                continue
            if not layer.is_initialized:
                layer.allocate(*kept)
            for buffer, lines in zip(layer.buffers, kept[1:]):
                layer.by_row(buffer)[row, :count] = lines[:count]

    def load_columns(self, layers: Sequence[tuple[Tensor, Tensor] | None], pads: Tensor, width: int) -> None:
        """Hold those of `width` columns, the last, of which each layer has keys and values (B, H, k, D), None for one
        without. The first `pads` (B,) columns of a row are padding, and not held."""
        for layer, states in zip(self.layers, layers):
            if states is None:
                continue
            heads, k = states[0].shape[1:3]
            keys, values = (part.transpose(1, 2).flatten(2) for part in states)  # (B, k, H * D)
            if not layer.is_initialized:
                layer.allocate(heads, keys[0], values[0])
            for buffer, lines in zip(layer.buffers, (keys, values)):
                for row, pad in enumerate(pads.tolist()):
                    start = max(width - k, pad)
                    layer.by_row(buffer)[row, start - pad : width - pad] = lines[row, start - (width - k) :]

    def compact(self, base: Tensor, path: Tensor, count: Tensor) -> None:
        """Move the first `count` (B,) nodes of `path` (B, D+1), written at slots base + node, to base + 0, 1, ... D.

        Always copies D + 1 slots, so that the shape is static; slots from `count` on are copied to themselves. States
        absorb the same nodes."""
        if self.states is not None:
            self.states.commit(base, path, count)
        if path.shape[1] == 1:
            return  # the root is in its place already
        columns = torch.arange(path.shape[1], device=path.device)
        source = self._lines(base[:, None] + torch.where(columns < count[:, None], path, columns))
        target = self._lines(base[:, None] + columns)
        made = [layer for layer in self.layers if layer.is_initialized]
        if made:
            torch.ops.paceline.move_lines([buffer for layer in made for buffer in layer.buffers], source, target)
