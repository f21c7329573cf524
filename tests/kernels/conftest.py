"""Our own code, compiled."""

import shutil

import pytest
from paceline.spec.kernels import cpu, native


@pytest.fixture(scope="module")
def compiled_source():
    native.prepare()
    if not (shutil.which("g++") or shutil.which("clang++")) or cpu.level() == "none":
        pytest.skip("no C++ compiler, or a CPU that our own code is not for")
    assert native._loaded is not None, "the source compiles"
