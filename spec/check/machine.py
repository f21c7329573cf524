"""The first part of a check: facts about the machine, its memory bandwidth and the speed of matrix products."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata

import psutil
import torch

from .. import provenance
from ..plan.step_times import wait_for
from .budget import NotHere, Task, single
from .record import Finding
from .subject import Subject


def machine_tasks(subject: Subject) -> Iterator[Task]:
    """The tasks: facts first, then the two measurements."""
    facts = {
        "processor": lambda: f"{provenance.machine()['cpu']}, {provenance.machine()['cores']} cores",
        "processor features": _features,
        "memory": lambda: f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "accelerator": lambda: _accelerator(subject.device),
        "torch": lambda: f"{torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda}",
        "transformers": lambda: metadata.version("transformers"),
        "triton": _triton,
        "compiler": _compiler,
    }
    for name, read in facts.items():
        yield Task({"figure": name}, single(_fact, name, read))
    yield Task({"figure": "memory read"}, single(_bandwidth, subject))
    yield Task({"figure": f"matrix product in {subject.dtype_name}"}, single(_matmul, subject))


def _fact(name: str, read: Callable[[], str]) -> Finding:
    return Finding({"figure": name}, figures={"value": read()})


def _features() -> str:
    known = {
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported, "VNNI": torch.cpu._is_vnni_supported,
        "AMX": torch.cpu._is_amx_tile_supported,
    }  # fmt: skip
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *(name for name, has in known.items() if has())])


def _accelerator(device: torch.device) -> str:
    if device.type != "cuda":
        raise NotHere("the check runs on the CPU; give --device cuda where there is a GPU")
    about = torch.cuda.get_device_properties(device)
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().partition("\n")[0]
    capability = f"{about.major}.{about.minor}"
    return f"{about.name}, {about.total_memory / 1e9:.0f} GB, compute capability {capability}, driver {driver}"


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        raise NotHere("it comes with CUDA builds of torch") from None


def _compiler() -> str:
    name = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if name is None:
        raise NotHere("neither g++ nor clang++ is installed, so torch's own kernels run and nothing is compiled")
    first = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=20).stdout.partition("\n")[0]
    return re.sub(r"\s+", " ", first)


def _bandwidth(subject: Subject) -> Finding:
    """Bandwidth of reading a buffer much larger than the caches, as a decoding step reads weights."""
    wanted = (1 << 31) if subject.device.type == "cuda" else (1 << 29)
    numbers = torch.ones(min(wanted, subject.free_bytes // 8) // 4, device=subject.device)
    seconds = _least_seconds(subject, lambda: numbers.sum())
    subject.bandwidth = numbers.nbytes / seconds
    return Finding({"figure": "memory read"}, figures={"bytes_per_second": subject.bandwidth})


def _matmul(subject: Subject) -> Finding:
    size = 8192 if subject.device.type == "cuda" else 1024
    matrix = torch.ones(size, size, device=subject.device, dtype=subject.dtype)
    seconds = _least_seconds(subject, lambda: matrix @ matrix)
    labels = {"figure": f"matrix product in {subject.dtype_name}"}
    return Finding(labels, figures={"flops": 2 * size**3 / seconds})


def _least_seconds(subject: Subject, work: Callable[[], object], repeats: int = 7) -> float:
    """The least of a few durations, which other load on the machine affects least."""
    seconds = []
    for _ in range(repeats):
        wait_for(subject.model)
        started = time.perf_counter()
        work()
        wait_for(subject.model)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
