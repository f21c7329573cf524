"""Our own code, compiled."""

import shutil

import pytest
import torch
from paceline.spec.kernels import native

CAPABILITY = torch.backends.cpu.get_cpu_capability()


@pytest.fixture(scope="module")
def compiled_source():
    native.prepare()
    if not (shutil.which("g++") or shutil.which("clang++")) or not native._MARCH.get(CAPABILITY):
        pytest.skip("no C++ compiler, or a CPU that our own attention is not for")
    assert native._loaded is not None, "the source compiles"
