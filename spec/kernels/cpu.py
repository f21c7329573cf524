"""The abilities of this CPU, as torch reports them."""

import torch


def is_x86() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def has_bfloat16() -> bool:
    """Whether oneDNN supports bfloat16 on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether `device` is a CPU that emulates bfloat16, which makes large products several times slower."""
    return device.type == "cpu" and is_x86() and not torch.cpu._is_avx512_bf16_supported()
