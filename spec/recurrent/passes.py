"""What a forward over layers with a state is of: consecutive text, or the nodes of a tree.

A state stands for the first `held` tokens of a row. Text is absorbed as it is read. Nodes are not: a node sees the
state through the nodes on its way up to it, and only a commit absorbs. Where a drafter's root, or more, is in the state
already, the first levels of its tree are left out of every way up. Knows no layer and no model.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tree import Ancestry, TokenTree

if TYPE_CHECKING:
    from .states import LayerStates


class Pass:
    """A forward of one thread; `layer` is the layer that is at work, which the cache says."""

    layer: "LayerStates | None" = None
    window = 0  # which of the layer's convolutions
    calls = 0  # of the layer's rule


class TextPass(Pass):
    """Text (R, n) of `rows` (R,), None for all, follows what they hold; behind its end a row is padded."""

    def __init__(self, rows: Tensor | None, inside: Tensor):
        self.rows = rows
        self.inside = inside  # (R, n) bool: tokens, not padding
        self.count = inside.sum(1)  # (R,)

    def of(self, state: Tensor) -> Tensor:
        """The rows of a `state` (B, ...) that are read."""
        return state if self.rows is None else state[self.rows]

    def put(self, state: Tensor, new: Tensor) -> None:
        """Write the state (R, ...) behind the text."""
        if self.rows is None:
            state.copy_(new)
        else:
            state[self.rows] = new.to(state.dtype)


class NodePass(Pass):
    """The nodes `index` (n,) of `tree`, or all, of which the first `skip` (B,) levels are in the states."""

    def __init__(self, tree: Ancestry, index: Tensor, skip: Tensor, levels: int):
        self.index, self.size = index, tree.size
        self.levels = levels  # how many nodes one after the other are forwarded at once
        depths = tree.depths.expand(len(skip), -1)
        inside = depths >= skip[:, None]  # (B, N): nodes that are not in the state
        parents = tree.parents.expand(len(skip), -1)
        above = parents.clamp(min=0)
        self.parents = torch.where((parents >= 0) & inside.gather(1, above), above, -1)  # (B, N), -1: the state
        self.heights = depths - skip[:, None]  # (B, N): nodes between a node and the state
        self.related = tree.ancestors & inside[:, None]  # (B, N, N): itself and the nodes above it

    def windows(self, width: int) -> Tensor:
        """Where the last `width` inputs up to each node are, (B, n, width), the node's last: below width - 1 in the
        state of so many columns, then at the nodes behind it."""
        held, columns = width - 1, []
        node, height = self.index.expand(len(self.parents), -1), self.heights[:, self.index]  # (B, n)
        for back in range(width):
            columns.append(torch.where(height >= back, held + node, (held + height - back).clamp(min=0)))
            node = self.parents.gather(1, node).clamp(min=0)
        return torch.stack(columns[::-1], dim=2)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The nodes of `path` (B, D+1) that are absorbed, `inside` (B, D+1): `count` (B,) of them, from `skip` (B,) on."""

    path: Tensor
    inside: Tensor
    count: Tensor
    skip: Tensor

    def gather(self, kept: Tensor) -> Tensor:
        """Of inputs (B, N, ...) those on the path, (B, D+1, ...)."""
        return kept[torch.arange(len(kept), device=kept.device)[:, None], self.path]


def chain(columns: int, device: torch.device) -> TokenTree:
    """So many tokens one after the other, as a tree."""
    depths = torch.arange(columns, device=device)
    return TokenTree.from_parents(depths[None] - 1, columns - 1, min(1, columns - 1))
