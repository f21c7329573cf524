"""The abilities of this CPU, as torch reports them."""

import os

import torch

_WIDE = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
LEVELS = {  # the compiler's flags for each level, the best first
    "avx512_bf16": [*_WIDE, "-mavx512vnni", "-mavx512bf16"],
    "avx512_vnni": [*_WIDE, "-mavx512vnni"],
    "avx512": _WIDE,
    "avx2": ["-march=x86-64-v3"],
    "none": [],
}
SWITCH = "PACELINE_CPU"  # the environment variable that names a lesser level


def level() -> str:
    """The level in `LEVELS` that our kernels are compiled for. Raises ValueError where `SWITCH` names one that there is
    not, or not here."""
    able = {"avx512": "AVX512" in torch.backends.cpu.get_cpu_capability(), "none": True}
    able["avx2"] = able["avx512"] or torch.backends.cpu.get_cpu_capability() == "AVX2"
    able["avx512_vnni"] = able["avx512"] and torch.cpu._is_vnni_supported()
    able["avx512_bf16"] = able["avx512_vnni"] and torch.cpu._is_avx512_bf16_supported()
    here = [name for name in LEVELS if able[name]]
    asked = os.environ.get(SWITCH) or here[0]
    if asked not in here:
        raise ValueError(f"{SWITCH}={asked!r} is no level of this processor; use one of {', '.join(here)}")
    return asked


def is_x86() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def has_bfloat16() -> bool:
    """Whether oneDNN supports bfloat16 on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether `device` is a CPU that emulates bfloat16, which makes large products several times slower."""
    return device.type == "cpu" and is_x86() and not torch.cpu._is_avx512_bf16_supported()


def computed_in(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a model which is `stored` in one computes in on `device`: float32 for a bfloat16 that is only
    emulated there."""
    return torch.float32 if stored == torch.bfloat16 and emulates_bfloat16(device) else stored
