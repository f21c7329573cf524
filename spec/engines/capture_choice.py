"""Which of the two captured steps is better on this GPU, as `paceline check` has found; kept in the cache folder.

Capturing the compiled step pays only where Triton's kernels are right and faster. Until a check on this GPU, with this
version of torch, has shown both, the captured eager step is used. Knows nothing of steps.
"""

import hashlib
import json
from pathlib import Path

import torch

from ..files import cache_folder


def verdict_path(device: torch.device) -> Path:
    """The file of the verdict on this GPU with this torch."""
    key = f"{torch.cuda.get_device_name(device)} torch {torch.__version__}"
    return cache_folder() / "captures" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def keep_verdict(device: torch.device, compiled_is_better: bool) -> None:
    """Store the result of a check. Raises ValueError where the cache cannot be written."""
    path = verdict_path(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"compiled_is_better": compiled_is_better}) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); set PACELINE_CACHE to a folder that can"
        ) from error


def compiled_capture_is_better(device: torch.device) -> bool:
    """Whether a check has shown the captured compiled step to be right and faster on this GPU."""
    try:
        verdict = json.loads(verdict_path(device).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no verdict is stored, or its file is damaged
        return False
    return isinstance(verdict, dict) and verdict.get("compiled_is_better") is True
