"""What compiling steps has cost and gained on this machine, kept in the cache folder, to foretell the next time.

Seconds are kept by the models of a step (their configurations, dtypes and kinds of weights), its batch and capacity,
and the version of torch; the tree matters less. Knows nothing of how steps are compiled.
"""

import hashlib
import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..files import cache_folder, write_json
from ..target.weights import weights_form

MOST = 256  # steps whose times are kept
FIRST, EACH = 8.0, 4.0  # seconds of compiling, and more for each kind of layer, where nothing is known
GAIN = 0.4  # share of a step that compiling saves, where nothing is known


def step_key(models: Iterable[nn.Module], batch: int, capacity: int) -> str:
    """What a step's times are kept by; single layers do not count."""
    whole = [model for model in models if isinstance(model, PreTrainedModel)]
    described = [
        f"{type(model)} {model.dtype} {weights_form(model)} {model.config.to_json_string()}" for model in whole
    ]
    key = [described, batch, capacity, torch.__version__, torch.get_num_threads()]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _path() -> Path:
    return cache_folder() / "compile_times.json"


def _all() -> dict[str, dict[str, float]]:
    try:
        stored = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # nothing is stored, or the file is damaged
        return {}
    entries = stored.items() if isinstance(stored, dict) else ()
    return {key: times for key, times in entries if isinstance(times, dict)}


def keep(key: str, **seconds: float) -> None:
    """Keep `compile` (with its number of layer `kinds`), `eager` or `compiled` seconds of a step, if the cache folder
    can be written."""
    stored = _all()
    stored[key] = {**stored.pop(key, {}), **seconds}  # the latest last
    try:
        os.makedirs(cache_folder(), exist_ok=True)
        write_json(_path(), dict(list(stored.items())[-MOST:]))
    except OSError:
        pass


def expected_compile(key: str, kinds: int) -> float:
    """Seconds that compiling will take: as the last time, or by the number of distinct layers."""
    stored = _all()
    if "compile" in stored.get(key, {}):
        return stored[key]["compile"]
    guess = FIRST + EACH * kinds
    known = [times for times in stored.values() if "compile" in times]
    past = [times["compile"] / (FIRST + EACH * times.get("kinds", 1)) for times in known]
    return guess * statistics.median(past) if past else guess


def patience(key: str, kinds: int = 1) -> float:
    """Seconds of eager steps after which a run compiles: when what they lost equals what compiling costs, so that a
    text that ends at once and a long one both cost at most twice the least. Infinite where compiling saves nothing."""
    times = _all().get(key, {})
    gain = 1 - times["compiled"] / times["eager"] if {"compiled", "eager"} <= set(times) else GAIN
    return expected_compile(key, kinds) / gain if gain > 0 else float("inf")


def paying_tokens(key: str) -> float | None:
    """New tokens of a call from which compiling may pay; None where the times of this step are not known."""
    times = _all().get(key, {})
    if not {"compile", "compiled", "eager"} <= set(times):
        return None
    saved = times["eager"] - times["compiled"]
    return 2 * times["compile"] / saved if saved > 0 else float("inf")  # twice, because texts end early
