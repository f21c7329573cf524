"""The planner: the tree with the least time per token, from measured acceptance and measured times.

p[d][r] is the probability that the child of rank r of an accepted node at depth d is accepted; it depends on depth and
rank, while Sequoia (arXiv:2402.12374, section 3.1) lets it depend on rank only. The value of a node is the product of p
along its path, the probability that it is accepted; the expected tokens per step of a tree are the sum over its nodes
plus one for the bonus. As p does not increase with rank, no child has a higher value than its parent or the sibling
before it, so the n most valuable nodes form a tree, which a heap finds; the tests compare it with Sequoia's dynamic
programme. Plans are written to and read from JSON; replay.py refines them where the target's own text was replayed.
Knows no models, tensors or clocks.
"""

import heapq
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..files import write_output
from ..metrics import offers
from ..trace import Event
from ..tree import DynamicShape, TreeShape

Rates = list[list[float]]  # p[depth][rank]
MODEST = 16  # nodes of a tree that is planned without step times


@dataclass
class Acceptance:
    """Counts from which p is estimated: an accepted node at depth d had a child of rank r in `trials[d][r]` cases, and
    it was accepted in `hits[d][r]` of them."""

    hits: list[list[int]]
    trials: list[list[int]]

    @classmethod
    def of(cls, events: Iterable[Event]) -> "Acceptance":
        """Count over a trace."""
        return cls(*offers(events))

    def rates(self, weight: float = 20.0) -> Rates:
        """p[d][r], non-increasing in rank, summing to at most 1.

        The prior of a cell is p of the same rank one depth above, counted like `weight` trials. Isotonic regression
        over ranks (pool adjacent violators) then makes each row non-increasing."""
        rates: Rates = []
        for hits, trials in zip(self.hits, self.trials):
            above = rates[-1] if rates else []
            row, sizes = [], []
            for rank, (hit, trial) in enumerate(zip(hits, trials)):
                prior = above[rank] if rank < len(above) else 0.0
                lean = weight if rates else 0.0
                row.append((hit + lean * prior) / max(trial + lean, 1e-9))
                sizes.append(trial + lean)
            rates.append(non_increasing(row, sizes))
        return rates


def non_increasing(values: list[float], weights: list[float]) -> list[float]:
    """The non-increasing sequence closest to `values` in weighted squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights):
        block = (value, max(weight, 1e-9), 1)
        while blocks and blocks[-1][0] < block[0]:
            mean, size, length = blocks.pop()
            total = size + block[1]
            block = ((mean * size + block[0] * block[1]) / total, total, length + block[2])
        blocks.append(block)
    return [mean for mean, _, length in blocks for _ in range(length)]


def grow(rates: Rates, nodes: int, depth: int) -> tuple[list[int], list[float]]:
    """The best tree of each size up to `nodes` (root included) within `depth`.

    Returns the parents of the nodes in order of value, and the expected tokens per step of the first 1, 2, ... nodes;
    fewer than `nodes` where no further node has a value above 0. `rates` must be non-increasing in rank."""
    parents, depths, expected = [-1], [0], [1.0]
    heap: list[tuple[float, int, int, float]] = []  # -value, parent, rank, value of the parent

    def offer(parent: int, rank: int, parent_value: float) -> None:
        level = depths[parent]
        if level < min(depth, len(rates)) and rank < len(rates[level]) and rates[level][rank] > 0:
            heapq.heappush(heap, (-parent_value * rates[level][rank], parent, rank, parent_value))

    offer(0, 0, 1.0)
    while heap and len(parents) < nodes:
        negative, parent, rank, parent_value = heapq.heappop(heap)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        expected.append(expected[-1] - negative)
        offer(len(parents) - 1, 0, -negative)
        offer(parent, rank + 1, parent_value)
    return parents, expected


def best_tree(rates: Rates, nodes: int, depth: int) -> tuple[TreeShape, float]:
    """The tree of at most `nodes` nodes and `depth` levels with the most expected tokens per step."""
    parents, expected = grow(rates, nodes, depth)
    return TreeShape(tuple(parents)), expected[-1]


def default_tree(rates: Rates, depth: int, on_cpu: bool) -> TreeShape:
    """A drafter's default tree, for devices without a plan: of moderate size, from `rates` alone. It is small on a CPU,
    where a step of 8 nodes takes 1.2 to 1.5 times as long as one of up to 4."""
    return best_tree(rates, 4 if on_cpu else MODEST, depth)[0]


def expected_tokens(rates: Rates, shape: TreeShape) -> float:
    """Expected tokens per step of any tree under `rates`."""
    values, total = [1.0], 1.0
    for node, parent in enumerate(shape.parents[1:], 1):
        level, rank = shape.depths[parent], shape.children[parent].index(node)
        known = level < len(rates) and rank < len(rates[level])
        values.append(values[parent] * rates[level][rank] if known else 0.0)
        total += values[-1]
    return total


def depth_within(ranks: Iterable[int], shape: TreeShape) -> int:
    """How many nodes of a path are in `shape`, from the root's child on, given their ranks among their siblings; a
    negative rank ends the path."""
    node = depth = 0
    for rank in ranks:
        if not 0 <= rank < len(shape.children[node]):
            break
        node, depth = shape.children[node][rank], depth + 1
    return depth


@dataclass(frozen=True)
class Plan:
    """A planned tree with its predicted speed; saved as a JSON file that `tree=` accepts."""

    shape: TreeShape | DynamicShape
    tokens_per_step: float  # predicted
    speedup: float  # predicted, against plain decoding with the same executor
    seconds_per_step: float
    plain_seconds: float

    @classmethod
    def none(cls, plain_seconds: float) -> "Plan":
        """Not to speculate."""
        return cls(TreeShape.chain(0), 1.0, 1.0, plain_seconds, plain_seconds)

    @classmethod
    def of(cls, shape: TreeShape | DynamicShape, tokens: float, seconds: float, plain_seconds: float) -> "Plan":
        """Of a tree that brings `tokens` in a step of `seconds`."""
        return cls(shape, tokens, plain_seconds * tokens / seconds, seconds, plain_seconds)

    def save(self, path: str | Path) -> None:
        numbers = {name: value for name, value in vars(self).items() if name != "shape"}
        tree = self.shape.text if isinstance(self.shape, DynamicShape) else self.shape.parents
        write_output(path, json.dumps({"tree": tree, **numbers}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan. Raises ValueError for a file that is not one."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            tree = data.pop("tree")
            return cls(shape=TreeShape.parse(tree), **data)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"plan {path} cannot be read ({error}); make one with paceline plan") from error


def choose_tree(rates: Rates, target_seconds: Mapping[int, float], draft_seconds: Mapping[int, float]) -> Plan:
    """The tree that minimises seconds per token.

    `target_seconds[n]` are the seconds of a step with n nodes without drafting, for n = 1 and some larger n, between
    which they are interpolated; `draft_seconds[d]` are the seconds of drafting d levels (0 for 0 levels).
    Not to speculate is one of the choices.
    """
    plain = target_seconds[1]
    best, least = Plan.none(plain), plain
    for depth in range(1, min(max(draft_seconds), len(rates)) + 1):
        parents, expected = grow(rates, max(target_seconds), depth)
        for size in range(2, len(parents) + 1):
            seconds = interpolate(target_seconds, size) + interpolate(draft_seconds, depth)
            if seconds / expected[size - 1] < least:
                least = seconds / expected[size - 1]
                best = Plan.of(TreeShape(tuple(parents[:size])), expected[size - 1], seconds, plain)
    return best


def interpolate(curve: Mapping[int, float], at: float) -> float:
    """Linear between the measured points of `curve`, which must reach from at most `at` to at least `at`."""
    below = max(point for point in curve if point <= at)
    above = min(point for point in curve if point >= at)
    share = (at - below) / (above - below) if above > below else 0.0
    return curve[below] + share * (curve[above] - curve[below])


def rising(curve: Mapping[int, float]) -> dict[int, float]:
    """`curve` where no smaller step costs more than a larger one, which only happens where it was disturbed."""
    points = sorted(curve, reverse=True)
    return dict(sorted(zip(points, itertools.accumulate((curve[point] for point in points), min))))
