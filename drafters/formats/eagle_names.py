"""The names of tensors in published EAGLE files, and those of `EagleNetwork.state_dict()`: one table, read both ways.

Files differ in spelling only, but for the draft vocabulary: they keep offsets, the network keeps token ids. Knows no
values of weights, and no configuration.
"""

import torch
from torch import Tensor

from ..known_tokens import places

PREFIXES = ("model.", "speculator.", "draft_model.", "module.", "_orig_mod.")  # of whole files, without a meaning
OFFSETS, KNOWN = "d2t", "t2d"  # (V',) int64: token id less index; (V,) bool: whether a token is known
# Beginnings of names, published and in the network. A name is read by the first line that fits, and written by the
# first line that fits too, so that the spelling that engines read comes first.
_TABLE = {
    "layers.": "layers.",
    "midlayer.": "layers.0.",  # EAGLE-3's reference
    "norm.": "norm.",
    "lm_head.": "lm_head.",
    "embed_tokens.weight": "embeddings",
    "fc_norm.": "tap_norms.",  # EAGLE-3.1
    "aux_norm_low.": "tap_norms.0.",  # before that
    "aux_norm_mid.": "tap_norms.1.",
    "aux_norm_high.": "tap_norms.2.",
    "input_norm.": "fuse_norm.",
    OFFSETS: "vocabulary",
}


def _table(wide: bool) -> dict[str, str]:
    """`fc` maps the features alone in EAGLE-3, which is `wide`, and embedding and feature in EAGLE-1 and 2."""
    return {"fc.": "fuse." if wide else "join.", **_TABLE}


def network_name(name: str, wide: bool) -> str | None:
    """The network's name of a published tensor without its prefix; None for one that it has no place for."""
    for published, ours in _table(wide).items():
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return None


def published_name(name: str, wide: bool) -> str:
    """The published name of a tensor of the network. Raises ValueError for one that no published layout has, such as
    `embedding_norm.weight`."""
    for published, ours in _table(wide).items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    raise ValueError(f"no published EAGLE layout has a tensor like {name!r}; train a drafter with the published layout")


def known_ids(offsets: Tensor) -> Tensor:  # (V',) -> (V',)
    """The token ids of the rows of a draft head, by the `d2t` of a file."""
    return offsets.long() + torch.arange(len(offsets), device=offsets.device)


def offsets_of(vocabulary: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """`d2t` and `t2d` of a file, for ascending token ids (V',)."""
    indices = torch.arange(len(vocabulary), device=vocabulary.device)
    return {
        OFFSETS: vocabulary.long() - indices,
        KNOWN: places(vocabulary, vocab_size) < len(vocabulary),
    }


def without_prefix(names: list[str]) -> dict[str, str]:
    """Each name of a file and what it is called without `PREFIXES`, which may stand before one another."""
    return {name: _stripped(name) for name in names}


def _stripped(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return _stripped(name.removeprefix(prefix))
    return name
