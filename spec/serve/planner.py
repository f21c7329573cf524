"""Which tree for how many rows: the planner of a batch whose size changes.

A step of `rows` rows with a tree brings rows times the tree's expected tokens, and takes as long as was measured for
that number of rows; the tree that brings the most tokens a second is taken, and none unless one brings `GAIN` times as
many as plain steps. How many tokens to expect is learned from the steps as they go, and is forgotten slowly. Another
tree must be better by `GAIN` for `STEADY` turns before it is taken. Knows no clocks; `measured` does.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from ..files import write_json
from ..plan.step_times import SLOW, alone
from ..plan.trees import Rates, best_tree, expected_tokens, non_increasing
from ..proposal import Drafter, divided
from ..step import RowReport
from ..stream.streamer import streamer_of
from ..tree import TreeShape
from .gears import Gear, Gears

GAIN = 1.05
HOPE = 1.3
STEADY = 8
MEMORY = 400.0  # steps of a row for which what was seen counts
PRIOR: Rates = [[0.5, 0.12, 0.05, 0.03]] * 8  # before anything was seen
WEIGHT = 20.0  # of the prior, in steps
NODES = 2, 3, 4, 6, 8, 16  # sizes of trees that are tried
COPY_PRIOR = [0.15, *[0.7] * 7]  # of the second of two drafters
COPIED = 2  # length of the second drafter's chain, where two draft

Times = Mapping[tuple[int, TreeShape], float]  # seconds of a step, by rows and tree


class Seen:
    """How often a node of a depth and rank was accepted where the node above it was; empty nodes never are.

    Where two drafters are `beside` each other, the root's last child and the chain below it are the second one's, and
    are counted apart: p[depth] of them, first of which is how often the accepted path goes into it."""

    def __init__(self, prior: Rates = PRIOR, beside: bool = False):
        self.first, self.second = Counts(prior), Counts([[p] for p in COPY_PRIOR]) if beside else None

    def learn(self, shape: TreeShape, reports: Sequence[RowReport]) -> None:
        """Count the steps of some rows, and forget a little of what was before them."""
        for counts in filter(None, (self.first, self.second)):
            counts.fade((1 - 1 / MEMORY) ** len(reports))
        _, branch = self._parts(shape)
        for report in reports:
            path = [0, *report.path[1 : report.accepted + 1]]
            for depth, node in enumerate(path):
                for rank, child in enumerate(shape.children[node]):
                    hit = path[depth + 1 : depth + 2] == [child]
                    if child not in branch:
                        self.first.count(depth, rank, hit)
                    elif self.second is not None:
                        self.second.count(depth, 0, hit)

    def _parts(self, shape: TreeShape) -> tuple[list[int], list[int]]:
        """The nodes of the first drafter and of the second, with the root."""
        return ([*range(len(shape))], [0]) if self.second is None else divided(shape)

    def expectation(self) -> Callable[[TreeShape], float]:
        """The expected tokens of a step with a tree, by what has been seen until now."""
        first, second = self.first.rates(), None if self.second is None else self.second.rates()

        def expected(shape: TreeShape) -> float:
            nodes, branch = self._parts(shape)
            tokens = expected_tokens(first, shape.part(nodes))
            return tokens + (0.0 if second is None else expected_tokens(second, shape.part(branch)) - 1)

        return cache(expected)


class Counts:
    """Trials and hits by depth and rank, beginning with a prior."""

    def __init__(self, prior: Rates):
        self.prior = prior
        self.hits = [[0.0] * len(row) for row in prior]
        self.trials = [[0.0] * len(row) for row in prior]

    def fade(self, by: float) -> None:
        for table in (self.hits, self.trials):
            for row in table:
                row[:] = [count * by for count in row]

    def count(self, depth: int, rank: int, hit: bool) -> None:
        """A trial; none where the prior knows no such depth or rank."""
        if depth < len(self.prior) and rank < len(self.prior[depth]):
            self.trials[depth][rank] += 1
            self.hits[depth][rank] += hit

    def rates(self) -> Rates:
        """p[depth][rank], not increasing in rank."""
        made: Rates = []
        for prior, hits, trials in zip(self.prior, self.hits, self.trials):
            weights = [trial + WEIGHT for trial in trials]
            row = [(hit + WEIGHT * p) / weight for p, hit, weight in zip(prior, hits, weights)]
            made.append(non_increasing(row, weights))
        return made


class RowPlanner:
    """The tree for a number of rows, from `times`; called once a turn. `beside`: two drafters share the trees."""

    def __init__(self, times: Times, prior: Rates = PRIOR, beside: bool = False):
        self.times, self.seen = times, Seen(prior, beside)
        self.taken: dict[int, TreeShape] = {}
        self._better: dict[int, int] = {}  # [rows]: turns for which another tree has been better
        self.expected, self._unread = self.seen.expectation(), 0  # expected tokens of a step of one row, by tree

    def __call__(self, rows: int) -> TreeShape:
        best = max(self.shapes(rows), key=lambda shape: self.speed(rows, shape))
        taken = self.taken.setdefault(rows, best)
        if self.speed(rows, best) <= GAIN * self.speed(rows, taken):
            self._better[rows] = 0
            return taken
        self._better[rows] = self._better.get(rows, 0) + 1
        if self._better[rows] >= STEADY:
            self.taken[rows], self._better[rows] = best, 0
        return self.taken[rows]

    def speed(self, rows: int, shape: TreeShape) -> float:
        """Expected tokens a second, and of drafting as many as are worth it."""
        return rows * self.expected(shape) / self.times[rows, shape] / (GAIN if len(shape) > 1 else 1.0)

    def learn(self, shape: TreeShape, reports: Sequence[RowReport]) -> None:
        """Take account of a step's reports."""
        self.seen.learn(shape, reports)
        self._unread += 1
        if self._unread >= STEADY:
            self.expected, self._unread = self.seen.expectation(), 0

    def shapes(self, rows: int) -> list[TreeShape]:
        """The trees whose times with so many rows are known."""
        return [shape for size, shape in self.times if size == rows]


def candidates(drafter: Drafter, few: bool = False) -> list[TreeShape]:
    """The trees that are tried for a drafter: its own, some smaller and larger ones (unless they are to be `few`), and
    none where it can do without drafting for a while."""
    traits, made = drafter.traits, [drafter.default_shape]
    if traits.catches_up or not traits.remembers:
        made.append(TreeShape.chain(0))
    if len(drafter.default_shape) > 1 and not few:
        trees = [best_tree(PRIOR, nodes, traits.deepest)[0] for nodes in NODES]
        if traits.parts:
            trees = [tree.beside(TreeShape.chain(COPIED)) for tree in trees]
            trees += [TreeShape.chain(1).beside(TreeShape.chain(copied)) for copied in (1, 6)]
        made += trees
    return list(dict.fromkeys(made))


def promising(planner: RowPlanner) -> list[tuple[int, TreeShape]]:
    """The rows and trees that steps are made for where making one takes long, by a planner with the times that they are
    expected to take: of each number of rows none, and the best tree, unless it had to bring more than `HOPE` times as
    many tokens as are expected before anything was seen."""
    chosen: list[tuple[int, TreeShape]] = []
    for rows in dict.fromkeys(rows for rows, _ in planner.times):
        speeds = {shape: planner.speed(rows, shape) for shape in planner.shapes(rows)}
        without = next((shape for shape in speeds if len(shape) == 1), None)
        best = max((shape for shape in speeds if len(shape) > 1), key=lambda shape: speeds[shape])
        if without is None or HOPE * speeds[best] >= speeds[without]:
            chosen.append((rows, best))
        if without is not None:
            chosen.append((rows, without))
    return chosen


def expected_times(eager: Times, without: Times) -> Times:
    """Times of compiled or captured steps, from those `without` trees and those of `eager` steps: a tree is taken to
    add as many seconds to the one as to the other."""
    less = {rows: eager[rows, shape] - seconds for (rows, shape), seconds in without.items()}
    return {(rows, shape): seconds - less.get(rows, 0.0) for (rows, shape), seconds in eager.items()}


def measured(
    gears: Gears, pairs: Iterable[tuple[int, TreeShape]], path: Path | None = None
) -> dict[tuple[int, TreeShape], float]:
    """Seconds of a step of `gears` for each of `pairs` of a number of rows and a tree, measured now unless `path` has
    them already."""
    kept, times = _kept(path), dict[tuple[int, TreeShape], float]()
    for rows, shape in pairs:
        if (name := f"{rows} {','.join(map(str, shape.parents))}") not in kept:
            kept[name] = _timed(gears, Gear(rows, shape, gears.kinds[0]))
        times[rows, shape] = kept[name]
    if path is not None:
        with suppress(OSError):  # they are measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, kept)
    return times


@torch.no_grad()
def _timed(gears: Gears, gear: Gear) -> float:
    """Seconds of an idle step; attention takes longer with more text, so half of the room is taken to be full."""
    how = {"repeats": 5, "warm_up": 1, "limit": 0.5} if streamer_of(gears.model) is None else SLOW
    with gears.opened(gear) as executor:
        executor.engine.state.done.fill_(True)
        executor.engine.state.lengths.fill_(max(1, gears.room // 2))
        return alone(gears.model, executor, **how)


def _kept(path: Path | None) -> dict[str, float]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):  # nothing is stored, or the file is damaged
        return {}
    return {key: float(value) for key, value in stored.items()} if isinstance(stored, dict) else {}
