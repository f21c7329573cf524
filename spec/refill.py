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
from torch import Tensor

from .arguments import whole_number
from .attach import attach
from .executors import Eager
from .loop import Readout, run_steps
from .models import context_length, end_ids
from .noise import row_keys
from .proposal import NoDrafter
from .runs import RunSpec, make_engine, open_run
from .sampling import Sampler, warpers
from .step import Engine
from .tree import TreeShape


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
    model,
    texts: Iterable[Text],
    finish: Finish,
    *,
    batch: int,
    drafter=None,
    tree: TreeShape | None = None,
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
    shape = tree or drafter.default_shape
    ends = torch.tensor(end_ids(model), dtype=torch.long, device=model.device)
    for group in _by_room(texts, batch):
        if enough():
            break
        rows = min(batch, len(group))
        sampler = _sampler(temperature, top_p, rows, model.device)
        capacity = max(text.room for text in group) + shape.slots + 1
        what = shape, "match", executor, rows, capacity, len(ends), False, sampler.signature
        asked, new_tokens = RunSpec(*what), sum(text.new_tokens for text in group)
        with open_run(model, drafter, asked, sampler, new_tokens) as (engine, running):
            engine.idle_step()  # allocates the caches
            calls = finish, progress, enough
            refill = _Refill(engine, deque(group), calls, prefill_chunk, running.lag, sampler, ends)
            refill.fill()
            while refill.live:
                run_steps(refill.engine, running, refill.read)
                if refill.live:  # too few for this batch
                    left = refill.live_rows()
                    running = Eager(_narrowed(model, drafter, asked, sampler, refill.engine, left))
                    refill.go_on(running.engine, left)


class _Refill:
    """The rows of one engine and the texts that wait for them."""

    def __init__(
        self, engine: Engine, waiting: deque[Text], calls: tuple, chunk: int, lag: int, sampler: Sampler, ends: Tensor
    ):
        self.engine, self.waiting = engine, waiting
        self.sampler, self.ends = sampler, ends
        self.following: deque[Text] = deque()
        self.finish, self.progress, self.enough = calls
        self.chunk, self.lag = chunk, lag
        self.texts: list[Text | None] = [None] * len(engine.state.done)  # [row]
        self.since = [0] * len(self.texts)  # [row]: the first step that saw the text

    @property
    def live(self) -> int:
        return sum(text is not None for text in self.texts)

    def read(self, readout: Readout) -> bool:
        """Take what ended, refill its rows; true when no text is left or too few for this batch."""
        ended = []
        for row, report in enumerate(readout.rows()):
            if self.texts[row] is None or readout.number < self.since[row]:
                continue
            self.progress(report.committed)
            if report.done:
                ended.append((row, report.failed))
        if ended:
            self._harvest(ended)
            self.fill(readout.number + self.lag + 1)
        return self.live == 0 or (not self.waiting and 2 * self.live <= len(self.texts))

    def _harvest(self, ended: list[tuple[int, bool]]) -> None:
        state = self.engine.state
        rows = torch.tensor([row for row, _ in ended], device=state.done.device)
        tokens, lengths = state.tokens[rows].tolist(), state.lengths[rows].tolist()
        for (row, failed), own, length in zip(ended, tokens, lengths):
            text, self.texts[row] = self.texts[row], None
            following = self.finish(text, own[len(text.tokens) : length], failed)
            if following is not None:
                assert following.room <= text.room, "a text that follows goes where the first one went"
                self.following.append(following)

    def fill(self, step: int = 0) -> None:
        """Give the free rows the next texts, which are there from `step` on; texts of like length are read
        together."""
        if self.enough():
            self.waiting.clear()
        free = [row for row, text in enumerate(self.texts) if text is None]
        pairs = []
        for row in free:
            queue = self.following or self.waiting  # what has begun goes on before anything begins
            if queue:
                pairs.append((row, queue.popleft()))
        for group in _alike(pairs):
            self._load([row for row, _ in group], [text for _, text in group])
        for row, text in pairs:
            self.texts[row], self.since[row] = text, step

    def _load(self, rows: list[int], texts: list[Text]) -> None:
        engine, device = self.engine, self.engine.state.done.device
        limits = [len(text.tokens) + text.new_tokens for text in texts]
        keys = row_keys([text.seed for text in texts], len(texts), device)
        index = torch.tensor(rows, device=device)
        engine.state.start(index, [text.tokens for text in texts], torch.tensor(limits, device=device), keys, self.ends)
        self.sampler.load(engine.state, index)
        engine.prefill(self.chunk, index)

    def live_rows(self) -> Tensor:
        rows = [row for row, text in enumerate(self.texts) if text is not None]
        return torch.tensor(rows, device=self.engine.state.done.device)

    def go_on(self, engine: Engine, rows: Tensor) -> None:
        """Go on in `engine`, an eager one that holds what `rows` (R,) of this one held."""
        self.engine, self.lag = engine, Eager.lag
        engine.session.prefill(engine.state, self.chunk)
        self.texts, self.since = [self.texts[row] for row in rows.tolist()], [0] * len(rows)


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


def _narrowed(model, drafter, asked: RunSpec, sampler: Sampler, engine: Engine, rows: Tensor) -> Engine:
    """An engine of `rows` (R,) of `engine`, on copies of their buffers."""
    sizes = {"batch": len(rows), "capacity": engine.target.capacity, "eos": engine.state.eos.shape[1]}
    own = make_engine(model, drafter, replace(asked, **sizes), sampler)
    own.state.copy_rows(engine.state, rows)
    own.target.cache.copy_rows(engine.target.cache, rows)
    return own


def _sampler(temperature: float, top_p: float, rows: int, device: torch.device) -> Sampler:
    nothing = torch.zeros(rows, 0, dtype=torch.long, device=device)
    return Sampler(warpers(temperature, top_p), temperature > 0, nothing, nothing.sum(1))
