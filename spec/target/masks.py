"""The mask hook: tree attention for any model that builds its mask through transformers' registry.

transformers asks a registered function for each attention pattern of the model and hands it the
pattern as index arithmetic (causal, sliding window, chunked). While a slot forward runs, the hook
evaluates that very function on per-row query positions and per-slot key positions and intersects it
with what the forward declared visible. At all other times the stock functions answer. Models that
build masks some other way are found by the self-test, not here.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function


@dataclass(frozen=True, slots=True, eq=False)
class SlotView:
    """What the queries of one forward may see."""

    query_positions: Tensor  # (B, n)
    key_positions: Tensor  # (B, capacity)
    visible: Tensor  # (B, n, capacity) bool

    def mask(self, pattern: Callable) -> Tensor:
        """Evaluate the model's own pattern on these positions: (B, 1, n, capacity), True = attend."""
        rows = torch.arange(self.visible.shape[0], device=self.visible.device)[:, None, None, None]
        head = torch.zeros_like(rows)
        queries = self.query_positions[:, None, :, None]
        keys = self.key_positions[:, None, None, :]
        return pattern(rows, head, queries, keys) & self.visible[:, None]


_active = threading.local()


@contextmanager
def showing(view: SlotView) -> Iterator[None]:
    """Run a forward of this thread under `view`."""
    _active.view = view
    try:
        yield
    finally:
        _active.view = None


def active_view() -> SlotView | None:
    """The view of the slot forward that this thread is in, if it is in one."""
    return getattr(_active, "view", None)


def _hooked(stock: Callable, additive: bool) -> Callable:
    def mask(
        *args: Any, mask_function: Callable | None = None, dtype: torch.dtype = torch.float32, **kwargs: Any
    ) -> Tensor | None:
        view = active_view()
        if view is None:
            given = {} if mask_function is None else {"mask_function": mask_function}
            return stock(*args, **given, dtype=dtype, **kwargs)
        visible = view.mask(mask_function or causal_mask_function)
        if not additive:
            return visible
        zero = torch.zeros((), dtype=dtype, device=visible.device)
        return torch.where(visible, zero, torch.finfo(dtype).min)

    return mask


HOOKED = ("sdpa", "eager")
_hooks: dict[str, Callable] = {}


def install() -> None:
    """Let the hook stand in transformers' registry, in front of whatever stands there; once is as good as often."""
    for name in HOOKED:
        stock = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if stock is not _hooks.get(name):
            # sdpa takes a boolean mask; eager attention adds its mask to the scores, where a boolean would be wrong.
            _hooks[name] = ALL_MASK_ATTENTION_FUNCTIONS[name] = _hooked(stock, additive=name == "eager")
