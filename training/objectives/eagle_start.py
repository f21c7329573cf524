"""The network that EAGLE's training begins with: new, of layers of the target, or an earlier drafter.

`settings` is the section `objective` of a configuration (`eagle.Settings`). Knows nothing of losses.
"""

import sys
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional as F

from ...drafters.eagle.folder import load_network
from ...drafters.eagle.network import EagleNetwork
from ...drafters.eagle.settings import FAMILIES, EagleSettings
from ...drafters.folder import origin_of
from ...spec.target.taps import HEAD
from ...spec.target.weights import dense_rows, embedding_weight, linear_shape
from .eagle_fit import begin_as_target
from .known_tokens import frequent_tokens
from .start import start_folder

LAYOUTS: dict[str, dict[str, bool]] = {
    "joined": {"embedding_norm": True, "feature_norm": True, "norm_output": True},
    "eagle1": {"input_norm": False, "final_norm": False},
    "wide": {"wide": True},
}
_OF_TARGET = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "rms_norm_eps", "max_position_embeddings", "attention_bias", "mlp_bias", "initializer_range", "rope_parameters",
)  # fmt: skip


class FrozenHead(nn.Linear):
    """The target's LM head in the target's dtype, for states of any: training has them in float32."""

    @classmethod
    def of(cls, head: nn.Linear) -> "FrozenHead":
        made = cls(head.in_features, head.out_features, head.bias is not None, device="meta")
        made.weight, made.bias = head.weight, head.bias
        return made

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states.to(self.weight.dtype), self.weight, self.bias)


def make_network(settings, target, rows: Iterable[dict]) -> EagleNetwork:
    """The network, its trained weights in float32. Raises ValueError for settings that make none."""
    network = _new(settings, target, rows) if settings.start is None else _from_start(settings, target, rows)
    if not network.settings.own_head:
        network.lm_head = FrozenHead.of(network.lm_head)
    return network


def _new(settings, target, rows: Iterable[dict]) -> EagleNetwork:
    vocab_size, vocabulary = target.config.get_text_config().vocab_size, None
    if settings.known_tokens is not None:
        vocabulary = frequent_tokens(rows, settings.known_tokens, vocab_size)
    network = EagleNetwork(eagle_settings(settings, target), target, vocabulary)
    if network.settings.own_head:
        head = target.get_output_embeddings()
        if linear_shape(head)[1] == network.config.hidden_size:
            network.lm_head.weight.data.copy_(dense_rows(head, network.vocabulary.to(target.device)))
        else:
            nn.init.normal_(network.lm_head.weight, std=network.config.initializer_range)
    if network.settings.own_embeddings:
        rows_of_target = embedding_weight(target)
        if rows_of_target.shape == network.embeddings.shape:
            network.embeddings.data.copy_(rows_of_target)
        else:
            nn.init.normal_(network.embeddings, std=network.config.initializer_range)
    if settings.layer_of_target is not None:
        begin_as_target(network, target, settings.layer_of_target, rows)
    return network


def eagle_settings(settings, target) -> EagleSettings:
    """Those of the network that a configuration describes for `target`."""
    known = {each.name for each in fields(EagleSettings)} - {"layer", "taps"}
    if unknown := settings.parts.keys() - known:
        raise ValueError(f"objective.parts has {min(unknown)!r}; known are {', '.join(sorted(known))}")
    if settings.layers < 1:
        raise ValueError(f"objective.layers is {settings.layers}; give at least 1")
    parts = {**LAYOUTS[settings.layout], **settings.parts}
    count = target.config.get_text_config().num_hidden_layers
    taps = settings.taps
    if taps is None:
        taps = [1, count // 2 - 1, count - 4] if parts.get("wide") else [HEAD]
        if count < 7 and len(taps) > 1:
            raise ValueError(
                f"the target has {count} layers, too few for the three that a wide layout reads; give objective.taps"
            )
    if "num_hidden_layers" in settings.layer:
        raise ValueError("objective.layer has num_hidden_layers; give their number as objective.layers")
    layer = {**_layer_of(target), "num_hidden_layers": settings.layers, **settings.layer}
    return EagleSettings(layer=layer, taps=taps, **parts)


def _layer_of(target) -> dict[str, Any]:
    """The Hugging Face config of a layer of the target's sizes."""
    config = target.config.get_text_config()
    values = {name: getattr(config, name, None) for name in _OF_TARGET}
    layer = {name: value for name, value in values.items() if value is not None}
    rope = layer.get("rope_parameters") or {}
    if "rope_type" not in rope and rope:  # of several kinds of layers
        layer["rope_parameters"] = rope.get("full_attention") or next(iter(rope.values()))
    layer["hidden_size"] = linear_shape(target.get_output_embeddings())[1]
    layer.setdefault("intermediate_size", 4 * layer["hidden_size"])
    return {"model_type": next((name for name in FAMILIES if config.model_type.startswith(name)), FAMILIES[0]), **layer}


def _from_start(settings, target, rows: Iterable[dict]) -> EagleNetwork:
    """The network called `settings.start`, which may be another target's, with more known tokens where `settings` has
    more. Raises ValueError where it is of another shape than settings and target ask for."""
    folder = start_folder(settings.start)
    if folder is None or folder.kind != settings.kind:
        raise ValueError(f"objective.start {settings.start} holds no EAGLE network; give the folder of a trained one")
    if settings.layer_of_target is not None and PartialState().is_main_process:
        unused = "objective.layer_of_target has no effect"
        print(f"objective.start {settings.start} gives the network, and {unused}", file=sys.stderr)
    network = load_network(folder, target)
    asked, started = eagle_settings(settings, target), network.settings
    for each in fields(EagleSettings):
        if getattr(asked, each.name) != getattr(started, each.name):
            raise ValueError(
                f"objective.start {settings.start} has {each.name} {getattr(started, each.name)!r} and the objective "
                f"asks for {getattr(asked, each.name)!r}; set it to that"
            )
    if settings.known_tokens is not None:
        network = _knowing(network, settings, target, rows)
    for name, parameter in network.named_parameters():
        if started.own_head or not name.startswith("lm_head."):  # else it is the target's
            parameter.data = parameter.data.float()
            parameter.requires_grad_()
    network.origin = origin_of(folder)
    return network.train()


def _knowing(network: EagleNetwork, settings, target, rows: Iterable[dict]) -> EagleNetwork:
    """The network with `settings.known_tokens`: its own, and the commonest others of the data."""
    known = len(network.vocabulary)
    if settings.known_tokens == known:
        return network
    if settings.known_tokens < known or network.settings.own_head:
        raise ValueError(
            f"objective.known_tokens is {settings.known_tokens} and {known} in {settings.start}, its start; set it to "
            + ("that" if network.settings.own_head else "at least that")
        )
    vocabulary = frequent_tokens(rows, settings.known_tokens, network.vocab_size, network.vocabulary)
    wider = EagleNetwork(network.settings, target, vocabulary)
    stored = {name: tensor for name, tensor in network.stored().items() if name != "vocabulary"}
    wider.load_state_dict(stored, strict=False)  # what is not stored is the target's
    return wider
