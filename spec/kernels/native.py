"""Attention (attention.cpp) and linear layers in float32 (linear.cpp) in C++ as operators, where there is a compiler.

`prepare` compiles the sources, which takes some seconds, and keeps the library in the cache folder under a hash of the
sources, the flags and the torch version. Loading it registers the operators' implementations (operators.cpp). Knows
nothing of models.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..console import waiting
from ..files import cache_folder

SOURCES = [Path(__file__).with_name(name) for name in ("tile.h", "attention.cpp", "linear.cpp", "operators.cpp")]
MAX_WIDTH = 512  # as in attention.cpp
_MARCH = {"AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "AVX2": ["-march=x86-64-v3"]}
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
_TORCH = Path(torch.__file__).parent
_LINK = ["-I", str(_TORCH / "include"), "-L", str(_TORCH / "lib"), "-ltorch_cpu"]  # when used, torch is loaded

_loaded: ctypes.CDLL | None = None


def prepare() -> bool:
    """Compile and load the operators; returns whether they can be used here. To be called before anything is traced."""
    global _loaded
    _loaded = _library_file()
    return _loaded is not None


@functools.cache
def _library_file() -> ctypes.CDLL | None:
    """The compiled library; None where it cannot be made, with a line on stderr unless there simply is no compiler."""
    march = _MARCH.get(torch.backends.cpu.get_cpu_capability(), [])
    compilers = [path for name in (os.environ.get("CXX", "g++"), "clang++") if (path := shutil.which(name))]
    reason = None
    for compiler in compilers if march else ():
        try:
            return ctypes.CDLL(str(_built(compiler, [*_FLAGS, *march])))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = reason or (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace")
    if reason:
        said = reason.strip().splitlines()[0]
        print(f"our own attention and linear layers are not used, torch's kernels are ({said})", file=sys.stderr)
    return None


def _built(compiler: str, flags: list[str]) -> Path:
    """The library's file in the cache folder, compiled now if it is not there."""
    key = [
        *(source.read_text(encoding="utf-8") for source in SOURCES),
        compiler,
        platform.machine(),
        torch.__version__,
        *flags,
    ]
    folder = cache_folder() / "native"
    file = folder / f"kernels-{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:16]}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            made = Path(beside) / file.name
            units = [str(source) for source in SOURCES if source.suffix == ".cpp"]
            with waiting("compiling our own kernels, once"):
                subprocess.run([compiler, *flags, *units, *_LINK, "-o", str(made)], check=True, capture_output=True)
            os.replace(made, file)
    return file


def _panel_outputs() -> int:
    assert _loaded is not None, "prepare() comes first"
    return _loaded.panel_outputs()


def panels(weight: Tensor) -> Tensor:
    """`weight` (N, K) in float32, packed for `panel_linear`: P panels of 2 L outputs, the last one padded with zeros.
    float32 (P, K, 2 L); or, where every weight is exactly a bfloat16 number, two of them in each int32 (P, K, L)."""
    outputs, inputs = weight.shape
    lanes = _panel_outputs() // 2
    filled = F.pad(weight, (0, 0, 0, -outputs % (2 * lanes))).view(-1, 2, lanes, inputs)  # (P, 2, L, K)
    bits = filled.view(torch.int32)
    if (bits & 0xFFFF).any():
        return filled.flatten(1, 2).transpose(1, 2).contiguous()
    return (bits[:, 0].bitwise_right_shift(16).bitwise_and_(0xFFFF) | bits[:, 1]).transpose(1, 2).contiguous()


_library = torch.library.Library("paceline", "FRAGMENT")
_library.define("panel_linear(Tensor x, Tensor packed, Tensor? bias, int outputs) -> Tensor")
_library.define("slot_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor")


@torch.library.register_fake("paceline::slot_attention", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    batch, heads, nodes, _ = query.shape
    return query.new_empty(batch, nodes, heads, value.shape[-1])


@torch.library.register_fake("paceline::panel_linear", lib=_library)
def _(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """Also checks the arguments, once per trace instead of in every step."""
    assert x.dtype == torch.float32 and x.shape[-1] == packed.shape[1], "what was packed is another layer"
    assert -(-outputs // _panel_outputs()) == len(packed)
    assert bias is None or (bias.dtype == torch.float32 and bias.shape == (outputs,) and bias.is_contiguous())
    return x.new_empty(*x.shape[:-1], outputs)


def can_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Whether `slot_attention` takes these: query (B, H, n, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), all in
    bfloat16 or all in float32, and a boolean mask (B, 1, n, T)."""
    here = _loaded is not None and query.device.type == "cpu" and not query.requires_grad
    numbers = query.dtype == key.dtype == value.dtype and mask.dtype == torch.bool
    numbers = numbers and query.dtype in (torch.bfloat16, torch.float32)
    shapes = mask.shape == (query.shape[0], 1, query.shape[2], key.shape[2]) and key.shape[:3] == value.shape[:3]
    dense = all(tensor.stride(-1) == 1 for tensor in (query, key, value, mask))
    fits = max(query.shape[-1], value.shape[-1]) <= MAX_WIDTH and query.shape[0] == key.shape[0]
    return here and numbers and shapes and dense and fits
