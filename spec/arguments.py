"""Checks of `generate`'s arguments: each raises ValueError, in one sentence, before any token is decoded."""

import difflib
import math
import operator
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .engines.executors import executor_names
from .target.load import context_length
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
    "cache": ({None}, "the slot cache is always used; leave it out"),
    "past_key_values": ({None}, "the slot cache is always used; leave it out"),
    "cache_implementation": ({None}, "the slot cache is always used; leave it out"),
    "token_healing": ({None, False}, "token healing is not supported; use model.generate for it"),
    "output_attentions": ({None, False}, "attentions are not collected; use model.generate for them"),
    "output_hidden_states": ({None, False}, "hidden states are not collected; use model.generate for them"),
    "constraints": ({None}, "constrained beam search is not supported; use model.generate for it"),
    "force_words_ids": ({None}, "constrained beam search is not supported; use model.generate for it"),
    "use_cache": ({None, True}, "decoding without a cache is not supported; leave it out"),
}


# Arguments that are whole numbers, with the least allowed value.
_WHOLE: Mapping[str, int] = MappingProxyType(
    {
        "max_new_tokens": 1,
        "max_length": 1,
        "min_new_tokens": 0,
        "min_length": 0,
        "num_return_sequences": 1,
        "top_k": 0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
    }
)
# Arguments that are real numbers, with the least and the largest allowed value.
_REAL: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "temperature": (0.0, math.inf),
        "top_p": (0.0, 1.0),
        "top_h": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "typical_p": (0.0, 1.0),
        "epsilon_cutoff": (0.0, 1.0),
        "eta_cutoff": (0.0, 1.0),
        "repetition_penalty": (0.0, math.inf),
        "encoder_repetition_penalty": (0.0, math.inf),
        "max_time": (0.0, math.inf),
    }
)

WITHOUT_EFFECT = {
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "max_matching_ngram_size", "prefill_chunk_size", "num_beam_groups", "diversity_penalty",
    "length_penalty", "early_stopping", "low_memory", "compile_config", "disable_compile", "cache_config",
    "is_assistant",
}  # fmt: skip


def setting(model: PreTrainedModel, kwargs: Mapping[str, Any], name: str) -> Any:
    """The value of argument `name`: from `kwargs`, else the generation config in them, else the model's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    configs = (kwargs.get("generation_config"), model.generation_config)
    return next((getattr(c, name) for c in configs if getattr(c, name, None) is not None), None)


def check_model(model: Any, role: str = "model") -> PreTrainedModel:
    """`model` without a torch.compile wrapper. Raises ValueError unless it is a causal LM of transformers; `role` names
    the argument in the message."""
    while isinstance(model, torch.nn.Module) and "_orig_mod" in model._modules:
        model = model._orig_mod
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


def check_arguments(model: PreTrainedModel, kwargs: dict[str, Any], verify: str, executor: str) -> None:
    """Raise ValueError for arguments that `generate` does not support; makes numbers in `kwargs` int or float."""
    check_rule(verify)
    if executor not in (names := executor_names()):
        raise ValueError(f"executor={executor!r} is not an executor; choose one of {', '.join(names)}")
    if kwargs.pop("assistant_model", None) is not None:
        raise ValueError("assistant_model= is transformers' own speculation; pass the draft model as drafter=")
    known = set(GenerationConfig().to_dict()) | set(_REFUSED) | _PASSED_ON
    if not isinstance(kwargs.get("generation_config") or model.generation_config, GenerationConfig):
        raise ValueError(f"generation_config is a {type(kwargs['generation_config']).__name__}, not a GenerationConfig")
    for name in kwargs:
        if name in WITHOUT_EFFECT and kwargs[name] is not None:
            raise ValueError(f"{name}={kwargs[name]!r} has no effect here; remove it")
        if name not in known:
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
    """Check the numbers in the arguments and in a generation config passed with them."""
    config = kwargs.get("generation_config")
    _numbers({} if config is None else vars(config))
    kwargs.update(_numbers(kwargs))
    if setting(model, kwargs, "do_sample") and setting(model, kwargs, "temperature") == 0:
        raise ValueError("temperature=0 leaves nothing to sample; pass do_sample=False for greedy text")


def _numbers(values: Mapping[str, Any]) -> dict[str, int | float]:
    """The numeric arguments in `values`, checked and converted to int and float."""
    given = {name: value for name, value in values.items() if value is not None}
    whole = {name: whole_number(name, given[name], _WHOLE[name]) for name in given.keys() & _WHOLE.keys()}
    return whole | {name: _real_number(name, given[name], *_REAL[name]) for name in given.keys() & _REAL.keys()}


def whole_number(name: str, value: Any, least: int) -> int:
    """`value`, an integer of Python, numpy or torch, as an int. Raises ValueError for one below `least` and for
    anything else, True and False included."""
    number = _index(value)
    if number is None or number < least:
        unit = " token" if least == 1 and "tokens" in name else ""
        raise ValueError(
            f"{name}={value!r} is not a whole number of at least {least}{unit}; pass such a number, or leave it out"
        )
    return number


def _real_number(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = math.nan if _is_bool(value) or isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not low <= number <= high or number == math.inf:
        bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name}={value!r} is not a number {bounds}; pass such a number, or leave it out")
    return number


def check_seed(seed: Any) -> int | list[int] | None:
    """The seed as int, list of int or None. Raises ValueError for anything else."""
    if seed is None:
        return None
    several = isinstance(seed, (list, tuple)) or getattr(seed, "ndim", 0) == 1
    parts = list(seed) if several else [seed]
    numbers = [number for number in map(_index, parts) if number is not None]
    if len(numbers) < len(parts):
        raise ValueError(
            f"seed={seed!r} is neither an integer nor a list of integers; pass one, one for each row, or leave it out"
        )
    return numbers if several else numbers[0]


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _index(value: Any) -> int | None:
    """`value` as an int; None where it is no integer, and for True and False."""
    try:
        return None if _is_bool(value) else operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        return None


def check_prompt(input_ids: Tensor | None, vocab_size: int) -> Tensor:
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.numel() == 0:
        shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids is {shape}; a tensor of shape (batch, tokens) with at least 1 token is needed")
    if input_ids.dtype.is_floating_point or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids has dtype {input_ids.dtype}; token ids are integers")
    if input_ids.min() < 0 or input_ids.max() >= vocab_size:
        raise ValueError(
            f"input_ids holds ids from {int(input_ids.min())} to {int(input_ids.max())}, and the model's vocabulary "
            f"ends at {vocab_size - 1}; use the model's own tokenizer"
        )
    return input_ids


def check_mask(mask: Tensor, input_ids: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask is a {type(mask).__name__}; pass a tensor of the shape of input_ids")
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} and input_ids {tuple(input_ids.shape)}; they must agree"
        )
    keep = mask.bool()
    if not keep.any(1).all():
        raise ValueError(
            f"row {int((~keep.any(1)).nonzero()[0])} of attention_mask hides the whole prompt; unmask a token"
        )
    if not keep[:, -1].all() or (keep[:, :-1] & ~keep[:, 1:]).any():
        raise ValueError("attention_mask hides tokens behind the first visible one; pad the prompts on the left only")


def check_length(model: PreTrainedModel, prompt: Tensor, pads: Tensor, new_tokens: int, tree_depth: int) -> None:
    """Raise ValueError for texts longer than the context, or that cross a length at which its attention changes."""
    config = model.config.get_text_config()
    limit = context_length(model)
    shortest, longest = int(prompt.shape[1] - pads.max()), int(prompt.shape[1] - pads.min())
    size = f"a prompt of {longest} tokens and {new_tokens} new ones"
    if limit is not None and longest + new_tokens > limit:
        raise ValueError(f"{size} exceed the model's context of {limit}; shorten the prompt or lower max_new_tokens")
    if getattr(config, "attn_temperature_tuning", False) and longest + new_tokens > config.floor_scale:
        raise ValueError(
            f"{size} exceed {config.floor_scale}, from where this model scales its queries by a count that a slot "
            "cache does not keep; shorten the prompt or lower max_new_tokens"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    short = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    dynamic = rope.get("rope_type") in ("longrope", "dynamic")
    if dynamic and short and shortest <= short < longest + new_tokens + tree_depth:
        raise ValueError(
            f"{size} with a tree of depth {tree_depth} cross {short} positions, where this model's rotary embedding "
            "changes for the whole text; stay on one side of it"
        )
