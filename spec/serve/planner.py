"""Which tree for how many rows: the planner of a batch whose size changes.

A step of `rows` rows with a tree brings rows times the tree's expected tokens, and takes as long as was measured for
that number of rows; the tree that brings the most tokens a second is taken, and none where none pays. How many tokens
to expect is learned from the steps as they go, and is forgotten slowly. Another tree must be better by `GAIN` for
`STEADY` turns before it is taken. Knows no clocks; `measured` does.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from ..files import write_json
from ..plan.step_times import alone, open_idle
from ..plan.trees import Rates, best_tree, expected_tokens, non_increasing
from ..proposal import Drafter
from ..step import RowReport
from ..tree import TreeShape

GAIN = 1.05
STEADY = 8
MEMORY = 400.0  # steps of a row for which what was seen counts
PRIOR: Rates = [[0.6, 0.12, 0.05, 0.03]] * 8  # before anything was seen
WEIGHT = 20.0  # of the prior, in steps
NODES = 2, 3, 4, 6, 8, 16  # sizes of trees that are tried
COPIED = 2  # length of the second drafter's chain, where two draft

Times = Mapping[tuple[int, TreeShape], float]  # seconds of a step, by rows and tree


class Seen:
    """How often a node of a depth and rank was accepted where the node above it was; empty nodes never are."""

    def __init__(self, prior: Rates = PRIOR):
        self.prior = prior
        self.hits = [[0.0] * len(row) for row in prior]
        self.trials = [[0.0] * len(row) for row in prior]

    def learn(self, shape: TreeShape, reports: Sequence[RowReport]) -> None:
        """Count the steps of some rows, and forget a little of what was before them."""
        fade = (1 - 1 / MEMORY) ** len(reports)
        for table in (self.hits, self.trials):
            for row in table:
                row[:] = [count * fade for count in row]
        for report in reports:
            path = [0, *report.path[1 : report.accepted + 1]]
            for depth, node in enumerate(path[: len(self.prior)]):
                for rank, child in enumerate(shape.children[node][: len(self.prior[depth])]):
                    self.trials[depth][rank] += 1
                    self.hits[depth][rank] += path[depth + 1 : depth + 2] == [child]

    def rates(self) -> Rates:
        """p[depth][rank], not increasing in rank."""
        made: Rates = []
        for prior, hits, trials in zip(self.prior, self.hits, self.trials):
            weights = [trial + WEIGHT for trial in trials]
            row = [(hit + WEIGHT * p) / weight for p, hit, weight in zip(prior, hits, weights)]
            made.append(non_increasing(row, weights))
        return made


class RowPlanner:
    """The tree for a number of rows, from `times`; called once a turn."""

    def __init__(self, times: Times, prior: Rates = PRIOR):
        self.times, self.seen = times, Seen(prior)
        self.taken: dict[int, TreeShape] = {}
        self._better: dict[int, int] = {}  # [rows]: turns for which another tree has been better
        self._rates, self._unread = self.seen.rates(), 0

    def __call__(self, rows: int) -> TreeShape:
        best = max(self._shapes(rows), key=lambda shape: self.speed(rows, shape))
        taken = self.taken.setdefault(rows, best)
        if self.speed(rows, best) <= GAIN * self.speed(rows, taken):
            self._better[rows] = 0
            return taken
        self._better[rows] = self._better.get(rows, 0) + 1
        if self._better[rows] >= STEADY:
            self.taken[rows], self._better[rows] = best, 0
        return self.taken[rows]

    def speed(self, rows: int, shape: TreeShape) -> float:
        """Expected tokens a second."""
        return rows * self.expected(shape) / self.times[rows, shape]

    def expected(self, shape: TreeShape) -> float:
        """Expected tokens of a step of one row."""
        return expected_tokens(self._rates, shape)

    def learn(self, shape: TreeShape, reports: Sequence[RowReport]) -> None:
        """Take account of a step's reports."""
        self.seen.learn(shape, reports)
        self._unread += 1
        if self._unread >= STEADY:
            self._rates, self._unread = self.seen.rates(), 0

    def _shapes(self, rows: int) -> list[TreeShape]:
        return [shape for size, shape in self.times if size == rows]


def candidates(drafter: Drafter) -> list[TreeShape]:
    """The trees that are tried for a drafter: its own, some smaller and larger ones, and none where it can do without
    drafting for a while."""
    traits, made = drafter.traits, [drafter.default_shape]
    if traits.catches_up or not traits.remembers:
        made.append(TreeShape.chain(0))
    if len(drafter.default_shape) > 1:
        trees = [best_tree(PRIOR, nodes, traits.deepest)[0] for nodes in NODES]
        made += [tree.beside(TreeShape.chain(COPIED)) if traits.parts else tree for tree in trees]
    return list(dict.fromkeys(made))


def measured(
    model: PreTrainedModel,
    drafter: Drafter,
    executor: str,
    sizes: Sequence[int],
    room: int,
    path: Path | None = None,
) -> dict[tuple[int, TreeShape], float]:
    """Seconds of a step for each number of rows and each candidate, measured now unless `path` has them already."""
    shapes, kept = candidates(drafter), _kept(path)
    if executor == "compiled":  # each takes long to make
        shapes = [shape for shape in shapes if shape in (drafter.default_shape, TreeShape.chain(0))]
    times: dict[tuple[int, TreeShape], float] = {}
    for rows in sizes:
        for shape in shapes:
            name = f"{rows} {','.join(map(str, shape.parents))}"
            if name not in kept:
                runner = open_idle(model, executor, drafter, shape, room + shape.slots + 1, batch=rows)
                kept[name] = alone(model, runner, repeats=5, warm_up=1, limit=0.5)
            times[rows, shape] = kept[name]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, kept)
    return times


def _kept(path: Path | None) -> dict[str, float]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):  # nothing is stored, or the file is damaged
        return {}
    return {key: float(value) for key, value in stored.items()} if isinstance(stored, dict) else {}
