"""The rules of transformers' layers, led to our states for the time of a forward of ours in this thread.

A layer tells its cache what enters a convolution, and calls the rule itself, a function of its module, with what we
have to see. `install` puts a function of ours in its place, which at all other times is the stock one; kernels that
transformers chose stay those that read text. Which layers have states is found as they run; a model whose layers keep
states in another way is told by what it lacks. Knows nothing of trees.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from .parts import DeltaMemory, Part, ScanMemory, SsdMemory
from .passes import NodePass, TextPass

CONVOLUTION = "causal_conv1d_fn"
MEMORIES: dict[str, type[Part]] = {  # by the names that transformers' modules call the rules
    "torch_chunk_gated_delta_rule": DeltaMemory,
    "mamba2_chunk_scan": SsdMemory,
    "mamba_selective_scan": ScanMemory,
}
_active = threading.local()


@contextmanager
def passing(at: TextPass | NodePass | None) -> Iterator[None]:
    """Run a forward of this thread as `at`."""
    _active.at = at
    try:
        yield
    finally:
        _active.at = None


def _hook(stock: Callable, run: Callable) -> Callable:
    @functools.wraps(stock)
    def hook(*args: Any, **kwargs: Any) -> Any:
        at = getattr(_active, "at", None)
        return stock(*args, **kwargs) if at is None or at.layer is None else run(at, stock, *args, **kwargs)

    return hook


def _convolution(at: TextPass | NodePass, stock: Callable, *args: Any, **kwargs: Any) -> Any:
    assert at.layer is not None, "else the stock function is called"
    return at.layer.window(at.window).run(at, stock, *args, **kwargs)


def _rule(kind: type[Part], at: TextPass | NodePass, stock: Callable, *args: Any, **kwargs: Any) -> Any:
    assert at.layer is not None, "else the stock function is called"
    at.calls += 1
    for name in _STATES:
        kwargs.pop(name, None)
    return at.layer.memory(at.calls - 1, kind).run(at, stock, *args, **kwargs)


# What the cache would have handed in and out; the part has it.
_STATES = ("initial_state", "initial_states", "output_final_state", "return_final_states", "return_last_state")
_hooks: set[Callable] = set()


def install(model: nn.Module) -> set[str]:
    """Lead the rules of the layers of `model` to states; calling it again has no effect. Returns their names."""
    names = set()
    for module in _modules_of(model):
        for name in (CONVOLUTION, *MEMORIES):
            stock = vars(module).get(name)
            if stock is None:
                continue
            names.add(name)
            if stock not in _hooks:
                run = _convolution if name == CONVOLUTION else functools.partial(_rule, MEMORIES[name])
                hook = _hook(stock, run)
                _hooks.add(hook)
                setattr(module, name, hook)
    return names


def followed(model: nn.Module) -> bool:
    """Whether layers of `model` keep states by rules that are followed here. Every such layer begins with a
    convolution; a model of attention alone may come of the same module (Granite 4 has both)."""
    return bool(install(model)) and any(isinstance(part, nn.Conv1d) for part in model.modules())


def keeps_others(model: nn.Module) -> bool:
    """Whether layers of `model` keep states by rules that are not followed here."""
    return getattr(model, "_is_stateful", False) and not install(model)


def reads_apart(model: nn.Module) -> bool:
    """Whether each document of a packed row needs a row of its own: where layers keep states, and in models of such a
    family whose layers all attend, which make no mask of positions that restart."""
    return bool(install(model)) or getattr(model, "_is_stateful", False)


def _modules_of(model: nn.Module) -> list[ModuleType]:
    """The Python modules that define the classes of a model's parts."""
    names = dict.fromkeys(kind.__module__ for part in model.modules() for kind in type(part).__mro__)
    return [sys.modules[name] for name in names if name in sys.modules and name.startswith("transformers.models.")]
