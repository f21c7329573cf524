"""Stopping criteria and streamers, called once per token as in transformers' own loop, and the scores of each token
where they were asked for (`output_scores`). Stop strings are such a criterion.

Rows gain several tokens per step and at different speeds. A virtual clock follows the slowest unfinished row and calls
every criterion with the batch as transformers' loop would have it at that token, padded in the same way. The
decode loop cuts a row's tokens after the one at which a criterion stops it.
"""

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class ScoreBook:
    """The scores (V,) of every generated token of every row, kept row by row."""

    def __init__(self, rows: int):
        self.rows: list[list[Tensor]] = [[] for _ in range(rows)]

    def add(self, scores: Tensor, counts: dict[int, int]) -> None:
        """Keep the first `counts[row]` of each row's `scores` (B, D+1, V)."""
        for row, count in counts.items():
            self.rows[row] += scores[row, :count].unbind()

    def cut(self, row: int, count: int) -> None:
        """Forget the scores of a row behind its first `count` tokens."""
        del self.rows[row][count:]

    def token(self, index: int) -> Tensor:
        """(B, V) scores of the index-th token of each row; zeros for a row that ended before it."""
        blank = torch.zeros_like(next(row[0] for row in self.rows if row))
        return torch.stack([row[index] if index < len(row) else blank for row in self.rows])


class Lockstep:
    """The virtual clock. `prompt` (B, P) is the user's; `pad` None means that rows do not end one by one."""

    def __init__(
        self,
        prompt: Tensor,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        pad: int | None,
        book: ScoreBook | None,
    ):
        self.ids = prompt
        self.criteria = criteria
        self.streamer = streamer
        self.pad = pad
        self.book = book
        self.scores: tuple[Tensor, ...] | None = None if book is None else ()
        self.counts = [0] * len(prompt)  # generated tokens of each row that the clock has passed
        self.finished = [False] * len(prompt)

    @property
    def stopped(self) -> bool:
        return all(self.finished)

    def stops(self, row: int) -> bool:
        """Whether a criterion has stopped the row."""
        return self.finished[row] and (self.pad is not None or self.stopped)

    def advance(self, texts: list[list[int]]) -> None:
        """Advance the clock token by token, as far as the generated `texts` of all unfinished rows reach."""
        while not self.stopped:
            clock = max(self.counts)
            waiting = [not done or self.pad is None for done in self.finished]
            if any(wait and len(text) <= clock for wait, text in zip(waiting, texts)):
                return
            tokens = [text[clock] if wait else self.pad for wait, text in zip(waiting, texts)]
            self._show(self.ids.new_tensor(tokens), clock)
            self.counts = [clock + 1 if wait else count for wait, count in zip(waiting, self.counts)]

    def _show(self, tokens: Tensor, clock: int) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        if self.book is not None:
            self.scores = (*(self.scores or ()), self.book.token(clock))
        stops = self.criteria(self.ids, self.scores)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        self.finished = [done or stop for done, stop in zip(self.finished, stops.tolist())]
