"""Regions: the layers that a model repeats are traced as calls of one subgraph, which torch.compile compiles once.

A layer is what a `ModuleList` holds several of, whatever the family of the model. Layers of another type, with other
settings, or with weights of other shapes or in other blocks give a region of their own: torch's guards tell such layers
apart only the first time that a model is traced in a step, and a draft model is traced several times. Where a layer
uses only its own slots of the cache, its region gets these in place of the cache and is a function of tensors, which
torch (from 2.12 on) need not even trace again for the next layer. Layers that keep states instead are traced as part of
the whole. Calls with other shapes are told apart by torch.
Knows nothing of steps.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.linears import packed_form
from ..target.cache import AimedSlots, SlotCache

_MANY = 1 << 20  # of a layer's variants that torch may remember; beyond its own limit of 8 it raises
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_NUMBER = "_paceline_cache_layer"  # the attribute of a layer that says which layer of the cache it uses


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


def layer_kinds(layers: list[nn.Module]) -> list[Hashable]:
    """For each of `layers` what its kind is told by: its type, the plain attributes of its parts, except for those that
    number the layers, and the shapes and forms of its weights."""
    described = [_described(layer) for layer in layers]
    numbering = {
        (kind, key)
        for kind in set(map(type, layers))
        for key in next(attributes for layer, attributes in zip(layers, described) if type(layer) is kind)
        if _numbers([(at, described[at].get(key)) for at, layer in enumerate(layers) if type(layer) is kind])
    }
    return [
        (type(layer), *(item for item in attributes.items() if (type(layer), item[0]) not in numbering))
        for layer, attributes in zip(layers, described)
    ]


def _numbers(values: list[tuple[int, object]]) -> bool:
    """Whether these values at places in a list of layers count the places, from any number on."""
    whole = all(type(value) is int for _, value in values)
    return len(values) > 1 and whole and len({value - at for at, value in values}) == 1  # type: ignore[operator]


def _described(layer: nn.Module) -> dict[tuple, Any]:
    attributes: dict[tuple, Any] = {}
    for path, part in layer.named_modules():
        attributes[path, "type"] = type(part)
        attributes[path, "packed"] = packed_form(part)
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            attributes[path, name] = tensor.shape, tensor.dtype
        for name, value in vars(part).items():
            if _is_plain(value):
                attributes[path, name] = value if type(value) in _PLAIN else repr(value)
    return attributes


def _is_plain(value: object) -> bool:
    """Whether a value is a number or a text, or a container of such."""
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    return type(value) in _PLAIN or (isinstance(value, list | tuple | set) and all(map(_is_plain, value)))


def distinct_layers(models: Iterable[nn.Module]) -> int:
    """How many kinds of repeated layers `models` have, the same kind in two models counted twice; at least 1."""
    return max(1, sum(len(set(layer_kinds(repeated_layers(model)))) for model in models))


@contextlib.contextmanager
def layers_as_regions(models: Iterable[nn.Module], run: Callable[[], object]) -> Iterator[int]:
    """Within the block the repeated layers of `models` are traced as regions; yields how many layers these are. `run`
    runs all of them once, to see what they use."""
    kinds: dict[nn.Module, Hashable] = {}
    for model in models:
        several = [layer for layer in repeated_layers(model) if "forward" not in vars(layer)]
        kinds |= zip(several, layer_kinds(several))
    uses = _cache_uses(list(kinds), run)
    layers = [layer for layer in kinds if "update_conv_state" not in uses[layer]]
    numbers = {layer: number for layer in layers if (number := _single_number(uses[layer])) is not None}
    regions: dict[tuple, Callable] = {}
    for layer in layers:
        kind = kinds[layer]
        if layer in numbers:
            layer.__dict__[_NUMBER] = numbers[layer]
        key = kind, layer in numbers
        if key not in regions:
            regions[key] = (_region_of_own_slots if layer in numbers else _region)(type(layer).forward, len(regions))
        layer.__dict__["forward"] = MethodType(regions[key], layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.__dict__["forward"]
            layer.__dict__.pop(_NUMBER, None)


class _Watched:
    """A cache as a layer sees it that is watched."""

    def __init__(self, cache: SlotCache, uses: set):
        self._cache, self._uses = cache, uses

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._uses.add(layer_idx)
        return self._cache.update(keys, values, layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        self._uses.add(name)
        return getattr(self._cache, name)


def _cache_uses(layers: list[nn.Module], run: Callable[[], object]) -> dict[nn.Module, set]:
    """What each of `layers` does with the cache in `run`: the numbers of the cache's layers that it updates, and the
    names of whatever else it looks up."""
    uses: dict[nn.Module, set] = {layer: set() for layer in layers}

    def watched(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = _cache_name(kwargs)
        if name is None:
            uses[layer].add("another argument")
        else:
            kwargs[name] = _Watched(kwargs[name], uses[layer])
        return type(layer).forward(layer, *args, **kwargs)

    for layer in layers:
        layer.__dict__["forward"] = MethodType(watched, layer)
    try:
        run()
    finally:
        for layer in layers:
            del layer.__dict__["forward"]
    return uses


def _single_number(uses: set) -> int | None:
    """The layer of the cache that a layer updates, where it does nothing else with the cache."""
    number = next(iter(uses)) if len(uses) == 1 else None
    return number if isinstance(number, int) else None


def _cache_name(arguments: dict[str, Any]) -> str | None:
    return next((name for name, value in arguments.items() if isinstance(value, SlotCache)), None)


def _region_of_own_slots(forward: Callable, number: int) -> Callable:
    """`forward` of a layer as a region that is given the layer's own slots in place of the cache."""

    def inner(
        layer: nn.Module, name: str, keys: Tensor, values: Tensor, lines: Tensor, reach: int, capacity: int, heads: int,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        kwargs[name] = AimedSlots(keys, values, lines, reach, capacity, heads)
        return forward(layer, *args, **kwargs)

    region = _region(inner, number)

    def outer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = _cache_name(kwargs)
        assert name is not None, "the cache was there when the layer was watched"
        slots = kwargs.pop(name).layers[getattr(layer, _NUMBER)].aimed()
        return region(layer, name, *slots, *args, **kwargs)

    return outer


def _region(forward: Callable, number: int) -> Callable:
    """`forward` as the region `number`, with code of its own: torch finds regions by the code of their function."""

    def inner(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(layer, *args, **kwargs)

    function = FunctionType(_numbered(inner.__code__, number), inner.__globals__, None, None, inner.__closure__)
    mark = torch.compiler.nested_compile_region
    try:
        return mark(function, max_reuse_entries=_MANY)
    except TypeError:  # torch before 2.12
        return mark(function)


@functools.cache
def _numbered(code: CodeType, number: int) -> CodeType:
    """Code that is unequal to that of other numbers. It lives on, because torch drops what it compiled when code that
    it traced is gone."""
    return code.replace(co_name=f"region_{number}")
