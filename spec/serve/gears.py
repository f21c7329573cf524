"""Gears: the sizes in which a batch is stepped.

A gear is a number of rows, a tree, and the kind of sampling that the rows need; each has an engine and an executor of
its own, as for a call of `generate`. Going over to another gear copies the live rows from one engine to the other.
Where steps are compiled or captured, those of a gear are kept in the pool of the model. Knows nothing of requests.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product

import torch
from transformers import PreTrainedModel

from ..engines.executors import Eager, Executor
from ..engines.pool import KEPT_SHARE, pool_of
from ..engines.runs import RunSpec, keep, make_engine, open_run
from ..proposal import Drafter
from ..rows import Rows
from ..tree import DynamicShape, TreeShape
from .row_sampler import KINDS, RowSampler, SamplingKind
from .text_request import ENDS

Shape = TreeShape | DynamicShape


@dataclass(frozen=True, slots=True)
class Gear:
    rows: int
    shape: Shape
    kind: SamplingKind


def sizes(most: int) -> list[int]:
    """The numbers of rows of gears: powers of two, and `most`."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]


class Gears:
    """The engines of a batch of at most `most` rows, each with room for `room` tokens of text.

    Gears that are `lasting`, taken again and again, all have the `executor`, and engines with the room of these texts;
    else the widest has it, in an engine that serves other texts too, and the others are eager. `new_tokens` is how many
    are expected in all.
    Gears have one of `kinds`, or of the `rare` ones, whose steps are eager; a later one serves whatever an earlier one
    does. So there are no more of them than sizes times trees times kinds, whatever is asked for.
    Rows are changed by whoever holds it; `rows` is None until the first shift."""

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter,
        room: int,
        most: int,
        chunk: int,
        executor: str = "eager",
        lasting: bool = False,
        new_tokens: int = 0,
        kinds: Sequence[SamplingKind] = KINDS,
        rare: Sequence[SamplingKind] = (),
    ):
        self.model, self.drafter, self.room, self.most, self.chunk = model, drafter, room, most, chunk
        self.executor, self.lasting, self.new_tokens = executor, lasting, new_tokens
        self.kinds, self.rare = kinds, rare
        self.current: Gear | None = None
        self.rows: Rows | None = None
        self.shifts = 0
        self._open = ExitStack()

    def kind(self, asked: SamplingKind) -> SamplingKind:
        """The first kind that serves what is asked for."""
        return next(kind for kind in (*self.kinds, *self.rare) if kind.serves(asked))

    def spec(self, gear: Gear) -> RunSpec:
        """What an engine of `gear` is made for."""
        kept = (self.lasting or gear.rows == self.most) and gear.kind not in self.rare
        executor = self.executor if kept else "eager"
        sampler, capacity = self._sampler(gear), self.room + gear.shape.slots + 1
        logits, predicted = gear.kind.logits, self.room if gear.kind.predicted else 0
        return RunSpec(
            gear.shape, "match", executor, gear.rows, capacity, ENDS, logits, sampler.signature, predicted,
            fixed_capacity=self.lasting,
        )  # fmt: skip

    def _sampler(self, gear: Gear) -> RowSampler:
        return RowSampler(gear.kind, gear.rows, self.model.device)

    @torch.no_grad()
    def make(self, pairs: Iterable[tuple[int, Shape]]) -> None:
        """Make the steps that are kept, of all kinds, for each of `pairs` of a number of rows and a tree, lest a text
        wait for one. Raises ValueError where there is not the memory to keep all of them."""
        gears = [Gear(rows, shape, kind) for (rows, shape), kind in product(pairs, self.kinds)]
        keep(self.model, len(gears))
        for count, gear in enumerate(gears, 1):
            try:
                with self.opened(gear):
                    full = len(pool_of(self.model).runs) < count  # one was dropped
            except torch.OutOfMemoryError:
                full = True
            if full:
                raise ValueError(
                    f"the {self.executor} steps of up to {self.most} rows of {self.room} tokens take more memory than "
                    f"the {KEPT_SHARE:.0%} that they may; give fewer rows, less room, or executor eager"
                )

    @contextmanager
    def opened(self, gear: Gear) -> Iterator[Executor]:
        """The executor of an engine for `gear`."""
        with open_run(self.model, self.drafter, self.spec(gear), self._sampler(gear), self.new_tokens) as executor:
            yield executor

    def shift(self, gear: Gear) -> None:
        """Go over to `gear`, with all live rows, whose steps have all been read."""
        opened = ExitStack()
        executor = opened.enter_context(self.opened(gear))
        live = [] if self.rows is None else self.rows.live
        if self.rows is None:
            self.rows = Rows(executor, self.chunk)
        else:
            missed = self.current is not None and len(self.current.shape) == 1 < len(gear.shape)
            self.rows = self.rows.moved(live, executor)
            if missed and live and self.drafter.traits.catches_up:
                self.rows.catch_up(list(range(len(live))))
        self._open.close()
        self._open, self.current, self.shifts = opened, gear, self.shifts + 1

    def lane_engine(self, rows: int, shape: Shape) -> Eager:
        """An engine in which prompts are read, and whose step is never run."""
        gear = Gear(rows, shape, SamplingKind())
        spec = RunSpec(shape, "match", "eager", rows, self.room + shape.slots + 1, ENDS, False, ())
        return Eager(make_engine(self.model, self.drafter, spec.settled("eager"), self._sampler(gear)))

    def close(self) -> None:
        self._open.close()
        self.current = self.rows = None
