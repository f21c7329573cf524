"""`generate`: a drop-in for `model.generate` whose text is the target's own.

The way of a call:

    generate(model, ...)                  checks the arguments, finds the drafter and the tree
      model.generate(custom_generate=)    transformers prepares its config, logits processors and stopping criteria,
        _Call.decode                      exactly as for its own loop, and hands them over
          open_run                        an engine: target, drafter session, state, sampler; kept or made (engines/)
          loop.decode                     one request in each row
            Rows.admit, Rows.step ...     prompts are read, then steps until all rows have ended (rows.py, step.py)

What cannot be done is refused in one sentence before any token is decoded.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .arguments import (
    check_arguments,
    check_length,
    check_mask,
    check_model,
    check_prompt,
    check_seed,
    setting,
    whole_number,
)
from .criteria import Lockstep, ScoreBook
from .engines.executors import choose
from .engines.reuse import PromptCache, check_reuse
from .engines.runs import RunSpec, open_run
from .files import check_writable
from .loop import decode
from .noise import stream_keys
from .plan.store import automatic_shape, read_shape
from .proposal import Drafter, NoDrafter, check_drafter
from .request import Request
from .rows import Rows
from .sampling import Sampler
from .target.selftest import attach
from .trace import Event, Trace
from .tree import DynamicShape, TreeShape


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """transformers' output with the trace of the run and its seed (None for greedy text without one).

    It has no `past_key_values`: the slot cache has another layout and ends with the call. Scores of a row that has
    ended are zeros."""

    trace: Trace | None = None
    seed: int | list[int] | None = None


@torch.inference_mode(False)  # kept buffers are also used by calls outside of inference mode
@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | GenerationConfig | None = None,
    *,
    drafter: Drafter | PreTrainedModel | str | Path | None = None,
    tree: TreeShape | DynamicShape | Sequence[int] | str | Path | None = None,
    verify: str = "match",
    seed: int | list[int] | None = None,
    executor: str = "auto",
    prefill_chunk: int = 512,
    reuse: PromptCache | None = None,
    trace_file: str | Path | None = None,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_step: Callable[[list[Event]], None] | None = None,
    **kwargs: Any,
) -> Tensor | SpeculativeOutput:
    """Decode with speculation; returns what `model.generate` returns.

    `input_ids` and `attention_mask` are (B, P), padded on the left; a GenerationConfig may stand in the mask's place,
    where transformers has it. `drafter` is a drafter object, a causal LM, a name or folder for `load_drafter` (kept
    loaded with the model), or None for plain autoregressive decoding by the same code. `tree`
    is the shape to draft: "chain:5", "4x2x1", a list of parents, a planned file (.json), a `TreeShape`, or
    "auto" for the plan kept by `paceline plan`; None takes the drafter's own. `verify` is "match" (default),
    "residual" or "typical". `executor` is "eager", "compiled", "cuda_graph" (the better of "cuda_graph_eager" and
    "cuda_graph_compiled" on this GPU) or "auto": "cuda_graph" on CUDA; on a CPU "compiled" where the step is compiled
    already or a long call has gone on for half a minute, else "eager".
    `prefill_chunk` bounds how many prompt tokens are read at a time. `reuse` is a `PromptCache`: what an earlier call
    with it has read and this one begins with is not read again. `seed` is an integer (row r draws from
    stream (seed, r)) or a list of one integer per row; without one, a sampled text draws its seed from torch's
    generator, so that `torch.manual_seed` rules it, and a greedy text draws nothing. `trace_file` is a JSONL file to
    append the trace to; `on_step` is called with each step's trace events. All other arguments are those of
    `model.generate`.

    With `match`, greedy text equals `model.generate`'s and sampled text equals `drafter=None` with the
    same seed, up to near-ties of the two best logits in the arithmetic of the dtype. With
    `return_dict_in_generate=True` the output is a `SpeculativeOutput` with `.trace` and `.seed`.

    Raises ValueError, in one sentence, for input that cannot be decoded as asked.
    """
    model = check_model(model)
    if isinstance(attention_mask, GenerationConfig):
        if kwargs.get("generation_config") is not None:
            raise ValueError("generation_config is given twice, by place and by name; pass one of them")
        kwargs["generation_config"], attention_mask = attention_mask, None
    check_arguments(model, kwargs, verify, executor)
    prefill_chunk, seed = whole_number("prefill_chunk", prefill_chunk, 1), check_seed(seed)
    input_ids = check_prompt(input_ids, model.config.get_text_config().vocab_size)
    if attention_mask is not None:
        check_mask(attention_mask, input_ids)
    check_reuse(reuse)
    attach(model)
    drafting = _drafter(drafter, model)
    if trace_file is not None:
        check_writable(trace_file, appended=True)
    shape = None if isinstance(tree, str) and tree == "auto" else read_shape(tree, drafting)
    if seed is None and setting(model, kwargs, "do_sample"):
        seed = int(torch.randint(2**53, (), device="cpu"))
    call = _Call(
        drafting, shape, verify, seed, executor, prefill_chunk, trace_file, streamer, tokenizer, on_step, reuse
    )
    if streamer is not None:
        kwargs["streamer"] = streamer  # transformers hands it the prompt
    if tokenizer is not None and setting(model, kwargs, "stop_strings"):
        call.stop_strings = setting(model, kwargs, "stop_strings")
        kwargs = _without_stop_strings(model, kwargs)
    out = type(model).generate(model, input_ids, attention_mask=attention_mask, custom_generate=call.decode, **kwargs)
    if isinstance(out, SpeculativeOutput):
        out.seed = seed
    return out


def _drafter(drafter: Any, model: PreTrainedModel) -> Drafter:
    """The drafter object that `drafter` stands for. Raises ValueError for anything else."""
    if drafter is None:
        return NoDrafter()
    if not isinstance(drafter, (str, Path, torch.nn.Module)):
        return check_drafter(drafter)
    return import_module("..drafters.kept", __package__).kept_drafter(drafter, model)


@dataclass
class _Call:
    """The settings of one call of `generate`; transformers calls its `decode` in place of its own loop."""

    drafter: Drafter
    shape: TreeShape | DynamicShape | None  # None: that of the stored plan
    rule: str
    seed: int | list[int] | None
    executor: str
    prefill_chunk: int
    trace_file: str | Path | None
    streamer: BaseStreamer | None
    tokenizer: PreTrainedTokenizerBase | None
    on_step: Callable[[list[Event]], None] | None
    reuse: PromptCache | None = None
    stop_strings: str | list[str] | None = None

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        config, detailed = generation_config, generation_config.return_dict_in_generate
        prompt = input_ids.to(model.device).long()
        mask = model_kwargs.get("attention_mask")
        if mask is not None:  # maybe made by transformers, from pad tokens
            check_mask(mask, prompt)
        pads = _left_padding(prompt, mask)
        new_tokens = stopping_criteria.max_length - prompt.shape[1]
        if self.stop_strings:
            stopping_criteria.append(StopStringCriteria(self.tokenizer, self.stop_strings))
        scores = ScoreBook(len(prompt)) if detailed and config.output_scores else None
        logits = ScoreBook(len(prompt)) if detailed and config.output_logits else None
        ends = [criterion.eos_token_id for criterion in stopping_criteria if type(criterion) is EosTokenCriteria]
        one_by_one = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        pad = int(config._pad_token_tensor) if one_by_one else None
        lockstep = None
        if self.streamer is not None or _asks_more(stopping_criteria):
            lockstep = Lockstep(prompt, stopping_criteria, self.streamer, pad, scores)

        eos = tuple(token for ids in ends for token in ids.reshape(-1).tolist())
        keys = stream_keys(self._seeds(len(prompt)), len(prompt))
        sampler = Sampler(logits_processor, bool(config.do_sample), prompt, pads)
        if self.shape is None:
            self.shape = self._plan(model, sampler, new_tokens * len(prompt))
        check_length(model, prompt, pads, new_tokens, self.shape.max_depth)
        slots = prompt.shape[1] + new_tokens + self.shape.slots + 1
        keep_scores = scores is not None or logits is not None
        sizes = len(prompt), slots, len(eos)
        spec = RunSpec(self.shape, self.rule, self.executor, *sizes, keep_scores, sampler.signature)
        texts = [row[pad:] for row, pad in zip(prompt.tolist(), pads.tolist())]
        requests = [Request(text, new_tokens, key, eos, sampler.row_sampling) for text, key in zip(texts, keys)]
        trace, books = Trace(), (scores, logits)
        with open_run(model, self.drafter, spec, sampler, new_tokens * len(prompt)) as executor:
            kept = None if self.reuse is None else self.reuse.of(model, self.drafter, executor.engine)
            if kept is not None:
                requests = [replace(request, held=kept.find(request.tokens)) for request in requests]
            try:
                rows = Rows(executor, self.prefill_chunk)
                counts = decode(rows, requests, trace, lockstep, *books, on_step=self.on_step)
            finally:
                if self.trace_file is not None:
                    trace.append_to(self.trace_file)
            if kept is not None:
                kept.keep(executor.engine)
            if self.streamer is not None:
                self.streamer.end()
            sequences = _assemble(prompt, pads, executor.engine.state.tokens, counts, pad).to(input_ids.device)
        if not detailed:
            return sequences
        written = [None if book is None else tuple(book.token(i) for i in range(max(counts))) for book in books]
        return SpeculativeOutput(sequences=sequences, scores=written[0], logits=written[1], trace=trace)

    def _plan(self, model: PreTrainedModel, sampler: Sampler, new_tokens: int) -> TreeShape:
        """The shape of the stored plan. Where that is not to speculate, drops the drafter."""
        executor = choose(self.executor, model.device, new_tokens, sampler.capturable, compiled_before=False)
        temperature = sampler.temperature if sampler.do_sample else 0.0
        shape = automatic_shape(model, self.drafter, executor, self.rule, temperature)
        if len(shape) == 1:
            self.drafter = NoDrafter()
        return shape

    def _seeds(self, rows: int) -> int | list[int]:
        if isinstance(self.seed, list) and len(self.seed) != rows:
            raise ValueError(f"seed has {len(self.seed)} entries for {rows} rows; give one integer or one per row")
        return 0 if self.seed is None else self.seed  # a greedy text draws nothing


def _without_stop_strings(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` without stop strings, which transformers cannot handle here: it passes a custom loop no tokenizer."""
    config = copy.deepcopy(kwargs.get("generation_config") or model.generation_config)
    config.stop_strings = None
    return {**kwargs, "generation_config": config, "stop_strings": None}


def _left_padding(prompt: Tensor, mask: Tensor | None) -> Tensor:
    """How many tokens of each row are left padding, (B,)."""
    if mask is None:
        return prompt.new_zeros(len(prompt))
    return mask.to(prompt.device).bool().to(torch.int8).argmax(1)


def _asks_more(criteria: StoppingCriteriaList) -> bool:
    """Whether there are criteria other than length and end of text, which the step itself handles."""
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
