"""The decoder layers of EAGLE networks: transformers' own, and EAGLE-3's first one, which reads two vectors.

With them come what each layer's attention looks at, and the rotary embedding. Knows nothing of what is drafted.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from ...spec.console import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_CONFIGS: dict[str, type["PreTrainedConfig"]] = {"llama": LlamaConfig, "qwen3": Qwen3Config}
_LAYERS = {"llama": llama.LlamaDecoderLayer, "qwen3": qwen3.Qwen3DecoderLayer}
_ROTARY = {"llama": llama.LlamaRotaryEmbedding, "qwen3": qwen3.Qwen3RotaryEmbedding}

FULL, SLIDING = "full_attention", "sliding_attention"  # to all the text, and to its last `sliding_window` tokens
MASKS: dict[str, Callable] = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}


class WideLayer(nn.Module):
    """EAGLE-3's first layer: queries, keys and values read the normalised embedding and feature side by side."""

    def __init__(
        self, layer: llama.LlamaDecoderLayer, size: int, embedded: int, eps: float, norm_before_residual: bool
    ):
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = llama.LlamaRMSNorm(embedded, eps)  # of the embedding
        self.hidden_norm = llama.LlamaRMSNorm(size, eps)  # of the feature
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.post_attention_layernorm = layer.post_attention_layernorm
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            wide = nn.Linear(embedded + size, narrow.out_features, narrow.bias is not None)
            setattr(self.self_attn, name, wide)

    def forward(self, feature: Tensor, embedding: Tensor, **attention: Any) -> Tensor:  # (B, n, H), (B, n, E)
        normed = self.hidden_norm(feature)  # (B, n, H)
        both = torch.cat([self.input_layernorm(embedding), normed], dim=-1)
        attended, _ = self.self_attn(hidden_states=both, **attention)
        hidden = (normed if self.norm_before_residual else feature) + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def made_layers(layer: dict[str, Any], vocab_size: int) -> tuple["PreTrainedConfig", list[nn.Module]]:
    """The config and the decoder layers that `layer` describes. Raises ValueError where it describes none."""
    family = layer["model_type"]
    try:
        config = _CONFIGS[family](**{**layer, "vocab_size": vocab_size, "tie_word_embeddings": False})
        config._attn_implementation = "sdpa"
        _check_windows(config)
        return config, [_LAYERS[family](config, number) for number in range(config.num_hidden_layers)]
    except Exception as error:  # of whatever type, as transformers computes with what it is given
        raise ValueError(
            f"the settings of `layer` make no decoder layer ({one_line(error)}); give those of a {family} config"
        ) from error


def attention_types(config: Any) -> list[str]:
    """By layer, what of the text attention looks at: full unless the settings say otherwise."""
    return list(getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers)


def _check_windows(config: Any) -> None:
    """Raise ValueError for layers whose attention has no mask here."""
    types, window = attention_types(config), getattr(config, "sliding_window", None)
    if len(types) != config.num_hidden_layers:
        raise ValueError(f"layer_types has {len(types)} entries for {config.num_hidden_layers} layers")
    if unknown := set(types) - MASKS.keys():
        raise ValueError(f"layer_types has {min(unknown)!r}, and known are {', '.join(MASKS)}")
    if SLIDING in types and (type(window) is not int or window < 1):
        raise ValueError(f"layer_types has {SLIDING!r} and sliding_window={window!r} is no number of tokens")


def rotary_embedding(layer: dict[str, Any]) -> nn.Module:
    """The rotary embedding that `layer` describes. Raises ValueError unless its frequencies turn all numbers of an
    attention head, in short texts and in long ones."""
    try:
        config: Any = _CONFIGS[layer["model_type"]](**layer)
        rotary = _ROTARY[config.model_type](config)
        longest = max(config.max_position_embeddings, config.rope_parameters.get("original_max_position_embeddings", 0))
        for position in (longest, 0):
            for part in rotary(torch.zeros(1), torch.tensor([[position]])):  # (1, 1, D)
                if part.shape[-1] != config.head_dim or not part.isfinite().all():
                    raise ValueError(f"{part.shape[-1]} numbers of {config.head_dim} are turned")
    except Exception as error:  # of whatever type, as transformers computes with what it is given
        raise ValueError(
            f"the rope_parameters of `layer` turn no attention heads of these layers ({one_line(error)}); correct them"
        ) from error
    return rotary
