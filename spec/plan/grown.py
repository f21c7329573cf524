"""Which dynamic tree to grow: the replay of the widest one at every position tells of all smaller ones.

The nodes of a dynamic tree stand in the order of their scores, and the first n of them are the tree of n nodes: from
the widest tree follows how many nodes a tree must have to hold the path that the text takes. Which paths a shallower or
narrower tree expands follows from the order too, but for a few that the widest one did not expand, which then count as
not drafted. Tokens per step are those of decoding: a step begins where the last one ended. Knows no models, no clocks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..tree import DynamicShape
from .replay import step_positions
from .trees import Plan, interpolate

WIDEST = DynamicShape(512, 16, 16)
WIDTHS = (1, 2, 4, 8, 16)
BUDGETS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # nodes, root included
NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class Grown:
    """The widest tree at each of T positions of a text, and its path that the text takes."""

    parents: Tensor  # (T, N)
    depths: Tensor  # (T, N)
    ranks: Tensor  # (T, N): how many better siblings a node has
    path: Tensor  # (T, D): nodes from the root's child on, -1 behind the last

    def needed(self, width: int) -> tuple[Tensor, Tensor]:  # (T, D, D), (T, D)
        """[position, depth - 1, level - 1]: the fewest nodes of a tree of that depth and `width` that holds the path's
        node at the level, `NEVER` where none does; and [position, depth - 1]: the fewest with which the tree, grown as
        far as that depth, holds any node there."""
        expanded = self.depths == 0  # (T, N)
        grown, needed, reached, path = expanded, [], [], self.path.clamp(min=0)
        for depth in range(1, self.path.shape[1] + 1):
            new = expanded.gather(1, self.parents.clamp(min=0)) & (self.ranks < width) & (self.depths == depth)
            grown = grown | new
            places = grown.cumsum(1)  # (T, N): what is left of a node in this tree, and itself
            held = grown.gather(1, path) & (self.path >= 0)
            needed.append(torch.where(held, places.gather(1, path), NEVER))
            reached.append(torch.where(new, places, NEVER).amin(1))
            expanded = expanded | (new & (new.cumsum(1) <= width))
        return torch.stack(needed, dim=1), torch.stack(reached, dim=1)


@dataclass(frozen=True, eq=False)
class GrownReplay:
    """The calibration of a drafter that grows dynamic trees: the widest tree at every position of some texts."""

    texts: Sequence[Grown]
    _needed: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # [width]

    def steps(self, shape: DynamicShape) -> tuple[int, int, int]:
        """Tokens, steps, and forwards of the drafter in them, of decoding with `shape`. A drafter forwards no level
        below one that brought no node into the tree, as it does beside a streamed target."""
        if shape.width not in self._needed:
            self._needed[shape.width] = [text.needed(shape.width) for text in self.texts]
        tokens = steps = forwards = 0
        for needed, reached in self._needed[shape.width]:
            accepted = (needed[:, shape.max_depth - 1] <= len(shape)).sum(-1).tolist()
            levels = (reached[:, : shape.max_depth - 1] <= len(shape)).sum(-1).tolist()
            begun = [*step_positions(len(accepted), accepted.__getitem__)]
            tokens, steps = tokens + len(accepted), steps + len(begun)
            forwards += sum(1 + levels[position] for position in begun)
        return tokens, steps, forwards

    def plan(
        self, shape: DynamicShape, checking: float, drafting: Mapping[int, float], plain: float, walking: float = 0.0
    ) -> Plan:
        """The plan for `shape`, with which a step takes `checking` seconds without drafting, and `walking` more for
        each token that it accepts; `drafting[d]` are the seconds of d forwards of the drafter."""
        tokens, steps, forwards = self.steps(shape)
        seconds = checking + (tokens / steps - 1) * walking + interpolate(drafting, forwards / steps)
        return Plan.of(shape, tokens / steps, seconds, plain)

    @property
    def first_guess(self) -> float:
        """The share of positions at which the likeliest token is the text's."""
        return float(torch.cat([text.path[:, 0] == 1 for text in self.texts]).float().mean())


def plans(
    replay: GrownReplay,
    target_seconds: Mapping[int, float],
    draft_seconds: Mapping[int, Mapping[int, float]],
    walking: Callable[[int], float] = lambda nodes: 0.0,
) -> list[Plan]:
    """The best tree of each number of nodes in `BUDGETS`; `draft_seconds[width][depth]` are the seconds of growing a
    tree, `walking(nodes)` those of each accepted token in one of so many nodes, the others as for `choose_tree`."""
    plain, best = target_seconds[1], []
    for nodes in BUDGETS:
        if nodes <= max(target_seconds):
            checking, candidates = interpolate(target_seconds, nodes), []
            for width, costs in draft_seconds.items():
                for shape in filter(None, (shape_of(nodes, depth, width) for depth in range(1, max(costs) + 1))):
                    candidates.append(replay.plan(shape, checking, costs, plain, walking(nodes)))
            best.append(max(candidates, key=lambda plan: plan.speedup))
    return best


def shape_of(nodes: int, depth: int, width: int) -> DynamicShape | None:
    """The shape of these sizes; None where they do not fit together."""
    try:
        return DynamicShape(nodes, depth, width)
    except ValueError:
        return None
