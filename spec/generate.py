"""`generate`: a drop-in for `model.generate` whose text is the target's own.

transformers prepares the generation config, the logits processors and the stopping criteria, exactly as
for its own loop; then our loop decodes. What cannot be done is refused in one sentence before any
token is decoded.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .arguments import check_arguments, check_length, check_prompt, check_writable, setting
from .attach import attach
from .lockstep import Lockstep, ScoreBook
from .loop import decode
from .noise import row_keys
from .proposal import DraftRequest, DraftSampling, NoDrafter
from .sampling import Sampler
from .slots import SlotModel
from .state import DecodeState
from .step import Engine
from .trace import Trace
from .tree import TreeShape


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """transformers' output with the trace of the run. `past_key_values` is None: the slot cache is laid
    out by slot and ends with the call. Scores of a row that has ended are zeros."""

    trace: Trace | None = None


@torch.no_grad()
def generate(
    model,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    drafter: Any = None,
    tree: Any = None,
    verify: str = "match",
    seed: int | list[int] = 0,
    executor: str = "eager",
    trace_file: str | Path | None = None,
    streamer=None,
    tokenizer=None,
    on_step=None,
    **kwargs,
) -> Tensor | SpeculativeOutput:
    """Decode with speculation; returns what `model.generate` returns.

    `input_ids` and `attention_mask` are (B, P), padded on the left. `drafter` is a drafter object, a
    name or folder for `load_drafter`, or None for plain autoregressive decoding by the same code. `tree`
    is the shape to draft: "chain:5", "4x2x1", a list of parents or a `TreeShape`; None takes the
    drafter's own. `verify` is "match" (default), "residual" or "typical". `seed` is an integer (row r
    draws from stream (seed, r)) or a list of one integer per row. `trace_file` is a JSONL file to append
    the trace to; `on_step` is called with each step's trace events. All other arguments are those of
    `model.generate`.

    With `match`, greedy text equals `model.generate`'s and sampled text equals `drafter=None` with the
    same seed, up to near-ties of the two best logits in the arithmetic of the dtype. With
    `return_dict_in_generate=True` the output is a `SpeculativeOutput` with `.trace`.

    Raises ValueError, in one sentence, for input that cannot be decoded as asked.
    """
    check_arguments(model, kwargs, verify, executor)
    check_prompt(input_ids, attention_mask)
    if isinstance(drafter, (str, Path)):
        from .. import load_drafter

        drafter = load_drafter(drafter, model)
    drafter = NoDrafter() if drafter is None else drafter
    if trace_file is not None:
        check_writable(trace_file)
    shape = drafter.default_shape if tree is None else TreeShape.parse(tree)
    attach(model)
    run = _Run(drafter, shape, verify, seed, trace_file, streamer, tokenizer, on_step)
    if streamer is not None:
        kwargs["streamer"] = streamer  # transformers hands it the prompt
    if tokenizer is not None and setting(model, kwargs, "stop_strings"):
        run.stop_strings = setting(model, kwargs, "stop_strings")
        kwargs = _without_stop_strings(model, kwargs)
    return type(model).generate(
        model, input_ids, attention_mask=attention_mask, custom_generate=run.decode, **kwargs
    )


class _Run:
    """One call of generate, between transformers' preparation and our loop."""

    def __init__(self, drafter, shape, rule, seed, trace_file, streamer, tokenizer, on_step):
        self.drafter, self.shape, self.rule = drafter, shape, rule
        self.seed = [int(own) for own in seed] if isinstance(seed, (list, tuple)) else int(seed)
        self.trace_file, self.streamer, self.tokenizer, self.on_step = (
            trace_file,
            streamer,
            tokenizer,
            on_step,
        )
        self.stop_strings = None

    def decode(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
    ):
        config = generation_config
        prompt = input_ids.to(model.device)
        pads = _left_padding(prompt, model_kwargs.get("attention_mask"))
        new_tokens = stopping_criteria.max_length - prompt.shape[1]
        check_length(model, prompt, pads, new_tokens)
        if self.stop_strings:
            stopping_criteria.append(StopStringCriteria(self.tokenizer, self.stop_strings))
        engine = self._engine(model, prompt, pads, new_tokens, logits_processor, stopping_criteria, config)

        detailed = config.return_dict_in_generate
        scores = ScoreBook(len(prompt)) if detailed and config.output_scores else None
        logits = ScoreBook(len(prompt)) if detailed and config.output_logits else None
        eos_pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        pad = int(config._pad_token_tensor) if eos_pads else None
        lockstep = None
        if self.streamer is not None or _asks_more(stopping_criteria):
            lockstep = Lockstep(prompt, stopping_criteria, self.streamer, pad, scores)
        trace = Trace()
        try:
            counts = decode(engine, prompt, pads, trace, lockstep, scores, logits, self.on_step)
        finally:
            if self.trace_file is not None:
                trace.append_to(self.trace_file)
        if self.streamer is not None:
            self.streamer.end()
        sequences = _assemble(prompt, pads, engine.state.tokens, counts, pad).to(input_ids.device)
        if not detailed:
            return sequences
        width = range(max(counts))
        return SpeculativeOutput(
            sequences=sequences,
            scores=None if scores is None else tuple(scores.token(i) for i in width),
            logits=None if logits is None else tuple(logits.token(i) for i in width),
            trace=trace,
        )

    def _engine(self, model, prompt, pads, new_tokens, processors, criteria, config) -> Engine:
        batch, vocab = len(prompt), model.config.get_text_config().vocab_size
        if self.drafter.vocab_size not in (None, vocab):
            raise ValueError(
                f"drafter {self.drafter.name!r} has a vocabulary of {self.drafter.vocab_size} tokens and the target "
                f"one of {vocab}; use a drafter made for this target's tokenizer"
            )
        if isinstance(self.seed, list) and len(self.seed) != batch:
            raise ValueError(
                f"seed has {len(self.seed)} entries for {batch} rows; give one integer or one per row"
            )
        sampler = Sampler(processors, bool(config.do_sample), prompt, pads)
        # The text, the tree behind it, and the slot for padding, in whole 64s so that shapes are few.
        capacity = -(-(prompt.shape[1] + new_tokens + len(self.shape) + 1) // 64) * 64
        eos = [criterion.eos_token_id for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
        state = DecodeState.from_prompt(
            prompt,
            pads,
            new_tokens,
            capacity,
            row_keys(self.seed, batch, prompt.device),
            torch.cat([prompt.new_zeros(0), *(ids.reshape(-1).to(prompt) for ids in eos)]),
        )
        draw = "none" if not sampler.do_sample else "shared" if self.rule == "match" else "own"
        sampling = DraftSampling(sampler.temperature, draw)
        request = DraftRequest(batch, capacity, vocab, prompt.device, self.shape, sampling)
        session = self.drafter.open(request)
        return Engine(state, SlotModel(model, capacity), session, sampler, self.rule)


def _without_stop_strings(model, kwargs: dict) -> dict:
    """transformers does not pass the tokenizer on to a custom loop, so the strings are kept from it."""
    config = copy.deepcopy(kwargs.get("generation_config") or model.generation_config)
    config.stop_strings = None
    return {**kwargs, "generation_config": config, "stop_strings": None}


def _left_padding(prompt: Tensor, mask: Tensor | None) -> Tensor:
    """How many tokens of each row are left padding, (B,)."""
    if mask is None:
        return prompt.new_zeros(len(prompt))
    check_prompt(prompt, mask)  # also the mask that transformers made from pad tokens
    return mask.to(prompt.device).bool().to(torch.int8).argmax(1)


def _asks_more(criteria) -> bool:
    """Whether there are criteria beside length and end of text, which the step handles itself."""
    return any(type(criterion) not in (MaxLengthCriteria, EosTokenCriteria) for criterion in criteria)


def _assemble(prompt: Tensor, pads: Tensor, tokens: Tensor, counts: list[int], pad: int | None) -> Tensor:
    """The batch as transformers returns it: (B, P + longest), ended rows padded on the right."""
    width = prompt.shape[1]
    out = prompt.new_full((len(prompt), width + max(counts)), 0 if pad is None else pad)
    out[:, :width] = prompt
    for row, count in enumerate(counts):
        start = width - int(pads[row])
        out[row, width : width + count] = tokens[row, start : start + count]
    return out
