"""Drafters, one file per family, and `load_drafter`, which finds one by name.

They know the decode core's protocol (`paceline.spec.proposal`) and nothing of verification.
"""

from pathlib import Path


def load_drafter(name_or_path: str | Path, target):
    """The drafter called `name_or_path` for the model `target`.

    "ngram" is prompt lookup, which needs no weights; anything else is a named model, a folder or a hub
    id of a causal LM with the target's vocabulary, loaded in the target's dtype onto its device. Raises
    ValueError where it cannot be found, loaded or does not fit the target.
    """
    if str(name_or_path) == "ngram":
        from .ngram import NgramDrafter

        return NgramDrafter()
    from ..spec.models import load_target
    from .draft_model import ModelDrafter

    model, _ = load_target(name_or_path, dtype=target.dtype, with_tokenizer=False)
    drafter = ModelDrafter(model.to(target.device), name=Path(str(name_or_path)).name)
    vocab = target.config.get_text_config().vocab_size
    if drafter.vocab_size != vocab:
        raise ValueError(
            f"drafter {name_or_path} has a vocabulary of {drafter.vocab_size} tokens and the target one of {vocab}; "
            "use a drafter made for this target's tokenizer"
        )
    return drafter
