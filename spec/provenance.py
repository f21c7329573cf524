"""The circumstances of a measurement: machine, versions, commit, command. Knows nothing of what is measured."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import __version__
from .target.adapters import adapter_digest
from .target.taps import linear_head
from .target.weights import embedding_rows, head_rows, linear_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ESSENTIALS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def machine() -> dict:
    """The processor, the cores that this process may use, memory and accelerator."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": f"{platform.system()} {platform.machine()}", "cpu": _processor(), "cores": cores, "gpu": gpu}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def versions() -> dict:
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"paceline": __version__, "python": platform.python_version(), **packages}


def command() -> str:
    """The command line as it could be typed again."""
    return shlex.join(["paceline", *sys.argv[1:]])


def git_commit() -> str | None:
    """The commit of a checkout of this package, marked where files were changed; None where it is installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def target_fingerprint(model: "PreTrainedModel") -> str:
    """A SHA-256 by which drafters and runs recognise their target: of its main sizes and a few rows of its embeddings,
    its LM head and the adapters that act in it, rounded to bfloat16 so that the model has one fingerprint in float32
    and bfloat16."""
    config = model.config.get_text_config()
    digest = hashlib.sha256(json.dumps([getattr(config, name, None) for name in _ESSENTIALS]).encode())
    sampled = [(len(model.get_input_embeddings().weight), partial(embedding_rows, model))]
    with suppress(ValueError):  # a few have no linear LM head
        sampled.append((linear_shape(linear_head(model))[0], partial(head_rows, model)))
    for count, rows_of in sampled:
        rows = torch.linspace(0, count - 1, 8).long().to(model.device)
        sample = rows_of(rows).float().to(torch.bfloat16).cpu()
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(adapter_digest(model))
    return digest.hexdigest()
