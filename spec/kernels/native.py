"""Attention (attention.cpp) and linear layers (linears.cpp) in C++ as operators, where there is a compiler.

`prepare` compiles the sources, which takes some seconds, and keeps the library in the cache folder under a hash of the
sources, the flags and the torch version. Loading it registers the operators' implementations (operators.cpp). The
environment variable PACELINE_CPU names a lesser level of the processor to compile for ("none": nothing). Knows nothing
of models.
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

from ..console import waiting
from ..files import cache_folder
from .cpu import LEVELS, SWITCH, level
from .panels import Format

SOURCES = sorted(path for suffix in ("*.h", "*.cpp") for path in Path(__file__).parent.glob(suffix))
MAX_WIDTH = 512  # as in attention.cpp
_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-w"]
_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
_TORCH = Path(torch.__file__).parent

_loaded: ctypes.CDLL | None = None


def prepare() -> bool:
    """Compile and load the operators; returns whether they can be used here. To be called before anything is traced."""
    global _loaded
    _loaded = _library_file()
    return _loaded is not None


@functools.cache
def _library_file() -> ctypes.CDLL | None:
    """The compiled library; None where it cannot be made, with a line on stderr unless there simply is no compiler."""
    march = LEVELS[level()]
    compilers = [path for name in (os.environ.get("CXX", "g++"), "clang++") if (path := shutil.which(name))]
    reason = None if compilers or not march else "there is no C++ compiler"
    if not march and SWITCH not in os.environ:
        reason = f"they are not written for {platform.machine()} processors of this kind"
    for compiler in compilers if march else ():
        try:
            return _built(compiler, [*_FLAGS, *march])
        except (OSError, subprocess.CalledProcessError) as error:
            reason = reason or (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace")
    if reason:
        lines = reason.strip().splitlines()
        said = next((line for line in lines if "error" in line), lines[0])
        print(f"our own kernels are not used, torch's are ({said})", file=sys.stderr)
    return None


def _built(compiler: str, flags: list[str]) -> ctypes.CDLL:
    """The library, compiled now if its file is not in the cache folder. Where that cannot be written, with a line on
    stderr, the file lasts until it is loaded."""
    sources = [source.read_text(encoding="utf-8") for source in SOURCES]
    key = chr(0).join([*sources, compiler, platform.machine(), torch.__version__, *flags])
    file = cache_folder() / "native" / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if file.exists():
        return ctypes.CDLL(str(file))
    kept: Path | None = file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=file.parent)
    except OSError as error:
        said = f"because {file.parent} cannot be written ({error.strerror}); set PACELINE_CACHE to another folder"
        print(f"our own kernels are compiled anew each time, {said}", file=sys.stderr)
        folder, kept = tempfile.TemporaryDirectory(), None
    with folder as beside, waiting("compiling our own kernels, once"):
        made = Path(beside) / "kernels.so"
        _compile(compiler, flags, made)
        if kept is not None:
            os.replace(made, kept)
        return ctypes.CDLL(str(kept or made))


def _compile(compiler: str, flags: list[str], library: Path) -> None:
    """Compile the sources, at the same time, and link them. Raises CalledProcessError."""
    units = [source for source in SOURCES if source.suffix == ".cpp"]
    objects = [library.with_name(f"{unit.stem}.o") for unit in units]
    include = ["-I", str(_TORCH / "include")]
    commands = [[compiler, *flags, *include, "-c", str(unit), "-o", str(to)] for unit, to in zip(units, objects)]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for command in commands]
    said = [process.communicate()[1] for process in running]
    for process, command, stderr in zip(running, commands, said):
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, stderr=stderr)
    link = [compiler, *flags, "-shared", *map(str, objects), "-L", str(_TORCH / "lib"), "-ltorch_cpu"]
    subprocess.run([*link, "-o", str(library)], check=True, capture_output=True)


def ready() -> bool:
    """Whether the operators are loaded; may be asked in code that is traced."""
    return _loaded is not None


def panel_width() -> int:
    """The outputs of a panel of packed weights."""
    assert _loaded is not None, "prepare() comes first"
    return _loaded.panel_outputs()


_library = torch.library.Library("paceline", "FRAGMENT")
_library.define("linears(Tensor x, Tensor[] packed, int[] outputs, int[] format) -> Tensor[]")
_library.define("rotate(Tensor x, Tensor signs, int block, float scale) -> Tensor")
_library.define("slot_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor")


@torch.library.register_fake("paceline::slot_attention", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    batch, heads, nodes, _ = query.shape
    return query.new_empty(batch, nodes, heads, value.shape[-1])


@torch.library.register_fake("paceline::linears", lib=_library)
def _(x: Tensor, packed: list[Tensor], outputs: list[int], format: list[int]) -> list[Tensor]:
    """Also checks the arguments, once per trace instead of in every step."""
    form, width, inputs = Format(*format), panel_width(), x.shape[-1]
    for weight, count in zip(packed, outputs, strict=True):
        size = (inputs + 1) * width * 4 if weight.dtype == torch.float32 else form.panel_bytes(inputs, width)
        assert len(weight) == -(-count // width) and weight[:1].nbytes == size, "what was packed is another layer"
        assert x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and weight.dtype != torch.float32)
        assert weight.is_contiguous()
    return [x.new_empty(*x.shape[:-1], count) for count in outputs]


@torch.library.register_fake("paceline::rotate", lib=_library)
def _(x: Tensor, signs: Tensor, block: int, scale: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


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
