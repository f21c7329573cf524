"""What is asked of an export, and what a kind of drafter answers. Knows no kind and no engine in particular."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...spec.target.weights import parameter_count
from ..folder import DrafterFolder
from .engines import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Order:
    """What is asked for. `name` is the drafter's as the user gave it, `source` where it is loaded from, `folder` what
    is there (None where Paceline did not train it). `target_name` is what the engine will call the target, and
    `tokenizer` the target's."""

    name: str
    source: str
    folder: DrafterFolder | None
    target: "PreTrainedModel"
    target_name: str
    tokenizer: Any
    engine: Engine


@dataclass(frozen=True)
class Export:
    """A drafter in an engine's form. `write` puts its files into a folder, for so many draft tokens; `check` reads
    them again and raises ValueError where they do not give the same logits."""

    method: str  # the kind of draft by which the engine is started
    write: Callable[[Path, int], None]
    check: Callable[[Path], None]
    weights: int  # numbers that are read for a draft token
    notes: tuple[str, ...] = ()
    deepest: int | None = None  # draft tokens at most


def weights_read(model: "PreTrainedModel") -> int:
    """Numbers of a model's weights that are read for a token: all but the embeddings, unless they are the LM head, and
    of experts those that a token goes to."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(head, "weight", None) is embeddings.weight
    config = model.config.get_text_config()
    counts = [getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")]
    idle, count = 0.0, next((count for count in counts if count), None)
    if count:
        experts = sum(part.numel() for name, part in model.named_parameters() if ".experts." in name)
        idle = experts * (1 - min(getattr(config, "num_experts_per_tok", None) or count, count) / count)
    return round(parameter_count(model) - idle) - (0 if tied else embeddings.weight.numel())
