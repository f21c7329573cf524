"""Token trees: the shape that a drafter fills and a target verifies.

Node 0 is the root, the last committed token; `parents[0] = -1`, and every parent precedes its children. A chain is a
tree. `TreeShape` describes a tree on the host, `DynamicShape` one whose nodes the drafter chooses anew in each step,
and `TokenTree` holds who is whose parent as tensors, without the tokens. None of them knows models or rules. (Trees of
drafted tokens: SpecInfer, Medusa, Sequoia.)
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

MOST_NODES = 4096  # of a tree, root included: masks and sibling tables grow with the square
MOST_DEPTH = 512


@dataclass(frozen=True)
class TreeShape:
    """The parents of a tree's nodes, in breadth-first order, root first.

    `TreeShape(parents)` takes any order in which parents precede children and sorts it level by level.
    Raises ValueError for a list that is not such a tree, and for a tree beyond `MOST_NODES` or `MOST_DEPTH`.
    """

    parents: tuple[int, ...]

    def __post_init__(self):
        try:
            parents = [operator.index(parent) for parent in islice(self.parents, MOST_NODES + 1)]
        except TypeError:
            raise ValueError(f"tree {self.parents!r} is not a list of whole numbers") from None
        check_size("of a list of parents", len(parents), 0)
        if not parents or parents[0] != -1:
            raise ValueError(f"tree {parents[:8]}: the first node is the root, its parent must be -1")
        below: list[list[int]] = [[] for _ in parents]
        for node, parent in enumerate(parents[1:], 1):
            if not 0 <= parent < node:
                raise ValueError(f"tree: node {node} has parent {parent}, but a parent must be an earlier node")
            below[parent].append(node)
        order = [0]
        for node in order:  # `order` grows in the loop: breadth first, siblings next to one another
            order += below[node]
        index_of_node = {node: index for index, node in enumerate(order)}
        object.__setattr__(self, "parents", tuple(index_of_node.get(parents[node], -1) for node in order))
        check_size("of a list of parents", len(self), self.max_depth)

    @classmethod
    def chain(cls, length: int) -> "TreeShape":
        """A chain of `length` drafted tokens behind the root."""
        check_size(f"'chain:{shown(length)}'", 1 + length, length)
        return cls(tuple(range(-1, length)))

    @classmethod
    def per_level(cls, children: Sequence[int]) -> "TreeShape":
        """`(4, 2, 1)`: four children of the root, two of each of those, one of each of those."""
        size = level_size = 1
        for depth, count in enumerate(children, 1):
            level_size *= count
            size += level_size
            check_size(repr(shown("x".join(map(str, children[:40])))), size, depth)
        parents, level = [-1], [0]
        for count in children:
            start = len(parents)
            parents += [node for node in level for _ in range(count)]
            level = list(range(start, len(parents)))
        return cls(tuple(parents))

    def beside(self, *others: "TreeShape") -> "TreeShape":
        """This tree and `others` joined at one root; the children of the other roots come last."""
        parents = list(self.parents)
        for shape in others:
            moved = len(parents) - 1
            check_size("of several trees behind one root", moved + len(shape), 0)
            parents += [0 if parent == 0 else parent + moved for parent in shape.parents[1:]]
        return TreeShape(tuple(parents))

    def part(self, nodes: Sequence[int]) -> "TreeShape":
        """The subtree of `nodes`, ascending; the parent of every node but the first must be among them."""
        index_of_node = {node: index for index, node in enumerate(nodes)}
        return TreeShape(tuple(index_of_node.get(self.parents[node], -1) for node in nodes))

    @classmethod
    def parse(cls, text: "str | Sequence[int] | TreeShape | DynamicShape") -> "TreeShape | DynamicShape":
        """Read `"chain:5"`, `"4x2x1"` (children per level), one of these and chains at the same root
        (`"4x2x1+chain:6"`), a list of parents, or `"dynamic:24x6x4"` (nodes, depth and width of a tree that the drafter
        grows). Raises ValueError for anything else."""
        if isinstance(text, (TreeShape, DynamicShape)):
            return text
        if not isinstance(text, str):
            try:
                return cls(tuple(islice(text, MOST_NODES + 1)))
            except TypeError:
                raise ValueError(f"tree={text!r} is neither a shape like '4x2x1' nor a list of parents") from None
        kind, _, rest = text.partition(":")
        sizes = _whole_numbers(rest.split("x"))
        if kind == "dynamic" and sizes is not None and len(sizes) == 3:
            return DynamicShape(*sizes)
        first, *others = text.split("+")
        tree = cls._static(first)
        lengths = _whole_numbers(branch.removeprefix("chain:") for branch in others if branch.startswith("chain:"))
        if tree is None or lengths is None or len(lengths) < len(others):
            raise ValueError(
                f"tree {shown(text)!r} is neither 'chain:5' nor children per level like '4x2x1' nor both like "
                "'4x2x1+chain:6' nor 'dynamic:24x6x4' (nodes, depth, width)"
            )
        check_size(repr(shown(text)), len(tree) + sum(lengths), max([tree.max_depth, *lengths]))
        return tree.beside(*map(cls.chain, lengths))

    @classmethod
    def _static(cls, text: str) -> "TreeShape | None":
        """`"chain:5"` or `"4x2x1"`; None for anything else."""
        kind, colon, length = text.partition(":")
        if colon:
            count = _whole_number(length)
            return cls.chain(count) if kind == "chain" and count is not None else None
        counts = _whole_numbers(text.split("x"))
        return cls.per_level(counts) if counts is not None and all(counts) else None

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def slots(self) -> int:
        """How many cache slots a step may write, from the root's on."""
        return len(self)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def max_depth(self) -> int:
        return self.depths[-1]

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], 1):
            children[parent].append(node)
        return tuple(tuple(nodes) for nodes in children)

    @property
    def max_children(self) -> int:
        return max(len(nodes) for nodes in self.children)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The nodes of each depth, 0 to `max_depth`."""
        levels: list[list[int]] = [[] for _ in range(self.max_depth + 1)]
        for node, depth in enumerate(self.depths):
            levels[depth].append(node)
        return tuple(tuple(nodes) for nodes in levels)


@dataclass(frozen=True)
class DynamicShape:
    """A tree whose parents the drafter chooses at every step: only the sizes are fixed.

    `nodes` includes the root. On each of `max_depth` levels the `width` best paths are expanded by `width` children
    each. Raises ValueError for sizes that do not fit together or are beyond those of fixed trees.
    """

    nodes: int
    max_depth: int
    width: int

    def __post_init__(self):
        text = f"'{self.text}'"
        check_size(f"{text} (with the paths that it expands)", max(self.slots, 1 + self.width), self.max_depth)
        most = 1 + self.width + self.width**2 * (self.max_depth - 1)
        if not (self.width >= 1 and self.max_depth >= 1 and 2 <= self.nodes <= most):
            raise ValueError(
                f"tree {text} (nodes, depth, width): {self.max_depth} levels of width {self.width} give 2 to {most} "
                "nodes"
            )

    def __len__(self) -> int:
        return self.nodes

    @property
    def text(self) -> str:
        """As `tree=` takes it."""
        return f"dynamic:{shown(self.nodes)}x{shown(self.max_depth)}x{shown(self.width)}"

    @property
    def batch(self) -> int:
        """How many paths are expanded together: no more than the tree has nodes."""
        return min(self.width, self.nodes - 1)

    @property
    def slots(self) -> int:
        """How many cache slots a step may write, from the root's on, by the drafter's forwards too."""
        return max(self.nodes, 1 + self.batch * (self.max_depth - 1))

    @property
    def max_children(self) -> int:
        return self.width


@dataclass(frozen=True, slots=True, eq=False)
class Ancestry:
    """Who descends from whom, as tensors. R is 1 (one tree for all rows) or the batch size."""

    parents: Tensor  # (R, N)
    depths: Tensor  # (R, N)
    ancestors: Tensor  # (R, N, N) bool: [i, j] says that j is i or an ancestor of i

    @property
    def size(self) -> int:
        return self.parents.shape[-1]

    @classmethod
    def of_roots(cls, rows: int, nodes: int, device: torch.device) -> "Ancestry":
        """Buffers for `nodes` nodes, to which all but the root are still to be added."""
        numbers = torch.zeros(rows, nodes, dtype=torch.int64, device=device)
        ancestors = torch.eye(nodes, dtype=torch.bool, device=device).repeat(rows, 1, 1)
        return cls(numbers - 1, numbers, ancestors)

    def add(self, nodes: slice, parents: Tensor) -> None:
        """Add `nodes`, n neighbours, below their `parents` (R, n), which have been added before."""
        self.parents[:, nodes] = parents
        self.depths[:, nodes] = self.depths.gather(1, parents) + 1
        above = self.ancestors.gather(1, parents[..., None].expand(-1, -1, self.size))  # (R, n, N)
        itself = torch.arange(nodes.start, nodes.stop, device=parents.device)[:, None]
        self.ancestors[:, nodes] = above | (itself == torch.arange(self.size, device=parents.device))


@dataclass(frozen=True, slots=True, eq=False)
class TokenTree(Ancestry):
    """A tree as tensors; D is `max_depth`."""

    paths: Tensor  # (R, N, D+1): the node at each depth on the way to i, then i repeated
    ranks: Tensor  # (R, N): how many siblings precede the node
    max_depth: int
    max_children: int

    @classmethod
    def of(cls, shape: TreeShape, device: torch.device | str) -> "TokenTree":
        parents = torch.tensor([shape.parents], device=device)  # (1, N)
        return cls.from_parents(parents, shape.max_depth, shape.max_children)

    @classmethod
    def from_parents(cls, parents: Tensor, max_depth: int, max_children: int) -> "TokenTree":
        """Compute all tensors from `parents` (R, N), which may change every step: no value is read on the host."""
        nodes = torch.arange(parents.shape[-1], device=parents.device)
        climb = [nodes.expand_as(parents)]  # the ancestor d edges up, or -1
        for _ in range(max_depth):
            above = parents.gather(-1, climb[-1].clamp(min=0))
            climb.append(torch.where(climb[-1] >= 0, above, -1))
        ancestry = torch.stack(climb, dim=-1)  # (R, N, D+1)
        none = torch.zeros(*parents.shape, len(nodes), dtype=torch.bool, device=parents.device)
        depths = (ancestry >= 0).sum(-1) - 1
        levels = torch.arange(max_depth + 1, device=parents.device)
        siblings = parents[:, :, None] == parents[:, None, :]
        return cls(
            parents=parents,
            depths=depths,
            ancestors=none.scatter(2, ancestry.clamp(min=0), True),  # the root is everyone's
            paths=ancestry.gather(-1, (depths[:, :, None] - levels).clamp(min=0)),
            ranks=(siblings & (nodes < nodes[:, None])).sum(-1),
            max_depth=max_depth,
            max_children=max_children,
        )


def check_size(what: str, nodes: int, depth: int) -> None:
    """Raise ValueError for a tree, called `what` in the message, beyond `MOST_NODES` or `MOST_DEPTH`."""
    if nodes > MOST_NODES:
        raise ValueError(f"tree {what} has more than {MOST_NODES} nodes, the root among them; draft a smaller one")
    if depth > MOST_DEPTH:
        raise ValueError(f"tree {what} is more than {MOST_DEPTH} levels deep; draft a shallower one")


def shown(value: int | str) -> str:
    """`value` as text, shortened for messages."""
    text = str(value)
    return text if len(text) <= 48 else f"{text[:40]}…"


def _whole_numbers(texts: Iterable[str]) -> list[int] | None:
    """The whole numbers written in `texts`; None where one of them is no number."""
    numbers = [_whole_number(text) for text in texts]
    valid = [number for number in numbers if number is not None]
    return valid if len(valid) == len(numbers) else None


def _whole_number(text: str) -> int | None:
    """The number written in `text`, 10**18 for more than 18 digits; None where it is not made of digits."""
    if not text.isdecimal():
        return None
    digits = text.lstrip("0") or "0"
    return int(digits) if len(digits) <= 18 else 10**18
