"""Linear layers with repacked weights, for decoding on a CPU.

A decoding step mostly reads weights, and in the usual layout torch reads them at half the memory bandwidth. `Packing`
adds to each `nn.Linear` of some models a second copy of its weight in the layout of the first of `BACKENDS` that
supports it; within it, the layers compute with these copies. A backend's result for a row does not depend, bit for bit,
on the rows beside it, so that plain and drafted decoding round alike. Knows nothing of steps and executors.
"""

import threading
import weakref
from collections.abc import Iterable
from types import MethodType
from typing import NamedTuple, Protocol, Self

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import native
from .block_linear import BlockLinear
from .cpu import SWITCH
from .panels import pack_dense

_KEPT = "packed_weight"  # the attribute of a layer that holds its packed copy
_SHARE = 0.5  # of the free memory that copies may take
_inside = threading.local()  # .depth: how many packings this thread is in
_users: "weakref.WeakKeyDictionary[nn.Linear, int]" = weakref.WeakKeyDictionary()  # how many packings a layer is in
_changing = threading.RLock()


class Packed(NamedTuple):
    """A weight in a backend's layout."""

    tensor: Tensor
    format: list[int] | None = None


class Backend(Protocol):
    """A layout for weights of linear layers, and the product with them."""

    def takes(self, weight: Tensor) -> bool:
        """Whether it can pack this weight (O, I) on this machine."""

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Packed:
        """The packed copy of weight and bias."""

    def linear(self, x: Tensor, packed: Packed, outputs: int) -> Tensor:
        """x W' + b for x (..., I): (..., O), with operators that torch.compile can trace."""


class Panels:
    """The panels of linears.cpp, for bfloat16 and float32. Products differ from torch's in the order of summation."""

    def takes(self, weight: Tensor) -> bool:
        return weight.dtype in (torch.float32, torch.bfloat16) and native.prepare()

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Packed:
        packed, form = pack_dense(weight, bias, native.panel_width())
        return Packed(packed, form.ints())

    def linear(self, x: Tensor, packed: Packed, outputs: int) -> Tensor:
        assert packed.format is not None
        return torch.ops.paceline.linears(x, [packed.tensor], [outputs], packed.format)[0]


BACKENDS: list[Backend] = [Panels()]


class PackedWeight:
    """A packed copy, its layout, and the identity of the weight that it was made of. Copies and pickles of a module do
    not include it."""

    def __init__(self, packed: Packed | None = None, backend: Backend | None = None, identity: tuple | None = None):
        self.packed, self.backend, self.identity = packed, backend, identity

    def __deepcopy__(self, memo: dict) -> "PackedWeight":
        return PackedWeight()

    def __reduce__(self) -> tuple:
        return PackedWeight, ()


class Packing:
    """The packed weights of the linear layers of some models that a backend supports.

    Within `with packing:` the layers use them in this thread, and in code that torch.compile traces; other threads use
    the weights themselves. It does not keep the models alive."""

    def __init__(self, models: Iterable[nn.Module]):
        layers = [module for model in models for module in model.modules() if type(module) is nn.Linear]
        self.layers = [weakref.ref(layer) for layer in layers]
        self.entered: list[list[nn.Linear]] = []
        self.refresh()

    def refresh(self) -> None:
        """Pack what is not packed, and again what has changed. Layers on the same memory share a copy.

        Raises ValueError where there is no memory for the copies."""
        made: dict[tuple, PackedWeight] = {}
        for layer in self._living():
            parts = [part.detach() for part in (layer.weight, layer.bias) if part is not None]
            backend = next((each for each in BACKENDS if _can_be_packed(parts) and each.takes(parts[0])), None)
            if backend is None:
                layer.__dict__.pop(_KEPT, None)
                continue
            storage = tuple((part.data_ptr(), part.dtype, part.shape) for part in parts)
            if storage not in made:
                identity = (backend, storage, *((version(part), _checksum(part)) for part in parts))
                kept: PackedWeight = layer.__dict__.get(_KEPT, PackedWeight())
                made[storage] = kept if kept.identity == identity else _packed(backend, parts, identity)
            layer.__dict__[_KEPT] = made[storage]

    def _living(self) -> list[nn.Linear]:
        return [layer for reference in self.layers if (layer := reference()) is not None]

    def __enter__(self) -> Self:
        layers = [layer for layer in self._living() if _KEPT in layer.__dict__]
        with _changing:
            for layer in layers:
                _users[layer] = _users.get(layer, 0) + 1
                layer.__dict__.setdefault("forward", MethodType(_packed_forward, layer))
        self.entered.append(layers)
        _inside.depth = getattr(_inside, "depth", 0) + 1
        return self

    def __exit__(self, *error: object) -> None:
        _inside.depth -= 1
        with _changing:
            for layer in self.entered.pop():
                _users[layer] -= 1
                if not _users[layer] and is_packed_forward(layer.__dict__.get("forward")):
                    del layer.__dict__["forward"]


def packed_form(layer: nn.Module) -> tuple | None:
    """The form of a layer's packed weight, of whichever kind; None where it has none."""
    if isinstance(layer, BlockLinear):
        return tuple(layer.ints) if layer.unpacked is None else (layer.bits, layer.group, layer.unpacked.zero)
    kept = vars(layer).get(_KEPT)
    if kept is None or kept.packed is None:
        return None
    packed: Packed = kept.packed
    return packed.tensor.shape, packed.tensor.dtype, tuple(packed.format or ())


def is_packed_forward(value: object) -> bool:
    """Whether an attribute of a layer is the forward that a packing gives it for a while."""
    return getattr(value, "__func__", None) is _packed_forward


def _packed_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    kept: PackedWeight = getattr(layer, _KEPT)
    here = torch.compiler.is_dynamo_compiling() or getattr(_inside, "depth", 0) > 0
    if not here or kept.packed is None or kept.backend is None or x.dtype != layer.weight.dtype:
        return F.linear(x, layer.weight, layer.bias)
    return kept.backend.linear(x, kept.packed, len(layer.weight))


def _packed(backend: Backend, parts: list[Tensor], identity: tuple) -> PackedWeight:
    weight, *bias = parts
    if weight.nbytes > psutil.virtual_memory().available * _SHARE:
        raise ValueError(
            f"there is no memory for a packed copy of a weight of {weight.nbytes / 1e6:.0f} MB; free some, "
            f"or set {SWITCH}=none to use torch's kernels"
        )
    return PackedWeight(backend.pack(weight, *bias), backend, identity)


def version(tensor: Tensor) -> int:
    """Torch's counter of in-place changes; 0 for a tensor made in inference mode, which has no counter."""
    return 0 if tensor.is_inference() else tensor._version


def _checksum(tensor: Tensor) -> int:
    """A checksum of all bits that depends on the order of rows and mostly on that of columns, computed in one pass. It
    detects changes that torch's version counters miss (through `.data`)."""
    whole = tensor.nbytes % 8 == tensor.storage_offset() * tensor.itemsize % 8 == 0
    words = tensor.view(-1).view(
        torch.int64 if whole else {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    )
    rows = words.view(len(tensor) if words.numel() % len(tensor) == 0 else 1, -1).sum(1)  # modulo 2**64
    return int((rows * (2 * torch.arange(len(rows)) + 1)).sum())


def _can_be_packed(parts: list[Tensor]) -> bool:
    return all(
        part.device.type == "cpu" and part.is_floating_point() and part.is_contiguous() and part.numel() > 0
        for part in parts
    )
