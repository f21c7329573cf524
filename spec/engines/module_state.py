"""Hashes of a model's state, to decide whether a compiled or captured step is still valid for it.

Such a step was made for one tree of modules with their hooks and plain attributes (a scaling factor, an active adapter)
and reads the weights at fixed addresses. `structure` and `addresses` are hashes of these, computed in a few
milliseconds. Weights that change in place do not matter, because the step reads the new values. `fingerprint` tells
whether two models hold the same numbers. Knows nothing of steps.
"""

import dataclasses
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..kernels.linears import is_packed_forward, version
from ..target.adapters import active_adapters, adapter_digest
from ..target.rope import is_followed
from ..target.taps import is_tap
from ..target.weights import block_layers

# Attributes of modules that do not affect what their forward computes; some are set by this package.
_IGNORED = {
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "generation_config", "_backward_hooks",
    "_is_full_backward_hook", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    "long_inv_freq",  # of LongRoPE, computed by the first long text
    "rope_deltas",  # of the last prompt with images; slots are forwarded with explicit positions
    "packed_weight", "_layer", "generate", "__getstate__", "_paceline_patch", "_paceline_drafter",
}  # fmt: skip
_PLAIN = {bool, int, float, str, bytes, complex, type(None), torch.dtype, torch.device}
_DEPTH = 3  # of nested containers that are compared by value; deeper ones are compared by identity

_fingerprints: "WeakKeyDictionary[nn.Module, tuple[str, str]]" = WeakKeyDictionary()


def structure(module: nn.Module) -> int:
    """A hash of the tree of modules, their hooks, configurations and plain attributes, and of the shapes, dtypes and
    devices of their tensors."""
    configs: dict[int, int] = {}
    tensors = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in _tensors(module))
    return hash((_tree(module, configs), tensors))


def _tree(module: nn.Module, configs: dict[int, int]) -> int:
    parts = [(name, _tree(child, configs)) for name, child in module._modules.items() if child is not None]
    attributes = [
        (key, _plain(value, configs))
        for key, value in module.__dict__.items()
        if key not in _IGNORED
        and value is not None
        and value is not False
        and not (is_packed_forward(value) or is_followed(value))
    ]
    return hash((type(module), tuple(parts), tuple(attributes)))


def addresses(module: nn.Module) -> int:
    """A hash of the memory addresses of all tensors of the module."""
    return hash(tuple(map(_address, _tensors(module))))


def numbers(module: nn.Module) -> int:
    """A hash that changes with the weights: of the addresses and version counters of all tensors and, where linear
    layers have packed copies, of the checksums taken when these were last refreshed. Changes that torch's version
    counters miss (through `.data`) are noticed in these layers only."""
    packed = [vars(layer).get("packed_weight") for layer in module.modules()]
    checksums = tuple(kept.identity for kept in packed if kept is not None)
    return hash((addresses(module), tuple(map(version, _tensors(module))), checksums))


def fingerprint(modules: Iterable[nn.Module]) -> str:
    """A digest of the weights of some modules, and of their types and settings; cached until a tensor changes.

    Changes that torch's version counters miss (through `.data`) are not noticed once a digest is cached."""
    return " ".join(map(_fingerprint, modules))


def _fingerprint(module: nn.Module) -> str:
    adapters = active_adapters(module)
    versions = f"{addresses(module)} {list(map(version, _tensors(module)))} {adapters}"
    known = _fingerprints.get(module)
    if known is not None and known[0] == versions:
        return known[1]
    config, settings = getattr(module, "config", None), getattr(module, "settings", "")
    described = "" if config is None else config.to_json_string()
    digest = hashlib.blake2b(f"{type(module)} {described} {settings}".encode() + adapter_digest(module), digest_size=16)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    for path, layer in block_layers(module).items():
        digest.update(f"{path} {layer} {getattr(layer, 'ints', 0)}".encode())
        kept = layer.unpacked  # which is not in the state, as packed blocks are
        parts = () if kept is None else (kept.codes, kept.scales, kept.offsets)
        for tensor in parts:
            digest.update(b"" if tensor is None else _bytes(tensor))
    _fingerprints[module] = versions, digest.hexdigest()
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return id(tensor)


def _plain(value: Any, configs: dict[int, int], depth: int = 0) -> Hashable:
    """A hashable value that compares by content where it is plain, and by identity where it is an object."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in (dict, OrderedDict) and depth < _DEPTH:
        if not value:
            return ()
        items = ((key, item) for key, item in value.items() if not is_tap(item))
        return tuple((repr(key), _plain(item, configs, depth + 1)) for key, item in items)
    if kind in (list, tuple) and depth < _DEPTH:
        return tuple(_plain(item, configs, depth + 1) for item in value)
    if kind in (set, frozenset):
        return frozenset(map(repr, value))
    if isinstance(value, Tensor):
        return _address(value), value.shape
    if dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return kind, tuple(_plain(getattr(value, part.name), configs, depth + 1) for part in dataclasses.fields(kind))
    if hasattr(value, "to_dict") and hasattr(value, "model_type"):  # a configuration, which all layers share
        if id(value) not in configs:
            configs[id(value)] = hash(_plain(vars(value), configs, depth))
        return configs[id(value)]
    return kind, id(value)
