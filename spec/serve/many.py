"""`generate_many`: the texts of many requests, each with settings of its own, through a batch of few rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..arguments import check_executor, check_length, check_model
from ..inputs.numbers import whole_number
from ..inputs.prompt_batch import PromptBatch
from ..plan.store import read_shape
from ..prompts import check_ids, check_known
from ..proposal import Drafter, loaded_drafter
from ..stream.record import StreamError
from ..stream.streamer import prompt_chunk
from ..target.load import end_ids
from ..target.selftest import attach
from ..tree import TreeShape
from .gears import Gears, Shape
from .job import Job, TokenLogprobs
from .lanes import Lane
from .running_text import RunningText
from .scheduler import Scheduler, run
from .text_request import TextRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEEP = TreeShape.chain(16)  # no tree that is drafted in a batch is deeper
LANE_ROWS = 8  # prompts that are read together, at most


@dataclass(frozen=True, slots=True)
class TextResult:
    """What became of a request. `reason` is stop (an end of text, or a stop string), length, or error."""

    tokens: list[int]  # the new ones
    text: str | None  # of these, up to a stop string; None without a tokenizer
    reason: str
    problem: str  # of an error, in a sentence
    seed: int
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    steps: int
    drafted: int  # tokens that were drafted, and how many of them are in the text
    accepted: int


@torch.inference_mode(False)
@torch.no_grad()
def generate_many(
    model: PreTrainedModel,
    requests: Iterable[TextRequest | Mapping[str, Any]],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    drafter: Drafter | PreTrainedModel | str | Path | None = None,
    tree: Any = None,
    rows: int = 8,
    executor: str = "auto",
    prefill_chunk: int | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> list[TextResult]:
    """The results of `requests`, in their order; each is a `TextRequest`, or a mapping of its fields.

    At most `rows` texts are decoded at a time, and a row whose text ends gets the next request at once. Each text is
    what `generate` gives for the request alone with its seed, whatever is decoded beside it, up to near-ties of the two
    best logits. A `tokenizer` is needed for prompts and stop strings that are texts. `drafter`, `tree`, `executor` and
    `prefill_chunk` are those of `generate`. `on_tokens` is called with a request's index and all its new tokens
    whenever there are more.

    Raises ValueError, in one sentence, before anything is decoded, for a request that cannot be served; StreamError
    where the weights of a streamed model cannot be fetched: its `output` has the results until then."""
    model = check_model(model)
    attach(model)
    rows = whole_number("rows", rows, 1)
    check_executor(executor)
    drafting = loaded_drafter(drafter, model)
    shape = read_shape(tree, drafting)
    jobs = []
    for index, request in enumerate(requests):
        listener = None if on_tokens is None else lambda job, index=index: job.tokens and on_tokens(index, job.tokens)
        jobs.append(make_job(model, tokenizer, request, listener, f"request {index}: "))
    if jobs:
        chunk = prompt_chunk(model) if prefill_chunk is None else whole_number("prefill_chunk", prefill_chunk, 1)
        scheduler = offline(model, drafting, shape, jobs, rows, executor, chunk)
        try:
            run(scheduler, jobs)
        except StreamError as error:
            error.output = results_of(jobs)
            raise
        finally:
            scheduler.gears.close()
    return results_of(jobs)


def results_of(jobs: Sequence[Job]) -> list[TextResult]:
    """What has become of jobs so far; `reason` is "" where a job has not ended."""
    return [
        TextResult(
            job.tokens, job.text, job.reason, job.problem, job.seed, job.logprobs, job.prompt_logprobs, job.steps,
            job.drafted, job.accepted,
        )
        for job in jobs
    ]  # fmt: skip


def offline(
    model: PreTrainedModel,
    drafter: Drafter,
    shape: Shape,
    jobs: Sequence[Job],
    rows: int,
    executor: str,
    chunk: int,
    room: int = 0,
) -> Scheduler:
    """A scheduler for `jobs`, which are all known: prompts are read several at a time, and whole. Texts have `room` for
    so many tokens, if that is more than the jobs need."""
    room = max(room, *(len(job.request.tokens) + job.request.new_tokens for job in jobs))
    most, new_tokens = min(rows, len(jobs)), sum(job.request.new_tokens for job in jobs)
    kind = reduce(or_, (job.kind for job in jobs))
    gears = Gears(model, drafter, room, most, chunk, executor, new_tokens=new_tokens, kinds=[kind])
    lane = Lane(gears.lane_engine(min(most, LANE_ROWS), shape), chunk)
    return Scheduler(gears, [lane], lambda live: shape, steady=1)  # rows only become fewer, once no job waits


def make_job(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase | None",
    request: TextRequest | Mapping[str, Any],
    listener: Callable[[Job], None] | None = None,
    name: str = "",
) -> Job:
    """A job of a request. Raises ValueError, which begins with `name`, for one that cannot be served."""
    try:
        asked = (request if isinstance(request, TextRequest) else _read(request)).checked()
        if tokenizer is None and (asked.stop or str in (type(asked.prompt), type(asked.prediction))):
            raise ValueError("a prompt or a stop string that is text needs a tokenizer; pass tokenizer=")
        tokens, predicted = _tokens("prompt", asked.prompt, tokenizer), list[int]()
        if asked.prediction:
            predicted = _tokens("prediction", asked.prediction, tokenizer, add_special_tokens=False)
        check_ids(tokens, model, asked.max_new_tokens, "prompt")
        if predicted:
            check_known(predicted, model, "prediction")
        vocabulary = model.config.get_text_config().vocab_size
        batch = PromptBatch.of(torch.tensor([tokens]), None, None)
        check_length(model, batch, asked.max_new_tokens, DEEP)
        running = None if tokenizer is None else RunningText(tokenizer, asked.stop)
        return Job(asked, asked.for_row(tokens, end_ids(model), vocabulary, predicted), listener, running)
    except ValueError as error:
        raise ValueError(f"{name}{error}") from None


def _read(request: Mapping[str, Any]) -> TextRequest:
    known = TextRequest.__dataclass_fields__
    unknown = [name for name in request if name not in known]
    if unknown or "prompt" not in request:
        what = f"does not take {unknown[0]!r}" if unknown else "needs a prompt"
        raise ValueError(f"a request {what}; its fields are {', '.join(known)}")
    return TextRequest(**request)


def _tokens(name: str, prompt: Any, tokenizer: "PreTrainedTokenizerBase | None", **how: Any) -> list[int]:
    if isinstance(prompt, str):
        assert tokenizer is not None, "its absence was told before"
        return list(tokenizer(prompt, **how)["input_ids"])
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or not all(isinstance(token, int) for token in prompt):
        raise ValueError(f"{name} is a {type(prompt).__name__}; pass a text or a list of token ids")
    return list(prompt)
