"""Attention of bfloat16 in C++ (attention.cpp) as an operator, where there is a compiler.

`prepare` compiles the source in about two seconds and keeps the result in the cache folder, under a name made of the
source, the flags and the torch version. Knows nothing of models.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .models import cache_folder

SOURCE = Path(__file__).with_name("attention.cpp")
MAX_WIDTH = 512  # as in the source
_MARCH = {"AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "AVX2": ["-march=x86-64-v3"]}
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]


_loaded: ctypes.CDLL | None = None


def prepare() -> None:
    """Make the operator ready, where it can be; to be called before anything is traced."""
    global _loaded
    _loaded = _library_file()


@functools.cache
def _library_file() -> ctypes.CDLL | None:
    """The compiled source; None where it cannot be compiled or loaded."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        return None
    flags = [*_FLAGS, *_MARCH.get(torch.backends.cpu.get_cpu_capability(), [])]
    key = [SOURCE.read_text(encoding="utf-8"), compiler, platform.machine(), torch.__version__, *flags]
    name = f"attention-{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:16]}.so"
    try:
        folder = cache_folder() / "native"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                made = Path(beside) / name
                subprocess.run([compiler, *flags, str(SOURCE), "-o", str(made)], check=True, capture_output=True)
                os.replace(made, folder / name)
        return ctypes.CDLL(str(folder / name))
    except (OSError, subprocess.CalledProcessError):
        return None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    batch, heads, nodes, width = query.shape
    out = query.new_empty(batch, nodes, heads, value.shape[-1])
    sizes = [batch, heads, key.shape[1], nodes, key.shape[2], width, value.shape[-1]]
    strides = [*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], mask.stride(0), mask.stride(2)]
    places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (query, key, value, mask)]
    layout = (ctypes.c_int64 * 18)(*sizes, *strides)
    _loaded.attend_bfloat16(*places, ctypes.c_float(scale), ctypes.c_void_p(out.data_ptr()), layout)
    return out


_library = torch.library.Library("paceline", "FRAGMENT")
_library.define("slot_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor")
_library.impl("slot_attention", _attend, "CPU")


@torch.library.register_fake("paceline::slot_attention", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    batch, heads, nodes, _ = query.shape
    return query.new_empty(batch, nodes, heads, value.shape[-1])


def can_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Whether `slot_attention` takes these: query (B, H, n, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv), all in
    bfloat16, and a boolean mask (B, 1, n, T)."""
    same = query.dtype == key.dtype == value.dtype == torch.bfloat16 and mask.dtype == torch.bool
    dense = mask.shape[1] == 1 and all(tensor.stride(-1) == 1 for tensor in (query, key, value, mask))
    fits = max(query.shape[-1], value.shape[-1]) <= MAX_WIDTH
    here = _loaded is not None and query.device.type == "cpu" and not query.requires_grad
    return here and same and dense and fits
