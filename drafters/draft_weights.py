"""Which weights a drafter computes with: dense ones, blocks of 4 bits, or the quicker of these here.

A file's or folder's own blocks are kept, and other weights are rounded. `auto` is decided by timing a step with each,
once for a drafter, target and device, and kept in the cache folder. Knows no kind of drafter but draft models.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..spec.files import cache_folder, write_json
from ..spec.plan.step_times import alone, open_idle
from ..spec.proposal import Drafter
from ..spec.quantise.folder import is_quantised
from ..spec.target.load import NAMED, load_target
from ..spec.target.weights import CHOICES, Weights, block_layers, weights_form
from ..spec.tree import TreeShape
from .draft_model import ModelDrafter
from .draft_vocabulary import Tokenizers, fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .folder import DrafterFolder

GAIN = 0.02  # of a step: weights in blocks that gain less are not chosen by "auto"
MOST = 256  # choices of "auto" that are kept


def check_choice(name: str) -> None:
    """Raise ValueError for weights that a drafter cannot have."""
    if name not in (*CHOICES, "auto"):
        raise ValueError(
            f"weights={name!r} of a drafter is none of auto, {', '.join(CHOICES)}; 16 are its dense weights"
        )


def made(
    load: Callable[[], Drafter],
    source: str | Path,
    folder: "DrafterFolder | None",
    target: "PreTrainedModel",
    tokenizers: Tokenizers,
    name: str,
) -> Drafter:
    """The drafter with weights `name`: in the blocks of its `source`, or what `load` gives, rounded to the nearest."""
    if name == "16":
        return load()
    if folder is None and (drafter := own_blocks(source, target, tokenizers, name)) is not None:
        return drafter
    if Weights(name).bits == 8:
        raise ValueError(
            f"weights={name!r}: {source} holds no weights in blocks, and is rounded to 4 bits only; ask for q4"
        )
    return rounded(load(), name)


def own_blocks(source: str | Path, target: "PreTrainedModel", tokenizers: Tokenizers, weights: str) -> Drafter | None:
    """The draft model of a GGUF file or quantised folder, in its own blocks; None for a source without blocks."""
    if not (str(source) in NAMED or str(source).lower().endswith(".gguf") or is_quantised(source)):
        return None
    model, _ = load_target(
        source, target.dtype, target.device, with_tokenizer=False, weights=weights.removesuffix("-int8")
    )
    name = Path(str(source)).name
    shared = fit(model, name, target, tokenizers, fetch=True)
    drafter = ModelDrafter(model, f"{name} in {weights}", shared=shared)
    if Weights(weights).int8_activations:  # after the model's self-test, which looks for errors larger than theirs
        for layer in block_layers(drafter.model).values():
            layer.round_activations()
    return drafter


def rounded(drafter: Drafter, weights: str) -> Drafter:
    """`drafter` after its weights have been rounded. Raises ValueError for a kind that has no way to do that."""
    put = getattr(drafter, "put_in_blocks", None)
    if put is None:
        raise ValueError(
            f"drafter {drafter.name!r} cannot have weights={weights!r}, as its kind only computes with dense ones; "
            "load it with weights='16'"
        )
    put(Weights(weights))
    return drafter


def quickest(make: Callable[[str], Drafter], described: object, target: "PreTrainedModel") -> Drafter:
    """Of the drafters that `make` gives for each kind of weights, the one with the shortest eager step; dense weights
    where blocks gain next to nothing. The choice for a drafter, `described`, is kept for this target and device.

    `make` raises ValueError for the weights that a drafter cannot have."""
    key, kept = _key(described, target), _choices()
    if kept.get(key) in CHOICES:
        return make(kept[key])
    chosen, best = "16", make("16")
    least = _seconds(target, best) * (1 - GAIN)
    for name in CHOICES[1:]:
        try:
            drafter = make(name)
        except ValueError:
            continue
        if (seconds := _seconds(target, drafter)) < least:
            chosen, best, least = name, drafter, seconds
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_json(_path(), dict([*kept.items(), (key, chosen)][-MOST:]))
    except OSError:
        pass  # it is decided again the next time
    return best


def _seconds(target: "PreTrainedModel", drafter: Drafter) -> float:
    """Seconds of an eager step with a chain as deep as the drafter's planned trees."""
    runner = open_idle(target, "eager", drafter, TreeShape.chain(drafter.traits.deepest))
    return min(alone(target, runner) for _ in range(2))


def _key(described: object, target: "PreTrainedModel") -> str:
    cuda = target.device.type == "cuda"
    device = torch.cuda.get_device_name(target.device) if cuda else f"cpu, {torch.get_num_threads()} threads"
    known = [repr(described), weights_form(target), target.config.to_json_string(), device, torch.__version__]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def _path() -> Path:
    return cache_folder() / "draft_weights.json"


def _choices() -> dict[str, str]:
    try:
        stored = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # nothing is stored, or the file is damaged
        return {}
    return stored if isinstance(stored, dict) else {}
