"""What `generate` refuses, in one sentence each, before any token is decoded."""

import difflib
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from .executors import NAMES
from .models import context_length
from .verify import LOSSLESS

_PASSED_ON = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "generation_config"}
_REFUSED = {
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


_WITHOUT_EFFECT = {
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "max_matching_ngram_size", "prefill_chunk_size", "num_beam_groups", "diversity_penalty",
    "length_penalty", "early_stopping", "low_memory", "compile_config", "disable_compile", "cache_config",
    "is_assistant",
}  # fmt: skip


def setting(model, kwargs: dict, name: str):
    """An argument's value: as passed, else from the generation config passed, else from the model's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    configs = (kwargs.get("generation_config"), model.generation_config)
    return next((getattr(c, name) for c in configs if getattr(c, name, None) is not None), None)


def check_arguments(model, kwargs: dict, verify: str, executor: str) -> None:
    if verify not in LOSSLESS:
        raise ValueError(f"verify={verify!r} is not a rule; choose one of {', '.join(LOSSLESS)}")
    if executor not in NAMES:
        raise ValueError(f"executor={executor!r} is not an executor; choose one of {', '.join(NAMES)}")
    if kwargs.pop("assistant_model", None) is not None:
        raise ValueError("assistant_model= is transformers' own speculation; pass the draft model as drafter=")
    known = set(GenerationConfig().to_dict()) | set(_REFUSED) | _PASSED_ON
    if not isinstance(kwargs.get("generation_config") or model.generation_config, GenerationConfig):
        raise ValueError(f"generation_config is a {type(kwargs['generation_config']).__name__}, not a GenerationConfig")
    for name in kwargs:
        if name in _WITHOUT_EFFECT and kwargs[name] is not None:
            raise ValueError(f"{name}={kwargs[name]!r} has no effect here; remove it")
        if name not in known:
            near = difflib.get_close_matches(name, [*known, "drafter", "tree", "verify", "seed"], 1)
            hint = f"did you mean {near[0]!r}" if near else "remove it"
            raise ValueError(f"generate() does not take {name!r}; {hint}")
    for name, (allowed, reason) in _REFUSED.items():
        # A checkpoint's own wish for a cache is no request of the user's.
        value = kwargs.get(name) if "cache" in name else setting(model, kwargs, name)
        if value is not None and not any(value == good for good in allowed):
            raise ValueError(f"{name}={value!r} is refused: {reason}")
    count = kwargs.get("max_new_tokens")
    if count is not None and (not isinstance(count, int) or count < 1):
        raise ValueError(f"max_new_tokens={count!r}: ask for a whole number of at least 1 token")


def check_prompt(input_ids: Tensor | None, vocab_size: int) -> None:
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


def check_mask(mask: Tensor, input_ids: Tensor) -> None:
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


def check_writable(path: str | Path) -> None:
    try:
        open(path, "a").close()
    except OSError as error:
        raise ValueError(f"trace_file {path} cannot be written ({error.strerror}); choose another place") from error


def check_length(model, prompt: Tensor, pads: Tensor, new_tokens: int, tree_depth: int) -> None:
    """Refuse texts beyond the context, and texts that cross a length at which the model's attention changes."""
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
