"""Regions: the layers that a model repeats are traced as calls of one subgraph, which torch.compile compiles once.

A layer is what a `ModuleList` holds several of, whatever the family of the model; layers of several types, as in
hybrid models, give a region for each type. Calls with other shapes (a draft model's levels) or other modules inside
(a layer without the first one's norm) get a region of their own. Knows nothing of steps.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import MethodType

import torch
from torch import nn

_MANY = 1 << 20  # of a layer's variants that torch may remember; beyond its own limit of 8 it raises


@contextlib.contextmanager
def layers_as_regions(models: Iterable[nn.Module]) -> Iterator[int]:
    """Within the block the repeated layers of `models` are traced as regions; yields how many layers these are."""
    layers = [layer for model in models for layer in repeated_layers(model) if "forward" not in vars(layer)]
    regions: dict[type, Callable] = {}
    for layer in layers:
        kind = type(layer)
        if kind not in regions:
            regions[kind] = _region(kind.forward)
        layer.__dict__["forward"] = MethodType(regions[kind], layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """The entries of the outermost module lists whose type occurs more than once in its list. Modules without parts,
    like linear layers, are too small to be worth a call."""
    if not isinstance(module, nn.ModuleList):
        return [layer for child in module.children() for layer in repeated_layers(child)]
    counts = Counter(map(type, module))
    found = []
    for entry in module:
        repeated = counts[type(entry)] > 1 and next(entry.children(), None) is not None
        found += [entry] if repeated else repeated_layers(entry)
    return found


def _region(forward: Callable) -> Callable:
    mark = torch.compiler.nested_compile_region
    try:
        return mark(forward, max_reuse_entries=_MANY)
    except TypeError:  # torch before 2.12
        return mark(forward)
