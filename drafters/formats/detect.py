"""Which published format a drafter has, by the names of its tensors. Knows no values, and reads no file."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from .eagle_names import without_prefix

HEADS = ("medusa_head.", "medusa_heads.")  # before heads that lie in one file with a whole model
# Formats that are known and not read, with what they are.
UNREAD = {
    "PARD": "a draft model that guesses several tokens at mask tokens at once",
    "DFlash2": "a block drafter with a selector of candidates",
    "DSpark": "a block drafter with a Markov head",
    "XPress": "a drafter that mixes the target's layers",
    "DFlash": "a drafter of whole blocks by masked tokens",
    "P-EAGLE": "an EAGLE-3 head that guesses several tokens at mask tokens at once",
    "Hydra": "a pickled family with a layer before its heads and path matrices of each",
    "MTP": "a target's own layers for several tokens, which lie in its files",
}
_SPECULATORS = {
    "eagle": "EAGLE", "eagle3": "EAGLE", "peagle": "P-EAGLE", "dflash": "DFlash", "dflash2": "DFlash2",
    "dspark": "DSpark", "mtp": "MTP", "xpress": "XPress", "mlp_speculator": "MLPSpeculator",
}  # fmt: skip

Test = Callable[[set[str]], bool]


def _any(pattern: str) -> Test:
    return lambda names: any(re.match(pattern, name) for name in names)


def _all(*wanted: str) -> Test:
    return lambda names: names.issuperset(wanted)


# In this order: the tensors of a format may be among those of a later one.
_TESTS: dict[str, Test] = {
    "DFlash2": _any(r"candidate_selector\."),
    "DSpark": _any(r"markov_head\."),
    "XPress": lambda names: _any(r".*\.mix_l$")(names) and _any("readout")(names),
    "DFlash": _all("hidden_norm.weight", "fc.weight"),
    "P-EAGLE": _all("mask_hidden"),
    "EAGLE": _any(r"midlayer\.|layers\.0\.hidden_norm\.weight|fc\.weight|fusion_fc\.weight"),
    "Medusa": _any(r"\d+\.\d+\.linear\.weight|blocks\.\d+\.layers\.\d+"),
    "Hydra": _any(r"hydra_mlp\."),
    "MLPSpeculator": _all("emb.0.weight", "proj.0.weight", "head.0.weight", "ln.0.weight"),
    "MTP": _any(r"mtp\.|mtp_layers\.|layers\.\d+\.eh_proj\.weight"),
}


def detect(config: dict[str, Any], names: Iterable[str], of_target: bool = False) -> str | None:
    """The format: "EAGLE", "Medusa", "MLPSpeculator", or one of `UNREAD`; None for an ordinary model, and for anything
    else. A whole model with layers for several tokens is one, unless it is the target itself (`of_target`).

    Raises ValueError for a type of speculators that is not known."""
    kind = config.get("speculators_model_type")
    if kind is not None:
        if not isinstance(kind, str) or kind not in _SPECULATORS:
            raise ValueError(f"speculators_model_type={kind!r} is not among {', '.join(_SPECULATORS)}; take another")
        return _SPECULATORS[kind]
    names = set(names)
    heads = {name[len(prefix) :] for name in names for prefix in HEADS if name.startswith(prefix)}
    inside = heads or {without_prefix(name) for name in names}
    whole_model = {
        "embed_tokens.weight",
        "layers.0.input_layernorm.weight",
        "layers.1.input_layernorm.weight",
    } <= inside
    if whole_model and ("pard_token" in config or "ptd_token_id" in config):
        return "PARD"
    form = next((form for form, test in _TESTS.items() if test(inside)), None)
    return None if form == "MTP" and whole_model and not of_target else form
