"""What each engine cannot run of an EAGLE network, in sentences: the value, the rule, the remedy.

From the sources of vLLM 0.33, SGLang 0.5.23 and speculators 0.9. Knows nothing of files.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...spec.target.taps import HEAD
from ...spec.target.weights import embedding_weight
from ..eagle.layers import SLIDING
from ..eagle.network import EagleNetwork

SHIFTED_FROM_ONE = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")  # targets of another convention in SGLang
WIDE = "train with objective.layout: wide, which is EAGLE-3's"


def own_embeddings(network: EagleNetwork, target: PreTrainedModel) -> Tensor | None:  # (V, E)
    """The embeddings that are to be stored; None where they are the target's."""
    rows = embedding_weight(target)
    ours = network.embeddings.detach()
    same = not network.settings.own_embeddings or (ours.shape == rows.shape and torch.equal(ours, rows.to(ours)))
    return None if same else ours


def sglang_ids(ids: list[int], model_type: str) -> list[int]:
    """The layers as SGLang wants them for a target of this type, from indices of `hidden_states`. It adds one to them,
    but for some targets only where the first is 1."""
    outputs = [number - 1 for number in ids]
    return outputs if model_type not in SHIFTED_FROM_ONE or outputs[0] == 1 else ids


def limits(network: EagleNetwork, target: PreTrainedModel, engine: str) -> Iterator[str]:
    """Sentences about what the engine of this name cannot run."""
    if network.lm_head.bias is not None:
        yield "the LM head has a bias, and that of an engine's EAGLE draft has none; decode it with Paceline"
    if getattr(network.config, "mlp_bias", False) and engine == "sglang":
        yield "layer.mlp_bias=True: SGLang's MLP has no bias; train with objective.layer.mlp_bias: false"
    if SLIDING in network.attention_types:
        yield f"layer.layer_types has {SLIDING!r}: exported layers see all the text; decode it with Paceline"
    embedded = network.embeddings.shape[1]
    if network.config.hidden_size != embedded:
        yield (
            f"layer.hidden_size={network.config.hidden_size}: engines want embeddings as wide as the draft, and these "
            f"have {embedded}; train with objective.parts.own_embeddings: true, or as wide as the target"
        )
    yield from (_limits_wide if network.settings.wide else _limits_joined)(network, target, engine)


def _limits_joined(network: EagleNetwork, target: PreTrainedModel, engine: str) -> Iterator[str]:
    """EAGLE-1 and 2."""
    settings = network.settings
    if engine == "speculators":
        yield f"wide=False: vLLM serves no EAGLE-1 heads of speculators' format; export --to vllm, or {WIDE}"
    norms = ("embedding_norm", "feature_norm", "input_norm", "final_norm", "tap_norms", "fuse_norm", "fuse")
    for name in norms:
        if getattr(settings, name):
            yield f"{name}=True with wide=False: engines run EAGLE-1 without that; {WIDE}"
    if settings.taps != (HEAD,):
        yield f"taps={list(settings.taps)} with wide=False: engines feed EAGLE-1 the last hidden state alone; {WIDE}"
    if settings.own_head:
        yield f"own_head=True with wide=False: engines give EAGLE-1 the target's LM head; {WIDE}"
    if own_embeddings(network, target) is not None:
        yield f"own_embeddings=True with wide=False: engines give EAGLE-1 the target's embeddings; {WIDE}"
    if network.config.model_type != "llama":
        yield f"layer.model_type={network.config.model_type!r} with wide=False: engines run EAGLE-1 with Llama's layers"
    if settings.join_bias and engine == "vllm":
        yield f"join_bias=True: vLLM's fc has no bias; train with objective.parts.join_bias: false, or {WIDE}"


def _limits_wide(network: EagleNetwork, target: PreTrainedModel, engine: str) -> Iterator[str]:
    """EAGLE-3."""
    settings, taps = network.settings, list(network.settings.taps)
    if not settings.final_norm:
        yield "final_norm=False: engines norm what the LM head reads; train with objective.parts.final_norm: true"
    if settings.tap_norms and settings.fuse_norm:
        yield "tap_norms=True and fuse_norm=True: engines know one of them at a time; train with one"
    if HEAD in taps and len(taps) > 1:
        yield f"taps={taps}: engines tap layers only, and 'head' comes after the final norm; {WIDE}"
    if len(set(taps)) < len(taps):
        yield f"taps={taps} name a layer twice, and engines tap it once; name each once"
    one = taps == [HEAD] or (len(taps) == 1 and sum(network.tap_sizes) == network.config.hidden_size)
    mapped = isinstance(network.fuse, torch.nn.Linear) or settings.tap_norms or settings.fuse_norm
    if one and mapped and (taps == [HEAD] or engine == "sglang"):
        yield (
            f"taps={taps}: engines map or norm no feature that is as wide as the draft; train with several layers in "
            "objective.taps"
        )
    if taps == [HEAD] and engine == "speculators":
        yield "taps=['head']: speculators' format names layers; export --to vllm, or train with some in objective.taps"
    if engine == "sglang":
        yield from _limits_sglang(network, target)


def _limits_sglang(network: EagleNetwork, target: PreTrainedModel) -> Iterator[str]:
    settings, config = network.settings, network.config
    text = target.config.get_text_config()
    last = text.num_hidden_layers - 1
    if settings.norm_before_residual:
        yield (
            "norm_before_residual=True: SGLang does not know it; export --to vllm, or train with "
            "objective.parts.norm_before_residual: false"
        )
    if config.model_type != "llama":
        yield (
            f"layer.model_type={config.model_type!r}: SGLang's EAGLE-3 has Llama's layers, without norms of queries "
            "and keys; export --to vllm, or train with objective.layer.model_type: llama"
        )
    if config.attention_bias:
        yield (
            "layer.attention_bias=True: SGLang's EAGLE-3 has none; export --to vllm, or train with "
            "objective.layer.attention_bias: false"
        )
    if last in settings.taps:
        yield f"taps={list(settings.taps)}: SGLang cannot tap the last layer, {last}; train with an earlier one"
    if 0 in settings.taps and text.model_type in SHIFTED_FROM_ONE:
        yield f"taps={list(settings.taps)}: SGLang cannot tap layer 0 of {text.model_type}; train with a later one"
    if own_embeddings(network, target) is not None and network.tap_sizes[0] == config.hidden_size:
        yield (
            "own_embeddings=True: SGLang puts the target's embeddings in their place; export --to vllm, or train with "
            "objective.parts.own_embeddings: false"
        )
