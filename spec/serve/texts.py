"""Many texts of one kind through a batch of few rows, as data generation, calibration and evaluation want them.

A client of the scheduler, for which all texts are alike but for their seeds. Texts are grouped by how many slots they
need, so that a long one costs the short ones nothing. Knows nothing of prompt files or templates.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..inputs.numbers import whole_number
from ..prompts import check_ids
from ..proposal import Drafter, NoDrafter
from ..stream.streamer import prompt_chunk
from ..target.load import end_ids
from ..target.selftest import attach
from ..tree import DynamicShape, TreeShape
from .job import Job
from .many import offline
from .scheduler import Scheduler
from .text_request import TextRequest


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A text to continue by at most `new_tokens` tokens, drawn with `seed`.

    `room` is the most tokens that the text, and the texts that `finish` may return after it, can have."""

    tokens: list[int]
    new_tokens: int
    seed: int
    room: int
    name: Any = None  # for the caller's use


# finish(text, generated tokens, whether the scores were NaN) may return a text to decode next, a follow-up turn say.
Finish = Callable[[Text, list[int], bool], Text | None]


@torch.inference_mode(False)
@torch.no_grad()
def decode_texts(
    model: PreTrainedModel,
    texts: Iterable[Text],
    finish: Finish,
    *,
    batch: int,
    drafter: Drafter | None = None,
    tree: TreeShape | DynamicShape | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    executor: str = "auto",
    prefill_chunk: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Continue every text, at most `batch` at a time; `finish` is called as each ends, in whatever order.

    Each text is continued as by `generate(..., seed=[text.seed])` with these settings, up to near-ties of the two best
    logits. `progress` is called with the number of tokens of each row's step; once `enough()` is true, no further text
    is begun. Raises ValueError for a text longer than the model's context and for what `generate` refuses, RuntimeError
    where a text fails for another reason than its scores.
    """
    chunk = prompt_chunk(model) if prefill_chunk is None else whole_number("prefill_chunk", prefill_chunk, 1)
    attach(model)
    texts = list(texts)
    for text in texts:
        _check(text, model)
    drafting = NoDrafter() if drafter is None else drafter
    serving = _Serving(model, finish, temperature, top_p, progress, enough)
    for group in _by_room(texts, batch):
        if enough():
            break
        serving.room = max(text.room for text in group)
        jobs = [serving.job(text) for text in group]
        how = drafting, tree or drafting.default_shape, jobs, batch, executor, chunk
        serving.run(offline(model, *how, room=serving.room), jobs)


def _check(text: Text, model: PreTrainedModel) -> None:
    check_ids(text.tokens, model, text.room - len(text.tokens), "a text")
    if text.new_tokens < 1 or text.room < len(text.tokens) + text.new_tokens:
        raise ValueError(f"a text of {len(text.tokens)} tokens to continue by {text.new_tokens} has no room")


class _Serving:
    """The texts of a call, each of which is a job of the scheduler."""

    def __init__(
        self,
        model: PreTrainedModel,
        finish: Finish,
        temperature: float,
        top_p: float,
        progress: Callable[[int], None],
        enough: Callable[[], bool],
    ):
        self.finish, self.progress, self.enough = finish, progress, enough
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
        self.ends, self.vocabulary = end_ids(model), model.config.get_text_config().vocab_size
        self.ended: list[tuple[Text, Job]] = []
        self.room = 0

    def job(self, text: Text) -> Job:
        asked = TextRequest(prompt=text.tokens, max_new_tokens=text.new_tokens, seed=text.seed, **self.sampling)
        told = 0

        def listen(job: Job) -> None:
            nonlocal told
            if job.reason != "abort":
                self.progress(len(job.tokens) - told)
                told = len(job.tokens)
                if job.reason:
                    self.ended.append((text, job))

        asked = asked.checked()
        return Job(asked, asked.for_row(text.tokens, self.ends, self.vocabulary), listen)

    def run(self, scheduler: Scheduler, jobs: list[Job]) -> None:
        """Serve `jobs` and what follows them, until all have ended."""
        try:
            for job in jobs:
                scheduler.submit(job)
            while not scheduler.idle:
                scheduler.tick()
                for text, job in self.ended:
                    if job.reason == "error" and not job.unscored:
                        raise RuntimeError(job.problem)
                    following = self.finish(text, job.tokens, job.unscored)
                    if following is not None:
                        assert following.room <= text.room, "a text that follows goes where the first one went"
                        scheduler.submit(self.job(following), first=True)
                self.ended.clear()
                if self.enough():
                    for job in [*scheduler.waiting]:
                        scheduler.cancel(job)
        finally:
            scheduler.gears.close()


def _by_room(texts: list[Text], batch: int) -> list[list[Text]]:
    """Groups of texts whose room has the same power of two; groups smaller than a batch join the next larger one."""
    groups: dict[int, list[Text]] = {}
    for text in texts:
        groups.setdefault(max(8, (text.room - 1).bit_length()), []).append(text)
    merged: list[list[Text]] = []
    for _, group in sorted(groups.items()):
        if merged and len(merged[-1]) < batch:
            merged[-1] += group
        else:
            merged.append(group)
    return merged
