"""EAGLE heads in the form that vLLM and SGLang read, and in speculators' format, which vLLM serves by itself.

One folder does for both engines where both can run the head: layers are named as vLLM counts them (hidden states, the
embeddings being 0) and as SGLang does (outputs of layers), rotary embeddings in the spelling of transformers 5 and in
that before it. Knows nothing of how a network drafts.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...spec.quantise.folder import smallest_dtype
from ...spec.target.taps import HEAD
from .eagle_limits import limits, own_embeddings, sglang_ids
from .eagle_names import offsets_of, published_name
from .export_check import check_eagle
from .export_order import Export, Order

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..eagle.network import EagleNetwork

SPECULATORS = "0.9.0"  # the version of the format that is written
_EAGLE1 = {"vllm": "LlamaForCausalLM", "sglang": "LlamaForCausalLMEagle"}  # vLLM makes of it its own name
_ARCHITECTURES = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}  # SGLang has the first
_LAYER = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "max_position_embeddings", "vocab_size",
)  # fmt: skip


def eagle_export(order: Order, network: "EagleNetwork") -> Export:
    """Raises ValueError for a network that the engine cannot run."""
    engine, target = order.engine.name, order.target
    if engine not in ("vllm", "sglang", "speculators"):
        raise ValueError(f"{order.engine.title} runs no EAGLE heads; export {order.name} --to vllm or --to sglang")
    if sentence := next(limits(network, target, engine), None):
        raise ValueError(f"{order.name} cannot be run by {order.engine.title}: {sentence}")
    dtype = smallest_dtype(network)
    tensors = (wide_tensors if network.settings.wide else joined_tensors)(network, target, engine)

    def write(folder: Path, tokens: int) -> None:
        if engine == "speculators":
            config = speculators_config(network, target, dtype, order.target_name, tokens)
        else:
            config = plain_config(network, target, dtype, engine)
        stored = {
            name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            for name, tensor in tensors.items()
        }
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    read = sum(parameter.numel() for name, parameter in network.named_parameters() if name != "embeddings")
    if network.trimmed and not network.settings.wide:  # the engine gives it the target's whole LM head
        read += (network.vocab_size - len(network.vocabulary)) * network.config.hidden_size
    method = "eagle3" if network.settings.wide else "eagle"
    return Export(method, write, lambda folder: check_eagle(folder, network, target), read, _notes(order, network))


def _notes(order: Order, network: "EagleNetwork") -> tuple[str, ...]:
    """What the engine does otherwise, and whether the folder is for it alone."""
    notes = []
    if network.trimmed and not network.settings.wide:
        notes.append(
            f"The head knows {len(network.vocabulary)} tokens and the engine gives it the target's whole LM head, so "
            "it will draft tokens that it has not learned to avoid, which costs acceptance."
        )
    if order.engine.name == "vllm" and (sentence := next(limits(network, order.target, "sglang"), None)):
        notes.append(f"SGLang cannot run this folder: {sentence}.")
    if order.engine.name == "speculators" and Path(order.target_name).is_dir():
        notes.append(
            f"vllm serve with this folder alone needs the target by its hub id, and {order.target_name} is a folder: "
            "start it by the command above."
        )
    return tuple(notes)


def joined_tensors(network: "EagleNetwork", target: "PreTrainedModel", engine: str) -> dict[str, Tensor]:
    """EAGLE-1 and 2: engines take embeddings and LM head from the target."""
    skipped = ("vocabulary", "embeddings", "lm_head.weight", "lm_head.bias")
    state = {name: tensor for name, tensor in network.state_dict().items() if name not in skipped}
    tensors = {published_name(name, wide=False): tensor for name, tensor in state.items()}
    if engine == "sglang" and "fc.bias" not in tensors:  # its fc has a bias, which would keep random numbers
        tensors["fc.bias"] = tensors["fc.weight"].new_zeros(network.config.hidden_size)
    return tensors


def wide_tensors(network: "EagleNetwork", target: "PreTrainedModel", engine: str) -> dict[str, Tensor]:
    """EAGLE-3: with the rows of the LM head, and with embeddings where they are not the target's."""
    state = {name: tensor for name, tensor in network.state_dict().items() if name not in ("vocabulary", "embeddings")}
    _sort_taps(state, network)
    tensors = {published_name(name, wide=True): tensor for name, tensor in state.items()}
    for number in range(1, network.config.num_hidden_layers):  # SGLang has another name for it than vLLM
        if engine != "speculators":
            tensors[f"layers.{number}.hidden_norm.weight"] = tensors[f"layers.{number}.input_layernorm.weight"].clone()
    if (embeddings := own_embeddings(network, target)) is not None:
        tensors["embed_tokens.weight"] = embeddings
    if network.trimmed:
        tensors |= offsets_of(network.vocabulary, network.vocab_size)
    return tensors


def _sort_taps(state: dict[str, Tensor], network: "EagleNetwork") -> None:
    """Engines join the states of the taps in ascending order."""
    taps = network.settings.taps
    order = sorted(range(len(taps)), key=lambda index: taps[index])
    if len(taps) == 1 or order == list(range(len(taps))):
        return
    columns = torch.arange(sum(network.tap_sizes), device=network.device).split(network.tap_sizes)
    moved = torch.cat([columns[index] for index in order])
    state["fuse.weight"] = state["fuse.weight"][:, moved]
    if network.settings.fuse_norm:
        state["fuse_norm.weight"] = state["fuse_norm.weight"][moved]
    if network.settings.tap_norms:
        norms = [state[f"tap_norms.{index}.weight"] for index in order]
        state.update({f"tap_norms.{number}.weight": norm for number, norm in enumerate(norms)})


def layer_config(network: "EagleNetwork") -> dict[str, Any]:
    """The decoder layers, in transformers' words."""
    config = {name: getattr(network.config, name) for name in _LAYER}
    return {**config, "mlp_bias": getattr(network.config, "mlp_bias", False), "tie_word_embeddings": False}


def _ids(network: "EagleNetwork") -> list[int]:
    """The tapped layers as indices of transformers' `hidden_states`, whose first are the embeddings."""
    return sorted(tap + 1 for tap in network.settings.taps if tap != HEAD)


def _norms(network: "EagleNetwork") -> dict[str, bool]:
    settings = network.settings
    return {
        "norm_before_residual": settings.norm_before_residual, "norm_before_fc": settings.fuse_norm,
        "fc_norm": settings.tap_norms, "norm_output": settings.norm_output,
    }  # fmt: skip


def plain_config(network: "EagleNetwork", target: "PreTrainedModel", dtype: torch.dtype, engine: str) -> dict[str, Any]:
    """config.json for `--speculative-config` of vLLM or for SGLang; of EAGLE-3 it is the same for both."""
    rope, text = dict(network.config.rope_parameters), target.config.get_text_config()
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    ends = {name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id")}
    name_of_dtype = str(dtype).removeprefix("torch.")
    config = {
        **layer_config(network),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
        **{name: value for name, value in ends.items() if value is not None},
        "dtype": name_of_dtype,
        "torch_dtype": name_of_dtype,
    }
    if not network.settings.wide:
        # The engines have other names for the same class, and both take `bias` for that of attention, too.
        return {"architectures": [_EAGLE1[engine]], **config, "bias": False}
    ids, norms = _ids(network), _norms(network)
    eagle: dict[str, Any] = {"use_aux_hidden_state": bool(ids), "norm_before_fc": norms["norm_before_fc"]}
    config |= {
        "architectures": [_ARCHITECTURES[config["model_type"]]],
        "draft_vocab_size": len(network.vocabulary),
        "target_hidden_size": network.tap_sizes[0],
        "num_aux_hidden_states": len(network.settings.taps),
        **norms,
        "eagle_config": eagle,
    }
    if ids:
        config["eagle_aux_hidden_state_layer_ids"] = ids
        eagle["eagle_aux_hidden_state_layer_ids"] = sglang_ids(ids, text.model_type)
    return config


def speculators_config(
    network: "EagleNetwork", target: "PreTrainedModel", dtype: torch.dtype, target_name: str, tokens: int
) -> dict[str, Any]:
    """config.json of speculators' format."""
    import transformers

    size, rope = network.tap_sizes[0], dict(network.config.rope_parameters)
    architectures = target.config.architectures or [type(target).__name__]
    proposal = {
        "proposal_type": "greedy", "speculative_tokens": tokens, "verifier_accept_k": 1, "accept_tolerance": 0.0,
    }  # fmt: skip
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS,
        "draft_vocab_size": len(network.vocabulary),
        **_norms(network),
        "target_hidden_size": None if size == network.config.hidden_size else size,
        "embed_requires_grad": own_embeddings(network, target) is not None,
        "eagle_aux_hidden_state_layer_ids": _ids(network),
        # vLLM copies little else than this config, and looks there for the number of taps.
        "transformer_layer_config": {
            **layer_config(network),
            "rope_parameters": rope,
            "num_aux_hidden_states": len(network.settings.taps),
        },
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target_name, "architectures": architectures},
        },
        "dtype": str(dtype).removeprefix("torch."),
        "transformers_version": transformers.__version__,
    }
