"""The trace: one event per step and row, from which every acceptance figure is computed.

Events speak of committed tokens: nothing behind an end of text or a stop counts as accepted. Field
names of the summary are vLLM's where vLLM has one. Knows nothing of models.
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(slots=True)
class Event:
    """One row's part in one step.

    `tokens` and `parents` describe the tree, node 0 being the root and -1 a node left empty; `accepted`
    are the accepted nodes in order, root not counted; `bonus` is the target's own token, None where an
    end came first. `seconds` is the whole batch's time, the same in every row's event of a step.
    """

    row: int
    step: int
    tokens: list[int]
    parents: list[int]
    accepted: list[int]
    bonus: int | None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def drafted(self) -> int:
        return sum(token >= 0 for token in self.tokens[1:])

    @property
    def committed(self) -> list[int]:
        """The tokens that this event added to the row's text."""
        return [self.tokens[node] for node in self.accepted] + ([] if self.bonus is None else [self.bonus])

    def keep(self, count: int) -> None:
        """Forget all but the first `count` committed tokens."""
        if count <= len(self.accepted):
            self.accepted, self.bonus = self.accepted[:count], None


@dataclass(slots=True)
class Trace:
    """The events of one call of generate, in order of steps."""

    events: list[Event] = field(default_factory=list)
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def cut(self, row: int, tokens: int) -> None:
        """Keep only the first `tokens` generated tokens of `row`; steps that gave none of them go."""
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
        """Acceptance figures over all rows.

        `mean_acceptance_length` is 1 + accepted / steps (the bonus counted in every step, as in vLLM);
        `tokens_per_step` counts committed tokens only, so it is lower where a text ended inside a step;
        `draft_acceptance_rate` is accepted / drafted, None where nothing was drafted; entry i of
        `acceptance_histogram` counts the steps that accepted i draft tokens. Seconds are sums over steps.
        """
        steps = len(self.events)
        accepted = [len(event.accepted) for event in self.events]
        drafted = sum(event.drafted for event in self.events)
        tokens = sum(len(event.committed) for event in self.events)
        per_step = {event.step: event.seconds for event in self.events}
        phases = dict.fromkeys(phase for seconds in per_step.values() for phase in seconds)
        return {
            "mean_acceptance_length": 1 + sum(accepted) / steps if steps else None,
            "draft_acceptance_rate": sum(accepted) / drafted if drafted else None,
            "acceptance_histogram": [accepted.count(i) for i in range(max(accepted, default=0) + 1)],
            "num_spec_steps": steps,
            "num_accepted_draft_tokens": sum(accepted),
            "num_draft_tokens": drafted,
            "num_tokens": tokens,
            "tokens_per_step": tokens / steps if steps else None,
            "seconds": {phase: sum(s.get(phase, 0.0) for s in per_step.values()) for phase in phases},
        }

    def append_to(self, path: str | Path) -> None:
        """Append the events to a JSONL file, one line each, marked with this call's `run` id."""
        with open(path, "a", encoding="utf-8") as file:
            for event in self.events:
                file.write(json.dumps({"run": self.run, **asdict(event)}) + "\n")
