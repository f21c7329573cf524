"""Drafters, one module per kind, and `load_drafter`, which makes one from a name, a path or a model.

A drafter implements the protocol in `paceline.spec.proposal` and knows nothing of verification.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .kinds import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..spec.proposal import Drafter
    from .draft_vocabulary import Tokenizers


def load_drafter(
    name_or_path: "str | Path | Drafter | PreTrainedModel",
    target: "PreTrainedModel",
    weights: str = "16",
    tokenizer: Any = None,
    draft_tokenizer: Any = None,
) -> "Drafter":
    """The drafter called `name_or_path` for the model `target`.

    "ngram" is prompt lookup, which needs no weights. "auto" is the best drafter that ships with the package for this
    target, with prompt lookup beside it, or ngram where none ships. `paceline drafters` lists the names of those that
    ship. "A+B" runs two drafters side by side. Anything else is a folder, a hub id or a short name: a drafter trained
    here, a published one (EAGLE, EAGLE-3, Medusa or MLPSpeculator, known by its tensors), or a causal LM, loaded in
    the target's dtype onto its device. A causal LM that is already loaded may be passed instead of a name, and a
    drafter is returned as it is.

    A causal LM may have another vocabulary than the target, or another tokenizer: it then drafts the tokens that both
    have. They are compared by `tokenizer`, the target's, and `draft_tokenizer`; each is taken from where its model was
    loaded from, if it is not given.

    `weights` are "16", dense ones; "q4" or "q4-int8", blocks of 4 bits: a GGUF file's or a quantised folder's own (or
    "q8"), and other weights rounded to the nearest; or "auto", the quickest of these here. The text stays the target's.

    torch's random generators are left as they were. Raises ValueError where the drafter cannot be found or loaded, or
    does not fit the target.
    """
    import torch

    from ..spec.arguments import check_model

    target = check_model(target, "target")
    weights = str(weights)
    if weights != "16":
        from .draft_weights import check_choice

        check_choice(weights)
    loaded = not isinstance(name_or_path, (str, Path))
    if loaded and weights not in ("16", "auto"):
        raise ValueError(f"weights={weights!r} is for a drafter that is loaded by name, and this one is loaded already")
    tokenizers = tokenizer, draft_tokenizer
    with torch.random.fork_rng([target.device] if target.device.type == "cuda" else []):  # new layers draw weights
        if loaded:
            return _around(name_or_path, target, tokenizers)
        return _named(str(name_or_path), target, weights, tokenizers)


def _named(name: str, target: "PreTrainedModel", weights: str, tokenizers: "Tokenizers") -> "Drafter":
    if name == "auto":
        return _best(target, weights)
    if name in KINDS and not KINDS[name].weights:
        return KINDS[name].drafter_class().load(name, None, target)
    first, plus, second = name.rpartition("+")
    if plus and not Path(name).exists():
        from .beside import Beside

        return Beside(*(_named(part, target, weights, tokenizers) for part in (first, second)))
    return _trained(name, target, weights, tokenizers)


def _around(model: Any, target: "PreTrainedModel", tokenizers: "Tokenizers") -> "Drafter":
    """`model` itself if it is a drafter; for a causal LM its `ModelDrafter`, the same object on every call."""
    import torch

    from ..spec.arguments import check_model
    from ..spec.proposal import check_drafter, is_drafter
    from .draft_model import ModelDrafter

    if is_drafter(model) or not isinstance(model, (torch.nn.Module, tuple, list)):
        return check_drafter(model)
    model = check_model(model, "drafter")
    if model is target:
        raise ValueError(
            f"drafter is a {type(model).__name__}, the target itself, whose drafts cost as much as the text; pass a "
            "smaller model or 'ngram'"
        )
    drafter = ModelDrafter.around(model, target, tokenizers)
    drafter.check_device(target.device)
    return drafter


def _best(target: "PreTrainedModel", weights: str) -> "Drafter":
    """The best drafter that ships for `target`, with prompt lookup beside it; ngram where none ships."""
    from .beside import Beside
    from .ngram import NgramDrafter
    from .shipped import best_shipped

    folder = best_shipped(target)
    if folder is None:
        return NgramDrafter()
    return Beside(_trained(folder, target, weights, (None, None)), NgramDrafter())


def _trained(name_or_path: str | Path, target: "PreTrainedModel", weights: str, tokenizers: "Tokenizers") -> "Drafter":
    """A drafter of ours, a published one, or a draft model, by shipped name, short name, folder or hub id."""
    from ..spec.target.load import NAMED
    from .folder import read_folder
    from .formats import published
    from .shipped import shipped_folder

    source = shipped_folder(name_or_path) or name_or_path
    folder = None if str(source) in NAMED else read_folder(source)
    others = None if folder or str(source) in NAMED else published(source, target)
    load: Callable[[], Drafter]
    if folder is not None:
        folder.check_target(target)
        load = partial(KINDS[folder.kind].drafter_class().load, source, folder, target)
    elif others is not None:
        load = others.load
    else:
        from .draft_model import ModelDrafter

        load = partial(ModelDrafter.load, source, None, target, tokenizers)
    if weights == "16":
        return load()
    from .draft_weights import made, quickest
    from .kept import state_of

    make = partial(made, load, source, folder, target, tokenizers)
    described = str(source), state_of(str(source), target)
    return quickest(make, described, target) if weights == "auto" else make(weights)
