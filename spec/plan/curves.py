"""Step-time curves of a target and its drafters on this device: seconds by nodes, and of drafting by levels.

A step in use has the processor's caches to itself, and one that takes turns with others has not, which matters most
where weights are small: so each engine is timed alone, in a block of steps, and dropped soon after. What else the
machine does only ever adds time, so each block is repeated after the next engine's, and the smaller median counts.

Eager steps cost nothing to make, so all points are timed. Where every point has to be compiled on a CPU, a few are: as
both executors multiply by the same operators, what compiling saves grows evenly between them. Knows nothing of
acceptance.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedModel

from ..engines.executors import Executor
from ..proposal import Drafter, DraftSampling, NoDrafter
from ..tree import TreeShape
from .step_times import Blank, alone, open_idle
from .trees import interpolate

SIZES = (1, 2, 5, 9, 16, 32)  # nodes; with those of chains of 1, 4 and 8 tokens, to which drafting adds
COMPILED_SIZES = (1, 9, 32)
DEEPEST = 8  # levels of a planned tree

Key = TypeVar("Key", bound=Hashable)
Curve = dict[int, float]


@dataclass(frozen=True)
class Curves:
    """`target[n]`: seconds of a step with n nodes, without drafting. `drafts[i][d]`: of drafter i drafting d levels."""

    target: Curve
    drafts: tuple[Curve, ...]

    def of(self, first: int, end: int) -> "Curves":
        """Those of the drafters from number `first` to before `end`."""
        return Curves(self.target, self.drafts[first:end])

    def step(self, shape: TreeShape) -> float:
        """Foretold seconds of a step with the tree `shape`; of two drafters the second drafts the root's last branch,
        which is a chain."""
        depths = [shape.max_depth]
        if len(self.drafts) == 2:
            branch = [shape.children[0][-1]]
            while shape.children[branch[-1]]:
                branch.append(shape.children[branch[-1]][0])
            depths = [max(shape.depths[node] for node in range(len(shape)) if node not in branch), len(branch)]
        drafting = (interpolate(curve, min(depth, max(curve))) for curve, depth in zip(self.drafts, depths))
        return interpolate(self.target, len(shape)) + sum(drafting)


def measure(
    model: PreTrainedModel, drafters: Sequence[Drafter], executor: str, sampling: DraftSampling | None = None
) -> Curves:
    """The curves of a target and some drafters with one executor."""
    opened = functools.partial(open_idle, model, sampling=sampling)
    if "compiled" not in executor or model.device.type != "cpu":
        return _measured(model, drafters, functools.partial(opened, executor), SIZES, [_levels(d) for d in drafters])
    eager = _measured(model, drafters, functools.partial(opened, "eager"), SIZES, [_levels(d) for d in drafters])
    deepest = [(min(drafter.traits.deepest, DEEPEST),) for drafter in drafters]
    few = _seconds(model, _points(drafters, functools.partial(opened, executor), COMPILED_SIZES, deepest))
    target = moved(eager.target, {size: few[size] for size in COMPILED_SIZES})
    beyond = [max(few[i, level] - interpolate(target, level + 1), 0.0) for i, (level,) in enumerate(deepest)]
    drafts = (scaled(curve, level, cost) for curve, (level,), cost in zip(eager.drafts, deepest, beyond))
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
    """The levels at which drafting is timed. What follows any tree drafts no deeper than its traits say."""
    if drafter.traits.follows_any_tree:
        return tuple(sorted({1, min(drafter.traits.deepest, DEEPEST)}))
    return 1, 4, DEEPEST


def _measured(
    model: PreTrainedModel,
    drafters: Sequence[Drafter],
    opened: Callable[[Drafter, TreeShape], Executor],
    sizes: Sequence[int],
    levels: Sequence[Sequence[int]],
) -> Curves:
    seconds = _seconds(model, _points(drafters, opened, sizes, levels))
    target = rising({size: seconds[size] for size in sizes})
    drafts = [
        {level: max(seconds[index, level] - interpolate(target, level + 1), 0.0) for level in each}
        for index, each in enumerate(levels)
    ]
    return Curves(target, tuple(rising({0: 0.0, **costs}) for costs in drafts))


def _points(
    drafters: Sequence[Drafter],
    opened: Callable[[Drafter, TreeShape], Executor],
    sizes: Sequence[int],
    levels: Sequence[Sequence[int]],
) -> Iterable[tuple[int | tuple[int, int], Callable[[], Executor]]]:
    """How to make the engine of each point: of n nodes, or of drafter i and d levels. Steps of as many nodes with
    and without drafting, which are compared, are timed one after the other."""
    points: list[tuple[int, int | tuple[int, int], Drafter]] = []
    points += [(size, size, Blank() if size > 1 else NoDrafter()) for size in sizes]
    for index, each in enumerate(levels):
        points += [(level + 1, (index, level), drafters[index]) for level in each]
    for nodes, key, drafter in sorted(points, key=lambda point: point[0]):
        yield key, functools.partial(opened, drafter, TreeShape.chain(nodes - 1))


def _seconds(model: PreTrainedModel, points: Iterable[tuple[Key, Callable[[], Executor]]]) -> dict[Key, float]:
    """Seconds of a step at each point. An engine is timed when it is made, and again after the next one was."""
    seconds: dict[Key, float] = {}
    before: tuple[Key, Executor] | None = None
    for key, make in points:
        runner = make()
        seconds[key] = alone(model, runner)
        if before is not None:
            seconds[before[0]] = min(seconds[before[0]], alone(model, before[1]))
        before = key, runner
    if before is not None:
        seconds[before[0]] = min(seconds[before[0]], alone(model, before[1]))
    return seconds


def rising(curve: Mapping[int, float]) -> Curve:
    """`curve` where no smaller step costs more than a larger one, which only happens where it was disturbed."""
    points = sorted(curve, reverse=True)
    return dict(sorted(zip(points, itertools.accumulate((curve[point] for point in points), min))))
