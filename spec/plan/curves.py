"""Step-time curves of a target and its drafters on this device: seconds by nodes, and of drafting by levels.

A step in use has the processor's caches to itself, and one that takes turns with others has not, which matters most
where weights are small: so each engine is timed alone, in a block of steps, and dropped soon after. What else the
machine does only ever adds time, so each block is repeated after the next engine's, and the smaller median counts.

Eager steps cost nothing to make, so all points are timed. Where every point has to be compiled on a CPU, a few are: as
both executors multiply by the same operators, what compiling saves grows evenly between them. Knows nothing of
acceptance.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from ..engines.executors import Executor
from ..engines.runs import most_scored
from ..proposal import Drafter, DraftSampling, NoDrafter, parts_of
from ..stream.streamer import streamer_of
from ..tree import TreeShape
from .step_times import Blank, alone, open_idle
from .streamed import draft_curves, target_curve
from .trees import interpolate, rising

SIZES = (1, 2, 5, 9, 16, 32)  # nodes; with those of chains of 1, 4 and 8 tokens, to which drafting adds
COMPILED_SIZES = (1, 9, 32)
DEEPEST = 8  # levels of a planned tree

Key = int | tuple[int, int]  # of n nodes without drafting, or of drafter i and d levels
Point = tuple[Key, Drafter, TreeShape]
Opened = Callable[[Drafter, TreeShape], Executor]
Curve = dict[int, float]


@dataclass(frozen=True)
class Curves:
    """`target[n]`: seconds of a step with n nodes, without drafting. `drafts[i][d]`: of drafter i drafting d levels.
    For a streamed target also `grown[i][w][d]`: of its growing a dynamic tree of d levels and width w (or, with width
    1, drafting a chain), and `walking`, the seconds of each accepted token of a tree whose scores are not computed at
    once; `measured` says when its steps were timed."""

    target: Curve
    drafts: tuple[Curve, ...]
    grown: tuple[dict[int, Curve], ...] = ()
    measured: str = ""
    walking: float = 0.0

    def of(self, first: int, end: int) -> "Curves":
        """Those of the drafters from number `first` to before `end`."""
        return replace(self, drafts=self.drafts[first:end], grown=self.grown[first:end])

    def step(self, shape: TreeShape) -> float:
        """Foretold seconds of a step with the tree `shape`."""
        return interpolate(self.target, len(shape)) + sum(self.drafting(shape))

    def drafting(self, shape: TreeShape) -> list[float]:
        """Foretold seconds of each drafter in a step with `shape`."""
        return [interpolate(curve, depth) for curve, depth in zip(self.drafts, self.depths(shape))]

    def depths(self, shape: TreeShape) -> list[int]:
        """How deep each drafter drafts in `shape`, but no deeper than it was timed: of two, the second drafts the last
        branch of the root, which is a chain."""
        depths = [shape.max_depth]
        if len(self.drafts) == 2:
            branch = [shape.children[0][-1]]
            while shape.children[branch[-1]]:
                branch.append(shape.children[branch[-1]][0])
            depths = [max(shape.depths[node] for node in range(len(shape)) if node not in branch), len(branch)]
        return [min(depth, max(curve)) for depth, curve in zip(depths, self.drafts)]


def measure(
    model: PreTrainedModel,
    drafters: Sequence[Drafter],
    executor: str,
    sampling: DraftSampling | None = None,
    anew: bool = False,
) -> Curves:
    """The curves of a target and of all parts of some drafters with one executor; `anew` measures what is kept of a
    streamed target again."""
    if streamer_of(model) is not None:
        return _streamed(model, drafters, sampling or DraftSampling(), anew)
    few = "compiled" in executor and model.device.type == "cpu"
    opened = functools.partial(open_idle, model, "eager" if few else executor, sampling=sampling)
    parts = [part for drafter in drafters for part in parts_of(drafter)]
    levels = [_levels(part) for part in parts]
    points = _targets(SIZES)
    for index, part in enumerate(parts):
        points += [((index, level), part, TreeShape.chain(level)) for level in levels[index]]
    seconds = _seconds(model, opened, points)
    target = rising({size: seconds[size] for size in SIZES})
    drafts = [
        {level: max(seconds[index, level] - interpolate(target, level + 1), 0.0) for level in each}
        for index, each in enumerate(levels)
    ]
    curves = Curves(target, tuple(rising({0: 0.0, **costs}) for costs in drafts))
    if not few:
        return curves
    return _compiled(model, drafters, curves, functools.partial(open_idle, model, executor, sampling=sampling))


def _streamed(model: PreTrainedModel, drafters: Sequence[Drafter], sampling: DraftSampling, anew: bool) -> Curves:
    """The curves of a streamed target, whose steps are eager."""
    target, walking, measured = target_curve(model, anew)
    if sampling.coupling == "own":  # the rules that need the scores of all nodes, which are not to take much memory
        most = min(most_scored(model), max(target))
        fewer = {nodes: seconds for nodes, seconds in target.items() if nodes < most}
        target = {**fewer, most: interpolate(target, most)}
    grown = tuple(draft_curves(model, part, sampling) for drafter in drafters for part in parts_of(drafter))
    return Curves(target, tuple(curves[1] for curves in grown), grown, measured, walking)


def _compiled(model: PreTrainedModel, drafters: Sequence[Drafter], eager: Curves, opened: Opened) -> Curves:
    """The curves of compiled steps, from those of eager ones and few that are compiled: of each drafter one, with its
    default tree."""
    points = _targets(COMPILED_SIZES)
    shapes = [_usual(drafter) for drafter in drafters]
    points += [((index, 0), drafter, shape) for index, (drafter, shape) in enumerate(zip(drafters, shapes))]
    seconds = _seconds(model, opened, points)
    target = moved(eager.target, {size: seconds[size] for size in COMPILED_SIZES})
    drafts: list[Curve] = []
    for index, drafter in enumerate(drafters):
        shape, first = shapes[index], len(drafts)
        own = eager.of(first, first + len(parts_of(drafter)))
        cost = max(seconds[index, 0] - interpolate(target, len(shape)), 0.0)
        known = own.drafting(shape)
        for curve, depth, share in zip(own.drafts, own.depths(shape), known):
            part = share / sum(known) if sum(known) > 0 else 1 / len(known)
            drafts.append(scaled(curve, depth, cost * part))
    return Curves(target, tuple(drafts))


def moved(eager: Mapping[int, float], few: Mapping[int, float]) -> Curve:
    """The curve through the points `few`, which between them differs from `eager` by evenly growing seconds."""
    saved = {size: eager[size] - seconds for size, seconds in few.items()}
    return rising({size: seconds - interpolate(saved, size) for size, seconds in eager.items()})


def scaled(eager: Mapping[int, float], level: int, seconds: float) -> Curve:
    """The curve that is `seconds` at `level`, in proportion to `eager` elsewhere, or to the levels where that is 0."""
    known = interpolate(eager, level)
    return {at: seconds * (cost / known if known > 0 else at / level) for at, cost in eager.items()}


def _levels(drafter: Drafter) -> tuple[int, ...]:
    """The levels at which drafting is timed. What forwards nodes, and so can grow trees, can draft at any depth; others
    draft no deeper than their traits say."""
    if drafter.traits.fills_dynamic:
        return 1, 4, DEEPEST
    return tuple(sorted({1, min(drafter.traits.deepest, DEEPEST)}))


def _usual(drafter: Drafter) -> TreeShape:
    """The default tree of `drafter`, or a chain where that is the root alone or larger than what is timed."""
    usual = 1 < len(drafter.default_shape) <= max(SIZES)
    return drafter.default_shape if usual else TreeShape.chain(min(drafter.traits.deepest, DEEPEST))


def _targets(sizes: Sequence[int]) -> list[Point]:
    return [(size, Blank() if size > 1 else NoDrafter(), TreeShape.chain(size - 1)) for size in sizes]


def _seconds(model: PreTrainedModel, opened: Opened, points: Sequence[Point]) -> dict[Key, float]:
    """Seconds of a step at each point. An engine is timed when it is made, and again after the next one was. Those of
    equal size, which are compared, follow one another."""
    seconds: dict[Key, float] = {}
    before: tuple[Key, Executor] | None = None
    for key, drafter, shape in sorted(points, key=lambda point: len(point[2])):
        runner = opened(drafter, shape)
        seconds[key] = alone(model, runner)
        if before is not None:
            seconds[before[0]] = min(seconds[before[0]], alone(model, before[1]))
        before = key, runner
    if before is not None:
        seconds[before[0]] = min(seconds[before[0]], alone(model, before[1]))
    return seconds
