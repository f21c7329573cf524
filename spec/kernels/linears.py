"""Linear layers with weights in another layout, for compiled steps on a CPU.

With weights as they are, they are read at half the speed of the memory, and a decoding step is little else than
reading weights. Here each `nn.Linear` keeps a second copy, in the layout of the first of `BACKENDS` that takes its
weight. `packed_linears` lets a trace use them; everything else goes on with the weights as they are. Knows nothing of
steps or executors.
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
ROWS = 16  # that oneDNN chooses its layout for; it suits 1 to 64

# Through an operator of its own, because inductor takes packed weights only as constants.
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
    """A layout for the weights of linear layers, and the operator that multiplies by them."""

    def takes(self, weight: Tensor) -> bool:
        """Whether it can pack a weight (O, I), here."""

    def pack(self, weight: Tensor) -> Tensor:
        """The packed copy."""

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        """x W' + b, for x (..., I): (..., O). In operators that a compiler can take."""


class Panels:
    """The panels of linear.cpp, in float32, half as large where the weights came from a bfloat16 checkpoint. Products
    differ from torch's by the order of their sums."""

    def takes(self, weight: Tensor) -> bool:
        return weight.dtype == torch.float32 and native.prepare()

    def pack(self, weight: Tensor) -> Tensor:
        return native.panels(weight)

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        return torch.ops.paceline.panel_linear(x, packed, bias, outputs)


class OneDnn:
    """The blocked layout that oneDNN prefers for few rows: in bfloat16, where the products are the same numbers, and in
    float32 where there is no compiler for panels."""

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
    """A packed copy, whose layout it is, and what the weight was that it was made of. Copies of a module do not take it
    along."""

    def __init__(self, tensor: Tensor | None = None, backend: Backend | None = None, identity: tuple | None = None):
        self.tensor, self.backend, self.identity = tensor, backend, identity

    def __deepcopy__(self, memo: dict) -> "PackedWeight":
        return PackedWeight()

    def __reduce__(self) -> tuple:
        return PackedWeight, ()


def pack(models: Iterable[nn.Module]) -> None:
    """Pack the linear layers of `models` that a backend takes, and again those that have changed. Layers on the same
    memory share a copy."""
    made: dict[tuple, PackedWeight] = {}
    for layer in _linears(models):
        weight = layer.weight.detach()
        backend = next((each for each in BACKENDS if _can_be_packed(weight) and each.takes(weight)), None)
        if backend is None:
            layer.__dict__.pop(_KEPT, None)
            continue
        place = (weight.data_ptr(), weight.dtype, weight.shape)
        if place not in made:
            identity = (backend, *place[1:], version(weight), _checksum(weight))
            kept = layer.__dict__.get(_KEPT, PackedWeight())
            made[place] = kept if kept.identity == identity else PackedWeight(backend.pack(weight), backend, identity)
        layer.__dict__[_KEPT] = made[place]


def _checksum(weight: Tensor) -> int:
    """A sum over all bits that sees the order of the rows, and mostly that of columns, in one reading: for changes that
    go past torch's version counters (through `.data`)."""
    words = weight.view(-1).view(torch.int64)
    rows = words.view(len(weight) if words.numel() % len(weight) == 0 else 1, -1).sum(1)  # modulo 2**64
    return int((rows * (2 * torch.arange(len(rows)) + 1)).sum())


def _can_be_packed(weight: Tensor) -> bool:
    here = weight.device.type == "cpu" and weight.is_floating_point()
    words = weight.nbytes % 8 == weight.storage_offset() * weight.itemsize % 8 == 0  # for the checksum
    return here and weight.is_contiguous() and words and weight.numel() > 0


@contextlib.contextmanager
def packed_linears(models: Iterable[nn.Module]) -> Iterator[None]:
    """What is traced inside reads the packed weights of `models`, where there are any. What runs meanwhile in another
    thread does not."""
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
