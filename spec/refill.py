"""Continuous refill: many texts through few rows. A row that ends is given the next text at once.

The engine, its buffers and the step are those of `generate`; only rows that have ended are written to
between steps: their state is loaded, their slots are cleared, and their prompts are read while the other
rows wait. A text depends on its tokens and its seed alone, so what comes out is what `generate` gives for
each text by itself. Texts that need much more room than others are decoded apart from them, and when the
texts run out, the rows that are left go on in a smaller batch. Knows nothing of prompts, files or templates.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from .arguments import whole_number
from .engines.executors import Eager
from .engines.runs import RunSpec, make_engine, open_run
from .noise import row_keys
from .proposal import Drafter, NoDrafter
from .request import Request
from .rows import Arrival, Rows
from .sampling import Sampler, warpers
from .target.load import context_length, end_ids
from .target.selftest import attach
from .tree import DynamicShape, TreeShape


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A text to continue: by at most `new_tokens` tokens, drawn from stream `seed`.

    `room` is how many tokens the text and all that may follow it in this row can come to."""

    tokens: list[int]
    new_tokens: int
    seed: int
    room: int
    name: Any = None  # the caller's


# Told (text, generated tokens, whether the scores were unusable); the text that it returns goes on in the row.
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
    prefill_chunk: int = 512,
    progress: Callable[[int], None] = lambda tokens: None,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Continue every text, at most `batch` at a time; `finish` is called as each ends, in whatever order.

    What a text becomes is what `generate(..., seed=[text.seed])` makes of it with these settings, up to
    near-ties of the two best logits. `progress` hears how many tokens each step brought; once `enough()` says
    so, texts that have not begun are left out. Raises ValueError for a text beyond the model's context and
    for what `generate` refuses.
    """
    prefill_chunk = whole_number("prefill_chunk", prefill_chunk, 1)
    attach(model)
    texts = list(texts)
    context = context_length(model)
    for text in texts:
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
    """The texts that wait for a row, and those that have one."""

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
        """Hand over the texts that have ended; whether there were any."""
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
        """Give the free rows the next texts; texts of like length are read together."""
        if self.enough():
            self.waiting.clear()
        pairs = []
        for row in rows.free:
            queue = self.following or self.waiting  # what has begun goes on before anything begins
            if queue:
                pairs.append((row, queue.popleft()))
        for group in _alike(pairs):
            rows.admit({row: self._request(text, rows) for row, text in group})
            self.texts |= {rows.tickets[row]: text for row, text in group}

    def _request(self, text: Text, rows: Rows) -> Request:
        (key,) = row_keys([text.seed], 1, "cpu").tolist()
        return Request(text.tokens, text.new_tokens, tuple(key), self.ends, self.sampler.row_sampling)


def _by_room(texts: list[Text], batch: int) -> list[list[Text]]:
    """Groups by the power of two that holds a text's room; a group of less than a batch joins the next larger."""
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
    """Groups whose texts are of like length, so that reading them together wastes little on padding."""
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
    """Eager steps of an engine for `batch` of the `rows`."""
    state = rows.engine.state
    spec = replace(asked, batch=batch, capacity=state.tokens.shape[1], eos=state.eos.shape[1])
    return Eager(make_engine(model, drafter, spec, sampler))


def _sampler(temperature: float, top_p: float, rows: int, device: torch.device) -> Sampler:
    nothing = torch.zeros(rows, 0, dtype=torch.long, device=device)
    return Sampler(warpers(temperature, top_p), temperature > 0, nothing, nothing.sum(1))
