"""Draft models as ordinary folders that anything loads: what was left out is taken from the target, the LM head has
all rows of the vocabulary, and the tokenizer lies beside."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import GenerationConfig

from ...spec.quantise.folder import smallest_dtype
from ..complete import complete
from .export_check import check_draft_lm
from .export_order import Export, Order, weights_read

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def draft_lm_export(order: Order) -> Export:
    """Raises ValueError where the engine runs no draft models, or the draft does not fit the target."""
    assert order.folder is not None, "an ordinary model needs no export"
    title, known = order.engine.title, order.folder.config.get("known_tokens")
    if "draft_lm" not in order.engine.methods:
        what = "speculators' format has no draft models" if order.engine.name == "speculators" else f"{title} runs none"
        raise ValueError(f"{order.name} is a draft model, and {what}; export it --to vllm, sglang or transformers")
    model = complete(order.source, order.target)
    if (file := order.folder.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(file.parent)
    sizes = [lm.config.get_text_config().vocab_size for lm in (model, order.target)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{order.name} has a vocabulary of {sizes[0]} tokens and the target one of {sizes[1]}, and {title} wants "
            "them alike; decode it with Paceline, or train one for this target"
        )

    def write(folder: Path, tokens: int) -> None:
        stored = as_ordinary(model)
        stored.save_pretrained(folder)
        if order.tokenizer is not None:
            order.tokenizer.save_pretrained(folder)

    notes = []
    if known is not None:
        notes.append(
            f"The draft has learned {known} tokens and the engine lets it draft all {sizes[0]}, also those that it has "
            "not learned to avoid, which costs acceptance."
        )
    if order.tokenizer is None:
        notes.append("No tokenizer was given to lie beside it; copy the target's into the folder.")
    return Export("draft_lm", write, lambda folder: check_draft_lm(folder, model), weights_read(model), tuple(notes))


def as_ordinary(model: "PreTrainedModel") -> "PreTrainedModel":
    """`model` itself, in the smallest dtype that holds its numbers, its config without our keys."""
    for name in [name for name in vars(model.config) if name.startswith("paceline_") or name == "known_tokens"]:
        delattr(model.config, name)
    return model.to(smallest_dtype(model))
