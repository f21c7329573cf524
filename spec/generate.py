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
    check_input,
    check_length,
    check_mask,
    check_model,
    own_inputs,
    setting,
)
from .criteria import Lockstep, ScoreBook
from .engines.executors import Executor, choose
from .engines.reuse import PromptCache, check_reuse
from .engines.runs import RunSpec, open_run
from .files import check_writable
from .inputs.numbers import check_seed, whole_number
from .inputs.prompt_batch import PromptBatch
from .loop import decode
from .noise import stream_keys
from .plan.store import automatic_shape, read_shape
from .proposal import Drafter, NoDrafter, loaded_drafter
from .request import Request
from .rows import Rows
from .sampling import Sampler
from .stream.record import StreamError
from .stream.streamer import prompt_chunk
from .target.given import GivenPrompt, cache_name, read_given
from .target.selftest import attach
from .target.slots import SlotModel
from .trace import Event, Trace
from .tree import DynamicShape, TreeShape


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """transformers' output with the trace of the run and its seed (None for greedy text without one).

    Its cache is the one that was handed in, carried on, else None: the slot cache has another layout and ends with the
    call. Scores of a row that has ended are zeros."""

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
    prefill_chunk: int | None = None,
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
    `prefill_chunk` bounds how many prompt tokens are read at a time; None is 512, or more of a streamed model, of which
    each reading takes a pass over the weights. `reuse` is a `PromptCache`: what an earlier call
    with it has read and this one begins with is not read again. `seed` is an integer (row r draws from
    stream (seed, r)) or a list of one integer per row; without one, a sampled text draws its seed from torch's
    generator, so that `torch.manual_seed` rules it, and a greedy text draws nothing. `trace_file` is a JSONL file to
    append the trace to; `on_step` is called with each step's trace events. All other arguments are those of
    `model.generate`. A prompt that is more than token ids (`inputs_embeds`, `pixel_values` and what else the model's
    forward takes, or a `DynamicCache`, which goes on) is read by the model's own forward; `reuse` does not keep it.

    With `match`, greedy text equals `model.generate`'s and sampled text equals `drafter=None` with the
    same seed, up to near-ties of the two best logits in the arithmetic of the dtype. With
    `return_dict_in_generate=True` the output is a `SpeculativeOutput` with `.trace` and `.seed`.

    Raises ValueError, in one sentence, for input that cannot be decoded as asked; StreamError, which is one, where the
    weights of a streamed model cannot be fetched: its `output` has the texts until then.
    """
    model = check_model(model)
    if isinstance(attention_mask, GenerationConfig):
        if kwargs.get("generation_config") is not None:
            raise ValueError("generation_config is given twice, by place and by name; pass one of them")
        kwargs["generation_config"], attention_mask = attention_mask, None
    if (inputs := kwargs.pop("inputs", None)) is not None:
        if input_ids is not None:
            raise ValueError("inputs and input_ids are two names of the prompt; pass one of them")
        input_ids = inputs
    if executor == "auto" and setting(model, kwargs, "disable_compile"):
        executor = "eager"
    check_arguments(model, kwargs, verify, executor)
    seed = check_seed(seed)
    prefill_chunk = prompt_chunk(model) if prefill_chunk is None else whole_number("prefill_chunk", prefill_chunk, 1)
    own_forward = own_inputs(model, kwargs)
    check_input(model, input_ids, attention_mask, kwargs, own_forward)
    check_reuse(reuse)
    attach(model)
    drafting = loaded_drafter(drafter, model)
    if trace_file is not None:
        check_writable(trace_file, appended=True)
    shape = None if isinstance(tree, str) and tree == "auto" else read_shape(tree, drafting)
    if seed is None and setting(model, kwargs, "do_sample"):
        seed = int(torch.randint(2**53, (), device="cpu"))
    running = executor, prefill_chunk, trace_file, streamer, tokenizer, on_step, reuse, own_forward
    call = _Call(drafting, shape, verify, seed, *running)
    if streamer is not None:
        kwargs["streamer"] = streamer  # transformers hands it the prompt
    if tokenizer is not None and setting(model, kwargs, "stop_strings"):
        call.stop_strings = setting(model, kwargs, "stop_strings")
        kwargs = _without_stop_strings(model, kwargs)
    return type(model).generate(model, input_ids, attention_mask=attention_mask, custom_generate=call.decode, **kwargs)


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
    reuse: PromptCache | None
    own_forward: bool  # the prompt is more than token ids
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
            check_mask(mask, None if self.own_forward else prompt.shape)
        given = None
        if self.own_forward:
            given = read_given(model, prompt, config, model_kwargs, self.drafter.traits.taps)
        batch = PromptBatch.of(prompt, mask, given)
        if self.stop_strings:
            stopping_criteria.append(StopStringCriteria(self.tokenizer, self.stop_strings))
        scores = ScoreBook(len(prompt)) if detailed and config.output_scores else None
        logits = ScoreBook(len(prompt)) if detailed and config.output_logits else None
        eos, pad = _ends(stopping_criteria, config)
        lockstep = None
        if self.streamer is not None or _asks_more(stopping_criteria):
            lockstep = Lockstep(prompt, stopping_criteria, self.streamer, pad, scores)
        keys = stream_keys(self._seeds(len(prompt)), len(prompt))
        sampler = Sampler(logits_processor, bool(config.do_sample), prompt, batch.pads)
        new_tokens = stopping_criteria.max_length - prompt.shape[1]
        if self.shape is None:
            self.shape = self._plan(model, sampler, new_tokens * len(prompt))
        new_tokens = check_length(model, batch, new_tokens, self.shape)
        sizes = len(prompt), batch.longest + new_tokens + self.shape.slots + 1, len(eos)
        keep_scores = scores is not None or logits is not None
        spec = RunSpec(self.shape, self.rule, self.executor, *sizes, keep_scores, sampler.signature)
        requests = [
            Request(text, new_tokens, key, eos, sampler.row_sampling, beside=batch.longest - len(text))
            for text, key in zip(batch.texts(), keys)
        ]
        with open_run(model, self.drafter, spec, sampler, new_tokens * len(prompt)) as executor:

            def assembled(counts: list[int]) -> Tensor:
                return batch.assembled(executor.engine.state.tokens, counts, pad).to(input_ids.device)

            trace, counts = self._run(model, executor, requests, given, lockstep, (scores, logits), assembled)
            sequences, target = assembled(counts), executor.engine.target
            assert isinstance(target, SlotModel), "open_run makes no others"
            cache = None if given is None else given.carry_on(target.cache, counts)
        if not detailed:
            return sequences
        books = [book and tuple(book.token(i) for i in range(max(counts))) for book in (scores, logits)]
        out = SpeculativeOutput(sequences=sequences, scores=books[0], logits=books[1], trace=trace, seed=self.seed)
        setattr(out, cache_name(), cache)
        return out

    def _run(
        self,
        model: PreTrainedModel,
        executor: Executor,
        requests: list[Request],
        given: GivenPrompt | None,
        lockstep: Lockstep | None,
        books: tuple[ScoreBook | None, ScoreBook | None],
        assembled: Callable[[list[int]], Tensor],
    ) -> tuple[Trace, list[int]]:
        """Decode the requests, one in each row: the trace, and how many tokens each has gained, by which the texts are
        `assembled`. What there is of them stays with a StreamError."""
        engine, trace, kept = executor.engine, Trace(), None
        if self.reuse is not None and given is None:  # which knows texts by their tokens
            kept = self.reuse.of(model, self.drafter, engine)
        if kept is not None:
            requests = [replace(request, held=kept.find(request)) for request in requests]
        try:
            rows = Rows(executor, self.prefill_chunk)
            counts = decode(rows, requests, trace, lockstep, *books, on_step=self.on_step, given=given)
        except StreamError as error:
            gained = [(event.row, len(event.committed)) for event in trace.events]
            counts = [sum(count for row, count in gained if row == each) for each in range(len(requests))]
            error.output = SpeculativeOutput(sequences=assembled(counts), trace=trace, seed=self.seed)
            if self.streamer is not None:
                self.streamer.end()
            raise
        finally:
            if self.trace_file is not None:
                trace.append_to(self.trace_file)
        if kept is not None:
            with executor.packing:
                kept.keep(engine)
        if self.streamer is not None:
            self.streamer.end()
        return trace, counts

    def _plan(self, model: PreTrainedModel, sampler: Sampler, new_tokens: int) -> TreeShape | DynamicShape:
        """The shape of the stored plan. Where that is not to speculate, drops the drafter."""
        executor = choose(self.executor, model, new_tokens, sampler.capturable, compiled_before=False)
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


def _ends(criteria: StoppingCriteriaList, config: GenerationConfig) -> tuple[tuple[int, ...], int | None]:
    """The tokens that end a text, and the one that follows in a row that has ended before others; None for that where
    rows do not end one by one."""
    ends = [criterion.eos_token_id for criterion in criteria if type(criterion) is EosTokenCriteria]
    one_by_one = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    eos = tuple(token for ids in ends for token in ids.reshape(-1).tolist())
    return eos, int(config._pad_token_tensor) if one_by_one else None


def _asks_more(criteria: StoppingCriteriaList) -> bool:
    """Whether there are criteria other than length and end of text, which the step itself handles."""
    return any(type(criterion) not in (MaxLengthCriteria, EosTokenCriteria) for criterion in criteria)
