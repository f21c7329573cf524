"""The names of tensors in published EAGLE files, and those of `EagleNetwork.state_dict()`: one table, read both ways.

Files differ in spelling only, but for the draft vocabulary: they keep offsets, the network keeps token ids. Knows no
values of weights, and no configuration.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from ..known_tokens import places

PREFIXES = ("model.", "speculator.", "draft_model.", "module.", "_orig_mod.")  # of whole files, without a meaning
OFFSETS, KNOWN = "d2t", "t2d"  # (V',) int64: token id less index; (V,) bool: whether a token is known
# Beginnings of names: published, and in the network. `fc` maps the features alone in EAGLE-3, whose layers are wide,
# and embedding and feature in EAGLE-1 and 2.
_TABLE = {
    "layers.": "layers.",
    "norm.": "norm.",
    "lm_head.": "lm_head.",
    "embed_tokens.weight": "embeddings",
    "fc_norm.": "tap_norms.",  # EAGLE-3.1
    "input_norm.": "fuse_norm.",
    OFFSETS: "vocabulary",
}
# Other spellings, which are read and not written.
_READ = {
    "midlayer.": "layers.0.",  # EAGLE-3's reference
    "aux_norm_low.": "tap_norms.0.",  # before EAGLE-3.1
    "aux_norm_mid.": "tap_norms.1.",
    "aux_norm_high.": "tap_norms.2.",
    "fusion_fc.": "join.",  # speculators' EAGLE-1
    "transformer.": "layers.0.",
    "embedding_layernorm.": "embedding_norm.",
    "pre_lm_head_layernorm.": "norm.",
}
# What layers of Llama and Qwen3 have; the second norm is that of EAGLE-3's features.
_LAYER = re.compile(
    r"layers\.\d+\.(self_attn\.([qkvo]_proj\.(weight|bias)|[qk]_norm\.weight)|mlp\.(gate|up|down)_proj\.(weight|bias)"
    r"|(input_layernorm|hidden_norm|post_attention_layernorm)\.weight)"
)


def _table(wide: bool) -> dict[str, str]:
    return {"fc.": "fuse." if wide else "join.", **_TABLE}


def network_name(name: str, wide: bool) -> str | None:
    """The network's name of a published tensor without its prefix; None for one that it has no place for."""
    for published, ours in {**_table(wide), **_READ}.items():
        if name.startswith(published):
            read = ours + name.removeprefix(published)
            return read if not read.startswith("layers.") or _LAYER.fullmatch(read) else None
    return None


def published_name(name: str, wide: bool) -> str:
    """The published name of a tensor of the network. Raises ValueError for one that no layout of the engines has, such
    as `embedding_norm.weight`."""
    for published, ours in _table(wide).items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    raise ValueError(f"no published EAGLE layout has a tensor like {name!r}; train a drafter of the published layout")


def known_ids(offsets: Tensor) -> Tensor:  # (V',) -> (V',)
    """The token ids of the rows of a draft head, by the `d2t` of a file."""
    return offsets.long() + torch.arange(len(offsets), device=offsets.device)


def offsets_of(vocabulary: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """`d2t` and `t2d` of a file, for ascending token ids (V',)."""
    indices = torch.arange(len(vocabulary), device=vocabulary.device)
    return {OFFSETS: vocabulary.long() - indices, KNOWN: places(vocabulary, vocab_size) < len(vocabulary)}


def without_prefixes(names: Iterable[str]) -> dict[str, str]:
    """The names of a file by what they are without `PREFIXES`, which may stand one before another. Raises ValueError
    for two names that are one without."""
    plain: dict[str, str] = {}
    for name in names:
        if (other := plain.setdefault(without_prefix(name), name)) != name:
            raise ValueError(f"tensors {other!r} and {name!r} are the same one by their names; take a file with one")
    return plain


def without_prefix(name: str) -> str:
    """A name without any of `PREFIXES`."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return without_prefix(name.removeprefix(prefix))
    return name
