"""What a kept step depends on in a model, so that a step made for another state of it is never taken for this one.

A compiled or captured step has looked once at the tree of modules, their hooks and their plain attributes (a scaling
factor, a switched adapter), and reads its weights from where they lay. `structure` and `addresses` say in a few
milliseconds whether all that is as it was; numbers that changed in place are read as they are and do not matter.
`fingerprint` tells whether two models hold the same numbers. Knows nothing of steps.
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

from ..target.taps import is_tap

# Of a module, but no part of what its forward computes; some are this package's own.
_IGNORED = {
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "generation_config", "_backward_hooks",
    "_is_full_backward_hook", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    "packed_weight", "_layer", "generate", "__getstate__", "_paceline_patch", "_paceline_drafter",
}  # fmt: skip
_PLAIN = {bool, int, float, str, bytes, complex, type(None), torch.dtype, torch.device}
_DEPTH = 3  # of containers whose values count; below it only which object it is

_fingerprints: "WeakKeyDictionary[nn.Module, tuple[str, str]]" = WeakKeyDictionary()


def structure(module: nn.Module) -> int:
    """Changes with the tree of modules, their hooks, configurations and plain attributes, and the shapes, dtypes and
    devices of their tensors."""
    configs: dict[int, int] = {}
    tensors = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in _tensors(module))
    return hash((_tree(module, configs), tensors))


def _tree(module: nn.Module, configs: dict[int, int]) -> int:
    parts = [(name, _tree(child, configs)) for name, child in module._modules.items() if child is not None]
    attributes = [
        (key, _plain(value, configs))
        for key, value in module.__dict__.items()
        if key not in _IGNORED and value is not None and value is not False
    ]
    return hash((type(module), tuple(parts), tuple(attributes)))


def addresses(module: nn.Module) -> int:
    """Changes where a tensor of the module lies elsewhere."""
    return hash(tuple(map(_address, _tensors(module))))


def fingerprint(modules: Iterable[nn.Module]) -> str:
    """A digest of the numbers in some modules, and of how they compute; kept until a tensor changes.

    Changes that go past torch's version counters (through `.data`) are not seen once a digest is kept."""
    return " ".join(map(_fingerprint, modules))


def _fingerprint(module: nn.Module) -> str:
    versions = f"{addresses(module)} {list(map(version, _tensors(module)))}"
    kept = _fingerprints.get(module)
    if kept is not None and kept[0] == versions:
        return kept[1]
    config, settings = getattr(module, "config", None), getattr(module, "settings", "")
    described = "" if config is None else config.to_json_string()
    digest = hashlib.blake2b(f"{type(module)} {described} {settings}".encode(), digest_size=16)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    _fingerprints[module] = versions, digest.hexdigest()
    return digest.hexdigest()


def version(tensor: Tensor) -> int:
    """Torch's count of changes in place; 0 for a tensor that was made in inference mode, which has none."""
    return 0 if tensor.is_inference() else tensor._version


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
