"""The decode loop of `generate`: a fixed batch, whose rows begin together; it ends when the last row does.

The steps themselves are made by the rows (rows.py). Here the trace is recorded, stopping criteria and streamers are
called (criteria.py), and tokens of a row after the one that stopped it are cut.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .criteria import Lockstep, ScoreBook
from .request import Request
from .rows import Arrival, Rows
from .trace import Event, Trace

if TYPE_CHECKING:
    from .target.given import GivenPrompt


def decode(
    rows: Rows,
    requests: Sequence[Request],
    trace: Trace,
    lockstep: Lockstep | None = None,
    score_book: ScoreBook | None = None,
    logit_book: ScoreBook | None = None,
    on_step: Callable[[list[Event]], None] | None = None,
    given: "GivenPrompt | None" = None,
) -> list[int]:
    """Decode one request in each row until all have ended; returns the number of generated tokens of each row. `given`
    is what the model's own forward has read of the prompts.

    The texts are in the engine's state, the events in `trace`, also where an exception ends the loop.
    """
    rows.admit(dict(enumerate(requests)), given)
    texts: list[list[int]] = [[] for _ in requests]
    while rows.live:
        arrival = rows.step()
        _check(arrival, rows)
        circumstances, reports = (arrival.number, arrival.seconds, arrival.fetched), arrival.reports.items()
        events = [report.event(row, *circumstances) for row, report in reports if report.committed]
        trace.events += events
        for event in events:
            texts[event.row] += event.committed
        for book, scores in ((score_book, arrival.scores), (logit_book, arrival.logits)):
            if book is not None:
                assert scores is not None, "the engine keeps what there is a book for"
                book.add(scores, {row: report.committed for row, report in reports})
        if on_step is not None and events:
            on_step(events)
        if lockstep is not None:
            lockstep.advance(texts)
            rows.evict([row for row in rows.live if lockstep.stops(row)])
    counts = lockstep.counts if lockstep is not None else [len(text) for text in texts]
    for row, count in enumerate(counts):
        if count < len(texts[row]):
            trace.cut(row, count)
            for book in (score_book, logit_book):
                if book is not None:
                    book.cut(row, count)
    return counts


def _check(arrival: Arrival, rows: Rows) -> None:
    for row, report in arrival.reports.items():
        if report.failed:
            raise ValueError(
                f"row {row}: the scores after token {len(rows.text(row))} of its text are NaN or forbid every "
                "token; check the model's weights and dtype and the logits processors"
            )
