"""The mask hook: tree attention for any model that builds its mask through transformers' registry.

transformers calls a registered function for each attention pattern of the model and passes it the pattern as a function
of query and key indices (causal, sliding window, chunked). During a forward over the slot cache (slots.py, which also
says which slots each node may see: the text and its ancestors) the hook evaluates that function on the positions of
queries and keys, and combines the result with the visible slots. At all other times the stock functions are called.
Models that build masks in another way are found by the self-test, not here.
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
    """The positions of queries and keys of one forward, and which slots each query may see."""

    query_positions: Tensor  # (B, n)
    key_positions: Tensor  # (B, capacity)
    visible: Tensor  # (B, n, capacity) bool
    lengths: Tensor | None = (
        None  # (B, n): of the text as each query is read, where rotary embeddings look at it (rope.py)
    )

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
    """The view of this thread's running slot forward, or None."""
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
    """Register the hook in transformers' registry, around the functions found there; calling it again has no effect."""
    for name in HOOKED:
        stock = ALL_MASK_ATTENTION_FUNCTIONS[name]
        if stock is not _hooks.get(name):
            # sdpa takes a boolean mask; eager attention adds its mask to the scores, where a boolean would be wrong.
            _hooks[name] = ALL_MASK_ATTENTION_FUNCTIONS[name] = _hooked(stock, additive=name == "eager")
