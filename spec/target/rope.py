"""Rotary embeddings whose frequencies change with the length of the text: dynamic NTK and LongRoPE.

In transformers' loop a forward rotates its tokens by the frequencies for the longest text of its batch, and keys that
are cached stay as they were. So what a token is rotated by depends on the length at which it was read: that of the
prompt, or its own. In a slot forward these embeddings follow the lengths of the view, for each token by itself, as a
freshly loaded model would (in transformers' own, dynamic frequencies also depend on earlier calls). All other forwards
are transformers' own. Knows nothing of caches.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .given import cache_name
from .masks import active_view

CHANGING = ("dynamic", "longrope")


class _StandIn:
    """What the forward of a rotary embedding reads of its module, with other frequencies."""

    def __init__(self, rotary: nn.Module, **others: Any):
        self.rotary = rotary
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rotary, name)


def is_rotary(model: PreTrainedModel) -> bool:
    """Whether positions have no end: rotary embeddings compute them, where others look them up in a table."""
    return any(hasattr(module, "rope_type") for module in model.modules())


def changes_at(model: PreTrainedModel) -> int | None:
    """The longest text before the rotary embeddings of `model` change with its length; None where they never do."""
    lengths = [_length(rotary, layer_type) for rotary in model.modules() for layer_type in _changing(rotary)]
    return min(lengths, default=None)


def follows(model: PreTrainedModel, begun: int, length: int, depth: int) -> bool:
    """Whether a text whose prompt has `begun` tokens can be decoded up to `length`, with trees of `depth`, like by
    transformers. Some models rotate a whole forward by its longest text (PhiMoE), or read a text anew that crosses the
    change (Phi-3)."""
    change = changes_at(model)
    if change is None or length + depth <= change:
        return True
    if not all(_takes_frequencies(rotary) for rotary in model.modules() if _changing(rotary)):
        return False
    if length <= change or begun > change:
        return True
    ids, cache = torch.zeros(1, change + 1, dtype=torch.int64, device=model.device), DynamicCache(config=model.config)
    prepared = model.prepare_inputs_for_generation(ids, **{cache_name(): cache}, next_sequence_length=1)
    return any(value is cache for value in prepared.values())


def read_alike(model: PreTrainedModel, begun: int, beside: int, length: int) -> str | None:
    """How a text of `length` tokens whose prompt had `begun` of them was rotated, beside a prompt `beside` tokens
    longer. Equal beginnings of texts that were rotated alike are kept alike; None: like no other."""
    change = changes_at(model)
    if change is None or length + beside <= change:
        return "short"
    kinds = {kind for rotary in model.modules() for kind in _changing(rotary).values()}
    return "long" if begun + beside > change and kinds == {"longrope"} else None


def install(model: PreTrainedModel) -> bool:
    """Let the rotary embeddings of `model` that change follow slot views; whether there are any. Calling it again has
    no effect."""
    rotaries = [rotary for rotary in model.modules() if _changing(rotary) and _takes_frequencies(rotary)]
    for rotary in rotaries:
        present = getattr(vars(rotary).get("forward"), "__func__", None)
        if present in (None, type(rotary).forward):  # as in unpickled copies
            rotary.forward = MethodType(forward, rotary)
    return bool(rotaries)


def is_followed(value: object) -> bool:
    """Whether an attribute of a module is the forward that `install` gives it."""
    return getattr(value, "__func__", None) is forward


def forward(rotary: nn.Module, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of a rotary embedding, by the lengths of the active view. Named so that unpickled copies find that of
    their class."""
    view, stock = active_view(), type(rotary).forward
    layer_type = kwargs.get("layer_type", args[0] if args else None)
    if view is None or view.lengths is None or layer_type not in _changing(rotary):
        return stock(rotary, x, position_ids, *args, **kwargs)
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    others: dict[str, Any] = {name: _frequencies(rotary, layer_type, view.lengths[..., None])}
    return stock.__wrapped__(_StandIn(rotary, **others), x, position_ids, *args, **kwargs)  # type: ignore[attr-defined]


def _frequencies(rotary: Any, layer_type: str | None, lengths: Tensor) -> Tensor:
    """The inverse frequencies (B, n, D/2) of tokens that are read at `lengths` (B, n, 1)."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    kind = _changing(rotary)[layer_type]
    longest, usual = _length(rotary, layer_type), getattr(rotary, f"{prefix}original_inv_freq").to(lengths.device)
    if kind == "longrope":  # two sets; transformers keeps the other one where it has computed it
        if getattr(rotary, f"{prefix}long_inv_freq", None) is None:
            made = ROPE_INIT_FUNCTIONS[kind](rotary.config, lengths.device, seq_len=longest + 1, layer_type=layer_type)
            setattr(rotary, f"{prefix}long_inv_freq", made[0])
        changed = getattr(rotary, f"{prefix}long_inv_freq").to(lengths.device)
    else:
        changed, _ = ROPE_INIT_FUNCTIONS[kind](rotary.config, lengths.device, seq_len=lengths, layer_type=layer_type)
    return torch.where(lengths > longest, changed, usual)


def _changing(rotary: nn.Module) -> dict[str | None, str]:
    """The kind of frequencies by layer type (None: of all layers), where they change; empty for other modules."""
    kinds = getattr(rotary, "rope_type", None)
    named = kinds if isinstance(kinds, dict) else {None: kinds}
    return {layer_type: kind for layer_type, kind in named.items() if kind in CHANGING}


def _length(rotary: Any, layer_type: str | None) -> int:
    settings = rotary.config.rope_parameters
    settings = settings if layer_type is None else settings[layer_type]
    longrope = _changing(rotary)[layer_type] == "longrope"
    return settings["original_max_position_embeddings"] if longrope else rotary.original_max_seq_len


def _takes_frequencies(rotary: nn.Module) -> bool:
    """Whether the embedding's own forward, without what changes frequencies, multiplies positions by those of its
    module: an experiment, since a few compute them in another way."""
    raw = getattr(type(rotary).forward, "__wrapped__", None)
    if raw is None:
        return False
    for layer_type in _changing(rotary):
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        given = () if layer_type is None else (layer_type,)
        usual: Tensor = getattr(rotary, name)
        positions = torch.arange(3, device=usual.device)[None]
        each = usual.expand(1, 3, -1)  # of every token
        x = torch.zeros(1, device=usual.device)
        stock, same, doubled = (
            raw(_StandIn(rotary, **{name: part}), x, positions, *given)[0] for part in (usual, each, 2 * each)
        )
        if not torch.equal(stock, same) or torch.equal(stock, doubled):
            return False
    return True
