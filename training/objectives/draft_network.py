"""The network of a draft model: a new Llama, some of the target's layers, or an earlier draft; and the sharing of the
target's embeddings and LM head.

`settings` is the section `objective` of a configuration (`draft_lm.Settings`). Knows nothing of losses.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ...drafters.complete import complete
from ...drafters.shipped import shipped_folder
from ...spec.target.taps import layer_stacks
from ...spec.target.weights import dense_parameters, dense_state, linear_shape

UNBOUNDED = 8192  # the context of a draft for a target that has no positions, such as Mamba


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A Llama from scratch, named as in its Hugging Face config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None

    def check(self) -> None:
        """Raises ValueError for sizes that no Llama can have."""
        for name, size in vars(self).items():
            if size is not None and size < 1:
                raise ValueError(f"objective.sizes.{name} is {size}; give a number of at least 1")
        heads, grouped = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"objective.sizes: {heads} heads do not divide hidden_size {self.hidden_size} into even widths; choose "
                "a multiple of twice their number"
            )
        if heads % grouped:
            raise ValueError(
                f"objective.sizes: {grouped} key-value heads do not divide {heads} heads; choose a divisor"
            )


def make_network(settings, target) -> nn.Module:
    """The network in float32, not trained yet or from `start`. Raises ValueError for settings that do not fit."""
    if settings.start is not None:
        model = complete(shipped_folder(settings.start) or settings.start, target, torch.float32, of_any_target=True)
        sizes = [each.config.get_text_config().vocab_size for each in (model, target)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"objective.start {settings.start} has a vocabulary of {sizes[0]} tokens and the target one of "
                f"{sizes[1]}; start from a drafter for the same vocabulary, or give objective.sizes and no start"
            )
        return model
    if settings.layers is not None:
        return from_layers(target, settings.layers)
    sizes, target_config = settings.sizes, target.config.get_text_config()
    sizes.check()
    config = LlamaConfig(
        vocab_size=target_config.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads or sizes.num_attention_heads,
        max_position_embeddings=getattr(target_config, "max_position_embeddings", None) or UNBOUNDED,
        rope_parameters={"rope_type": "default", "rope_theta": _rope_theta(target_config)},
        tie_word_embeddings=settings.embeddings == settings.head
        and (settings.head == "own" or target_config.tie_word_embeddings),
        bos_token_id=target_config.bos_token_id,
        eos_token_id=target_config.eos_token_id,
        pad_token_id=target_config.pad_token_id,
    )
    return LlamaForCausalLM._from_config(config, dtype=torch.float32)


def _rope_theta(config) -> float:
    return (getattr(config, "rope_parameters", None) or {}).get("rope_theta") or 10_000.0


def from_layers(target, layers: list[int]) -> nn.Module:
    """A model of the target's class with these of its layers, in the given order, and its embeddings, norm and head.

    Works for every architecture whose decoder layers are one nn.ModuleList; raises ValueError for others."""
    name, config = type(target).__name__, copy.deepcopy(target.config)
    count = config.get_text_config().num_hidden_layers
    stacks = layer_stacks(target)
    if len(stacks) != 1 or config.get_text_config() is not config or getattr(config, "quantization_config", None):
        raise ValueError(f"{name} is not one plain stack of {count} layers; give objective.sizes instead")
    if not layers or not all(0 <= layer < count for layer in layers):
        raise ValueError(f"objective.layers {layers} must name layers of {name}, which has 0 to {count - 1}")
    others = "_id", "architectures", "_limit", "_multipliers"  # lists that may happen to be as long
    for key, value in list(vars(config).items()):
        listed = isinstance(value, (list, tuple)) and len(value) == count and not key.endswith(others)
        if listed:  # one entry a layer, like layer_types
            setattr(config, key, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    state = {}
    for key, tensor in dense_state(target).items():
        if not key.startswith(f"{stacks[0]}."):
            state[key] = tensor
            continue
        number, rest = key.removeprefix(f"{stacks[0]}.").split(".", 1)
        for new_number, layer in enumerate(layers):
            if layer == int(number):
                state[f"{stacks[0]}.{new_number}.{rest}"] = tensor
    attention = target.config._attn_implementation
    try:
        model = type(target)._from_config(config, dtype=torch.float32, attn_implementation=attention)
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: layers {layers} do not fit their new places ({' '.join(str(error).split())[:160]}); choose others"
        ) from error
    return model


def share(model, settings, target) -> None:
    """Replace the draft's embeddings and head by the target's, frozen, as set; untie them where they now differ."""
    origins = {"get_input_embeddings": settings.embeddings, "get_output_embeddings": settings.head}
    tied = model.config.tie_word_embeddings and settings.embeddings == settings.head
    if settings.head == "target":
        tied = tied and target.config.get_text_config().tie_word_embeddings
    if model.config.tie_word_embeddings and not tied:
        model.get_output_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
        model.config.tie_word_embeddings = False
    for get, origin in origins.items():
        if origin == "own":
            continue
        layer, target_layer = getattr(model, get)(), getattr(target, get)()
        if layer.weight.shape != linear_shape(target_layer):
            raise ValueError(
                f"the draft's hidden size {layer.weight.shape[1]} is not the target's {target_layer.weight.shape[1]}, "
                "so its embeddings and head cannot be shared; use own ones, or the target's hidden size"
            )
        theirs = dense_parameters(target_layer)
        if lacking := {*theirs} - {*dict(layer.named_parameters())}:
            raise ValueError(
                f"the target's LM head has a {lacking.pop()}, for which the draft's architecture has no place; use "
                "objective.head: own"
            )
        for name, weight in theirs.items():
            setattr(layer, name, nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False))
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def target_weights(model, settings) -> dict[str, str]:
    """The draft's tensors that are the target's: from their names in the draft to "module.parameter" in the target."""
    names = {id(module): path for path, module in model.named_modules()}
    paths = {}
    for name, origin in (("input_embeddings", settings.embeddings), ("output_embeddings", settings.head)):
        module = getattr(model, f"get_{name}")()
        if origin == "target":
            paths |= {f"{names[id(module)]}.{key}": f"{name}.{key}" for key, _ in module.named_parameters()}
    return paths
