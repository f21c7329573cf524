"""The trace: one event per step and row, from which every acceptance figure is computed.

Events hold committed tokens only: tokens after an end of text or a stop do not count as accepted. The figures are
computed in metrics.py. Knows nothing of models.
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import metrics

COMPILING = "compile"  # a phase of the one step in which a long run begins to compile
WAIT = "wait"  # the phase in which a step stands still for weights that are streamed


@dataclass(frozen=True, slots=True)
class Fetched:
    """Weights that were fetched while a step went on, most of them beside its computing."""

    bytes: int
    seconds: float


@dataclass(slots=True)
class Event:
    """One row's part in one step.

    `tokens` and `parents` describe the tree; node 0 is the root, and token -1 an empty node. `accepted` are the
    accepted nodes in order, without the root. `bonus` is the token added by the target, None where the text ended
    before it. `seconds` by phase are those of the whole batch, equal in all rows' events of a step, and so is what was
    `fetched` where the target's weights are streamed.
    """

    row: int
    step: int
    tokens: list[int]
    parents: list[int]
    accepted: list[int]
    bonus: int | None
    seconds: dict[str, float] = field(default_factory=dict)
    group: str = ""  # the call of `generate`, where events of several calls are combined
    fetched: Fetched | None = None

    @property
    def drafted(self) -> int:
        return sum(token >= 0 for token in self.tokens[1:])

    @property
    def examined(self) -> int:
        """The number of drafted tokens that the rule looked at: children of the root and of accepted nodes."""
        return sum(self.tokens[child] >= 0 for children in self.offered() for child in children)

    def offered(self) -> list[list[int]]:
        """The children, by rank, of the root and of each accepted node that has any. Without a bonus (the text ended
        there) the last accepted node is left out."""
        path = [0, *self.accepted] if self.bonus is not None else [0, *self.accepted][:-1]
        levels = [[child for child, parent in enumerate(self.parents) if parent == node] for node in path]
        return [children for children in levels if children]

    @property
    def committed(self) -> list[int]:
        """The tokens that this event added to the row's text."""
        return [self.tokens[node] for node in self.accepted] + ([] if self.bonus is None else [self.bonus])

    def keep(self, count: int) -> None:
        """Drop all but the first `count` committed tokens."""
        if count <= len(self.accepted):
            self.accepted, self.bonus = self.accepted[:count], None


@dataclass(slots=True)
class Trace:
    """The events of one call of generate, in order of steps."""

    events: list[Event] = field(default_factory=list)
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def cut(self, row: int, tokens: int) -> None:
        """Keep only the first `tokens` generated tokens of `row`; events without any of them are removed."""
        kept, left = [], tokens
        for event in self.events:
            if event.row == row:
                event.keep(left)
                left -= len(event.committed)
                if not event.committed:
                    continue
            kept.append(event)
        self.events = kept

    def rows(self) -> Iterator[tuple[int, list[Event]]]:
        for row in sorted({event.row for event in self.events}):
            yield row, [event for event in self.events if event.row == row]

    def summary(self) -> dict:
        """Acceptance figures over all rows, as metrics.py defines them."""
        return metrics.summary(self.events)

    def prometheus(self, **labels: str) -> str:
        """The summary in Prometheus' text format, names prefixed with `paceline_`, every sample with `labels`."""
        return metrics.prometheus(self.summary(), labels)

    def append_to(self, path: str | Path) -> None:
        """Append the events to a JSONL file, one line each, marked with this call's `run` id. Without any, no file is
        made."""
        if not self.events:
            return
        with open(path, "a", encoding="utf-8") as file:
            for event in self.events:
                record = asdict(event)
                record.pop("group")  # `run` identifies the call
                if event.fetched is None:
                    record.pop("fetched")
                file.write(json.dumps({"run": self.run, **record}) + "\n")
