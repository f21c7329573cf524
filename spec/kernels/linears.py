"""Linear layers with repacked weights, for compiled steps on a CPU.

A decoding step mostly reads weights, and in the usual layout torch reads them at half the memory bandwidth. `pack` adds
to each `nn.Linear` a second copy of its weight in a faster layout, that of the first of `BACKENDS` that supports it: a
kernel of torch's, or ours in C++ (native.py builds and calls it). Code traced within `packed_linears` uses the copies;
everything else uses the original weights. Knows nothing of steps or executors.
"""

import contextlib
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engines.module_state import version
from . import native
from .cpu import has_bfloat16, is_x86

_KEPT = "packed_weight"  # the attribute of a layer that holds its packed copy
ROWS = 16  # rows for which oneDNN chooses its layout; it is good for 1 to 64

# A custom operator, because inductor accepts packed weights only as constants.
_library = torch.library.Library("paceline", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor packed, Tensor? bias) -> Tensor")
for _backend in ("CPU", "MkldnnCPU"):
    _library.impl(
        "packed_linear",
        lambda x, packed, bias: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""),
        _backend,
    )


@torch.library.register_fake("paceline::packed_linear", lib=_library)
def _(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


class Backend(Protocol):
    """A layout for weights of linear layers, and the product with them."""

    def takes(self, weight: Tensor) -> bool:
        """Whether it can pack this weight (O, I) on this machine."""

    def pack(self, weight: Tensor) -> Tensor:
        """The packed copy."""

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        """x W' + b for x (..., I): (..., O), with operators that torch.compile can trace."""


class Panels:
    """The panel layout of linear.cpp for float32; half as large where all weights are bfloat16 numbers. Products differ
    from torch's in the order of summation."""

    def takes(self, weight: Tensor) -> bool:
        return weight.dtype == torch.float32 and native.prepare()

    def pack(self, weight: Tensor) -> Tensor:
        return native.panels(weight)

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        return torch.ops.paceline.panel_linear(x, packed, bias, outputs)


class OneDnn:
    """oneDNN's blocked layout for few rows: for bfloat16, where the products are the same numbers as torch's, and for
    float32 where panels cannot be compiled."""

    def takes(self, weight: Tensor) -> bool:
        if weight.dtype == torch.bfloat16:
            return has_bfloat16()
        return weight.dtype == torch.float32 and torch.backends.mkldnn.is_available() and is_x86()

    def pack(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        return torch.ops.paceline.packed_linear(x, packed, bias)


BACKENDS: list[Backend] = [Panels(), OneDnn()]


class PackedWeight:
    """A packed copy, its layout, and the identity of the weight that it was made of. Copies and pickles of a module do
    not include it."""

    def __init__(self, tensor: Tensor | None = None, backend: Backend | None = None, identity: tuple | None = None):
        self.tensor, self.backend, self.identity = tensor, backend, identity

    def __deepcopy__(self, memo: dict) -> "PackedWeight":
        return PackedWeight()

    def __reduce__(self) -> tuple:
        return PackedWeight, ()


def pack(models: Iterable[nn.Module]) -> None:
    """Pack the linear layers of `models` that a backend supports; repacks layers whose weights have changed. Layers on
    the same memory share a copy."""
    made: dict[tuple, PackedWeight] = {}
    for layer in _linears(models):
        weight = layer.weight.detach()
        backend = next((each for each in BACKENDS if _can_be_packed(weight) and each.takes(weight)), None)
        if backend is None:
            layer.__dict__.pop(_KEPT, None)
            continue
        storage = (weight.data_ptr(), weight.dtype, weight.shape)
        if storage not in made:
            identity = (backend, *storage[1:], version(weight), _checksum(weight))
            kept = layer.__dict__.get(_KEPT, PackedWeight())
            made[storage] = kept if kept.identity == identity else PackedWeight(backend.pack(weight), backend, identity)
        layer.__dict__[_KEPT] = made[storage]


def _checksum(weight: Tensor) -> int:
    """A checksum of all bits that depends on the order of rows and mostly on that of columns, computed in one pass. It
    detects changes that torch's version counters miss (through `.data`)."""
    words = weight.view(-1).view(torch.int64)
    rows = words.view(len(weight) if words.numel() % len(weight) == 0 else 1, -1).sum(1)  # modulo 2**64
    return int((rows * (2 * torch.arange(len(rows)) + 1)).sum())


def _can_be_packed(weight: Tensor) -> bool:
    here = weight.device.type == "cpu" and weight.is_floating_point()
    words = weight.nbytes % 8 == weight.storage_offset() * weight.itemsize % 8 == 0  # for the checksum
    return here and weight.is_contiguous() and words and weight.numel() > 0


@contextlib.contextmanager
def packed_linears(models: Iterable[nn.Module]) -> Iterator[None]:
    """Code that torch.compile traces within the block uses the packed weights of `models`, where there are any; code
    that runs eagerly meanwhile in another thread does not."""
    layers = [layer for layer in _linears(models) if _KEPT in vars(layer) and "forward" not in vars(layer)]
    for layer in layers:
        layer.__dict__["forward"] = MethodType(_packed_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _packed_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    packed: PackedWeight = getattr(layer, _KEPT)
    if packed.backend is None or packed.tensor is None or not torch.compiler.is_dynamo_compiling():
        return F.linear(x, layer.weight, layer.bias)
    return packed.backend.linear(x, packed.tensor, layer.bias, len(layer.weight))


def _linears(models: Iterable[nn.Module]) -> list[nn.Linear]:
    return [module for model in models for module in model.modules() if type(module) is nn.Linear]
