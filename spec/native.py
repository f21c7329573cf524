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
import sys
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


def prepare() -> bool:
    """Make the operator ready, where it can be, and say whether it is; to be called before anything is traced."""
    global _loaded
    _loaded = _library_file()
    return _loaded is not None


@functools.cache
def _library_file() -> ctypes.CDLL | None:
    """The compiled source; None, with a line that says why if it is not for want of a compiler, where there is none."""
    march = _MARCH.get(torch.backends.cpu.get_cpu_capability())
    compilers = [found for name in (os.environ.get("CXX", "g++"), "clang++") if (found := shutil.which(name))]
    reason = None
    for compiler in compilers if march else ():
        try:
            return ctypes.CDLL(str(_built(compiler, [*_FLAGS, *march])))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = reason or (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace")
    if reason:
        print(f"attention.cpp is not used, torch's attention is ({reason.strip().splitlines()[0]})", file=sys.stderr)
    return None


def _built(compiler: str, flags: list[str]) -> Path:
    """The library as made by `compiler`, found in the cache folder or made now."""
    key = [SOURCE.read_text(encoding="utf-8"), compiler, platform.machine(), torch.__version__, *flags]
    folder = cache_folder() / "native"
    file = folder / f"attention-{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:16]}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            made = Path(beside) / file.name
            subprocess.run([compiler, *flags, str(SOURCE), "-o", str(made)], check=True, capture_output=True)
            os.replace(made, file)
    return file


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    batch, heads, nodes, width = query.shape
    out = query.new_empty(batch, nodes, heads, value.shape[-1])
    sizes = [batch, heads, key.shape[1], nodes, key.shape[2], width, value.shape[-1]]
    strides = [*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], mask.stride(0), mask.stride(2)]
    places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (query, key, value, mask)]
    layout = (ctypes.c_int64 * 18)(*sizes, *strides)
    threads = ctypes.c_int(torch.get_num_threads())
    _loaded.attend_bfloat16(*places, ctypes.c_float(scale), ctypes.c_void_p(out.data_ptr()), layout, threads)
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
    here = _loaded is not None and query.device.type == "cpu" and not query.requires_grad
    numbers = query.dtype == key.dtype == value.dtype == torch.bfloat16 and mask.dtype == torch.bool
    shapes = mask.shape == (query.shape[0], 1, query.shape[2], key.shape[2]) and key.shape[:3] == value.shape[:3]
    dense = all(tensor.stride(-1) == 1 for tensor in (query, key, value, mask))
    fits = max(query.shape[-1], value.shape[-1]) <= MAX_WIDTH and query.shape[0] == key.shape[0]
    return here and numbers and shapes and dense and fits
