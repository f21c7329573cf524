"""Continuous batching: many texts through a batch of few rows. A row whose text ends gets the next text at once.

Engine, buffers and step are those of `generate`. Between steps only free rows are changed: their slots are cleared and
the prompts of the next texts are read into them, while the other rows wait. A text depends on its tokens and its seed
alone, so the result is what `generate` gives for each text by itself. Texts are grouped by how many slots they need,
and when no text is waiting, the remaining rows move to a smaller batch. Knows nothing of prompt files or templates.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from .engines.executors import Eager
from .engines.runs import RunSpec, make_engine, open_run
from .inputs.numbers import whole_number
from .noise import stream_key
from .proposal import Drafter, NoDrafter
from .request import Request
from .rows import Arrival, Rows
from .sampling import Sampler, warpers
from .stream.streamer import prompt_chunk
from .target.load import context_length, end_ids
from .target.selftest import attach
from .tree import DynamicShape, TreeShape


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
    is begun. Raises ValueError for a text longer than the model's context and for what `generate` refuses.
    """
    prefill_chunk = prompt_chunk(model) if prefill_chunk is None else whole_number("prefill_chunk", prefill_chunk, 1)
    attach(model)
    texts = list(texts)
    context = context_length(model)
    vocabulary = model.config.get_text_config().vocab_size
    for text in texts:
        if text.tokens and not 0 <= min(text.tokens) <= max(text.tokens) < vocabulary:
            raise ValueError(f"a text has a token id beyond the model's vocabulary of {vocabulary}; leave it out")
        if not text.tokens or text.new_tokens < 1 or text.room < len(text.tokens) + text.new_tokens:
            raise ValueError(f"a text of {len(text.tokens)} tokens to continue by {text.new_tokens} has no room")
        if context is not None and text.room > context:
            raise ValueError(f"a text of {text.room} tokens exceeds the model's context of {context}; leave it out")
    drafter = NoDrafter() if drafter is None else drafter
    shape, ends = tree or drafter.default_shape, tuple(end_ids(model))
    for group in _by_room(texts, batch):
        if enough():
            break
        size = min(batch, len(group))
        sampler = _sampler(temperature, top_p, size, model.device)
        capacity = max(text.room for text in group) + shape.slots + 1
        asked = RunSpec(shape, "match", executor, size, capacity, len(ends), False, sampler.signature)
        new_tokens = sum(text.new_tokens for text in group)
        refill = _Refill(deque(group), sampler, ends, finish, progress, enough)
        with open_run(model, drafter, asked, sampler, new_tokens) as running:
            rows = Rows(running, prefill_chunk)
            refill.fill(rows)
            while live := rows.live:
                too_few = refill.exhausted and 2 * len(live) <= len(rows.tickets)  # for this batch
                arrivals = rows.drain() if too_few else [rows.step()]
                ended = [refill.take(rows, arrival) for arrival in arrivals]
                if any(ended):
                    refill.fill(rows)
                elif too_few:
                    rows = rows.moved(live, _narrower(model, drafter, asked, sampler, rows, len(live)))


class _Refill:
    """The texts that wait for a row, and those being decoded."""

    def __init__(
        self,
        waiting: deque[Text],
        sampler: Sampler,
        ends: tuple[int, ...],
        finish: Finish,
        progress: Callable[[int], None],
        enough: Callable[[], bool],
    ):
        self.waiting, self.sampler, self.ends = waiting, sampler, ends
        self.finish, self.progress, self.enough = finish, progress, enough
        self.following: deque[Text] = deque()
        self.texts: dict[int, Text] = {}  # [ticket]

    @property
    def exhausted(self) -> bool:
        return not self.following and not self.waiting

    def take(self, rows: Rows, arrival: Arrival) -> bool:
        """Call `finish` for the texts that have ended; returns whether there were any."""
        for report in arrival.reports.values():
            self.progress(report.committed)
        for row, report in arrival.ended.items():
            text = self.texts.pop(report.ticket)
            following = self.finish(text, rows.text(row)[len(text.tokens) :], report.failed)
            if following is not None:
                assert following.room <= text.room, "a text that follows goes where the first one went"
                self.following.append(following)
        return bool(arrival.ended)

    def fill(self, rows: Rows) -> None:
        """Admit the next texts to the free rows; texts of similar length are read together."""
        if self.enough():
            self.waiting.clear()
        pairs = []
        for row in rows.free:
            queue = self.following or self.waiting  # follow-up texts come first
            if queue:
                pairs.append((row, queue.popleft()))
        for group in _alike(pairs):
            rows.admit({row: self._request(text) for row, text in group})
            self.texts |= {rows.tickets[row]: text for row, text in group}

    def _request(self, text: Text) -> Request:
        key = stream_key(text.seed)
        return Request(text.tokens, text.new_tokens, key, self.ends, self.sampler.row_sampling)


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


def _alike(pairs: list[tuple[int, Text]]) -> list[list[tuple[int, Text]]]:
    """Groups of texts of similar length, so that reading them together needs little padding."""
    groups: list[list[tuple[int, Text]]] = []
    for pair in sorted(pairs, key=lambda pair: len(pair[1].tokens)):
        if groups and len(pair[1].tokens) <= 1.25 * len(groups[-1][0][1].tokens) + 8:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return groups


def _narrower(
    model: PreTrainedModel, drafter: Drafter, asked: RunSpec, sampler: Sampler, rows: Rows, batch: int
) -> Eager:
    """An eager executor of an engine for `batch` of the `rows`, with the same capacity."""
    state = rows.engine.state
    spec = replace(asked, batch=batch, capacity=state.tokens.shape[1], eos=state.eos.shape[1])
    return Eager(make_engine(model, drafter, spec, sampler))


def _sampler(temperature: float, top_p: float, rows: int, device: torch.device) -> Sampler:
    nothing = torch.zeros(rows, 0, dtype=torch.long, device=device)
    return Sampler(warpers(temperature, top_p), temperature > 0, nothing, nothing.sum(1))
