"""The settings of an EAGLE network, as in a drafter's config and in training configurations. Knows no weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...spec.target.taps import HEAD, Tap

FAMILIES = ("llama", "qwen3")  # whose decoder layers it is made of; Qwen3's normalise queries and keys


@dataclass(frozen=True)
class EagleSettings:
    """The parts of the network that published layouts have or lack; `layer` is the Hugging Face config of its decoder
    layers (`model_type`, `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `rope_parameters`, ...).

    EAGLE-1 and 2 are `EagleSettings(layer=...)`; EAGLE-3 is `wide` with three taps and a final norm. Raises ValueError
    for what no network can be made of."""

    layer: dict[str, Any] = field(default_factory=dict)
    taps: Sequence[Tap] = (HEAD,)  # the target's hidden states that are its features
    wide: bool = False  # EAGLE-3: attention reads embedding and feature side by side; else `join` makes one state
    fuse: bool = False  # a linear map from the features to the draft's width, as wherever these differ
    join_bias: bool = False
    embedding_norm: bool = False  # of the embedding, before `join`
    feature_norm: bool = False  # of the feature, before `join`
    tap_norms: bool = False  # EAGLE-3.1: each tap's state is normalised before `fuse`
    fuse_norm: bool = False  # all of them together are
    input_norm: bool = True  # of the first layer; EAGLE-1 has none
    norm_before_residual: bool = False  # what is added to attention's output is the normalised feature
    final_norm: bool = True  # before the LM head; EAGLE-1 has none
    norm_output: bool = False  # the feature that is fed back is the output of the final norm
    own_embeddings: bool = False
    own_head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))
        family = self.layer.get("model_type") if isinstance(self.layer, dict) else None
        if family not in FAMILIES:
            raise ValueError(f"layer.model_type={family!r} is no family of layers; choose one of {', '.join(FAMILIES)}")
        if not self.taps:
            raise ValueError("taps=[] leaves nothing to draft from; name layers of the target, or 'head'")
        for tap in self.taps:
            if tap != HEAD and type(tap) is not int:
                raise ValueError(f"taps has {tap!r}; name layers of the target by their numbers, or 'head'")
        if self.norm_output and not self.final_norm:
            raise ValueError("norm_output feeds back the output of the final norm; set final_norm too")
        if self.wide and (self.embedding_norm or self.feature_norm or self.join_bias or not self.input_norm):
            raise ValueError("wide layers norm embedding and feature themselves, and join nothing; leave these out")
        if not self.wide and self.norm_before_residual:
            raise ValueError("norm_before_residual is for wide layers; leave it out")
