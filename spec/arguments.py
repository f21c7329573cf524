"""Checks of `generate`'s arguments: each raises ValueError, in one sentence, before any token is decoded."""

import copy
import difflib
import inspect
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

from .engines.executors import executor_names
from .inputs.numbers import checked_numbers, plain
from .inputs.prompt_batch import PromptBatch
from .target import rope
from .target.adapters import inside
from .target.cache import bytes_per_token
from .target.given import CACHES, cache_name, check_cache
from .target.load import context_length
from .tree import DynamicShape, TreeShape
from .verify import check_rule

_PASSED_ON = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "generation_config"}
_REFUSED: dict[str, tuple[Collection, str]] = {  # name: values that are allowed all the same, and the reason
    "num_beams": ({None, 1}, "beam search keeps several texts per row; use model.generate for it"),
    "penalty_alpha": ({None, 0}, "contrastive search is not supported; use model.generate for it"),
    "guidance_scale": ({None, 1}, "guidance (CFG) runs a second model state per token; use model.generate"),
    "dola_layers": ({None}, "DoLa decoding is not supported; use model.generate for it"),
    "prompt_lookup_num_tokens": ({None}, "pass drafter='ngram' instead"),
    "speculation_type": ({None}, "pass drafter= instead"),
    "assistant_early_exit": ({None}, "pass drafter= instead"),
    "use_mtp": ({None, False}, "pass drafter= instead"),
    "cache_implementation": ({None}, "the slot cache is always used; leave it out"),
    "token_healing": ({None, False}, "token healing is not supported; use model.generate for it"),
    "output_attentions": ({None, False}, "attentions are not collected; use model.generate for them"),
    "output_hidden_states": ({None, False}, "hidden states are not collected; use model.generate for them"),
    "constraints": ({None}, "constrained beam search is not supported; use model.generate for it"),
    "force_words_ids": ({None}, "constrained beam search is not supported; use model.generate for it"),
    "use_cache": ({None, True}, "decoding without a cache is not supported; leave it out"),
}


CONFIG = set(GenerationConfig().to_dict())
# Of transformers' own speculation and caches: whoever passes them means something that does not happen here.
WITHOUT_EFFECT = {
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "max_matching_ngram_size", "cache_config", "is_assistant",
}  # fmt: skip
# Of beams, or of how transformers runs its forwards: they do not change a text, there or here.
IDLE = {
    "prefill_chunk_size", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping", "low_memory",
    "compile_config", "disable_compile", "trust_remote_code", "continuous_batching_config", "assistant_ensemble_weight",
    "return_dict", "logits_to_keep", "num_logits_to_keep", "output_router_logits",
}  # fmt: skip


def setting(model: PreTrainedModel, kwargs: Mapping[str, Any], name: str) -> Any:
    """The value of argument `name`: from `kwargs`, else the generation config in them, else the model's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    configs = (kwargs.get("generation_config"), model.generation_config)
    return next((getattr(c, name) for c in configs if getattr(c, name, None) is not None), None)


def check_model(model: Any, role: str = "model") -> PreTrainedModel:
    """`model` without wrappers of torch.compile and PEFT. Raises ValueError unless it is a causal LM of transformers;
    `role` names the argument in the message."""
    while isinstance(model, torch.nn.Module) and "_orig_mod" in model._modules:
        model = model._orig_mod
    model = inside(model)
    kind = type(model).__name__
    if isinstance(model, (str, Path)):
        raise ValueError(f"{role}={str(model)!r} is a name and no model; load it with paceline.load_target")
    if not isinstance(model, torch.nn.Module):
        hint = "the first of the two things that" if isinstance(model, (tuple, list)) else "what"
        raise ValueError(f"{role} is a {kind} and no causal LM; pass {hint} paceline.load_target returns")
    if not hasattr(model, "config"):
        remedy = "pass its .module" if "module" in model._modules else "load one with paceline.load_target"
        raise ValueError(f"{role} is a {kind} and no causal LM of transformers; {remedy}")
    if not hasattr(type(model), "generate") or not getattr(model, "can_generate", lambda: True)():
        raise ValueError(
            f"{role} is a {kind}, which has no language-modelling head; load the checkpoint with AutoModelForCausalLM"
        )
    return model


def check_executor(executor: str) -> None:
    """Raise ValueError for a name that no executor has."""
    if executor not in (names := executor_names()):
        raise ValueError(f"executor={executor!r} is not an executor; choose one of {', '.join(names)}")


def check_arguments(model: PreTrainedModel, kwargs: dict[str, Any], verify: str, executor: str) -> None:
    """Raise ValueError for arguments that `generate` does not support. `kwargs` loses those without meaning here, and
    numbers in it become Python's."""
    check_rule(verify)
    check_executor(executor)
    if kwargs.pop("assistant_model", None) is not None:
        raise ValueError("assistant_model= is transformers' own speculation; pass the draft model as drafter=")
    if kwargs.pop("synced_gpus", None):
        raise ValueError(
            "synced_gpus=True keeps processes in step, one forward per token, and rows take fewer here; leave it out"
        )
    known = CONFIG | set(_REFUSED) | _PASSED_ON | inputs_of(model)
    if not isinstance(kwargs.get("generation_config") or model.generation_config, GenerationConfig):
        raise ValueError(f"generation_config is a {type(kwargs['generation_config']).__name__}, not a GenerationConfig")
    for name in list(kwargs):
        if name in IDLE or (kwargs[name] is None and name not in CONFIG):
            del kwargs[name]
        elif name in WITHOUT_EFFECT and kwargs[name] is not None:
            raise ValueError(f"{name}={kwargs[name]!r} has no effect here; remove it")
        elif name not in known:
            near = difflib.get_close_matches(name, [*known, "drafter", "tree", "verify", "seed"], 1)
            hint = f"did you mean {near[0]!r}" if near else "remove it"
            raise ValueError(f"generate() does not take {name!r}; {hint}")
    for name, (allowed, reason) in _REFUSED.items():
        # Cache settings count only where the user passes them, not where a checkpoint's config has them.
        value = kwargs.get(name) if "cache" in name else setting(model, kwargs, name)
        if value is not None and not any(value == good for good in allowed):
            raise ValueError(f"{name}={value!r} is refused: {reason}")
    _check_numbers(model, kwargs)


def _check_numbers(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Check the numbers in the arguments and in a generation config passed with them; those of numpy and torch become
    Python's, in a copy of the config."""
    config = kwargs.get("generation_config")
    if config is not None:
        settings = {name: plain(value) for name, value in vars(config).items() if name in CONFIG}
        kwargs["generation_config"] = config = copy.copy(config)
        vars(config).update(settings | checked_numbers(vars(config)))
    numbers = checked_numbers(kwargs)
    kwargs.update({name: plain(value) for name, value in kwargs.items() if name in CONFIG} | numbers)
    if setting(model, kwargs, "do_sample") and setting(model, kwargs, "temperature") == 0:
        raise ValueError("temperature=0 leaves nothing to sample; pass do_sample=False for greedy text")


def inputs_of(model: PreTrainedModel) -> set[str]:
    """The arguments of transformers' `generate` that go to the forward of `model`."""
    inner = getattr(model, "_orig_mod", model)
    functions = inner.forward, inner.prepare_inputs_for_generation
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return (names | {*CACHES}) - CONFIG - {"input_ids", "attention_mask", "labels", "kwargs", "self"}


def own_inputs(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether `kwargs` hold a prompt's inputs besides token ids, which only the model's own forward can read. Renames
    a cache to what transformers calls it.

    Raises ValueError for those that only go with others, and for a cache or embeddings that cannot be taken."""
    names = kwargs.keys() & inputs_of(model)
    if names and not any(isinstance(kwargs[name], (Tensor, Cache, list, tuple, dict)) for name in names):
        raise ValueError(f"generate() does not take {min(names)!r} without inputs such as pixel_values; leave it out")
    for name in names & {*CACHES}:
        cache = kwargs.pop(name)
        check_cache(cache)
        kwargs[cache_name()] = cache
    return bool(names)


def check_input(
    model: PreTrainedModel, input_ids: Any, mask: Any, kwargs: Mapping[str, Any], own_forward: bool
) -> None:
    """Raise ValueError for a prompt that cannot be read. Where there is none, transformers begins a text by itself."""
    embeds = kwargs.get("inputs_embeds")
    if embeds is not None and not (isinstance(embeds, Tensor) and embeds.ndim == 3 and embeds.shape[1]):
        shape = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ValueError(f"inputs_embeds is {shape}; a tensor of shape (batch, tokens, hidden size) is needed")
    if embeds is not None and input_ids is not None and input_ids.numel() and input_ids.shape != embeds.shape[:2]:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and inputs_embeds {tuple(embeds.shape)}; they must be of "
            "the same tokens, or leave out input_ids"
        )
    if input_ids is None and embeds is None and setting(model, kwargs, "bos_token_id") is None:
        raise ValueError("there is no prompt, and no bos_token_id to begin a text with; pass input_ids")
    if input_ids is not None and (embeds is None or input_ids.numel()):
        check_prompt(input_ids, None if own_forward else model.config.get_text_config().vocab_size)
    if mask is not None and input_ids is not None:
        check_mask(mask, None if own_forward else input_ids.shape)


def check_prompt(input_ids: Any, vocab_size: int | None) -> None:
    """Raise ValueError unless `input_ids` is a tensor of token ids (B, P); ids beyond a vocabulary are allowed where it
    is None: a wrapper puts an image there."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.numel() == 0:
        shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids is {shape}; a tensor of shape (batch, tokens) with at least 1 token is needed")
    if input_ids.dtype.is_floating_point or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids has dtype {input_ids.dtype}; token ids are integers")
    if vocab_size is not None and (input_ids.min() < 0 or input_ids.max() >= vocab_size):
        raise ValueError(
            f"input_ids holds ids from {int(input_ids.min())} to {int(input_ids.max())}, and the model's vocabulary "
            f"ends at {vocab_size - 1}; use the model's own tokenizer"
        )


def check_mask(mask: Tensor, shape: torch.Size | None = None) -> None:
    """Raise ValueError unless `mask` (B, P) hides padding on the left only; `shape` is that of `input_ids`, None where
    these need not name all columns."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask is a {type(mask).__name__}; pass a tensor of the shape of input_ids")
    if mask.ndim != 2 or shape not in (None, mask.shape):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} and input_ids {tuple(shape or ())}; they must agree"
        )
    keep = mask.bool()
    if not keep.any(1).all():
        raise ValueError(
            f"row {int((~keep.any(1)).nonzero()[0])} of attention_mask hides the whole prompt; unmask a token"
        )
    if not keep[:, -1].all() or (keep[:, :-1] & ~keep[:, 1:]).any():
        raise ValueError("attention_mask hides tokens behind the first visible one; pad the prompts on the left only")


class BeyondContext(UserWarning):
    """A limit beyond the context of a model."""


def check_length(model: PreTrainedModel, prompts: PromptBatch, new_tokens: int, shape: TreeShape | DynamicShape) -> int:
    """How many of `new_tokens` a text may get: all, or as many as a table of positions has room for.

    Warns where the limit is beyond the context. Raises ValueError for a prompt that fills such a table, for texts that
    cross a length at which attention changes, and where there is no memory for a limit beyond the context."""
    config, limit = model.config.get_text_config(), context_length(model)
    longest = prompts.longest
    size = f"a prompt of {longest} tokens and {new_tokens} new ones"
    if getattr(config, "attn_temperature_tuning", False) and longest + new_tokens > config.floor_scale:
        raise ValueError(
            f"{size} exceed {config.floor_scale}, from where this model scales its queries by a count that a slot "
            "cache does not keep; shorten the prompt or lower max_new_tokens"
        )
    if not rope.follows(model, longest, longest + new_tokens, shape.max_depth):
        raise ValueError(
            f"{size} (and a tree of depth {shape.max_depth}) go beyond {rope.changes_at(model)} positions, where this "
            "model's rotary embeddings change for the whole text; stay below, or use model.generate"
        )
    if limit is None or longest + new_tokens <= limit:
        return new_tokens
    if rope.is_rotary(model):
        _check_memory(model, len(prompts.ids) * (longest + new_tokens + shape.slots + 1), size)
        warnings.warn(
            f"{size} exceed the model's context of {limit}: what it was not trained for may read badly",
            BeyondContext,
            stacklevel=2,
        )
        return new_tokens
    if longest >= limit:
        raise ValueError(f"a prompt of {longest} tokens fills the model's context of {limit}; shorten the prompt")
    warnings.warn(f"{size} exceed the model's context of {limit}: the text ends there", BeyondContext, stacklevel=2)
    return limit - longest


def _check_memory(model: PreTrainedModel, slots: int, size: str) -> None:
    device, needed = model.device, slots * bytes_per_token(model)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"{size} need {needed / 1e9:,.0f} GB for keys and values, and {free / 1e9:,.0f} GB are free; lower "
            "max_new_tokens"
        )
